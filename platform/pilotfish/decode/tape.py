"""The numbers that decide a batch's draws, computed for some positions at a time.

Shapes: S sequences, P purposes, W positions, R rows (a sequence at a position).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pilotfish.noise import Purpose, uniforms

_WINDOW = 32
_PURPOSES = np.arange(Purpose.RESIDUAL + 1, dtype=np.uint64)


class Tape:
    """One number in [0, 1) per sequence, position and purpose: what is read does not depend on
    who else is in the batch, nor on how often or in which order it is read."""

    def __init__(self, keys: Sequence[int]) -> None:
        """`keys` are the sequences' noise keys."""
        self._keys = np.array(keys, dtype=np.uint64)
        self._first = np.zeros(len(keys), dtype=np.int64)
        self._numbers_SPW = np.empty((len(keys), len(_PURPOSES), 0))

    def read(self, sequences: Sequence[int], positions: Sequence[int], purpose: Purpose) -> Tensor:
        """Return the number of each row [R], on the CPU."""
        places = np.asarray(sequences)
        offsets = np.asarray(positions) - self._first[places]
        if offsets.max() >= self._numbers_SPW.shape[2] or offsets.min() < 0:
            self._fill(places, np.asarray(positions))
            offsets = np.asarray(positions) - self._first[places]
        return torch.from_numpy(self._numbers_SPW[places, purpose, offsets])

    def _fill(self, places: np.ndarray, positions: np.ndarray) -> None:
        """Compute a window from the first position that is read, sequence by sequence."""
        first = self._first.copy()
        # Rows that are not read now start where they were: refilled when it is their turn.
        earliest = np.full(len(first), np.iinfo(np.int64).max)
        np.minimum.at(earliest, places, positions)
        first = np.where(earliest < np.iinfo(np.int64).max, earliest, first)
        width = max(_WINDOW, int((positions - first[places]).max()) + 1)
        shape = (len(first), len(_PURPOSES), width)
        counted = first[:, None, None] + np.arange(width)
        numbers = uniforms(
            np.broadcast_to(self._keys[:, None, None], shape).ravel(),
            np.broadcast_to(counted, shape).ravel().astype(np.uint64),
            np.broadcast_to(_PURPOSES[None, :, None], shape).ravel(),
        )
        self._first, self._numbers_SPW = first, numbers.reshape(shape)
