"""Which slot holds which sequence: find, share prefixes, evict, and keep a call's rows together."""

from collections.abc import Sequence

import torch

from pilotfish.context import Context
from pilotfish.models.rows import Row, common_prefix
from pilotfish.models.slots import SlotCache

_MIN_SHARED = 8  # a shorter prefix is computed faster than it is found and copied


class Placement:
    """The rows in the slots of a cache, 0..n-1 without holes.

    Ended sequences keep their slot until it is needed, so that the next request with the same
    beginning starts from a copy of its keys and values.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.rows: list[Row] = []
        self.num_shared = 0
        """Tokens so far whose keys and values were copied rather than computed."""
        self._cache = cache
        self._index: dict[int, int] = {}
        self._clock = 0

    def place(self, contexts: Sequence[Context], *, num_slots: int, device: torch.device) -> None:
        """Bring the contexts' rows to slots 0..n-1 in some order, rewound to what they share.

        Keys differ, and there are at most `num_slots` of them.
        """
        self._clock += 1
        wanted = {context.key for context in contexts}
        parents = {context.parent for context in contexts}
        new: list[tuple[Context, Row | None]] = []
        for context in contexts:
            slot = self._index.get(context.key)
            if slot is None:
                new.append((context, self._source(context)))
            else:
                self.rows[slot].rewind(context.token_ids)
        self._make_room(len(new), num_slots, keep=wanted, spare=parents)
        if new:
            self._add(new, device)
        for context in contexts:
            row = self.rows[self._index[context.key]]
            row.used_at, row.released = self._clock, False
        outside = [at for at in map(self._index.__getitem__, wanted) if at >= len(contexts)]
        if outside:
            inside = [at for at in range(len(contexts)) if self.rows[at].key not in wanted]
            self._swap(outside, inside[: len(outside)], device)

    def leaders(self, contexts: Sequence[Context]) -> list[Context]:
        """Return new contexts that others in the call begin like: worth computing first, alone."""
        first: dict[tuple[int, ...], Context] = {}
        followed: dict[int, Context] = {}
        for context in contexts:
            if context.key in self._index or len(context.token_ids) <= _MIN_SHARED:
                continue
            leader = first.setdefault(tuple(context.token_ids[:_MIN_SHARED]), context)
            if leader is not context:
                followed[leader.key] = leader
        return [leader for leader in followed.values() if self._source(leader) is None]

    def slot(self, key: int) -> int:
        return self._index[key]

    def release(self, keys: Sequence[int]) -> None:
        """Mark sequences as ended: their slots are the first to be taken."""
        for key in keys:
            slot = self._index.get(key)
            if slot is not None:
                row = self.rows[slot]
                row.released, row.known, row.siblings = True, {}, None

    def _source(self, context: Context) -> Row | None:
        """Find the row that shares most with a new context."""
        if context.parent is not None and context.parent in self._index:
            return self.rows[self._index[context.parent]]
        best, most = None, _MIN_SHARED - 1
        start = context.token_ids[:_MIN_SHARED]
        if len(start) < _MIN_SHARED:
            return None
        for row in self.rows:
            if row.ids[:_MIN_SHARED] == start:
                shared = common_prefix(row.ids, context.token_ids)
                if shared > most:
                    best, most = row, shared
        return best

    def _make_room(
        self, num_new: int, num_slots: int, *, keep: set[int], spare: set[int | None]
    ) -> None:
        """Evict until the new rows fit: ended sequences first, then the least recently used.

        Rows in `keep` stay; those in `spare` go last.
        """
        excess = len(self.rows) + num_new - num_slots
        if excess <= 0:
            return
        idle = [row for row in self.rows if row.key not in keep]
        idle.sort(key=lambda row: (row.key in spare, not row.released, row.used_at))
        gone = idle[:excess]
        for row in gone:
            del self._index[row.key]
            row.ids = []  # whoever meant to copy from it now finds nothing
        self._close_gaps()

    def _close_gaps(self) -> None:
        """Drop the rows that are no longer in the index; the last ones move to their slots."""
        num_left = len(self._index)
        holes = [at for at in range(num_left) if self.rows[at].key not in self._index]
        behind = range(num_left, len(self.rows))
        movers = [at for at in behind if self.rows[at].key in self._index]
        if movers:
            length = max(len(self.rows[at].ids) for at in movers)
            self._cache.copy(torch.tensor(movers), torch.tensor(holes), length)
        for hole, mover in zip(holes, movers, strict=True):
            row = self.rows[hole] = self.rows[mover]
            row.siblings = None  # their columns lie behind what was moved
            self._index[row.key] = hole
        del self.rows[num_left:]

    def _add(self, new: Sequence[tuple[Context, Row | None]], device: torch.device) -> None:
        sources, targets, longest = [], [], 0
        for context, source in new:
            row = Row(context.key)
            self._index[context.key] = len(self.rows)
            if source is not None and source.ids:
                shared = common_prefix(source.ids, context.token_ids)
                row.ids = source.ids[:shared]
                sources.append(self._index[source.key])
                targets.append(len(self.rows))
                longest = max(longest, shared)
                self.num_shared += shared
            self.rows.append(row)
        if sources:
            source_R = torch.tensor(sources, device=device)
            self._cache.copy(source_R, torch.tensor(targets, device=device), longest)

    def _swap(self, ones: list[int], others: list[int], device: torch.device) -> None:
        rows = self.rows
        length = max(len(rows[at].ids) for at in (*ones, *others))
        back_R = torch.tensor([*others, *ones], device=device)
        there_R = torch.tensor([*ones, *others], device=device)
        self._cache.copy(back_R, there_R, length)
        for one, other in zip(ones, others, strict=True):
            rows[one], rows[other] = rows[other], rows[one]
            self._index[rows[one].key], self._index[rows[other].key] = one, other
            for row in (rows[one], rows[other]):
                row.siblings = None  # their columns lie behind what was moved
