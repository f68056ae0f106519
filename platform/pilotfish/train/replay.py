"""Decisions of past episodes, bounded by number and by bytes.

Shapes: J judged candidates one behind the other, B of them in a batch, C room for them, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pilotfish.train.experience import Episode


@dataclass(frozen=True, slots=True)
class Judged:
    """What a proxy accepted and rejected in one episode, in order; the last one ends it."""

    features_JF: NDArray[np.float16]
    accepted_J: NDArray[np.bool_]
    rewards_J: NDArray[np.float32]


def judged(episode: Episode, reward: float, *, beta_kl: float = 0.0) -> Judged:
    """Return the accepts and rejects behind an episode's tokens, for `candidate_order=ordered`.

    Each decision rejected what stands before its choice and then accepted it, unless the choice is
    the last candidate, which nobody is asked about. The reward counts once, at the very end; where
    a token is emitted it costs `beta_kl` times its log-ratio to the base.
    """
    offers = episode.offers
    assert offers is not None, "the episode of a proxy"
    asked_N = np.minimum(offers.choices_N + 1, offers.counts_N - 1)
    first_N = np.cumsum(offers.counts_N) - offers.counts_N
    ends_N = np.cumsum(asked_N)
    own_J = np.arange(asked_N.sum()) - np.repeat(ends_N - asked_N, asked_N)
    rewards_J = np.zeros(len(own_J), dtype=np.float32)
    rewards_J[ends_N - 1] = beta_kl * (episode.base_logprobs_N - episode.logprobs_N)
    rewards_J[-1:] += reward
    return Judged(
        features_JF=offers.features_MF[np.repeat(first_N, asked_N) + own_J],
        accepted_J=own_J == np.repeat(offers.choices_N, asked_N),
        rewards_J=rewards_J,
    )


@dataclass(frozen=True, slots=True)
class Transitions:
    """A batch of decisions and what followed them."""

    features_BF: Tensor
    accepted_B: Tensor
    rewards_B: Tensor
    ended_B: Tensor
    next_BF: Tensor
    """The next candidate that was judged; anything where the episode has ended."""


class Replay:
    """A ring of judged candidates: the oldest are overwritten first.

    A state is stored once: what follows a decision stands behind it in the ring, and is never
    overwritten before it.
    """

    def __init__(self, num_features: int, *, max_decisions: int, max_bytes: int) -> None:
        """Hold as many decisions as both bounds allow."""
        bytes_each = 2 * num_features + 1 + 4 + 1
        self.capacity = min(max_decisions, max_bytes // bytes_each)
        self._features_CF = np.zeros((self.capacity, num_features), dtype=np.float16)
        self._accepted_C = np.zeros(self.capacity, dtype=np.bool_)
        self._rewards_C = np.zeros(self.capacity, dtype=np.float32)
        self._ended_C = np.zeros(self.capacity, dtype=np.bool_)
        self._num_added = 0

    def __len__(self) -> int:
        return min(self._num_added, self.capacity)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays().values())

    def add(self, one: Judged) -> None:
        """Take in an episode."""
        num = len(one.accepted_J)
        places = (self._num_added + np.arange(num)) % self.capacity
        self._features_CF[places] = one.features_JF
        self._accepted_C[places] = one.accepted_J
        self._rewards_C[places] = one.rewards_J
        self._ended_C[places] = np.arange(num) == num - 1
        self._num_added += num

    def sample(
        self, size: int, *, seed: Sequence[int], device: torch.device | str = "cpu"
    ) -> Transitions:
        """Draw decisions with replacement: a function of the seed and of what is held."""
        places = np.random.default_rng(seed).integers(len(self), size=size)
        found = (
            self._features_CF[places],
            self._accepted_C[places],
            self._rewards_C[places],
            self._ended_C[places],
            self._features_CF[(places + 1) % self.capacity],
        )
        return Transitions(*(torch.from_numpy(array).to(device) for array in found))

    def state_dict(self) -> dict[str, Any]:
        """Return what is held, and no more."""
        held = {name: array[: len(self)].copy() for name, array in self._arrays().items()}
        return {**held, "num_added": self._num_added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what another one of the same capacity held."""
        self._num_added = state["num_added"]
        for name, array in self._arrays().items():
            array[: len(self)] = state[name]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "features": self._features_CF,
            "accepted": self._accepted_C,
            "rewards": self._rewards_C,
            "ended": self._ended_C,
        }
