"""What is asked of the decoder, and what it answers: plain values without behaviour of models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pilotfish.context import Prompt
from pilotfish.errors import PromptError


class FinishReason(StrEnum):
    """Why a completion ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens from the guided law: temperature, then top-k, then top-p.

    `temperature=0` is greedy. `top_k=0` and `top_p=1` switch truncation off. Without a `seed` each
    request draws its own. Two requests with the same prompt, seed and settings sample the same
    path, whatever else is in the batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0, "a number >= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "an integer >= 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1] (1 is off)"),
            ("max_tokens", self.max_tokens >= 1, "an integer >= 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "an integer in [0, 2**64)"),
            ("stop", all(self.stop), "strings that are not empty"),
        )
        for name, valid, wanted in rules:
            if not valid:
                raise PromptError(f"{name} is {getattr(self, name)!r}, wanted {wanted}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """Let a small LM propose tokens that base and guides then check together.

    The law stays the guided one. A seed and a drafter fix the text, whatever `num_tokens`: where
    drafting does not pay the engine drafts less, down to nothing, and the text is the same.
    """

    guide: str | None = None
    """A GenARM guide, whose LM drafts from `p_guide^(1 + w)`; `w` is its weight in the request."""
    model: str | None = None
    """Any small LM over the base's token ids: a folder or a hub id."""
    num_tokens: int = 4
    """The most tokens proposed at a time."""

    @property
    def drafter(self) -> str:
        return self.guide or self.model or ""

    def __post_init__(self) -> None:
        if (self.guide is None) == (self.model is None):
            raise PromptError(
                f"draft names guide {self.guide!r} and model {self.model!r}, wanted one of them."
            )
        if not 1 <= self.num_tokens <= 16:
            raise PromptError(f"num_tokens is {self.num_tokens}, wanted an integer in 1..16.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to decode. `key` is unique among the requests of an engine."""

    key: int
    prompt: Prompt
    params: SamplingParams
    guides: Mapping[str, float] = field(default_factory=dict)
    """Weight by guide name, in the order in which they tilt."""
    completed: tuple[int, ...] = ()
    """Completion ids drawn before, by whichever engine; decoding goes on behind them."""
    draft: Drafting | None = None
    priority: int = 0
    """Lower goes first; a request that waits may take the slot of one with a higher number."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token drawn for one request."""

    key: int
    index: int
    """Position in the completion, from 0; resumed requests start at `len(completed)`."""
    token_id: int
    logprob: float
    """Under the guided law, before temperature and truncation."""
    base_logprob: float
    kl: float
    """KL(guided || base) in nats at this position."""
    finish_reason: FinishReason | None
    moved_by: str | None = None
    """The guide that changed this token's log-prob most; None where no guide acts."""
    drafted: bool = False
    """Whether the token was proposed by the drafter and accepted."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """What guides reported at this position, as `guide.name` (such as `proxy.expected_rejects`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished completion. The lists hold one entry per token id.

    Where response guides revised it, `text` and `finish_reason` are those of the last revision,
    and everything per token is still about the draft.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    base_logprobs: list[float]
    kl: list[float]
    finish_reason: FinishReason
    moved_by: list[str | None] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    notes: list[Mapping[str, float]] = field(default_factory=list)
    draft_text: str | None = None
    """The text before the first revision; None if nothing revised it."""
    revised_by: tuple[str, ...] = ()
    """Names of the response guides that revised it, in order."""
