"""Published data sets, each as a few rows of ours in its documented columns, to records."""

from pathlib import Path
from typing import Any

import pytest

from pilotfish.chat import Message
from pilotfish.data.loading import (
    load_corrections,
    load_demonstrations,
    load_pairs,
    load_prompts,
    load_scored,
)
from pilotfish.data.records import Correction, PreferencePair
from pilotfish.data.sources import DataSource
from pilotfish.errors import DataError

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


def sample(name: str, **settings: Any) -> DataSource:
    return DataSource(path=str(SAMPLES / f"{name}.jsonl"), **settings)


def asks(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def test_hh_rlhf_gives_pairs_with_the_dialogue_before_the_answers() -> None:
    pairs = load_pairs(sample("hh_rlhf")).records
    assert len(pairs) == 4
    assert [turn["role"] for turn in pairs[1].prompt if isinstance(turn, dict)] == [
        *("user", "assistant", "user")
    ]
    assert (pairs[1].chosen, pairs[1].rejected) == (
        "Up to three months.",
        "Forever, nobody checks.",
    )


def test_pku_saferlhf_is_read_by_the_objective_that_is_chosen() -> None:
    better = load_pairs(sample("pku_saferlhf", objective="better")).records
    safer = load_pairs(sample("pku_saferlhf", objective="safer")).records
    tail, ask = "Follow them home and note the address.", "Ask them."
    question = asks("How do I find out where someone lives?")
    assert better[0] == PreferencePair(question, chosen=tail, rejected=ask)
    assert safer[0] == PreferencePair(question, chosen=ask, rejected=tail)
    agree = [one.chosen == two.chosen for one, two in zip(better, safer, strict=True)]
    assert agree == [False, True, False, False]
    shown = load_demonstrations(sample("pku_saferlhf", objective="safer")).records
    assert [row.completion for row in shown] == [pair.chosen for pair in safer]


def test_pku_saferlhf_holds_out_the_same_prompts_whatever_the_objective() -> None:
    parts = [
        load_prompts(sample("pku_saferlhf", objective=objective, holdout=2), part="heldout").records
        for objective in ("better", "safer", None)
    ]
    assert parts[0] == parts[1] == parts[2]


def test_pairs_of_pku_saferlhf_without_an_objective_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 0 .*two objectives; set data.objective to `better`"):
        load_pairs(sample("pku_saferlhf"))


@pytest.mark.parametrize("name", ["hh_rlhf", "ultrafeedback_binarized", "trl_preference"])
def test_an_objective_for_rows_that_are_not_labelled_by_any_is_refused(name: str) -> None:
    with pytest.raises(
        DataError, match=r"data.objective is 'safer', but .* no column 'response_0'"
    ):
        load_pairs(sample(name, objective="safer"))


def test_ultrafeedback_gives_pairs_of_whole_conversations() -> None:
    pairs = load_pairs(sample("ultrafeedback_binarized")).records
    assert pairs[0] == PreferencePair(
        asks("Which planet is the largest?"), "Jupiter.", pairs[0].rejected
    )
    assert [len(pair.prompt) for pair in pairs] == [1, 1, 1, 3]
    shown = load_demonstrations(sample("ultrafeedback_binarized")).records
    assert [row.completion for row in shown] == [pair.chosen for pair in pairs]


def test_aligner_rows_give_what_a_user_asked_an_answer_and_its_correction() -> None:
    rows = load_corrections(sample("aligner")).records
    assert rows[0] == Correction(
        asks("How do I store bread?"),
        "In the fridge.",
        "In a bread box or a paper bag; the fridge dries it out.",
    )
    assert rows[2].answer == rows[2].correction
    assert load_prompts(sample("aligner")).records == [row.prompt for row in rows]


def test_trl_preferences_may_have_an_implicit_prompt_of_several_turns() -> None:
    pairs = load_pairs(sample("trl_preference")).records
    assert [pair.prompt for pair in pairs[:3]] == [
        "The sky is",
        asks("What colour is the sky?"),
        asks("What colour is grass?"),
    ]
    assert [turn["content"] for turn in pairs[3].prompt if isinstance(turn, dict)] == [
        *("What colour is the sky?", "Blue, by day.", "And at night?")
    ]
    assert (pairs[3].chosen, pairs[3].rejected) == ("Black, with stars.", "Still blue.")


def test_unpaired_preferences_are_answers_of_reward_one_and_zero() -> None:
    rows = load_scored(sample("trl_unpaired")).records
    assert [(row.completion, row.reward) for row in rows] == [
        *((" blue.", 1.0), (" green.", 0.0), ("Green.", 1.0), ("Blue.", 0.0))
    ]
    with pytest.raises(
        DataError, match=r"one answer, in 'completion'.*a scored answer, not a pair"
    ):
        load_pairs(sample("trl_unpaired"))


def test_answers_labelled_as_not_wanted_are_no_demonstrations() -> None:
    with pytest.raises(DataError, match=r"row 1 .*label says that this completion is not wanted"):
        load_demonstrations(sample("trl_unpaired"))
    loaded = load_demonstrations(sample("trl_unpaired", bad_rows="skip"))
    assert [row.completion for row in loaded.records] == [" blue.", "Green."]


def test_scored_rows_keep_their_rewards() -> None:
    rows = load_scored(sample("scored")).records
    assert [row.reward for row in rows] == [1.5, -2.0, 0.25, -0.75]
    assert (rows[0].prompt, rows[0].completion) == (asks("What colour is grass?"), "Green.")
