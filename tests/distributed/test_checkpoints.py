"""Runs go on where they were cut, with as many workers as before and with others; and what their
checkpoints hold becomes a folder at any time."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from jobs.config import JobConfig
from jobs.dataset import prepare
from jobs.export import export, main
from jobs.model import architecture
from jobs.resolve import config_hash, resolved
from jobs.run_folder import RunInfo, prepare_in, write_run_info
from pilotfish import world
from pilotfish.errors import CheckpointError
from pilotfish.train.export import read_record
from tests.distributed.runs import (
    CHANGED,
    CUT,
    CUT_FOLDER,
    END,
    END_FOLDER,
    SHAPE,
    run_changed,
    run_rest,
    run_whole,
    tiny_job,
)
from tests.distributed.world import run_world

PLAIN = {f"zero{stage}": (f"train.deepspeed={stage}",) for stage in (0, 1, 3)}
BFLOAT16 = {"bfloat16": ("train.deepspeed=1", "train.dtype=bfloat16")}
DROPOUT = {"dropout": ("train.deepspeed=1", "model.init.attention_dropout=0.2")}
ADAPTERS = {f"adapters{stage}": (f"train.deepspeed={stage}",) for stage in (0, 2, 3)}


@dataclass(frozen=True)
class Cut:
    """Runs of two processes and of one, and the losses behind their cuts."""

    configs: Mapping[str, JobConfig]
    two: Path
    two_whole: Mapping[str, list[float]]
    two_then_one: Mapping[str, list[float]]
    two_then_two: Mapping[str, list[float]]
    one_whole: Mapping[str, list[float]]
    one_then_two: Mapping[str, list[float]]
    one_then_changed: Mapping[str, tuple[dict[str, Any], list[float]]]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    root = tmp_path_factory.mktemp("cut")
    adapters = (f"model.init={save_base(root / 'base')}", "model.lora.rank=1")
    configs = {
        **{name: tiny_job(root, *kind) for name, kind in (PLAIN | BFLOAT16 | DROPOUT).items()},
        **{name: tiny_job(root, *kind, *adapters) for name, kind in ADAPTERS.items()},
    }
    prepared, _ = prepare(configs["zero0"])
    one, two = root / "one", root / "two"
    plain = {name: configs[name] for name in PLAIN}
    changed = {name: tiny_job(root, *kind, *CHANGED) for name, kind in PLAIN.items()}
    two_whole = run_world(2, run_whole, configs, two, prepared)[0]
    alone = run_world(1, by_one, configs, plain, changed, one, two, prepared)[0]
    together = run_world(2, both_rests, plain, {"dropout": configs["dropout"]}, one, two, prepared)
    of_one, of_two = together[0]
    return Cut(configs, two, two_whole, alone[1], of_two, alone[0], of_one, alone[2])


def by_one(rest: Any, whole: Any, changed: Any, one: Path, two: Path, prepared: Any) -> Any:
    return (
        run_whole(whole, one, prepared),
        run_rest(rest, two, prepared),
        run_changed(changed, one, prepared),
    )


def both_rests(of_one: Any, of_two: Any, one: Path, two: Path, prepared: Any) -> Any:
    return run_rest(of_one, one, prepared), run_rest(of_two, two, prepared)


def save_base(folder: Path) -> Path:
    tokenizer = world.build_tokenizer()
    torch.manual_seed(3)
    shape = architecture({"model_type": "llama", **SHAPE}, tokenizer)
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*PLAIN, *ADAPTERS])
def test_one_worker_goes_on_where_two_were_cut(cut: Cut, name: str) -> None:
    assert cut.two_then_one[name] == pytest.approx(cut.two_whole[name], abs=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_two_workers_go_on_where_one_was_cut(cut: Cut, name: str) -> None:
    assert cut.one_then_two[name] == pytest.approx(cut.one_whole[name], abs=1e-5)


def test_half_precision_goes_on_from_its_whole_weights(cut: Cut) -> None:
    # Sums over other workers round differently, and bfloat16 has 8 bits.
    assert cut.two_then_one["bfloat16"] == pytest.approx(cut.two_whole["bfloat16"], abs=1e-4)


def test_dropout_goes_on_with_the_numbers_it_would_have_drawn(cut: Cut) -> None:
    assert cut.two_then_two["dropout"] == cut.two_whole["dropout"]


def test_dropout_at_another_number_of_workers_draws_other_numbers(cut: Cut) -> None:
    assert cut.two_then_one["dropout"] != cut.two_whole["dropout"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_run_goes_on_from_anothers_weights_with_its_own_optimizer_settings(
    cut: Cut, name: str
) -> None:
    settings, losses = cut.one_then_changed[name]
    # Two of six steps warm up linearly; the third, which is the next, is a quarter down the cosine
    # to a twentieth.
    rate = 1e-3 * (0.05 + 0.95 * (1 + math.cos(math.pi / 4)) / 2)
    assert settings["lr"] == pytest.approx(rate, rel=1e-6)
    assert tuple(settings["betas"]) == (0.7, 0.8)
    assert settings["weight_decay"] == 0.3
    assert losses[0] == cut.one_whole[name][0]
    assert losses[1] != cut.one_whole[name][1]


@pytest.mark.parametrize("name", ADAPTERS)
def test_checkpoints_hold_nothing_of_what_is_frozen(cut: Cut, name: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(str(cut.configs[name].started.init))
    frozen = {
        value
        for weight in base.state_dict().values()
        for value in weight[-1:].flatten()[:3].tolist()
    }
    frozen -= {1.0}  # of norms
    parts = list(trained_parts(cut.two / name / CUT_FOLDER))
    assert sum(part.numel() for part in parts) > 0
    for part in parts:
        assert not frozen & set(part.flatten().tolist())


def trained_parts(folder: Path) -> Iterator[torch.Tensor]:
    """Yield the weights in all files of a checkpoint, but not random states."""
    for path in folder.glob("*/*.pt"):
        yield from tensors(torch.load(path, weights_only=False))


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree.float()
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors(value)


def as_run(cut: Cut, name: str) -> Path:
    """Make a run's folder what Ray Train would have left there."""
    folder, config = cut.two / name, resolved(cut.configs[name])
    prepare_in(folder, config)
    write_run_info(folder, RunInfo(config_hash=config_hash(config)), config)
    return folder


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero3", "bfloat16", *ADAPTERS])
def test_an_exported_checkpoint_is_the_model_that_the_workers_wrote(
    cut: Cut, name: str, tmp_path: Path
) -> None:
    checkpoint = as_run(cut, name) / END_FOLDER
    assert main([str(checkpoint), str(tmp_path / "out")]) == 0
    want = AutoModelForCausalLM.from_pretrained(checkpoint / "model").state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert tensor.numel() > 0
        assert got[key].equal(tensor), key
    vocab = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert vocab == world.build_tokenizer().get_vocab()


def test_an_unfinished_export_is_not_taken_for_the_finished_run(cut: Cut, tmp_path: Path) -> None:
    checkpoint = as_run(cut, "zero1") / CUT_FOLDER
    export(checkpoint, tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record["metrics"]["train/loss"] > cut.two_whole["zero1"][-1]
    assert record["config_hash"] == f"{config_hash(resolved(cut.configs['zero1']))}-step-{CUT}"
    assert record["config"]["train"]["steps"] == END


def test_a_checkpoint_without_some_part_is_refused(cut: Cut, tmp_path: Path) -> None:
    checkpoint = as_run(cut, "zero3") / CUT_FOLDER
    [lost] = checkpoint.glob("*/*zero_pp_rank_1_*optim_states.pt")
    kept = lost.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="not complete"):
        export(checkpoint, tmp_path / "out")
    kept.rename(lost)
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
