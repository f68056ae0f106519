"""What the bodies of all routes are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from serve.choosing import GuideAsk
from serve.wire import OnFailure

NEUTRAL: dict[str, tuple[Any, ...]] = {
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
    "bad_words": ([],),
    "use_beam_search": (False,),
    "priority": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "annotations": ([],),
    "tool_calls": ([],),
}
"""Fields we know but do not do, and the values of them that ask for nothing."""

MAX_STOPS = 16

Name = Annotated[str, Field(max_length=256)]
TokenId = Annotated[StrictInt, Field(ge=0)]
Scalar = bool | Annotated[int, Field(ge=-(2**31), lt=2**31)] | float | str | None
RequestId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]
"""Goes into headers and logs."""


def refused(param: str, message: str) -> PydanticCustomError:
    """Return the error of a validator that knows which field is to blame."""
    # Text of ours only: braces in it would be read as placeholders.
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Body(BaseModel):
    """An object of a request. Null, and values that ask for nothing, are as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {name: value for name, value in body.items() if value is not None}
        for name in [name for name in kept if name in NEUTRAL and name not in cls.model_fields]:
            # `1 == True` in Python, and JSON's true is not its 1.
            same = [
                kept[name] == v and isinstance(kept[name], bool) == isinstance(v, bool)
                for v in NEUTRAL[name]
            ]
            if not any(same):
                wanted = " or ".join(map(repr, NEUTRAL[name]))
                raise refused(name, f"{name} is not supported; leave it out, or set it {wanted}")
            del kept[name]
        return kept


class GuideChoice(Body):
    """One guide of a request. Weight 0 is the base exactly; no weight is the guide's default."""

    name: Name
    weight: float | None = Field(default=None, ge=-100, le=100)
    version: Name | None = None
    args: dict[str, Scalar | list[Scalar]] = {}
    """Settings of the guide's kind for this request."""
    on_failure: OnFailure = "fail"

    def ask(self) -> GuideAsk:
        return GuideAsk(**dict(self))


class DraftChoice(Body):
    """The guide whose LM proposes tokens: same law, fewer steps."""

    guide: Name
    num_tokens: int = Field(default=4, ge=1, le=16)
    """The most that are proposed at a time."""


class FlatArgs(Body):
    """The same as `guides`, `response_guide` and `draft`, for tools that pass only scalars."""

    guide: Name | None = None
    weight: float | None = Field(default=None, ge=-100, le=100)
    version: Name | None = None
    on_failure: OnFailure = "fail"
    response_guide: Name | None = None
    draft: Name | None = None

    @model_validator(mode="after")
    def _about_a_guide(self) -> "FlatArgs":
        about = self.model_fields_set & {"weight", "version", "on_failure"}
        if self.guide is None and about:
            raise refused("vllm_xargs", f"vllm_xargs has {min(about)}, but names no guide")
        return self


class GuidedRequest(Body):
    """What all requests that name a model share."""

    model: Name
    guides: list[GuideChoice] | None = None
    """In order of tilting. Goes before a guide in `model`; an empty list is the base alone."""
    vllm_xargs: FlatArgs = FlatArgs()

    @model_validator(mode="after")
    def _name_once(self) -> "GuidedRequest":
        if self.guides is not None and self.vllm_xargs.guide is not None:
            raise refused("vllm_xargs", "guides and vllm_xargs both name guides; leave one out")
        return self

    @property
    def asked_guides(self) -> list[GuideAsk] | None:
        flat = self.vllm_xargs
        if flat.guide is not None:
            return [
                GuideAsk(
                    name=flat.guide,
                    weight=flat.weight,
                    version=flat.version,
                    on_failure=flat.on_failure,
                )
            ]
        return None if self.guides is None else [guide.ask() for guide in self.guides]
