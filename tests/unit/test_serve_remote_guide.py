"""`serve.replicas.remote_guide`: whatever guide replicas do, the law is theirs or there is none."""

import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from pilotfish.context import Context
from pilotfish.errors import CheckpointError, PromptError
from serve.catalog import Catalog, make_catalog
from serve.config import ServeConfig, parse_args
from serve.errors import GuideUnavailableError
from serve.frames import pack
from serve.replicas.guide_line import Address, Line, Question, readable
from serve.replicas.guide_model import GuideModel
from serve.replicas.remote_guide import RemoteLM
from tests.fakes import context
from tests.folders import save_base, save_guide
from tests.handles import LocalVisits

PROMPTS = [[40, 41, 42, 43], [50, 51], [60, 61, 62]]


class World:
    """Folders of a base and a guide, and replicas of the guide."""

    def __init__(self, folder: Path) -> None:
        self._base, self._guide = save_base(folder / "base"), save_guide(folder / "guide")
        self._replicas: list[GuideModel] = []

    def config(self, **guide: Any) -> ServeConfig:
        settings = {"name": "far", "path": str(self._guide), "placement": "remote"}
        settings |= {"precision": "full", "timeout_s": 2, **guide}
        return parse_args({"base": {"path": str(self._base)}, "guides": [settings]})

    def replica(self, num_slots: int = 4, **guide: Any) -> GuideModel:
        config = self.config(**guide)
        catalog, far = make_catalog(config, created=0), config.guide("far")
        replica = GuideModel(far, catalog, num_slots=num_slots, host=lambda: "127.0.0.1")
        self._replicas.append(replica)
        return replica

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()

    def lm(self, *replicas: Any, **guide: Any) -> tuple[RemoteLM, LocalVisits]:
        config, visits = self.config(**guide), LocalVisits(*replicas)
        catalog: Catalog = make_catalog(config, created=0)
        lm = RemoteLM(
            visits,
            config.guide("far"),
            catalog.guides[0].current,
            vocab_size=catalog.base.vocab_size,
            device=torch.device("cpu"),
        )
        return lm, visits


