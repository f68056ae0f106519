"""Headline numbers over training seeds: their mean, and how far single seeds lie from it."""

from dataclasses import dataclass

import numpy as np

from jobs.reproduce.measured import Results
from jobs.reproduce.trainings import seeded
from pilotfish.evaluation.metrics import Comparison, compare, interval, resamples


@dataclass(frozen=True, slots=True, kw_only=True)
class OverSeeds:
    """One method, trained several times on the same base, answering the same questions."""

    means: tuple[float, ...]
    """Of each seed."""
    low: float
    high: float
    """95% of the bootstrap over questions, of the mean over seeds."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.means))

    @property
    def spread(self) -> float:
        """Standard deviation between seeds."""
        return float(np.std(self.means, ddof=1)) if len(self.means) > 1 else 0.0

    def __str__(self) -> str:
        text = f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{text}, seeds ± {self.spread:.2f}" if len(self.means) > 1 else text


def names_of(stage: str, num_seeds: int) -> list[str]:
    return [seeded(stage, number) for number in range(1, num_seeds + 1)]


def over_seeds(results: Results, stage: str, num_seeds: int) -> OverSeeds:
    """Return the reward of a headline method over its seeds."""
    rewards_SN = np.array([results[name].rewards for name in names_of(stage, num_seeds)])
    per_question_N = rewards_SN.mean(axis=0)
    low, high = interval([per_question_N[d].mean() for d in resamples(len(per_question_N), 0)])
    return OverSeeds(means=tuple(rewards_SN.mean(axis=1)), low=float(low), high=float(high))


def gain_over_seeds(results: Results, stage: str, other: str, num_seeds: int) -> Comparison:
    """Compare the mean over seeds with another method, question by question."""
    rewards_SN = np.array([results[name].rewards for name in names_of(stage, num_seeds)])
    return compare(list(rewards_SN.mean(axis=0)), list(results[other].rewards))
