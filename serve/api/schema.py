"""The requests we understand, in OpenAI's and vLLM's words.

A field that asks for something we do not do is an error that names it; nothing is ignored. A field
whose value asks for nothing (`n: 1`, `presence_penalty: 0`, any null) is fine.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from pilotfish.chat import Message
from serve.choosing import GuideAsk
from serve.wire import OnFailure

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
}
"""Fields we know but do not do, and the values of them that ask for nothing."""

MAX_STOPS = 16


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class GuideChoice(_Body):
    """One guide of a request. Weight 0 is the base exactly; no weight is the guide's default."""

    name: str
    weight: float | None = Field(default=None, ge=-100, le=100)
    version: str | None = None
    args: dict[str, Any] = {}
    """Settings of the guide's kind for this request."""
    on_failure: OnFailure = "fail"


class StreamOptions(_Body):
    include_usage: bool = False


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn; a list of text parts is their concatenation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return Message(role=self.role, content=content)


class CommonRequest(_Body):
    """What chat and text completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    """0 and -1 are off."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] = []
    stop_token_ids: list[StrictInt] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    guides: list[GuideChoice] | None = None
    """In order of tilting. Goes before a guide in `model`; an empty list is the base alone."""
    return_token_ids: bool = False
    user: str | None = None
    """Who asks; names nothing that we do."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {name: value for name, value in body.items() if value is not None}
        for name in [name for name in kept if name in _NEUTRAL and name not in cls.model_fields]:
            # `1 == True` in Python, and JSON's true is not its 1.
            same = [
                kept[name] == v and isinstance(kept[name], bool) == isinstance(v, bool)
                for v in _NEUTRAL[name]
            ]
            if not any(same):
                wanted = ", ".join(map(repr, _NEUTRAL[name]))
                raise _refused(name, f"{name} is not supported; leave it out, or set it {wanted}")
            del kept[name]
        return kept

    @model_validator(mode="after")
    def _check(self) -> "CommonRequest":
        if 0 < self.temperature < 0.001:
            raise _refused("temperature", "temperature must be 0 (greedy) or at least 0.001")
        if self.stream_options is not None and not self.stream:
            raise _refused("stream_options", "stream_options needs stream to be true")
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise _refused("stop", f"stop takes at most {MAX_STOPS} strings, none of them empty")
        names = [guide.name for guide in self.guides or ()]
        if len(set(names)) != len(names):
            raise _refused("guides", "each guide can be named once")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def asked_guides(self) -> list[GuideAsk] | None:
        if self.guides is None:
            return None
        return [GuideAsk(**dict(guide)) for guide in self.guides]


class ChatRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise _refused("max_tokens", "max_tokens and max_completion_tokens disagree")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(CommonRequest):
    """POST /v1/completions: a text or the ids of one prompt."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]

    @model_validator(mode="after")
    def _one_prompt(self) -> "CompletionRequest":
        prompt = self.prompt
        if not prompt or (_is_batch(prompt) and (len(prompt) != 1 or not prompt[0])):
            raise _refused("prompt", "prompt must be one text, or the ids of one, not empty")
        return self

    @property
    def only_prompt(self) -> str | list[int]:
        prompt: Any = self.prompt
        return prompt[0] if _is_batch(prompt) else prompt

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens


def _is_batch(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)


def _refused(param: str, message: str) -> PydanticCustomError:
    # Text of ours only: braces in it would be read as placeholders.
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})
