"""What comes back, for the OpenAPI document: answers themselves are written as plain values."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorObject(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Any answer other than 200."""

    error: ErrorObject


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GuideEcho(BaseModel):
    """What a guide of the request did."""

    name: str
    version: str
    weight: float
    mean_kl: float | None = None
    """KL(guided || base) in nats per token, of all guides together."""
    accept_rate: float | None = None
    """Of a proxy: the share of proposed tokens that it accepts."""
    gave_up_at: int | None = None
    """The token from which the answer went on without it."""


class Alternative(BaseModel):
    token_id: int
    token: str
    logprob: float
    base_logprob: float


class Steering(Alternative):
    """How one token was moved."""

    kl: float
    moved_by: str | None
    drafted: bool
    notes: dict[str, float]
    top: list[Alternative]


class Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None
    token_ids: list[int] | None = None
    steering: list[Steering] | None = None
    draft_text: str | None = None
    """What the response guides rewrote."""


class ChatMessageAnswer(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    message: ChatMessageAnswer


class TextChoice(Choice):
    text: str


class Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    guides: list[GuideEcho]
    metadata: dict[str, str] | None = None
    prompt_token_ids: list[int] | list[list[int]] | None = None


class ChatAnswer(Answer):
    """Streamed, its events are chunks (`object: chat.completion.chunk`) up to `[DONE]`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextAnswer(Answer):
    """Streamed, its events have the same form, with the text that is new."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Score(BaseModel):
    """One answer that was read. Log-probs below -9999 read -9999."""

    index: int
    object: Literal["score"]
    num_tokens: int
    logprob: float
    """Of the whole answer, under the guided law."""
    base_logprob: float
    kl: float
    reward: float | None
    """Of the first guide with a reward or value model."""
    rewards: dict[str, float]
    token_ids: list[int]
    tokens: list[str]
    token_logprobs: list[float]
    base_token_logprobs: list[float]


class ScoreAnswer(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str
    data: list[Score]
    guides: list[GuideEcho]
    usage: Usage


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    prompt: str


class GuideCardAnswer(BaseModel):
    kind: str
    stage: Literal["token", "selection", "revision"]
    version: str
    weight: float
    takes_weight: bool
    enabled: bool


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Any]
    guide: GuideCardAnswer | None
    """Of a base steered by one guide at its default weight."""


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class VersionAnswer(BaseModel):
    version: str
