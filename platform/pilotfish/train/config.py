"""How a model is trained: length, batch, optimizer, schedule, precision, and how often to look."""

from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pilotfish.config import Config


class TrainConfig(Config):
    """Optimizer settings of one run. Say how long by `steps` or by `epochs`, not both."""

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    batch_size: PositiveInt = 32
    """Rows (for preferences: pairs) per optimizer step, over all workers."""
    micro_batch_size: PositiveInt | None = None
    """Rows per forward pass of one worker; the rest of its share is accumulated. Default: all."""
    learning_rate: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; takes precedence over `warmup_ratio`."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    final_lr_ratio: float = Field(default=0.05, ge=0, le=1)
    """Where the cosine ends, as a share of `learning_rate`."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    deepspeed: str | int | dict[str, Any] = 0
    """A DeepSpeed JSON file, its content, or a ZeRO stage (0 to 3) with our defaults."""
    log_every: PositiveInt = 10
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on held-out rows; 0 evaluates at the end only."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints to resume from; 0 keeps the last one only."""
    num_to_keep: PositiveInt = 2
    """How many checkpoints of a run lie on disk; older ones are deleted."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}; give exactly one of them"
            )
        return self

    def total_steps(self, num_rows: int) -> int:
        """Return the number of optimizer steps over a data set of this many rows."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "the validator lets exactly one of them be None"
        return max(1, int(self.epochs * num_rows / self.batch_size))

    def warmup(self, total_steps: int) -> int:
        """Return the number of warm-up steps of a run of this length."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return int(self.warmup_ratio * total_steps)
