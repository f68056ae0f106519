"""Ray's metrics without Ray: what was counted, set and observed, by name and labels."""

from collections.abc import Sequence
from typing import Any

import pytest


class Book:
    """Takes the place of `ray.serve.metrics`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = {}
        self.names: set[str] = set()
        book = self

        class Instrument:
            def __init__(self, name: str, _description: str, *rest: Any, tag_keys: Any) -> None:
                book.names.add(name)
                self._name, self._labels = name, set(tag_keys)

            def observe(self, value: float, labels: dict[str, str]) -> None:
                assert set(labels) == self._labels, f"labels of {self._name}"
                key = self._name, frozenset(labels.items())
                book.values.setdefault(key, []).append(value)

            inc = set = observe

        for kind in ("Counter", "Gauge", "Histogram"):
            monkeypatch.setattr(f"serve.metrics.metrics.{kind}", Instrument)

    def of(self, name: str, **labels: str) -> list[float]:
        """Return all numbers of the series with these labels, whatever their other ones."""
        wanted = labels.items()
        return [
            number
            for (series, its), numbers in self.values.items()
            if series == f"pilotfish_{name}" and wanted <= dict(its).items()
            for number in numbers
        ]

    def total(self, name: str, **labels: str) -> float:
        return sum(self.of(name, **labels))

    def labels(self, name: str) -> Sequence[dict[str, str]]:
        return [dict(its) for series, its in self.values if series == f"pilotfish_{name}"]
