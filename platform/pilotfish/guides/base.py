"""The seams: what a guide is asked, and what it answers.

Shapes: R rows (one row is one context: one sequence at one position), V vocabulary, D hidden size.

A token guide maps next-token log-probs to next-token log-probs. It is a pure function of the token
ids in each context: a cache it keeps is found by `Context.key`, checked against the ids, and
rebuilt when missing. It never sees requests, other guides' weights, or HTTP.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from pilotfish.context import Context, Prompt

Evidence: TypeAlias = Any
"""What `TokenGuide.begin` started and its `tilt` needs; private to the guide."""


class Stage(IntEnum):
    """When a guide acts on a request; a chain runs its stages in this order."""

    TOKEN = 0
    """Tilts every next-token law."""
    SELECTION = 1
    """Decides how many drafts there are, and which one goes on."""
    REVISION = 2
    """Rewrites the answer."""


@runtime_checkable
class Staged(Protocol):
    """What a chain must know of a guide; its class knows it too."""

    stage: ClassVar[Stage]
    takes_weight: ClassVar[bool]
    """Whether weights other than 0 (off) and 1 (on) mean something."""


class LogprobSource(Protocol):
    """A guide LM, wherever it runs: in this process, or behind a call that is in flight."""

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        """Start a forward; the returned function waits for its log-probs [R, V]."""
        ...

    def release(self, keys: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What a guide may know about the rows it tilts."""

    contexts: Sequence[Context]
    weights_R: Tensor
    hidden_RD: Tensor | None = None  # the base's last hidden state, for guides with `needs_hidden`
    base_RV: Tensor | None = None  # the base's own law, whatever guides came before
    notes: dict[str, Tensor] = field(default_factory=dict)
    """A guide may leave a number per row [R] here, by name; it is reported with the token."""


class TokenGuide(Protocol):
    """Tilts the next-token law of the rows that asked for it."""

    needs_hidden: bool

    def begin(self, contexts: Sequence[Context]) -> Evidence:
        """Start what does not need the base's log-probs; may leave a remote call in flight."""
        ...

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: Evidence) -> Tensor:
        """Return guided log-probs [R, V], normalised; -inf forbids a token.

        `logprobs_RV` belongs to the caller and stays as it is.
        """
        ...

    def release(self, keys: Sequence[int]) -> None:
        """Sequences that ended; whatever is cached for them may go. A hint, never a need."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A token guide, or an LM, that reads so many tokens and no more."""

    @property
    def max_length(self) -> int: ...


def max_length_of(*parts: object) -> int:
    """Return the longest context that all parts can read; those that do not say read anything."""
    return min(
        (part.max_length for part in parts if isinstance(part, Bounded)), default=sys.maxsize
    )


@runtime_checkable
class ChecksPrompts(Protocol):
    """A token guide that cannot answer about every prompt, and says so before any work is done."""

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise `PromptError` for a prompt that the guide cannot read."""
        ...


@runtime_checkable
class ReadsBase(Protocol):
    """A token guide that says whether it asks the base itself, about candidates for instance."""

    reads_base: bool


def reads_base(guide: TokenGuide) -> bool:
    """Whether a guide needs the base as our engine runs it, and not its law alone."""
    return guide.needs_hidden or (isinstance(guide, ReadsBase) and guide.reads_base)


@dataclass(frozen=True, slots=True)
class Draft:
    """One answer to a prompt, before anything selects or revises it."""

    text: str
    token_ids: Sequence[int]
    """In the base's vocabulary, end token included."""


class Selector(Protocol):
    """Picks one of several drafts."""

    num_drafts: int
    block_tokens: int | None
    """Choose after every so many tokens, and let all drafts go on behind the chosen one; None is
    once, between finished drafts."""

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Raise `PromptError` if drafts of so many tokens could not be chosen from."""
        ...

    def choose(self, prompt: Prompt, drafts: Sequence[Draft], uniform: float) -> int:
        """Return the place of the draft that goes on.

        `uniform` in [0, 1) is the only randomness there is; it is counted like every draw.
        """
        ...

    def choose_all(
        self,
        prompts: Sequence[Prompt],
        drafts: Sequence[Sequence[Draft]],
        uniforms: Sequence[float],
    ) -> list[int]:
        """Choose for several prompts at once, for each as `choose` would."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What a `TextModel` is asked to write."""

    text: str
    """What it reads; it writes what comes behind."""
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """What came of it."""

    text: str
    complete: bool = True
    """False where it was cut at `max_tokens`."""


class TextModel(Protocol):
    """A causal LM with a vocabulary of its own: text in, text out, wherever it runs."""

    max_length: int
    """In its own tokens: what it reads and what it writes, together."""

    def num_tokens(self, text: str) -> int:
        """Count the tokens of a text that it would read."""
        ...

    def write(self, writings: Sequence[Writing]) -> list[Written]:
        """Write everything asked for, in one batch."""
        ...

    def stream(self, writing: Writing) -> Iterator[str]:
        """Yield pieces of the text as they are decoded."""
        ...


class ResponseGuide(Protocol):
    """Revises a finished draft (text to text), in whatever vocabulary it likes.

    A revision is a function of the prompt's text and the draft's alone.
    """

    def check(self, prompt: Prompt) -> None:
        """Raise `PromptError` if no answer to this prompt could be revised."""
        ...

    def revise(self, prompt: Prompt, draft: str) -> Iterator[str]:
        """Yield text pieces of the answer that replaces the draft."""
        ...

    def revise_all(self, prompts: Sequence[Prompt], drafts: Sequence[str]) -> list[Written]:
        """Return what replaces each draft; many at once, as `revise` would one by one."""
        ...


Guide: TypeAlias = TokenGuide | Selector | ResponseGuide
