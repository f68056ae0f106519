"""Answers in OpenAI's shapes: whole, or in pieces. Text goes in; nothing here decodes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice

DONE = "data: [DONE]\n\n"


def sse(event: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What every piece of an answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A finished completion; `extras` are the fields that are ours."""

    text: str
    finish_reason: Any
    usage: CompletionUsage
    choice_extras: Mapping[str, Any]
    extras: Mapping[str, Any]


class Shape(Protocol):
    """How one route writes its answers."""

    id_prefix: str

    def opening(self) -> dict[str, Any] | None:
        """The choice of a first event that carries no text, where the route has one."""
        ...

    def piece(self, text: str) -> dict[str, Any]:
        """The choice of an event with text."""
        ...

    def event(self, header: Header, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An event around its choices."""
        ...

    def whole(self, header: Header, outcome: Outcome) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...


class ChatShape:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"

    def opening(self) -> dict[str, Any] | None:
        return {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, text: str) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "finish_reason": None}

    def event(self, header: Header, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return _event("chat.completion.chunk", header, choices)

    def whole(self, header: Header, outcome: Outcome) -> dict[str, Any]:
        message = ChatCompletionMessage(role="assistant", content=outcome.text)
        choice = Choice(index=0, message=message, finish_reason=outcome.finish_reason)
        body = ChatCompletion(
            id=header.id,
            object="chat.completion",
            created=header.created,
            model=header.model,
            choices=[choice],
            usage=outcome.usage,
            system_fingerprint=header.system_fingerprint,
        )
        return _whole(body.model_dump(exclude_unset=True), outcome)


class TextShape:
    """/v1/completions."""

    id_prefix = "cmpl-"

    def opening(self) -> dict[str, Any] | None:
        return None

    def piece(self, text: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": None}

    def event(self, header: Header, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return _event("text_completion", header, choices)

    def whole(self, header: Header, outcome: Outcome) -> dict[str, Any]:
        choice = CompletionChoice(index=0, text=outcome.text, finish_reason=outcome.finish_reason)
        body = Completion(
            id=header.id,
            object="text_completion",
            created=header.created,
            model=header.model,
            choices=[choice],
            usage=outcome.usage,
            system_fingerprint=header.system_fingerprint,
        )
        return _whole(body.model_dump(exclude_unset=True), outcome)


def _event(kind: str, header: Header, choices: list[dict[str, Any]]) -> dict[str, Any]:
    # Plain values: a pydantic model per token would be half of the ingress's work.
    return {
        "id": header.id,
        "object": kind,
        "created": header.created,
        "model": header.model,
        "system_fingerprint": header.system_fingerprint,
        "choices": choices,
    }


def _whole(body: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    body["choices"][0].update(outcome.choice_extras)
    return {**body, **outcome.extras}
