"""Training losses as pure functions of tensors. They know no model, no data set and no optimizer.

Shapes: B rows, T positions, S = T - 1 predicted positions, N predicted answer tokens of all rows,
V vocabulary, P pairs.
A loss mask is 1 on response tokens (the end token included) and 0 on prompt and padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits_BTV: Tensor, token_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return log p(token t+1 | tokens up to t) as [B, S], in float32; zero where the mask is 0."""
    counts_BS = mask_BT[:, 1:] > 0
    # The rest is not even read: a masked position may be -inf, and -inf * 0 is NaN. With the
    # vocabulary as the last axis, its sum is also faster, and more exact, than along a middle one.
    logits_NV = logits_BTV[:, :-1][counts_BS].float()
    nll_N = F.cross_entropy(logits_NV, token_ids_BT[:, 1:][counts_BS], reduction="none")
    return torch.zeros_like(counts_BS, dtype=nll_N.dtype).masked_scatter(counts_BS, -nll_N)


def response_logprobs(logits_BTV: Tensor, token_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return log p(response | prompt) as [B]: the sum over response tokens.

    A sum and not a mean: GenARM's reward is the log-prob of the whole response, so length counts.
    """
    return token_logprobs(logits_BTV, token_ids_BT, mask_BT).sum(dim=1)


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Return -log sigmoid(chosen - rejected), averaged over pairs of rewards."""
    return -F.logsigmoid(chosen_P - rejected_P).mean()


def genarm_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Return the loss of GenARM (arXiv 2410.08193), equation 4, averaged over pairs.

    `chosen_P` and `rejected_P` are `response_logprobs` under the guide. There is no reference
    model: up to `beta * (len_chosen - len_rejected) * log V` this is DPO with a uniform reference,
    so shorter chosen responses are favoured.
    """
    return bradley_terry(beta * chosen_P, beta * rejected_P)


def sft_loss(logits_BTV: Tensor, token_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the negative log-likelihood averaged over all response tokens of the batch."""
    logprobs_BS = token_logprobs(logits_BTV, token_ids_BT, mask_BT)
    return -logprobs_BS.sum() / (mask_BT[:, 1:] > 0).sum()
