"""The remote placement of a guide LM: a `LogprobSource` whose model is in another process."""

import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pilotfish.context import Context
from pilotfish.models.rows import Ask, common_prefix, group, invert
from serve.catalog import GuideVersion
from serve.config import GuideConfig
from serve.errors import GuideUnavailableError
from serve.replicas.guide_line import Address, Line, Question, Reply, readable

logger = logging.getLogger(__name__)

Attend: TypeAlias = Callable[[GuideVersion, str], Future[Address]]
"""Has some replica of the guide expect the bearer of a ticket, and says where it listens. Fails
with `OSError` where another replica may do it."""

_BACKOFF_S = 0.05
_STAY_S = 60.0
"""Then the least busy replica is asked for again. Mostly it is the same, which has its caches."""
_PART_S = 0.01
"""Until a replica that was left knows of it, and looks no busier for that."""
_GLANCE_S = 0.005


class RemoteLM:
    """Asks the replicas of one guide; the call is in flight while the base computes.

    An answer is a pure function of the ids, of which a call holds those that its replica has not
    seen. So a call whose replica died is sent to another one with all of them, and one that takes
    too long is sent to a second replica as well: whoever answers first is asked from then on. A
    guide that did not answer in time is left alone for a while, so that no step waits for it.

    Belongs to the engine's thread.
    """

    def __init__(
        self,
        attend: Attend,
        guide: GuideConfig,
        version: GuideVersion,
        *,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._attend, self._guide, self._version = attend, guide, version
        self._vocab_size, self._device = vocab_size, device
        # By it a replica finds its caches again. Others that share them have other numbers.
        self._caller = secrets.randbits(62)
        self.name = guide.name
        self.place: _Place | None = None
        """Who is asked first; None if somebody must be found."""
        self._down_until = 0.0
        self.find_at = 0.0
        """No replica is looked for before."""

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        """Send the call; the returned function waits for its log-probs [R, V].

        Either raises `GuideUnavailableError` when nobody answers in time.
        """
        if time.monotonic() < self._down_until:
            raise GuideUnavailableError(self._version.key, "it did not answer a moment ago")
        self.move_on()
        asks = group(contexts)
        guide = self._guide
        call = _Call(self, asks, hedge_s=guide.hedge_s, timeout_s=guide.timeout_s)

        def wait() -> Tensor:
            try:
                answer = call.wait()
            except Exception as error:
                self._down_until = time.monotonic() + self._guide.cooldown_s
                raise GuideUnavailableError(self._version.key, repr(error)) from error
            found_RV = torch.from_numpy(answer.reshape(-1, self._vocab_size)).to(self._device)
            order = invert([place for ask in asks for place in ask.places])
            found_RV = found_RV if order == sorted(order) else found_RV[order]
            return found_RV.float() if found_RV.dtype == torch.float16 else found_RV

        return wait

    def release(self, keys: Sequence[int]) -> None:
        """Forget sequences here, and at the replica with the next call."""
        if self.place is not None:
            self.place.release(keys)

    def close(self) -> None:
        """Leave the replica, which may have the version for nobody else."""
        self.settle(None)

    def move_on(self) -> None:
        """Leave a replica that has hung up, or at which this has been for long."""
        place = self.place
        if place is None or not place.line.is_idle:
            return
        now = time.monotonic()
        if now > place.since + _STAY_S:
            self.find_at = now + _PART_S
            self.settle(None)
        elif place.line.is_cut:
            self.settle(None)

    def settle(self, place: "_Place | None") -> None:
        """Ask another replica from now on."""
        if self.place is not None and self.place is not place:
            self.place.line.close()
        self.place = place

    def find(self) -> tuple[str, Future[Address]]:
        """Ask for a replica: returns the ticket that it expects, and where it listens."""
        ticket = secrets.token_hex(16)
        return ticket, self._attend(self._version, ticket)

    def connect(self, address: Address, ticket: str, timeout_s: float) -> "_Place":
        """Go to a replica. Raises `OSError`."""
        return _Place(Line(address, ticket, caller=self._caller, timeout_s=timeout_s))


class _Place:
    """One replica of the guide, for as long as a connection to it lasts."""

    def __init__(self, line: Line) -> None:
        self.line, self.since = line, time.monotonic()
        self._sent: dict[int, list[int]] = {}
        """Ids that the replica has been sent, by the key of the context."""
        self._released: list[int] = []

    def ask(self, asks: Sequence[Ask]) -> Reply:
        questions = [self._question(ask) for ask in asks]
        released, self._released = self._released, []
        return self.line.ask(questions, released)

    def release(self, keys: Sequence[int]) -> None:
        self._released += [key for key in keys if self._sent.pop(key, None) is not None]

    def _question(self, ask: Ask) -> Question:
        """Return what to send of a sequence, and note that it was sent."""
        ids = ask.context.token_ids
        sent = self._sent.setdefault(ask.context.key, [])
        kept = common_prefix(sent, ids)
        new = ids[kept:]
        sent[kept:] = new
        return Question(ask.context.key, kept, new, ask.lengths)


class _Call:
    """One step's call, at one replica or, when that is late or fails, at others too."""

    def __init__(self, lm: RemoteLM, asks: Sequence[Ask], *, hedge_s: float, timeout_s: float):
        """Send it."""
        self._lm, self._asks = lm, asks
        self._hedge_s, self._timeout_s = hedge_s, timeout_s
        self._late_at = self._deadline = math.inf
        self._replies: dict[_Place, Reply] = {}
        self._found: tuple[str, Future[Address]] | None = None
        """A replica that is being found."""
        self._find_at = lm.find_at
        now = time.monotonic()
        if lm.place is not None or now >= self._find_at:
            self._ask_another(now)

    def wait(self) -> NDArray[np.floating]:
        """Return the first answer. Raises `TimeoutError`, or what cannot be mended elsewhere."""
        now = time.monotonic()
        self._late_at, self._deadline = now + self._hedge_s, now + self._timeout_s
        try:
            while (reply := self._settled()) is None:
                now = time.monotonic()
                if now >= self._deadline:
                    self._lm.settle(None)
                    raise TimeoutError(f"no answer in {self._timeout_s:g} s")
                if now >= self._late_at:  # a second replica is asked once
                    self._late_at = math.inf
                    self._ask_another(now)
                elif not self._replies and now >= self._find_at:
                    self._ask_another(now)
                self._listen(now)
        finally:
            if self._found is not None:
                self._found[1].cancel()
            for place in self._replies:
                if place is not self._lm.place:
                    place.line.close()
        if reply.error is not None:
            raise RuntimeError(reply.error)
        assert reply.logprobs is not None, "it is there"
        return reply.logprobs

    def _settled(self) -> Reply | None:
        for place, reply in self._replies.items():
            if reply.is_there:
                self._lm.settle(place)
                return reply
        return None

    def _ask_another(self, now: float) -> None:
        """Ask the replica that other calls ask; one that must be found where that is asked."""
        place = self._lm.place
        if place is not None and place not in self._replies:
            self._ask(place)
        elif self._found is None:
            self._found = self._lm.find()
            self._find_at = now + _BACKOFF_S

    def _listen(self, now: float) -> None:
        """Take what arrives until there is something else to do."""
        for place in [place for place in self._replies if place.line.is_closed]:
            self._lose(place, "closed by another call")
        until = min(self._late_at, self._deadline)
        if self._found is not None:
            until = now + _GLANCE_S
        elif not self._replies:
            until = min(until, self._find_at)
        places = {place.line: place for place in self._replies}
        for line in readable(list(places), until - now):
            try:
                line.feed()
            except OSError as error:
                self._lose(places[line], repr(error))
        if self._found is not None and self._found[1].done():
            self._connect()

    def _connect(self) -> None:
        assert self._found is not None, "it is done"
        (ticket, address), self._found = self._found, None
        left_s = self._deadline - time.monotonic()
        try:
            place = self._lm.connect(address.result(), ticket, max(left_s, _GLANCE_S))
        except OSError as error:
            logger.warning("no replica of guide %s: %r", self._lm.name, error)
        else:
            self._ask(place)

    def _ask(self, place: _Place) -> None:
        try:
            self._replies[place] = place.ask(self._asks)
        except OSError as error:
            self._lose(place, repr(error))

    def _lose(self, place: _Place, why: str) -> None:
        logger.warning("a replica of guide %s failed, asking elsewhere: %s", self._lm.name, why)
        place.line.close()
        self._replies.pop(place, None)
        if place is self._lm.place:
            self._lm.settle(None)
