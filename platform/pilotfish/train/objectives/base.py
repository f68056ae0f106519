"""What the supervised loop must know of an objective.

Shapes: B rows, T positions, V vocabulary, P pairs (the first P of B = 2P rows are the chosen).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from pilotfish.config import Config
from pilotfish.train.metrics import Tally, tally

Rows: TypeAlias = Literal["demonstrations", "pairs", "corrections", "scored", "prompts"]
Head: TypeAlias = Literal["lm", "score"]


class Batch(Protocol):
    """Rows padded on the right; see `pilotfish.data.collate`."""

    @property
    def token_ids_BT(self) -> Tensor: ...
    @property
    def attention_mask_BT(self) -> Tensor: ...
    @property
    def loss_mask_BT(self) -> Tensor: ...


class ScoredBatch(Batch, Protocol):
    """A batch whose answers somebody has scored."""

    @property
    def rewards_B(self) -> Tensor: ...


class Forward(Protocol):
    """A model: logits [B, T, V] of a head `lm`, scores [B, T] of a head `score`."""

    def __call__(
        self,
        token_ids_BT: Tensor,
        attention_mask: Tensor,
        position_ids_BT: Tensor | None = None,
        /,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What an objective may ask for its loss."""

    learner: Forward
    """What is trained; gradients pass."""
    base: Callable[[Tensor, Tensor], Tensor] | None = None
    """The frozen base, for objectives that need one; its logits have no gradients."""

    def logits(self, batch: Batch) -> Tensor:
        """Return what the learner says of a batch: logits [B, T, V], or scores [B, T]."""
        return self.learner(batch.token_ids_BT, batch.attention_mask_BT)

    def base_logits(self, batch: Batch) -> Tensor:
        """Return the frozen base's logits [B, T, V]."""
        assert self.base is not None, "the objective says that it needs a base"
        return self.base(batch.token_ids_BT, batch.attention_mask_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """The mean loss of one batch, and what to report of it."""

    loss: Tensor
    metrics: Mapping[str, Tally]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How a model learns from rows.

    `loss` averages over the batch's units, and `units` counts them: workers and accumulated passes
    hold different numbers of units, and their gradients are weighted accordingly.
    """

    config: type[Config]
    rows: Rows
    loss: Callable[[Models, Any, Any], LossOutput]
    """(models, batch, config of the objective) -> output."""
    units: Callable[[Any], int]
    """(batch) -> number of units."""
    head: Head = "lm"
    needs_base: Callable[[Any], bool] = lambda _: False
    """(config) -> whether a frozen base must be at hand."""
    guide_kind: str | None = None
    """The key in `pilotfish.guides.GUIDES` of what is trained; None for a base model."""
    card: Callable[[Any, Mapping[str, float]], dict[str, Any]] = lambda *_: {}
    """(config, last report) -> fields of the guide's card."""


def wins(margin_P: Tensor) -> Tally:
    """Count the pairs that are ordered rightly."""
    # An exact tie is half right: a model that says nothing must score one half.
    return tally((margin_P > 0).double() + 0.5 * (margin_P == 0).double())


def answer_lengths(batch: Batch) -> Tensor:
    """Return the number of answer tokens [B] that a loss predicts."""
    return (batch.loss_mask_BT[:, 1:] > 0).sum(dim=1)


def num_answer_tokens(batch: Batch) -> int:
    return int(answer_lengths(batch).sum())


def num_pairs(batch: Batch) -> int:
    return len(batch.loss_mask_BT) // 2


def pair_metrics(loss: Tensor, margin_P: Tensor, batch: Batch) -> dict[str, Tally]:
    """Return what every objective on pairs reports; `margin_P` is in units of reward."""
    margin_P = margin_P.detach()
    chosen_P, rejected_P = answer_lengths(batch).chunk(2)
    return {
        "loss": Tally(float(loss.detach()) * len(margin_P), len(margin_P)),
        "accuracy": wins(margin_P),
        # The control: what a uniform model gets, since a sum of log-probs favours short text.
        "length_accuracy": wins(rejected_P - chosen_P),
        "reward_margin": tally(margin_P),
        "chosen_length": tally(chosen_P),
        "rejected_length": tally(rejected_P),
    }
