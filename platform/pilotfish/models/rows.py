"""Which sequence each slot of a cache holds, and where its hidden states are known already.

Shapes: S slots, Q tokens fed per slot, K candidates, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pilotfish.context import Context


@dataclass(slots=True)
class Siblings:
    """Candidates for the next token that were looked at, behind the columns that are real."""

    length: int
    """Tokens before the candidates."""
    first_column: int
    token_ids: list[int]
    hidden_KD: Tensor


class Row:
    """What one slot holds."""

    __slots__ = ("ids", "key", "known", "released", "siblings", "used_at")

    def __init__(self, key: int) -> None:
        self.key = key
        self.ids: list[int] = []
        self.used_at = 0
        self.released = False
        self.known: dict[int, Tensor] = {}
        """Last hidden state [D] behind so many tokens."""
        self.siblings: Siblings | None = None

    def rewind(self, token_ids: Sequence[int]) -> None:
        """Keep the common prefix with these ids, and what is known about it."""
        length = common_prefix(self.ids, token_ids)
        if length < len(self.ids):
            del self.ids[length:]
            self.known = {at: hidden for at, hidden in self.known.items() if at <= length}
            if self.siblings is not None and self.siblings.length != length:
                self.siblings = None

    def chosen_sibling(self, token_ids: Sequence[int]) -> int | None:
        """Return the place of the candidate that is the next of these ids, if it is one."""
        found = self.siblings
        if found is None or found.length != len(self.ids) or len(token_ids) <= found.length:
            return None
        token = token_ids[found.length]
        return found.token_ids.index(token) if token in found.token_ids else None


@dataclass(slots=True)
class Ask:
    """One sequence and the lengths at which its hidden state is wanted."""

    context: Context
    """The longest of the contexts."""
    places: list[int]
    """Of each context in the call."""
    lengths: list[int]


def group(contexts: Sequence[Context]) -> list[Ask]:
    """Join the contexts of one key: they are prefixes of the longest of them."""
    asks: dict[int, Ask] = {}
    for place, context in enumerate(contexts):
        length = len(context.token_ids)
        ask = asks.get(context.key)
        if ask is None:
            asks[context.key] = Ask(context, [place], [length])
            continue
        ask.places.append(place)
        ask.lengths.append(length)
        if length > len(ask.context.token_ids):
            ask.context = context
    return list(asks.values())


def common_prefix(held: list[int], wanted: Sequence[int]) -> int:
    """Length of the longest shared prefix."""
    length = min(len(held), len(wanted))
    if held[:length] == wanted[:length]:
        return length
    return next(at for at in range(length) if held[at] != wanted[at])


def first_unknown(row: Row, ask: Ask) -> int:
    """How many tokens stay in the cache: the one behind them is fed to learn what is asked."""
    unknown = [length for length in ask.lengths if length not in row.known]
    return min(unknown) - 1 if unknown else len(ask.context.token_ids)


def gather(
    fed_SQD: Tensor | None, rows: Sequence[Row], asks: Sequence[Ask], starts: Sequence[int]
) -> Tensor:
    """Return the states asked for, in the order of the call: fed just now, or known before."""
    places = [place for ask in asks for place in ask.places]
    known = any(row.known for row in rows)
    if fed_SQD is not None and fed_SQD.shape[1] == 1 and len(asks) == len(places) and not known:
        order = invert(places)
        hidden_RD = fed_SQD[:, 0]
        return hidden_RD if order == list(range(len(order))) else hidden_RD[order]
    found, slots, queries = [], [], []
    for slot, (row, ask, start) in enumerate(zip(rows, asks, starts, strict=True)):
        for length in ask.lengths:
            if length > start:
                found.append(None)
                slots.append(slot)
                queries.append(length - 1 - start)
            else:
                found.append(row.known[length])
    if fed_SQD is None:
        return torch.stack(found)[invert(places)]
    fresh = iter(fed_SQD[slots, queries])
    return torch.stack([next(fresh) if one is None else one for one in found])[invert(places)]


def prefix(context: Context, length: int) -> Context:
    ids = context.token_ids
    return context if length == len(ids) else replace(context, token_ids=ids[:length])


def invert(order: Sequence[int]) -> list[int]:
    inverse = [0] * len(order)
    for at, place in enumerate(order):
        inverse[place] = at
    return inverse


def first_run(missing: Sequence[int]) -> slice | None:
    """The first run of neighbouring slots that miss something."""
    start = next((slot for slot, count in enumerate(missing) if count > 0), None)
    if start is None:
        return None
    stop = next((at for at in range(start, len(missing)) if missing[at] <= 0), len(missing))
    return slice(start, stop)
