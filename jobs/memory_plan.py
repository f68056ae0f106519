"""What training a guide beside a frozen base needs of memory, counted without any weights.

Activations are left out: they depend on the batch. So is what libraries keep for themselves; a
tenth of every GPU is set aside for both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from jobs.sharding_rules import FrozenBaseConfig, resolve_dtype, sharded_heads, tensor_sizes

_GIB = 2**30
_USABLE = 0.9
# Bytes per trained parameter of weights, gradients and AdamW's state: with bfloat16 weights the
# gradients and the copy that is updated are float32, 18 bytes in all.
_TRAINED_BYTES = {"float32": (4, 4, 8), "bfloat16": (2, 4, 12)}


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    largest_layer: int
    """In one module: what ZeRO-3 gathers at a time."""
    largest_parameter: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """What a plan depends on."""

    architecture: PreTrainedConfig
    """Of the base."""
    base: FrozenBaseConfig
    guide: PreTrainedConfig | int
    """The guide's architecture if it is an LM, else how many parameters are trained."""
    num_workers: int
    workers_per_node: int
    adapters: int | None = None
    """How many parameters adapters have, where they alone learn."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """Of the guide."""
    offload_optimizer: bool = False
    """Whether the guide's optimizer state lies in host memory."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the guide."""
    gpu_memory_gib: float = 80.0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, by what they are for."""

    gpu: dict[str, int]
    """On each GPU, for as long as the job runs."""
    kv_per_token: dict[str, int]
    """On each GPU, per token in a cache."""
    host: dict[str, int]
    """On the fullest node, while the job starts."""
    verdict: str

    @property
    def gpu_total(self) -> int:
        return sum(self.gpu.values())

    def table(self) -> str:
        """Return the plan as lines of text, the verdict last."""
        lines = ["On each GPU                                    GiB"]
        lines += [_line(name, size) for name, size in self.gpu.items()]
        lines.append(_line("total", self.gpu_total))
        lines.append("On each GPU, per token in a cache              KiB")
        lines += [_line(name, size, 2**10) for name, size in self.kv_per_token.items()]
        lines.append("On the fullest node, while the job starts      GiB")
        lines += [_line(name, size) for name, size in self.host.items()]
        return "\n".join([*lines, self.verdict])


def plan(job: PlannedJob) -> MemoryPlan:
    """Return what the job needs, whether that fits, and if not, which setting would help."""
    base = count_parameters(job.architecture)
    guide = _trained(job)
    found = _plan(job, base, guide)
    return replace(found, verdict=_verdict(job, found, base, guide))


def count_parameters(architecture: PreTrainedConfig) -> ParameterCount:
    """Count a causal LM's parameters on the meta device; tied ones count once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    sizes = [parameter.numel() for parameter in model.parameters()]
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    return ParameterCount(sum(sizes), max(layers), max(sizes))


def _trained(job: PlannedJob) -> int:
    return job.guide if isinstance(job.guide, int) else count_parameters(job.guide).total


