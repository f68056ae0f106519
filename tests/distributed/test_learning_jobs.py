"""Jobs learn the same in one process and in two, beside a whole base and beside a sharded one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.config import JobConfig
from tests.distributed.learning_jobs import (
    NUM_PROMPTS,
    NUM_SAMPLES,
    STEPS,
    interleaved,
    learn_all,
    save_models,
    tiny_job,
)
from tests.distributed.world import run_world

TENSOR = {"base__sharding": "tensor", "base__tensor_size": 2}
ZERO3 = {"base__sharding": "zero3"}
# A completion per minibatch, so that one worker has none; and in some there is no choice.
ALONE: dict[str, Any] = {
    "objective__algorithm__num_minibatches": NUM_PROMPTS * NUM_SAMPLES,
    "objective__settings__p_t": 0.36,
}
NO_CHOICE: dict[str, Any] = {"objective__settings__p_t": 0.01}
# The first minibatch moves the policy, the second one finds it moved.
STOP: dict[str, Any] = {"objective__algorithm__target_kl": 1e-7}

# By the name of what they must equal in one process.
IN_TWO: dict[str, dict[str, dict[str, Any]]] = {
    "proxy": {
        "whole": {},
        "passes": {"train__micro_batch_size": 2},
        "passes, ZeRO-2": {"train__micro_batch_size": 3, "train__deepspeed": 2},
        "tensor": TENSOR,
        "tensor, passes, ZeRO-1": {
            **TENSOR,
            "train__micro_batch_size": 2,
            "train__deepspeed": 1,
        },
        "zero3": ZERO3,
    },
    "alone": {"whole": {}, "passes": {"train__micro_batch_size": 1}},
    "stop": {"whole": {}},
    "ppo": {
        "whole": {},
        "zero3, passes, ZeRO-3": {**ZERO3, "train__micro_batch_size": 5, "train__deepspeed": 3},
        "tensor": TENSOR,
    },
    "genarm": {"whole": {}, "tensor": TENSOR, "zero3": ZERO3},
    "dpo": {"whole": {}, "tensor": TENSOR, "zero3": ZERO3},
}
CASES = [(name, other) for name, others in IN_TWO.items() for other in others]

Found = dict[str, Any]


def job(folder: Path, name: str, changes: dict[str, Any]) -> JobConfig:
    special = {"alone": ALONE, "stop": STOP, "ppo": {"train__learning_rate": 2e-3}}.get(name, {})
    kind = "proxy" if name in ("alone", "stop") else name
    return tiny_job(folder, kind, **special, **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def one(models: Path) -> dict[str, Found]:
    jobs = {name: job(models, name, {}) for name in IN_TWO}
    jobs["no choice"] = job(models, "proxy", NO_CHOICE)
    jobs["proxy in passes"] = job(models, "proxy", {"train__micro_batch_size": 5})
    [found] = run_world(1, learn_all, jobs)
    return found


@pytest.fixture(scope="module")
def two(models: Path) -> list[dict[str, Found]]:
    jobs = {f"{name}: {other}": job(models, name, IN_TWO[name][other]) for name, other in CASES}
    jobs["no choice"] = job(models, "proxy", NO_CHOICE)
    return run_world(2, learn_all, jobs)


@pytest.fixture(params=CASES, ids=": ".join)
def pair(request: pytest.FixtureRequest, one: Any, two: Any) -> tuple[Found, list[Found]]:
    name, other = request.param
    return one[name], [found[f"{name}: {other}"] for found in two]


def assert_same_course(found: Found, wanted: Found) -> None:
    """Curves, weights and measures are the same up to rounding."""
    # Adam's first updates are as large for a tiny gradient as for a large one.
    close = 1e-5 if len(wanted["weights"]) < 20 else 1e-4
    for found_step, wanted_step in zip(found["curves"], wanted["curves"], strict=True):
        assert found_step == pytest.approx(wanted_step, rel=1e-4, abs=close)
    assert found["report"] == pytest.approx(wanted["report"], rel=1e-4, abs=close)
    assert found["num_updates"] == wanted["num_updates"]
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=close)


def test_two_processes_learn_what_one_learns(pair: tuple[Found, list[Found]]) -> None:
    """Whatever the sharding of the base, the passes, and the stage of the learner."""
    wanted, ranks = pair
    for found in ranks:
        assert_same_course(found, wanted)


def test_all_draw_the_tokens_of_one_process_and_tensor_peers_the_same_ones(
    pair: tuple[Found, list[Found]],
) -> None:
    wanted, ranks = pair
    by_share = {found["share"][0]: found["drawn"] for found in ranks}
    assert all(found["drawn"] == by_share[found["share"][0]] for found in ranks)
    for step, drawn in enumerate(wanted["drawn"]):
        shares = [one[step] for _, one in sorted(by_share.items())]
        assert interleaved(shares, size=NUM_SAMPLES) == drawn


def test_the_base_never_changes(pair: tuple[Found, list[Found]]) -> None:
    wanted, ranks = pair
    assert all(found["base is unchanged"] for found in [wanted, *ranks])


def test_the_size_of_a_pass_changes_nothing(one: dict[str, Found]) -> None:
    assert_same_course(one["proxy in passes"], one["proxy"])


def test_what_is_learned_from_differs(one: dict[str, Found]) -> None:
    """Else the tests above could not fail."""
    for name in ("proxy", "ppo"):
        assert len({str(drawn) for drawn in one[name]["drawn"]}) == STEPS
    for name in IN_TWO:
        losses = [step["loss"] for step in one[name]["curves"]]
        assert max(losses) - min(losses) > 1e-3
    decided = [len(positions) for drawn in one["alone"]["drawn"] for _, positions in drawn]
    assert 0 in decided
    assert max(decided) > 1


def test_all_workers_stop_at_the_same_minibatch(one: Any, two: Any) -> None:
    """Two minibatches of each rollout, of the six that there are."""
    warm_up = 2  # DeepSpeed's first updates are of no size
    for found in (one["stop"], *(ranks["stop: whole"] for ranks in two)):
        assert found["num_updates"] == 2 * STEPS + warm_up
    assert one["proxy"]["num_updates"] == 6 * STEPS


def test_where_nobody_had_a_choice_all_workers_say_so(one: Any, two: Any) -> None:
    for found in (one, *two):
        assert "Widen the candidates" in found["no choice"]["error"]


def test_a_guide_is_measured_beside_the_base_it_steers(one: dict[str, Found]) -> None:
    report = one["genarm"]["report"]
    assert report["eval/guided_length"] != report["eval/base_length"]
    assert one["proxy"]["report"]["untrained/reward"] != one["proxy"]["report"]["base/reward"]
    assert one["proxy"]["report"]["trainable_share"] <= 0.01
    assert one["dpo"]["curves"][0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
