"""Small models for tests. They are untied and spread out on purpose: a tied random model repeats
its last token, and a test on it could not fail."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pilotfish.context import Context, Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Drafting, Request, SamplingParams, TokenEvent
from pilotfish.guides.proxy_features import ProxySettings
from pilotfish.models.heads import AcceptHead


def tiny_config(vocab_size: int = 16, **overrides: Any) -> LlamaConfig:
    """Two layers with grouped heads, untied, far from uniform."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = LlamaConfig(
        **{**settings, **overrides},
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = "sdpa"
    return config


def tiny_llama(
    seed: int, *, vocab_size: int = 16, dtype: torch.dtype = torch.float64, **overrides: Any
) -> LlamaForCausalLM:
    """A random causal LM with distinct, far from uniform next-token laws."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(vocab_size, **overrides))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tiny_reward_model(
    seed: int, *, vocab_size: int = 16, dtype: torch.dtype = torch.float64, **overrides: Any
) -> LlamaForSequenceClassification:
    """A random reward model: a sequence classifier with one label."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(tiny_config(vocab_size, num_labels=1, **overrides))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def random_head(
    seed: int, settings: ProxySettings, *, dtype: torch.dtype = torch.float64
) -> AcceptHead:
    """A random proxy for a tiny model, whose accept probabilities spread over all of (0, 1)."""
    torch.manual_seed(seed)
    sizes, num_extra = ([32], 1) if settings.features == "post_token" else ([32, 32], 2)
    head = AcceptHead(settings.head, block_sizes=sizes, num_extra=num_extra).to(dtype)
    last = head.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.normal_(last.weight)
    return head


def context(key: int, token_ids: list[int]) -> Context:
    return Context(key, Prompt(token_ids), token_ids)


def request(
    key: int,
    prompt: list[int],
    *,
    guides: dict[str, float] | None = None,
    completed: tuple[int, ...] = (),
    draft: Drafting | None = None,
    priority: int = 0,
    **params: Any,
) -> Request:
    sampling = SamplingParams(**{"max_tokens": 12, "seed": 7, **params})
    return Request(
        key=key,
        prompt=Prompt(prompt),
        params=sampling,
        guides=guides or {},
        completed=completed,
        draft=draft,
        priority=priority,
    )


def drain(engine: Engine) -> dict[int, list[TokenEvent]]:
    """Step until nothing is left to do; return the events of each request."""
    events: dict[int, list[TokenEvent]] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.key, []).append(event)
    return events


@torch.no_grad()
def plain_logprobs(model: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """The next-token law without cache or batch: the reference everything is compared with."""
    logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
    return logits[0, -1].log_softmax(-1)


@torch.no_grad()
def plain_reward(model: LlamaForSequenceClassification, token_ids: list[int]) -> float:
    """The reward at the last token, without cache or batch."""
    hidden = model.model(input_ids=torch.tensor([token_ids]), use_cache=False).last_hidden_state
    return model.score(hidden[0, -1]).item()
