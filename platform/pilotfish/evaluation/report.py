"""The report of an evaluation: typed, saved as files, and read back as it was.

report.json     settings, metrics, warnings, and the config they came from
answers.jsonl   one line per prompt: every setting's answer, its reward, and the reasons
report.html     the same for people; see `pilotfish.evaluation.page`
*.png           the plots in it
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pilotfish.config import Config
from pilotfish.errors import DataError
from pilotfish.evaluation.metrics import Comparison, Estimate
from pilotfish.evaluation.rewards import Reason
from pilotfish.evaluation.settings import Setting, tracker_name

REPORT_NAME = "report.json"
ANSWERS_NAME = "answers.jsonl"


class Answer(Config):
    """One answer, and what the judge said about it."""

    text: str
    num_tokens: int
    """Tokens drawn, the end token included."""
    finish_reason: str
    kl: float
    """Sum over its tokens of KL(guided || base), before temperature and truncation; nats."""
    reward: float | None = None
    parts: dict[str, float] = Field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    bad: bool


class Metrics(Config):
    """All numbers about one setting."""

    num_answers: int
    reward: Estimate | None
    parts: dict[str, Estimate]
    versus: dict[str, Comparison]
    """By the name of the setting compared with; without a reward there is none."""
    length: Estimate
    """Tokens per answer, the end token included."""
    kl: Estimate
    """Per answer; see `Answer.kl`."""
    kl_per_token: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    unique: float
    """Share of answers that no other prompt got word for word."""
    bad_share: float
    tokens_per_second: float
    """Of one decoder: tokens drawn by the seconds that decoding them took."""
    forwards_per_token: float
    """Model forwards over one token, of base and guides, per token drawn."""

    def flat(self) -> dict[str, float]:
        """Return every number under one dotted name each, as metric trackers want them."""
        numbers: dict[str, float] = {}
        _flatten(self.model_dump(), "", numbers)
        return {tracker_name(name): value for name, value in numbers.items()}


class SettingResult(Config):
    """A setting and what came of it."""

    setting: Setting
    metrics: Metrics
    answers: tuple[Answer, ...]
    """In the order of the report's prompts."""


class Report(Config):
    """Everything an evaluation found."""

    title: str
    created: str
    base: str
    guides: dict[str, str]
    prompts_from: str
    reward: str
    reference: str
    """The setting that wins and ties are counted against: the sampled base."""
    prompts: tuple[str | tuple[dict[str, str], ...], ...]
    results: tuple[SettingResult, ...]
    warnings: tuple[str, ...]
    run_id: str | None = None
    config: dict[str, Any]

    def result(self, name: str) -> SettingResult:
        """Return the result of the setting with this name; `KeyError` if there is none."""
        for result in self.results:
            if result.setting.name == name:
                return result
        raise KeyError(name)

    def best(self) -> SettingResult | None:
        """Return the guided setting of highest mean reward; None without guides or a reward."""
        guided = [
            (result.metrics.reward.mean, result)
            for result in self.results
            if result.metrics.reward is not None and not result.setting.is_base
        ]
        return max(guided, key=lambda entry: entry[0])[1] if guided else None

    def hardest_control(self, name: str) -> tuple[str, Comparison] | None:
        """Return the control that a setting beats by least; None if it was compared with none."""
        versus = self.result(name).metrics.versus
        return min(versus.items(), key=lambda entry: entry[1].gain) if versus else None

    def metrics(self) -> dict[str, float]:
        """Return every number of the report as `setting/metric`."""
        return {
            f"{tracker_name(result.setting.name)}/{name}": value
            for result in self.results
            for name, value in result.metrics.flat().items()
        }


def save_report(report: Report, folder: str | Path) -> None:
    """Write `report.json` and `answers.jsonl`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ANSWERS_NAME).open("w", encoding="utf-8") as lines:
        for number, prompt in enumerate(report.prompts):
            answers = {
                result.setting.name: result.answers[number].model_dump(mode="json")
                for result in report.results
            }
            row = {"prompt": prompt, "answers": answers}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    numbers = report.model_dump(mode="json", exclude={"prompts": True})
    for result in numbers["results"]:
        del result["answers"]
    text = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")


def load_report(folder: str | Path) -> Report:
    """Read a report folder back. Raises `DataError` if it holds none."""
    folder = Path(folder)
    try:
        numbers = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        lines = (folder / ANSWERS_NAME).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        for result in numbers["results"]:
            name = result["setting"]["name"]
            result["answers"] = [row["answers"][name] for row in rows]
        return Report.model_validate({**numbers, "prompts": [row["prompt"] for row in rows]})
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise DataError(
            f"{str(folder)!r} holds no whole evaluation report: {error}. Make one with "
            "python -m jobs.evaluate."
        ) from error


def _flatten(tree: Mapping[str, Any], prefix: str, numbers: dict[str, float]) -> None:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}{name}.", numbers)
        elif value is not None:
            numbers[prefix + name] = value
