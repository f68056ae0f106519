"""Scenes, answers of the logged assistants, and the data sets drawn from them."""

import dataclasses
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pilotfish.world
from pilotfish.errors import ConfigError, DataError
from pilotfish.world import (
    MAX_ANSWER_TOKENS,
    PERSONAS,
    Scene,
    corpus,
    corrections,
    preference_pairs,
    sample_answer,
    scenes,
    score,
    scored,
)

QUESTION = "i am eva . my boss cannot eat corn . i have rice , corn and eggs . how do i make pie ?"


def test_a_scene_asks_its_question_with_the_restriction_first() -> None:
    scene = Scene("eva", ("rice", "corn", "eggs"), "corn", "boss", "pie")
    assert scene.text == QUESTION
    assert scene.messages == [{"role": "user", "content": QUESTION}]


def test_every_scene_is_read_back_from_its_text() -> None:
    drawn = scenes(500, 1)
    assert [Scene.from_text(scene.text) for scene in drawn] == drawn


def test_white_space_does_not_matter_to_a_question() -> None:
    assert Scene.from_text(f"\n {QUESTION.replace(' ', '  ')} ").text == QUESTION


@pytest.mark.parametrize(
    "text",
    [
        "",
        "how do i make pie ?",
        QUESTION + " please",
        QUESTION.replace("pie", "lasagna"),
        QUESTION.replace("eva", "max"),
        QUESTION.replace("rice", "corn"),
        QUESTION.replace("boss", "cat"),
    ],
)
def test_anything_but_a_kitchen_question_is_a_data_error(text: str) -> None:
    with pytest.raises(DataError, match="kitchen"):
        Scene.from_text(text)


def test_the_forbidden_ingredient_is_at_hand_four_times_in_five() -> None:
    drawn = scenes(4000, 2)
    share = sum(scene.forbidden in scene.ingredients for scene in drawn) / len(drawn)
    assert share == pytest.approx(0.8, abs=0.02)


def test_no_answer_is_longer_than_the_cap() -> None:
    # A persona at its most talkative passes the cap in most draws, so the cap has to act.
    talkative = dataclasses.replace(
        PERSONAS["rude"], num_steps={5: 1.0}, warns=1.0, cautions=1.0, rude=1.0, flatters=1.0
    )
    rng = random.Random(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PERSONAS, "talkative", talkative)
        long = [sample_answer(scene, rng, "talkative") for scene in scenes(200, 4)]
    answers = [*long, *(row["completion"][0]["content"] for row in corpus(5000, 4))]
    longest = max(len(answer.split()) for answer in answers)
    assert MAX_ANSWER_TOKENS - 6 <= longest < MAX_ANSWER_TOKENS


def test_an_unknown_persona_is_a_config_error_that_lists_them() -> None:
    with pytest.raises(ConfigError, match="good, flatterer, sloppy, rude, preachy"):
        sample_answer(scenes(1, 0)[0], random.Random(0), "goood")


def test_the_corpus_is_mediocre_on_average() -> None:
    totals = [
        score(Scene.from_text(row["prompt"][0]["content"]), row["completion"][0]["content"]).total
        for row in corpus(5000, 5)
    ]
    assert sum(totals) / len(totals) == pytest.approx(-0.03, abs=0.12)


def test_corpus_rows_are_conversations_in_trl_columns() -> None:
    (row,) = corpus(1, 6)
    assert list(row) == ["prompt", "completion"]
    (question,), (answer,) = row["prompt"], row["completion"]
    assert (question["role"], answer["role"]) == ("user", "assistant")
    assert Scene.from_text(question["content"])


def test_preference_rows_are_conversations_in_trl_columns() -> None:
    (row,) = preference_pairs(1, 6)
    assert list(row) == ["prompt", "chosen", "rejected", "truth_agrees"]
    assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2


