"""Unmodified DeepSpeed JSON in, no "auto" out; every conflict is an error that names both sides."""

import json
from pathlib import Path
from typing import Any

import pytest

from pilotfish.errors import ConfigError
from pilotfish.train.config import TrainConfig
from pilotfish.train.deepspeed_config import (
    REMOVED_KEYS,
    REMOVED_ZERO_KEYS,
    VALID_KEYS,
    Launch,
    default_config,
    resolve,
    split_batch,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def settings(**changes: Any) -> TrainConfig:
    fields = {"steps": 100, "batch_size": 32, "learning_rate": 1e-3, **changes}
    return TrainConfig.model_validate(fields)


def resolved(
    deepspeed: Any = 0, *, num_workers: int = 1, on_cpu: bool = True, **changes: Any
) -> dict[str, Any]:
    launch = Launch(total_steps=100, num_workers=num_workers, on_cpu=on_cpu)
    return resolve(settings(deepspeed=deepspeed, **changes), launch)


class RecordingDict(dict[str, Any]):
    """Remembers every key that was asked for."""

    asked: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "RecordingDict":
        return self


def test_the_known_keys_are_exactly_those_deepspeed_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runtime_config = pytest.importorskip("deepspeed.runtime.config")
    content = RecordingDict(train_micro_batch_size_per_gpu=1, bf16={"enabled": False})
    content.asked = set()
    runtime_config.DeepSpeedConfig(content)
    # Asked for only in cases that a plain config does not reach.
    elsewhere = {"bfloat16", "sequence_parallel_size"}
    assert content.asked - REMOVED_KEYS | elsewhere == VALID_KEYS
    assert set(runtime_config._REMOVED_TOP_LEVEL_CONFIG_KEYS) == REMOVED_KEYS
    assert set(runtime_config._REMOVED_ZERO_CONFIG_KEYS) == REMOVED_ZERO_KEYS


@pytest.mark.parametrize("stage", range(4))
def test_a_stage_number_means_the_shipped_file(stage: int) -> None:
    path = REPOSITORY / "infra" / "deepspeed" / f"zero{stage}.json"
    assert json.loads(path.read_text()) == default_config(stage)
    assert resolved(stage) == resolved(str(path))
    assert resolved(stage)["zero_optimization"]["stage"] == stage


def test_auto_values_come_from_the_train_config() -> None:
    config = resolved(
        num_workers=2,
        micro_batch_size=4,
        learning_rate=3e-4,
        betas=[0.9, 0.98],
        weight_decay=0.1,
        gradient_clipping=0.5,
        warmup_ratio=0.25,
        final_lr_ratio=0.1,
        dtype="bfloat16",
    )
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    optimizer = config["optimizer"]["params"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (
        3e-4,
        [0.9, 0.98],
        0.1,
    )
    assert config["scheduler"]["params"] == {
        "total_num_steps": 100,
        "warmup_num_steps": 25,
        "warmup_type": "linear",
        "cos_min_ratio": 0.1,
    }


def test_a_json_of_hugging_face_with_auto_everywhere_is_resolved() -> None:
    config = resolved(
        {
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "bf16": {"enabled": "auto"},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
            },
            "scheduler": {
                "type": "WarmupLR",
                "params": {
                    "warmup_min_lr": "auto",
                    "warmup_max_lr": "auto",
                    "warmup_num_steps": "auto",
                },
            },
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
            },
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "wall_clock_breakdown": False,
        }
    )
    assert '"auto"' not in json.dumps(config)
    assert config["scheduler"]["params"]["warmup_max_lr"] == 1e-3
    assert config["zero_optimization"] == {"stage": 3}
    assert config["fp16"]["enabled"] is False


def test_full_precision_is_stated_and_not_left_to_the_default() -> None:
    assert resolved({})["bf16"] == {"enabled": False}


def test_adam_on_a_cpu_is_torchs_which_needs_no_compiler() -> None:
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert resolved(adam)["optimizer"]["params"]["torch_adam"] is True
    assert "torch_adam" not in resolved(adam, on_cpu=False)["optimizer"]["params"]


def test_the_users_mapping_is_not_changed() -> None:
    mapping = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    resolved(mapping)
    assert mapping == {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


def test_an_unknown_key_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'zero_optimisation'.*did you mean 'zero_optimization'"):
        resolved({"zero_optimisation": {"stage": 2}})


@pytest.mark.parametrize("key", sorted(REMOVED_KEYS))
def test_a_removed_key_is_an_error_that_names_it(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' was removed"):
        resolved({key: {}})


def test_a_removed_zero_key_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.mics_shard_size"):
        resolved({"zero_optimization": {"stage": 3, "mics_shard_size": 8}})


def test_contradicting_batch_sizes_name_both() -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size is 64.*train\.batch_size gives 32"):
        resolved({"train_batch_size": 64})


def test_a_stated_learning_rate_must_agree_with_the_train_config() -> None:
    stated = {"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}}
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr is 0\.002.*learning_rate"):
        resolved(stated)
    assert resolved(stated, learning_rate=2e-3)["optimizer"]["params"]["lr"] == 2e-3


def test_half_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp16\.enabled is True"):
        resolved({"fp16": {"enabled": True}})


def test_an_auto_nobody_knows_is_an_error_that_names_its_path() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.sub_group_size"):
        resolved({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})


def test_a_batch_that_workers_cannot_share_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"batch_size is 32, which 3 workers"):
        split_batch(settings(), 3)
    with pytest.raises(ConfigError, match=r"micro_batch_size is 5"):
        split_batch(settings(micro_batch_size=5), 1)


def test_a_missing_file_and_a_stage_out_of_range_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a file"):
        resolved(str(tmp_path / "zero9.json"))
    with pytest.raises(ConfigError, match="stage from 0 to 3"):
        resolved(4)


def test_length_is_given_by_steps_or_epochs_and_not_both() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        settings(epochs=2)
    with pytest.raises(ValueError, match="exactly one"):
        settings(steps=None)
    assert settings(steps=None, epochs=2).total_steps(160) == 10
