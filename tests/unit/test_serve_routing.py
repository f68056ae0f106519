"""`serve.routing`: a replica whose stream failed is left to itself."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

from serve import suspicions
from serve.routing import AvoidingRouter
from serve.suspicions import suspect


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> AvoidingRouter:
    """A router whose two choices are the first two candidates."""

    async def first_two(_: Any, candidates: list[Any], __: Any = None) -> list[list[Any]]:
        return [candidates[:2]]

    monkeypatch.setattr(PowerOfTwoChoicesRequestRouter, "choose_replicas", first_two)
    monkeypatch.setattr(suspicions, "_routed", type(suspicions._routed)())
    monkeypatch.setattr(suspicions, "_failed_at", {})
    return AvoidingRouter.__new__(AvoidingRouter)


def chosen(router: AvoidingRouter, *names: str) -> list[str]:
    ranks = asyncio.run(router.choose_replicas([replica(name) for name in names]))
    return [one.replica_id.unique_id for rank in ranks for one in rank]


def send(router: AvoidingRouter, attempt: str, name: str) -> None:
    pending: Any = SimpleNamespace(args=[{"attempt": attempt}])
    result: Any = None
    router.on_request_routed(pending, replica(name).replica_id, result)


def test_all_are_chosen_while_nobody_is_suspected(router: AvoidingRouter) -> None:
    send(router, "r#0", "a")
    assert chosen(router, "a", "b", "c") == ["a", "b"]


def test_a_replica_that_failed_is_avoided_while_there_are_others(router: AvoidingRouter) -> None:
    send(router, "r#0", "a")
    send(router, "other#0", "b")
    suspect("r#0")
    assert chosen(router, "a", "b", "c") == ["b"]
    suspect("other#0")
    assert chosen(router, "a", "b", "c") == ["c"]
    assert chosen(router, "a", "b") == ["a", "b"]


def test_trust_comes_back(router: AvoidingRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    send(router, "r#0", "a")
    suspect("r#0")
    monkeypatch.setattr(suspicions, "_AVOID_S", 0.0)
    assert chosen(router, "a", "b") == ["a", "b"]


def test_an_attempt_that_went_nowhere_puts_nobody_under_suspicion(router: AvoidingRouter) -> None:
    suspect("r#0")
    assert chosen(router, "a", "b") == ["a", "b"]
