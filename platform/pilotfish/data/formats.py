"""Raw rows to records: the column conventions of TRL, and HH-RLHF's dialogues in one string.

    prompt + chosen + rejected      strings (raw text) or lists of messages
    chosen + rejected               whole conversations: lists of messages, or HH-RLHF strings
    prompt + completion             strings or lists of messages
    messages                        a whole conversation, of which the last turn is the answer
    prompt                          for prompts alone

A preference row used as a demonstration gives its chosen side. Every refusal is a `DataError` that
says what is wrong with the row but not which row it was: the loader knows that.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pilotfish.chat import Message, check_prompt
from pilotfish.config import Config
from pilotfish.data.records import Demonstration, PreferencePair, PromptText
from pilotfish.errors import DataError, PromptError

Row: TypeAlias = Mapping[str, Any]

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Columns(Config):
    """The names that a data set gives to the columns we read."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    messages: str = "messages"


def to_pair(row: Row, columns: Columns) -> PreferencePair:
    """Read a preference row. Raises `DataError`."""
    _require(row, columns.chosen, columns.rejected)
    given = row.get(columns.prompt)
    prompt, chosen = _read_side(given, row[columns.chosen], name="chosen")
    other_prompt, rejected = _read_side(given, row[columns.rejected], name="rejected")
    if prompt != other_prompt:
        raise DataError("the prompts of chosen and rejected differ, so they are not comparable")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same answer, which prefers nothing")
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected)


def to_demonstration(row: Row, columns: Columns) -> Demonstration:
    """Read a demonstration, or the chosen side of a preference row. Raises `DataError`."""
    if columns.completion in row:
        _require(row, columns.prompt)
        prompt, answer = _read_side(row[columns.prompt], row[columns.completion], name="completion")
    elif columns.messages in row:
        prompt, answer = _read_side(None, row[columns.messages], name="messages")
    else:
        _require(row, columns.chosen, hint=f" (nor {columns.completion!r}, {columns.messages!r})")
        prompt, answer = _read_side(row.get(columns.prompt), row[columns.chosen], name="chosen")
    return Demonstration(prompt=prompt, completion=answer)


def to_prompt(row: Row, columns: Columns) -> PromptText:
    """Read the prompt of any row; a row without answers needs a prompt column alone."""
    for name in (columns.completion, columns.messages, columns.chosen):
        if name in row:
            return to_demonstration(row, columns).prompt
    _require(row, columns.prompt)
    return _as_prompt(row[columns.prompt])


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
