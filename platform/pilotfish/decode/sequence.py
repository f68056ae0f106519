"""What is asked of the decoder, and what it answers: plain values without behaviour of models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from pilotfish.context import Prompt
from pilotfish.errors import PromptError


class FinishReason(StrEnum):
    """Why a completion ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens from the guided law: bias, temperature, min-p, top-k, then top-p.

    `temperature=0` is greedy. `top_k=0`, `top_p=1` and `min_p=0` switch truncation off. Without a
    `seed` each request draws its own. Two requests with the same prompt, seed and settings sample
    the same path, whatever else is in the batch. The order is vLLM's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    """Keep tokens that are at least so many times as probable as the likeliest one."""
    max_tokens: int = 256
    min_tokens: int = 0
    """None of the first so many tokens ends the completion: ids that end it are not drawn, and stop
    strings are text like any other. Where guides allow nothing but such an id, the base decides."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """By token id: what is added to its guided log-prob before anything else."""
    top_logprobs: int = 0
    """So many of the likeliest tokens are reported with each token, under the guided law as it is
    before bias and temperature."""

    @property
    def reshapes(self) -> bool:
        """Whether tokens are drawn from anything but the guided law itself."""
        return (
            (self.temperature, self.top_k, self.top_p, self.min_p) != (1, 0, 1, 0)
            or self.min_tokens > 0
            or bool(self.logit_bias)
        )

    def __post_init__(self) -> None:
        biases = self.logit_bias.values()
        rules = (
            ("temperature", self.temperature >= 0, "a number >= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "an integer >= 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1] (1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1] (0 is off)"),
            ("max_tokens", self.max_tokens >= 0, "an integer >= 0"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "an integer in [0, 2**64)"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logit_bias", all(-100 <= bias <= 100 for bias in biases), "numbers in [-100, 100]"),
            ("top_logprobs", self.top_logprobs >= 0, "an integer >= 0"),
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
    read_from: int | None = None
    """Before decoding, report how likely the prompt's own tokens were, from this position on: see
    `PromptEvent`. The first token has nothing before it and is never read. `max_tokens` may then be
    0, to read and draw nothing."""


class TopToken(NamedTuple):
    """One of the likeliest tokens at a position."""

    token_id: int
    logprob: float
    """Under the guided law."""
    base_logprob: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What the guided law and the base say about one token at its position."""

    token_id: int
    logprob: float
    """Under the guided law, before bias, temperature and truncation; -inf if guides forbid it."""
    base_logprob: float
    kl: float
    """KL(guided || base) in nats at this position."""
    moved_by: str | None = None
    """The guide that changed this token's log-prob most; None where no guide acts."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """What guides reported at this position, as `guide.name` (such as `proxy.expected_rejects`)."""
    top: tuple[TopToken, ...] = ()
    """As many as `top_logprobs` says, the likeliest first; fewer where guides allow fewer."""


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """What was read of one request's prompt at a time."""

    key: int
    first: int
    """Position in the prompt of the first reading."""
    readings: tuple[Reading, ...]
    """Of the prompt's tokens from `first` on, each under the law that decoding would have had
    behind the tokens before it. Empty only where there was nothing to read."""
    finish_reason: FinishReason | None = None
    """LENGTH with the last readings of a request whose `max_tokens` is 0: it ends here."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token drawn for one request. What `Reading` has too means the same."""

    key: int
    index: int
    """Position in the completion, from 0; resumed requests start at `len(completed)`."""
    token_id: int
    logprob: float
    base_logprob: float
    kl: float
    finish_reason: FinishReason | None
    moved_by: str | None = None
    drafted: bool = False
    """Whether the token was proposed by the drafter and accepted."""
    notes: Mapping[str, float] = field(default_factory=dict)
    top: tuple[TopToken, ...] = ()


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
    top: list[tuple[TopToken, ...]] = field(default_factory=list)
    draft_text: str | None = None
    """The text before the first revision; None if nothing revised it."""
    revised_by: tuple[str, ...] = ()
    """Names of the response guides that revised it, in order."""
