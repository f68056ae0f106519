"""What tests of guides share: guide LMs made of tensors, and laws of chains of guides."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pilotfish.context import Context
from pilotfish.guides.base import LogprobSource, Step, TokenGuide
from tests.fakes import context


class Table:
    """A guide LM that says the same everywhere."""

    def __init__(self, logprobs: Tensor) -> None:
        self._logprobs = logprobs

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        return lambda: self._logprobs.repeat(len(contexts), 1)

    def release(self, keys: Sequence[int]) -> None: ...


class Shifted:
    """A guide LM whose scores are off by a constant."""

    def __init__(self, source: LogprobSource, shift: float) -> None:
        self._source, self._shift = source, shift

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        found = self._source.begin(contexts)
        return lambda: found() + self._shift

    def release(self, keys: Sequence[int]) -> None: ...


@torch.inference_mode()
def guided(law: Tensor, ids: list[int], *chain: tuple[TokenGuide, float]) -> Tensor:
    """Return the law [V] of a chain of guides and weights on a base law [V], by hand."""
    asked = [context(1, ids)]
    for guide, weight in chain:
        step = Step(asked, torch.tensor([weight], dtype=torch.float64))
        law = guide.tilt(law[None], step, guide.begin(asked))[0]
    return law


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation."""
    return (one.exp() - other.exp()).abs().sum().item() / 2
