"""What multi-round alignment is told, and the ordinary jobs that each round of it consists of."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic import model_validator as validates

from jobs.config import JobConfig, TrackingConfig
from jobs.decoding_config import DecodingConfig, PromptsConfig
from jobs.output import OutputConfig, with_output
from jobs.paths import absolute, judged_by, located
from jobs.pool import ActorsConfig
from jobs.resolve import content_hash, identity
from jobs.rows import PAIRS_NAME, ROWS_NAME
from jobs.rows_config import AnswerConfig, CorrectConfig, RowAnswers, reward_identity
from pilotfish import config as configs
from pilotfish.config import Config
from pilotfish.evaluation.rewards import NoRewardConfig, RewardConfig
from pilotfish.evaluation.settings import Sampling

REWARD_FOLDER = "reward_model"
_NOT_TRACKED = TrackingConfig(enabled=False)


class AlignerPairs(Config):
    """Pairs of an answer and what an Aligner made of it."""

    kind: Literal["aligner"] = "aligner"
    aligners: tuple[str, ...] = Field(min_length=1)
    """Guide folders: one for all rounds, or one for each. An Aligner was taught on answers of some
    model, and the rounds move away from it: `corrections/gain` says whether it still helps."""
    actors: ActorsConfig = ActorsConfig()


class SelfPairs(Config):
    """Pairs of the best and the worst of several answers: the control, without any Aligner."""

    kind: Literal["self"] = "self"
    num_answers: int = Field(default=8, ge=2)
    reward: RewardConfig
    """What picks them: a reward model, and not the gold reward."""


class MonitorConfig(Config):
    """What each round is judged by."""

    prompts: PromptsConfig
    """The same for every round, and none that the rounds learn from."""
    reward: RewardConfig
    """The gold reward: not the one that anything here was trained on."""
    patience: PositiveInt = 1
    """Stop when so many rounds in a row fall below the best one by more than their standard
    error."""


class RoundsConfig(OutputConfig):
    """Multi-round alignment; `output` is the folder of the best round's model."""

    base: str
    """The model to start from: a folder or a hub id."""
    num_rounds: PositiveInt = 3
    prompts: PromptsConfig
    """`num` of them for every round: the first round has the first `num`, and so on."""
    pairs: Annotated[AlignerPairs | SelfPairs, Field(discriminator="kind")]
    sampling: Sampling = Sampling()
    """How answers are drawn, in the rounds and for the monitor."""
    seed: NonNegativeInt = 1
    decoding: DecodingConfig = DecodingConfig()
    training: dict[str, Any]
    """A config of `jobs.train` (objective, train, scaling, ...) without what each round fills in:
    root, output, tracking, `model.init` and `data.path`. `data.holdout` is a tenth by default."""
    reward_training: dict[str, Any] | None = None
    """The same for the reward model of a round, taught by the pairs of the round and started from
    its model: what `training` learns from where that is PPO, as its `rollout.rewards`, and what
    its critic starts from by default."""
    monitor: MonitorConfig
    force: bool = False
    """Start over, although there are finished rounds or an output."""

    @validates(mode="after")
    def _check_rounds(self) -> Self:
        if self.prompts.num is None:
            raise ValueError("prompts.num is missing: it says how many prompts a round has")
        if isinstance(self.pairs, AlignerPairs):
            num = len(self.pairs.aligners)
            if num not in (1, self.num_rounds):
                raise ValueError(
                    f"pairs.aligners has {num} folders, wanted one for all of the "
                    f"{self.num_rounds} rounds, or one for each"
                )
        elif isinstance(self.pairs.reward, NoRewardConfig):
            raise ValueError("pairs.reward is none, so nothing says which answer is the best")
        if isinstance(self.monitor.reward, NoRewardConfig):
            raise ValueError("monitor.reward is none, so nothing says when to stop")
        return self

    @validates(mode="after")
    def _check_training(self) -> Self:
        filled = ["root", "output", "tracking", "force", "model.init", "data.path"]
        if self.reward_training is not None:
            filled.append("rollout.rewards")
        for section, template in (
            ("training", self.training),
            ("reward_training", self.reward_training or {}),
        ):
            if given := [name for name in filled if _has(template, name)]:
                raise ValueError(f"{section}.{given[0]} is what a round fills in. Leave it out")
        job = training_job(self, Path("round"), self.base, parent=None)
        if job.guide_kind is not None:
            raise ValueError(
                f"training.objective.kind is {job.objective.kind!r}, which trains a guide, but a "
                "round trains the model that answers in the next one: dpo, ppo or sft"
            )
        if job.learns_from_reward != (self.reward_training is not None):
            raise ValueError(
                "reward_training is for a training that learns from reward, and such a training "
                f"learns from the pairs through it alone; training is {job.objective.kind!r}"
            )
        if self.reward_training is not None:
            reward_job(self, Path("round"), self.base, parent=None)
        return self


