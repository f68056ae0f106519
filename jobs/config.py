"""What a training job is told: model, objective, data, optimizer, workers and tracking."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)
from pydantic import model_validator as validates

from jobs.rollout_config import RolloutConfig
from jobs.sharding_rules import FrozenBaseConfig
from pilotfish.config import Config
from pilotfish.data.collate import LengthLimits
from pilotfish.data.sources import DataSource
from pilotfish.train import deepspeed_config
from pilotfish.train.config import TrainConfig
from pilotfish.train.objectives import OBJECTIVES, SupervisedConfig
from pilotfish.train.reward_learning import REWARD_LEARNING, RewardLearningConfig
from pilotfish.train.sac import SACConfig


class BPEConfig(Config):
    """A byte-level BPE trained on the training rows."""

    vocab_size: PositiveInt = 2048


# Adam on networks of a few thousand numbers, in one process, without DeepSpeed.
_READ_BY_SAC = frozenset(
    [
        *("steps", "batch_size", "learning_rate"),
        *("log_every", "eval_every", "checkpoint_every", "num_to_keep"),
    ]
)


class LoRA(Config):
    """Low-rank adapters in place of whole weights; they are merged when the model is written.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    """The adapter's output counts `alpha / rank` times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Names of the linear layers that get an adapter."""


class ModelConfig(Config):
    """What the weights start from."""

    init: str | dict[str, Any]
    """A model folder or hub id to start from, or an architecture to start from nothing: the fields
    of a transformers config, with `model_type`. Vocabulary and special ids come by themselves."""
    tokenizer: str | BPEConfig | None = None
    """`kitchen`, a folder or hub id, or a BPE to train. Default: the one beside `init`."""
    base: str | None = None
    """The base a guide is for, as its card will name it. Default: `init`."""
    lora: LoRA | None = None
    """Train adapters alone; needs the package peft."""

    @validates(mode="after")
    def _check_tokenizer(self) -> Self:
        if isinstance(self.init, dict) and self.tokenizer is None:
            raise ValueError("init is an architecture, so tokenizer must say how text becomes ids")
        if isinstance(self.init, dict) and "model_type" not in self.init:
            raise ValueError("init is an architecture without model_type (such as llama)")
        if isinstance(self.init, dict) and self.lora is not None:
            raise ValueError(
                "init is an architecture, and adapters on untrained weights learn "
                "nothing. Give a model folder as init, or leave lora out"
            )
        return self


class KitchenData(Config):
    """Rows of the miniature world (`pilotfish.world`): its corpus, or pairs of its answers."""

    source: Literal["kitchen"]
    num: PositiveInt
    seed: NonNegativeInt = 1
    objective: Literal["sum", "helpful", "harmless"] = "sum"
    noise: NonNegativeFloat = 0.7
    num_heldout: PositiveInt = 300
    heldout_seed: NonNegativeInt = 2
    heldout_noise: NonNegativeFloat = 0.0
    """0: held-out pairs are labelled by the true reward."""
    limits: LengthLimits = LengthLimits(max_length=128)


class RowsData(DataSource):
    """Rows of files or of a hub set; `holdout` of them are evaluated on."""

    limits: LengthLimits = LengthLimits()


def rows_kind(value: Any) -> str:
    """Return the tag of a section about rows: only that of the kitchen has a `source`."""
    fields = value if isinstance(value, Mapping) else type(value).model_fields
    return "kitchen" if "source" in fields else "rows"


DataConfig = Annotated[
    Annotated[KitchenData, Tag("kitchen")] | Annotated[RowsData, Tag("rows")],
    Discriminator(rows_kind),
]