class Broken:
    """A replica that lets nobody in."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def attend(self, *_: Any) -> AsyncGenerator[Address]:
        raise self._error
        yield


def slow(replica: GuideModel, seconds: float, monkeypatch: pytest.MonkeyPatch) -> GuideModel:
    """Have a replica answer late."""
    answer = replica._answer

    def late(*asked: Any) -> Any:
        time.sleep(seconds)
        return answer(*asked)

    monkeypatch.setattr(replica, "_answer", late)
    return replica


@pytest.fixture
def num_new_ids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids sent by each call."""
    numbers: list[int] = []
    ask = Line.ask

    def counted(line: Line, questions: Sequence[Question], released: Sequence[int]) -> Any:
        numbers.append(sum(len(one.new_ids) for one in questions))
        return ask(line, questions, released)

    monkeypatch.setattr(Line, "ask", counted)
    return numbers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("models"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def law(world: World) -> Callable[[list[list[int]]], torch.Tensor]:
    """The guide's law behind some ids, from a replica that has seen nothing else."""

    def ask(texts: list[list[int]]) -> torch.Tensor:
        lm, _ = world.lm(world.replica())
        return lm.begin([context(key, ids) for key, ids in enumerate(texts)])()

    return ask


def contexts() -> list[Context]:
    return [context(key, list(ids)) for key, ids in enumerate(PROMPTS)]


def test_a_step_sends_what_is_new_and_nothing_else(
    world: World, law: Any, num_new_ids: list[int]
) -> None:
    lm, visits = world.lm(world.replica())
    rows = contexts()
    for token in (70, 71, 72):
        lm.begin(rows)()
        for row in rows:
            row.token_ids.append(token)
    found_RV = lm.begin(rows)()
    assert num_new_ids == [9, 3, 3, 3]
    assert visits.num_visits == 1
    torch.testing.assert_close(found_RV, law([[*ids, 70, 71, 72] for ids in PROMPTS]))


def test_rows_of_one_sequence_at_several_lengths_keep_their_order(world: World, law: Any) -> None:
    lm, _ = world.lm(world.replica())
    ids = PROMPTS[0]
    rows = [context(0, ids[:2]), context(1, PROMPTS[1]), context(0, ids), context(0, ids[:3])]
    want_RV = torch.cat([law([row.token_ids]) for row in rows])
    torch.testing.assert_close(lm.begin(rows)(), want_RV)


def test_tokens_that_were_taken_back_are_replaced(
    world: World, law: Any, num_new_ids: list[int]
) -> None:
    lm, _ = world.lm(world.replica())
    lm.begin([context(0, [40, 41, 42, 43, 44])])()
    found_RV = lm.begin([context(0, [40, 41, 99])])()
    assert num_new_ids == [5, 1]
    torch.testing.assert_close(found_RV, law([[40, 41, 99]]))


def test_a_sequence_that_was_released_is_forgotten_on_both_sides(
    world: World, law: Any, num_new_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = world.replica()
    held: list[set[int]] = []
    answer = replica._answer

    def seen(lm: Any, texts: dict[int, list[int]], *asked: Any) -> Any:
        found = answer(lm, texts, *asked)
        held.append(set(texts))
        return found

    monkeypatch.setattr(replica, "_answer", seen)
    lm, _ = world.lm(replica)
    lm.begin(contexts())()
    lm.release([0, 2, 7])
    torch.testing.assert_close(lm.begin([context(0, [50, 51])])(), law([[50, 51]]))
    assert held == [{0, 1, 2}, {0, 1}]
    assert num_new_ids[:2] == [9, 2]


def test_calls_of_two_variants_are_in_flight_together(world: World, law: Any) -> None:
    lm, visits = world.lm(world.replica())
    lm.begin([context(0, [40])])()
    first, second = (lm.begin([context(key, ids)]) for key, ids in enumerate(PROMPTS[:2]))
    torch.testing.assert_close(second(), law([PROMPTS[1]]))
    torch.testing.assert_close(first(), law([PROMPTS[0]]))
    assert visits.num_visits == 1


def test_a_call_that_nobody_waited_for_does_not_confuse_the_next(world: World, law: Any) -> None:
    lm, _ = world.lm(world.replica())
    lm.begin([context(0, [40])])()
    lm.begin([context(0, [40, 41])])
    torch.testing.assert_close(lm.begin([context(1, [50, 51])])(), law([[50, 51]]))


def test_a_call_whose_replica_died_goes_to_another_one(
    world: World, law: Any, num_new_ids: list[int]
) -> None:
    lm, visits = world.lm(Broken(ActorDiedError()), world.replica())
    rows = contexts()
    torch.testing.assert_close(lm.begin(rows)(), law(PROMPTS))
    lm.begin(rows)()
    assert num_new_ids[::2] == [9, 0]  # and stays there
    assert visits.num_visits == 2


def test_a_replica_that_dies_in_the_middle_is_replaced_with_all_it_knew(
    world: World, law: Any, num_new_ids: list[int]
) -> None:
    first, second = world.replica(), world.replica()
    lm, visits = world.lm(first, second)
    rows = contexts()
    lm.begin(rows)()
    for visit in list(first._desk.visits):
        visit.close()
    for row in rows:
        row.token_ids.append(70)
    torch.testing.assert_close(lm.begin(rows)(), law([[*ids, 70] for ids in PROMPTS]))
    assert visits.num_visits == 2
    assert 12 in num_new_ids[1:3]


def test_a_late_replica_is_not_waited_for(
    world: World, law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = slow(world.replica(), 5, monkeypatch)
    lm, visits = world.lm(late, world.replica(), hedge_s=0.1)
    torch.testing.assert_close(lm.begin(contexts())(), law(PROMPTS))
    assert visits.num_visits == 2


def test_an_answer_that_came_while_the_base_computed_is_not_late(world: World, law: Any) -> None:
    lm, visits = world.lm(world.replica(), timeout_s=0.2, hedge_s=0.1)
    lm.begin(contexts())()
    wait = lm.begin(contexts())
    time.sleep(0.4)
    torch.testing.assert_close(wait(), law(PROMPTS))
    assert visits.num_visits == 1


def test_a_guide_that_does_not_answer_is_left_alone_for_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = slow(world.replica(), 5, monkeypatch)
    lm, visits = world.lm(late, timeout_s=0.2, hedge_s=0.1, cooldown_s=0.5)
    with pytest.raises(GuideUnavailableError, match=r"no answer in 0\.2 s"):
        lm.begin(contexts())()
    num_visits = visits.num_visits
    with pytest.raises(GuideUnavailableError, match="a moment ago"):
        lm.begin(contexts())
    assert visits.num_visits == num_visits
    time.sleep(0.5)
    with pytest.raises(GuideUnavailableError, match=r"no answer in 0\.2 s"):
        lm.begin(contexts())()
    assert visits.num_visits > num_visits


def test_a_version_that_cannot_be_loaded_is_not_tried_elsewhere(world: World) -> None:
    lm, visits = world.lm(Broken(CheckpointError("no weights")), world.replica())
    with pytest.raises(GuideUnavailableError, match="no weights"):
        lm.begin(contexts())()
    assert visits.num_visits == 1


def test_an_error_of_the_guide_itself_is_not_tried_elsewhere(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = world.replica()

    def fail(*_: Any) -> None:
        raise PromptError("too long")

    monkeypatch.setattr(replica, "_answer", fail)
    lm, visits = world.lm(replica, world.replica())
    with pytest.raises(GuideUnavailableError, match="too long"):
        lm.begin(contexts())()
    assert visits.num_visits == 1


def test_half_precision_is_close(world: World, law: Any) -> None:
    lm, _ = world.lm(world.replica(precision="half"), precision="half")
    found_RV = lm.begin(contexts())()
    assert found_RV.dtype == torch.float32
    torch.testing.assert_close(found_RV, law(PROMPTS), rtol=1e-3, atol=1e-3)


def test_a_replica_that_hung_up_while_nothing_was_asked_is_found_again(
    world: World, law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.replicas.guide_desk._IDLE_S", 0.05)
    replica = world.replica()
    lm, visits = world.lm(replica)
    lm.begin(contexts())()
    wait_until(lambda: not replica._desk.visits)
    torch.testing.assert_close(lm.begin(contexts())(), law(PROMPTS))
    assert visits.num_visits == 2


def test_after_a_while_the_least_busy_replica_is_asked_for_again(
    world: World, law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.replicas.remote_guide._STAY_S", 0.0)
    lm, visits = world.lm(world.replica(), world.replica())
    for _ in range(2):
        torch.testing.assert_close(lm.begin(contexts())(), law(PROMPTS))
    assert visits.num_visits == 2


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n", pack(["guessed", 1])])
def test_nobody_is_let_in_without_a_ticket(world: World, law: Any, hello: bytes) -> None:
    replica = world.replica()
    with socket.create_connection(replica._desk.address, 5) as stranger:
        stranger.sendall(hello)
        with suppress(OSError):  # it may have been cut off by now
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    lm, _ = world.lm(replica)
    torch.testing.assert_close(lm.begin(contexts())(), law(PROMPTS))


def test_a_ticket_lets_in_one_caller(world: World) -> None:
    replica = world.replica()
    config = world.config()
    version = make_catalog(config, created=0).guides[0].current
    address = LocalVisits(replica)(version, "ticket").result(5)
    lines = [Line(address, "ticket", caller=at, timeout_s=5) for at in range(2)]
    wait_until(lambda: bool(readable(lines, 0)))
    [refused] = readable(lines, 0)
    with pytest.raises(OSError, match="closed"):
        refused.feed()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.005)
