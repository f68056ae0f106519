"""Means that can be summed over batches and workers, and the interval around a share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tally:
    """A mean in the making: the sum of a quantity, and over how many units."""

    total: float
    count: float

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.total + other.total, self.count + other.count)

    def __truediv__(self, times: float) -> "Tally":
        """Return the tally of what was counted so many times: the same mean of fewer units."""
        return Tally(self.total / times, self.count / times)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan


def tally(values: Tensor) -> Tally:
    """Return the tally of all the elements of a tensor."""
    return Tally(float(values.sum()), values.numel())


def add(tallies: Mapping[str, Tally], more: Mapping[str, Tally]) -> dict[str, Tally]:
    """Return the sum of two sets of tallies, by name."""
    names = dict.fromkeys([*tallies, *more])
    zero = Tally(0.0, 0.0)
    return {name: tallies.get(name, zero) + more.get(name, zero) for name in names}


def wilson_interval(share: Tally, *, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval (95% for z=1.96) of a proportion.

    Unlike the normal interval it stays inside [0, 1] and has a width at 0 and 1.
    """
    num = share.count
    if num == 0:
        return 0.0, 1.0
    centre = (share.mean + z * z / (2 * num)) / (1 + z * z / num)
    spread = share.mean * (1 - share.mean) / num + z * z / (4 * num * num)
    half = z * math.sqrt(spread) / (1 + z * z / num)
    return centre - half, centre + half
