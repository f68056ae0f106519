"""A job as it is carried out: absolute paths, files read, and a hash of what decides weights."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.config import JobConfig
from jobs.paths import absolute, judged_by, located, output_paths
from pilotfish.train import deepspeed_config
from pilotfish.train.export import read_record
from pilotfish.train.reward_learning import PolicyConfig


def resolved(config: JobConfig) -> JobConfig:
    """Return the config with absolute paths and the content of the DeepSpeed file in its place.

    Workers run in other folders, and a record must not depend on a file that changes.
    """
    model = config.model
    if model is not None:
        paths = {name: absolute(getattr(model, name)) for name in ("init", "tokenizer", "base")}
        model = model.model_copy(update=paths)
    base = config.base
    if base is not None:
        base = base.model_copy(update={"path": absolute(base.path)})
    objective = config.objective
    if isinstance(objective, PolicyConfig) and objective.critic is not None:
        objective = objective.model_copy(update={"critic": absolute(objective.critic)})
    rollout = config.rollout
    if rollout is not None:
        rewards = tuple(
            term.model_copy(update={"judge": judged_by(term.judge)}) for term in rollout.rewards
        )
        monitor = rollout.monitor and judged_by(rollout.monitor)
        rollout = rollout.model_copy(update={"rewards": rewards, "monitor": monitor})
    train = config.train.model_copy(
        update={"deepspeed": deepspeed_config.read(config.train.deepspeed)}
    )
    return config.model_copy(
        update={
            **output_paths(config.root, config.output),
            "model": model,
            "objective": objective,
            "base": base,
            "data": located(config.data),
            "rollout": rollout,
            "train": train,
        }
    )


def config_hash(config: JobConfig) -> str:
    """Return a hash of what decides the weights, for a resolved config.

    Paths of the root and the output, workers, rollout actors and tracking are left out. A folder
    that is read counts by its own hash, so training the base again makes its guides new.
    """
    content = config.model_dump(
        mode="json",
        include={"seed", "model", "objective", "data", "rollout", "train"},
        exclude={"rollout": {"where", "num_actors", "gpus_per_actor", "threads"}},
    )
    if config.model is not None:
        content["init"] = identity(config.model.init)
        content["model"]["init"] = content["model"]["base"] = None
    if config.needs_base:
        content["frozen_base"] = [identity(config.frozen_base.path), config.frozen_base.dtype]
    for section in ("objective", "rollout"):
        content[section] = identified(content[section])
    return content_hash(content)


def content_hash(content: Mapping[str, Any]) -> str:
    """Return a short hash of anything that JSON holds."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identified(node: Any) -> Any:
    """Return a tree with the hashes of the folders that it names."""
    if isinstance(node, dict):
        return {key: identified(value) for key, value in node.items()}
    return [identified(value) for value in node] if isinstance(node, list) else identity(node)


def identity(init: Any) -> Any:
    """Return what a hash should know of a model: of a folder that we trained, its own hash."""
    if isinstance(init, str) and Path(init).is_dir():
        record = read_record(init)
        if record is not None and "config_hash" in record:
            return record["config_hash"]
    return init
