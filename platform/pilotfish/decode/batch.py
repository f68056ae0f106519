"""What stays the same from step to step while no request joins or leaves, and drafts keep length.

Shapes: S sequences (running requests), R rows: a sequence with k drafted tokens has k + 1 rows, at
its present position and behind each of its drafts.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pilotfish.context import Context
from pilotfish.decode.bias import Bias
from pilotfish.decode.running import Running
from pilotfish.decode.sampling import SamplingBatch
from pilotfish.decode.tape import Tape
from pilotfish.decode.telemetry import Tops
from pilotfish.decode.tilting import make_tilts
from pilotfish.noise import Purpose


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
        rows = [running[place] for place in self.owners]
        params = [one.request.params for one in rows]
        self.bias = Bias(rows, device)
        self.sampling = SamplingBatch(params, device)
        self.tops = Tops([one.top_logprobs for one in params], device)
        self.tilts = make_tilts([one.guides for one in rows], device)
        self.live = [sequence.context for sequence in running]

    def positions(self) -> list[int]:
        """Return each row's position in its completion."""
        first = [sequence.num_completed for sequence in self.running]
        return [
            first[owner] + offset for owner, offset in zip(self.owners, self.offsets, strict=True)
        ]

    def numbers(
        self, tape: Tape, rows: Sequence[int], positions: Sequence[int], purpose: Purpose
    ) -> Tensor:
        """Return the numbers that decide some rows' draws [R]; `positions` are of all rows."""
        owners = [self.owners[row] for row in rows]
        return tape.read(owners, [positions[row] for row in rows], purpose).to(self.device)

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
