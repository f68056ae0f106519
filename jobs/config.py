"""What a training job is told: model, objective, data, optimizer, workers and tracking."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
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

from jobs.cluster import check_root
from jobs.frozen_base import FrozenBaseConfig
from pilotfish.config import Config
from pilotfish.data.collate import LengthLimits
from pilotfish.data.sources import DataSource
from pilotfish.errors import ConfigError
from pilotfish.train import deepspeed_config
from pilotfish.train.config import TrainConfig
from pilotfish.train.export import read_record
from pilotfish.train.objectives import OBJECTIVES, SupervisedConfig


class BPEConfig(Config):
    """A byte-level BPE trained on the training rows."""

    vocab_size: PositiveInt = 2048


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
    model: ModelConfig
    objective: SupervisedConfig
    base: FrozenBaseConfig | None = None
    """The frozen base, for objectives that ask it while they learn. Default: `model.base`, or what
    the training starts from."""
    data: DataConfig
    train: TrainConfig
    scaling: Scaling = Scaling()
    tracking: TrainTracking = TrainTracking()
    force: bool = False
    """Train again although `output` exists."""

    @property
    def frozen_base(self) -> FrozenBaseConfig:
        """The base beside what is trained: by default what the training starts from."""
        base = FrozenBaseConfig() if self.base is None else self.base
        path = base.path or self.model.base or self.model.init
        return base.model_copy(update={"path": path})

    @validates(mode="after")
    def _check_deepspeed(self) -> Self:
        # Steps that follow from the number of rows are not known yet; nothing else depends on them.
        for num_workers in self.scaling.sizes:
            launch = deepspeed_config.Launch(
                total_steps=self.train.steps or 1,
                num_workers=num_workers,
                on_cpu=not self.scaling.use_gpu,
            )
            deepspeed_config.resolve(self.train, launch)
        return self

    @validates(mode="after")
    def _check_base(self) -> Self:
        if not OBJECTIVES[self.objective.kind].needs_base(self.objective):
            if self.base is not None:
                raise ValueError(
                    f"base is given, but the objective {self.objective.kind!r} asks "
                    "no base while it learns. Leave base out"
                )
        elif not isinstance(self.frozen_base.path, str):
            raise ValueError(
                f"the objective {self.objective.kind!r} learns beside a frozen base, "
                "and nothing names one. Set base.path"
            )
        return self


def resolved(config: JobConfig) -> JobConfig:
    """Return the config with absolute paths and the content of the DeepSpeed file in its place.

    Workers run in other folders, and a record must not depend on a file that changes.
    """
    root = check_root(config.root)
    output = Path(config.output).expanduser()
    if not output.is_absolute() and not output.resolve().is_relative_to(root):
        raise ConfigError(
            f"output is {config.output!r}, which is outside root {str(root)!r}. Write it as "
            "${root}/name, or give an absolute path."
        )
    model = config.model.model_copy(
        update={
            "init": _absolute(config.model.init),
            "tokenizer": _absolute(config.model.tokenizer),
            "base": _absolute(config.model.base),
        }
    )
    base = config.base
    if base is not None:
        base = base.model_copy(update={"path": _absolute(base.path)})
    data = config.data
    if isinstance(data, RowsData):
        paths = (data.path,) if isinstance(data.path, str) else data.path
        data = data.model_copy(update={"path": tuple(_absolute(path) for path in paths)})
    train = config.train.model_copy(
        update={"deepspeed": deepspeed_config.read(config.train.deepspeed)}
    )
    return config.model_copy(
        update={
            "root": str(root),
            "output": str(output.resolve()),
            "model": model,
            "base": base,
            "data": data,
            "train": train,
        }
    )


def config_hash(config: JobConfig) -> str:
    """Return a hash of what decides the weights, for a resolved config.

    Paths of the root and the output, workers and tracking are left out. A folder that is started
    from counts by its own hash, so training the base again makes its guides new.
    """
    content = config.model_dump(
        mode="json", include={"seed", "model", "objective", "data", "train"}
    )
    content["init"] = _identity(config.model.init)
    if OBJECTIVES[config.objective.kind].needs_base(config.objective):
        content["frozen_base"] = _identity(config.frozen_base.path)
    content["model"]["init"] = None
    content["model"]["base"] = None
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _identity(init: str | dict[str, Any] | None) -> Any:
    if isinstance(init, str) and Path(init).is_dir():
        record = read_record(init)
        if record is not None and "config_hash" in record:
            return record["config_hash"]
    return init


def _absolute(value: Any) -> Any:
    if isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value
