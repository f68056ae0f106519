"""A search's report as one self-contained HTML page, and its pictures."""

from pathlib import Path

from pilotfish.evaluation.page import data_uri, page_environment
from tune.choice import bound_of
from tune.plots import draw_plots
from tune.report import SearchReport
from tune.space import show

PAGE_NAME = "search.html"
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(report: SearchReport, folder: str | Path) -> Path:
    """Draw the pictures and write `search.html` with them inside; returns its path."""
    pictures = draw_plots(report, folder)
    first = report.objectives[0]
    shown = [objective.metric for objective in report.objectives]
    shown += [constraint.metric for constraint in report.constraints]
    shown += [name for name in ("bad_share", "kl", "tokens_per_second") if name in report.base]
    ranked = sorted(
        report.trials,
        key=lambda trial: (
            not (trial.complete and trial.is_feasible),
            not trial.complete,
            trial.metrics[first.metric] * (-1 if first.mode == "max" else 1),
        ),
    )
    page = (
        page_environment(_TEMPLATES)
        .get_template("search.html")
        .render(
            report=report,
            first=first,
            shown=list(dict.fromkeys(shown)),
            ranked=ranked,
            bounds={str(one): bound_of(one, report.base) for one in report.constraints},
            show=show,
            pictures=[{"data": data_uri(p.path), "caption": p.caption} for p in pictures],
        )
    )
    path = Path(folder) / PAGE_NAME
    path.write_text(page, encoding="utf-8")
    return path


def report_files(folder: str | Path) -> list[Path]:
    """Return the files of a report, pictures included."""
    suffixes = (".json", ".html", ".png")
    return sorted(path for path in Path(folder).iterdir() if path.suffix in suffixes)
