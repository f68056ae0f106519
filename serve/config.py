"""What to serve: the `args` of the application, as a typed config."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

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


class BaseConfig(ProcessConfig):
    """The base LM, and the decode loop of each of its replicas."""

    model_id: ModelId = "base"
    """What requests call it."""
    path: str
    """A folder, a hub id, or an MLflow URI (`models:/name@alias`, `runs:/id/path`)."""
    num_replicas: PositiveInt = 1
    num_slots: PositiveInt = 32
    """Requests that one replica decodes at a time; more wait."""
    max_ongoing_requests: PositiveInt | None = None
    """Requests sent to one replica, decoding and waiting; by default twice the slots."""
    stall_s: PositiveFloat = 60
    """A replica whose decode step takes longer than this is unhealthy, and Serve replaces it."""

    @property
    def ongoing(self) -> int:
        return self.max_ongoing_requests or 2 * self.num_slots


class GuideConfig(ProcessConfig):
    """One guide: in the processes of the base replicas, or in replicas of its own."""

    name: Name
    path: str
    """A folder, or an MLflow URI (`models:/name@alias`, `runs:/id/path`)."""
    weight: float | None = Field(default=None, ge=-100, le=100)
    """For requests that name the guide without one; by default the weight of its card."""
    placement: Literal["colocated", "remote"] = "colocated"
    num_replicas: PositiveInt = 1
    num_slots: PositiveInt | None = None
    """Sequences whose cache one replica keeps; by default enough for all base replicas."""
    timeout_s: PositiveFloat = 10
    """How long a base replica waits for one answer before it asks again."""
    max_attempts: PositiveInt = 4

    @model_validator(mode="after")
    def _own_process_only_if_remote(self) -> "GuideConfig":
        common = {"name", "path", "weight", "placement", "dtype"}
        if self.placement == "colocated" and (ignored := self.model_fields_set - common):
            raise ValueError(
                f"{', '.join(sorted(ignored))} would have no effect on a colocated guide, which "
                "runs in the base's processes. Leave it out, or set placement to remote"
            )
        return self


class IngressConfig(Config):
    """The HTTP side: admission, defaults of requests, and when to give up on a replica."""

    num_replicas: PositiveInt = 1
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
        return self

    def guide_slots(self, guide: GuideConfig) -> int:
        """Slots of one process that runs this guide."""
        if guide.placement == "colocated":
            return self.base.num_slots
        return guide.num_slots or self.base.num_slots * self.base.num_replicas


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
