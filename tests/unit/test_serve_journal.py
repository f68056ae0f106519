"""`serve.api.journal`: no token lost or repeated, whatever a replica does."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from pilotfish.errors import PromptError
from serve.api.journal import Journal, Patience, ask, follow
from serve.artifacts import Artifact
from serve.catalog import GuideVersion
from serve.errors import EngineError
from serve.retries import StreamBrokenError, is_retryable
from serve.suspicions import is_trusted, note_routed
from serve.wire import GenerateRequest, GuideUse

PATIENCE = Patience(first_token_s=5, token_s=5, max_attempts=3)
TEXT = list(range(100, 110))
"""The token ids that every healthy replica draws."""

Script = Callable[[GenerateRequest], AsyncIterator[tuple[Any, ...]]]


class Replicas:
    """Answers the first call with the first script, and so on; the last one goes on for good."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.requests: list[GenerateRequest] = []
        self.num_cancelled = 0

    def send(self, request: GenerateRequest) -> "_Call":
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        self.requests.append(request)
        return _Call(script(request), self)


class _Call:
    def __init__(self, tokens: AsyncIterator[tuple[Any, ...]], replicas: Replicas) -> None:
        self._tokens = tokens
        self._replicas = replicas

    async def __anext__(self) -> tuple[Any, ...]:
        return await anext(self._tokens)

    def cancel(self) -> None:
        self._replicas.num_cancelled += 1


def token(position: int) -> tuple[Any, ...]:
    finish = "length" if position == len(TEXT) - 1 else None
    return (position, TEXT[position], -1.0, -1.5, 0.25, finish)


