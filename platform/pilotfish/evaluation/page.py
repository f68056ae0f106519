"""The report as one self-contained HTML page, written for somebody who was not there."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from pilotfish.evaluation.plots import Picture
from pilotfish.evaluation.report import Answer, Report, SettingResult

PAGE_NAME = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
_NUM_SAMPLES = 6


class Sample(NamedTuple):
    """One prompt with the base's answer and the guided one."""

    prompt: str
    before: Answer
    after: Answer


def write_page(report: Report, folder: str | Path, pictures: Sequence[Picture]) -> Path:
    """Write `report.html` with the pictures inside; returns its path."""
    shown = _shown(report)
    page = (
        page_environment(_TEMPLATES)
        .get_template("report.html")
        .render(
            report=report,
            best=report.best(),
            shown=shown,
            judged=report.results[0].metrics.reward is not None,
            parts=list(report.results[0].metrics.parts),
            samples=samples(report, shown),
            pictures=[{"data": data_uri(p.path), "caption": p.caption} for p in pictures],
            numbers=[(result.setting.name, result.metrics.flat()) for result in report.results],
        )
    )
    path = Path(folder) / PAGE_NAME
    path.write_text(page, encoding="utf-8")
    return path


def page_environment(templates: str | Path) -> jinja2.Environment:
    """Return what fills in the templates of a folder, with the filters that pages have."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = _signed
    environment.filters["percent"] = _percent
    return environment


def samples(report: Report, shown: SettingResult | None, num: int = _NUM_SAMPLES) -> list[Sample]:
    """Return the first prompts, not picked ones, with the reference's answers and another's."""
    if shown is None:
        return []
    reference = report.result(report.reference)
    rows = zip(report.prompts, reference.answers, shown.answers, strict=True)
    return [Sample(_as_text(prompt), before, after) for prompt, before, after in list(rows)[:num]]


def _shown(report: Report) -> SettingResult | None:
    """The setting beside the base in the samples: the best guided one, or the first."""
    guided = [result for result in report.results if not result.setting.is_base]
    return report.best() or (guided[0] if guided else None)


def _as_text(prompt: str | tuple[dict[str, str], ...]) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def data_uri(path: Path) -> str:
    """Return a PNG as what an `img` may have as its source."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: Any, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f}%"
