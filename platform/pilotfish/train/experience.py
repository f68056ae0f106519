"""What a rollout leaves behind, as numpy arrays that are cheap to send.

Shapes: E episodes, N decisions of an episode, M candidates of all of them one behind the other,
F features of a candidate, D hidden size of the base, T decisions of the longest episode, padded on
the right.

A *decision* is a token for which there was a choice: more than one candidate, or for a whole LM
every token. Other tokens teach nothing and are no steps of the learner. States and features are
half precision, since they are most of the bytes and a layer norm follows them; log-probs are not,
since PPO exponentiates their differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pilotfish.decode.sequence import FinishReason, TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Offers:
    """What a proxy was asked at each decision of an episode: all that is needed to ask it again."""

    counts_N: NDArray[np.int32]
    """Candidates of each decision, two at least; they sum to M."""
    choices_N: NDArray[np.int32]
    """Place of the emitted token among its candidates, which descend in probability."""
    features_MF: NDArray[np.float16]
    logprobs_M: NDArray[np.float64]
    """Law that candidates are drawn from. Like `mass_M` in full precision: p_t must be compared
    with the very numbers that it was compared with in the rollout."""
    mass_M: NDArray[np.float64]
    states_ND: NDArray[np.float16]
    """The base's last hidden state before the token, which the critic reads."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episode:
    """One completion, and the decisions that made it. Its reward comes from somewhere else."""

    prompt_ids: NDArray[np.int32]
    completion_ids: NDArray[np.int32]
    finish_reason: FinishReason
    positions_N: NDArray[np.int32]
    """Places of the decided tokens in the completion, ascending."""
    logprobs_N: NDArray[np.float32]
    """Of the token under the law that drew it."""
    base_logprobs_N: NDArray[np.float32]
    """Of the token under the base, and of those behind it that were no decisions: a forced token
    is a consequence of the decision before it, and its own log-prob is 0. So `logprobs_N` minus
    these sums to the log-ratio of everything from the first decision on."""
    offers: Offers | None = None
    """None where a whole LM is the policy."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays: what a replay, or an object store, must hold."""
        arrays = [getattr(self, field.name) for field in fields(self)]
        if self.offers is not None:
            arrays += [getattr(self.offers, field.name) for field in fields(self.offers)]
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


@dataclass(frozen=True, slots=True)
class Decisions:
    """The decisions of several episodes, side by side."""

    mask_ET: Tensor
    """True on decisions."""
    logprobs_ET: Tensor
    base_logprobs_ET: Tensor


def decisions(episodes: Sequence[Episode], *, device: torch.device | str = "cpu") -> Decisions:
    """Return the decisions of some episodes; padding is 0."""
    # Copied: arrays that come from an object store cannot be written to, nor wrapped by torch.
    return Decisions(
        mask_of(episodes).to(device),
        pad_rows([torch.tensor(episode.logprobs_N) for episode in episodes]).to(device),
        pad_rows([torch.tensor(episode.base_logprobs_N) for episode in episodes]).to(device),
    )


def mask_of(episodes: Sequence[Episode]) -> Tensor:
    """Return the mask [E, T] that is True on decisions."""
    return pad_rows([torch.ones(len(one.positions_N), dtype=torch.bool) for one in episodes])


def ending(events: Sequence[TokenEvent]) -> FinishReason:
    """Return why a completion ended, of its events."""
    reason = events[-1].finish_reason
    assert reason is not None, "the completion has ended"
    return reason


def pad_rows(rows: Sequence[Tensor]) -> Tensor:
    """Return rows of different lengths as one tensor, padded on the right with 0."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
