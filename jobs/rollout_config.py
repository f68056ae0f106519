"""How completions to learn from are made and judged."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from pilotfish.config import Config
from pilotfish.evaluation.rewards import RewardConfig


class RewardTerm(Config):
    """One judge, and how much it counts."""

    judge: RewardConfig
    weight: float = 1.0
    part: str | None = None
    """One part of what it judges, such as `helpful` in the kitchen. Default: its whole reward."""


class RolloutConfig(Config):
    """Where completions are decoded and judged, and how many."""

    rewards: tuple[RewardTerm, ...] = Field(min_length=1)
    """What is learned from: the weighted sum of these."""
    monitor: RewardConfig | None = None
    """A judge that nothing is learned from, such as the truth of the kitchen. Where it falls while
    the reward rises, the reward is being exploited, and the run warns."""
    where: Literal["workers", "actors"] = "workers"
    """`workers`: each training worker decodes its share, then learns. `actors`: others decode, each
    with a whole base."""
    num_actors: PositiveInt | None = None
    """For `actors`; default 1. Every training worker has as many as the others, so that there may
    be a few more."""
    gpus_per_actor: NonNegativeFloat = 0
    threads: PositiveInt = 1
    """CPU threads of an actor."""
    overlap: bool = False
    """For `actors`: they decode the next rollout while the workers learn from the last one, with
    the policy as it was before that: one step old. PPO weighs its tokens accordingly."""
    samples_per_prompt: PositiveInt = 4
    max_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64
    """Completions decoded at a time."""
    stop: tuple[str, ...] = ()
    num_heldout: PositiveInt = 128
    """Held-out prompts that an evaluation answers, at most."""

    def actors_per_worker(self, num_workers: int) -> int:
        """Return how many actors each training worker has: all have as many."""
        return 0 if self.where == "workers" else -(-(self.num_actors or 1) // num_workers)

    @model_validator(mode="after")
    def _check_actors(self) -> Self:
        if self.where == "workers":
            # By value: a config that was printed and is read again states its defaults.
            for name in ("num_actors", "gpus_per_actor", "threads", "overlap"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"rollout.{name} is given, but the training workers decode. Set where: "
                        "actors, or leave it out"
                    )
        return self
