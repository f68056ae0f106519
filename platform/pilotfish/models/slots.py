"""Key and value buffers by slot, for an unmodified Hugging Face decoder.

Shapes: R rows of one forward, Q query tokens per row, H key-value heads, T columns, D head size.

Each slot (one row of every buffer) holds the keys and values of one sequence. A forward covers a
contiguous range of slots, so attention reads a view and nothing is gathered. What a forward writes
behind a row's real length (padding of a ragged forward, candidates that were only looked at) is
overwritten before anything attends to it; rolling a row back is therefore free.
"""

import torch
from torch import Tensor

_ROUND = 64  # attention reads a multiple of this many columns, so that few shapes occur


class SlotCache:
    """What transformers' attention layers need of a cache: `update`, once per layer."""

    is_compileable = False

    def __init__(self, *, num_slots: int, max_tokens: int | None = None) -> None:
        """`max_tokens` bounds slots times columns: as rows grow longer, there are fewer of them."""
        self.num_slots = num_slots
        self.capacity = 0
        self._max_tokens = max_tokens
        # Layer -1 holds the last hidden states, where somebody stores them.
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._first = self._num_rows = self._num_columns = 0
        self._start: int | None = None
        self._rows_R1 = torch.empty(0, dtype=torch.long)
        self._columns_RQ = torch.empty(0, dtype=torch.long)

    def rows_at(self, longest: int) -> int:
        """How many slots there may be when the longest row needs this many columns."""
        if self._max_tokens is None:
            return self.num_slots
        columns = max(self.capacity, _round_up(longest), _ROUND)
        return max(1, min(self.num_slots, self._max_tokens // columns))

    def begin(
        self, *, first: int, columns_RQ: Tensor, longest: int, start: int | None = None
    ) -> Tensor:
        """Aim the next forward at slots `first`.. and return the indices of its columns [T].

        `longest` is one more than the largest entry of `columns_RQ`. `start` says that there is
        one row, whose columns are `start`, `start` + 1 and so on.
        """
        self._start = start
        num_rows, device = columns_RQ.shape[0], columns_RQ.device
        self._first, self._num_rows = first, num_rows
        self._rows_R1 = torch.arange(first, first + num_rows, device=device)[:, None]
        self._columns_RQ = columns_RQ
        self._num_columns = _round_up(longest)
        if self._num_columns > self.capacity:
            self._grow(self._num_columns)
        return torch.arange(self._num_columns, device=device)

    def update(
        self, key_RHQD: Tensor, value_RHQD: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; return views of all that its rows may attend to."""
        return (
            self._store(self._keys, layer_idx, key_RHQD),
            self._store(self._values, layer_idx, value_RHQD),
        )

    def store_hidden(self, hidden_RQD: Tensor) -> None:
        """Keep the last hidden states of the forward, column by column."""
        self._store(self._keys, -1, hidden_RQD[:, None])

    def hidden(self, slots: Tensor, length: int) -> Tensor:
        """Return the stored hidden states of slots [R], up to `length` columns [R, T, D]."""
        return self._keys[-1][slots, 0, :length]

    def copy(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Overwrite the first `length` columns of each target slot with those of its source."""
        for buffer in self._buffers():
            buffer[targets, :, :length] = buffer[sources, :, :length]

    def move_columns(self, slots: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Within each slot, copy one column to another."""
        for buffer in self._buffers():
            buffer[slots, :, targets] = buffer[slots, :, sources]

    def _buffers(self) -> list[Tensor]:
        return [*self._keys.values(), *self._values.values()]

    def _store(self, buffers: dict[int, Tensor], layer: int, new_RHQD: Tensor) -> Tensor:
        buffer = buffers.get(layer)
        if buffer is None:
            # Allocated on first sight: under tensor parallelism only the layer knows its own heads.
            shape = (self.rows_at(0), new_RHQD.shape[1], self.capacity, new_RHQD.shape[3])
            buffer = buffers[layer] = new_RHQD.new_zeros(shape)
        if self._start is not None:
            buffer[self._first, :, self._start : self._start + new_RHQD.shape[2]] = new_RHQD[0]
        else:
            buffer[self._rows_R1, :, self._columns_RQ] = new_RHQD.transpose(1, 2)
        window = slice(self._first, self._first + self._num_rows)
        return buffer[window, :, : self._num_columns]

    def _grow(self, wanted: int) -> None:
        doubled = _round_up(2 * self.capacity)
        # Doubling spares copies; not where it would cost slots.
        capacity = doubled if self.rows_at(doubled) == self.rows_at(wanted) else wanted
        capacity = max(wanted, capacity)
        rows = self.rows_at(capacity)
        for buffers in (self._keys, self._values):
            for layer, old in buffers.items():
                new = old.new_zeros((rows, old.shape[1], capacity, old.shape[3]))
                new[:, :, : self.capacity] = old[:rows]
                buffers[layer] = new
        self.capacity = capacity

    # The rest of transformers' cache interface; a ready-made mask keeps it from being consulted.

    def get_seq_length(self, *_: object) -> int:
        return 0

    def get_mask_sizes(self, *_: object) -> tuple[int, int]:
        return self._num_columns, 0


def _round_up(columns: int) -> int:
    return -(-columns // _ROUND) * _ROUND