async def healthy(request: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
    for position in range(len(request["completed"]), len(TEXT)):
        yield ([token(position)],)


def dying(after: int, error: Exception | None = None) -> Script:
    async def script(request: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
        start = len(request["completed"])
        for position in range(start, start + after):
            yield ([token(position)],)
        if error is not None:
            raise error

    return script


async def skipping(request: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
    start = len(request["completed"])
    yield ([token(start), token(start + 2)],)


async def stuck(request: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
    yield ([token(len(request["completed"]))],)
    await asyncio.sleep(3600)


def journal() -> Journal:
    guide = GuideVersion("g", "1", Artifact("/g"), "genarm", 1.0)
    return Journal(
        request_id="r", prompt_ids=[1, 2], params={"seed": 7}, guides=[GuideUse(guide, 1.0)]
    )


def collect(replicas: Replicas, entry: Journal, patience: Patience = PATIENCE) -> list[int]:
    async def run() -> list[int]:
        found: list[int] = []
        async for tokens in follow(entry, replicas.send, patience):
            found += [token.token_id for token in tokens]
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("position", [0, 1, 5, 9])
@pytest.mark.parametrize("error", [ActorDiedError(), EngineError("died"), None])
def test_a_dead_replica_loses_no_token_at_any_position(
    position: int, error: Exception | None
) -> None:
    replicas, entry = Replicas(dying(position, error), healthy), journal()
    assert collect(replicas, entry) == TEXT
    assert replicas.requests[1]["completed"] == TEXT[:position]
    assert entry.finish_reason == "length"


def test_every_attempt_has_the_same_prompt_parameters_and_guides() -> None:
    replicas = Replicas(dying(3, ActorDiedError()), dying(3, ActorDiedError()), healthy)
    collect(replicas, journal())
    own = {"completed": [], "attempt": ""}
    first, *others = ({**request, **own} for request in replicas.requests)
    assert others == [first, first]
    assert len({request["attempt"] for request in replicas.requests}) == 3


def test_a_skipped_position_is_drawn_again_and_nothing_is_repeated() -> None:
    assert collect(Replicas(healthy), journal()) == TEXT
    assert collect(Replicas(skipping, healthy), journal()) == TEXT


@pytest.mark.parametrize("error", [ActorDiedError(), EngineError("died"), TimeoutError(), None])
def test_a_replica_whose_stream_failed_is_avoided_by_later_attempts(
    error: Exception | None, request: pytest.FixtureRequest
) -> None:
    name = request.node.name

    def routed(to: str, script: Script) -> Script:
        async def answer(asked: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
            note_routed(asked["attempt"], f"{name}:{to}")
            async for item in script(asked):
                yield item

        return answer

    broken, sound = routed("broken", dying(3, error)), routed("sound", healthy)
    assert collect(Replicas(broken, sound), journal()) == TEXT
    assert [is_trusted(f"{name}:{one}") for one in ("broken", "sound")] == [False, True]


def test_a_stuck_replica_is_left_after_the_token_deadline() -> None:
    replicas = Replicas(stuck, healthy)
    patience = Patience(first_token_s=5, token_s=0.05, max_attempts=3)
    assert collect(replicas, journal(), patience) == TEXT
    assert replicas.num_cancelled == 1


def test_attempts_are_counted_from_the_last_progress() -> None:
    deaths = [dying(1, ActorDiedError()) for _ in range(8)]
    assert collect(Replicas(*deaths, healthy), journal()) == TEXT


def test_the_last_attempt_without_progress_raises() -> None:
    replicas = Replicas(dying(2, ActorDiedError()), dying(0, ActorDiedError()))
    with pytest.raises(ActorDiedError):
        collect(replicas, journal())
    assert len(replicas.requests) == 3  # the first made progress, so its failure counts as one


def test_an_error_of_the_request_is_raised_at_once() -> None:
    replicas = Replicas(dying(0, PromptError("too long")), healthy)
    with pytest.raises(PromptError, match="too long"):
        collect(replicas, journal())
    assert len(replicas.requests) == 1


def test_leaving_the_stream_cancels_the_call() -> None:
    replicas = Replicas(healthy)

    async def run() -> None:
        stream = follow(journal(), replicas.send, PATIENCE)
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert replicas.num_cancelled == 1


def test_a_guide_that_was_given_up_stays_given_up_elsewhere() -> None:
    async def gives_up(request: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
        yield ([token(0), token(1)], [("f", 0), ("e", 1)])
        yield ([token(2)], [("g", 1)])
        raise ActorDiedError

    replicas, entry = Replicas(gives_up, healthy), journal()
    assert collect(replicas, entry) == TEXT
    assert replicas.requests[1]["gave_up"] == ["f", "e", "g"]
    assert entry.gave_up == {"f": 0, "e": 1, "g": 3}


PROMPT = list(range(6))


def readings(*positions: int) -> list[tuple[Any, ...]]:
    return [(at, PROMPT[at], -1.0, -1.0, 0.0, None) for at in positions]


def test_a_prompt_that_was_half_read_is_read_on_elsewhere() -> None:
    async def dies_reading(_: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
        yield ([], [], readings(1, 2))
        raise ActorDiedError

    async def dies_having_read(_: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
        yield ([], [], readings(3, 4, 5))
        yield ([token(0)],)
        raise ActorDiedError

    entry = journal()
    entry.read_from = 0
    replicas = Replicas(dies_reading, dies_having_read, healthy)
    assert collect(replicas, entry) == TEXT
    assert [reading.token_id for reading in entry.readings] == PROMPT[1:]
    starts = [request.get("read_from") for request in replicas.requests]
    assert starts == [1, 3, 6]


def test_readings_that_skip_a_position_are_read_again() -> None:
    async def skips(_: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
        yield ([], [], readings(1, 3))

    async def reads(_: GenerateRequest) -> AsyncIterator[tuple[Any, ...]]:
        yield ([], [], readings(1, 2, 3, 4, 5), True)

    entry = journal()
    entry.read_from = 0
    assert collect(Replicas(skips, reads), entry) == []
    assert [reading.position for reading in entry.readings] == [1, 2, 3, 4, 5]
    assert entry.finish_reason == "length"


def test_a_call_is_made_again_until_it_is_answered() -> None:
    errors = [ActorDiedError(), TimeoutError(), None]

    async def call() -> str:
        if (error := errors.pop(0)) is not None:
            raise error
        return "answer"

    assert asyncio.run(ask(call, PATIENCE)) == "answer"
    errors[:] = [ActorDiedError()] * 3
    with pytest.raises(ActorDiedError):
        asyncio.run(ask(call, PATIENCE))
    errors[:] = [PromptError("too long"), None]
    with pytest.raises(PromptError):
        asyncio.run(ask(call, PATIENCE))


def test_errors_of_user_code_behind_ray_are_told_apart_by_their_cause() -> None:
    def behind_ray(cause: Exception) -> Exception:
        return RayTaskError("generate", "traceback", cause).as_instanceof_cause()

    assert is_retryable(behind_ray(EngineError("died")))
    assert not is_retryable(behind_ray(PromptError("too long")))
    assert is_retryable(StreamBrokenError("ended early"))
