"""The pictures of a report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from pilotfish.errors import ConfigError
from pilotfish.evaluation.report import Report, SettingResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GUIDED = "#0b7285"
_BASE = "#868e96"
_REFERENCE = "#343a40"
_INK = "#343a40"
_DPI = 150


class Picture(NamedTuple):
    """A PNG beside the report, and what it shows."""

    path: Path
    caption: str


def draw_plots(report: Report, folder: str | Path) -> list[Picture]:
    """Write the plots that the report has numbers for. Raises `ConfigError` without matplotlib."""
    plots: list[tuple[str, Callable[[Report], Figure | None], str]] = [
        (
            "rewards.png",
            _reward_bars,
            "Mean reward of every setting, with its standard error. Grey is the base alone.",
        ),
        (
            "distribution.png",
            _reward_distributions,
            "How the rewards of single answers are spread: every shape holds all answers of one "
            "setting, the line is the median.",
        ),
        (
            "reward_kl.png",
            _reward_against_kl,
            "What is gained, against how far the guide moved the base. Dashed lines are controls "
            "that need no guide: a guide worth having is above them.",
        ),
        (
            "lengths.png",
            _length_distributions,
            "How long the answers are. A guide that only makes answers longer shows here.",
        ),
    ]
    pictures = []
    for name, draw, caption in plots:
        figure = draw(report)
        if figure is not None:
            path = Path(folder) / name
            figure.savefig(path, dpi=_DPI, facecolor="white")
            pictures.append(Picture(path, caption))
    return pictures


def _new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib. Install it with `pip install pilotfish[train]`."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK)
    return figure, axes


def _colour(result: SettingResult, report: Report) -> str:
    if not result.setting.is_base:
        return _GUIDED
    return _REFERENCE if result.setting.name == report.reference else _BASE


def _reward_bars(report: Report) -> "Figure | None":
    judged = [result for result in report.results if result.metrics.reward is not None]
    if not judged:
        return None
    figure, axes = _new_figure(8, 1.2 + 0.42 * len(judged))
    for place, result in enumerate(reversed(judged)):
        reward = result.metrics.reward
        assert reward is not None
        axes.barh(
            place,
            reward.mean,
            xerr=reward.error,
            height=0.66,
            color=_colour(result, report),
            error_kw={"ecolor": "black", "elinewidth": 1.2, "capsize": 3},
        )
        outwards = 1 if reward.mean >= 0 else -1
        axes.annotate(
            f"{reward.mean:+.2f} ± {reward.error:.2f}",
            (reward.mean + outwards * reward.error, place),
            xytext=(6 * outwards, 0),
            textcoords="offset points",
            va="center",
            ha="left" if outwards > 0 else "right",
            fontsize=9,
            color=_INK,
        )
    axes.set_yticks(range(len(judged)), [result.setting.name for result in reversed(judged)])
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.margins(x=0.22)
    axes.set_ylim(-0.6, len(judged) - 0.4)
    axes.set_xlabel("mean reward")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _reward_distributions(report: Report) -> "Figure | None":
    judged = [result for result in report.results if result.metrics.reward is not None]
    if not judged:
        return None
    values = [[answer.reward or 0.0 for answer in result.answers] for result in judged]
    return _distributions(report, judged, values, label="reward of one answer")


def _length_distributions(report: Report) -> "Figure | None":
    values = [[float(answer.num_tokens) for answer in r.answers] for r in report.results]
    return _distributions(report, report.results, values, label="tokens of one answer")


def _distributions(
    report: Report,
    results: Sequence[SettingResult],
    values: Sequence[Sequence[float]],
    *,
    label: str,
) -> "Figure":
    """Violins, one above the other; a setting whose values are all equal is a line."""
    figure, axes = _new_figure(8, 1.2 + 0.55 * len(results))
    for place, (result, numbers) in enumerate(
        zip(reversed(results), reversed(values), strict=True)
    ):
        colour = _colour(result, report)
        if np.ptp(numbers) > 0:
            shapes = axes.violinplot(
                numbers, [place], orientation="horizontal", widths=0.85, showextrema=False
            )
            for body in cast(Any, shapes["bodies"]):  # matplotlib's stubs say Collection
                body.set(facecolor=colour, alpha=0.55, edgecolor=colour)
        middle = float(np.median(numbers))
        axes.plot([middle, middle], [place - 0.3, place + 0.3], color=colour, linewidth=2.5)
    axes.set_yticks(range(len(results)), [result.setting.name for result in reversed(results)])
    axes.set_xlabel(label)
    axes.set_ylim(-0.7, len(results) - 0.3)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _reward_against_kl(report: Report) -> "Figure | None":
    if report.best() is None:
        return None
    figure, axes = _new_figure(8, 5)
    guided = [result for result in report.results if not result.setting.is_base]
    marks = [report.result(report.reference), *guided]
    furthest = max(result.metrics.kl.mean for result in marks)
    for result in marks:
        reward, kl = result.metrics.reward, result.metrics.kl
        assert reward is not None
        axes.errorbar(
            kl.mean,
            reward.mean,
            xerr=kl.error,
            yerr=reward.error,
            fmt="o",
            color=_colour(result, report),
            markersize=7,
            capsize=3,
        )
        axes.annotate(
            result.setting.name,
            (kl.mean, reward.mean),
            xytext=(11, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_INK,
        )
    controls = [r for r in report.results if r.setting.is_base and r is not marks[0]]
    for result in _extremes(controls):
        assert result.metrics.reward is not None
        level = result.metrics.reward.mean
        axes.axhline(level, color=_BASE, linestyle="--", linewidth=1)
        axes.annotate(
            result.setting.name,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_BASE,
        )
    axes.set_xlim(-0.06 * furthest, 1.3 * furthest)  # room for the names on the right
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlabel("KL of the guided law to the base, before temperature (nats per answer)")
    axes.set_ylabel("mean reward")
    return figure


def _extremes(controls: Sequence[SettingResult]) -> list[SettingResult]:
    """The greedy control and the best of the others: more lines would hide each other."""
    ranked = sorted(controls, key=_mean_reward)
    greedy = [result for result in ranked if result.setting.temperature == 0]
    sampled = [result for result in ranked if result.setting.temperature > 0]
    return [*greedy[-1:], *sampled[-1:]]


def _mean_reward(result: SettingResult) -> float:
    assert result.metrics.reward is not None
    return result.metrics.reward.mean
