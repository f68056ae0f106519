"""Figures that read on a light and on a dark page, and on paper: their ink is the page's own."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"  # stands for the page's text colour until the picture is in the page
BLUE, ORANGE, GREEN, PINK, GREY = "#3b8fc4", "#e07b26", "#3fa05a", "#c0578f", "#8b8f94"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#9a7fd1", GREY)

Points = Sequence[Sequence[float]]


def new_figure(
    width: float = 6.4, height: float = 3.4, columns: int = 1
) -> "tuple[Figure, list[Axes]]":
    """Return an empty figure and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    every = list(np.atleast_1d(figure.subplots(1, columns)))
    for axes in every:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.title.set_color(_INK)
        axes.title.set_fontsize(10)
    return figure, every


def svg(figure: "Figure", name: str) -> str:
    """Return the figure as an SVG element for the middle of a page that has one of this name."""
    from matplotlib import rc_context

    target = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    text = target.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Glyphs and clips of all figures are named in one page.
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', _opening, text, count=1)


def _opening(found: "re.Match[str]") -> str:
    return (
        '<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" '
        f'{found[1]} role="img">'
    )


def legend(axes: "Axes") -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def annotate(axes: "Axes", text: str, at: tuple[float, float], **more: object) -> None:
    options = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8.5, "color": _INK}
    axes.annotate(text, at, **{**options, **more})  # pyright: ignore[reportArgumentType]


def bars(rows: Sequence[tuple[str, float, float]], label: str, colours: Sequence[str]) -> "Figure":
    """Horizontal bars of (name, value, half the interval), from top to bottom."""
    figure, [axes] = new_figure(height=0.3 * len(rows) + 0.8)
    places = range(len(rows))
    axes.barh(
        places,
        [value for _, value, _ in rows],
        xerr=[half for _, _, half in rows],
        color=list(colours),
        error_kw={"ecolor": _INK, "lw": 1},
    )
    axes.set_yticks(places, [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.axvline(0, color=_INK, lw=0.8)
    axes.set_xlabel(label)
    return figure


def curves(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    x: str,
    y: str,
    log: bool = False,
) -> "Figure":
    """Lines of (x, y, standard error), a colour each; `log` is of the x axis."""
    figure, [axes] = new_figure()
    for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
        xs, ys, errors = zip(*points, strict=True)
        axes.errorbar(xs, ys, yerr=errors, marker="o", ms=4, color=colour, label=name, capsize=2)
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelbottom=False, color="none")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    if len(lines) > 1:
        legend(axes)
    return figure


def scatter(groups: Mapping[str, Points], *, x: str, y: str, joined: bool = True) -> "Figure":
    """Points of several groups, each joined by a line in the order given."""
    figure, [axes] = new_figure(height=3.8)
    for colour, (name, points) in zip(COLOURS, groups.items(), strict=False):
        xs, ys = zip(*points, strict=True)
        style = "o-" if joined and len(points) > 1 else "o"
        axes.plot(xs, ys, style, ms=5, color=colour, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    legend(axes)
    return figure


def histograms(sides: Mapping[str, Sequence[float]], label: str) -> "Figure":
    """Distributions over the same bins, and their deciles beside them."""
    figure, (left, right) = new_figure(width=7.2, columns=2)
    every = np.concatenate([np.asarray(values) for values in sides.values()])
    bins = np.linspace(every.min(), every.max(), 26)
    tenths = np.arange(1, 10) / 10
    for colour, (name, values) in zip((GREY, BLUE), sides.items(), strict=False):
        left.hist(values, bins=list(bins), color=colour, alpha=0.6, label=name)
        right.plot(np.quantile(values, tenths), 10 * tenths, "o-", ms=4, color=colour, label=name)
    left.set_xlabel(label)
    left.set_ylabel("answers")
    right.set_xlabel(label)
    right.set_ylabel("decile")
    legend(left)
    return figure


def heatmaps(
    panels: Mapping[str, np.ndarray], xs: Sequence[float], ys: Sequence[float], x: str, y: str
) -> "Figure":
    """Numbers over two knobs, in panels side by side; cells without one are empty."""
    figure, every = new_figure(width=7.2, height=0.45 * len(ys) + 1.4, columns=len(panels))
    for axes, (title, values) in zip(every, panels.items(), strict=True):
        span = float(np.nanmax(values) - np.nanmin(values)) or 1.0
        axes.imshow(values, aspect="auto", cmap="viridis", origin="lower")
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                dark = (value - np.nanmin(values)) / span < 0.6
                ink = "white" if dark else "black"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8
                )
        axes.set_xticks(range(len(xs)), [f"{one:g}" for one in xs])
        axes.set_yticks(range(len(ys)), [f"{one:g}" for one in ys])
        axes.set_title(title)
        axes.set_xlabel(x)
    every[0].set_ylabel(y)
    return figure
