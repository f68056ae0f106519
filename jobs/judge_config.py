"""What a judge is told: whose answers it compares, in which words, and where it is."""

from typing import Self

from pydantic import Field, NonNegativeInt
from pydantic import model_validator as validates

from jobs.judge_endpoint import EndpointConfig
from jobs.output import OutputConfig, with_output
from jobs.paths import absolute
from pilotfish.config import Config
from pilotfish.evaluation.judge import find_template


class Contestant(Config):
    """The answers of one setting of an evaluation."""

    report: str
    """Folder that `jobs.evaluate` wrote."""
    setting: str
    """The setting's name in it."""


class JudgeConfig(OutputConfig):
    """One comparison by a judge; `output` is the folder of its verdicts and of all replies."""

    title: str = "Judged"
    contestants: dict[str, Contestant]
    """By the names that `pairs` uses. All answered the same prompts."""
    pairs: tuple[tuple[str, str], ...] = Field(min_length=1)
    """Who is compared with whom; wins and losses are those of the first."""
    num: int | None = Field(default=None, ge=2)
    """The first so many prompts. Default: all."""
    template: str = "hh"
    """What the judge is asked: an id of `pilotfish.evaluation.judge.TEMPLATES`, or a file."""
    cut_at: tuple[str, ...] = ("###Human:", "\n\nHuman:")
    """An answer is judged up to the first of these."""
    endpoint: EndpointConfig
    seed: NonNegativeInt = 1
    """Of the bootstrap."""

    @validates(mode="after")
    def _check_pairs(self) -> Self:
        unknown = [name for pair in self.pairs for name in pair if name not in self.contestants]
        if unknown:
            known = ", ".join(self.contestants)
            raise ValueError(f"pairs names {unknown[0]!r}, which is no contestant ({known})")
        sides = [frozenset(pair) for pair in self.pairs]
        if any(len(one) < 2 or sides.count(one) > 1 for one in sides):
            raise ValueError(
                "pairs compares somebody with themselves, or two with each other twice; both "
                "orders are asked anyway"
            )
        return self


def resolved(config: JudgeConfig) -> JudgeConfig:
    """Return the config with absolute paths. Raises `ConfigError`."""
    find_template(config.template)
    contestants = {
        name: one.model_copy(update={"report": absolute(one.report)})
        for name, one in config.contestants.items()
    }
    return with_output(config).model_copy(
        update={"contestants": contestants, "template": absolute(config.template)}
    )
