"""Our decode loop as the loop of transformers' `generate`.

Shapes: B rows of a call, L columns (padding on the left).

`generate` prepares inputs, processors and stopping criteria as always and then calls us. What it
prepared is what we honour, or refuse.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import LogitNormalization
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pilotfish.chat import Message
from pilotfish.context import Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Request, SamplingParams
from pilotfish.errors import ConfigError
from pilotfish.guides.base import TokenGuide
from pilotfish.hf.rows import KEYS, num_padded
from pilotfish.models.causal_lm import CausalLM

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, LogitNormalization)
"""What may be done to the guided law, in the order in which the engine does it."""

_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# What `generate` prepares for its own forwards; any other input would change the law.
_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def guided_generate(
    base: CausalLM,
    guides: Sequence[tuple[TokenGuide, float]],
    *,
    seed: int | None = None,
    messages: Sequence[Sequence[Message]] | None = None,
) -> Callable[..., Any]:
    """Return what `model.generate(..., custom_generate=...)` calls: the engine with these guides.

    `base` wraps the model. Guides and weights are in order of tilting. Each prompt samples with
    `seed`, its further copies (`num_return_sequences`) with the numbers behind it; without one the
    seed is drawn from torch's global generator, as transformers draws. `messages` are the prompts'
    conversations, for guides with a template of their own. Called with options that the engine
    does not have, it raises `ConfigError`; transformers itself hands over neither a `streamer` nor
    an `assistant_model`, so they do nothing.
    """

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        if model is not base.model:
            raise ConfigError("guided_generate was made for another model. Make one for this.")
        if synced_gpus or streamer is not None:
            raise ConfigError("guided_generate knows neither synced_gpus nor a streamer.")
        prompts = _prompts(input_ids, model_kwargs, messages)
        params = _sampling(generation_config, logits_processor)
        max_length, ends = _ends(stopping_criteria)
        if seed is None and generation_config.do_sample:
            params = replace(params, seed=int(torch.randint(2**62, ())))
        else:
            params = replace(params, seed=seed or 0)
        params = replace(params, max_tokens=max_length - input_ids.shape[1])
        requests = _requests(prompts, params, [weight for _, weight in guides])
        by_name = {str(place): guide for place, (guide, _) in enumerate(guides)}
        completions = _decode(Engine(base, by_name, end_ids=ends), requests)
        sequences = _join(input_ids, completions, _pad_id(generation_config, ends))
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType] - a LongTensor
        return sequences

    return generate


def _prompts(
    input_ids: Tensor,
    model_kwargs: Mapping[str, Any],
    messages: Sequence[Sequence[Message]] | None,
) -> list[Prompt]:
    """Return the prompts without their padding. Raises `ConfigError` for inputs besides ids."""
    given = [name for name, value in model_kwargs.items() if not (value is None or value is False)]
    strange = [name for name in given if name not in _INPUTS]
    if strange or input_ids.shape[1] == 0:
        what = ", ".join(strange) or "no input_ids"
        raise ConfigError(f"guided_generate reads input_ids alone, but was given {what}.")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError("guided_generate keeps caches of its own. Leave out past_key_values.")
    mask = model_kwargs.get("attention_mask")
    padding = [0] * len(input_ids) if mask is None else num_padded(mask)
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        for start, row in zip(padding, positions.expand_as(input_ids).tolist(), strict=True):
            if row[start:] != list(range(len(row) - start)):
                raise ConfigError("guided_generate counts positions itself. Leave them out.")
    if messages is not None and (not messages or len(input_ids) % len(messages)):
        raise ConfigError(
            f"messages has {len(messages)} conversations for {len(input_ids)} rows. Give one for "
            "each prompt."
        )
    copies = len(input_ids) // len(messages) if messages else 1
    return [
        Prompt(ids[start:], tuple(messages[row // copies]) if messages else None)
        for row, (start, ids) in enumerate(zip(padding, input_ids.tolist(), strict=True))
    ]


def _sampling(config: GenerationConfig, processors: Sequence[Any]) -> SamplingParams:
    """Read temperature and truncation from what `generate` made of its options."""
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise ConfigError(
            f"guided_generate decodes greedily or samples, but the options ask for {mode}. Leave "
            "out num_beams and the like, or pass a GuideLogitsProcessor instead."
        )
    asked = [name for name in _OUTPUTS if getattr(config, name)]
    if asked:
        raise ConfigError(f"guided_generate has no {', '.join(asked)}. Use pilotfish.Pilot.")
    places = [_WARPERS.index(type(one)) if type(one) in _WARPERS else -1 for one in processors]
    if -1 in places or places != sorted(set(places)):
        names = ", ".join(type(one).__name__ for one in processors)
        raise ConfigError(
            "guided_generate tilts, then applies temperature, top_k and top_p, and nothing else; "
            f"the options and logits processors ask for {names}. Leave out the others, or pass a "
            "GuideLogitsProcessor instead of custom_generate."
        )
    if not config.do_sample:
        return SamplingParams(temperature=0)
    params = SamplingParams()
    for one in processors:
        if isinstance(one, TemperatureLogitsWarper):
            params = replace(params, temperature=one.temperature)
        elif isinstance(one, TopKLogitsWarper):
            params = replace(params, top_k=one.top_k)
        elif isinstance(one, TopPLogitsWarper):
            params = replace(params, top_p=one.top_p)
    return params


def _ends(criteria: Sequence[Any]) -> tuple[int, frozenset[int]]:
    """Return the largest number of columns, and the ids that end a row."""
    known = (MaxLengthCriteria, EosTokenCriteria)
    strange = [type(one).__name__ for one in criteria if type(one) not in known]
    if strange:
        raise ConfigError(
            f"guided_generate stops at end tokens and max_new_tokens, not at {', '.join(strange)}. "
            "Leave it out, or use pilotfish.Pilot, which knows stop strings."
        )
    lengths = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
    assert lengths, "generate always bounds the length"
    ids = [one.eos_token_id.tolist() for one in criteria if isinstance(one, EosTokenCriteria)]
    return min(lengths), frozenset(itertools.chain.from_iterable(ids))


def _requests(
    prompts: Sequence[Prompt], params: SamplingParams, weights: Sequence[float]
) -> list[Request]:
    """Ask for each prompt; a copy of one before it has the next seed."""
    assert params.seed is not None
    by_name = {str(place): weight for place, weight in enumerate(weights)}
    copies: Counter[tuple[int, ...]] = Counter()
    requests = []
    for prompt in prompts:
        ids = tuple(prompt.token_ids)
        own = replace(params, seed=(params.seed + copies[ids]) % 2**64)
        requests.append(Request(key=next(KEYS), prompt=prompt, params=own, guides=by_name))
        copies[ids] += 1
    return requests


def _decode(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    completions: dict[int, list[int]] = {request.key: [] for request in requests}
    for request in requests:
        engine.check(request)
    for request in requests:
        engine.submit(request)
    try:
        while engine.busy:
            for event in engine.step():
                completions[event.key].append(event.token_id)
    except BaseException:
        for model in (engine.base, *engine.guides.values()):  # nothing is left to the next call
            model.release(list(completions))
        raise
    return list(completions.values())


def _pad_id(config: GenerationConfig, ends: frozenset[int]) -> int:
    """Where no pad token is set, rows that ended are filled as transformers does it."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = config.eos_token_id
    return eos[0] if isinstance(eos, list) else eos if eos is not None else min(ends, default=0)


def _join(input_ids: Tensor, completions: Sequence[list[int]], pad_id: int) -> Tensor:
    """Put the completions behind the prompts, filled up to the longest."""
    longest = max(map(len, completions))
    filled = [[*ids, *[pad_id] * (longest - len(ids))] for ids in completions]
    return torch.cat([input_ids, input_ids.new_tensor(filled)], dim=1)
