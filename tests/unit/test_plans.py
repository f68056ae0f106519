"""Jobs of 70B, as they ship: resolved and planned on shapes alone."""

import logging
from pathlib import Path

import pytest

from jobs.config import JobConfig
from jobs.dry_run import memory_plan
from jobs.resolve import resolved
from jobs.train import main
from pilotfish import config as configs
from pilotfish.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "jobs" / "configs" / "70b"
BESIDE_A_BASE = ("proxy", "genarm", "value", "dpo")
PAIRS = {"llama-2-70b": "llama-2-7b", "llama-3-70b": "llama-3-8b"}


def job(name: str, base: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> JobConfig:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("BASE_MODEL", str(FOLDER / "shapes" / base))
    monkeypatch.setenv("GUIDE_MODEL", str(FOLDER / "shapes" / PAIRS[base]))
    return resolved(configs.load(JobConfig, FOLDER / f"{name}.yaml", overrides))


@pytest.mark.parametrize("base", PAIRS)
@pytest.mark.parametrize(("name", "nodes"), [*((one, None) for one in BESIDE_A_BASE), ("proxy", 2)])
def test_a_job_beside_a_base_of_70b_fits_its_gpus(
    name: str, nodes: int | None, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = () if nodes is None else (f"scaling.num_workers={8 * nodes}",)
    config = job(name, base, monkeypatch, *more)
    plan = memory_plan(config, gpu_memory_gib=80)
    assert plan is not None
    assert plan.verdict.startswith("Fits"), plan.table()


@pytest.mark.parametrize("name", ["reward_model", "aligner"])
def test_a_guide_that_needs_no_base_plans_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_plan(job(name, "llama-2-70b", monkeypatch), gpu_memory_gib=80) is None


def test_a_proxy_for_70b_has_less_than_a_thousandth_of_its_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = job("proxy", "llama-2-70b", monkeypatch)
    plan = memory_plan(config, gpu_memory_gib=80)
    assert plan is not None
    assert plan.gpu["guide weights"] < plan.gpu["base weights"] * 8 / 1000


def test_a_worker_group_that_no_tensor_group_fits_is_refused_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BASE_MODEL", str(FOLDER / "shapes" / "llama-2-70b"))
    monkeypatch.chdir(REPOSITORY)
    overrides = ["scaling.num_workers=6", "scaling.workers_per_node=6", "train.batch_size=66"]
    with caplog.at_level(logging.ERROR):
        assert main([str(FOLDER / "proxy.yaml"), "--dry-run", *overrides]) == 2
    assert "tensor_size" in caplog.text


def test_a_gpu_that_is_too_small_is_told_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = memory_plan(job("genarm", "llama-2-70b", monkeypatch), gpu_memory_gib=24)
    assert plan is not None
    assert "Does not fit" in plan.verdict


def test_a_base_that_actors_hold_whole_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.where is actors"):
        job("proxy", "llama-2-70b", monkeypatch, "rollout.where=actors")
