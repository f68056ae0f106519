"""Whole methods beside each other: fronts of two rewards, recovered gaps, shifted distributions.

More is better in every objective. Shapes: N points, M objectives.
"""

import math
from collections.abc import Sequence

import numpy as np

from pilotfish.config import Config
from pilotfish.evaluation.metrics import interval, resamples, tidy

Point = Sequence[float]

_DECILES = np.arange(1, 10) / 10


class Interval(Config):
    """A number, and what holds 95% of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Return the places of the points that no other one beats; equal ones all stay.

    A point beats another that is nowhere better and somewhere worse.
    """
    array_NM = np.asarray(points, dtype=np.float64)
    return [
        place
        for place, point_M in enumerate(array_NM)
        if not ((array_NM >= point_M).all(axis=1) & (array_NM > point_M).any(axis=1)).any()
    ]


def worst_point(*fronts: Sequence[Point]) -> tuple[float, ...]:
    """Return the worst value of each objective over the points of all methods.

    This is the reference that makes hypervolumes of those methods comparable.
    """
    points = (point for front in fronts for point in front)
    return tuple(min(values) for values in zip(*points, strict=True))


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area that points of two objectives dominate, down to `reference`; exact.

    Zitzler and Thiele, "Multiobjective Optimization Using Evolutionary Algorithms: A Comparative
    Case Study", PPSN 1998. What a point lacks of the reference counts as nothing.
    """
    area, floor = 0.0, reference[1]
    for first, second in sorted(((x, y) for x, y in points), reverse=True):
        if second > floor and first > reference[0]:
            area += (first - reference[0]) * (second - floor)
            floor = second
    return area


def mip(points: Sequence[Point], alphas: Sequence[Point]) -> float:
    """Return the mean inner product: the mean over preferences a of `<a, r(a)>`.

    `points[i]` holds the rewards that a method gives whoever prefers `alphas[i]`. Lin et al.,
    "PARM: Multi-Objective Test-Time Alignment via Preference-Aware Autoregressive Reward Model",
    ICML 2025.
    """
    assert len(points) == len(alphas), "one point for each preference"
    return float((np.asarray(points) * np.asarray(alphas)).sum(axis=1).mean())


def spearman(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the rank correlation; ties share the mean of their ranks.

    NaN where one side does not vary.
    """
    assert len(values) == len(others), "values come in pairs"
    ranks = _ranks(values), _ranks(others)
    if any(np.ptp(one) == 0 for one in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def recovered_gap(
    base: Sequence[float], guided: Sequence[float], strong: Sequence[float], *, seed: int = 0
) -> Interval:
    """Return `(guided - base) / (strong - base)` of mean rewards on the same prompts.

    1 is as good as the strong model. Burns et al., "Weak-to-Strong Generalization: Eliciting Strong
    Capabilities With Weak Supervision", ICML 2024, for guided decoding. Whole prompts are drawn
    again. The interval means something only where the strong model is clearly better than the base.
    """
    assert len(base) == len(guided) == len(strong), "all answer the same prompts"
    rewards_3N = np.array([base, guided, strong], dtype=np.float64)

    def share(means_3: np.ndarray) -> float:
        return (means_3[1] - means_3[0]) / (means_3[2] - means_3[0])

    drawn = [share(rewards_3N[:, draw].mean(axis=1)) for draw in resamples(len(base), seed)]
    low, high = interval(drawn)
    return Interval(value=tidy(share(rewards_3N.mean(axis=1))), low=tidy(low), high=tidy(high))


def decile_shifts(
    values: Sequence[float], reference: Sequence[float], *, seed: int = 0
) -> list[Interval]:
    """Return by how much each of the nine deciles lies above that of `reference`.

    Both sides answer the same prompts in the same order: deciles are of each side alone, and the
    bootstrap draws whole prompts, with the answers of both. That every decile moves right is borne
    out where each `low` is above 0; since all nine must hold at once, asking nine times makes the
    claim harder and not easier to pass, so that no level needs correcting.
    """
    assert len(values) == len(reference), "both sides answer the same prompts"
    rewards_2N = np.array([values, reference], dtype=np.float64)

    def shifts(sides_2N: np.ndarray) -> np.ndarray:
        ours_9, theirs_9 = np.quantile(sides_2N, _DECILES, axis=1).T
        return ours_9 - theirs_9

    drawn = [shifts(rewards_2N[:, draw]) for draw in resamples(len(values), seed)]
    lows, highs = interval(drawn)
    return [
        Interval(value=tidy(value), low=tidy(low), high=tidy(high))
        for value, low, high in zip(shifts(rewards_2N), lows, highs, strict=True)
    ]


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Return ranks from 1, of which equal values share the mean."""
    _, group_N, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group_N]
