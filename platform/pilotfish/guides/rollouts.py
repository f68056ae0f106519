"""Rollouts: many texts continued in one batch, whose members come and go.

Shapes: R rollouts that run, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pilotfish.context import Context
from pilotfish.models.causal_lm import NextToken
from pilotfish.noise import Purpose, invert_cdf, uniforms


class RolloutSource(Protocol):
    """The LM that continues: a `CausalLM`."""

    @property
    def max_length(self) -> int: ...
    def forward(self, contexts: Sequence[Context]) -> NextToken: ...
    def release(self, keys: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """One text to continue."""

    context: Context
    """Its own: `token_ids` grows as the rollout does."""
    max_length: int
    """Tokens, those it began with included, at which it ends without an end token."""
    noise_key: int = 0
    """Philox key of its draws."""


@torch.inference_mode()
def roll_out(
    source: RolloutSource,
    rollouts: Sequence[Rollout],
    *,
    end_ids: frozenset[int],
    temperature: float,
    at_once: int,
) -> None:
    """Continue every rollout until it draws an end token or reaches its length.

    At most `at_once` run at a time; the next ones join as others end. Temperature 0 is greedy.
    Each draw is a function of the rollout's key and its length, whatever runs beside it.
    """
    waiting = deque(one for one in rollouts if len(one.context.token_ids) < one.max_length)
    running: list[Rollout] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.popleft())
        logprobs_RV = source.forward([one.context for one in running]).logprobs_RV
        going, ended = [], []
        for one, token in zip(running, _draw(logprobs_RV, running, temperature), strict=True):
            ids = one.context.token_ids
            ids.append(token)
            (ended if token in end_ids or len(ids) >= one.max_length else going).append(one)
        source.release([one.context.key for one in ended])
        running = going


def _draw(logprobs_RV: Tensor, running: Sequence[Rollout], temperature: float) -> list[int]:
    if temperature == 0:
        return logprobs_RV.argmax(-1).tolist()
    keys = np.array([one.noise_key for one in running], dtype=np.uint64)
    lengths = np.array([len(one.context.token_ids) for one in running], dtype=np.uint64)
    drawn_R = torch.from_numpy(uniforms(keys, lengths, Purpose.ROLLOUT)).to(logprobs_RV.device)
    return invert_cdf((logprobs_RV / temperature).softmax(-1), drawn_R).tolist()
