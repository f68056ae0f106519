"""The proxy's knobs at decoding time, as a search over them has left its results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs.reproduce import figures
from jobs.reproduce.chapter import Criterion, Plot, above
from pilotfish.evaluation.metrics import Comparison


def interior(root: Path) -> Criterion:
    """The best p_t lies between the ends, at the temperature of training."""
    rewards = {
        p_t: one["reward"] for (p_t, temperature), one in _cells(root).items() if temperature == 1
    }
    best, ends = max(rewards, key=rewards.__getitem__), (min(rewards), max(rewards))
    return Criterion(
        claim="The best p_t is inside the range, at T=1",
        found=f"{best:g}",
        wanted=f"inside {ends[0]:g} to {ends[1]:g}",
        holds=ends[0] < best < ends[1],
    )


def _cells(root: Path) -> dict[tuple[float, float], Mapping[str, float]]:
    """Return the metrics that the search found, by p_t and temperature."""
    trials = _found(root, "results.json")["trials"]
    return {
        (one["knobs"]["args.proxy.p_t"], one["knobs"]["temperature"]): one["metrics"]
        for one in trials
    }


def _found(root: Path, name: str) -> Any:
    path = root / "reproduce" / "search_proxy" / name
    return json.loads(path.read_text(encoding="utf-8"))


def heatmap(root: Path) -> Plot:
    """Reward and share of broken answers over p_t and temperature."""
    cells = _cells(root)
    p_ts, temperatures = (sorted({knobs[axis] for knobs in cells}) for axis in (0, 1))
    panels = {
        title: np.array([[cells[p_t, t][metric] for p_t in p_ts] for t in temperatures])
        for title, metric in (("true reward", "reward"), ("share of broken answers", "bad_share"))
    }
    return Plot(
        figure=figures.heatmaps(panels, p_ts, temperatures, "p_t", "temperature"),
        caption=(
            "The proxy's two knobs at decoding time, searched on questions of their own; what "
            "fell behind was stopped after 64 of them. The proxy was trained at p_t=0.05, T=1."
        ),
    )


def tuned(root: Path) -> Criterion:
    """What the search's winner gains on questions that the search never saw."""
    winner = _found(root, "winner.json")
    found = {name.rpartition(".")[2]: value for name, value in winner["knobs"].items()}
    gain = Comparison(**winner["confirmation"]["gains"]["reward"]["comparison"])
    shown = ", ".join(f"{name}={value:g}" for name, value in found.items())
    return above(f"Knobs that a search found ({shown}) are above those of training", gain)
