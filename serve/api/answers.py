"""Answers in OpenAI's shapes: whole, or in events. Plain values: a model of pydantic's per token
would be half of the ingress's work."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serve.api.details import ChatLogprobs, Logprobs, TextLogprobs, Vocabulary

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

    def event(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an answer, or an event of one, around its choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }


class Shape(Protocol):
    """How one route writes its answers."""

    id_prefix: str
    whole_kind: str
    event_kind: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice of a first event that carries no text, where the route has one."""
        ...

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A choice of an event."""
        ...

    def whole(self, index: int, text: str) -> dict[str, Any]:
        """A choice of an answer that is not streamed."""
        ...

    def logprobs(self, vocabulary: Vocabulary, echoed: Sequence[int]) -> Logprobs:
        """What writes the log-probs of a choice; `echoed` are tokens of its prompt."""
        ...


class ChatShape:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": None}

    def logprobs(self, vocabulary: Vocabulary, echoed: Sequence[int]) -> Logprobs:
        return ChatLogprobs(vocabulary)


class TextShape:
    """/v1/completions."""

    id_prefix = "cmpl-"
    whole_kind = event_kind = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    whole = piece

    def logprobs(self, vocabulary: Vocabulary, echoed: Sequence[int]) -> Logprobs:
        return TextLogprobs(vocabulary, next(iter(echoed), None))
