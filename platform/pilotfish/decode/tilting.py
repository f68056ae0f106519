"""A chain of guides at work on the rows of a batch: who tilts which rows, in which order.

Shapes: R rows, V vocabulary, D hidden size.
"""

import time
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


def make_tilts(chains: Sequence[Sequence[tuple[str, float]]], device: torch.device) -> list[Tilt]:
    """Return the turns of a batch; `chains` are the rows' guides and weights, in their order."""
    turns: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row, chain in enumerate(chains):
        for place, (name, weight) in enumerate(chain):
            turns.setdefault((place, name), []).append((row, weight))
    return [
        Tilt(name, entries, len(chains)).to(device)
        for (_, name), entries in sorted(turns.items(), key=lambda turn: turn[0][0])
    ]


@dataclass(frozen=True, slots=True)
class Begun:
    """A turn whose guide has been asked."""

    tilt: Tilt
    contexts: Sequence[Context]
    evidence: Evidence
    seconds: float


@dataclass(frozen=True, slots=True)
class Tilted:
    """What one guide did to its rows."""

    tilt: Tilt
    step: Step
    before_RV: Tensor
    after_RV: Tensor
    seconds: float
    """Spent in the guide, by this process' clock: a device may still be busy."""


def begin(
    guides: Mapping[str, TokenGuide], tilts: Sequence[Tilt], contexts: Sequence[Context]
) -> list[Begun]:
    """Ask every guide about its rows; `contexts` are those of all rows."""
    begun, now = [], time.perf_counter()
    for tilt in tilts:
        started = now
        own = contexts if tilt.rows is None else [contexts[row] for row in tilt.places]
        evidence = guides[tilt.guide].begin(own)
        now = time.perf_counter()
        begun.append(Begun(tilt, own, evidence, now - started))
    return begun


def apply(
    guides: Mapping[str, TokenGuide],
    begun: Sequence[Begun],
    base_RV: Tensor,
    hidden_RD: Tensor | None,
) -> tuple[Tensor, list[Tilted]]:
    """Return the guided law of all rows [R, V], and what each guide did on the way."""
    guided_RV, done, now = base_RV, [], time.perf_counter()
    for one in begun:
        started, rows = now, one.tilt.rows
        before_RV, own_RV, own_RD = guided_RV, base_RV, hidden_RD
        if rows is not None:
            before_RV = guided_RV[rows]
            own_RV = before_RV if guided_RV is base_RV else base_RV[rows]
            own_RD = None if hidden_RD is None else hidden_RD[rows]
        step = Step(one.contexts, one.tilt.weights_R, own_RD, own_RV)
        after_RV = guides[one.tilt.guide].tilt(before_RV, step, one.evidence)
        guided_RV = after_RV if rows is None else guided_RV.index_copy(0, rows, after_RV)
        now = time.perf_counter()
        seconds = one.seconds + now - started
        done.append(Tilted(one.tilt, step, before_RV, after_RV, seconds))
    return guided_RV, done
