"""How models learn: one entry per objective, all run by the same loop.

Shapes: B rows, T positions, V vocabulary, P pairs (the first P of B = 2P rows are the chosen).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from pilotfish.config import Config
from pilotfish.losses import genarm_loss, response_logprobs, sft_loss
from pilotfish.train.metrics import Tally, tally


class SFTConfig(Config):
    """Maximum likelihood of the demonstrated responses."""

    kind: Literal["sft"] = "sft"


class GenARMConfig(Config):
    """GenARM (arXiv 2410.08193): an autoregressive reward model, learned from preferences."""

    kind: Literal["genarm"] = "genarm"
    beta_r: PositiveFloat = 0.05
    """Scale of the reward in training: the reward is `beta_r` times the guide's log-prob."""


ObjectiveConfig = Annotated[SFTConfig | GenARMConfig, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """The mean loss of one batch, and what to report of it."""

    loss: Tensor
    metrics: Mapping[str, Tally]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What the training loop must know of an objective.

    `loss` averages over the batch's units, and `units` counts them: workers and accumulated passes
    hold different numbers of units, and their gradients are weighted accordingly.
    """

    config: type[Config]
    rows: Literal["demonstrations", "pairs"]
    loss: Callable[[Tensor, Tensor, Tensor, Any], LossOutput]
    """(logits_BTV, token_ids_BT, mask_BT, config of the objective) -> output."""
    units: Callable[[Tensor], int]
    """(mask_BT) -> number of units."""
    guide_kind: str | None = None
    """The key in `pilotfish.guides.GUIDES` of what is trained; None for a base model."""


def _sft(logits_BTV: Tensor, token_ids_BT: Tensor, mask_BT: Tensor, _: SFTConfig) -> LossOutput:
    loss = sft_loss(logits_BTV, token_ids_BT, mask_BT)
    num_tokens = _response_tokens(mask_BT)
    return LossOutput(
        loss=loss,
        metrics={
            "loss": Tally(float(loss.detach()) * num_tokens, num_tokens),
            "response_length": tally(_lengths(mask_BT)),
        },
    )


def _genarm(
    logits_BTV: Tensor, token_ids_BT: Tensor, mask_BT: Tensor, config: GenARMConfig
) -> LossOutput:
    chosen_P, rejected_P = response_logprobs(logits_BTV, token_ids_BT, mask_BT).chunk(2)
    loss = genarm_loss(chosen_P, rejected_P, config.beta_r)
    margin_P = config.beta_r * (chosen_P - rejected_P).detach()
    lengths_chosen_P, lengths_rejected_P = _lengths(mask_BT).chunk(2)
    return LossOutput(
        loss=loss,
        metrics={
            "loss": Tally(float(loss.detach()) * len(margin_P), len(margin_P)),
            "accuracy": _wins(margin_P),
            # The control: what a uniform model gets, since a sum of log-probs favours short text.
            "length_accuracy": _wins(lengths_rejected_P - lengths_chosen_P),
            "reward_margin": tally(margin_P),
            "chosen_length": tally(lengths_chosen_P),
            "rejected_length": tally(lengths_rejected_P),
        },
    )


def _wins(margin_P: Tensor) -> Tally:
    # An exact tie is half right: a model that says nothing must score one half.
    return tally((margin_P > 0).double() + 0.5 * (margin_P == 0).double())


def _lengths(mask_BT: Tensor) -> Tensor:
    return (mask_BT[:, 1:] > 0).sum(dim=1)


def _response_tokens(mask_BT: Tensor) -> int:
    return int(_lengths(mask_BT).sum())


def _pairs(mask_BT: Tensor) -> int:
    return len(mask_BT) // 2


OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(config=SFTConfig, rows="demonstrations", loss=_sft, units=_response_tokens),
    "genarm": Objective(
        config=GenARMConfig, rows="pairs", loss=_genarm, units=_pairs, guide_kind="genarm"
    ),
}
