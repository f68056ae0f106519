"""What requests add to the guided log-probs before anything is drawn.

Shapes: R rows, V vocabulary, N entries: one token of one row.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from pilotfish.decode.running import Running


class Bias:
    """Biases of tokens, and the end tokens that come too early: made once per change of the batch.

    Everything after it (temperature, truncation, drafts that are checked) works on what comes out,
    so that it needs to know nothing of it.
    """

    def __init__(self, rows: Sequence[Running], device: torch.device) -> None:
        entries = [(row, *entry) for row, one in enumerate(rows) for entry in _entries(one)]
        self._some = bool(entries)
        self._forbids = any(one.request.params.min_tokens for one in rows)
        if not self._some:
            return
        places, tokens, amounts, until = zip(*entries, strict=True)
        self._rows_N = torch.tensor(places, device=device)
        self._tokens_N = torch.tensor(tokens, device=device)
        self._amounts_N = torch.tensor(amounts, device=device, dtype=torch.float64)
        self._until_N = torch.tensor(until, device=device)

    def add(
        self, logprobs_RV: Tensor, positions: Sequence[int], *, base_RV: Tensor | None = None
    ) -> Tensor:
        """Return the log-probs to draw from [R, V], normalised.

        `positions` are the rows' in their completions. Where nothing is left that may be drawn,
        which only guides can bring about, the base's law takes the place of theirs.
        """
        if not self._some:
            return logprobs_RV
        positions_R = torch.tensor(positions, device=logprobs_RV.device)
        active_N = positions_R[self._rows_N] < self._until_N
        amounts_N = self._amounts_N.where(active_N, 0.0).to(logprobs_RV.dtype)
        where = self._rows_N, self._tokens_N
        biased_RV = logprobs_RV.index_put(where, amounts_N, accumulate=True)
        if self._forbids and base_RV is not None:
            nothing_R1 = biased_RV.amax(-1, keepdim=True) == -torch.inf
            other_RV = base_RV.to(biased_RV.dtype).index_put(where, amounts_N, accumulate=True)
            biased_RV = torch.where(nothing_R1, other_RV, biased_RV)
        return biased_RV.log_softmax(-1)


def _entries(one: Running) -> list[tuple[int, float, int]]:
    """Return tokens, what is added to each, and the position from which on it no longer is."""
    params = one.request.params
    entries = [(token, bias, sys.maxsize) for token, bias in params.logit_bias.items()]
    if params.min_tokens:
        entries += [(token, -torch.inf, params.min_tokens) for token in one.end_ids]
    return entries
