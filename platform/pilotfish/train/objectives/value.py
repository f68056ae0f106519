"""Controlled decoding: a prefix scorer that says what a text which begins like this will earn.

Mudgal et al., "Controlled Decoding from Language Models", ICML 2024: the losses CD-FUDGE (after
Yang and Klein, "FUDGE: Controlled Text Generation With Future Discriminators", NAACL 2021) and
CD-Q. Shapes: B rows, T positions, K candidates, L = T (1 + K) nodes of a tree.
"""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from pilotfish.config import Config
from pilotfish.train.metrics import Tally, tally
from pilotfish.train.objectives.base import (
    LossOutput,
    Models,
    Objective,
    ScoredBatch,
    answer_lengths,
    num_answer_tokens,
)


class ValueConfig(Config):
    """A value model over beginnings of answers, learned from scored answers."""

    kind: Literal["value"] = "value"
    loss: Literal["fudge", "q"] = "fudge"
    """`fudge`: the reward of the whole answer is the target behind each of its tokens. `q`: the
    target is the mean value of what the base would say next, and the reward behind the last."""
    num_candidates: PositiveInt | None = None
    """`q` only: the base's most probable next tokens that the mean is over (default 8), whose
    probabilities are renormalised. A step costs 2 + this many forwards of a row."""


def _loss(models: Models, batch: ScoredBatch, config: ValueConfig) -> LossOutput:
    values_BT = models.logits(batch).float()
    answered_BT = batch.loss_mask_BT > 0
    targets_BT = batch.rewards_B.float()[:, None].expand_as(values_BT)
    if config.loss == "q":
        num = 8 if config.num_candidates is None else config.num_candidates
        last_BT = answered_BT & ~torch.nn.functional.pad(answered_BT, (0, 1))[:, 1:]
        targets_BT = targets_BT.where(last_BT, expected_values(models, batch, num))
    squares_BT = ((values_BT - targets_BT) ** 2).where(answered_BT, 0.0)
    num_tokens = num_answer_tokens(batch)
    loss = 0.5 * squares_BT.sum() / num_tokens
    final_B = whole_values(values_BT.detach(), answered_BT)
    return LossOutput(
        loss=loss,
        metrics={
            "loss": Tally(float(loss.detach()) * num_tokens, num_tokens),
            # Of the whole answer: comparable between the two losses, and with the spread below.
            "final_squared_error": tally((final_B - batch.rewards_B) ** 2),
            "reward": tally(batch.rewards_B),
            "squared_reward": tally(batch.rewards_B.double() ** 2),
            "response_length": tally(answer_lengths(batch)),
        },
    )


def whole_values(values_BT: Tensor, answered_BT: Tensor) -> Tensor:
    """Return the value [B] behind each row's last answer token."""
    places_T = torch.arange(values_BT.shape[1], device=values_BT.device)
    last_B = (places_T * answered_BT).amax(1)
    return values_BT.gather(1, last_B[:, None])[:, 0]


@torch.no_grad()
def expected_values(models: Models, batch: ScoredBatch, num_candidates: int) -> Tensor:
    """Return `sum_z p(z|s) V(s z)` [B, T] over the base's most probable tokens z behind each s.

    One forward over a tree: every candidate sees its own beginning, and no other candidate.
    """
    ids_BT, seen_BT = batch.token_ids_BT, batch.attention_mask_BT.bool()
    top = models.base_logits(batch).float().topk(num_candidates, dim=-1)
    num_rows, length = ids_BT.shape
    nodes_T = torch.arange(length, device=ids_BT.device)
    parents_N = nodes_T.repeat_interleave(num_candidates)
    tree_BL = torch.cat([ids_BT, top.indices.flatten(1)], dim=1)
    positions_L = torch.cat([nodes_T, parents_N + 1])
    upto_L = torch.cat([nodes_T, parents_N])
    seen_BLT = (nodes_T <= upto_L[:, None]) & seen_BT[:, None]
    itself_LN = torch.eye(len(upto_L), dtype=torch.bool, device=ids_BT.device)[:, length:]
    mask_BLL = torch.cat([seen_BLT, itself_LN.expand(num_rows, -1, -1)], dim=2)
    scores_BL = models.learner(tree_BL, mask_BLL[:, None], positions_L.expand(num_rows, -1))
    scores_BTK = scores_BL[:, length:].float().view(num_rows, length, num_candidates)
    return (top.values.softmax(-1) * scores_BTK).sum(-1)


VALUE = Objective(
    config=ValueConfig,
    rows="scored",
    loss=_loss,
    units=num_answer_tokens,
    head="score",
    needs_base=lambda config: config.loss == "q",
    guide_kind="controlled_decoding",
)
