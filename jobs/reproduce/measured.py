"""What was measured of a method: every answer, what the truth and a reward model say, the cost."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from pilotfish.evaluation.metrics import Comparison, Estimate, compare, estimate, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Columns of one entry per answer, in the order of the questions, and what decoding cost."""

    texts: Sequence[str]
    tokens: Sequence[int]
    """Drawn by the decoder; what an Aligner writes is not among them."""
    kl: Sequence[float]
    """Nats per answer to the base that decoded, before temperature."""
    rewards: Sequence[float]
    """The truth; `helpful` and `harmless` are its two parts."""
    helpful: Sequence[float]
    harmless: Sequence[float]
    bad: Sequence[bool]
    scores: Sequence[float]
    """What the reward model says."""
    seconds: float
    num_forwards: int
    notes: Mapping[str, float]
    """Means over tokens of what guides reported."""

    @property
    def reward(self) -> Estimate:
        return estimate(self.rewards)

    @property
    def bad_share(self) -> float:
        return share(self.bad)

    @property
    def seconds_per_answer(self) -> float:
        return self.seconds / len(self.texts)

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / self.seconds

    @property
    def forwards_per_token(self) -> float:
        return self.num_forwards / sum(self.tokens)

    def mean(self, column: str) -> float:
        return float(np.mean(getattr(self, column)))


def measured_path(root: Path, name: str) -> Path:
    return root / "reproduce" / "measured" / f"{name}.json"


def read_digest(path: Path) -> str | None:
    """Return the hash of what a file was measured from; None without a file."""
    return json.loads(path.read_text(encoding="utf-8"))["digest"] if path.is_file() else None


class Results(Mapping[str, Measured]):
    """Measured methods by name, read when they are first asked for."""

    def __init__(
        self, found: Mapping[str, Measured] | None = None, root: Path | None = None
    ) -> None:
        self._found = dict(found or {})
        self._root = root

    def __getitem__(self, name: str) -> Measured:
        if name not in self._found:
            if self._root is None:
                raise KeyError(name)
            content = json.loads(measured_path(self._root, name).read_text(encoding="utf-8"))
            known = {field.name: content[field.name] for field in fields(Measured)}
            self._found[name] = Measured(**known)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def gain(self, name: str, other: str, column: str = "rewards") -> Comparison:
        """Compare two methods, prompt by prompt, on the questions that both answered."""
        one, two = getattr(self[name], column), getattr(self[other], column)
        num = min(len(one), len(two))
        return compare(one[:num], two[:num])
