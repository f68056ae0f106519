"""Raw rows to records: the accepted columns, and why a row is refused."""

from typing import Any

import pytest

from pilotfish.chat import Message
from pilotfish.data.formats import (
    Columns,
    parse_hh_dialogue,
    to_correction,
    to_demonstration,
    to_pair,
    to_prompt,
    to_scored,
)
from pilotfish.data.records import Correction, Demonstration, PreferencePair, ScoredAnswer
from pilotfish.errors import DataError

COLUMNS = Columns()
ASK: Message = {"role": "user", "content": "hi"}
YES: Message = {"role": "assistant", "content": "yes"}
NO: Message = {"role": "assistant", "content": "no"}
SYSTEM: Message = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        pytest.param({"prompt": "hi", "chosen": "yes", "rejected": "no"}, "hi", id="strings"),
        pytest.param(
            {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, (ASK,), id="message-lists"
        ),
        pytest.param(
            {"prompt": [ASK], "chosen": "yes", "rejected": "no"}, (ASK,), id="messages-and-strings"
        ),
        pytest.param(
            {"prompt": "hi", "chosen": [YES], "rejected": [NO]}, (ASK,), id="string-and-messages"
        ),
        pytest.param(
            {"prompt": "hi", "chosen": [ASK, YES], "rejected": [ASK, NO]},
            (ASK,),
            id="question-repeated-in-the-conversation",
        ),
        pytest.param(
            {"chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, ASK, NO]},
            (SYSTEM, ASK),
            id="implicit-messages",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: yes",
                "rejected": "\n\nHuman: hi\n\nAssistant: no",
            },
            (ASK,),
            id="implicit-hh-strings",
        ),
    ],
)
def test_every_preference_format_reads_as_the_same_pair(
    row: dict[str, Any], prompt: object
) -> None:
    expected = PreferencePair(prompt=prompt, chosen="yes", rejected="no")  # pyright: ignore[reportArgumentType] - parametrised
    assert to_pair(row, COLUMNS) == expected
    assert to_prompt(row, COLUMNS) == prompt


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        pytest.param({"prompt": "hi", "completion": "yes"}, "hi", id="strings"),
        pytest.param({"prompt": [ASK], "completion": [YES]}, (ASK,), id="message-lists"),
        pytest.param({"messages": [ASK, NO, ASK, YES]}, (ASK, NO, ASK), id="messages"),
        pytest.param(
            {"prompt": "hi", "chosen": "yes", "rejected": "no"}, "hi", id="chosen-side-of-a-pair"
        ),
        pytest.param(
            {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "?"},
            (ASK,),
            id="chosen-hh-dialogue",
        ),
    ],
)
def test_every_demonstration_format_reads_as_prompt_and_completion(
    row: dict[str, Any], prompt: object
) -> None:
    expected = Demonstration(prompt=prompt, completion="yes")  # pyright: ignore[reportArgumentType] - parametrised
    assert to_demonstration(row, COLUMNS) == expected


def test_a_row_without_answers_still_gives_its_prompt() -> None:
    assert to_prompt({"prompt": "hi", "id": 7}, COLUMNS) == "hi"


def test_columns_can_have_other_names() -> None:
    columns = Columns(prompt="question", chosen="good", rejected="bad")
    row = {"question": "hi", "good": "yes", "bad": "no"}
    assert to_pair(row, columns) == PreferencePair("hi", "yes", "no")


