"""GenARM guides inside vLLM (0.29), as a logits processor of its V1 model runner.

Shapes: B rows of vLLM's batch, V vocabulary, R rows with guides.

    export PILOTFISH_VLLM='{"guides": {"helpful": "runs/kitchen/genarm"}}'
    vllm serve BASE --logits-processors pilotfish.vllm_plugin:GenARMLogitsProcessor

A request names its guides in `SamplingParams(extra_args={"guides": {"helpful": 0.7}})`; over HTTP,
where values are strings, as `"vllm_xargs": {"guides": "{\\"helpful\\": 0.7}"}`. Settings come from
the environment since vLLM checks requests in another process than the one that decodes. Guides and
their caches lie outside `gpu_memory_utilization`: leave room. What vLLM applies after its logits
processors (penalties, temperature, truncation) is applied to the guided law; its `logprobs` are the
base's unless `logprobs_mode` is `processed_logprobs`. This module imports without vLLM.
"""

import itertools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pilotfish.config import Config, parse
from pilotfish.context import Context, Prompt
from pilotfish.decode import tilting
from pilotfish.decode.tilting import Tilt
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides import check_guide
from pilotfish.guides.base import TokenGuide
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import Dtype, load_frozen, load_tokenizer
from pilotfish.models.vocab import fingerprint

SETTINGS = "PILOTFISH_VLLM"
"""The environment variable with the settings, as JSON."""


class PluginSettings(Config):
    """Which guides a vLLM engine has."""

    guides: dict[str, str] = Field(min_length=1)
    """Folder or hub id by name."""
    dtype: Dtype = "auto"
    max_cache_tokens: int | None = Field(default=None, ge=1)
    """Bound on each guide's cache, in tokens over all rows; by default it grows as needed."""


def read_settings() -> PluginSettings:
    """Read the settings of this process's environment. Raises `ConfigError`."""
    text = os.environ.get(SETTINGS)
    if not text:
        raise ConfigError(
            f'{SETTINGS} is not set. Set it to JSON such as {{"guides": {{"helpful": "FOLDER"}}}}.'
        )
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{SETTINGS} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{SETTINGS} holds a {type(tree).__name__}, wanted an object.")
    return parse(PluginSettings, tree, source=SETTINGS)


def read_weights(
    extra_args: Mapping[str, Any] | None, known: Mapping[str, Any]
) -> dict[str, float]:
    """Return the weights that a request asks for, by guide, without zeros.

    Raises `PromptError` for unknown guides and weights that are no numbers.
    """
    asked = (extra_args or {}).get("guides", {})
    if isinstance(asked, str):
        try:
            asked = json.loads(asked)
        except ValueError as error:
            raise PromptError(f"guides is {asked!r}, which is not JSON: {error}") from error
    if not isinstance(asked, dict):
        raise PromptError(f'guides is {asked!r}, wanted weights by name: {{"helpful": 0.7}}.')
    for name, weight in asked.items():
        if name not in known:
            raise PromptError(f"no guide named {name!r} is loaded; loaded: {', '.join(known)}.")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise PromptError(f"the weight of guide {name!r} is {weight!r}, wanted a number.")
    return {name: float(weight) for name, weight in asked.items() if weight != 0}


class _Row:
    """A request in vLLM's batch, and its guides."""

    def __init__(
        self, key: int, prompt: list[int], out: list[int], chain: dict[str, float]
    ) -> None:
        self.context = Context(key, Prompt(prompt), [*prompt, *out])
        self.chain = chain
        self._out = out  # vLLM's own list, which it goes on writing to

    def refresh(self) -> None:
        """Take over what vLLM has written; an id that is not known yet reads -1 there."""
        ids = self.context.token_ids
        ids[len(self.context.prompt.token_ids) :] = self._out
        while ids and ids[-1] < 0:
            ids.pop()


