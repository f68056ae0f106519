"""How large a request may be: checked before any work, in the order in which work would begin."""

from pilotfish.context import Prompt
from serve.api.schema.generation import GenerationRequest
from serve.errors import APIError
from serve.ingress_config import LimitsConfig


def check_sizes(limits: LimitsConfig, body: GenerationRequest, *, num_prompts: int) -> None:
    """Raise `APIError` for a body that asks for more than it may."""
    max_tokens = getattr(body, "max_completion_tokens", None) or body.max_tokens
    rules = (
        ("prompt", num_prompts, limits.num_prompts, "prompts"),
        ("n", body.n, limits.n, "choices of a prompt"),
        ("max_tokens", max_tokens or 0, limits.max_tokens, "tokens of a choice"),
        ("stop", len(body.stops), limits.num_stops, "stop strings"),
        ("logit_bias", len(body.logit_bias), limits.num_logit_biases, "biased tokens"),
    )
    for param, asked, limit, what in rules:
        if limit is not None and asked > limit:
            message = f"{param} asks for {asked} {what}; at most {limit} are served."
            raise APIError(400, message, param=param)


def check_prompt(limits: LimitsConfig, prompt: Prompt) -> None:
    """Raise `APIError` for a prompt that is longer than it may be."""
    limit, length = limits.prompt_tokens, len(prompt.token_ids)
    if limit is not None and length > limit:
        param = "prompt" if prompt.messages is None else "messages"
        message = f"The prompt has {length} tokens; at most {limit} are served. Shorten it."
        raise APIError(400, message, param=param, code="context_length_exceeded")