def test_a_dialogue_is_split_at_its_markers_alone() -> None:
    text = "\n\nHuman: Is this Human: speech?\n\nLine two.\n\nAssistant:  Yes.\n\nHuman: ok"
    assert parse_hh_dialogue(text) == (
        {"role": "user", "content": "Is this Human: speech?\n\nLine two."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "ok"},
    )


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "hi", "chosen": "yes"}, r"no column 'rejected'.*data\.columns"),
        ({"prompt": "hi", "chosen": "yes", "rejected": " "}, "rejected answer is empty"),
        ({"prompt": "", "chosen": "yes", "rejected": "no"}, "empty string"),
        ({"prompt": "hi", "chosen": "no", "rejected": "no"}, "same answer"),
        ({"prompt": "hi", "chosen": 3, "rejected": "no"}, "chosen is a int"),
        ({"prompt": "hi", "chosen": [], "rejected": "no"}, "not empty"),
        ({"prompt": "hi", "chosen": ["yes"], "rejected": ["no"]}, "without role"),
        ({"prompt": "hi", "chosen": [ASK], "rejected": [NO]}, "ends with a user turn"),
        ({"prompt": [YES], "chosen": "yes", "rejected": "no"}, "from the assistant"),
        ({"prompt": "bye", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "does not agree"),
        ({"chosen": [ASK, YES], "rejected": [SYSTEM, ASK, NO]}, "prompts .* differ"),
        ({"chosen": [{"role": "bot", "content": "x"}], "rejected": [NO]}, "role 'bot'"),
        ({"chosen": "yes", "rejected": "no"}, "not a dialogue"),
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: yes",
                "rejected": "\n\nHuman: ho\n\nAssistant: no",
            },
            "prompts .* differ",
        ),
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: ok",
                "rejected": "\n\nHuman: hi\n\nAssistant: no",
            },
            "ends with a user turn",
        ),
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: yes\n\nAssistant: yes",
                "rejected": "\n\nHuman: hi\n\nAssistant: no",
            },
            "two turns of one speaker",
        ),
    ],
)
def test_a_bad_preference_row_is_refused_with_the_reason(
    row: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        to_pair(row, COLUMNS)


def test_a_demonstration_without_any_answer_column_is_refused() -> None:
    with pytest.raises(DataError, match=r"no column 'chosen' \(nor 'completion', 'messages'\)"):
        to_demonstration({"prompt": "hi"}, COLUMNS)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        pytest.param({"question": "hi", "answer": "no", "correction": "yes"}, (ASK,), id="aligner"),
        pytest.param({"prompt": "hi", "answer": "no", "correction": "yes"}, "hi", id="raw-text"),
        pytest.param(
            {"prompt": [ASK], "answer": [NO], "correction": [YES]}, (ASK,), id="message-lists"
        ),
        pytest.param(
            {"prompt": [SYSTEM, ASK], "question": "?", "answer": "no", "correction": "yes"},
            (SYSTEM, ASK),
            id="the-prompt-column-comes-first",
        ),
    ],
)
def test_every_correction_format_reads_as_prompt_answer_and_correction(
    row: dict[str, Any], prompt: Any
) -> None:
    assert to_correction(row, COLUMNS) == Correction(prompt, answer="no", correction="yes")
    assert to_prompt(row, COLUMNS) == prompt


def test_columns_of_corrections_and_rewards_can_have_other_names() -> None:
    columns = Columns(question="q", answer="a", correction="c", completion="a", reward="stars")
    row = {"q": "hi", "a": "no", "c": "yes", "prompt": "hi", "stars": 3}
    assert to_scored(row, columns) == ScoredAnswer("hi", "no", 3.0)
    del row["prompt"]
    assert to_correction(row, columns) == Correction((ASK,), "no", "yes")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "hi", "answer": "no"}, "no column 'correction'"),
        ({"answer": "no", "correction": "yes"}, r"no column 'prompt' \(nor 'question'\)"),
        ({"question": "hi", "answer": "no", "correction": " "}, "the correction answer is empty"),
    ],
)
def test_a_bad_correction_row_is_refused_with_the_reason(
    row: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        to_correction(row, COLUMNS)


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({}, r"no column 'label' \(nor 'reward'\)"),
        ({"label": 1}, "label is 1, wanted true or false"),
        ({"reward": True}, "reward is True, wanted a finite number"),
        ({"reward": "good"}, "reward is 'good', wanted a finite number"),
        ({"reward": float("nan")}, "reward is nan, wanted a finite number"),
    ],
)
def test_a_reward_that_is_no_number_is_refused(extra: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        to_scored({"prompt": "hi", "completion": "yes", **extra}, COLUMNS)


def test_a_label_that_names_no_response_is_refused() -> None:
    row = {"prompt": "hi", "response_0": "a", "response_1": "b", "safer_response_id": -1}
    with pytest.raises(DataError, match="safer_response_id is -1, wanted 0 or 1"):
        to_pair(row, COLUMNS, "safer")
    with pytest.raises(DataError, match="no column 'better_response_id'"):
        to_pair(row, COLUMNS, "better")
