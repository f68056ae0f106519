"""Of what learned from reward, the actor is exported; its critic has done its work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from jobs.checkpoint import Position
from jobs.config import JobConfig
from jobs.export import export
from jobs.policies import ProxyLearning, new_learning
from jobs.run_folder import RunInfo, write_run_info
from pilotfish import config as configs
from pilotfish import world
from pilotfish.errors import CheckpointError
from pilotfish.guides.card import read_card
from pilotfish.models.heads import ACCEPT_HEAD_NAME
from pilotfish.train.export import save_model
from pilotfish.train.sac import SACConfig, SACLearner
from tests.fakes import tiny_config

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "kitchen"
STEP = 7


def save_base(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    tokenizer = world.build_tokenizer()
    # A proxy may have 1% of its parameters.
    config = tiny_config(len(tokenizer), num_hidden_layers=1, intermediate_size=2000)
    model = LlamaForCausalLM(config)
    save_model(folder, model, tokenizer, state=model.state_dict())
    return model


def checkpoint_of(
    root: Path, config: JobConfig, saved: dict[str, Any], name: str, *, report: dict[str, float]
) -> Path:
    """Write a checkpoint, and the folder of its run around it."""
    run_folder = root / "train" / "run"
    folder = run_folder / "checkpoint"
    tag = folder / f"step_{STEP}"
    tag.mkdir(parents=True)
    torch.save(saved, tag / name)
    torch.save(
        Position(STEP, [{"step": float(STEP)} | report], num_workers=1), folder / "position.pt"
    )
    write_run_info(run_folder, RunInfo(config_hash="abc"), config)
    world.build_tokenizer().save_pretrained(run_folder / "tokenizer")
    return folder


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].equal(tensor), name


def test_a_proxy_comes_out_as_its_guide(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = [f"root={tmp_path}", f"base.path={tmp_path / 'base'}"]
    config = configs.load(JobConfig, CONFIGS / "proxy.yaml", settings)
    learning = new_learning(config, base, world.build_tokenizer())
    saved = {"module": learning.module.state_dict()}
    checkpoint = checkpoint_of(tmp_path, config, saved, "mp_rank_00_model_states.pt", report={})
    export(checkpoint, tmp_path / "out")
    assert isinstance(learning, ProxyLearning)
    assert_same(load_file(tmp_path / "out" / ACCEPT_HEAD_NAME), learning.module.actor.state_dict())
    card = read_card(tmp_path / "out")
    assert (card.kind, card.base) == ("proxy", str(tmp_path / "base"))
    assert card.settings["top_k"] == 6
    assert card.training["config_hash"] == f"abc-step-{STEP}"


def test_a_proxy_that_learned_by_sac_comes_out_without_its_replay(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = [f"root={tmp_path}", f"base.path={tmp_path / 'base'}"]
    config = configs.load(JobConfig, CONFIGS / "proxy_mara.yaml", settings)
    learning = new_learning(config, base, world.build_tokenizer())
    assert isinstance(learning, ProxyLearning)
    algorithm = SACConfig(replay_size=10, learning_starts=5, batch_size=5)
    learner = SACLearner(
        learning.module.actor, learning.settings, algorithm, learning_rate=1, seed=0
    )
    checkpoint = checkpoint_of(tmp_path, config, learner.state_dict(), "sac.pt", report={})
    export(checkpoint, tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / ACCEPT_HEAD_NAME), learner.actor.state_dict())


def test_a_whole_policy_comes_out_as_a_model(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = [f"root={tmp_path}", f"model.init={tmp_path / 'base'}", "objective.critic=null"]
    config = configs.load(JobConfig, CONFIGS / "ppo.yaml", settings)
    module = new_learning(config, base, world.build_tokenizer()).module
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    saved = {"module": module.state_dict()}
    checkpoint = checkpoint_of(tmp_path, config, saved, "mp_rank_00_model_states.pt", report={})
    export(checkpoint, tmp_path / "out")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    actor = {name[6:]: one for name, one in saved["module"].items() if name.startswith("actor.")}
    assert_same(got, actor)


def test_a_card_that_needs_an_evaluation_says_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = [f"root={tmp_path}", f"model.init={tmp_path / 'base'}"]
    config = configs.load(JobConfig, CONFIGS / "reward_model.yaml", settings)
    state = {f"model.{name}": one for name, one in base.model.state_dict(prefix="model.").items()}
    saved = {"module": state}
    name = "mp_rank_00_model_states.pt"
    early = checkpoint_of(tmp_path / "early", config, saved, name, report={"train/loss": 1.0})
    with pytest.raises(CheckpointError, match=r"'eval/reward'.*train\.eval_every"):
        export(early, tmp_path / "out")
    measured = {"eval/reward": 2.0, "eval/squared_reward": 8.0}
    late = checkpoint_of(tmp_path / "late", config, saved, name, report=measured)
    export(late, tmp_path / "out")
    assert read_card(tmp_path / "out").settings["scale"] == 2.0
