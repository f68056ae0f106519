"""Supervised fine-tuning: maximum likelihood of the demonstrated answers."""

from typing import Literal

from pilotfish.config import Config
from pilotfish.losses import sft_loss
from pilotfish.train.metrics import Tally, tally
from pilotfish.train.objectives.base import (
    Batch,
    LossOutput,
    Models,
    Objective,
    answer_lengths,
    num_answer_tokens,
)


class SFTConfig(Config):
    """Maximum likelihood of the demonstrated answers."""

    kind: Literal["sft"] = "sft"


def demonstration_loss(models: Models, batch: Batch, _: Config) -> LossOutput:
    """Return the negative log-likelihood per answer token."""
    loss = sft_loss(models.logits(batch), batch.token_ids_BT, batch.loss_mask_BT)
    num_tokens = num_answer_tokens(batch)
    return LossOutput(
        loss=loss,
        metrics={
            "loss": Tally(float(loss.detach()) * num_tokens, num_tokens),
            "response_length": tally(answer_lengths(batch)),
        },
    )


SFT = Objective(
    config=SFTConfig, rows="demonstrations", loss=demonstration_loss, units=num_answer_tokens
)
