"""What a job will need, against numbers worked out by hand for Llama-2-70B and Llama-3-70B."""

from typing import Any

import pytest
from transformers import LlamaConfig

from jobs.memory_plan import MemoryPlan, PlannedJob, count_parameters, plan
from jobs.sharding_rules import FrozenBaseConfig
from tests.fakes import tiny_config, tiny_llama

GIB = 2**30
SHAPE: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
LLAMA_2_70B = LlamaConfig(vocab_size=32000, **SHAPE)
LLAMA_3_70B = LlamaConfig(vocab_size=128256, **SHAPE)
LLAMA_2_7B = LlamaConfig(dtype="bfloat16")


def planned(sharding: str = "tensor", offload: str = "none", **fields: Any) -> MemoryPlan:
    base = FrozenBaseConfig.model_validate({"sharding": sharding, "offload": offload})
    job: dict[str, Any] = {"guide": 10**9, "num_workers": 16, "workers_per_node": 8, **fields}
    return plan(PlannedJob(architecture=LLAMA_2_70B, base=base, **job))


def test_parameters_are_counted_without_weights() -> None:
    for architecture, total, largest in (
        (LLAMA_2_70B, 68_976_648_192, 262_144_000),
        (LLAMA_3_70B, 70_553_706_496, 1_050_673_152),
    ):
        count = count_parameters(architecture)
        assert (count.total, count.largest_layer, count.largest_parameter) == (
            total,
            largest,
            largest,
        )


def test_tied_parameters_count_once() -> None:
    tied = tiny_config()
    tied.tie_word_embeddings = True
    embedding = tied.vocab_size * tied.hidden_size
    untied = sum(p.numel() for p in tiny_llama(1).parameters())
    assert count_parameters(tied).total == untied - embedding


@pytest.mark.parametrize(
    ("sharding", "gib", "kv_kib"), [("none", 128.5, 320), ("tensor", 16.1, 40), ("zero3", 8.0, 320)]
)
def test_a_70b_base_takes_its_share_of_each_gpu(sharding: str, gib: float, kv_kib: int) -> None:
    found = planned(sharding)
    assert found.gpu["base weights"] / GIB == pytest.approx(gib, abs=0.05)
    assert found.kv_per_token["base"] == kv_kib * 2**10


def test_zero3_gathers_one_layer_and_keeps_the_rest_off_the_gpu_if_told() -> None:
    found = planned("zero3", "cpu")
    assert found.gpu["base weights"] == 0
    assert found.gpu["base, largest gathered layer"] / GIB == pytest.approx(0.49, abs=0.005)
    assert found.host["base weights"] / GIB == pytest.approx(128.5 / 2, abs=0.05)  # of two nodes
    assert found.host["base, as it is loaded"] / GIB == pytest.approx(128.5, abs=0.05)


@pytest.mark.parametrize(
    ("dtype", "stage", "gigabytes"),
    [
        ("bfloat16", 0, 18.0),
        ("bfloat16", 1, 2 + 4 + 12 / 16),
        ("bfloat16", 2, 2 + (4 + 12) / 16),
        ("bfloat16", 3, 18 / 16),
        ("float32", 0, 16.0),
        ("float32", 3, 16 / 16),
    ],
)
def test_a_guide_takes_what_its_zero_stage_leaves_it(
    dtype: str, stage: int, gigabytes: float
) -> None:
    found = planned(zero_stage=stage, dtype=dtype)
    parts = ("guide weights", "guide gradients", "guide optimizer")
    assert sum(found.gpu[part] for part in parts) == pytest.approx(gigabytes * 1e9)


def test_an_offloaded_optimizer_moves_to_the_host() -> None:
    found = planned(zero_stage=2, offload_optimizer=True)
    assert "guide optimizer" not in found.gpu
    assert found.host["guide optimizer"] == pytest.approx(12e9 / 16 * 8)


def test_a_guide_that_is_an_lm_is_counted_and_has_a_cache() -> None:
    found = planned(guide=LLAMA_2_7B)
    assert found.gpu["guide weights"] == 2 * 6_738_415_616
    assert found.kv_per_token["guide"] == 512 * 2**10


def test_the_verdict_says_what_is_left() -> None:
    found = planned("tensor", guide=0)
    assert found.verdict.startswith("Fits: 16.1 of 80 GiB per GPU. 55.9 GiB are left")
    assert found.table().endswith(found.verdict)


@pytest.mark.parametrize(
    ("sharding", "fields", "settings"),
    [
        ("none", {}, "base.sharding=tensor base.tensor_size=8"),
        ("none", {"num_workers": 14, "workers_per_node": 7}, "base.sharding=zero3"),
        ("tensor", {"guide": LLAMA_2_7B, "gpu_memory_gib": 40}, "train.deepspeed=2"),
        ("zero3", {"guide": 0, "gpu_memory_gib": 8}, "base.sharding=zero3 base.offload=cpu"),
        (
            "tensor",
            {"guide": LLAMA_2_70B},
            "zero_optimization.offload_optimizer at stage 3 in train.deepspeed",
        ),
    ],
)
def test_the_verdict_names_a_setting_that_would_fit(
    sharding: str, fields: dict[str, Any], settings: str
) -> None:
    assert planned(sharding, **fields).verdict.endswith(f" This would: {settings}.")


def test_the_verdict_says_so_where_nothing_helps() -> None:
    assert "take more workers" in planned("tensor", guide=LLAMA_2_70B, gpu_memory_gib=8).verdict