def resolved(config: RoundsConfig) -> RoundsConfig:
    """Return the config with absolute paths. Raises `ConfigError`."""
    pairs, monitor = config.pairs, config.monitor
    if isinstance(pairs, AlignerPairs):
        aligners = tuple(absolute(folder) for folder in pairs.aligners)
        pairs = pairs.model_copy(update={"aligners": aligners})
    else:
        pairs = pairs.model_copy(update={"reward": judged_by(pairs.reward)})
    monitor = monitor.model_copy(
        update={"prompts": located(monitor.prompts), "reward": judged_by(monitor.reward)}
    )
    return with_output(config).model_copy(
        update={
            "base": absolute(config.base),
            "prompts": located(config.prompts),
            "pairs": pairs,
            "monitor": monitor,
        }
    )


def rounds_hash(config: RoundsConfig) -> str:
    """Return a hash of what decides the rounds, for a resolved config; not of how many there are.

    What trained models are is told by their own hashes, as in `jobs.resolve.config_hash`.
    """
    included = {"seed", "prompts", "sampling", "training", "reward_training"}
    content = config.model_dump(mode="json", include=included)
    for template in (content["training"], content["reward_training"] or {}):
        template.pop("scaling", None)
    content["base"] = identity(config.base)
    content["decoding"] = config.decoding.decisive()
    content["monitor"] = [
        config.monitor.prompts.model_dump(mode="json"),
        reward_identity(config.monitor.reward),
    ]
    if isinstance(config.pairs, AlignerPairs):
        aligners = [identity(folder) for folder in config.pairs.aligners]
        content["pairs"] = [aligners, config.pairs.actors.decisive()]
    else:
        content["pairs"] = [config.pairs.num_answers, reward_identity(config.pairs.reward)]
    return content_hash(content)


def answer_job(config: RoundsConfig, folder: Path, number: int, model: str) -> AnswerConfig:
    """Return the job that has the model of the round before answer the prompts of this one."""
    assert config.prompts.num is not None, "the validator asks for it"
    skip = config.prompts.skip + (number - 1) * config.prompts.num
    several: dict[str, Any] = {}
    if isinstance(config.pairs, SelfPairs):
        several = {"num_answers": config.pairs.num_answers, "reward": config.pairs.reward}
    return AnswerConfig(
        root=config.root,
        output=str(folder / "answers"),
        base=model,
        prompts=config.prompts.model_copy(update={"skip": skip}),
        sampling=config.sampling,
        seed=config.seed,
        decoding=config.decoding,
        tracking=_NOT_TRACKED,
        **several,
    )


def correct_job(
    config: RoundsConfig, pairs: AlignerPairs, folder: Path, number: int
) -> CorrectConfig:
    """Return the job that has the Aligner of a round correct those answers."""
    return CorrectConfig(
        root=config.root,
        output=str(folder / "corrections"),
        aligner=pairs.aligners[0 if len(pairs.aligners) == 1 else number - 1],
        # An answer without a word is no answer to correct.
        answers=RowAnswers(path=str(folder / "answers" / ROWS_NAME), bad_rows="skip"),
        reward=config.monitor.reward,
        actors=pairs.actors,
        tracking=_NOT_TRACKED,
    )


def training_job(
    config: RoundsConfig, folder: Path, model: str, *, parent: str | None
) -> JobConfig:
    """Return the job that trains the model of a round; its run is shown under `parent`."""
    tree = _filled(config, config.training, folder, model, parent=parent)
    if config.reward_training is not None:
        reward = str(folder / REWARD_FOLDER)
        rewards = [{"judge": {"kind": "model", "path": reward}}]
        tree["rollout"] = {**tree.get("rollout", {}), "rewards": rewards}
        tree["objective"] = {"critic": reward, **tree["objective"]}
    return configs.parse(JobConfig, {**tree, "output": str(folder / "model")}, source="training")


def reward_job(config: RoundsConfig, folder: Path, model: str, *, parent: str | None) -> JobConfig:
    """Return the job that trains the reward model of a round."""
    assert config.reward_training is not None, "the caller has seen it"
    tree = _filled(config, config.reward_training, folder, model, parent=parent)
    tree["output"] = str(folder / REWARD_FOLDER)
    return configs.parse(JobConfig, tree, source="reward_training")


def _filled(
    config: RoundsConfig, template: dict[str, Any], folder: Path, model: str, *, parent: str | None
) -> dict[str, Any]:
    made = "answers" if isinstance(config.pairs, SelfPairs) else "corrections"
    tracking = config.tracking.model_copy(update={"register_as": None, "parent": parent})
    return {
        **template,
        "root": config.root,
        "model": {**template.get("model", {}), "init": model},
        "data": {
            "holdout": 0.1,
            **template.get("data", {}),
            "path": str(folder / made / PAIRS_NAME),
        },
        "tracking": tracking.model_dump(),
    }


def monitor_job(config: RoundsConfig, folder: Path, model: str) -> AnswerConfig:
    """Return the job that judges the model of a round by its answers to the fixed prompts."""
    return AnswerConfig(
        root=config.root,
        output=str(folder / "monitor"),
        base=model,
        prompts=config.monitor.prompts,
        sampling=config.sampling,
        seed=config.seed,
        reward=config.monitor.reward,
        decoding=config.decoding,
        tracking=_NOT_TRACKED,
    )


def _has(tree: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    if not isinstance(tree, dict) or first not in tree:
        return False
    return _has(tree[first], rest) if rest else True
