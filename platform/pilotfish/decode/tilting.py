"""A chain of guides at work on the rows of a batch: who tilts which rows, in which order.

Shapes: R rows, V vocabulary, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pilotfish.context import Context
from pilotfish.guides.base import Evidence, Step, TokenGuide


class Tilt:
    """One guide's turn, on the rows that have it at this place of their chains."""

    def __init__(self, guide: str, entries: Sequence[tuple[int, float]], num_rows: int) -> None:
        """`entries` are pairs of row and weight."""
        self.guide = guide
        self.places = [row for row, _ in entries]
        self.rows = None if len(entries) == num_rows else torch.tensor(self.places)
        """Row indices, or None for all of them: then nothing is gathered."""
        self.weights_R = torch.tensor([weight for _, weight in entries], dtype=torch.float64)

    def to(self, device: torch.device) -> "Tilt":
        self.weights_R = self.weights_R.to(device)
        if self.rows is not None:
            self.rows = self.rows.to(device)
        return self


@dataclass(frozen=True, slots=True)
class Begun:
    """A turn whose guide has been asked."""

    tilt: Tilt
    contexts: Sequence[Context]
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Tilted:
    """What one guide did to its rows."""

    tilt: Tilt
    step: Step
    before_RV: Tensor
    after_RV: Tensor


def begin(
    guides: Mapping[str, TokenGuide], tilts: Sequence[Tilt], contexts: Sequence[Context]
) -> list[Begun]:
    """Ask every guide about its rows; `contexts` are those of all rows."""
    begun = []
    for tilt in tilts:
        own = contexts if tilt.rows is None else [contexts[row] for row in tilt.places]
        begun.append(Begun(tilt, own, guides[tilt.guide].begin(own)))
    return begun


def apply(
    guides: Mapping[str, TokenGuide],
    begun: Sequence[Begun],
    base_RV: Tensor,
    hidden_RD: Tensor | None,
) -> tuple[Tensor, list[Tilted]]:
    """Return the guided law of all rows [R, V], and what each guide did on the way."""
    guided_RV, done = base_RV, []
    for one in begun:
        rows = one.tilt.rows
        before_RV, own_RV, own_RD = guided_RV, base_RV, hidden_RD
        if rows is not None:
            before_RV = guided_RV[rows]
            own_RV = before_RV if guided_RV is base_RV else base_RV[rows]
            own_RD = None if hidden_RD is None else hidden_RD[rows]
        step = Step(one.contexts, one.tilt.weights_R, own_RD, own_RV)
        after_RV = guides[one.tilt.guide].tilt(before_RV, step, one.evidence)
        done.append(Tilted(one.tilt, step, before_RV, after_RV))
        guided_RV = after_RV if rows is None else guided_RV.index_copy(0, rows, after_RV)
    return guided_RV, done
