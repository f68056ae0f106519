"""Prompts and contexts: what models and guides are asked about."""

from dataclasses import dataclass

from pilotfish.chat import Message


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the user asked: ids for the base model, and the text for guides that need their own."""

    token_ids: list[int]
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    """The prompt as it was written, where it was no conversation."""


@dataclass(frozen=True, slots=True)
class Context:
    """One sequence so far. `token_ids` is prompt plus completion; it is live and only grows.

    `key` names the sequence so that a cache can be found; it carries no meaning. Contexts of one
    call that share a key are prefixes of one another: one sequence at several positions.
    """

    key: int
    prompt: Prompt
    token_ids: list[int]
    parent: int | None = None
    """Key of a sequence that begins alike: where a cache may look first. A hint, never a need."""
