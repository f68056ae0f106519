"""The section `ingress`: who may ask, how much, and what is written down about it."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pilotfish.config import Config
from serve.replicas_config import ReplicasConfig, Share


class LimitsConfig(Config):
    """How large a request may be. What is larger is refused before any work."""

    body_bytes: PositiveInt = 4 << 20
    body_timeout_s: PositiveFloat = 30
    """From a request's headers to the end of its body."""
    num_prompts: PositiveInt = 256
    n: Annotated[int, Field(ge=1, le=128)] = 128
    """Choices per prompt. Prompts times `n` is never more than `max_in_flight`."""
    prompt_tokens: PositiveInt | None = None
    """Per prompt; by default what the context holds."""
    max_tokens: PositiveInt | None = None
    """Per choice; by default what the context holds. A client that does not read what it asked for
    makes the server keep as many."""
    num_stops: Annotated[int, Field(ge=1, le=16)] = 16
    num_logit_biases: PositiveInt = 1024
    choices_per_key: PositiveInt | None = None
    """Of one API key, decoding and waiting at one ingress replica; by default any number."""


class TraceConfig(Config):
    """A trace in MLflow for a share of the requests."""

    uri: str
    """Tracking URI of the MLflow server."""
    experiment: str = "pilotfish-serving"
    sample: Annotated[float, Field(gt=0, le=1)] = 0.01


class IngressConfig(ReplicasConfig):
    """The HTTP side: keys, admission, defaults of requests, and when to give up on a replica."""

    num_cpus: Share = 0.5
    max_tokens: PositiveInt = 256
    """For requests that do not say; never more than the context leaves room for."""
    max_in_flight: PositiveInt = 256
    """Choices (prompts times `n`) that one ingress replica has decoded at a time."""
    max_queued: NonNegativeInt = 256
    """Requests that wait for a place behind them; beyond it answers 429."""
    queue_timeout_s: PositiveFloat = 30
    """How long one waits; then it gets a 429."""
    retry_after_s: PositiveInt = 1
    limits: LimitsConfig = LimitsConfig()
    first_token_deadline_s: PositiveFloat = 120
    """From sending a request to a replica to its first token: queueing and prefill."""
    token_deadline_s: PositiveFloat = 10
    """Between tokens. A stuck replica raises nothing; this is what notices it."""
    max_attempts: PositiveInt = 4
    """Replicas tried in a row without one new token."""
    max_shadows: NonNegativeInt = 8
    """Requests of shadow versions decoded at a time; beyond it they are left out."""

    api_keys_file: str | None = None
    """A file of API keys, one per line: `key`, or `admin:key` for one that may change guides. Every
    node with an ingress replica must have it."""
    api_keys_env: str | None = None
    """Instead of a file: an environment variable of the nodes that holds such lines, or the keys
    with commas between them. One in `runtime_env` would do, but Ray's dashboard shows those."""
    allow_unauthenticated: bool = False
    """Without keys: answer everybody who reaches the server, not this machine alone. Admin routes
    stay with this machine."""
    open_metrics: bool = False
    """Answer /metrics without a key."""

    access_log: bool = True
    """One line of JSON per request, on the replica's standard output."""
    log_prompts: bool = False
    """Have the prompts in it."""
    trace: TraceConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "IngressConfig":
        limits = self.limits
        if self.api_keys_file is not None and self.api_keys_env is not None:
            raise ValueError("api_keys_file and api_keys_env are both set; leave one out")
        if self.allow_unauthenticated and self.has_keys:
            raise ValueError("allow_unauthenticated has no effect where there are API keys")
        if limits.choices_per_key is not None and not self.has_keys:
            raise ValueError(
                "limits.choices_per_key needs API keys: set api_keys_file or api_keys_env"
            )
        if limits.max_tokens is not None and limits.max_tokens < self.max_tokens:
            raise ValueError(
                f"max_tokens, for requests that do not say, is {self.max_tokens}, which is more "
                f"than limits.max_tokens, {limits.max_tokens}"
            )
        if self.log_prompts and not self.access_log:
            raise ValueError("log_prompts needs access_log")
        return self

    @property
    def has_keys(self) -> bool:
        return self.api_keys_file is not None or self.api_keys_env is not None
