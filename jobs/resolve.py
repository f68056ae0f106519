"""A job as it is carried out: absolute paths, files read, and a hash of what decides weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

from jobs.cluster import check_root
from jobs.config import JobConfig, RowsData
from pilotfish.errors import ConfigError
from pilotfish.evaluation.rewards import ModelRewardConfig, RewardConfig
from pilotfish.train import deepspeed_config
from pilotfish.train.export import read_record
from pilotfish.train.reward_learning import PolicyConfig


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
    model = config.model
    if model is not None:
        paths = {name: _absolute(getattr(model, name)) for name in ("init", "tokenizer", "base")}
        model = model.model_copy(update=paths)
    base = config.base
    if base is not None:
        base = base.model_copy(update={"path": _absolute(base.path)})
    data = config.data
    if isinstance(data, RowsData):
        paths = (data.path,) if isinstance(data.path, str) else data.path
        data = data.model_copy(update={"path": tuple(_absolute(path) for path in paths)})
    objective = config.objective
    if isinstance(objective, PolicyConfig) and objective.critic is not None:
        objective = objective.model_copy(update={"critic": _absolute(objective.critic)})
    rollout = config.rollout
    if rollout is not None:
        rewards = tuple(
            term.model_copy(update={"judge": _located(term.judge)}) for term in rollout.rewards
        )
        rollout = rollout.model_copy(update={"rewards": rewards})
    train = config.train.model_copy(
        update={"deepspeed": deepspeed_config.read(config.train.deepspeed)}
    )
    return config.model_copy(
        update={
            "root": str(root),
            "output": str(output.resolve()),
            "model": model,
            "objective": objective,
            "base": base,
            "data": data,
            "rollout": rollout,
            "train": train,
        }
    )


def config_hash(config: JobConfig) -> str:
    """Return a hash of what decides the weights, for a resolved config.

    Paths of the root and the output, workers and tracking are left out. A folder that is started
    from counts by its own hash, so training the base again makes its guides new.
    """
    content = config.model_dump(
        mode="json", include={"seed", "model", "objective", "data", "rollout", "train"}
    )
    if config.model is not None:
        content["init"] = _identity(config.model.init)
        content["model"]["init"] = content["model"]["base"] = None
    if config.needs_base:
        content["frozen_base"] = _identity(config.frozen_base.path)
    if config.rollout is not None:
        judges = [term.judge for term in config.rollout.rewards]
        content["judges"] = [_identity(getattr(judge, "path", None)) for judge in judges]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _identity(init: str | dict[str, Any] | None) -> Any:
    if isinstance(init, str) and Path(init).is_dir():
        record = read_record(init)
        if record is not None and "config_hash" in record:
            return record["config_hash"]
    return init


def _located(judge: RewardConfig) -> RewardConfig:
    if isinstance(judge, ModelRewardConfig):
        return judge.model_copy(update={"path": _absolute(judge.path)})
    return judge


def _absolute(value: Any) -> Any:
    if isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value
