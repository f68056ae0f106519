"""The one thread that touches an engine. Others hand it work and get its tokens through calls."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import PromptEvent, Request, TokenEvent
from pilotfish.errors import PilotfishError
from serve.errors import EngineError, GuideUnavailableError
from serve.replicas.priority import go_first

logger = logging.getLogger(__name__)

EventsCallback = Callable[[Sequence[PromptEvent | TokenEvent]], None]
GiveUpCallback = Callable[[int, str], None]
FailureCallback = Callable[[Sequence[int], BaseException], None]


class EngineThread:
    """Steps an engine while it is busy, and sleeps otherwise.

    `on_events` gets those of each step, `on_give_up` the key of a request and the guide that
    it goes on without, `on_failure` the keys of requests that cannot go on and why; all are called
    on the engine's thread and must return at once.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_events: EventsCallback,
        on_give_up: GiveUpCallback,
        on_failure: FailureCallback,
        stall_s: float,
    ) -> None:
        self._engine = engine
        self._on_events = on_events
        self._on_give_up = on_give_up
        self._on_failure = on_failure
        self._stall_s = stall_s
        self._wake = threading.Condition()
        self._inbox: list[_Work] = []
        """In order of arrival."""
        self._open: dict[int, _Open] = {}
        self._closed = False
        self._error: BaseException | None = None
        self._stepping_since: float | None = None
        self.num_steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Requests that hold a slot or wait for one."""
        return len(self._open)

    def submit(self, request: Request, *, goes_on_without: Sequence[str] = ()) -> None:
        """Queue a request. Raises `EngineError` if the loop is dead.

        `goes_on_without` are guides whose failure does not end the request but leaves it unguided.
        """
        self._put(_Open(request, frozenset(goes_on_without)))

    def cancel(self, key: int) -> None:
        """Free what a request holds, at the next step; unknown keys are ignored."""
        if self._error is None:
            self._put(key)

    def call(self, work: Callable[[], None]) -> None:
        """Have something done between two steps, behind all that was asked for before."""
        if self._error is None:
            self._put(work)

    def withdraw(self, guide: str, reason: str) -> None:
        """Take a guide, by its name, out of all requests, as if it had failed."""
        self.call(lambda: self._fail_guide(GuideUnavailableError(guide, reason)))

    def end_all(self, error: GuideUnavailableError) -> None:
        """End all requests with an error."""
        self.call(lambda: self._end(list(self._open), error))

    def check(self) -> None:
        """Raise `EngineError` if the loop died, or has been inside one step for too long."""
        if self._error is not None:
            raise EngineError(f"the decode loop died: {self._error!r}") from self._error
        since = self._stepping_since
        if since is not None and time.monotonic() - since > self._stall_s:
            raise EngineError(f"one decode step has taken longer than {self._stall_s:g} s.")

    def close(self) -> None:
        """Stop after the running step and wait for it."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _put(self, work: "_Work") -> None:
        with self._wake:
            if self._error is not None:
                raise EngineError(f"the decode loop died: {self._error!r}")
            self._inbox.append(work)
            self._wake.notify()

    def _run(self) -> None:
        go_first()
        try:
            while (inbox := self._wait()) is not None:
                for work in inbox:
                    self._take(work)
                self._step()
        except BaseException as error:
            logger.exception("the decode loop died")
            with self._wake:
                self._error = error
                keys = {work.request.key for work in self._inbox if isinstance(work, _Open)}
            self._on_failure([*self._open, *keys], EngineError(f"the decode loop died: {error!r}"))
        finally:
            self._stepping_since = None

    def _wait(self) -> "list[_Work] | None":
        """Return what arrived, as soon as there is something to do; None is the end."""
        with self._wake:
            while not (self._inbox or self._engine.busy or self._closed):
                self._wake.wait()
            inbox, self._inbox = self._inbox, []
            return None if self._closed else inbox

    def _take(self, work: "_Work") -> None:
        if isinstance(work, int):
            self._engine.cancel(work)
            self._open.pop(work, None)
        elif isinstance(work, _Open):
            try:
                self._engine.submit(work.request)
            except PilotfishError as error:
                self._on_failure([work.request.key], error)
            else:
                self._open[work.request.key] = work
        else:
            work()

    def _step(self) -> None:
        self._stepping_since = time.monotonic()
        try:
            tokens = self._engine.step()
        except GuideUnavailableError as error:
            self._fail_guide(error)
            return
        finally:
            self._stepping_since = None
        self.num_steps += 1
        events = [*self._engine.take_readings(), *tokens]
        for event in events:
            if event.finish_reason is not None:
                self._open.pop(event.key, None)
        if events:
            self._on_events(events)

    def _fail_guide(self, error: GuideUnavailableError) -> None:
        """End the requests that want a guide, or go on without it. The others lost nothing: a step
        that raises has drawn no token, and the models' caches are found by prefix."""
        failed = []
        for key, one in self._open.items():
            for guide, weight in one.request.guides.items():
                if weight == 0 or not _is_of(guide, error.guide):
                    continue
                if guide in one.goes_on_without:
                    self._engine.give_up(key, guide)
                    self._on_give_up(key, guide)
                else:
                    failed.append(key)
        self._end(failed, error)

    def _end(self, keys: Sequence[int], error: PilotfishError) -> None:
        for key in keys:
            self._engine.cancel(key)
            del self._open[key]
        self._on_failure(keys, error)


@dataclass(frozen=True, slots=True)
class _Open:
    request: Request
    goes_on_without: frozenset[str]


_Work: TypeAlias = _Open | int | Callable[[], None]
"""A request to submit, a key to cancel, or something to do."""


def _is_of(key: str, guide: str) -> bool:
    """Whether an engine's `name@version{args}` is of a guide given as `name` or `name@version`."""
    return key == guide or key.startswith((f"{guide}@", guide + "{"))
