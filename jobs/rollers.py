"""Who rolls out for a training worker: the worker itself, or actors of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from jobs.config import JobConfig
from jobs.frozen_base import FrozenBase
from jobs.policies import new_sampler
from jobs.rollouts import Roller, Rollout, Share
from pilotfish.errors import PilotfishError
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, pick_device

Weights: TypeAlias = Mapping[str, Tensor]


class Rollers(Protocol):
    """Answers shares of prompts with the policy's weights."""

    def begin(
        self, share: Share, weights: Weights, *, guided: bool = True
    ) -> Callable[[], Rollout]:
        """Start a rollout, and hand it out when asked."""
        ...


class OwnRoller:
    """The worker itself, with its share of the frozen base. It has answered when `begin` returns.

    A collective where the base is partitioned.
    """

    def __init__(
        self, config: JobConfig, tokenizer: PreTrainedTokenizerBase, base: FrozenBase
    ) -> None:
        self._base = base
        lm = base.causal_lm(num_slots=config.rollouts.batch_size)
        self._roller = _roller(config, tokenizer, lm)

    def begin(
        self, share: Share, weights: Weights, *, guided: bool = True
    ) -> Callable[[], Rollout]:
        with self._base.lockstep():
            rollout = self._roller.roll(share, weights, guided=guided)
        return lambda: rollout


class RollerActor:
    """A process that decodes beside the training workers, with a whole base."""

    def __init__(self, config: JobConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        torch.set_num_threads(config.rollouts.threads)
        transformers_logging.disable_progress_bar()
        base = config.frozen_base
        assert base.path is not None, "the job names its base"
        device = pick_device("auto" if config.rollouts.gpus_per_actor else "cpu")
        model = load_frozen(base.path, device=device, dtype=base.dtype)
        lm = CausalLM(model, num_slots=config.rollouts.batch_size)
        self._roller = _roller(config, tokenizer, lm)

    def roll(self, share: Share, weights: Weights, *, guided: bool) -> Rollout:
        return self._roller.roll(share, weights, guided=guided)


class RollerActors:
    """Actors that belong to one worker, and end with it. One that dies is replaced, and its share
    decoded again, to the same tokens."""

    def __init__(
        self, config: JobConfig, tokenizer: PreTrainedTokenizerBase, *, num_actors: int
    ) -> None:
        remote: Any = ray.remote(
            num_cpus=config.rollouts.threads,
            num_gpus=config.rollouts.gpus_per_actor,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy="DEFAULT",  # not into the bundle of the training worker
        )(RollerActor)
        self._actors = [remote.remote(config, tokenizer) for _ in range(num_actors)]

    def begin(
        self, share: Share, weights: Weights, *, guided: bool = True
    ) -> Callable[[], Rollout]:
        sent = ray.put(dict(weights))
        # A worker may have no held-out prompt.
        parts = [part for part in _split(share, len(self._actors)) if part.places] or [share]
        futures = [
            actor.roll.remote(part, sent, guided=guided)
            for actor, part in zip(self._actors, parts, strict=False)
        ]

        def wait() -> Rollout:
            try:
                return _join(ray.get(futures))
            except RayTaskError as error:
                if isinstance(error.cause, PilotfishError):
                    raise error.cause from None
                raise

        return wait


def _roller(config: JobConfig, tokenizer: PreTrainedTokenizerBase, lm: CausalLM) -> Roller:
    sampler = new_sampler(config, lm, tokenizer)
    return Roller(sampler, tokenizer, config.rollouts, seed=config.seed, device=str(lm.device))


def _split(share: Share, num: int) -> list[Share]:
    parts = np.array_split(np.arange(len(share.places)), num)
    return [
        Share(
            iteration=share.iteration,
            places=[share.places[at] for at in part],
            prompts=[share.prompts[at] for at in part],
            num_samples=share.num_samples,
        )
        for part in parts
    ]


def _join(parts: Sequence[Rollout]) -> Rollout:
    """Put parts together; their times are those of the slowest."""
    judged = [part.monitored for part in parts]
    return Rollout(
        episodes=[episode for part in parts for episode in part.episodes],
        rewards=[reward for part in parts for reward in part.rewards],
        monitored=None
        if any(one is None for one in judged)
        else [judgement for one in judged if one is not None for judgement in one],
        decode_seconds=max(part.decode_seconds for part in parts),
        reward_seconds=max(part.reward_seconds for part in parts),
    )