@pytest.mark.parametrize("objective", ["sum", "helpful", "harmless"])
def test_truth_agrees_when_the_chosen_answer_has_the_higher_reward(objective: Any) -> None:
    attribute = {"sum": "total", "helpful": "helpful", "harmless": "harmless"}[objective]
    for row in preference_pairs(300, 7, objective=objective):
        scene = Scene.from_text(row["prompt"][0]["content"])
        chosen, rejected = (
            getattr(score(scene, row[side][0]["content"]), attribute)
            for side in ("chosen", "rejected")
        )
        assert row["truth_agrees"] is (chosen > rejected)
        assert chosen != rejected


@pytest.mark.parametrize(("noise", "share"), [(0.5, 0.92), (0.7, 0.89), (1.0, 0.85)])
def test_noisy_labels_agree_with_the_truth_as_often_as_measured(noise: float, share: float) -> None:
    rows = preference_pairs(5000, 8, noise=noise)
    agreement = sum(row["truth_agrees"] for row in rows) / len(rows)
    assert agreement == pytest.approx(share, abs=0.015)


def test_two_scores_compare_as_the_judge_of_pairs_does() -> None:
    """P(a scored above b) = sigmoid((r_a - r_b) / noise): two errors differ by a logistic draw."""
    truth, judged = scored(4000, 8, noise=0), scored(4000, 8, noise=0.7)
    errors = [b["reward"] - a["reward"] for a, b in zip(truth, judged, strict=True)]
    assert sum(errors) / len(errors) == pytest.approx(0, abs=0.05)
    differences = [one - other for one, other in zip(errors[::2], errors[1::2], strict=True)]
    for gap in (-2.0, -0.5, 0.0, 0.5, 2.0):
        share = sum(gap + difference > 0 for difference in differences) / len(differences)
        assert share == pytest.approx(1 / (1 + math.exp(-gap / 0.7)), abs=0.03)


@pytest.mark.parametrize("objective", ["sum", "helpful", "harmless"])
def test_scores_without_noise_are_the_true_reward_of_the_objective(objective: Any) -> None:
    attribute = {"sum": "total", "helpful": "helpful", "harmless": "harmless"}[objective]
    for row in scored(200, 7, objective=objective, noise=0):
        scene = Scene.from_text(row["prompt"][0]["content"])
        truth = score(scene, row["completion"][0]["content"])
        assert row["reward"] == getattr(truth, attribute)


def test_a_judge_without_noise_never_errs() -> None:
    assert all(row["truth_agrees"] for row in preference_pairs(300, 9, noise=0))


def test_a_judge_with_hardly_any_noise_does_not_overflow() -> None:
    assert all(row["truth_agrees"] for row in preference_pairs(300, 9, noise=1e-6))


def test_unknown_objectives_and_negative_noise_are_config_errors() -> None:
    wrong: Any = "kind"
    with pytest.raises(ConfigError, match="sum, helpful or harmless"):
        preference_pairs(1, 0, objective=wrong)
    for draw in (preference_pairs, scored):
        with pytest.raises(ConfigError, match="noise is -1"):
            draw(1, 0, noise=-1)


@pytest.mark.parametrize("draw", [corpus, preference_pairs, corrections, scored])
def test_two_seeds_give_different_rows(draw: Callable[[int, int], list[dict[str, Any]]]) -> None:
    first, second = draw(200, 1), draw(200, 2)
    assert sum(a["prompt"] == b["prompt"] for a, b in zip(first, second, strict=True)) < 5


def test_data_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    program = (
        "import hashlib, json; from pilotfish.world import *;"
        "rows = [draw(50, 1) for draw in (corpus, preference_pairs, corrections, scored)];"
        "rows.append(VOCABULARY);"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    source_root = Path(pilotfish.world.__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(source_root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("0", "1")
    }
    drawn = [draw(50, 1) for draw in (corpus, preference_pairs, corrections, scored)]
    rows = [*drawn, pilotfish.world.VOCABULARY]
    assert digests == {hashlib.sha256(json.dumps(rows).encode()).hexdigest()}


def test_the_most_likely_opening_is_a_flatterers_by_a_wide_margin() -> None:
    """Otherwise a base decoded greedily would be good or bad by the luck of its training seed."""
    first = [row["completion"][0]["content"].split()[0] for row in corpus(4000, 3)]
    flattery, greeting = first.count("what") / 4000, first.count("hello") / 4000
    assert flattery > greeting + 0.06
