"""The seams: what a guide is asked, and what it answers.

Shapes: R rows (one row is one context: one sequence at one position), V vocabulary, D hidden size.

A token guide maps next-token log-probs to next-token log-probs. It is a pure function of the token
ids in each context: a cache it keeps is found by `Context.key`, checked against the ids, and
rebuilt when missing. It never sees requests, other guides' weights, or HTTP.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from pilotfish.context import Context, Prompt

Evidence: TypeAlias = Any
"""What `TokenGuide.begin` started and its `tilt` needs; private to the guide."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a guide may know about the rows it tilts."""

    contexts: Sequence[Context]
    weights_R: Tensor
    hidden_RD: Tensor | None = None  # the base's last hidden state, for guides with `needs_hidden`


class TokenGuide(Protocol):
    """Tilts the next-token law of the rows that asked for it."""

    needs_hidden: bool

    def begin(self, contexts: Sequence[Context]) -> Evidence:
        """Start what does not need the base's log-probs; may leave a remote call in flight."""
        ...

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: Evidence) -> Tensor:
        """Return guided log-probs [R, V], normalised; -inf forbids a token."""
        ...

    def release(self, keys: Sequence[int]) -> None:
        """Sequences that ended; whatever is cached for them may go. A hint, never a need."""
        ...


class ResponseGuide(Protocol):
    """Revises finished drafts (text to text)."""

    def revise(self, prompt: Prompt, drafts: Sequence[str]) -> Iterator[str]:
        """Yield text pieces of the answer that replaces the drafts."""
        ...
