"""Which requests have a turn now: admission, chunked prefill, preemption when slots run out.

A request that loses its slot keeps its tokens and waits; when it is back its text goes on as if
nothing had happened, since caches are found by prefix and draws are counted.
"""

from bisect import insort
from collections import deque

from pilotfish.decode.running import Running
from pilotfish.models.causal_lm import CausalLM

_HEADROOM = 64  # columns a row may still grow before it is asked again whether there is room


class Scheduler:
    """The requests of an engine: waiting, filling their caches, reading prompts, and running."""

    def __init__(self, base: CausalLM, *, prefill_budget: int) -> None:
        self.running: list[Running] = []
        self.reading: list[Running] = []
        self.num_preempted = 0
        self._base = base
        self._prefill_budget = prefill_budget
        self._waiting: list[Running] = []
        """In order of priority, then of arrival."""
        self._filling: deque[Running] = deque()

    @property
    def num_running(self) -> int:
        return len(self.running) + len(self.reading) + len(self._filling)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_columns(self) -> int:
        """Tokens of the requests that have a slot."""
        return sum(len(one.context.token_ids) for one in self._in_slots())

    def submit(self, request: Running) -> None:
        insort(self._waiting, request, key=_rank)

    def schedule(self) -> bool:
        """Preempt and admit; return whether the running rows changed."""
        preempted = self._preempt()
        admitted = self._admit()
        return preempted or admitted

    def remove(self, place: int) -> Running:
        """Take out a running row; the last one fills the hole."""
        gone, last = self.running[place], self.running.pop()
        if last is not gone:
            self.running[place] = last
        return gone

    def end_reading(self, one: Running) -> bool:
        """Let a request whose prompt was read decode; return whether it has anything to decode."""
        self.reading.remove(one)
        if one.reads:
            return False
        self._filling.append(one)
        return True

    def find(self, key: int) -> Running | None:
        """Return a request, wherever it is."""
        everywhere = (*self._in_slots(), *self._waiting)
        return next((one for one in everywhere if one.request.key == key), None)

    def drop(self, keys: set[int]) -> list[Running]:
        """Take out requests wherever they are, and return them."""
        dropped = []
        for queue in (self._waiting, self._filling, self.reading):
            for one in [one for one in queue if one.request.key in keys]:
                queue.remove(one)
                dropped.append(one)
        for place in reversed(range(len(self.running))):
            if self.running[place].request.key in keys:
                dropped.append(self.remove(place))
        return dropped

    def _preempt(self) -> bool:
        """Make room: for rows that have grown, and for waiting requests of higher priority."""
        before = len(self.running)
        while len(self.running) > 1 and self.num_running > self._room(self.running):
            self._send_back(max(self.running, key=_rank))
        while self._waiting and self.running and not self._fits(self._waiting[0]):
            worst = max(self.running, key=_rank)
            if worst.request.priority <= self._waiting[0].request.priority:
                break
            self._send_back(worst)
        return len(self.running) < before

    def _send_back(self, one: Running) -> None:
        self.running.remove(one)
        self._base.release([one.request.key])
        self.num_preempted += 1
        insort(self._waiting, one, key=_rank)

    def _admit(self) -> bool:
        """Move waiting requests to free slots and prefill them, within the step's budget."""
        while self._waiting and self._fits(self._waiting[0]):
            self._filling.append(self._waiting.pop(0))
        budget, changed = self._prefill_budget, False
        while self._filling and budget > 0:
            one = self._filling[0]
            start = one.start
            length = len(start.token_ids)
            if length > self._prefill_budget:
                budget -= self._base.prefill(start, budget)
                if budget <= 0:
                    break
            else:  # fed with its neighbours, by the next forward of all rows
                budget -= length
            self._filling.popleft()
            if one.reads:
                self.reading.append(one)
            else:
                self.running.append(one)
                changed = True
        return changed

    def _fits(self, one: Running) -> bool:
        return self.num_running < self._room([*self._in_slots(), one])

    def _in_slots(self) -> list[Running]:
        return [*self.running, *self.reading, *self._filling]

    def _room(self, rows: list[Running]) -> int:
        longest = max(len(one.context.token_ids) for one in rows)
        return self._base.body.rows_at(longest + _HEADROOM)


def _rank(one: Running) -> tuple[int, int]:
    return one.request.priority, one.arrival