def _plan(job: PlannedJob, base: ParameterCount, guide: int) -> MemoryPlan:
    size = resolve_dtype(job.base, job.architecture).itemsize
    whole = base.total * size
    tensor_size = _tensor_size(job)
    shards = {"none": 1, "tensor": tensor_size, "zero3": job.num_workers}[job.base.sharding]
    share = -(-whole // shards)
    on_gpu = job.base.offload == "none"
    trained = guide if job.adapters is None else job.adapters
    per_weight, per_gradient, per_state = _TRAINED_BYTES[job.dtype]
    weights = per_weight * (guide if job.adapters is None else guide + job.adapters)
    gradients, state = per_gradient * trained, per_state * trained
    sharded = [job.zero_stage >= stage for stage in (3, 2, 1)]
    weights_here, gradients_here, state_here = (
        -(-one // job.num_workers) if split else one
        for one, split in zip((weights, gradients, state), sharded, strict=True)
    )
    gpu = {"base weights": share if on_gpu else 0}
    host = {"base, as it is loaded": _loading_bytes(job, base, size)}
    if job.base.sharding == "zero3":
        gpu["base, largest gathered layer"] = base.largest_layer * size
    if job.base.offload == "cpu":
        host["base weights"] = share * job.workers_per_node
    gpu |= {"guide weights": weights_here, "guide gradients": gradients_here}
    # At stage 3 the first worker reads everything and hands it out.
    host["guide, as it is built"] = weights * (1 if sharded[0] else job.workers_per_node)
    if job.offload_optimizer:
        host["guide optimizer"] = state_here * job.workers_per_node
    else:
        gpu["guide optimizer"] = state_here
    kv = {"base": _kv_bytes(job.architecture, size, tensor_size)}
    if not isinstance(job.guide, int):
        kv["guide"] = _kv_bytes(job.guide, getattr(torch, job.dtype).itemsize)
    return MemoryPlan(gpu, kv, host, verdict="")


def _tensor_size(job: PlannedJob) -> int:
    if job.base.sharding != "tensor":
        return 1
    return job.base.tensor_size or job.workers_per_node


def _loading_bytes(job: PlannedJob, base: ParameterCount, size: int) -> int:
    """Host memory of the base while a node loads it."""
    if job.base.sharding == "none":
        return base.total * size * job.workers_per_node  # on the CPU first, in every worker
    if job.base.sharding == "tensor":
        return base.largest_parameter * size * job.workers_per_node  # slices, straight to the GPU
    return base.total * size  # the first worker reads everything and hands it out


def _kv_bytes(architecture: PreTrainedConfig, size: int, tensor_size: int = 1) -> int:
    """Keys and values of one token in all layers, on one GPU."""
    text: Any = architecture.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if tensor_size > 1 and sharded_heads(architecture):
        heads //= tensor_size
    return 2 * text.num_hidden_layers * heads * head_size * size


def _fits(job: PlannedJob, found: MemoryPlan) -> bool:
    return found.gpu_total <= _USABLE * job.gpu_memory_gib * _GIB


def _verdict(job: PlannedJob, found: MemoryPlan, base: ParameterCount, guide: int) -> str:
    total, limit = found.gpu_total / _GIB, job.gpu_memory_gib
    if _fits(job, found):
        left = _USABLE * limit - total
        tokens = int(left * _GIB / sum(found.kv_per_token.values()))
        return (
            f"Fits: {total:.1f} of {limit:g} GiB per GPU. {left:.1f} GiB are left for activations "
            f"and caches; caches alone would hold {tokens:,} tokens."
        )
    said = f"Does not fit: {total:.1f} of {limit:g} GiB per GPU."
    for settings, other in _alternatives(job):
        if _fits(other, _plan(other, base, guide)):
            return f"{said} This would: {settings}."
    return f"{said} No sharding of these workers would: take more workers, or a smaller guide."


def _alternatives(job: PlannedJob) -> Iterator[tuple[str, PlannedJob]]:
    """Yield other settings and how to write them, the least change first."""
    bases: list[tuple[str, FrozenBaseConfig]] = [("", job.base)]
    for sharding in _other_shardings(job):
        words = " ".join(f"base.{name}={value}" for name, value in sharding.items())
        path, dtype = job.base.path, job.base.dtype
        bases.append((words, FrozenBaseConfig(path=path, dtype=dtype, **sharding)))
    stages = range(job.zero_stage + 1, 4)
    guides: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        *((f"train.deepspeed={stage}", {"zero_stage": stage}) for stage in stages),
        (
            "zero_optimization.offload_optimizer at stage 3 in train.deepspeed",
            {"zero_stage": 3, "offload_optimizer": True},
        ),
    ]
    pairs = list(product(enumerate(bases), enumerate(guides)))
    for (_, (base_words, base)), (_, (guide_words, changes)) in sorted(
        pairs, key=lambda pair: pair[0][0] + pair[1][0]
    ):
        yield f"{base_words} {guide_words}".strip(), replace(job, base=base, **changes)


def _other_shardings(job: PlannedJob) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"sharding": "zero3"},
        {"sharding": "zero3", "offload": "cpu"},
    ]
    if job.architecture.get_text_config().base_model_tp_plan:
        sizes = tensor_sizes(
            job.architecture,
            num_workers=job.num_workers,
            workers_per_node=job.workers_per_node,
        )
        if sizes[-1] > _tensor_size(job):
            found.insert(0, {"sharding": "tensor", "tensor_size": sizes[-1]})
    return found


def _line(name: str, size: int, unit: int = _GIB) -> str:
    return f"  {name:<38}{size / unit:>10.2f}"
