"""The benchmark scripts run, on models small enough for a test, and report what they promise."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks import decode, drafting, methods, rollouts, train
from benchmarks.trainers import save_random_model
from pilotfish.world.tokenizer import build_tokenizer
from tests.folders import save_base, save_guide, save_reward_model


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep DeepSpeed, which transformers imports, from writing to stdout that it sees no GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 16}
    for module in (decode, methods):
        monkeypatch.setattr(module, "VOCAB", 300)
        monkeypatch.setattr(module, "BASE", tiny)
        monkeypatch.setattr(module, "GUIDE", tiny)


def test_the_decode_benchmark_reports_every_method_at_every_batch(
    small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    decode.main(["--json", "--batches", "1", "3", "--tokens", "8", "--rounds", "1"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = {row["method"] for row in rows}
    assert [row["batch"] for row in rows] == sorted([1, 3] * len(names))
    cost = {
        row["method"]: (row["base_forwards_per_token"], row["guide_forwards_per_token"])
        for row in rows
    }
    assert cost["base"] == (1, 0)
    assert cost["GenARM"] == (1, 1)
    assert cost["2 x GenARM"] == cost["proxy-tuning"] == (1, 2)
    assert cost["GenARM, gate closed"] == (1, 0)
    assert cost["ARGS, k=10"] == (1, 10)
    assert cost["proxy pre_token, k=4"] == (1, 0)
    assert {row["over_base"] for row in rows if row["method"] == "base"} == {1}


def test_the_chosen_candidate_of_a_proxy_is_computed_once(
    small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    decode.main(["--json", "--batches", "2", "--tokens", "8", "--rounds", "1"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    proxy = next(row for row in rows if row["method"] == "proxy post_token, k=4")
    # The first token's law takes a forward of its own; every other one is that of a candidate.
    assert proxy["base_forwards_per_token"] == pytest.approx(4 + 1 / decode.SHORT)


def test_ratios_need_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.main(["--methods", "GenARM"])
    assert "ratios are to it" in capsys.readouterr().err


def test_the_drafting_benchmark_reports_speed_and_acceptance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer()
    base = save_base(tmp_path / "base", tokenizer=tokenizer)
    guide = save_guide(tmp_path / "guide", tokenizer=tokenizer)
    drafting.main(f"--base {base} --guide {guide} --json --batches 2 --rounds 1 --lots 1".split())
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 1 <= row["acceptance_length"] <= 5
    assert row["speed_up"] > 0


def test_the_rollout_benchmark_compares_equal_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer()
    base = save_base(tmp_path / "base", tokenizer=tokenizer)
    rollout = save_base(tmp_path / "rollout", seed=1, tokenizer=tokenizer)
    rollouts.main(
        f"--base {base} --rollout {rollout} --prompts 2 --tokens 3 --candidates 3".split()
    )
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 6


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that takes no time, of a proxy whose random base leaves it a choice."""
    size = train.SIZES["kitchen"]
    spread = {**size.architecture, "initializer_range": 0.3, "tie_word_embeddings": False}
    save_random_model(replace(size, architecture=spread), tmp_path / "kitchen" / "base")
    save_reward_model(tmp_path / "kitchen" / "reward_model", tokenizer=build_tokenizer())
    job = yaml.safe_load(train.PROXY_JOB.read_text())
    job["rollout"] |= {"samples_per_prompt": 2, "max_tokens": 8}
    job["train"]["batch_size"] = 2
    (tmp_path / "proxy.yaml").write_text(yaml.safe_dump(job))
    monkeypatch.setattr(train, "PROXY_JOB", tmp_path / "proxy.yaml")
    monkeypatch.setattr(train, "SIZES", {"tiny": replace(size, pairs=2, steps=2)})


def test_the_training_benchmark_runs_both_objectives_and_splits_a_proxys_step(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With TRL where PILOTFISH_TRL_PYTHON names it."""
    train.main(f"--json --rounds 2 --proxy-steps 2 --root {tmp_path}".split())
    report = json.loads(capsys.readouterr().out)
    genarm, dpo = report["rows"]
    assert (genarm["objective"], dpo["objective"]) == ("genarm", "dpo")
    assert genarm["tokens_per_second"] > 0
    if os.environ.get("PILOTFISH_TRL_PYTHON"):
        assert dpo["trl"]["loss"] == pytest.approx(dpo["loss"], abs=1e-4)
        assert genarm["trl"]["loss"] == pytest.approx(dpo["loss"], abs=1e-4)
    proxy = report["proxy"]
    assert proxy["completions_per_step"] == 4
    parts = [proxy[f"{part}_share"] for part in ("rollout", "reward", "update")]
    assert 0.5 < sum(parts) <= 1
    assert min(parts) > 0


def test_the_training_benchmark_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PILOTFISH_TRL_PYTHON", raising=False)
    train.main(f"--json --sizes --root {tmp_path}".split())
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == []
    assert report["proxy"] is None
