"""Preference pairs out of corrections: what is kept, what is left out, and that all is counted."""

from typing import Any

import pytest

from pilotfish.data.formats import Columns, to_pair
from pilotfish.data.preferences import best_of_each, preference_rows

QUESTION = [{"role": "user", "content": "how ?"}]


def corrected(answer: str, correction: str, prompt: Any = "how ?", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, "correction": correction, **more}


def test_corrections_are_preferred_to_the_answers_they_replace() -> None:
    rows, report = preference_rows([corrected("bad", "good")])
    assert rows == [{"prompt": "how ?", "chosen": "good", "rejected": "bad"}]
    assert (report.num_rows, report.num_pairs) == (1, 1)


@pytest.mark.parametrize(
    ("row", "counted_as"),
    [
        (corrected("same", "same"), "copied"),
        (corrected(" same\n", "same "), "copied"),
        (corrected("", "  "), "empty"),
        (corrected("bad", " \n"), "empty"),
        (corrected("bad", "goo", finish_reason="length"), "cut"),
        (corrected("bad ", " good"), "duplicates"),
    ],
)
def test_what_prefers_nothing_is_left_out_and_counted_once(
    row: dict[str, Any], counted_as: str
) -> None:
    rows, report = preference_rows([corrected("bad", "good"), row])
    assert len(rows) == 1
    left_out = {"empty": 0, "copied": 0, "cut": 0, "duplicates": 0, counted_as: 1}
    assert report.metrics() == {
        "pairs/num": 1,
        **{f"pairs/{name}": number for name, number in left_out.items()},
    }


def test_the_same_correction_of_another_question_is_no_duplicate() -> None:
    rows, _ = preference_rows([corrected("a", "b"), corrected("a", "b", prompt="why ?")])
    assert [row["prompt"] for row in rows] == ["how ?", "why ?"]


def test_every_row_is_accounted_for() -> None:
    made = [corrected(a, b) for a in ("", "x", " x", "y") for b in ("", "x", "y", "z")] * 2
    rows, report = preference_rows(made)
    counted = report.metrics()
    assert sum(counted.values()) == report.num_rows == len(made)
    assert len({(row["chosen"], row["rejected"].strip()) for row in rows}) == len(rows)
    assert all(row["chosen"].strip() != row["rejected"].strip() for row in rows)


def test_pairs_behind_a_conversation_are_turns_that_training_reads_back() -> None:
    [row], _ = preference_rows([corrected("bad", "good", prompt=QUESTION)])
    assert row["chosen"] == [{"role": "assistant", "content": "good"}]
    pair = to_pair(row, Columns())
    assert (pair.prompt, pair.chosen, pair.rejected) == (tuple(QUESTION), "good", "bad")


def test_the_best_of_several_answers_is_preferred_to_the_worst() -> None:
    rewards = {"a": 0.5, "b": 2.0, "c": -1.0, "d": 2.0}
    scored = [
        {
            "prompt": QUESTION,
            "completion": [{"role": "assistant", "content": text}],
            "reward": reward,
        }
        for text, reward in rewards.items()
    ]
    other = [{"prompt": "why ?", "completion": text, "reward": 1.0} for text in ("e", "f")]
    rows, report = preference_rows(best_of_each([*scored, *other]))
    assert [(to_pair(row, Columns()).chosen, to_pair(row, Columns()).rejected) for row in rows] == [
        ("b", "c")
    ]
    assert report.num_copied == 1, "equal rewards prefer nothing"
