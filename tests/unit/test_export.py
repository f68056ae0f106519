"""Folders are whole, plain, and loadable without this project."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pilotfish import world
from pilotfish.errors import CheckpointError
from pilotfish.train.export import read_record, save_model, whole_folder, write_record


def tiny_model(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(world.VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_by_plain_from_pretrained(tmp_path: Path, tied: bool) -> None:
    model, tokenizer = tiny_model(tied=tied), world.build_tokenizer()
    save_model(tmp_path, model, tokenizer, state=model.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    token_ids_BT = torch.tensor([[3, 10, 11]])
    assert loaded(token_ids_BT).logits.equal(model(token_ids_BT).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["model.safetensors"]


def test_shards_that_were_not_gathered_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    state: dict[str, Tensor] = {name: torch.empty(0) for name in model.state_dict()}
    with pytest.raises(CheckpointError, match=r"ZeRO-3 shards"):
        save_model(tmp_path, model, world.build_tokenizer(), state=state)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "models" / "guide"
    with whole_folder(output) as folder:
        (folder / "weights").write_text("new")
        assert not output.exists()
    assert (output / "weights").read_text() == "new"
    assert list(output.parent.iterdir()) == [output]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "guide"
    output.mkdir()
    (output / "weights").write_text("old")

    def fail() -> None:
        with whole_folder(output) as folder:
            (folder / "weights").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert (output / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "guide"
    output.mkdir()
    (output / "stale").write_text("old")
    with whole_folder(output) as folder:
        (folder / "weights").write_text("new")
    assert [path.name for path in output.iterdir()] == ["weights"]


def test_a_training_record_comes_back_and_its_absence_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    write_record(tmp_path, {"config_hash": "abc", "metrics": {"loss": 0.5}})
    assert read_record(tmp_path) == {"config_hash": "abc", "metrics": {"loss": 0.5}}
