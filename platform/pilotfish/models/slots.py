"""Key and value buffers by slot, for an unmodified Hugging Face decoder.

Shapes: R rows of one forward, Q query tokens per row, H key-value heads, T positions, D head size.

Each slot (one row of every buffer) holds the keys and values of one sequence. A forward covers a
contiguous range of slots, so attention reads a view and nothing is gathered. A padding token of a
ragged forward writes behind its row's real length, where the next real token overwrites it before
anything attends to it; rolling a row back is therefore free.
"""

import torch
from torch import Tensor

_ROUND = 64  # attention reads a multiple of this many positions, so that few shapes occur


class SlotCache:
    """What transformers' attention layers need of a cache: `update`, once per layer."""

    is_compileable = False

    def __init__(self, *, num_layers: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self.capacity = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._num_layers = num_layers
        self._first = self._num_rows = self._num_positions = 0
        self._rows_R1 = torch.empty(0, dtype=torch.long)
        self._positions_RQ = torch.empty(0, dtype=torch.long)

    def begin(self, *, first: int, positions_RQ: Tensor, longest: int) -> Tensor:
        """Aim the next forward at slots `first`.. and return its attention mask [R, 1, Q, T].

        `longest` is one more than the largest entry of `positions_RQ`.
        """
        num_rows = positions_RQ.shape[0]
        device = positions_RQ.device
        self._first, self._num_rows = first, num_rows
        self._rows_R1 = torch.arange(first, first + num_rows, device=device)[:, None]
        self._positions_RQ = positions_RQ
        self._num_positions = -(-longest // _ROUND) * _ROUND
        if self._num_positions > self.capacity:
            self._grow(self._num_positions)
        columns_T = torch.arange(self._num_positions, device=device)
        return (columns_T <= positions_RQ[:, :, None])[:, None]

    def update(
        self, key_RHQD: Tensor, value_RHQD: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; return views of all that its rows may attend to."""
        if layer_idx == len(self._keys):
            # Allocated on first sight: under tensor parallelism only the layer knows its own heads.
            shape = (self.num_slots, key_RHQD.shape[1], self.capacity, key_RHQD.shape[3])
            self._keys.append(key_RHQD.new_zeros(shape))
            self._values.append(value_RHQD.new_zeros((*shape[:3], value_RHQD.shape[3])))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._rows_R1, :, self._positions_RQ] = key_RHQD.transpose(1, 2)
        values[self._rows_R1, :, self._positions_RQ] = value_RHQD.transpose(1, 2)
        window = slice(self._first, self._first + self._num_rows)
        return keys[window, :, : self._num_positions], values[window, :, : self._num_positions]

    def copy(self, source: int, target: int, length: int) -> None:
        """Overwrite slot `target` with the first `length` positions of slot `source`."""
        for buffer in (*self._keys, *self._values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two slots, up to `length` positions."""
        pair, reverse = [one, other], [other, one]
        for buffer in (*self._keys, *self._values):
            buffer[pair, :, :length] = buffer[reverse, :, :length]

    def _grow(self, wanted: int) -> None:
        capacity = max(wanted, 2 * self.capacity)
        for buffers in (self._keys, self._values):
            for layer, old in enumerate(buffers):
                new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                new[:, :, : self.capacity] = old
                buffers[layer] = new
        self.capacity = capacity

    # The rest of transformers' cache interface; a ready-made mask keeps it from being consulted.

    def get_seq_length(self, *_: object) -> int:
        return 0

    def get_mask_sizes(self, *_: object) -> tuple[int, int]:
        return self._num_positions, 0
