"""What stays the same from step to step while no request joins or leaves.

Shapes: R rows, one per running request.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pilotfish.context import Context
from pilotfish.decode.running import Running
from pilotfish.decode.sampling import SamplingBatch
from pilotfish.noise import Purpose, uniforms


class Tilt:
    """One guide's turn, on the rows that have it at this place of their chains."""

    def __init__(
        self, guide: str, entries: Sequence[tuple[int, float]], contexts: Sequence[Context]
    ) -> None:
        """`entries` are pairs of row and weight; `contexts` are those of all rows."""
        rows = [row for row, _ in entries]
        self.guide = guide
        self.contexts = [contexts[row] for row in rows]
        self.rows = None if len(rows) == len(contexts) else torch.tensor(rows)
        """Row indices, or None for all of them: then nothing is gathered."""
        self.weights_R = torch.tensor([weight for _, weight in entries], dtype=torch.float64)

    def to(self, device: torch.device) -> "Tilt":
        self.weights_R = self.weights_R.to(device)
        if self.rows is not None:
            self.rows = self.rows.to(device)
        return self


class Batch:
    """The running rows: their contexts, their turns of guides, their sampling parameters."""

    def __init__(self, running: Sequence[Running], device: torch.device) -> None:
        self.contexts = [row.context for row in running]
        self.sampling = SamplingBatch([row.request.params for row in running], device)
        self._running = tuple(running)
        self._noise_keys = np.array([row.noise_key for row in running], dtype=np.uint64)
        self._device = device
        turns: dict[tuple[int, str], list[tuple[int, float]]] = {}
        for row, sequence in enumerate(running):
            for place, (name, weight) in enumerate(sequence.guides):
                turns.setdefault((place, name), []).append((row, weight))
        self.tilts = [
            Tilt(name, entries, self.contexts).to(device)
            for (_, name), entries in sorted(turns.items(), key=lambda turn: turn[0][0])
        ]

    def uniforms(self) -> Tensor:
        """One number in [0, 1) per row, counted by request and position [R]."""
        positions = np.array([row.num_completed for row in self._running], dtype=np.uint64)
        drawn = uniforms(self._noise_keys, positions, Purpose.SAMPLE)
        return torch.from_numpy(drawn).to(self._device)
