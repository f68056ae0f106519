"""Answers of the study's methods, by random models: nonsense that obeys the rules."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.reproduce.answers import measure
from jobs.reproduce.methods import Guided, Method, folder_of, one
from pilotfish import world
from pilotfish.guides.card import GuideCard, write_card
from pilotfish.models.vocab import fingerprint
from tests.fakes import tiny_llama, tiny_reward_model

NUM = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a GenARM guide and a reward model of the kitchen's words."""
    root, tokenizer = tmp_path_factory.mktemp("answers"), world.build_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "dtype": torch.float32,
        "max_position_embeddings": 256,
    }
    for seed, (stage, make, settings) in enumerate(
        (
            ("base", tiny_llama, None),
            ("genarm", tiny_llama, {}),
            ("reward_model", tiny_reward_model, {"pooling": "pooled", "pool_length": 40.0}),
        )
    ):
        folder = folder_of(root, stage)
        make(seed, **shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if settings is not None:
            kind = "genarm" if stage == "genarm" else "args"
            card = GuideCard(
                kind=kind, base="base", vocab=fingerprint(tokenizer), settings=settings
            )
            write_card(folder, card)
    return root


def test_every_question_is_answered_judged_and_counted(root: Path) -> None:
    found = measure(root, Method(label="base"), NUM)
    assert len(found.texts) == len(found.rewards) == len(found.scores) == NUM
    assert found.forwards_per_token == pytest.approx(1.0)
    assert found.mean("kl") == 0
    assert [a + b for a, b in zip(found.helpful, found.harmless, strict=True)] == pytest.approx(
        found.rewards
    )
    again = measure(root, Method(label="base"), NUM)
    assert again.texts == found.texts
    assert again.scores == found.scores


def test_copies_of_a_question_are_answered_one_after_the_other(root: Path) -> None:
    method = Method(label="drafts", num=2, copies=3)
    prompts = method.prompts(NUM)
    assert len(prompts) == 6
    assert prompts[0] == prompts[2] != prompts[3] == prompts[5]
    assert len(set(measure(root, method, NUM).texts)) == 6


def test_a_guide_acts_as_its_settings_say(root: Path) -> None:
    base = measure(root, Method(label="base"), NUM)
    open_ = measure(root, Method(label="open", guides=one("genarm", gate=0.0)), NUM)
    shut = measure(root, Method(label="shut", guides=one("genarm", gate=100.0)), NUM)
    assert shut.texts == base.texts
    assert shut.notes["gate_open"] == 0
    assert open_.notes["gate_open"] == 1
    assert open_.mean("kl") > 0
    assert open_.forwards_per_token == pytest.approx(2.0)


def test_an_identity_aligner_changes_nothing(root: Path) -> None:
    copied = Method(label="copied", guides={"copyist": Guided(kind="copyist")})
    assert measure(root, copied, NUM).texts == measure(root, Method(label="base"), NUM).texts


def test_a_selection_reads_its_model_as_the_models_card_says(root: Path) -> None:
    best = Guided(kind="best_of_n", models={"reward": "reward_model"}, settings={"num_drafts": 4})
    found = measure(root, Method(label="best", guides={"best": best}), NUM)
    single = measure(root, Method(label="base"), NUM)
    assert all(a >= b - 1e-4 for a, b in zip(found.scores, single.scores, strict=True))
    assert found.mean("scores") > single.mean("scores")
