"""One worker's share of learning from reward. Every step is one iteration: roll out and update."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from jobs.config import JobConfig
from jobs.dataset import Prepared
from jobs.frozen_base import load_frozen_base
from jobs.policies import PolicyLearning, ProxyLearning, new_learning
from jobs.ppo_updates import PPOUpdates
from jobs.rollers import OwnRoller, RollerActors, Rollers, Weights
from jobs.rollouts import Rollout, Share
from jobs.sac_updates import SACUpdates
from jobs.standing import Standing, warn_of_collapse
from jobs.steps import reduced
from pilotfish.models.loading import load_architecture
from pilotfish.train.metrics import Tally
from pilotfish.train.ppo import PPOConfig

logger = logging.getLogger(__name__)

_HELDOUT = 2**40
"""The iteration that held-out completions are seeded as: no training iteration is as late."""


class Updates(Protocol):
    """Learns from rollouts."""

    engine: Any
    """DeepSpeed's, or what checkpoints and reports ask of it."""

    def learn(self, number: int, rollout: Rollout) -> Mapping[str, Tally]:
        """Take what an iteration's rollout teaches; return this worker's tallies. A collective."""
        ...


class RewardTraining:
    """See `jobs.steps.Trainee`."""

    def __init__(
        self,
        config: JobConfig,
        prepared: Prepared,
        learning: PolicyLearning,
        updates: Updates,
        rollers: Rollers,
        *,
        data_rank: int,
        data_size: int,
    ) -> None:
        """`data_rank` of `data_size` is the share of the prompts that this worker takes."""
        self._config, self._rollouts = config, config.rollouts
        self._prepared, self._learning, self._rollers = prepared, learning, rollers
        self._rank, self._size = data_rank, data_size
        self.total_steps = config.train.total_steps(len(prepared.train))
        # Those of all workers: a completion is numbered, and seeded, among all.
        self._batches = prepared.batches(batch_size=config.train.batch_size, seed=config.seed)
        self._updates = updates
        self.engine = updates.engine
        self._pending: Callable[[], Rollout] | None = None
        self._weights: Weights | None = None
        """Those of the pending rollout."""
        self._control: dict[str, Standing] = {}

    def step(self, number: int) -> dict[str, Tally]:
        """Roll out and learn from it; return this worker's tallies."""
        rollout = self._rollout(number)
        started = time.perf_counter()
        learned = self._updates.learn(number, rollout)
        seconds = {
            "rollout_seconds": rollout.decode_seconds,
            "reward_seconds": rollout.reward_seconds,
            "update_seconds": time.perf_counter() - started,
        }
        stand = Standing.of(rollout).tallies
        return {
            **{name: one for name, one in stand.items() if one.count and "squared" not in name},
            **learned,
            **{name: Tally(value, 1.0) for name, value in seconds.items()},
        }

    def evaluate(self) -> dict[str, float]:
        """Answer held-out prompts with the policy, beside what it and the base did untrained."""
        now = self._stand()
        if dist.get_rank() == 0:
            warn_of_collapse(now, self._control["untrained"])
        report = now.report("eval") | dict(self._learning.facts)
        for name, control in self._control.items():
            report |= control.report(name)
        return report

    def write(self, folder: Path) -> None:
        """Write what was learned."""
        self._learning.write(folder, self._prepared.tokenizer)

    def state(self) -> dict[str, Any]:
        """Return the position in the prompts, the controls, and the weights of a rollout that is
        under way."""
        batches = dict(self._batches.state())
        return {"batches": batches, "control": self._control, "weights": self._weights}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a run stood; at its beginning, measure what was not trained."""
        if state:
            self._batches.resume(state["batches"])
        self._weights = state.get("weights")
        self._control = state.get("control") or {
            "base": self._stand(guided=False),
            "untrained": self._stand(),
        }

    def _rollout(self, number: int) -> Rollout:
        """Return the rollout of an iteration; with overlap, the next one is begun."""
        if self._pending is None:
            weights = self._weights or self._learning.weights()
            self._pending = self._rollers.begin(self._share(number), weights)
        rollout, self._pending = self._pending(), None
        if self._rollouts.overlap and number + 1 < self.total_steps:
            self._weights = self._learning.weights()
            self._pending = self._rollers.begin(self._share(number + 1), self._weights)
        return rollout

    def _share(self, number: int) -> Share:
        examples = self._batches.examples(number)
        places = range(self._rank, len(examples), self._size)
        return Share(
            iteration=number,
            places=places,
            prompts=[examples[place].prompt for place in places],
            num_samples=self._rollouts.samples_per_prompt,
        )

    def _stand(self, *, guided: bool = True) -> Standing:
        """Answer this worker's held-out prompts, and sum up over all workers."""
        heldout: Sequence[Any] = self._prepared.heldout[: self._rollouts.num_heldout]
        places = range(self._rank, len(heldout), self._size)
        share = Share(
            iteration=_HELDOUT,
            places=places,
            prompts=[heldout[place].prompt for place in places],
            num_samples=1,
        )
        rollout = self._rollers.begin(share, self._learning.weights(), guided=guided)()
        summed = reduced(self.engine, Standing.of(rollout).tallies)
        num_alike = dist.get_world_size() // self._size  # workers that answered the same prompts
        return Standing({name: one / num_alike for name, one in summed.items()})


def reward_training(config: JobConfig, prepared: Prepared) -> RewardTraining:
    """Load what a worker needs. Tensor peers take the same share of the prompts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if config.rollouts.where == "workers":
        base = load_frozen_base(config.frozen_base, on_cpu=not config.scaling.use_gpu)
        rank, size = base.data_rank, base.data_size
        rollers: Rollers = OwnRoller(config, prepared.tokenizer, base)
    else:
        num_actors = config.rollouts.actors_per_worker(size)
        rollers = RollerActors(config, prepared.tokenizer, num_actors=num_actors)
    # Behind what draws numbers of its own: what starts is the same wherever completions are made.
    torch.manual_seed(config.seed)
    learning = new_learning(config, _shape_of(config), prepared.tokenizer)
    if isinstance(learning.algorithm, PPOConfig):
        updates: Updates = PPOUpdates(config, learning, rank=rank, size=size)
    else:
        assert isinstance(learning, ProxyLearning)
        updates = SACUpdates(config, learning, learning.algorithm)
    return RewardTraining(
        config, prepared, learning, updates, rollers, data_rank=rank, data_size=size
    )


def _shape_of(config: JobConfig) -> PreTrainedModel:
    """Return the base without weights: learning needs its sizes alone, and the weights may be
    partitioned, or nowhere in this process."""
    path = config.frozen_base.path
    assert path is not None, "the job names its base"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_architecture(path))
