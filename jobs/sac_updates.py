"""What the learner does with a rollout by SAC: into the replay, and updates from there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.config import JobConfig
from jobs.policies import ProxyLearning
from jobs.rollouts import Rollout
from pilotfish.train.metrics import Tally
from pilotfish.train.sac import SACConfig, SACLearner

_NAME = "sac.pt"


class SACUpdates:
    """See `jobs.reward_training.Updates`."""

    def __init__(self, config: JobConfig, learning: ProxyLearning, algorithm: SACConfig) -> None:
        # Ray Train has set the worker's device.
        device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
        learner = SACLearner(
            learning.module.actor.to(device),
            learning.settings,
            algorithm,
            learning_rate=config.train.learning_rate,
            seed=config.seed,
            device=device,
        )
        learning.check_share(learner.num_trainable)
        self._learner = learner
        self.engine: Any = _Engine(learner, config.train.learning_rate, device)

    def learn(self, number: int, rollout: Rollout) -> Mapping[str, Tally]:
        """Take the updates that the rollout's episodes are due."""
        return self._learner.learn(rollout.episodes, rollout.rewards)


class _Engine:
    """What checkpoints and reports ask of DeepSpeed's engine, for a learner that has none: its
    networks are tiny, and one process holds them and the replay."""

    lr_scheduler = None

    def __init__(self, learner: SACLearner, learning_rate: float, device: torch.device) -> None:
        self._learner, self._learning_rate = learner, learning_rate
        self.device = device

    def zero_optimization(self) -> bool:
        return False

    def get_lr(self) -> list[float]:
        return [self._learning_rate]

    def get_global_grad_norm(self) -> None:
        return None

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        (Path(folder) / tag).mkdir()
        torch.save(self._learner.state_dict(), Path(folder) / tag / _NAME)
        (Path(folder) / "latest").write_text(tag)

    def load_checkpoint(self, folder: str, **_: Any) -> tuple[str, dict[str, Any]]:
        path = Path(folder) / (Path(folder) / "latest").read_text() / _NAME
        # The replay holds numpy arrays, which torch does not take for plain weights.
        self._learner.load_state_dict(torch.load(path, weights_only=False))
        return str(path), {}


def saved_actor(folder: Path) -> dict[str, Tensor] | None:
    """Return the actor in the folder of a checkpoint's tag; None if SAC did not write it."""
    path = folder / _NAME
    if not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=False)["actor"]
