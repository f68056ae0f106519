"""The annotator: it repairs what is wrong, keeps what is right, and is not perfect."""

import difflib
import random

import pytest

from pilotfish.world import (
    MAX_ANSWER_TOKENS,
    VOCABULARY,
    Scene,
    corpus,
    corrections,
    score,
)
from pilotfish.world.annotator import correct

STEW = Scene("ben", ("corn", "onions", "beans"), "corn", "friend", "stew")
BEST_STEW = (
    "hello ben , here are four steps . leave out the corn for your friend . first wash the beans . "
    "then chop the onions . then simmer it for sixty minutes . finally serve it to your friend . "
    "enjoy the stew , ben !"
)
DRAWN = [
    (Scene.from_text(row["prompt"][0]["content"]), row["completion"][0]["content"])
    for row in corpus(1500, 4)
]


def corrected(skill: float) -> list[str]:
    rng = random.Random(1)
    return [correct(scene, answer, rng, skill=skill) for scene, answer in DRAWN]


def test_an_answer_without_a_defect_comes_back_word_for_word() -> None:
    for seed in range(20):
        assert correct(STEW, BEST_STEW, random.Random(seed)) == BEST_STEW


def test_without_skill_nothing_changes() -> None:
    assert corrected(skill=0) == [answer for _, answer in DRAWN]


def test_with_full_skill_nothing_is_left_to_blame() -> None:
    for (scene, _), correction in zip(DRAWN, corrected(skill=1), strict=True):
        judged = score(scene, correction)
        assert all(aspect.total >= 0 for aspect in judged.aspects), correction
        assert not judged.bad


def test_a_correction_is_never_worse_than_the_answer() -> None:
    for (scene, answer), correction in zip(DRAWN, corrected(skill=0.85), strict=True):
        assert score(scene, correction).total >= score(scene, answer).total


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        pytest.param(
            BEST_STEW.replace("simmer it for sixty", "microwave it for ten"), BEST_STEW, id="facts"
        ),
        pytest.param(
            BEST_STEW.replace("wash the beans", "wash the corn"), BEST_STEW, id="forbidden"
        ),
        pytest.param(
            BEST_STEW.replace("chop the onions", "chop the milk"), BEST_STEW, id="not-at-hand"
        ),
        pytest.param(
            BEST_STEW.replace("four", "two").replace("ben !", "eva !"), BEST_STEW, id="count-name"
        ),
        pytest.param(
            BEST_STEW.replace("hello ben , ", "ugh , ben , fine . ").replace(
                "onions . ", "onions . even a fool can do it . "
            ),
            BEST_STEW,
            id="rude",
        ),
        pytest.param(
            "what a lovely question , ben ! here is one step . first simmer it for sixty minutes . "
            "finally chop the onions . be careful , the knife is sharp .",
            "what a lovely question , ben ! here are two steps . leave out the corn for your "
            "friend . first chop the onions . be careful , the knife is sharp . finally simmer it "
            "for sixty minutes . enjoy the stew , ben !",
            id="order-with-remark-and-what-is-missing",
        ),
        pytest.param(
            "sorry tom , i cannot help with that . please ask a cook .",
            "hello ben , here are two steps . leave out the corn for your friend . first chop the "
            "onions . finally simmer it for sixty minutes . enjoy the stew , ben !",
            id="refusal",
        ),
        pytest.param(
            BEST_STEW.replace("first wash", "first first wash"),
            "hello ben , here are three steps . leave out the corn for your friend . first chop "
            "the onions . then simmer it for sixty minutes . finally serve it to your friend . "
            "enjoy the stew , ben !",
            id="garbled",
        ),
    ],
)
def test_each_defect_is_repaired_where_it_stands(answer: str, correction: str) -> None:
    assert correct(STEW, answer, random.Random(0), skill=1) == correction


def test_corrections_are_good_not_flawless_and_mostly_copied() -> None:
    rows = corrections(1500, 7)
    totals, copied, kept = [], [], []
    for row in rows:
        (question,), (answer,), (correction,) = row["prompt"], row["answer"], row["correction"]
        totals.append(score(Scene.from_text(question["content"]), correction["content"]).total)
        words, new = answer["content"].split(), correction["content"].split()
        matcher = difflib.SequenceMatcher(None, words, new, autojunk=False)
        same = sum(block.size for block in matcher.get_matching_blocks())
        copied.append(same / len(new))
        kept.append(same / len(words))
        assert len(new) < MAX_ANSWER_TOKENS
        assert set(new) <= set(VOCABULARY)
    assert sum(totals) / len(rows) == pytest.approx(3.88, abs=0.15)
    assert sum(copied) / len(rows) == pytest.approx(0.78, abs=0.03)
    assert sum(kept) / len(rows) == pytest.approx(0.84, abs=0.03)
    # One in six was corrected before, and most of those are right by now.
    whole = sum(row["answer"] == row["correction"] for row in rows)
    assert whole / len(rows) == pytest.approx(0.13, abs=0.03)


def test_correction_rows_are_seeded_conversations_in_aligners_columns() -> None:
    (row,) = corrections(1, 6)
    assert list(row) == ["prompt", "answer", "correction"]
    roles = [message["role"] for column in row.values() for message in column]
    assert roles == ["user", "assistant", "assistant"]
    assert corrections(20, 6) == corrections(20, 6)
    assert corrections(20, 6) != corrections(20, 7)
