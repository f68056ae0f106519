"""Raw rows to records: the column conventions of TRL and of published sets.

    prompt + chosen + rejected          strings (raw text) or lists of messages
    chosen + rejected                   whole conversations: lists of messages, or HH-RLHF strings
    prompt + completion                 strings or lists of messages
    prompt + completion + label         TRL's unpaired preferences: an answer, wanted or not
    prompt + completion + reward        an answer and what a judge gave it
    messages                            a whole conversation, of which the last turn is the answer
    question + answer + correction      Aligner's rows; `prompt` may stand for `question`
    question + answer                   the same before anything corrected them
    prompt + response_0 + response_1    PKU-SafeRLHF, with better_response_id, safer_response_id
    prompt                              for prompts alone

UltraFeedback binarized has `prompt` as text beside whole conversations. A `question`, and the
prompt of PKU-SafeRLHF, is what a user asks: a conversation of one turn. A preference row used as a
demonstration gives its chosen side. Every refusal is a `DataError` that says what is wrong with the
row but not which row it was: the loader knows that.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from pilotfish.chat import Message, check_prompt
from pilotfish.config import Config
from pilotfish.data.records import (
    Correction,
    Demonstration,
    PreferencePair,
    PromptText,
    ScoredAnswer,
)
from pilotfish.errors import DataError, PromptError

Row: TypeAlias = Mapping[str, Any]
Objective: TypeAlias = Literal["better", "safer"]
"""Which of PKU-SafeRLHF's two labels decides: the more helpful response, or the safer one."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_RESPONSES = ("response_0", "response_1")


