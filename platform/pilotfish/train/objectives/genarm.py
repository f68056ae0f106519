"""GenARM: an autoregressive reward model, learned from preferences.

Xu et al., "GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time
Alignment", ICLR 2025. Shapes: P pairs.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from pilotfish.config import Config
from pilotfish.losses import genarm_loss, response_logprobs
from pilotfish.train.objectives.base import (
    Batch,
    LossOutput,
    Models,
    Objective,
    answer_lengths,
    num_pairs,
    pair_metrics,
)


class LengthCheck(Config):
    """Answer held-out prompts with and without the guide at every evaluation, and warn where it
    changes their length by more than a fifth. Needs the base beside the guide."""

    num_prompts: PositiveInt = 64
    weight: float = 1.0
    max_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class GenARMConfig(Config):
    """An autoregressive reward model: its reward is `beta_r` times its log-prob of the answer."""

    kind: Literal["genarm"] = "genarm"
    beta_r: PositiveFloat = 0.05
    """Scale of the reward in training."""
    length_normalization: bool = False
    """Learn from the mean log-prob per token instead of the sum. The guide then no longer is the
    paper's: use it only where guided answers become too short or too long."""
    length_check: LengthCheck | None = None


def _loss(models: Models, batch: Batch, config: GenARMConfig) -> LossOutput:
    logits_BTV = models.logits(batch)
    logprobs_B = response_logprobs(logits_BTV, batch.token_ids_BT, batch.loss_mask_BT)
    if config.length_normalization:
        logprobs_B = logprobs_B / answer_lengths(batch).clamp_min(1)
    chosen_P, rejected_P = logprobs_B.chunk(2)
    loss = genarm_loss(chosen_P, rejected_P, config.beta_r)
    margin_P = config.beta_r * (chosen_P - rejected_P)
    return LossOutput(loss=loss, metrics=pair_metrics(loss, margin_P, batch))


def _card(config: GenARMConfig, _: Mapping[str, float]) -> dict[str, Any]:
    return {"beta_r": config.beta_r}


GENARM = Objective(
    config=GenARMConfig,
    rows="pairs",
    loss=_loss,
    units=num_pairs,
    needs_base=lambda config: config.length_check is not None,
    guide_kind="genarm",
    card=_card,
)
