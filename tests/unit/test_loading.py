"""Models that cannot be loaded."""

from pathlib import Path

import pytest

from pilotfish.errors import CheckpointError
from pilotfish.models.loading import load_architecture, load_frozen
from tests.folders import save_base


def test_a_config_is_read_without_weights(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    assert load_architecture(folder).model_type == "llama"
    with pytest.raises(CheckpointError, match="cannot load a causal LM"):
        load_frozen(folder)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"cannot read a model config from '{tmp_path}'"):
        load_architecture(tmp_path)
    with pytest.raises(CheckpointError, match="Train the model first"):
        load_architecture(tmp_path / "missing")
