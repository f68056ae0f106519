"""What crosses between ingress and replicas: plain values, no classes of models."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, NotRequired, TypeAlias, TypedDict

from pilotfish.chat import Message
from pilotfish.context import Prompt
from pilotfish.decode.sequence import (
    Drafting,
    PromptEvent,
    Reading,
    Request,
    SamplingParams,
    TokenEvent,
)
from serve.catalog import GuideVersion
from serve.frames import ReplyTo

OnFailure: TypeAlias = Literal["fail", "base"]
"""What becomes of a request whose guide does not answer: it fails, or goes on without the guide."""


class GuideUse(NamedTuple):
    """A guide in a request, pinned to one version for the request's whole life."""

    version: GuideVersion
    weight: float
    args: dict[str, Any] = {}  # noqa: RUF012 - never written to
    """Settings of the guide's kind that differ from its card, for this request."""
    on_failure: OnFailure = "fail"


class DraftUse(TypedDict):
    """Which guide of the request drafts, and how many tokens at a time."""

    guide: str
    num_tokens: int


class GenerateRequest(TypedDict):
    """One completion to decode, or to go on with."""

    prompt_ids: list[int]
    messages: list[Message] | None
    """The conversation behind the ids, for guides with a template of their own."""
    text: str | None
    """The prompt as it was written, where it was no conversation."""
    params: dict[str, Any]
    """Fields of `SamplingParams`; the seed is always set."""
    guides: list[GuideUse]
    """In order of tilting."""
    draft: DraftUse | None
    completed: list[int]
    """Tokens drawn before, by whichever replica."""
    attempt: str
    """Names this call; another replica is asked by another one."""
    gave_up: list[str]
    """Names of guides that failed this request before, and which it goes on without."""
    read_from: NotRequired[int]
    """Report how likely the prompt's own tokens were, from this position on, before decoding."""
    reply_to: NotRequired[ReplyTo]
    """Where tokens are sent; without it they come with the call."""
    priority: NotRequired[int]
    """Higher ones wait for lower ones, and make room for them. 0 is what clients ask for."""


class Token(NamedTuple):
    """One token of a completion, or of a prompt that is read; sent as a bare tuple."""

    position: int
    """In the completion, or in the prompt; the first is 0."""
    token_id: int
    logprob: float
    base_logprob: float
    kl: float
    finish_reason: str | None
    moved_by: str | None = None
    drafted: bool = False
    notes: Mapping[str, float] = {}
    top: Sequence[tuple[int, float, float]] = ()
    """The likeliest tokens there, with their log-prob and their base log-prob."""


class Batch(NamedTuple):
    """What a replica sends at a time; sent as a bare tuple."""

    tokens: list[tuple[Any, ...]]
    gave_up: list[tuple[str, int]] = []  # noqa: RUF012 - never written to
    """Guides that the request goes on without, and behind how many of these tokens each."""
    readings: list[tuple[Any, ...]] = []  # noqa: RUF012 - never written to
    """Tokens of the prompt; all of them come before the completion's first."""
    ended: bool = False
    """Whether the request has read all that it wanted, and draws nothing."""


def to_token(event: TokenEvent) -> tuple[Any, ...]:
    """Return a token as it is sent; guides are called what the request calls them."""
    reason = None if event.finish_reason is None else event.finish_reason.value
    return _to_tuple(event, event.index, reason, drafted=event.drafted)


def to_readings(event: PromptEvent) -> list[tuple[Any, ...]]:
    """Return what was read of a prompt as it is sent."""
    return [_to_tuple(one, at) for at, one in enumerate(event.readings, start=event.first)]


def _to_tuple(
    read: TokenEvent | Reading, position: int, reason: str | None = None, *, drafted: bool = False
) -> tuple[Any, ...]:
    numbers = (position, read.token_id, read.logprob, read.base_logprob, read.kl, reason)
    if read.moved_by is None and not (drafted or read.notes or read.top):
        return numbers
    notes = {_note_name(note): value for note, value in read.notes.items()} if read.notes else {}
    mover = read.moved_by and guide_name(read.moved_by)
    return (*numbers, mover, drafted, notes, tuple(map(tuple, read.top)))


@lru_cache(maxsize=4096)
def _note_name(note: str) -> str:
    return f"{guide_name(note)}.{note.rpartition('.')[2]}"


def to_request(key: int, sent: GenerateRequest, guide_keys: Mapping[str, str]) -> Request:
    """Return the engine's request; `guide_keys` are what the engine calls the guides that act.

    Raises `PromptError` for sampling parameters out of range.
    """
    params = dict(sent["params"])
    for name in ("stop", "stop_token_ids"):
        params[name] = tuple(params.get(name, ()))
    messages, draft = sent["messages"], sent["draft"]
    return Request(
        key=key,
        prompt=Prompt(
            list(sent["prompt_ids"]), None if messages is None else tuple(messages), sent["text"]
        ),
        params=SamplingParams(**params),
        guides={
            guide_keys[use.version.name]: (
                0.0 if use.version.name in sent["gave_up"] else use.weight
            )
            for use in sent["guides"]
            if use.version.name in guide_keys
        },
        completed=tuple(sent["completed"]),
        draft=draft and Drafting(guide=guide_keys[draft["guide"]], num_tokens=draft["num_tokens"]),
        read_from=sent.get("read_from"),
        priority=sent.get("priority", 0),
    )


@lru_cache(maxsize=4096)
def guide_name(key: str) -> str:
    """Return what requests call the guide that an engine calls `name@version{args}`."""
    return key.partition("@")[0]
