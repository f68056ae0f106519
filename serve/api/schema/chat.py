"""POST /v1/chat/completions."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pilotfish.chat import Message
from serve.api.schema.common import Body, refused
from serve.api.schema.generation import GenerationRequest


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn; a list of text parts is their concatenation. A developer is the system."""

    role: Literal["developer", "system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return Message(role=role, content=content)


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatRequest(GenerationRequest):
    """A conversation whose last turn waits for an answer."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise refused("max_tokens", "max_tokens and max_completion_tokens disagree")
        if self.top_logprobs and not (self.logprobs or self.return_steering):
            raise refused("top_logprobs", "top_logprobs needs logprobs, or return_steering")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def num_top(self) -> int:
        """Of how many of the likeliest tokens it wants to hear."""
        return self.top_logprobs

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