class GuidedBatch:
    """vLLM's persistent batch as rows of contexts, and the law of those that have guides."""

    def __init__(self, guides: Mapping[str, TokenGuide], vocab_size: int) -> None:
        """`vocab_size` is the tokenizer's; columns behind it pad the vocabulary."""
        self._guides = dict(guides)
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        self._keys = itertools.count()
        self._plan: tuple[Tensor, list[Context], list[Tilt]] | None = None

    def update(self, batch_update: Any) -> None:
        """Follow a vLLM `BatchUpdate`: requests that left, joined and moved, in this order.

        A request that was preempted joins again with what it has written so far.
        """
        if batch_update is None:
            return
        self._plan = None
        for index in batch_update.removed:
            self._drop(index)
        for index, params, prompt, out in batch_update.added:
            self._drop(index)
            chain = read_weights(params.extra_args, self._guides)
            if chain:
                self._rows[index] = _Row(next(self._keys), list(prompt), out, chain)
        for source, target, direction in batch_update.moved:
            moving, staying = self._rows.pop(source, None), self._rows.get(target)
            if direction.name != "SWAP":
                self._drop(target)
            elif staying is not None:
                self._rows[source] = self._rows.pop(target)
            if moving is not None:
                self._rows[target] = moving

    @torch.inference_mode()
    def apply(self, logits_BV: Tensor) -> Tensor:
        """Replace the logits of rows with guides by guided log-probs, in place."""
        if not self._rows:
            return logits_BV
        for row in self._rows.values():
            row.refresh()
        if self._plan is None:
            self._plan = self._make_plan(logits_BV.device)
        rows_R, contexts, tilts = self._plan
        begun = tilting.begin(self._guides, tilts, contexts)
        base_RV = logits_BV[rows_R, : self._vocab_size].log_softmax(-1)
        law_RV, _ = tilting.apply(self._guides, begun, base_RV, None)
        logits_BV[rows_R, : self._vocab_size] = law_RV
        logits_BV[rows_R, self._vocab_size :] = -torch.inf
        return logits_BV

    def _make_plan(self, device: torch.device) -> tuple[Tensor, list[Context], list[Tilt]]:
        rows = sorted(self._rows)
        contexts = [self._rows[index].context for index in rows]
        # Products know no order, so each guide has one turn for all of its rows.
        turns: dict[str, list[tuple[int, float]]] = {}
        for place, index in enumerate(rows):
            for name, weight in self._rows[index].chain.items():
                turns.setdefault(name, []).append((place, weight))
        tilts = [Tilt(name, entries, len(rows)).to(device) for name, entries in turns.items()]
        return torch.tensor(rows, device=device), contexts, tilts

    def _drop(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None:
            for name in row.chain:
                self._guides[name].release([row.context.key])


def load_batch(settings: PluginSettings, vllm_config: Any, device: torch.device) -> GuidedBatch:
    """Load the guides for a vLLM engine. Raises `ConfigError` for what cannot be honoured there.

    `CheckpointError` and `VocabMismatchError` are as for any guide.
    """
    model = vllm_config.model_config
    _check_engine(vllm_config)
    tokenizer = load_tokenizer(model.tokenizer)
    guides: dict[str, TokenGuide] = {}
    for name, folder in settings.guides.items():
        card = check_guide(folder, base=str(model.model), base_vocab=fingerprint(tokenizer))
        if card.kind != "genarm" or card.template != "base":
            raise ConfigError(
                f"guide {name!r} is of kind {card.kind!r} with template {card.template!r}; inside "
                "vLLM guides are of kind 'genarm' and read the base's prompt. Use pilotfish's own "
                "serving for others."
            )
        lm = CausalLM(
            load_frozen(folder, device=device, dtype=settings.dtype),
            vocab_size=len(tokenizer),
            num_slots=vllm_config.scheduler_config.max_num_seqs,
            max_cache_tokens=settings.max_cache_tokens,
        )
        if lm.max_length < model.max_model_len:
            raise ConfigError(
                f"guide {name!r} takes at most {lm.max_length} tokens, but max_model_len is "
                f"{model.max_model_len}. Lower max_model_len."
            )
        guide = GenARMGuide(lm)
        guides[name] = guide if card.gate is None else Gated(guide, card.gate)
    return GuidedBatch(guides, len(tokenizer))


def _check_engine(vllm_config: Any) -> None:
    if vllm_config.speculative_config is not None:
        raise ConfigError("guides do not work with vLLM's speculative decoding. Switch it off.")
    if vllm_config.use_v2_model_runner:
        raise ConfigError(_V2_RUNNER)
    if vllm_config.model_config.enable_prompt_embeds:
        raise ConfigError("guides read token ids, so enable_prompt_embeds must be off.")


_V2_RUNNER = (
    "guides need vLLM's V1 model runner; the V2 runner does not run V1 logits processors. Set "
    "VLLM_USE_V2_MODEL_RUNNER=0."
)


def _define() -> type:
    try:
        # vLLM is no dependency: it lives in an environment of its own.
        from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
            LogitsProcessor,
        )
    except ImportError as error:
        raise ConfigError(
            "GenARMLogitsProcessor runs inside vLLM, which is not installed here: pip install "
            "'vllm==0.29.*' in an environment of its own, beside pilotfish."
        ) from error

    class GenARMLogitsProcessor(LogitsProcessor):
        """What vLLM makes and calls; `GuidedBatch` does the work."""

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            """Refuse a request, before it is queued, whose guides cannot be honoured."""
            if read_weights(sampling_params.extra_args, read_settings().guides):
                runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "")
                if runner.lower() in ("1", "true"):
                    raise ConfigError(_V2_RUNNER)

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self._batch = load_batch(read_settings(), vllm_config, torch.device(device))

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            self._batch.update(batch_update)

        def apply(self, logits: Tensor) -> Tensor:
            return self._batch.apply(logits)

    GenARMLogitsProcessor.__module__ = __name__
    GenARMLogitsProcessor.__qualname__ = "GenARMLogitsProcessor"
    return GenARMLogitsProcessor


def __getattr__(name: str) -> Any:
    """Make `GenARMLogitsProcessor` when it is asked for: its base class is vLLM's."""
    if name != "GenARMLogitsProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _define()
    return made
