"""What a chapter of the study is made of, and the forms in which its criteria are put."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.reproduce.measured import Results
from jobs.reproduce.study import METHODS
from pilotfish.evaluation.metrics import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """Something that a sound reproduction shows."""

    claim: str
    found: str
    wanted: str
    holds: bool
    hard: bool = False
    """Whether the study fails without it."""

    @property
    def verdict(self) -> str:
        return "pass" if self.holds else "FAIL" if self.hard else "not shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text; the first column names the row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure, and what it shows."""

    figure: "Figure"
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """What one paper claims, and what came of it here."""

    title: str
    paper: str
    claim: str
    published: str
    """Its number, and where that is from."""
    ours: str
    """Our number, with its interval."""
    criteria: Sequence[Criterion]
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    not_gated: Sequence[str] = ()
    """What is not asked for, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a chapter is written from."""

    results: Results
    root: Path
    num_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChapterSpec:
    """What a chapter needs, and how it is written."""

    headline: Sequence[str]
    """Stages whose methods are measured for every training seed."""
    methods: Sequence[str]
    """Names of further `METHODS` that it reads."""
    stages: Sequence[str] = ()
    """Stages beside them whose folders it reads."""
    write: Callable[[Evidence], Chapter]


def above(claim: str, gain: Comparison, *, hard: bool = False) -> Criterion:
    """A gain whose interval lies above zero."""
    return Criterion(
        claim=claim, found=gain_text(gain), wanted="> 0", holds=gain.gain_low > 0, hard=hard
    )


def at_least(
    claim: str, value: float, wanted: float, *, hard: bool = False, unit: str = ""
) -> Criterion:
    """A number that may not be smaller."""
    return Criterion(
        claim=claim,
        found=f"{value:.3g}{unit}",
        wanted=f">= {wanted:g}{unit}",
        holds=value >= wanted,
        hard=hard,
    )


def at_most(
    claim: str, value: float, wanted: float, *, hard: bool = False, unit: str = ""
) -> Criterion:
    """A number that may not be larger."""
    return Criterion(
        claim=claim,
        found=f"{value:.3g}{unit}",
        wanted=f"<= {wanted:g}{unit}",
        holds=value <= wanted,
        hard=hard,
    )


def beyond_zero(
    claim: str, value: float, *, sign: int = 1, hard: bool = False, unit: str = ""
) -> Criterion:
    """A number above zero; or below, where `sign` is -1."""
    return Criterion(
        claim=claim,
        found=f"{value:+.3g}{unit}",
        wanted="> 0" if sign > 0 else "< 0",
        holds=sign * value > 0,
        hard=hard,
    )


def all_alike(claim: str, texts: Sequence[str], others: Sequence[str]) -> Criterion:
    """Two ways to answer that must be the same, word by word."""
    same = sum(one == other for one, other in zip(texts, others, strict=False))
    num = min(len(texts), len(others))
    return Criterion(
        claim=claim,
        found=f"{same} of {num} answers alike",
        wanted="all",
        holds=same == num,
        hard=True,
    )


def gain_text(gain: Comparison) -> str:
    return f"{gain.gain:+.2f} [{gain.gain_low:+.2f}, {gain.gain_high:+.2f}]"


def margin(one: Sequence[float], other: Sequence[float]) -> float:
    """Return wins less losses in percent: Aligner's omega, 0 for equal answers."""
    pairs = list(zip(one, other, strict=True))
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return 100 * (wins - losses) / len(pairs)


def method_rows(results: Results, labels: Mapping[str, str]) -> list[list[str]]:
    """Return a row of numbers for each method, as `METHOD_HEAD` names them."""
    return [
        [
            label,
            str(results[name].reward),
            f"{results[name].mean('helpful'):+.2f}",
            f"{results[name].mean('harmless'):+.2f}",
            f"{results[name].bad_share:.1%}",
            f"{results[name].mean('tokens'):.1f}",
            _kl_text(results, name),
            f"{results[name].forwards_per_token:.2f}",
            f"{results[name].seconds_per_answer:.3f}",
            str(len(results[name].texts)),
        ]
        for name, label in labels.items()
    ]


def _kl_text(results: Results, name: str) -> str:
    """Return the divergence from the base, where it is known: token guides on it report one."""
    kl, method = results[name].mean("kl"), METHODS[name]
    return "-" if method.base != "base" or (method.guides and kl == 0) else f"{kl:.2f}"


METHOD_HEAD = (
    *("method", "reward", "helpful", "harmless", "bad", "tokens", "KL"),
    *("forwards / token", "s / answer", "n"),
)
