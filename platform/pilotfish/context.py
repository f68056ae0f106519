"""Prompts and contexts: what models and guides are asked about."""

from dataclasses import dataclass

from pilotfish.chat import Message


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the user asked: ids for the base model, and the text for guides that need their own."""

    token_ids: list[int]
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """One sequence so far. `token_ids` is prompt plus completion; it is live and only grows.

    `key` names the sequence so that a cache can be found; it carries no meaning.
    """

    key: int
    prompt: Prompt
    token_ids: list[int]
