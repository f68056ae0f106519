"""Sections that every deployment has: what a replica may use, and how many there are."""

from typing import Annotated

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pilotfish.config import Config
from pilotfish.models.loading import Dtype

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
    the base replicas that use it, once per version; by default one."""
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
