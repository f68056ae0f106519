"""The loop of learning from reward: which weights roll out, and where a run goes on."""

import io
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.config import JobConfig, KitchenData, ModelConfig
from jobs.dataset import Prepared, prepare_rows
from jobs.reward_training import RewardTraining
from jobs.rollouts import Rollout, Share
from pilotfish import config as configs
from pilotfish.decode.sequence import FinishReason
from pilotfish.evaluation.rewards import Judgement
from pilotfish.train.experience import Episode
from pilotfish.train.metrics import Tally

STEPS = 5
Begun = tuple[int, int, bool, tuple[int, ...], tuple[str, ...]]
"""Iteration, version of the weights, guided, places and prompts."""


class Policy:
    """A policy that is nothing but the number of its updates."""

    def __init__(self) -> None:
        self.version = 0
        self.facts = {"trainable_share": 0.5}

    def weights(self) -> dict[str, Tensor]:
        return {"version": torch.tensor(self.version)}


class Versions:
    """Updates that count, and keep what they learned from."""

    def __init__(self, policy: Policy, log: list[str]) -> None:
        self.engine = SimpleNamespace(device=torch.device("cpu"))
        self._policy, self._log = policy, log

    def learn(self, number: int, rollout: Rollout) -> Mapping[str, Tally]:
        self._log.append(f"learn {number} from version {rollout.rewards[0]:.0f}")
        self._policy.version += 1
        return {"loss": Tally(1.0, 1.0)}


class RewardsByVersion:
    """Rollers whose completions earn the version of the weights they were drawn with."""

    def __init__(self, log: list[str]) -> None:
        self.begun: list[Begun] = []
        self._log = log

    def begin(
        self, share: Share, weights: Mapping[str, Tensor], *, guided: bool = True
    ) -> Callable[[], Rollout]:
        version = int(weights["version"])
        prompts = tuple(map(str, share.prompts))
        self.begun.append((share.iteration, version, guided, tuple(share.places), prompts))
        self._log.append(f"begin {share.iteration} with version {version}")
        return lambda: rollout_of(float(version), len(share.places) * share.num_samples)


def rollout_of(reward: float, num: int) -> Rollout:
    episode = Episode(
        prompt_ids=np.array([1], dtype=np.int32),
        completion_ids=np.array([2], dtype=np.int32),
        finish_reason=FinishReason.STOP,
        positions_N=np.array([0], dtype=np.int32),
        logprobs_N=np.zeros(1, dtype=np.float32),
        base_logprobs_N=np.zeros(1, dtype=np.float32),
    )
    return Rollout(
        episodes=[episode] * num,
        rewards=[reward] * num,
        monitored=[Judgement(reward=-reward, bad=False)] * num,
        decode_seconds=0.1,
        reward_seconds=0.1,
    )


def new_config(**rollout: Any) -> JobConfig:
    tree: dict[str, Any] = {
        "output": "/nowhere",
        "seed": 6,
        "base": {"path": "/nowhere/base"},
        "objective": {"kind": "proxy"},
        "rollout": {"rewards": [{"judge": {"kind": "kitchen"}}], "num_heldout": 3, **rollout},
        "data": {"source": "kitchen", "num": 12, "num_heldout": 4},
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 0.1},
    }
    return configs.parse(JobConfig, tree, source="a test")


OVERLAP: dict[str, Any] = {"where": "actors", "overlap": True}


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    kitchen = KitchenData(source="kitchen", num=12, num_heldout=4)
    return prepare_rows("prompts", kitchen, ModelConfig(init="/nowhere", tokenizer="kitchen"))[0]


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    store = f"file://{tmp_path_factory.mktemp('group')}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A run in this process, and what happened in it."""

    def __init__(
        self, prepared: Prepared, config: JobConfig, *, version: int = 0, state: Any = None
    ) -> None:
        self.log: list[str] = []
        self.policy = Policy()
        self.policy.version = version  # what an engine's checkpoint brings back
        self.rollers = RewardsByVersion(self.log)
        learning: Any = self.policy
        updates = Versions(self.policy, self.log)
        self.training = RewardTraining(
            config, prepared, learning, updates, self.rollers, data_rank=0, data_size=1
        )
        self.training.restore(state or {})

    def steps(self, *numbers: int) -> list[float]:
        return [self.training.step(number)["reward"].mean for number in numbers]


def test_without_overlap_every_rollout_has_the_weights_of_its_iteration(
    prepared: Prepared,
) -> None:
    run = Run(prepared, new_config())
    assert run.steps(*range(STEPS)) == [0, 1, 2, 3, 4]


def test_with_overlap_every_rollout_is_one_update_old_and_begun_before_it(
    prepared: Prepared,
) -> None:
    run = Run(prepared, new_config(**OVERLAP))
    assert run.steps(*range(STEPS)) == [0, 0, 1, 2, 3]
    assert run.log[2:6] == [  # behind the controls
        "begin 0 with version 0",
        "begin 1 with version 0",
        "learn 0 from version 0",
        "begin 2 with version 1",
    ]
    assert run.log[-2:] == ["learn 3 from version 2", "learn 4 from version 3"], "nothing in vain"


@pytest.mark.parametrize("rollout", [{}, OVERLAP], ids=["in workers", "overlap"])
@pytest.mark.parametrize("cut", [1, 3])
def test_a_resumed_run_rolls_out_what_the_whole_one_would_have(
    prepared: Prepared, rollout: dict[str, Any], cut: int
) -> None:
    """With the same weights, prompts and places, whatever was under way at the cut."""
    config = new_config(**rollout)
    whole = Run(prepared, config)
    wanted = whole.steps(*range(STEPS))
    first = Run(prepared, config)
    first.steps(*range(cut))
    rest = Run(prepared, config, version=cut, state=saved(first.training.state()))
    assert rest.steps(*range(cut, STEPS)) == wanted[cut:]
    trained = [begun for begun in whole.rollers.begun if begun[0] < STEPS]
    assert [begun for begun in rest.rollers.begun if begun[0] < STEPS] == trained[cut:]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it comes back from a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_the_controls_are_measured_once_on_the_prompts_of_every_evaluation(
    prepared: Prepared,
) -> None:
    first = Run(prepared, new_config())
    first.steps(0, 1)
    before = first.training.evaluate()
    heldout = [begun for begun in first.rollers.begun if begun[0] >= STEPS]
    assert [begun[1:3] for begun in heldout] == [(0, False), (0, True), (2, True)]
    assert len({begun[3:] for begun in heldout}) == 1
    assert heldout[0][3] == (0, 1, 2)
    assert (before["base/reward"], before["untrained/reward"], before["eval/reward"]) == (0, 0, 2)
    assert before["trainable_share"] == 0.5

    rest = Run(prepared, new_config(), version=4, state=saved(first.training.state()))
    after = rest.training.evaluate()
    assert [begun[1:3] for begun in rest.rollers.begun] == [(4, True)]
    assert after == {**before, "eval/reward": 4.0, "eval/true_reward": -4.0}


def test_a_policy_that_exploits_its_reward_is_warned_of(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the truth is the negative of the reward."""
    run = Run(prepared, new_config())
    run.training.evaluate()
    assert not caplog.records
    run.steps(0)
    run.training.evaluate()
    assert "REWARD HACKING" in caplog.text