class Columns(Config):
    """The names that a data set gives to the columns we read."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    messages: str = "messages"
    label: str = "label"
    reward: str = "reward"
    question: str = "question"
    answer: str = "answer"
    correction: str = "correction"


T = TypeVar("T")
Reader: TypeAlias = Callable[[Row, Columns, Objective | None], T]


def to_pair(row: Row, columns: Columns, objective: Objective | None = None) -> PreferencePair:
    """Read a preference row. Raises `DataError`."""
    given = _given(row, columns, objective)
    chosen_side, rejected_side = _sides(row, columns, objective)
    prompt, chosen = _read_side(given, chosen_side, name="chosen")
    other_prompt, rejected = _read_side(given, rejected_side, name="rejected")
    if prompt != other_prompt:
        raise DataError("the prompts of chosen and rejected differ, so they are not comparable")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same answer, which prefers nothing")
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected)


def to_demonstration(
    row: Row, columns: Columns, objective: Objective | None = None
) -> Demonstration:
    """Read a demonstration, or the chosen side of a preference row. Raises `DataError`."""
    if columns.completion in row and row.get(columns.label) is False:
        raise DataError(f"{columns.label} says that this completion is not wanted")
    prompt, answer = _read_answer(row, columns, objective)
    return Demonstration(prompt=prompt, completion=answer)


def to_answered(row: Row, columns: Columns, objective: Objective | None = None) -> Demonstration:
    """Read a prompt and an answer to it, be it worth imitating or not. Raises `DataError`.

    It is in the column `answer`, or where a demonstration has it.
    """
    if columns.answer in row:
        given = _asked(row, columns, objective)
        prompt, answer = _read_side(given, row[columns.answer], name="answer")
    else:
        prompt, answer = _read_answer(row, columns, objective)
    return Demonstration(prompt=prompt, completion=answer)


def to_correction(row: Row, columns: Columns, objective: Objective | None = None) -> Correction:
    """Read an answer and its correction. Raises `DataError`."""
    _require(row, columns.answer, columns.correction)
    given = _asked(row, columns, objective)
    prompt, answer = _read_side(given, row[columns.answer], name="answer")
    _, correction = _read_side(given, row[columns.correction], name="correction")
    return Correction(prompt=prompt, answer=answer, correction=correction)


def to_scored(row: Row, columns: Columns, objective: Objective | None = None) -> ScoredAnswer:
    """Read an answer and its reward: 1 and 0 for a label of true and false. Raises `DataError`."""
    _require(row, columns.completion)
    prompt, answer = _read_answer(row, columns, objective)
    return ScoredAnswer(prompt=prompt, completion=answer, reward=_reward(row, columns))


def to_prompt(row: Row, columns: Columns, objective: Objective | None = None) -> PromptText:
    """Read the prompt of any row; a row without answers needs a prompt column alone."""
    if any(name in row for name in (columns.completion, columns.messages, columns.chosen)):
        return _read_answer(row, columns, objective)[0]
    return _as_prompt(_asked(row, columns, objective))


def parse_hh_dialogue(text: str) -> tuple[Message, ...]:
    r"""Split HH-RLHF's "\n\nHuman: ...\n\nAssistant: ..." into messages.

    Turns are stripped of surrounding white space. Two turns of one speaker in a row are refused:
    in the published files a human turn is missing there, lost inside the text of the assistant.
    """
    lead, *parts = _HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    if lead or not parts or parts[0] != "Human":
        raise DataError(
            'the text is not a dialogue that begins with "\\n\\nHuman:"; add a prompt column, or '
            "name it in data.columns"
        )
    if any(one == two for one, two in zip(parts[0::2], parts[2::2], strict=False)):
        raise DataError("the dialogue has two turns of one speaker in a row")
    role_of = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        _message(role_of[speaker], said.strip())
        for speaker, said in zip(parts[0::2], parts[1::2], strict=True)
    )


def _read_answer(row: Row, columns: Columns, objective: Objective | None) -> tuple[PromptText, str]:
    """Return the prompt of a row and its one answer, or the chosen one."""
    given = _given(row, columns, objective)
    if columns.completion in row:
        _require(row, columns.prompt)
        return _read_side(given, row[columns.completion], name="completion")
    if columns.messages in row:
        return _read_side(None, row[columns.messages], name="messages")
    if _is_labelled(row):
        return _read_side(given, _labelled_sides(row, objective)[0], name="chosen")
    _require(row, columns.chosen, hint=f" (nor {columns.completion!r}, {columns.messages!r})")
    return _read_side(given, row[columns.chosen], name="chosen")


def _given(row: Row, columns: Columns, objective: Objective | None) -> Any:
    """Return the prompt column, or None: the prompt may be inside a conversation."""
    given = row.get(columns.prompt)
    if _is_labelled(row):
        return _as_asked(given)
    if objective is not None:
        raise DataError(
            f"data.objective is {objective!r}, but the row has no column {_RESPONSES[0]!r}: it is "
            f"not labelled by objectives; the row has {sorted(row)}; leave data.objective out"
        )
    return given


def _asked(row: Row, columns: Columns, objective: Objective | None) -> Any:
    """Return the prompt column, or what a user asks in the question column."""
    given = _given(row, columns, objective)
    if given is not None:
        return given
    if columns.question not in row:
        _require(row, columns.prompt, hint=f" (nor {columns.question!r})")
    return _as_asked(row.get(columns.question))


def _as_asked(value: Any) -> Any:
    return (_message("user", value),) if isinstance(value, str) else value


def _sides(row: Row, columns: Columns, objective: Objective | None) -> tuple[Any, Any]:
    """Return what was preferred, and what it was preferred to."""
    if _is_labelled(row):
        return _labelled_sides(row, objective)
    if columns.completion in row and columns.chosen not in row:
        raise DataError(
            f"the row has one answer, in {columns.completion!r}, and none to compare it with: with"
            f" {columns.label!r} or {columns.reward!r} it is a scored answer, not a pair"
        )
    _require(row, columns.chosen, columns.rejected)
    return row[columns.chosen], row[columns.rejected]


def _is_labelled(row: Row) -> bool:
    return _RESPONSES[0] in row


def _labelled_sides(row: Row, objective: Objective | None) -> tuple[Any, Any]:
    if objective is None:
        raise DataError(
            "the row compares two responses by two objectives; set data.objective to `better` (the "
            "more helpful response is chosen) or to `safer`"
        )
    label = f"{objective}_response_id"
    _require(row, *_RESPONSES, label)
    if row[label] not in (0, 1):
        raise DataError(f"{label} is {row[label]!r}, wanted 0 or 1")
    return row[_RESPONSES[row[label]]], row[_RESPONSES[1 - row[label]]]


def _reward(row: Row, columns: Columns) -> float:
    if columns.reward not in row:
        _require(row, columns.label, hint=f" (nor {columns.reward!r})")
        if not isinstance(row[columns.label], bool):
            raise DataError(f"{columns.label} is {row[columns.label]!r}, wanted true or false")
        return float(row[columns.label])
    reward = row[columns.reward]
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise DataError(f"{columns.reward} is {reward!r}, wanted a finite number")
    return float(reward)


def _read_side(given: Any, value: Any, *, name: str) -> tuple[PromptText, str]:
    """Return prompt and answer, from an explicit prompt (or None) and one answer column."""
    if isinstance(value, str) and given is not None:
        prompt, answer = _as_prompt(given), value
    else:
        turns = parse_hh_dialogue(value) if isinstance(value, str) else _as_messages(value, name)
        prompt, answer = _prompt_beside(given, turns[:-1], name), _assistant_text(turns[-1], name)
    if not answer.strip():
        raise DataError(f"the {name} answer is empty")
    try:
        check_prompt(prompt)
    except PromptError as error:
        raise DataError(f"the prompt of {name} cannot be used: {error}") from error
    return prompt, answer


def _prompt_beside(given: Any, before: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """Return the turns before the answer; an explicit prompt may not say anything else."""
    if given is None:
        return before
    if not before:
        return (
            (_message("user", given),) if isinstance(given, str) else _as_messages(given, "prompt")
        )
    if isinstance(given, str):
        agrees = any(given.strip() == turn["content"].strip() for turn in before)
    else:
        agrees = _as_messages(given, "prompt") == before
    if not agrees:
        raise DataError(f"the prompt column does not agree with the conversation in {name}")
    return before


def _assistant_text(message: Message, name: str) -> str:
    if message["role"] != "assistant":
        raise DataError(f"{name} ends with a {message['role']} turn, wanted the assistant's answer")
    return message["content"]


def _as_prompt(value: Any) -> PromptText:
    return value if isinstance(value, str) else _as_messages(value, "prompt")


def _as_messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        kind = type(value).__name__
        raise DataError(f"{name} is a {kind}, wanted text or a list of messages that is not empty")
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise DataError(f"{name} holds a turn without role and text content")
    return tuple(_message(turn.get("role"), turn["content"]) for turn in value)


def _message(role: Any, content: str) -> Message:
    if role not in ("system", "user", "assistant"):
        raise DataError(f"a turn has role {role!r}, wanted system, user or assistant")
    return Message(role=role, content=content)


def _require(row: Row, *names: str, hint: str = "") -> None:
    for name in names:
        if name not in row:
            raise DataError(
                f"there is no column {name!r}{hint}; the row has {sorted(row)}; name the columns "
                "in data.columns"
            )
