"""The study as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from jobs.reproduce.chapter import Chapter, Criterion
from jobs.reproduce.figures import svg

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Colophon:
    """How the study was run."""

    facts: Mapping[str, str]
    """Date, machine, versions, seeds, questions, time."""
    seconds: Mapping[str, float]
    """Of each stage, when it was last really run."""


def write_page(chapters: Mapping[str, Chapter], colophon: Colophon, path: Path) -> None:
    """Write the page; whoever reads it needs nothing else, no network included."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        chapters=chapters,
        pictures={
            name: [
                (svg(plot.figure, f"{name}-{number}"), plot.caption)
                for number, plot in enumerate(chapter.plots)
            ]
            for name, chapter in chapters.items()
        },
        counts={name: count(chapter) for name, chapter in chapters.items()},
        missed=[
            (chapter.title, one.claim) for chapter in chapters.values() for one in failed(chapter)
        ],
        colophon=colophon,
        slowest=sorted(colophon.seconds.items(), key=lambda pair: -pair[1]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def count(chapter: Chapter) -> Mapping[str, tuple[int, int]]:
    """Return (met, all) of the hard and of the soft criteria."""
    sides = {
        "hard": [one for one in chapter.criteria if one.hard],
        "soft": [one for one in chapter.criteria if not one.hard],
    }
    return {side: (sum(one.holds for one in some), len(some)) for side, some in sides.items()}


def failed(chapter: Chapter) -> Sequence[Criterion]:
    """Return the hard criteria that do not hold."""
    return [one for one in chapter.criteria if one.hard and not one.holds]
