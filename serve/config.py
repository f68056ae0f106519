"""What to serve: the `args` of the application, as a typed config."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pilotfish.config import Config, parse, resolve_references
from pilotfish.errors import ConfigError
from pilotfish.models.loading import Dtype


def _check_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(
            "wanted letters, digits, '.', '_' and '-' (a ':' separates base and guide in the "
            "model names of requests)"
        )
    return name


def _check_model_id(model_id: str) -> str:
    for part in model_id.split("/"):
        _check_name(part)
    return model_id


Name = Annotated[str, AfterValidator(_check_name)]
ModelId = Annotated[str, AfterValidator(_check_model_id)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Ray resources of one replica; fractions share a core or a GPU."""


class ProcessConfig(Config):
    """One replica's resources, and how it computes."""

    num_cpus: Share = 1
    num_gpus: Share = 0
    device: str = "auto"
    """`auto` is the accelerator that Ray gave this replica, else the CPU."""
    dtype: Dtype = "auto"
    threads: PositiveInt = 1
    """Threads of a forward on the CPU. More replicas usually beat more threads."""


class Autoscaling(Config):
    """How many replicas there are, by the requests that each works on."""

    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt
    target_ongoing_requests: PositiveFloat | None = None
    """Per replica; by default what fills its slots to three quarters. For a remote guide these are
    calls of base replicas, of which each has one at a time."""
    upscale_delay_s: NonNegativeFloat = 10
    """A burst that is over sooner starts nothing: loading a model takes longer than it."""
    downscale_delay_s: NonNegativeFloat = 300
    """A replica that goes takes its caches with it, and is dear to load again."""

    @model_validator(mode="after")
    def _check(self) -> "Autoscaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, wanted at least min_replicas, "
                f"{self.min_replicas}"
            )
        return self


class ReplicasConfig(Config):
    """How many replicas a deployment has: a number, or what autoscaling makes of the load."""

    num_replicas: PositiveInt = 1
    autoscaling: Autoscaling | None = None
    """Instead of `num_replicas`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "ReplicasConfig":
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscaling are both set; leave one out")
        return self

    @property
    def most_replicas(self) -> int:
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas


class BaseConfig(ProcessConfig, ReplicasConfig):
    """The base LM, and the decode loop of each of its replicas."""

    model_id: ModelId = "base"
    """What requests call it."""
    path: str
    """A folder, a hub id, or an MLflow URI (`models:/name@alias`, `runs:/id/path`)."""
    num_slots: PositiveInt = 32
    """Requests that one replica decodes at a time; more wait."""
    max_ongoing_requests: PositiveInt | None = None
    """Requests sent to one replica, decoding and waiting; by default twice the slots."""
    stall_s: PositiveFloat = 60
    """A replica whose decode step takes longer than this is unhealthy, and Serve replaces it."""

    @property
    def ongoing(self) -> int:
        return self.max_ongoing_requests or 2 * self.num_slots


class GuideConfig(ProcessConfig, ReplicasConfig):
    """One guide: in the processes of the base replicas, or in replicas of its own."""

    name: Name
    path: str
    """A folder, or an MLflow URI (`models:/name@alias`, `runs:/id/path`)."""
    weight: float | None = Field(default=None, ge=-100, le=100)
    """For requests that name the guide without one; by default the weight of its card."""
    placement: Literal["colocated", "remote"] = "colocated"
    num_slots: PositiveInt | None = None
    """Sequences whose cache one replica keeps; by default enough for all base replicas."""
    timeout_s: PositiveFloat = 5
    """How long a step waits for the guide, in all. Then requests fail or go on without it, as they
    ask for with `on_failure`."""
    hedge_s: PositiveFloat = 1
    """When an answer takes longer than this, a second replica is asked as well."""
    cooldown_s: NonNegativeFloat = 5
    """So long is a guide left alone that did not answer in time."""
    precision: Literal["half", "full"] = "half"
    """Of log-probs on their way. Half is what a 70B's own arithmetic comes to."""

    @model_validator(mode="after")
    def _own_process_only_if_remote(self) -> "GuideConfig":
        common = {"name", "path", "weight", "placement", "dtype"}
        if self.placement == "colocated" and (ignored := self.model_fields_set - common):
            raise ValueError(
                f"{', '.join(sorted(ignored))} would have no effect on a colocated guide, which "
                "runs in the base's processes. Leave it out, or set placement to remote"
            )
        return self


