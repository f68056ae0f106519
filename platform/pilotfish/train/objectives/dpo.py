"""Direct preference optimization of a whole model: a baseline, and the anchor of Transfer Q*.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
NeurIPS 2023, equation (7). Shapes: P pairs.
"""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from pilotfish.config import Config
from pilotfish.losses import bradley_terry, response_logprobs
from pilotfish.train.metrics import tally
from pilotfish.train.objectives.base import (
    Batch,
    LossOutput,
    Models,
    Objective,
    answer_lengths,
    num_pairs,
    pair_metrics,
)


class DPOConfig(Config):
    """A policy whose log-ratio to the frozen base orders the pairs."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """The reward is `beta` times the log-ratio; larger stays nearer to the base."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight on the negative log-likelihood per token of the chosen answers, which keeps their
    probability from falling together with that of the rejected ones."""


def _loss(models: Models, batch: Batch, config: DPOConfig) -> LossOutput:
    ids_BT, mask_BT = batch.token_ids_BT, batch.loss_mask_BT
    base_B = response_logprobs(models.base_logits(batch), ids_BT, mask_BT)
    own_B = response_logprobs(models.logits(batch), ids_BT, mask_BT)
    rewards_B = config.beta * (own_B - base_B)
    chosen_P, rejected_P = rewards_B.chunk(2)
    loss = bradley_terry(chosen_P, rejected_P)
    nll_P = -own_B.chunk(2)[0] / answer_lengths(batch).chunk(2)[0].clamp_min(1)
    if config.sft_weight:
        loss = loss + config.sft_weight * nll_P.mean()
    metrics = pair_metrics(loss, chosen_P - rejected_P, batch)
    metrics["chosen_reward"] = tally(chosen_P.detach())
    metrics["chosen_nll"] = tally(nll_P.detach())
    return LossOutput(loss=loss, metrics=metrics)


DPO = Objective(
    config=DPOConfig, rows="pairs", loss=_loss, units=num_pairs, needs_base=lambda _: True
)
