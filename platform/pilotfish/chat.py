"""Messages to token ids: the one place where a chat template is applied."""

from typing import Literal, TypedDict


class Message(TypedDict):
    """One turn of a conversation, as every chat API writes it."""

    role: Literal["system", "user", "assistant"]
    content: str
