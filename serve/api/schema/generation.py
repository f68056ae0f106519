"""What chat and text completions share."""

from typing import Annotated

from pydantic import Field, model_validator

from serve.api.schema.common import (
    MAX_STOPS,
    Body,
    DraftChoice,
    GuidedRequest,
    Name,
    RequestId,
    TokenId,
    refused,
)

Bias = Annotated[float, Field(ge=-100, le=100)]
_Digits = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Usage so far with every event, not with the last alone."""

    @model_validator(mode="after")
    def _consistent(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise refused("stream_options", "continuous_usage_stats needs include_usage")
        return self


class GenerationRequest(GuidedRequest):
    """How to draw, how many, and what to say about it."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: int = Field(default=1, ge=1, le=128)
    """Choices per prompt. Choice 0 is what n=1 would give."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    """0 and -1 are off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    min_tokens: int = Field(default=0, ge=0)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: dict[_Digits, Bias] = Field(default_factory=dict)
    """By token id, added to the guided log-prob before temperature."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_guide: Name | Annotated[list[Name], Field(min_length=1)] | None = None
    """Guides that rewrite the answer, in order, behind those of `guides` or `model`."""
    draft: Name | DraftChoice | None = None
    return_steering: bool = False
    """Say of every token how guides moved it."""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    """Write tokens as `token_id:17`: two tokens may read alike."""
    completed_token_ids: list[TokenId] = Field(default_factory=list)
    """Tokens of an answer that broke off: what comes back is what is behind them. With the body of
    the request that they answer, and its seed, both together are the answer."""
    request_id: RequestId | None = None
    session_id: RequestId | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Comes back with an answer that is not streamed; names nothing that we do, as do the next."""
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_sampling(self) -> "GenerationRequest":
        if 0 < self.temperature < 0.001:
            raise refused("temperature", "temperature must be 0 (greedy) or at least 0.001")
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise refused("stop", f"stop takes at most {MAX_STOPS} strings, none of them empty")
        if len(self.stop_token_ids) > 1024:
            raise refused("stop_token_ids", "stop_token_ids takes at most 1024 ids")
        if self.include_stop_str_in_output and not self.stops:
            raise refused("include_stop_str_in_output", "include_stop_str_in_output needs stop")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "stream_options needs stream to be true")
        return self

    @model_validator(mode="after")
    def _check_guides(self) -> "GenerationRequest":
        for name in ("response_guide", "draft"):
            flat = getattr(self.vllm_xargs, name)
            if flat is not None and getattr(self, name) is not None:
                raise refused("vllm_xargs", f"{name} is there twice; leave one out")
        if self.completed_token_ids and self.n != 1:
            raise refused("completed_token_ids", "completed_token_ids go on with one choice: n=1")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def response_guides(self) -> list[str]:
        named = self.response_guide or self.vllm_xargs.response_guide or []
        return [named] if isinstance(named, str) else list(named)

    @property
    def drafting(self) -> DraftChoice | None:
        named = self.draft or self.vllm_xargs.draft
        return DraftChoice(guide=named) if isinstance(named, str) else named