class Scaling(Config):
    """The worker group, in Ray Train's words."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Or `[min, max]`: the group has as many workers as the cluster has room for, and starts again
    from the last checkpoint when that changes. A node that is lost counts as a failure."""
    resize_every: PositiveFloat = 60.0
    """Seconds between looks for room, where `num_workers` is a range."""
    workers_per_node: PositiveInt | None = None
    """For what must fit a node, such as a tensor group. Default: all are on one."""
    use_gpu: bool = False
    resources_per_worker: dict[str, float] | None = None
    threads: PositiveInt = 1
    """CPU threads per worker."""
    max_failures: int = 0
    """How often to restart the workers from the last checkpoint when one dies; -1: always."""

    @property
    def sizes(self) -> range:
        """The numbers of workers that the group may have."""
        if isinstance(self.num_workers, int):
            return range(self.num_workers, self.num_workers + 1)
        return range(self.num_workers[0], self.num_workers[1] + 1)

    @property
    def max_workers(self) -> int:
        return self.sizes[-1]

    @validates(mode="after")
    def _check_range(self) -> Self:
        if not self.sizes:
            raise ValueError(f"num_workers is {self.num_workers}, wanted [min, max]")
        return self


class TrackingConfig(Config):
    """Where the run is recorded in MLflow."""

    enabled: bool = True
    uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else an SQLite file under the root."""
    experiment: str | None = None
    """Default: MLFLOW_EXPERIMENT_NAME, else `pilotfish`."""
    register_as: str | None = None
    """Name in the model registry; nothing is registered without one."""
    alias: str = "champion"
    """Moved to the version that this run registers."""
    parent: str | None = None
    """Id of a run that this one is shown under."""


class TrainTracking(TrackingConfig):
    """What is recorded of a training."""

    system_metrics_every: NonNegativeInt = 10
    """Seconds between looks at the load of the workers' machines; 0: none."""


