"""Reward models: a number for a whole answer, or for every beginning of one.

Bradley and Terry, "Rank Analysis of Incomplete Block Designs", 1952, on pairs of answers; for every
prefix as in PARGS: Rashid et al., "A Critical Look At Tokenwise Reward-Guided Text Generation",
2024. Shapes: B rows, T positions, P pairs.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pilotfish.losses import bradley_terry
from pilotfish.models.reward import RewardReading, prefix_rewards, whole_rewards
from pilotfish.train.metrics import tally
from pilotfish.train.objectives.base import (
    Batch,
    LossOutput,
    Models,
    Objective,
    num_pairs,
    pair_metrics,
)


class RewardModelConfig(RewardReading):
    """A sequence classifier with one label that scores the chosen answer above the rejected one.

    Pairs fix rewards only up to a constant, and their scale only loosely. So the mean and the
    spread over held-out answers are measured at the end and go into the card, as `shift` and
    `scale`: what is read from the model then has mean 0 and standard deviation 1.
    """

    kind: Literal["reward_model"] = "reward_model"
    prefixes: bool = False
    """Learn from every pair of equally long beginnings (PARGS), for guides that score unfinished
    text. The shorter answer stays whole where it has ended."""


def _loss(models: Models, batch: Batch, config: RewardModelConfig) -> LossOutput:
    scores_BT = models.logits(batch)
    rewards_B = whole_rewards(scores_BT, batch.loss_mask_BT, config)
    chosen_P, rejected_P = rewards_B.chunk(2)
    if config.prefixes:
        loss = prefix_loss(scores_BT, batch.loss_mask_BT, config)
    else:
        loss = bradley_terry(chosen_P, rejected_P)
    metrics = pair_metrics(loss, chosen_P - rejected_P, batch)
    metrics["reward"] = tally(rewards_B.detach())
    metrics["squared_reward"] = tally(rewards_B.detach().double() ** 2)
    return LossOutput(loss=loss, metrics=metrics)


def prefix_loss(scores_BT: Tensor, mask_BT: Tensor, reading: RewardReading) -> Tensor:
    """Return the Bradley-Terry loss of all beginnings: a mean over each pair's lengths, then pairs.

    Beginnings have 1, 2, ... answer tokens, up to the length of the longer answer.
    """
    rewards_BT = prefix_rewards(scores_BT, mask_BT, reading)
    lengths_B = (mask_BT > 0).sum(1)
    starts_B = (mask_BT > 0).int().argmax(1)
    steps_S = torch.arange(int(lengths_B.max()), device=mask_BT.device)
    last_B1 = (lengths_B - 1).clamp_min(0)[:, None]
    rewards_BS = rewards_BT.gather(1, starts_B[:, None] + steps_S.minimum(last_B1))
    chosen_PS, rejected_PS = rewards_BS.chunk(2)
    longest_P = torch.maximum(*lengths_B.chunk(2)).clamp_min(1)
    counted_PS = steps_S < longest_P[:, None]
    losses_PS = -torch.nn.functional.logsigmoid(chosen_PS - rejected_PS)
    return (losses_PS.where(counted_PS, 0.0).sum(1) / longest_P).mean()


def _card(config: RewardModelConfig, report: Mapping[str, float]) -> dict[str, Any]:
    mean = report["eval/reward"]
    variance = max(report["eval/squared_reward"] - mean**2, 0.0)
    settings = {
        "pooling": config.pooling,
        "pool_length": config.pool_length,
        "shift": mean,
        "scale": math.sqrt(variance) or 1.0,
    }
    return {"settings": settings}


REWARD_MODEL = Objective(
    config=RewardModelConfig,
    rows="pairs",
    loss=_loss,
    units=num_pairs,
    head="score",
    guide_kind="args",
    card=_card,
)
