"""Shardings that cannot be had are refused before anything loads, with the sizes that can."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Phi3Config

from jobs.sharding_rules import FrozenBaseConfig, check_sharding, resolve_dtype, tensor_sizes
from pilotfish.config import parse
from pilotfish.errors import ConfigError

LLAMA_2_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
TENSOR = FrozenBaseConfig(sharding="tensor")


@pytest.mark.parametrize(
    ("size", "num_workers", "per_node", "sizes"),
    [
        (3, 6, 6, "1, 2"),  # does not divide the heads
        (16, 16, 16, "1, 2, 4, 8"),  # more than there are key-value heads
        (4, 8, 2, "1, 2"),  # more than a node has
        (8, 12, 8, "1, 2, 4"),  # leaves workers over
        (None, 6, 6, "1, 2"),  # all of a node, by default
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(
    size: int | None, num_workers: int, per_node: int, sizes: str
) -> None:
    config = FrozenBaseConfig(sharding="tensor", tensor_size=size)
    with pytest.raises(ConfigError, match=rf"tensor_size.* is {size or per_node},.*: {sizes}\. "):
        check_sharding(config, LLAMA_2_70B, num_workers=num_workers, workers_per_node=per_node)


@pytest.mark.parametrize(("num_workers", "per_node"), [(8, 8), (16, 8), (32, 8), (4, 2), (1, 1)])
def test_whole_nodes_share_a_base_and_any_workers_do_without_one(
    num_workers: int, per_node: int
) -> None:
    for config in (TENSOR, FrozenBaseConfig(), FrozenBaseConfig(sharding="zero3")):
        check_sharding(config, LLAMA_2_70B, num_workers=num_workers, workers_per_node=per_node)


def test_zero3_and_whole_copies_have_no_rule() -> None:
    for config in (FrozenBaseConfig(), FrozenBaseConfig(sharding="zero3")):
        check_sharding(config, LLAMA_2_70B, num_workers=7, workers_per_node=3)


def test_heads_need_not_divide_where_the_plan_gathers_them() -> None:
    odd = Phi3Config(num_attention_heads=3, hidden_size=96)
    assert tensor_sizes(odd, num_workers=4, workers_per_node=4) == [1, 2, 4]


def test_a_model_without_a_plan_is_sent_to_zero3() -> None:
    with pytest.raises(ConfigError, match=r"no tensor-parallel plan for model type 'gpt2'.*zero3"):
        check_sharding(TENSOR, GPT2Config(), num_workers=2, workers_per_node=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_size": 2}, "Remove tensor_size, or set sharding"),
        ({"sharding": "zero3", "tensor_size": 2}, "Remove tensor_size, or set sharding"),
        ({"offload": "cpu"}, "Only zero3 can offload"),
        ({"sharding": "tensor", "offload": "cpu"}, "Only zero3 can offload"),
        ({"sharding": "zero3", "offload": "nvme"}, "needs a folder in nvme_path"),
        ({"sharding": "zero3", "nvme_path": "/tmp"}, "nothing else reads it"),
    ],
)
def test_options_that_a_sharding_cannot_honour_are_errors(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(FrozenBaseConfig, fields, source="test")


def test_the_dtype_is_the_models_own_unless_one_is_given() -> None:
    stated = LlamaConfig(dtype="bfloat16")
    assert resolve_dtype(FrozenBaseConfig(), stated) == torch.bfloat16
    assert resolve_dtype(FrozenBaseConfig(), LlamaConfig()) == torch.float32
    assert resolve_dtype(FrozenBaseConfig(dtype="float32"), stated) == torch.float32
