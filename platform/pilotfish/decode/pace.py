"""How many tokens to draft: as many as pay on this machine, for this batch and these texts.

Drafting more or less never changes a text, so it may follow the clock. A round of a batch with k
drafts a sequence takes a time that is measured; it yields 1 + a + .. + a^k tokens a sequence, with
a the share of drafts kept lately. The k with the most tokens per second wins; the others are tried
now and then, since batches and texts change.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pilotfish.decode.running import Running

_WARM_UP = 1  # the first round of a kind pays for caches and is not representative
_TRIES = 3
_RETRY_EVERY = 128
_MEMORY = 0.2
_HOPELESS = 0.2  # a draft that survives this seldom costs more rows than it saves


@dataclass(slots=True)
class _Timing:
    """Seconds of the rounds of one kind."""

    rounds: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.rounds += 1
        if self.rounds <= _WARM_UP:
            return
        first = self.rounds == _WARM_UP + 1
        self.seconds += (1.0 if first else _MEMORY) * (seconds - self.seconds)


class Pace:
    """Measures rounds and chooses the number of drafts of the next one."""

    def __init__(self) -> None:
        self._timings: dict[tuple[int, int], _Timing] = {}
        self._num_rounds = 0
        self._started = 0.0
        self._kind: tuple[int, int] | None = None
        self.speed_up: float | None = None
        """Of the best pace over not drafting, by the rounds measured lately and the share of drafts
        kept; None until both were tried."""

    def choose(self, running: Sequence[Running]) -> list[int]:
        """Return how many tokens to draft for each sequence."""
        drafting = [one for one in running if one.request.draft is not None]
        if not drafting:
            return [0] * len(running)
        most = max(one.request.draft.num_tokens for one in drafting if one.request.draft)
        bucket = len(running).bit_length()
        self._num_rounds += 1
        options = _options(most)
        plan = self._plan(bucket, options, drafting)
        self._kind = (bucket, plan)
        return [_for_sequence(one, plan) for one in running]

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Note the time of the round that `choose` planned."""
        if self._kind is not None:
            timing = self._timings.setdefault(self._kind, _Timing())
            timing.add(time.perf_counter() - self._started)
            self._kind = None

    def _plan(self, bucket: int, options: list[int], drafting: Sequence[Running]) -> int:
        timings = {k: self._timings.get((bucket, k), _Timing()) for k in options}
        untried = [k for k, timing in timings.items() if timing.rounds < _TRIES]
        if untried:
            return untried[0]
        if self._num_rounds % _RETRY_EVERY < _TRIES:
            return options[self._num_rounds // _RETRY_EVERY % len(options)]
        rates = {k: _expected(k, drafting) / timings[k].seconds for k in options}
        best = max(rates, key=rates.__getitem__)
        self.speed_up = rates[best] / rates[0]
        return best


def _options(most: int) -> list[int]:
    """Few enough to try them all, the largest first."""
    return sorted({most, (most + 1) // 2, 1, 0}, reverse=True)


def _expected(k: int, drafting: Sequence[Running]) -> float:
    """Tokens that one round is expected to yield."""
    return sum(sum(one.accepted**at for at in range(_for_sequence(one, k) + 1)) for one in drafting)


def _for_sequence(one: Running, plan: int) -> int:
    """Drafts of one sequence: no more than it may use, nor than are likely to be kept."""
    if one.request.draft is None:
        return 0
    k = max(0, min(plan, one.request.draft.num_tokens, one.num_left - 1))
    while k > 0 and one.accepted**k < _HOPELESS:
        k -= 1
    return k
