"""Numbers about answers: plain functions of lists, each with its uncertainty."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pilotfish.config import Config

_DIGITS = 6
_NUM_RESAMPLES = 2000
_LEVEL = 0.95


class Estimate(Config):
    """A mean and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"


class Comparison(Config):
    """One setting against another on the same prompts; intervals hold 95% of the bootstrap."""

    wins: int
    ties: int
    losses: int
    win_rate: float
    """Share of wins, plus half the share of ties."""
    win_rate_low: float
    win_rate_high: float
    gain: float
    """Mean difference of the rewards."""
    gain_low: float
    gain_high: float


def tidy(value: float) -> float:
    """Round to what is reported, so that every place shows the same digits."""
    return round(float(value), _DIGITS) + 0.0  # + 0.0 turns -0.0 into 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and its standard error, from the sample deviation (n - 1)."""
    assert len(values) > 1, "the standard error needs two values"
    array = np.asarray(values, dtype=np.float64)
    return Estimate(mean=tidy(array.mean()), error=tidy(array.std(ddof=1) / math.sqrt(len(values))))


def has_fallen(estimates: Sequence[Estimate], patience: int) -> bool:
    """Say whether each of the last `patience` estimates lies below the best before all of them.

    Below means by more than its own standard error.
    """
    before, last = estimates[:-patience], estimates[-patience:]
    best = max((one.mean for one in before), default=-math.inf)
    return all(best - one.mean > one.error for one in last)


def compare(values: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> Comparison:
    """Compare rewards prompt by prompt.

    The intervals are percentiles of a paired bootstrap: whole prompts are drawn again, with the
    answers of both sides, so that what makes a prompt hard cancels out.
    """
    assert len(values) == len(reference), "both sides answer the same prompts"
    gains = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    points = np.where(gains > 0, 1.0, np.where(gains == 0, 0.5, 0.0))
    draws = resamples(len(gains), seed)
    means = [(points[draw].mean(), gains[draw].mean()) for draw in draws]
    (rate_low, gain_low), (rate_high, gain_high) = interval(means)
    return Comparison(
        wins=int((gains > 0).sum()),
        ties=int((gains == 0).sum()),
        losses=int((gains < 0).sum()),
        win_rate=tidy(points.mean()),
        win_rate_low=tidy(rate_low),
        win_rate_high=tidy(rate_high),
        gain=tidy(gains.mean()),
        gain_low=tidy(gain_low),
        gain_high=tidy(gain_high),
    )


def resamples(num: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the places that each resample of a bootstrap over `num` prompts draws."""
    rng = np.random.default_rng(seed)
    return (rng.integers(num, size=num) for _ in range(_NUM_RESAMPLES))


def interval(drawn: Sequence[Any]) -> np.ndarray:
    """Return the lower and the upper end of what holds 95% of the resamples' numbers [..., K]."""
    tail = (1 - _LEVEL) / 2
    return np.quantile(np.asarray(drawn), (tail, 1 - tail), axis=0)


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n over all texts: different runs of n words, divided by all of them.

    Li et al., "A diversity-promoting objective function for neural conversation models", NAACL
    2016. It falls with the amount of text, so compare it between equal numbers of answers only.
    """
    runs = [
        tuple(words[start : start + n])
        for words in map(str.split, texts)
        for start in range(len(words) - n + 1)
    ]
    return tidy(len(set(runs)) / len(runs)) if runs else 0.0


def share(flags: Sequence[bool]) -> float:
    """Return how many of the flags are set, as a share."""
    return tidy(sum(flags) / len(flags))
