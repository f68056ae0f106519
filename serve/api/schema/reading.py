"""POST /v1/score, /tokenize and /detokenize: bodies that want nothing written."""

from typing import Annotated

from pydantic import Field, model_validator

from serve.api.schema.chat import Messages
from serve.api.schema.common import Body, GuidedRequest, Name, RequestId, TokenId, refused
from serve.api.schema.text import Prompt

Response = str | Annotated[list[TokenId], Field(min_length=1)]
"""An answer as text, which ends with the end token, or its ids as they are."""


class ScoreRequest(GuidedRequest):
    """A prompt and answers to it."""

    prompt: Prompt | None = None
    messages: Messages | None = None
    response: Response | None = None
    responses: Annotated[list[Response], Field(min_length=1, max_length=256)] | None = None
    request_id: RequestId | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_score(self) -> "ScoreRequest":
        _check_one("prompt", prompt=self.prompt, messages=self.messages)
        _check_one("response", response=self.response, responses=self.responses)
        if isinstance(self.prompt, list) and any(isinstance(one, str) for one in self.answers):
            raise refused("responses", "where the prompt is token ids, so are its responses")
        return self

    @property
    def answers(self) -> list[str | list[int]]:
        return [self.response] if self.response is not None else list(self.responses or ())


class TokenizeRequest(Body):
    """A text, or a conversation as its template writes it."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    """What the tokenizer adds to a text; a conversation brings its own."""
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_input(self) -> "TokenizeRequest":
        _check_one("prompt", prompt=self.prompt, messages=self.messages)
        if self.messages is not None and "add_special_tokens" in self.model_fields_set:
            raise refused("add_special_tokens", "add_special_tokens is for a prompt, not messages")
        return self


class DetokenizeRequest(Body):
    """Token ids."""

    model: Name | None = None
    tokens: list[TokenId]


def _check_one(param: str, **fields: object) -> None:
    given = [name for name, value in fields.items() if value is not None]
    if len(given) != 1:
        raise refused(given[-1] if given else param, f"give one of {' and '.join(fields)}")
