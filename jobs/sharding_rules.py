"""How a frozen base is spread over workers, and which sizes a model allows.

Nothing here loads weights: a mistake is found before the workers start.
"""

from typing import Any, Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from transformers import PreTrainedConfig

from pilotfish.config import Config
from pilotfish.errors import ConfigError


class FrozenBaseConfig(Config):
    """The frozen model that a guide is trained beside."""

    path: str | None = None
    """Model folder or hub id; None where the job fills it in."""
    sharding: Literal["none", "tensor", "zero3"] = "none"
    """`none`: every worker holds the whole base. `tensor`: the workers of a node share each layer,
    by transformers' tensor parallelism; the fastest for decoding. `zero3`: all workers share the
    weights, which DeepSpeed gathers layer by layer in every forward; for any number of workers."""
    tensor_size: PositiveInt | None = None
    """Workers that share one copy under `tensor`. Default: all of a node."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: as the model's config says, float32 where it says nothing."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where `zero3` keeps a worker's share of the weights: on its GPU, or off it."""
    nvme_path: str | None = None
    """Folder on each node's local disk, for `offload: nvme`."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.tensor_size is not None and self.sharding != "tensor":
            raise ValueError(
                f"tensor_size is {self.tensor_size}, but sharding is {self.sharding!r}. "
                "Remove tensor_size, or set sharding to 'tensor'"
            )
        if self.offload != "none" and self.sharding != "zero3":
            raise ValueError(
                f"offload is {self.offload!r}, but sharding is {self.sharding!r}. "
                "Only zero3 can offload: remove offload, or set sharding to 'zero3'"
            )
        if (self.nvme_path is None) == (self.offload == "nvme"):
            raise ValueError(
                f"nvme_path is {self.nvme_path!r} and offload is {self.offload!r}; "
                "offload 'nvme' needs a folder in nvme_path, and nothing else reads it"
            )
        return self


def check_sharding(
    config: FrozenBaseConfig,
    architecture: PreTrainedConfig,
    *,
    num_workers: int,
    workers_per_node: int,
) -> None:
    """Raise `ConfigError` for a sharding that this model or this worker group cannot have."""
    if config.sharding != "tensor":
        return
    if not architecture.get_text_config().base_model_tp_plan:
        raise ConfigError(
            f"base.sharding is tensor, but transformers has no tensor-parallel plan for model type "
            f"{architecture.model_type!r}. Set base.sharding to zero3, which takes any model."
        )
    size = config.tensor_size or workers_per_node
    sizes = tensor_sizes(architecture, num_workers=num_workers, workers_per_node=workers_per_node)
    if size in sizes:
        return
    heads = " and ".join(f"{count} {name}" for name, count in sharded_heads(architecture).items())
    raise ConfigError(
        f"base.tensor_size is {size}, which must divide each of: {workers_per_node} workers per "
        f"node, {num_workers} workers{f', {heads}' if heads else ''}. "
        f"Sizes that work for this model and these workers: {', '.join(map(str, sizes))}. Set "
        "base.tensor_size to one of them, or base.sharding to zero3, which has no such rule."
    )


def tensor_sizes(
    architecture: PreTrainedConfig, *, num_workers: int, workers_per_node: int
) -> list[int]:
    """Return the sizes of tensor groups that are possible, ascending.

    A group lies inside a node, and each of its workers has whole attention heads: as many query
    heads per key-value head as the model has. The widths of other layers and the vocabulary need
    not divide.
    """
    counts = [workers_per_node, num_workers, *sharded_heads(architecture).values()]
    return [
        size
        for size in range(1, workers_per_node + 1)
        if all(count % size == 0 for count in counts)
    ]


def resolve_dtype(config: FrozenBaseConfig, architecture: PreTrainedConfig) -> torch.dtype:
    """Return the dtype of the base's weights."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    text: Any = architecture.get_text_config()
    return text.dtype or torch.float32


def sharded_heads(architecture: PreTrainedConfig) -> dict[str, int]:
    """Return the numbers of heads that are spread over a group; none if the plan gathers them."""
    text: Any = architecture.get_text_config()
    plan: dict[str, str] = text.base_model_tp_plan
    keys = ("k_proj", "qkv_proj", "query_key_value")
    if not any(name.endswith(keys) and style == "colwise" for name, style in plan.items()):
        return {}
    query_heads = text.num_attention_heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or query_heads
    return {"attention heads": query_heads, "key-value heads": key_value_heads}
