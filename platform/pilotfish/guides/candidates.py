"""Guides over the most likely tokens: which those are, and how their values tilt the law.

Shapes: R rows, V vocabulary, K candidates per row.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pilotfish.context import Context


class CandidateRewards(Protocol):
    """A reward or value model that looks at every candidate for the next token: `RewardModel`."""

    def candidate_rewards(self, contexts: Sequence[Context], candidates_RK: Tensor) -> Tensor:
        """Return the reward of each context with each of its candidates appended [R, K]."""
        ...

    def release(self, keys: Sequence[int]) -> None: ...


def top_candidates(logprobs_RV: Tensor, num_candidates: int | None) -> Tensor:
    """Return the ids of the most likely tokens [R, K]; None, or more than there are, is all.

    Where fewer have a finite log-prob, the rest are forbidden tokens, which no value brings back.
    """
    num_rows, vocab_size = logprobs_RV.shape
    if num_candidates is None or num_candidates >= vocab_size:
        return torch.arange(vocab_size, device=logprobs_RV.device).expand(num_rows, -1)
    return logprobs_RV.topk(num_candidates, dim=-1).indices


def values_in_chunks(
    source: CandidateRewards,
    contexts: Sequence[Context],
    candidates_RK: Tensor,
    chunk_size: int | None,
) -> Tensor:
    """Return the candidates' values [R, K], looking at `chunk_size` per row at a time or at all.

    Chunks bound the memory of one forward. Candidates do not see each other, so the values are the
    same whatever the chunks.
    """
    chunks = candidates_RK.split(chunk_size or candidates_RK.shape[1], dim=1)
    return torch.cat([source.candidate_rewards(contexts, some_RC) for some_RC in chunks], dim=1)


def tilt_candidates(
    logprobs_RV: Tensor, candidates_RK: Tensor, values_RK: Tensor, weights_R: Tensor
) -> Tensor:
    """Return `log p(v|s) + w * value(s, v)` over the candidates, renormalised; -inf elsewhere."""
    dtype = logprobs_RV.dtype
    tilted_RK = torch.addcmul(
        logprobs_RV.gather(1, candidates_RK), weights_R[:, None].to(dtype), values_RK.to(dtype)
    )
    nothing_RV = torch.full_like(logprobs_RV, -torch.inf)
    return nothing_RV.scatter_(1, candidates_RK, tilted_RK.log_softmax(-1))
