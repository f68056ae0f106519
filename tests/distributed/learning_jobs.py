"""Small jobs that learn beside a frozen base, and what each process of a group does with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor
from transformers import GenerationConfig

from jobs import reward_training, supervised
from jobs.checkpoint import gathered_state
from jobs.config import JobConfig
from jobs.dataset import prepare
from jobs.frozen_base import FrozenBase, load_frozen_base
from jobs.reward_training import RewardTraining
from jobs.rollouts import Rollout
from jobs.steps import NUM_TOKENS, reduced
from jobs.supervised import SupervisedTraining
from pilotfish import config as configs
from pilotfish import world
from pilotfish.errors import ConfigError
from pilotfish.train.metrics import Tally
from tests.folders import save_base, save_reward_model

NUM_PROMPTS, NUM_SAMPLES, STEPS = 4, 3, 4
HEAD = {"hidden": [1], "activation": "tanh"}  # the base is tiny, and a proxy is 1% of it
Drawn = tuple[list[int], list[int]]
"""A completion, and where in it there was a choice."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "proxy": {
        "kind": "proxy",
        "settings": {"top_k": 4, "p_t": 0.8, "temperature": 1.0, "head": HEAD},
        "learner": {"critic": HEAD},
        "algorithm": {"kind": "ppo", "epochs": 2, "num_minibatches": 3, "target_kl": None},
    },
    "ppo": {"kind": "ppo"},
    "genarm": {
        "kind": "genarm",
        "length_check": {"num_prompts": 5, "max_tokens": 40, "batch_size": 2},
    },
    "dpo": {"kind": "dpo"},
}


def save_models(folder: Path) -> None:
    """Save a base and a reward model that know the words of the kitchen."""
    tokenizer = world.build_tokenizer()
    save_base(folder / "base", tokenizer=tokenizer)
    generation = GenerationConfig.from_pretrained(folder / "base")
    generation.eos_token_id = list(range(12))  # a random base ends hardly ever with one of them
    generation.save_pretrained(folder / "base")
    save_reward_model(folder / "judge", tokenizer=tokenizer)


def tiny_job(folder: Path, kind: str, **changes: Any) -> JobConfig:
    """A job on the models of a folder; `changes` are settings by dotted name, dots as `__`."""
    tree: dict[str, Any] = {
        "root": str(folder),
        "output": str(folder / kind),
        "seed": 4,
        "objective": {**OBJECTIVES[kind]},
        "base": {"path": str(folder / "base")},
        "data": {"source": "kitchen", "num": 30, "num_heldout": 7},
        "train": {"steps": STEPS, "batch_size": NUM_PROMPTS, "learning_rate": 0.02},
        "tracking": {"enabled": False},
    }
    if kind != "proxy":
        tree["model"] = {"init": str(folder / "base")}
    if kind in ("proxy", "ppo"):
        tree["rollout"] = {
            "rewards": [{"judge": {"kind": "model", "path": str(folder / "judge")}}],
            "monitor": {"kind": "kitchen"},
            "samples_per_prompt": NUM_SAMPLES,
            "max_tokens": 8,
            "batch_size": 5,
            "num_heldout": 5,
        }
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = tree
        for parent in parents:
            node[parent] = node = {**node.get(parent, {})}
        node[last] = value
    return configs.parse(JobConfig, tree, source="a test")


def learn_all(jobs: Mapping[str, JobConfig]) -> dict[str, dict[str, Any]]:
    """Run each job from its beginning to its end; see `_learn`. An error is what was found, too."""
    found: dict[str, dict[str, Any]] = {}
    for name, config in jobs.items():
        try:
            found[name] = _learn(config)
        except ConfigError as error:
            found[name] = {"error": str(error)}
    return found


def _learn(config: JobConfig) -> dict[str, Any]:
    """Run a job in this process and its peers; return what this one saw."""
    bases: list[FrozenBase] = []

    def load(*args: Any, **kwargs: Any) -> FrozenBase:
        bases.append(load_frozen_base(*args, **kwargs))
        return bases[0]

    prepared, _ = prepare(config)
    drawn: list[list[Drawn]] = []
    with (
        patch.object(reward_training, "load_frozen_base", load),
        patch.object(supervised, "load_frozen_base", load),
    ):
        if config.learns_from_reward:
            trainee = reward_training.reward_training(config, prepared)
            _listen(trainee, drawn)
        else:
            trainee = SupervisedTraining(config, prepared)
    [base] = bases
    found: dict[str, Any] = {"share": (base.data_rank, base.data_size)}
    hash_before = base.parameter_hash()
    trainee.restore({})
    steps = [trainee.step(number) for number in range(STEPS)]
    found["curves"] = [_means(reduced(trainee.engine, tallies)) for tallies in steps]
    found["report"] = trainee.evaluate()
    found["num_updates"] = trainee.engine.global_steps
    found["weights"] = _weights(trainee)
    found["drawn"] = drawn
    found["base is unchanged"] = base.parameter_hash() == hash_before
    return found


def _listen(trainee: RewardTraining, drawn: list[list[Drawn]]) -> None:
    """Keep every completion that is learned from."""
    learn = trainee._updates.learn

    def listen(number: int, rollout: Rollout) -> Mapping[str, Tally]:
        drawn.append(
            [(one.completion_ids.tolist(), one.positions_N.tolist()) for one in rollout.episodes]
        )
        return learn(number, rollout)

    trainee._updates.learn = listen


def _means(tallies: Mapping[str, Tally]) -> dict[str, float]:
    """Return means of what depends neither on the clock, nor on the number of passes, nor on the
    last digit, as the accuracy of a policy does that has not moved."""
    left_out = ("rollout_seconds", "reward_seconds", "update_seconds", NUM_TOKENS, "accuracy")
    return {name: one.mean for name, one in tallies.items() if name not in left_out}


def _weights(trainee: Any) -> dict[str, Tensor]:
    return gathered_state(trainee.engine.module, keep=True)


def interleaved(shares: Sequence[Sequence[Any]], *, size: int) -> list[Any]:
    """Put shares of prompts together again: each has every so many-th prompt, of `size` rows."""
    prompts = [
        [list(share[at : at + size]) for at in range(0, len(share), size)] for share in shares
    ]
    return [row for together in zip(*prompts, strict=True) for prompt in together for row in prompt]
