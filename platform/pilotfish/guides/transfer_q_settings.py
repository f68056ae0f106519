"""Settings of Transfer Q*: which models, how many rollouts, how long, and which estimate."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validates

from pilotfish.models.reward import RewardReading

_PUBLISHED_TOKENS = {"direct": 20, "indirect": 5}
"""Lengths of the rollouts in the authors' program."""


class TransferQSettings(RewardReading):
    """The models, and how the value of a token is estimated with them."""

    rollout: str
    """Folder or hub id of the aligned LM that continues: one trained by DPO, say."""
    reward: str
    """Folder or hub id of the reward model that reads the continued text."""
    baseline_reward: str | None = None
    """Folder or hub id of the reward that the rollout LM was aligned to, where that is another one.
    For `indirect`."""
    mode: Literal["direct", "indirect"] = "direct"
    num_candidates: PositiveInt = 10
    """`k` of the paper."""
    num_rollouts: PositiveInt = 1
    """Continuations per candidate."""
    rollout_tokens: NonNegativeInt | None = None
    """Length of a continuation. None is up to its end token, or to `max_rollout_tokens`: rewards
    are for whole texts, so a short look ahead is a compromise."""
    max_rollout_tokens: PositiveInt = 128
    rollout_temperature: NonNegativeFloat | None = None
    """None is greedy for one rollout per candidate, and 1 for several."""
    beta: PositiveFloat | None = None
    """KL weight with which the rollout LM was aligned. For `indirect`."""
    proposal: Literal["base", "rollout"] = "base"
    """Whose law the candidates are taken from and tilted: that of the base (with whatever earlier
    guides made of it), which is the method; or the rollout LM's."""
    reference_parity: bool = False
    """Do as the authors' program does: proposals from the rollout LM, one greedy rollout of 20
    tokens (direct) or 5 (indirect), indirect weights `exp((r - r_BL) / 2)` that do not sum to one.
    """
    rollout_slots: PositiveInt = 256
    """Continuations that run at a time, over all rows. Each holds its keys and values in memory."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Of sampled rollouts."""

    @property
    def proposes_from_rollout(self) -> bool:
        return self.reference_parity or self.proposal == "rollout"

    @property
    def most_tokens(self) -> int:
        """The longest that a continuation may be."""
        if self.reference_parity:
            return _PUBLISHED_TOKENS[self.mode]
        return self.max_rollout_tokens if self.rollout_tokens is None else self.rollout_tokens

    @property
    def temperature(self) -> float:
        if self.rollout_temperature is None:
            return 0.0 if self.num_rollouts == 1 else 1.0
        return self.rollout_temperature

    @validates(mode="after")
    def _check(self) -> Self:
        self._check_mode()
        if self.reference_parity:
            self._check_parity()
        elif self.num_rollouts > 1 and (self.temperature == 0 or self.rollout_tokens == 0):
            raise ValueError(
                f"num_rollouts is {self.num_rollouts}, but at temperature {self.temperature} and "
                f"rollout_tokens {self.rollout_tokens} they are all the same. Set num_rollouts: 1, "
                "or sample longer ones"
            )
        if self.rollout_tokens is not None and self.max_rollout_tokens != 128:
            raise ValueError("max_rollout_tokens bounds rollouts without rollout_tokens; set one")
        return self

    def _check_mode(self) -> None:
        if self.mode == "direct":
            if self.baseline_reward is not None or self.beta is not None:
                raise ValueError(
                    "baseline_reward and beta are for mode: indirect; leave them out, or set them "
                    "to null"
                )
            return
        if self.baseline_reward is None:
            raise ValueError(
                "mode indirect needs baseline_reward, the reward model that the rollout LM was "
                "aligned to. If that is the same as reward, use mode: direct"
            )
        if self.reference_parity:
            return
        if self.beta is None:
            raise ValueError("mode indirect needs beta, the KL weight of the rollout LM's training")
        if self.num_rollouts == 1:
            raise ValueError(
                "mode indirect with num_rollouts 1 is mode direct: the weight of a single rollout "
                "is always 1. Set num_rollouts to 4 or more"
            )

    def _check_parity(self) -> None:
        """A setting that the authors' program fixes must not say something else."""
        fixed = (
            "beta",
            "max_rollout_tokens",
            "num_rollouts",
            "proposal",
            "rollout_temperature",
            "rollout_tokens",
        )
        fields = type(self).model_fields
        said = [name for name in fixed if getattr(self, name) != fields[name].default]
        if said:
            raise ValueError(f"reference_parity fixes {', '.join(said)}; leave them out")