class JobConfig(Config):
    """One training job: what it trains on and where the result goes."""

    root: str = "runs"
    """Folder of everything jobs write; on a cluster, one that every node sees."""
    output: str
    """The model or guide folder to write."""
    seed: NonNegativeInt = 0
    model: ModelConfig | None = None
    """What is trained; none for a proxy, which is made of its settings."""
    objective: Annotated[SupervisedConfig | RewardLearningConfig, Field(discriminator="kind")]
    base: FrozenBaseConfig | None = None
    """The frozen base, for objectives that ask it while they learn. Default: `model.base`, or what
    the training starts from."""
    rollout: RolloutConfig | None = None
    """For objectives that learn from reward."""
    data: DataConfig
    train: TrainConfig
    scaling: Scaling = Scaling()
    tracking: TrainTracking = TrainTracking()
    force: bool = False
    """Train again although `output` exists."""

    @property
    def learns_from_reward(self) -> bool:
        """Whether prompts are answered and judged; else rows are learned from."""
        return isinstance(self.objective, REWARD_LEARNING)

    @property
    def frozen_base(self) -> FrozenBaseConfig:
        """The base beside what is trained: by default what the training starts from."""
        base = FrozenBaseConfig() if self.base is None else self.base
        if base.path is None and self.model is not None:
            start = self.model.init if isinstance(self.model.init, str) else None
            return base.model_copy(update={"path": self.model.base or start})
        return base

    @property
    def base_name(self) -> str:
        """What the card of a guide names as its base."""
        if self.model is None:
            return self.frozen_base.path or ""
        return self.model.base or str(self.model.init)

    @property
    def started(self) -> ModelConfig:
        """What the training starts from, of an objective that trains a model."""
        assert self.model is not None, "the validator saw it"
        return self.model

    @property
    def rollouts(self) -> RolloutConfig:
        """How completions are made, of an objective that learns from reward."""
        assert self.rollout is not None, "the validator saw it"
        return self.rollout

    @property
    def num_cpus(self) -> int:
        """Threads of the workers, and of the actors that roll out for them."""
        num_workers, threads = self.scaling.max_workers, self.scaling.threads
        if self.rollout is not None:
            threads += self.rollout.actors_per_worker(num_workers) * self.rollout.threads
        return num_workers * threads

    @property
    def guide_kind(self) -> str | None:
        """The key in `pilotfish.guides.GUIDES` of what is trained; None for a base model."""
        if isinstance(self.objective, REWARD_LEARNING):
            return self.objective.guide_kind
        return OBJECTIVES[self.objective.kind].guide_kind

    def card_fields(self, report: Mapping[str, float]) -> dict[str, Any]:
        """Return what a guide's card says of its kind, after the last report."""
        if isinstance(self.objective, REWARD_LEARNING):
            return self.objective.card_fields()
        return OBJECTIVES[self.objective.kind].card(self.objective, report)

    @property
    def needs_base(self) -> bool:
        """Whether a frozen base is at hand while this objective learns."""
        if isinstance(self.objective, REWARD_LEARNING):
            return True
        return OBJECTIVES[self.objective.kind].needs_base(self.objective)

    @validates(mode="after")
    def _check_deepspeed(self) -> Self:
        # Steps that follow from the number of rows are not known yet; nothing else depends on them.
        train = self.train
        if self.learns_from_reward:  # passes are over completions, of which there are more
            train = train.model_copy(update={"micro_batch_size": None})
        for num_workers in self.scaling.sizes:
            launch = deepspeed_config.Launch(
                total_steps=self.train.steps or 1,
                num_workers=num_workers,
                on_cpu=not self.scaling.use_gpu,
            )
            deepspeed_config.resolve(train, launch)
        return self

    @validates(mode="after")
    def _check_parts(self) -> Self:
        """Every section that is given is needed, and every one that is needed is given."""
        kind = self.objective.kind
        sections: dict[str, tuple[Any, bool]] = {
            "model": (self.model, kind != "proxy"),
            "rollout": (self.rollout, self.learns_from_reward),
        }
        for name, (section, wanted) in sections.items():
            if (section is not None) != wanted:
                what = "needs this section" if wanted else "has no use for this section"
                raise ValueError(f"{name}: the objective {kind!r} {what}")
        if (
            self.model is not None
            and self.model.lora
            and getattr(self.objective, "length_check", None)
        ):
            raise ValueError(
                "objective.length_check cannot decode with adapters. Leave it or "
                "model.lora out, and compare lengths in an evaluation"
            )
        by_actors = self.rollout is not None and self.rollout.where == "actors"
        if by_actors and self.frozen_base.sharding != "none":
            raise ValueError(
                f"base.sharding: {self.frozen_base.sharding}, but rollout.where is actors, each of "
                "which holds a whole base. Set where: workers, or sharding: none"
            )
        if self.rollout is not None and self.train.steps is None:
            raise ValueError(
                "train.epochs: learning from reward counts iterations; set train.steps"
            )
        if self.base is not None and not self.needs_base:
            raise ValueError(f"base: the objective {kind!r} has no use for this section")
        if self.needs_base and self.frozen_base.path is None:
            raise ValueError(
                f"base: the objective {kind!r} learns beside a frozen base, and nothing names "
                "one. Set base.path"
            )
        return self

    @validates(mode="after")
    def _check_sac(self) -> Self:
        if not isinstance(getattr(self.objective, "algorithm", None), SACConfig):
            return self
        if self.scaling.max_workers > 1:
            raise ValueError(
                "scaling.num_workers: SAC has one learner and its replay; set 1, and "
                "rollout.where: actors to decode on more"
            )
        given = {
            **self.train.model_dump(),
            "deepspeed": deepspeed_config.read(self.train.deepspeed),
        }
        default = {name: field.default for name, field in TrainConfig.model_fields.items()}
        default["deepspeed"] = deepspeed_config.default_config(0)
        # By value: a config that was printed and is read again states its defaults.
        differs = {name for name, value in given.items() if value != default[name]}
        ignored = sorted(differs - _READ_BY_SAC)
        if ignored:
            raise ValueError(
                f"train.{ignored[0]}: SAC has an optimizer of its own, which reads of train only "
                f"{', '.join(sorted(_READ_BY_SAC))}. Leave it out"
            )
        return self
