"""`serve.replicas.remote_guide`: whatever guide replicas do, the law is theirs or there is none."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from pilotfish.context import Context
from pilotfish.errors import PromptError
from serve.catalog import Catalog, make_catalog
from serve.config import ServeConfig, parse_args
from serve.errors import GuideUnavailableError
from serve.replicas.guide_model import GuideModel
from serve.replicas.remote_guide import RemoteLM
from tests.fakes import context
from tests.folders import save_base, save_guide

PROMPTS = [[40, 41, 42, 43], [50, 51], [60, 61, 62]]


class World:
    """Folders of a base and a guide, and replicas of the guide."""

    def __init__(self, folder: Path) -> None:
        self._base, self._guide = save_base(folder / "base"), save_guide(folder / "guide")

    def config(self, **guide: Any) -> ServeConfig:
        settings = {"name": "far", "path": str(self._guide), "placement": "remote"}
        settings |= {"precision": "full", "timeout_s": 2, **guide}
        return parse_args({"base": {"path": str(self._base)}, "guides": [settings]})

    def replica(self, num_slots: int = 4, **guide: Any) -> GuideModel:
        config = self.config(**guide)
        catalog = make_catalog(config, created=0)
        return GuideModel(config.guide("far"), catalog, num_slots=num_slots)

    def lm(self, *replicas: Any, **guide: Any) -> tuple[RemoteLM, "Routed"]:
        config, handle = self.config(**guide), Routed(*replicas)
        catalog: Catalog = make_catalog(config, created=0)
        lm = RemoteLM(
            handle,
            config.guide("far"),
            catalog.guides[0].current,
            vocab_size=catalog.base.vocab_size,
            device=torch.device("cpu"),
        )
        return lm, handle


class Routed:
    """A handle that sends each new session to the next replica, as a router would."""

    def __init__(self, *replicas: Any) -> None:
        self._replicas = replicas
        self.sessions: list[str] = []
        self.num_new_ids: list[int] = []
        """Ids sent by each call."""

    def options(self, *, session_id: str, **_: Any) -> "Routed":
        if session_id not in self.sessions:
            self.sessions.append(session_id)
        self._session = session_id
        return self

    @property
    def logprobs(self) -> "Routed":
        return self

    def remote(self, version: Any, readings: list[Any]) -> Any:
        self.num_new_ids.append(sum(len(one.new_ids) for one in readings))
        place = self.sessions.index(self._session)
        replica = self._replicas[min(place, len(self._replicas) - 1)]
        return replica.logprobs(version, readings)


class Broken:
    """A replica that fails for as long as it is told to."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def logprobs(self, *_: Any) -> Any:
        raise self._error


class Slow:
    """A replica that answers late."""

    def __init__(self, replica: GuideModel, seconds: float) -> None:
        self._replica, self._seconds = replica, seconds

    async def logprobs(self, *asked: Any) -> Any:
        await asyncio.sleep(self._seconds)
        return await self._replica.logprobs(*asked)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def law(world: World) -> Callable[[list[list[int]]], torch.Tensor]:
    """The guide's law behind some ids, from a replica that has seen nothing else."""

    def ask(texts: list[list[int]]) -> torch.Tensor:
        lm, _ = world.lm(world.replica())
        return lm.begin([context(key, ids) for key, ids in enumerate(texts)])()

    return ask


def contexts() -> list[Context]:
    return [context(key, list(ids)) for key, ids in enumerate(PROMPTS)]


def test_a_step_sends_what_is_new_and_nothing_else(world: World, law: Any) -> None:
    lm, handle = world.lm(world.replica())
    rows = contexts()
    for token in (70, 71, 72):
        lm.begin(rows)()
        for row in rows:
            row.token_ids.append(token)
    found_RV = lm.begin(rows)()
    assert handle.num_new_ids == [9, 3, 3, 3]
    torch.testing.assert_close(found_RV, law([[*ids, 70, 71, 72] for ids in PROMPTS]))


def test_rows_of_one_sequence_at_several_lengths_keep_their_order(world: World, law: Any) -> None:
    lm, _ = world.lm(world.replica())
    ids = PROMPTS[0]
    rows = [context(0, ids[:2]), context(1, PROMPTS[1]), context(0, ids), context(0, ids[:3])]
    want_RV = torch.cat([law([row.token_ids]) for row in rows])
    torch.testing.assert_close(lm.begin(rows)(), want_RV)


def test_tokens_that_were_taken_back_are_replaced(world: World, law: Any) -> None:
    lm, handle = world.lm(world.replica())
    lm.begin([context(0, [40, 41, 42, 43, 44])])()
    found_RV = lm.begin([context(0, [40, 41, 99])])()
    assert handle.num_new_ids == [5, 1]
    torch.testing.assert_close(found_RV, law([[40, 41, 99]]))


def test_a_replica_that_forgot_a_sequence_gets_all_of_it_again(world: World, law: Any) -> None:
    lm, handle = world.lm(world.replica(num_slots=1))  # remembers four sequences
    rows = contexts()
    lm.begin(rows)()
    lm.begin([context(key, [30 + key]) for key in range(10, 14)])()
    for row in rows:
        row.token_ids.append(70)
    torch.testing.assert_close(lm.begin(rows)(), law([[*ids, 70] for ids in PROMPTS]))
    assert handle.num_new_ids == [9, 4, 3, 12]


def test_a_call_whose_replica_died_goes_to_another_one(world: World, law: Any) -> None:
    lm, handle = world.lm(Broken(ActorDiedError()), world.replica())
    rows = contexts()
    torch.testing.assert_close(lm.begin(rows)(), law(PROMPTS))
    lm.begin(rows)()
    assert handle.num_new_ids == [9, 9, 0]  # and stays there


def test_a_late_replica_is_not_waited_for(world: World, law: Any) -> None:
    slow, quick = Slow(world.replica(), 30), world.replica()
    lm, handle = world.lm(slow, quick, hedge_s=0.1)
    torch.testing.assert_close(lm.begin(contexts())(), law(PROMPTS))
    assert len(handle.sessions) == 2


def test_a_guide_that_does_not_answer_is_left_alone_for_a_while(world: World) -> None:
    lm, handle = world.lm(Slow(world.replica(), 30), timeout_s=0.2, hedge_s=0.1, cooldown_s=0.5)
    with pytest.raises(GuideUnavailableError, match=r"no answer in 0\.2 s"):
        lm.begin(contexts())()
    num_calls = len(handle.num_new_ids)
    with pytest.raises(GuideUnavailableError, match="a moment ago"):
        lm.begin(contexts())
    assert len(handle.num_new_ids) == num_calls
    time.sleep(0.5)
    with pytest.raises(GuideUnavailableError, match=r"no answer in 0\.2 s"):
        lm.begin(contexts())()
    assert len(handle.num_new_ids) > num_calls


def test_an_error_of_the_guide_itself_is_not_tried_elsewhere(world: World) -> None:
    lm, handle = world.lm(Broken(PromptError("too long")))
    with pytest.raises(GuideUnavailableError, match="too long"):
        lm.begin(contexts())()
    assert len(handle.num_new_ids) == 1


def test_half_precision_is_close(world: World, law: Any) -> None:
    lm, _ = world.lm(world.replica(precision="half"), precision="half")
    found_RV = lm.begin(contexts())()
    assert found_RV.dtype == torch.float32
    torch.testing.assert_close(found_RV, law(PROMPTS), rtol=1e-3, atol=1e-3)
