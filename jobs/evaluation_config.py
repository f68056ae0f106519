"""What an evaluation is told: models, prompts, settings to compare, the judge, and the actors."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Tag,
)
from pydantic import model_validator as validates

from jobs.cluster import check_root
from jobs.config import TrackingConfig, rows_kind
from pilotfish.config import Config
from pilotfish.data.loading import Part
from pilotfish.data.sources import DataSource
from pilotfish.errors import ConfigError
from pilotfish.evaluation.rewards import ModelRewardConfig, RewardConfig
from pilotfish.evaluation.settings import Setting, with_controls
from pilotfish.models.loading import Dtype


class KitchenPrompts(Config):
    """Questions of the miniature world."""

    source: Literal["kitchen"]
    num: int = Field(default=500, ge=2)
    seed: NonNegativeInt = 1001
    """Not the one of a training set: a question would be known."""


class RowPrompts(DataSource):
    """The prompts of files or of a hub set, in the section that training was given."""

    part: Part = "heldout"
    num: int | None = Field(default=None, ge=2)
    """At most so many, the first in the order of the source."""
    max_tokens: PositiveInt | None = None
    """Prompts of more tokens are left out and counted."""


PromptsConfig = Annotated[
    Annotated[KitchenPrompts, Tag("kitchen")] | Annotated[RowPrompts, Tag("rows")],
    Discriminator(rows_kind),
]


class DecodingConfig(Config):
    """How answers are decoded, and on what."""

    max_tokens: PositiveInt = 256
    stop: tuple[str, ...] = ()
    dtype: Dtype = "auto"
    batch_size: PositiveInt = 64
    """Answers that one actor decodes at a time."""
    chunk_size: PositiveInt = 128
    """Answers handed to an actor at once. Numbers may depend on it in their last digits, as any
    batch size does; never on the number of actors."""
    num_actors: PositiveInt = 1
    threads: PositiveInt = 1
    """CPU threads per actor."""
    gpus_per_actor: NonNegativeFloat = 0


class EvaluationConfig(Config):
    """One evaluation."""

    root: str = "runs"
    """Folder of everything jobs write; on a cluster, one that every node sees."""
    output: str
    """Folder of the report."""
    title: str = "Evaluation"
    base: str
    """Folder or hub id."""
    guides: dict[str, str] = Field(default_factory=dict)
    """Guide folder by name."""
    prompts: PromptsConfig
    reward: RewardConfig
    settings: tuple[Setting, ...] = Field(min_length=1)
    """What to compare; the controls come by themselves."""
    seed: NonNegativeInt = 1
    decoding: DecodingConfig = DecodingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @validates(mode="after")
    def _check_settings(self) -> Self:
        for setting in self.settings:
            unknown = [name for name in setting.guides if name not in self.guides]
            if unknown:
                known = ", ".join(self.guides) or "none"
                raise ValueError(
                    f"setting {setting.name!r} uses guide {unknown[0]!r}, which is not among the "
                    f"guides ({known})"
                )
        with_controls(self.settings)
        return self


def resolved(config: EvaluationConfig) -> EvaluationConfig:
    """Return the config with absolute paths and with the controls among its settings."""
    root = check_root(config.root)
    output = Path(config.output).expanduser()
    if not output.is_absolute() and not output.resolve().is_relative_to(root):
        raise ConfigError(
            f"output is {config.output!r}, which is outside root {str(root)!r}. Write it as "
            "${root}/name, or give an absolute path."
        )
    prompts, reward = config.prompts, config.reward
    if isinstance(prompts, RowPrompts):
        paths = (prompts.path,) if isinstance(prompts.path, str) else prompts.path
        prompts = prompts.model_copy(update={"path": tuple(_absolute(path) for path in paths)})
    if isinstance(reward, ModelRewardConfig):
        reward = reward.model_copy(update={"path": _absolute(reward.path)})
    return config.model_copy(
        update={
            "root": str(root),
            "output": str(output.resolve()),
            "base": _absolute(config.base),
            "guides": {name: _absolute(folder) for name, folder in config.guides.items()},
            "prompts": prompts,
            "reward": reward,
            "settings": with_controls(config.settings),
        }
    )


def _absolute(path: str) -> str:
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path
