"""The pictures of a search."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pilotfish.errors import ConfigError
from pilotfish.evaluation.plots import Picture
from tune.choice import Trial
from tune.report import SearchReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _SOFT, _BEST = "#343a40", "#868e96", "#e8590c"
_DPI = 150
_BESIDE = "bad_share"
"""Shown beside the first objective: a reward that is bought with broken answers is no gain."""


def draw_plots(report: SearchReport, folder: str | Path) -> list[Picture]:
    """Write the plots that the search has points for. Raises `ConfigError` without matplotlib."""
    first = report.objectives[0].metric
    plots: list[tuple[str, Callable[[SearchReport], Figure | None], str]] = [
        (
            "heatmap.png",
            _heatmap,
            f"{first} over two knobs, and the share of bad answers beside it. The point framed in "
            f"orange is the best; small ones were stopped early, after fewer {report.unit}; those "
            "crossed out break a constraint.",
        ),
        (
            "curve.png",
            _curve,
            f"{first} against the knob, with its standard error. Hollow points were stopped early.",
        ),
        (
            "pareto.png",
            _pareto,
            "The objectives against each other. Points on the line are beaten by no other in all "
            "objectives; hollow ones were stopped early, crosses break a constraint.",
        ),
        (
            "parallel.png",
            _parallel,
            f"Every line is a point of the space, coloured by {first}; the thick one is the best.",
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


def _new_figure(width: float, height: float, num: int = 1) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib. Install it with `pip install pilotfish[train]`."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    every = list(figure.subplots(1, num, squeeze=False)[0])
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    return figure, every


def numeric_knobs(trials: Sequence[Trial]) -> list[str]:
    """Return the knobs that are numbers, those with the most different values first."""
    spread = {}
    for key in trials[0].knobs:
        values = {trial.knobs[key] for trial in trials}
        if len(values) > 1 and all(_is_number(value) for value in values):
            spread[key] = len(values)
    return sorted(spread, key=lambda key: -spread[key])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _heatmap(report: SearchReport) -> "Figure | None":
    knobs = numeric_knobs(report.trials)
    if len(knobs) < 2:
        return None
    across, up = sorted(knobs[:2], key=list(report.trials[0].knobs).index)
    metrics = [report.objectives[0].metric]
    if _BESIDE in report.trials[0].metrics and _BESIDE not in metrics:
        metrics.append(_BESIDE)
    xs, ys = (sorted({trial.knobs[key] for trial in report.trials}) for key in (across, up))
    figure, every = _new_figure(1.8 + 6.2 * len(metrics), 5.0, len(metrics))
    is_grid = len({(t.knobs[across], t.knobs[up]) for t in report.trials}) * 2 > len(xs) * len(ys)
    for axes, metric in zip(every, metrics, strict=True):
        colours = "Reds" if metric == _BESIDE else "viridis"
        if is_grid:
            image = _draw_cells(axes, report, metric, (across, up), (xs, ys), colours)
        else:
            image = _draw_points(axes, report, metric, (across, up), colours)
        figure.colorbar(image, ax=axes, shrink=0.85)
        axes.set_title(metric, color=_INK, fontsize=11)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    return figure


def _draw_cells(
    axes: "Axes",
    report: SearchReport,
    metric: str,
    knobs: tuple[str, str],
    values: tuple[list[float], list[float]],
    colours: str,
) -> Any:
    """A cell per pair of values; of several trials in one the best that ran longest is shown."""
    xs, ys = values
    shown: dict[tuple[int, int], Trial] = {}
    first = report.objectives[0]
    sign = 1 if first.mode == "max" else -1
    for trial in sorted(report.trials, key=lambda t: (t.progress, sign * t.metrics[first.metric])):
        shown[ys.index(trial.knobs[knobs[1]]), xs.index(trial.knobs[knobs[0]])] = trial
    grid = np.full((len(ys), len(xs)), np.nan)
    for place, trial in shown.items():
        grid[place] = trial.metrics[metric]
    low, high = _limits([trial.metrics[metric] for trial in shown.values()], metric)
    image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
    for (row, column), trial in shown.items():
        value = trial.metrics[metric]
        dark = ((value - low) / (high - low) < 0.55) == (metric != _BESIDE)
        text = f"{value:.2f}" if metric != _BESIDE else f"{value:.0%}"
        note = "" if trial.complete else f"\nn={trial.progress}"
        axes.text(
            column,
            row,
            text + note,
            ha="center",
            va="center",
            fontsize=9 if trial.complete else 7,
            color="white" if dark else "black",
            alpha=1.0 if trial.complete else 0.75,
        )
        if not trial.is_feasible:
            axes.plot(column, row, "x", color=_INK, markersize=26, alpha=0.5)
        if trial.number == report.best:
            box = {"fill": False, "edgecolor": _BEST, "linewidth": 3}
            axes.add_patch(_rectangle((column - 0.48, row - 0.48), 0.96, 0.96, **box))
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    return image


def _draw_points(
    axes: "Axes", report: SearchReport, metric: str, knobs: tuple[str, str], colours: str
) -> Any:
    values = [trial.metrics[metric] for trial in report.trials]
    low, high = _limits(values, metric)
    image = axes.scatter(
        [trial.knobs[knobs[0]] for trial in report.trials],
        [trial.knobs[knobs[1]] for trial in report.trials],
        c=values,
        s=[150 if trial.complete else 45 for trial in report.trials],
        cmap=colours,
        vmin=low,
        vmax=high,
        edgecolors=_INK,
        linewidths=0.6,
    )
    for trial in report.trials:
        at = trial.knobs[knobs[0]], trial.knobs[knobs[1]]
        if not trial.is_feasible:
            axes.plot(*at, "x", color=_INK, markersize=14)
        if trial.number == report.best:
            axes.plot(*at, "o", markersize=19, fillstyle="none", color=_BEST, markeredgewidth=3)
    for axis, key in (("x", knobs[0]), ("y", knobs[1])):
        if "loguniform" in report.config["space"].get(key, {}):
            _scale_by_logarithm(axes, axis)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return image


def _scale_by_logarithm(axes: "Axes", axis: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    getattr(axes, f"set_{axis}scale")("log")
    one = getattr(axes, f"{axis}axis")
    one.set_major_locator(LogLocator(subs=(1, 2, 5)))
    one.set_major_formatter(StrMethodFormatter("{x:g}"))
    one.set_minor_formatter(NullFormatter())


def _curve(report: SearchReport) -> "Figure | None":
    if len(report.trials[0].knobs) > 1 or not (knobs := numeric_knobs(report.trials)):
        return None
    [knob], metric = knobs, report.objectives[0].metric
    figure, [axes] = _new_figure(8, 4.6)
    for trial in report.trials:
        axes.errorbar(
            trial.knobs[knob],
            trial.metrics[metric],
            yerr=trial.metrics.get(f"{metric}_error"),
            fmt="o" if trial.is_feasible else "x",
            color=_BEST if trial.number == report.best else "#0b7285",
            fillstyle="full" if trial.complete else "none",
            markersize=8,
            capsize=3,
        )
    if metric in report.base:
        axes.axhline(report.base[metric], color=_SOFT, linestyle="--", linewidth=1, label="base")
        axes.legend(frameon=False)
    axes.set_xlabel(knob)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.25)
    return figure


def _pareto(report: SearchReport) -> "Figure | None":
    if len(report.objectives) < 2:
        return None
    up, *rest = (objective.metric for objective in report.objectives)
    figure, every = _new_figure(1 + 6 * len(rest), 5, len(rest))
    front = [report.trials[number] for number in report.pareto]
    for axes, across in zip(every, rest, strict=True):
        for trial in report.trials:
            marker = "o" if trial.is_feasible else "x"
            axes.plot(
                trial.metrics[across],
                trial.metrics[up],
                marker,
                color="#0b7285" if trial in front else _SOFT,
                fillstyle="full" if trial.complete else "none",
                markersize=8 if trial in front else 6,
            )
        line = sorted((trial.metrics[across], trial.metrics[up]) for trial in front)
        if line:
            axes.plot(*zip(*line, strict=True), color="#0b7285", linewidth=1.2)
        if report.winner is not None:
            at = report.winner.metrics[across], report.winner.metrics[up]
            axes.plot(*at, "o", markersize=15, fillstyle="none", color=_BEST, markeredgewidth=2)
        if up in report.base and across in report.base:
            axes.plot(report.base[across], report.base[up], "s", color=_INK)
            axes.annotate(
                "base",
                (report.base[across], report.base[up]),
                xytext=(8, 4),
                textcoords="offset points",
                color=_INK,
            )
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.25)
    return figure


def _parallel(report: SearchReport) -> "Figure | None":
    knobs, metric = list(report.trials[0].knobs), report.objectives[0].metric
    if len(knobs) < 3:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, [axes] = _new_figure(max(8, 2.2 * (len(knobs) + 1)), 5)
    columns = [_heights([trial.knobs[key] for trial in report.trials]) for key in knobs]
    columns.append(_heights([trial.metrics[metric] for trial in report.trials]))
    norm = Normalize(*_limits([trial.metrics[metric] for trial in report.trials], metric))
    for place, trial in enumerate(report.trials):
        is_best = trial.number == report.best
        axes.plot(
            range(len(columns)),
            [heights[place] for heights, _ in columns],
            color=_BEST if is_best else colormaps["viridis"](norm(trial.metrics[metric])),
            linewidth=3.5 if is_best else 1.3,
            alpha=1.0 if trial.complete else 0.35,
            zorder=3 if is_best else 2,
        )
    for column, (_, ticks) in enumerate(columns):
        axes.axvline(column, color=_INK, linewidth=0.8, zorder=1)
        for label, height in ticks.items():
            axes.text(column + 0.03, height, label, fontsize=8, color=_INK, va="center", zorder=4)
    axes.set_xticks(range(len(columns)), [*knobs, metric])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label=metric, shrink=0.85)
    return figure


def _heights(values: Sequence[Any]) -> tuple[list[float], dict[str, float]]:
    """Return heights between 0 and 1 of values, and the heights of labels."""
    if all(_is_number(value) for value in values):
        low, high = min(values), max(values)
        width = (high - low) or 1
        marks = [low + part * width for part in (0, 0.25, 0.5, 0.75, 1)]
        ticks = {f"{mark:.3g}": (mark - low) / width for mark in marks}
        return [(value - low) / width for value in values], ticks
    names = sorted({str(value) for value in values})
    heights = {name: place / max(1, len(names) - 1) for place, name in enumerate(names)}
    return [heights[str(value)] for value in values], heights


def _limits(values: Sequence[float], metric: str) -> tuple[float, float]:
    """Return what the colours range over; never empty."""
    low, high = (0.0, max(*values, 0.1)) if metric == _BESIDE else (min(values), max(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _rectangle(*args: Any, **kwargs: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **kwargs)
