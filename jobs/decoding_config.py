"""What jobs that decode are told: a base with guides, prompts, a judge, and the actors."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag

from jobs.config import rows_kind
from jobs.output import OutputConfig, with_output
from jobs.paths import absolute, judged_by, located
from jobs.pool import ActorsConfig
from pilotfish.config import Config
from pilotfish.data.loading import Part
from pilotfish.data.sources import DataSource
from pilotfish.errors import ConfigError
from pilotfish.evaluation.rewards import RewardConfig
from pilotfish.evaluation.settings import Setting


class KitchenPrompts(Config):
    """Questions of the miniature world."""

    source: Literal["kitchen"]
    num: int = Field(default=500, ge=2)
    seed: NonNegativeInt = 1001
    """Not the one of a training set: a question would be known."""
    skip: NonNegativeInt = 0
    """So many come before the first."""


class RowPrompts(DataSource):
    """The prompts of files or of a hub set, in the section that training was given."""

    part: Part = "heldout"
    num: int | None = Field(default=None, ge=2)
    """At most so many, the first in the order of the source."""
    skip: NonNegativeInt = 0
    """So many come before the first."""
    max_tokens: PositiveInt | None = None
    """Prompts of more tokens are left out and counted."""


PromptsConfig = Annotated[
    Annotated[KitchenPrompts, Tag("kitchen")] | Annotated[RowPrompts, Tag("rows")],
    Discriminator(rows_kind),
]


class DecodingConfig(ActorsConfig):
    """How answers are decoded, and on what."""

    max_tokens: PositiveInt = 256
    stop: tuple[str, ...] = ()


GuideSource: TypeAlias = str | dict[str, Any]
"""A guide folder, or the fields of a card over models that lie elsewhere:
`{kind: best_of_n, settings: {reward: FOLDER}}`."""


class DecodingJobConfig(OutputConfig):
    """A job in which a base with guides answers prompts, and a judge may say what that is worth."""

    base: str
    """Folder or hub id."""
    guides: dict[str, GuideSource] = Field(default_factory=dict)
    """By name."""
    prompts: PromptsConfig
    reward: RewardConfig
    seed: NonNegativeInt = 1
    decoding: DecodingConfig = DecodingConfig()


J = TypeVar("J", bound=DecodingJobConfig)


def with_paths(config: J) -> J:
    """Return the config with absolute paths everywhere. Raises `ConfigError`."""
    return with_output(config).model_copy(
        update={
            "base": absolute(config.base),
            "guides": {name: _with_paths(source) for name, source in config.guides.items()},
            "prompts": located(config.prompts),
            "reward": judged_by(config.reward),
        }
    )


def _with_paths(source: Any) -> Any:
    """Return a guide's source with absolute paths, at any depth of a card's fields."""
    if isinstance(source, dict):
        return {key: _with_paths(value) for key, value in source.items()}
    return absolute(source)


def check_guide_names(settings: Sequence[Setting], guides: Mapping[str, GuideSource]) -> None:
    """Raise `ConfigError` for a setting with a guide that has no folder."""
    for setting in settings:
        unknown = [name for name in setting.guides if name not in guides]
        if unknown:
            known = ", ".join(guides) or "none"
            raise ConfigError(
                f"setting {setting.name!r} uses guide {unknown[0]!r}, which is not among the "
                f"guides ({known})"
            )
