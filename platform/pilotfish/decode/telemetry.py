"""What is reported about every token, gathered for all rows at once and fetched at once.

Shapes: R rows, V vocabulary, N rows that report their likeliest tokens, K of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilotfish.decode.sequence import Reading, TopToken
from pilotfish.decode.tilting import Tilted


class Tops:
    """Which rows report their likeliest tokens, and how many: made once per change of the batch."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        """`counts` are of all rows, 0 where nothing is reported."""
        self._counts = {row: count for row, count in enumerate(counts) if count > 0}
        self._rows_N = torch.tensor(list(self._counts), device=device, dtype=torch.long)
        self._most = max(counts)

    def read(self, base_RV: Tensor, guided_RV: Tensor) -> dict[int, tuple[TopToken, ...]]:
        """Return what is reported, by row. Tokens that guides forbid are not."""
        if not self._counts:
            return {}
        most = min(self._most, guided_RV.shape[1])
        best_NK = guided_RV[self._rows_N].topk(most, dim=-1)
        base_NK = base_RV[self._rows_N].gather(1, best_NK.indices)
        numbers = torch.stack([best_NK.indices.double(), best_NK.values.double(), base_NK.double()])
        return {
            row: tuple(
                TopToken(int(token), logprob, base_logprob)
                for token, logprob, base_logprob in found[:count]
                if logprob > -torch.inf
            )
            for (row, count), found in zip(
                self._counts.items(), numbers.permute(1, 2, 0).tolist(), strict=True
            )
        }


def read(
    base_RV: Tensor, guided_RV: Tensor, tokens_R: Tensor, done: Sequence[Tilted], tops: Tops
) -> list[Reading]:
    """Return what is said about one token of each row, such as the one it drew."""
    picked_R1 = tokens_R[:, None]
    columns = [tokens_R, guided_RV.gather(1, picked_R1)[:, 0]]
    if done:
        columns += [base_RV.gather(1, picked_R1)[:, 0], kl(guided_RV, base_RV)]
    several = len({one.tilt.guide for one in done}) > 1
    if several:
        columns += [_moves(one, picked_R1) for one in done]
    # Token ids are exact in float64 far beyond any vocabulary.
    numbers = torch.stack([column.double() for column in columns], dim=1).tolist()
    notes, best = _notes(done, len(numbers)), tops.read(base_RV, guided_RV)
    names = [one.tilt.guide for one in done]
    only = None if several else _only(done, len(numbers))
    readings = []
    for row, found in enumerate(numbers):
        token, logprob = int(found[0]), found[1]
        base_logprob, divergence = (found[2], found[3]) if done else (logprob, 0.0)
        if only is None:
            mover = _mover(found[4:], names)
        else:
            mover = only[row] if logprob != base_logprob else None
        about = notes.get(row, {}), best.get(row, ())
        readings.append(Reading(token, logprob, base_logprob, divergence, mover, *about))
    return readings


def kl(guided_RV: Tensor, base_RV: Tensor) -> Tensor:
    """KL(guided || base) per row, in nats; a forbidden token counts nothing [R]."""
    # Clamped so that a forbidden token is 0 * finite, not 0 * -inf.
    terms_RV = torch.sub(guided_RV, base_RV).clamp_min_(-1e30).mul_(guided_RV.exp())
    return terms_RV.sum(-1).clamp_min(0)


def _moves(one: Tilted, picked_R1: Tensor) -> Tensor:
    """How much a guide changed the log-prob of each row's token; 0 where it does not act."""
    rows = one.tilt.rows
    own_R1 = picked_R1 if rows is None else picked_R1[rows]
    moved_R = (one.after_RV.gather(1, own_R1) - one.before_RV.gather(1, own_R1))[:, 0].abs()
    moved_R = moved_R.nan_to_num(nan=0.0, posinf=torch.inf)  # forbidden before, and still
    if rows is None:
        return moved_R
    return moved_R.new_zeros(len(picked_R1)).index_copy(0, rows, moved_R)


def _mover(moves: Sequence[float], names: Sequence[str]) -> str | None:
    most = max(range(len(moves)), key=moves.__getitem__)
    return names[most] if moves[most] > 0 else None


def _only(done: Sequence[Tilted], num_rows: int) -> list[str | None]:
    """Where one guide acts at all, it is the one."""
    movers: list[str | None] = [None] * num_rows
    for one in done:
        for row in one.tilt.places:
            movers[row] = one.tilt.guide
    return movers


def _notes(done: Sequence[Tilted], num_rows: int) -> dict[int, dict[str, float]]:
    notes: dict[int, dict[str, float]] = {}
    for one in done:
        for name, values_R in one.step.notes.items():
            for row, value in zip(one.tilt.places, values_R.tolist(), strict=True):
                notes.setdefault(row, {})[f"{one.tilt.guide}.{name}"] = value
    return notes