class IngressConfig(ReplicasConfig):
    """The HTTP side: admission, defaults of requests, and when to give up on a replica."""

    num_cpus: Share = 0.5
    max_tokens: PositiveInt = 256
    """For requests that do not say; never more than the context leaves room for."""
    max_in_flight: PositiveInt = 256
    """Requests that one ingress replica works on; beyond it answers 429."""
    retry_after_s: PositiveInt = 1
    first_token_deadline_s: PositiveFloat = 120
    """From sending a request to a replica to its first token: queueing and prefill."""
    token_deadline_s: PositiveFloat = 10
    """Between tokens. A stuck replica raises nothing; this is what notices it."""
    max_attempts: PositiveInt = 4
    """Replicas tried in a row without one new token."""


class ServeConfig(Config):
    """A base, its guides and the API in front of them: one Serve application."""

    base: BaseConfig
    guides: tuple[GuideConfig, ...] = ()
    ingress: IngressConfig = IngressConfig()
    guides_poll_s: NonNegativeFloat = 10
    """How often the aliases of guides (`models:/name@alias`) are looked at; 0 is never."""
    guide_load_s: PositiveFloat = 600
    """How long a replica may take to load another version of a guide."""
    tracking_uri: str | None = None
    """MLflow server that resolves `models:/` and `runs:/`; by default `MLFLOW_TRACKING_URI`."""

    @model_validator(mode="after")
    def _consistent(self) -> "ServeConfig":
        names = [guide.name for guide in self.guides]
        if len(set(names)) != len(names):
            raise ValueError(f"guide names must differ, got {', '.join(names)}")
        for guide in self.guides:
            if guide.num_slots is not None and guide.num_slots < self.base.num_slots:
                raise ValueError(
                    f"guide {guide.name!r} has num_slots={guide.num_slots}, fewer than the base's "
                    f"{self.base.num_slots} rows of one call. Raise it, or leave it out"
                )
            patience_s = min(self.base.stall_s, self.ingress.token_deadline_s)
            if guide.placement == "remote" and guide.timeout_s >= patience_s:
                raise ValueError(
                    f"guide {guide.name!r} has timeout_s={guide.timeout_s:g}, but a base replica "
                    f"that is silent for {patience_s:g} s (base.stall_s, ingress.token_deadline_s) "
                    "is taken for a stuck one. Lower it, or raise those"
                )
        return self

    def guide(self, name: str) -> GuideConfig:
        """Return the config of a guide that is served."""
        return next(guide for guide in self.guides if guide.name == name)

    def guide_slots(self, guide: GuideConfig) -> int:
        """Slots of one process that runs this guide."""
        if guide.placement == "colocated":
            return self.base.num_slots
        return guide.num_slots or self.base.num_slots * self.base.most_replicas


def parse_args(args: Mapping[str, Any]) -> ServeConfig:
    """Read the application's arguments. Raises `ConfigError`, with the nearest valid key.

    They are a tree (a Serve config file), or flat text as `serve run serve.app:build a.b=c` sends
    it: then keys are dotted paths and values are YAML.
    """
    tree: dict[str, Any] = {}
    for key, value in args.items():
        parsed = _read_yaml(key, value) if isinstance(value, str) else value
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"argument {key!r}: {parent} is {node!r}, not a section.")
        node[last] = parsed
    return parse(ServeConfig, resolve_references(tree), source="serve args")


def _read_yaml(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"argument {key!r} is not valid YAML: {error}") from error
