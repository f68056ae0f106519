"""What a row of a data set means: plain text, before any tokenizer."""

from dataclasses import dataclass
from typing import TypeAlias

from pilotfish.chat import Message

PromptText: TypeAlias = str | tuple[Message, ...]
"""Raw text, or the turns of a conversation; see `pilotfish.chat.render_prompt`."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, of which `chosen` was preferred."""

    prompt: PromptText
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the answer to imitate."""

    prompt: PromptText
    completion: str


@dataclass(frozen=True, slots=True)
class Correction:
    """An answer to a prompt, and the better one that an annotator made of it."""

    prompt: PromptText
    answer: str
    correction: str


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer to a prompt, and the number that a judge gave it; more is better."""

    prompt: PromptText
    completion: str
    reward: float


Record: TypeAlias = PreferencePair | Demonstration | Correction | ScoredAnswer | PromptText
