"""What jobs that make rows are told: answers of a base, and an Aligner's corrections of answers."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag
from pydantic import model_validator as validates

from jobs.config import rows_kind
from jobs.decoding_config import DecodingJobConfig, check_guide_names, with_paths
from jobs.output import OutputConfig, with_output
from jobs.paths import absolute, judged_by, located
from jobs.pool import ActorsConfig
from jobs.resolve import identity
from pilotfish.config import Config
from pilotfish.data.loading import Part
from pilotfish.data.sources import DataSource
from pilotfish.evaluation.rewards import ModelRewardConfig, NoRewardConfig, RewardConfig
from pilotfish.evaluation.settings import Sampling, Setting


class RowsConfig(OutputConfig):
    """A job that makes a folder of rows."""

    force: bool = False
    """Make the rows again although `output` exists."""


class AnswerConfig(DecodingJobConfig, RowsConfig):
    """Answers of a base, with guides or without, to prompts."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Weight by guide name, in the order of tilting; empty is the base alone."""
    sampling: Sampling = Sampling()
    num_answers: PositiveInt = 1
    """Answers to each prompt, each with a seed of its own."""
    reward: RewardConfig = NoRewardConfig()
    """A judge, whose rewards are written beside the answers. With several answers to a prompt it
    also makes preference pairs: the best of them over the worst."""

    @validates(mode="after")
    def _check_weights(self) -> Self:
        check_guide_names([self.setting], self.guides)
        return self

    @property
    def setting(self) -> Setting:
        name = ":".join(["base", *self.weights])
        return Setting(name=name, guides=self.weights, **self.sampling.model_dump())


class KitchenAnswers(Config):
    """Logged answers of the miniature world (`pilotfish.world.corpus`)."""

    source: Literal["kitchen"]
    num: PositiveInt = 500
    seed: NonNegativeInt = 1001


class RowAnswers(DataSource):
    """The prompts and answers of files or of a hub set: of preferences, the chosen side."""

    part: Part = "train"
    """Without `holdout` this is all of them."""


class CorrectConfig(RowsConfig):
    """Corrections of answers by an Aligner."""

    aligner: str
    """Guide folder."""
    answers: Annotated[
        Annotated[KitchenAnswers, Tag("kitchen")] | Annotated[RowAnswers, Tag("rows")],
        Discriminator(rows_kind),
    ]
    reward: RewardConfig = NoRewardConfig()
    """A judge of both the answers and the corrections: says whether the Aligner still helps."""
    actors: ActorsConfig = Field(default_factory=ActorsConfig)


def resolved_answer(config: AnswerConfig) -> AnswerConfig:
    """Return the config with absolute paths. Raises `ConfigError`."""
    return with_paths(config)


def resolved_correct(config: CorrectConfig) -> CorrectConfig:
    """Return the config with absolute paths. Raises `ConfigError`."""
    return with_output(config).model_copy(
        update={
            "aligner": absolute(config.aligner),
            "answers": located(config.answers),
            "reward": judged_by(config.reward),
        }
    )


def reward_identity(reward: RewardConfig) -> dict[str, object]:
    """Return what a hash should know of a judge: a trained one counts by its training."""
    content = reward.model_dump(mode="json")
    if isinstance(reward, ModelRewardConfig):
        content["path"] = identity(reward.path)
    return content
