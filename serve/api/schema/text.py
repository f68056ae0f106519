"""POST /v1/completions."""

from typing import Annotated, Any, TypeAlias

from pydantic import Field, PlainValidator, model_validator

from serve.api.schema.common import refused
from serve.api.schema.generation import GenerationRequest

OnePrompt: TypeAlias = str | list[int]
"""A text, or the ids of one."""


def read_prompt(prompt: Any) -> OnePrompt:
    """Return a prompt as it stands. Raises for anything else."""
    if (isinstance(prompt, str) or _is_ids(prompt)) and prompt:
        return prompt
    raise refused("prompt", "prompt must be a text or a list of token ids, and not empty")


def _read_prompts(prompt: Any) -> list[OnePrompt]:
    if isinstance(prompt, list) and prompt and not _is_ids(prompt):
        if len({isinstance(one, str) for one in prompt}) == 1:
            return [read_prompt(one) for one in prompt]
        raise refused("prompt", "prompts must be all texts, or all lists of token ids")
    return [read_prompt(prompt)]


def _is_ids(prompt: Any) -> bool:
    # By hand: pydantic would try the whole list against each type, and report every element.
    return isinstance(prompt, list) and all(type(one) is int and one >= 0 for one in prompt)


Prompt = Annotated[OnePrompt, PlainValidator(read_prompt, json_schema_input_type=str | list[int])]
Prompts = Annotated[
    list[OnePrompt],
    PlainValidator(
        _read_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]
    ),
]


class CompletionRequest(GenerationRequest):
    """Texts to go on with, or their token ids."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    echo: bool = False
    """The prompt, too, comes back; with its own log-probs where logprobs are asked for."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise refused("best_of", "best_of must be n; name a best_of_n guide to choose")
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "max_tokens can be 0 only where echo is true")
        if self.completed_token_ids and (self.echo or len(self.prompt) > 1):
            raise refused("completed_token_ids", "completed_token_ids go on with one answer alone")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def num_top(self) -> int:
        """Of how many of the likeliest tokens it wants to hear."""
        return self.logprobs or 0

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens
