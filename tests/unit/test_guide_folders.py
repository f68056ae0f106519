"""Guide folders without weights: what `jobs.guide` writes."""

import json
from pathlib import Path

import pytest

from jobs.guide import main
from pilotfish import Pilot, SamplingParams
from pilotfish.guides.card import read_card
from tests.fakes import tiny_reward_model
from tests.folders import byte_tokenizer, save_base

CONFIG = """
root: {root}
output: ${{root}}/best
base: {root}/base
kind: best_of_n
settings:
  reward: {root}/reward
  num_drafts: 3
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    tiny_reward_model(1, vocab_size=len(byte_tokenizer())).save_pretrained(tmp_path / "reward")
    byte_tokenizer().save_pretrained(tmp_path / "reward")
    path = tmp_path / "best.yaml"
    path.write_text(CONFIG.format(root=tmp_path))
    return path


def test_the_folder_steers_as_the_same_card_in_python_does(config: Path, tmp_path: Path):
    assert main([str(config)]) == 0
    folder = tmp_path / "best"
    assert [path.name for path in folder.iterdir()] == ["guide.json"]
    fields = {
        "kind": "best_of_n",
        "settings": {"reward": str(tmp_path / "reward"), "num_drafts": 3},
    }
    pilot = Pilot(tmp_path / "base", guides={"folder": folder, "python": fields}, device="cpu")
    params = SamplingParams(max_tokens=6, seed=3)
    texts = [pilot.generate(["the cat"], params, guides={name: 1})[0] for name in pilot.cards]
    assert texts[0].text == texts[1].text


def test_writing_it_again_replaces_the_card(config: Path, tmp_path: Path):
    assert main([str(config)]) == 0
    assert main([str(config), "settings.num_drafts=5"]) == 0
    assert read_card(tmp_path / "best").settings["num_drafts"] == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=best", "wanted one of"),
        ("settings.num_draft=5", "did you mean 'num_drafts'"),
        ("template=own", "tilts no tokens"),
    ],
)
def test_a_card_that_no_guide_could_have_is_refused_by_a_dry_run(
    config: Path, override: str, message: str, caplog: pytest.LogCaptureFixture
):
    assert main([str(config), override, "--dry-run"]) == 2
    assert message in caplog.text


def test_a_folder_with_weights_is_never_overwritten(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    assert main([str(config), f"output={tmp_path / 'base'}"]) == 2
    assert "no folder of this command" in caplog.text
    assert json.loads((tmp_path / "base" / "config.json").read_text()) == before
    assert not (tmp_path / "base" / "guide.json").exists()
