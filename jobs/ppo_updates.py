"""What a worker does with a rollout by PPO: advantages, then passes through a DeepSpeed engine.

Episodes are numbered over all workers, prompt by prompt, so the minibatches, and with them the loss
curve, do not depend on how many workers share them.

Shapes: E episodes, T decisions of the longest one.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.config import JobConfig
from jobs.engine import start_engine
from jobs.policies import PolicyLearning
from jobs.rollouts import Rollout
from jobs.steps import reduced, summed_over_workers
from pilotfish.errors import ConfigError
from pilotfish.train.experience import Episode, decisions
from pilotfish.train.metrics import Tally, add
from pilotfish.train.ppo import (
    Evaluation,
    PPOConfig,
    Targets,
    estimate,
    minibatches,
    ppo_loss,
    too_far,
)


class PPOUpdates:
    """See `jobs.reward_training.Updates`."""

    def __init__(
        self, config: JobConfig, learning: PolicyLearning, *, rank: int, size: int
    ) -> None:
        """`rank` of `size` is the share of the prompts that this worker's rollouts are about."""
        assert isinstance(learning.algorithm, PPOConfig), "the caller looked"
        self._config, self._learning, self._ppo = config, learning, learning.algorithm
        self._rank, self._size = rank, size
        # One backward pass of each worker is an accumulation step; `_update` counts them itself.
        alone = {"batch_size": dist.get_world_size(), "micro_batch_size": None}
        num_steps = config.train.total_steps(0) * self._ppo.epochs * self._ppo.num_minibatches
        self.engine = start_engine(
            learning.module,
            config.train.model_copy(update=alone),
            total_steps=num_steps,
            on_cpu=not config.scaling.use_gpu,
        )

    def learn(self, number: int, rollout: Rollout) -> dict[str, Tally]:
        """Take the optimizer steps of one rollout. Raises `ConfigError` where no completion of any
        worker had a choice."""
        episodes, taken = rollout.episodes, decisions(rollout.episodes)
        if not self._total(taken.mask_ET.sum()):
            raise ConfigError(
                "no completion of this rollout had a token with a choice, so there is nothing to "
                "learn. Widen the candidates (p_t, top_k), or roll out more prompts."
            )
        targets, tallies = estimate(
            taken,
            torch.tensor(rollout.rewards),
            self._values(episodes),
            self._ppo,
            total=self._total,
        )
        num_episodes = self._config.train.batch_size * self._config.rollouts.samples_per_prompt
        seed = (self._config.seed, number)
        for numbers in minibatches(num_episodes, self._ppo, seed=seed):
            update = self._update(episodes, targets, self._own(numbers))
            tallies = add(tallies, update)
            if too_far(reduced(self.engine, update)["approx_kl"], self._ppo):
                break
        return tallies

    def _own(self, numbers: Sequence[int]) -> list[int]:
        """Return the places in this worker's rollout of episodes that are numbered over all."""
        samples = self._config.rollouts.samples_per_prompt
        return [
            number // samples // self._size * samples + number % samples
            for number in numbers
            if number // samples % self._size == self._rank
        ]

    def _update(
        self, episodes: Sequence[Episode], targets: Targets, own: Sequence[int]
    ) -> dict[str, Tally]:
        """Take one optimizer step on some of this worker's episodes."""
        total = float(self._total(targets.mask_ET[list(own)].sum()))
        tallies: dict[str, Tally] = {}
        self.engine.train()
        for rows, is_last in self._passes(own):
            part = targets.select(rows or [0])
            output = ppo_loss(self._evaluation(episodes, rows), part, self._ppo)
            # DeepSpeed averages over workers as if all held the same number of decisions.
            weight = part.num_units * dist.get_world_size() / max(total, 1) if rows else 0.0
            self.engine.set_gradient_accumulation_boundary(is_last)
            self.engine.backward(output.loss * weight)
            self.engine.step()
            nothing = dict.fromkeys(output.metrics, Tally(0.0, 0.0))
            tallies = add(tallies, output.metrics if rows else nothing)
        return tallies

    @torch.no_grad()
    def _values(self, episodes: Sequence[Episode]) -> Tensor:
        """Return what the critic says of every decision [E, T]."""
        self.engine.eval()
        longest = max(len(episode.positions_N) for episode in episodes)
        values_ET = torch.zeros(len(episodes), longest, dtype=torch.float64)
        for rows, _ in self._passes(range(len(episodes))):
            found_ET = self._evaluation(episodes, rows).values_ET
            if rows:
                values_ET[rows, : found_ET.shape[1]] = found_ET.double()
        return values_ET

    def _passes(self, own: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        """Yield `train.micro_batch_size` rows at a time, and whether they are the last.

        All workers get as many, and one at least, since gradients and ZeRO-3's weights are
        collectives.
        """
        size = self._config.train.micro_batch_size or max(len(own), 1)
        num = torch.tensor(max(-(-len(own) // size), 1), device=self.engine.device)
        dist.all_reduce(num, op=dist.ReduceOp.MAX)
        for at in range(num := int(num)):
            yield list(own[at * size : (at + 1) * size]), at + 1 == num

    def _evaluation(self, episodes: Sequence[Episode], rows: Sequence[int]) -> Evaluation:
        """Ask the policy about some episodes; a worker without any asks about one, for nothing."""
        some = [episodes[row] for row in rows] or [episodes[0]]
        found = self._learning.evaluate(self.engine, some)
        return Evaluation(*(one_ET.cpu() for one_ET in found))

    def _total(self, values: Tensor) -> Tensor:
        return summed_over_workers(self.engine, values)
