"""Reward and value models: a number for a text so far, and for each candidate that may follow.

Shapes: R rows (contexts), K candidates per row, D hidden size.
"""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.config import Config
from pilotfish.context import Context
from pilotfish.errors import ConfigError
from pilotfish.models.body import Body


class Pooled(Config):
    """Where in an answer its reward is read: see `RewardModel`."""

    pooling: Literal["last", "pooled"] = "last"
    pool_length: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _check_pooling(self) -> Self:
        if self.pooling == "last" and self.pool_length != 1:
            raise ValueError(
                f"pool_length is {self.pool_length}, but pooling 'last' reads one token and "
                "divides by nothing. Set pooling: pooled, or leave pool_length out"
            )
        return self


class RewardReading(Pooled):
    """How a reward is read from a model."""

    shift: float = 0.0
    scale: PositiveFloat = 1.0
    """The reward is (what the model says - `shift`) / `scale`; training measures both, so that
    rewards of different models, and weights on them, are comparable."""

    def normalised(self, said: Tensor) -> Tensor:
        """Return the rewards [...] of what the model said, in float32 at least."""
        wide = said.dtype in (torch.float32, torch.float64)
        return ((said if wide else said.float()) - self.shift) / self.scale


def prefix_rewards(scores_BT: Tensor, mask_BT: Tensor, reading: Pooled) -> Tensor:
    """Return the reward [B, T] of the answer so far, at each of its tokens.

    `scores_BT` is the head's output at every token; the mask is 1 on answer tokens. The head is
    linear, so pooling its outputs is pooling the hidden states.
    """
    scores_BT = scores_BT.float()
    if reading.pooling == "last":
        return scores_BT
    return scores_BT.where(mask_BT > 0, 0.0).cumsum(1) / reading.pool_length


def whole_rewards(scores_BT: Tensor, mask_BT: Tensor, reading: Pooled) -> Tensor:
    """Return the reward [B] of each whole answer; see `prefix_rewards`."""
    places_T = torch.arange(scores_BT.shape[1], device=scores_BT.device)
    last_B = (places_T * (mask_BT > 0)).amax(1)
    return prefix_rewards(scores_BT, mask_BT, reading).gather(1, last_B[:, None])[:, 0]


class RewardModel:
    """A sequence classifier with one label, and its slots.

    Pooling `last` reads the score at the last token, as is usual. `pooled` reads it from the sum of
    the completion's hidden states over `pool_length`, a typical completion's length: less noisy
    where the model is small.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reading: RewardReading | None = None,
        *,
        num_slots: int = 32,
        prefill_chunk: int = 512,
    ) -> None:
        """Wrap a model with a linear head named `score`. Raises `ConfigError` for another head."""
        score = getattr(model, "score", None)
        if not isinstance(score, torch.nn.Linear) or score.out_features != 1:
            raise ConfigError(f"a reward model has a linear head `score` with one label; {score}.")
        self._reading = reading or RewardReading()
        self.body = Body(
            model,
            num_slots=num_slots,
            prefill_chunk=prefill_chunk,
            keep_hidden=self._reading.pooling == "pooled",
        )
        self._score = score

    @property
    def max_length(self) -> int:
        return self.body.max_length

    @property
    def num_forwards(self) -> int:
        return self.body.num_forwards

    @torch.inference_mode()
    def rewards(self, contexts: Sequence[Context]) -> Tensor:
        """Return the reward of each context as it stands [R]."""
        return torch.cat([self._rewards(contexts[part]) for part in self._parts(contexts)])

    @torch.inference_mode()
    def candidate_rewards(self, contexts: Sequence[Context], candidates_RK: Tensor) -> Tensor:
        """Return the reward of each context with each of its candidates appended [R, K].

        One forward over all candidates; what is cached about the contexts does not change.
        """
        return torch.cat(
            [
                self._candidate_rewards(contexts[part], candidates_RK[part])
                for part in self._parts(contexts)
            ]
        )

    def _rewards(self, contexts: Sequence[Context]) -> Tensor:
        hidden_RD = self.body.hidden(contexts)
        if self._reading.pooling == "pooled":
            hidden_RD = self.body.prefix_sum(contexts) / self._reading.pool_length
        return self._read(hidden_RD)

    def _candidate_rewards(self, contexts: Sequence[Context], candidates_RK: Tensor) -> Tensor:
        hidden_RKD = self.body.candidates(contexts, candidates_RK)
        if self._reading.pooling == "pooled":
            before_R1D = self.body.prefix_sum(contexts)[:, None]
            hidden_RKD = (before_R1D + hidden_RKD) / self._reading.pool_length
        return self._read(hidden_RKD)

    def _parts(self, contexts: Sequence[Context]) -> list[slice]:
        """As many contexts at a time as there are slots: a sum needs all of them in one."""
        limit = self.body.num_slots
        return [slice(at, at + limit) for at in range(0, len(contexts), limit)]

    def release(self, keys: Sequence[int]) -> None:
        """Sequences that ended: their slots may be taken."""
        self.body.release(keys)

    def _read(self, hidden: Tensor) -> Tensor:
        return self._reading.normalised(self._score(hidden)[..., 0])
