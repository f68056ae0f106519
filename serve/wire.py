"""What crosses between ingress and base replicas: plain values, no classes of ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from pilotfish.chat import Message
from pilotfish.context import Prompt
from pilotfish.decode.sequence import Request, SamplingParams, TokenEvent


class GenerateRequest(TypedDict):
    """One completion to decode, or to go on with."""

    prompt_ids: list[int]
    messages: list[Message] | None
    """The conversation behind the ids, for guides with a template of their own."""
    params: dict[str, Any]
    """Fields of `SamplingParams`; the seed is always set."""
    guides: dict[str, float]
    completed: list[int]
    """Tokens drawn before, by whichever replica."""


class Token(NamedTuple):
    """One token of a stream; sent as a bare tuple."""

    position: int
    token_id: int
    logprob: float
    base_logprob: float
    kl: float
    finish_reason: str | None


def to_token(event: TokenEvent) -> tuple[Any, ...]:
    reason = None if event.finish_reason is None else event.finish_reason.value
    return (event.index, event.token_id, event.logprob, event.base_logprob, event.kl, reason)


def to_request(key: int, sent: Mapping[str, Any]) -> Request:
    """Raises `PromptError` for sampling parameters out of range."""
    params = dict(sent["params"])
    for name in ("stop", "stop_token_ids"):
        params[name] = tuple(params.get(name, ()))
    messages = sent["messages"]
    return Request(
        key=key,
        prompt=Prompt(list(sent["prompt_ids"]), None if messages is None else tuple(messages)),
        params=SamplingParams(**params),
        guides=dict(sent["guides"]),
        completed=tuple(sent["completed"]),
    )
