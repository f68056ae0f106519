"""What can be said before anything is loaded: whether a base can be shared, and what fits."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from jobs.config import JobConfig
from jobs.memory_plan import MemoryPlan, PlannedJob, plan
from jobs.policies import ProxyLearning
from jobs.sharding_rules import check_sharding
from pilotfish.models.loading import load_architecture
from pilotfish.train import deepspeed_config
from pilotfish.train.reward_learning import ProxyConfig


def check_base(config: JobConfig) -> None:
    """Raise `ConfigError` for a base that this worker group cannot share as it should."""
    architecture = _architecture(config)
    if architecture is None:
        return
    for num_workers in config.scaling.sizes:
        check_sharding(
            config.frozen_base,
            architecture,
            num_workers=num_workers,
            workers_per_node=config.scaling.workers_per_node or num_workers,
        )


def memory_plan(config: JobConfig, *, gpu_memory_gib: float) -> MemoryPlan | None:
    """Plan the memory of a job with a frozen base whose folder is there; None for any other.

    Reads architectures alone. Raises `ConfigError` for a base that cannot be shared, and for a
    proxy that is not small.
    """
    check_base(config)
    architecture = _architecture(config)
    if architecture is None:
        return None
    zero: dict[str, Any] = deepspeed_config.read(config.train.deepspeed).get(
        "zero_optimization", {}
    )
    return plan(
        PlannedJob(
            architecture=architecture,
            base=config.frozen_base,
            guide=_trained(config, architecture),
            adapters=_adapters(config),
            num_workers=config.scaling.max_workers,
            workers_per_node=config.scaling.workers_per_node or config.scaling.max_workers,
            zero_stage=zero.get("stage", 0),
            offload_optimizer="offload_optimizer" in zero,
            dtype=config.train.dtype,
            gpu_memory_gib=gpu_memory_gib,
        )
    )


def _architecture(config: JobConfig) -> PreTrainedConfig | None:
    """Return the base's architecture; None without a base, or for one that is not here yet."""
    path = config.frozen_base.path
    if not config.needs_base or path is None or not Path(path).is_dir():
        return None
    return load_architecture(path)


def _trained(config: JobConfig, base: PreTrainedConfig) -> PreTrainedConfig | int:
    """Return the architecture of the LM that is trained, or how many numbers are."""
    if isinstance(config.objective, ProxyConfig):
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(base)
            return ProxyLearning(config.objective, shape).module.num_trainable
    init = config.started.init
    assert isinstance(init, str), "a base names what it starts from"
    return load_architecture(init)


def _adapters(config: JobConfig) -> int | None:
    """Return how many parameters the adapters have; None where whole weights are trained."""
    lora = None if config.model is None else config.model.lora
    if lora is None:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_architecture(str(config.started.init)))
    sizes = [
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in lora.targets
    ]
    return lora.rank * sum(sizes)
