"""The report's table as plain text, for a terminal."""

from collections.abc import Sequence

from pilotfish.evaluation.report import Report, SettingResult

_HEAD = ("setting", "reward", "win + ½ tie", "KL", "tokens", "bad", "tokens/s", "forwards/token")


def as_table(report: Report) -> str:
    """Return one line per setting; wins are against the report's reference."""
    return aligned([_HEAD, *(_row(result, report) for result in report.results)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines, the first of them as a head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _row(result: SettingResult, report: Report) -> tuple[str, ...]:
    metrics = result.metrics
    versus = metrics.versus.get(report.reference)
    return (
        result.setting.name,
        "-" if metrics.reward is None else str(metrics.reward),
        "-" if versus is None else f"{versus.win_rate:.0%}",
        f"{metrics.kl.mean:.2f}",
        f"{metrics.length.mean:.1f}",
        f"{metrics.bad_share:.1%}",
        f"{metrics.tokens_per_second:.0f}",
        f"{metrics.forwards_per_token:.2f}",
    )
