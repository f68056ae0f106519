"""An unmodified DeepSpeed JSON, its "auto" values filled in from the train config.

Plain dictionaries: nothing here imports DeepSpeed, so a typo is found before a cluster is started.
"""

import copy
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish.errors import ConfigError
from pilotfish.train.config import TrainConfig

# fmt: off
VALID_KEYS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet",
    "comms_logger", "communication_data_type", "compile", "csv_monitor", "data_efficiency",
    "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather",
    "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print",
    "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wall_clock_breakdown", "wandb", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
})
"""Every top-level key DeepSpeed 0.19 reads."""

REMOVED_KEYS = frozenset({
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity",
    "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training",
    "sparse_attention", "sparse_gradients",
})
"""Top-level keys of older DeepSpeed versions, found in many JSON files on the web."""
# fmt: on

REMOVED_ZERO_KEYS = frozenset(
    ["mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"]
)

_AUTO = "auto"
# `auto` is DeepSpeed's own word here, not a value for us to fill in.
_OWN_AUTO = frozenset(["data_types.keep_in_fp32_modules"])
# Hugging Face derives these from the hidden size; without one, DeepSpeed's defaults are right.
_AUTO_IS_DEFAULT = frozenset(
    [
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the DeepSpeed config must know about the run besides the train config."""

    total_steps: int
    num_workers: int
    on_cpu: bool


def default_config(stage: int) -> dict[str, Any]:
    """Return our DeepSpeed config for a ZeRO stage; `infra/deepspeed/zero<stage>.json` is this."""
    return {
        "train_batch_size": _AUTO,
        "train_micro_batch_size_per_gpu": _AUTO,
        "gradient_accumulation_steps": _AUTO,
        "gradient_clipping": _AUTO,
        "bf16": {"enabled": _AUTO},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000},
        "optimizer": {
            "type": "AdamW",
            # torch's AdamW: DeepSpeed's own is compiled on first use and needs a compiler.
            "params": {"lr": _AUTO, "betas": _AUTO, "weight_decay": _AUTO, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": _AUTO,
                "warmup_num_steps": _AUTO,
                "warmup_type": "linear",
                "cos_min_ratio": _AUTO,
            },
        },
    }


def read(setting: str | int | Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping behind `train.deepspeed`: a ZeRO stage, a JSON file or a mapping."""
    if isinstance(setting, Mapping):
        return copy.deepcopy(dict(setting))
    if isinstance(setting, int):
        if setting not in range(4):
            raise ConfigError(f"train.deepspeed is {setting}, wanted a ZeRO stage from 0 to 3.")
        return default_config(setting)
    path = Path(setting)
    if not path.is_file():
        raise ConfigError(
            f"train.deepspeed is {setting!r}, which is not a file. Give the path of a DeepSpeed "
            "JSON (such as infra/deepspeed/zero2.json), a ZeRO stage, or the settings themselves."
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"DeepSpeed config {setting!r} is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"DeepSpeed config {setting!r} holds a {type(tree).__name__}, no object.")
    return tree


def resolve(train: TrainConfig, launch: Launch) -> dict[str, Any]:
    """Return the DeepSpeed config of a run with no "auto" left. Raises `ConfigError`.

    A value stated in the JSON must agree with the train config: the JSON never silently wins.
    Missing optimizer and scheduler sections are AdamW and a warm-up with a cosine.
    """
    tree = read(train.deepspeed)
    _check_keys(tree)
    defaults = default_config(0)
    for section in ("optimizer", "scheduler"):
        tree.setdefault(section, defaults[section])
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"):
        tree.setdefault(key, _AUTO)
    tree.setdefault("gradient_accumulation_steps", _AUTO)
    # Stated in every run: which precision holds must not depend on DeepSpeed's default.
    precision = "bfloat16" if "bfloat16" in tree else "bf16"
    tree.setdefault(precision, {}).setdefault("enabled", _AUTO)
    for path, (value, name) in _wanted(train, launch).items():
        _fill(tree, path, value=value, name=name)
    _drop_defaults(tree)
    if launch.on_cpu and str(tree["optimizer"].get("type", "")).lower() in ("adam", "adamw"):
        tree["optimizer"].setdefault("params", {}).setdefault("torch_adam", True)
    tree.setdefault("steps_per_print", 2**31 - 1)  # progress is reported by the training loop
    left = [path for path in _auto_paths(tree) if path not in _OWN_AUTO]
    if left:
        raise ConfigError(
            f"DeepSpeed config: no value is known for {', '.join(left)}: 'auto'. Write a number."
        )
    return tree


def _check_keys(tree: Mapping[str, Any]) -> None:
    for key in tree:
        if key in REMOVED_KEYS:
            raise ConfigError(
                f"DeepSpeed config: {key!r} was removed from DeepSpeed. Delete it from the JSON."
            )
        if key not in VALID_KEYS:
            close = difflib.get_close_matches(key, VALID_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see deepspeed.ai/docs/config-json."
            raise ConfigError(f"DeepSpeed config: unknown key {key!r}; {hint}")
    for key in tree.get("zero_optimization", {}):
        if key in REMOVED_ZERO_KEYS:
            raise ConfigError(
                f"DeepSpeed config: 'zero_optimization.{key}' was removed from DeepSpeed. "
                "Delete it from the JSON."
            )


def _wanted(train: TrainConfig, launch: Launch) -> dict[str, tuple[Any, str]]:
    """Return, by path in the JSON, the value the train config asks for and what it calls it."""
    micro, accumulation = split_batch(train, launch.num_workers)
    return {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "train.micro_batch_size"),
        "gradient_accumulation_steps": (
            accumulation,
            f"train.batch_size / (train.micro_batch_size * {launch.num_workers} workers)",
        ),
        "gradient_clipping": (train.gradient_clipping, "train.gradient_clipping"),
        "bf16.enabled": (train.dtype == "bfloat16", "train.dtype == bfloat16"),
        "bfloat16.enabled": (train.dtype == "bfloat16", "train.dtype == bfloat16"),
        "fp16.enabled": (False, "train.dtype (float32 or bfloat16)"),
        "optimizer.params.lr": (train.learning_rate, "train.learning_rate"),
        "optimizer.params.betas": (list(train.betas), "train.betas"),
        "optimizer.params.eps": (1e-8, "AdamW's epsilon"),
        "optimizer.params.weight_decay": (train.weight_decay, "train.weight_decay"),
        "scheduler.params.total_num_steps": (launch.total_steps, "the number of steps"),
        # DeepSpeed refuses 0 and treats 1 as 2.
        "scheduler.params.warmup_num_steps": (
            max(1, train.warmup(launch.total_steps)),
            "train.warmup_steps",
        ),
        "scheduler.params.warmup_min_lr": (0.0, "a warm-up from 0"),
        "scheduler.params.warmup_max_lr": (train.learning_rate, "train.learning_rate"),
        "scheduler.params.warmup_min_ratio": (0.0, "a warm-up from 0"),
        "scheduler.params.cos_min_ratio": (train.final_lr_ratio, "train.final_lr_ratio"),
    }


def split_batch(train: TrainConfig, num_workers: int) -> tuple[int, int]:
    """Return (rows per forward pass, passes per step) of one worker. Raises `ConfigError`."""
    share, left = divmod(train.batch_size, num_workers)
    if left:
        raise ConfigError(
            f"train.batch_size is {train.batch_size}, which {num_workers} workers cannot share "
            f"evenly. Use a multiple of {num_workers}."
        )
    micro = share if train.micro_batch_size is None else train.micro_batch_size
    if share % micro:
        raise ConfigError(
            f"train.micro_batch_size is {micro}, which does not divide a worker's share of "
            f"{share} rows (train.batch_size {train.batch_size} over {num_workers} workers)."
        )
    return micro, share // micro


def _fill(tree: dict[str, Any], path: str, *, value: Any, name: str) -> None:
    *parents, last = path.split(".")
    node: Any = tree
    for parent in parents:
        node = node.get(parent)
        if not isinstance(node, dict):
            return
    if last not in node:
        return
    stated = node[last]
    if stated == _AUTO:
        node[last] = value
    elif not _same(stated, value):
        raise ConfigError(
            f"DeepSpeed config: {path} is {stated!r}, but {name} gives {value!r}. "
            "Change one of them, or write 'auto' in the JSON."
        )


def _same(stated: Any, value: Any) -> bool:
    if isinstance(stated, float | int) and isinstance(value, float | int):
        return math.isclose(stated, value, rel_tol=1e-9)
    return bool(stated == value)


def _drop_defaults(tree: dict[str, Any]) -> None:
    for path in _AUTO_IS_DEFAULT:
        section, key = path.split(".")
        node = tree.get(section, {})
        if node.get(key) == _AUTO:
            del node[key]


def _auto_paths(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            paths += _auto_paths(value, f"{prefix}{key}.")
        elif value == _AUTO:
            paths.append(prefix + key)
    return paths
