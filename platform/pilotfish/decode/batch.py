"""What stays the same from step to step while no request joins or leaves, and drafts keep length.

Shapes: S sequences (running requests), R rows: a sequence with k drafted tokens has k + 1 rows, at
its present position and behind each of its drafts.
"""

from collections.abc import Mapping, Sequence

import torch

from pilotfish.context import Context
from pilotfish.decode.running import Running
from pilotfish.decode.sampling import SamplingBatch


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

    def pick(self, contexts: Sequence[Context]) -> Sequence[Context]:
        return contexts if self.rows is None else [contexts[row] for row in self.places]


class Batch:
    """The running rows: their contexts, their turns of guides, their sampling parameters."""

    def __init__(
        self, running: Sequence[Running], num_drafts: Sequence[int], device: torch.device
    ) -> None:
        self.running = tuple(running)
        self.num_drafts = tuple(num_drafts)
        self.owners = [place for place, k in enumerate(num_drafts) for _ in range(k + 1)]
        """The sequence of each row."""
        self.offsets = [offset for k in num_drafts for offset in range(k + 1)]
        """How many drafted tokens stand before each row."""
        self.device = device
        self.sampling = SamplingBatch(
            [running[place].request.params for place in self.owners], device
        )
        turns: dict[tuple[int, str], list[tuple[int, float]]] = {}
        for row, owner in enumerate(self.owners):
            for place, (name, weight) in enumerate(running[owner].guides):
                turns.setdefault((place, name), []).append((row, weight))
        self.tilts = [
            Tilt(name, entries, len(self.owners)).to(device)
            for (_, name), entries in sorted(turns.items(), key=lambda turn: turn[0][0])
        ]
        self.live = [sequence.context for sequence in running]

    def positions(self) -> list[int]:
        """Return each row's position in its completion."""
        first = [sequence.num_completed for sequence in self.running]
        return [
            first[owner] + offset for owner, offset in zip(self.owners, self.offsets, strict=True)
        ]

    def contexts(self, chains: Mapping[int, Sequence[Context]]) -> list[Context]:
        """Return each row's context; `chains` holds those of drafted sequences, draft by draft."""
        if not chains:
            return self.live
        return [
            context
            for place, live in enumerate(self.live)
            for context in chains.get(place, (live,))
        ]

    def rows_of(self, places: Sequence[int]) -> list[int]:
        """Return the rows of some sequences, in order."""
        wanted = set(places)
        return [row for row, owner in enumerate(self.owners) if owner in wanted]
