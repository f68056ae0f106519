"""A causal LM that answers "what comes after these tokens?", with caches nobody sees.

Shapes: R rows (contexts), Q new tokens per row, V vocabulary, D hidden size.

The base, every LM guide and every rollout model is a `CausalLM`. Callers pass whole contexts; keys
and values are found by `Context.key`, checked against the ids, and recomputed where they do not
match. So rolling back, resuming elsewhere and being evicted are one event: a cache miss. This
module knows nothing of sampling, guides or text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.context import Context
from pilotfish.errors import ConfigError, PromptError
from pilotfish.models.packed import pack_linears
from pilotfish.models.slots import SlotCache


class NextToken(NamedTuple):
    """The law of the next token at each context."""

    logprobs_RV: Tensor
    hidden_RD: Tensor
    """Last hidden state, as it enters the output embedding."""


@dataclass(slots=True)
class _Row:
    """What one slot of the cache holds."""

    key: int
    ids: list[int] = field(default_factory=list)
    used_at: int = 0


class CausalLM:
    """One Hugging Face causal LM and its slots."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int | None = None,
        num_slots: int = 32,
        prefill_chunk: int = 512,
    ) -> None:
        """Wrap a model, which is set to `eval` and whose weights must not change from now on.

        `vocab_size` cuts logits that pad the vocabulary (a multiple of 64, say) and renormalises;
        by default the model's own size. `prefill_chunk` bounds the tokens per row of one forward.
        """
        config = model.config.get_text_config()
        _check_full_attention(config)
        self.model = model.eval()
        pack_linears(model)
        self.vocab_size = vocab_size or config.vocab_size
        self.max_length: int = config.max_position_embeddings
        self.num_slots = num_slots
        self.prefill_chunk = prefill_chunk
        self.num_forwards = 0
        """Rows of `forward` so far: model forwards over one token, the unit of papers' cost tables.
        Prefill counts nothing."""
        self._cache = SlotCache(num_layers=config.num_hidden_layers, num_slots=num_slots)
        self._rows: list[_Row] = []
        self._index: dict[int, int] = {}
        self._clock = 0
        self._additive_mask = config._attn_implementation == "eager"
        self._hidden: Tensor | None = None
        output_embedding = model.get_output_embeddings()
        assert output_embedding is not None, "a causal LM has an output embedding"
        output_embedding.register_forward_pre_hook(self._keep_hidden)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.inference_mode()
    def forward(self, contexts: Sequence[Context]) -> NextToken:
        """Return the next-token law at each context, feeding only what the cache lacks."""
        order = self._place(contexts)
        tokens = [contexts[place].token_ids for place in _invert(order)]
        self._catch_up(tokens, first=0, budget=None)
        logits_RV = self._feed(self.model, [[ids[-1]] for ids in tokens], first=0).logits[:, -1]
        self.num_forwards += len(contexts)
        logprobs_RV = _log_softmax(logits_RV[:, : self.vocab_size])
        assert self._hidden is not None
        hidden_RD, self._hidden = self._hidden[:, -1], None
        if order != list(range(len(order))):
            logprobs_RV, hidden_RD = logprobs_RV[order], hidden_RD[order]
        return NextToken(logprobs_RV, hidden_RD)

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        """Run `forward` now and hand out its log-probs when asked: the local `LogprobSource`."""
        logprobs_RV = self.forward(contexts).logprobs_RV
        return lambda: logprobs_RV

    @torch.inference_mode()
    def prefill(self, context: Context, budget: int) -> int:
        """Feed at most `budget` tokens of a context and return how many were fed.

        Fewer than `budget` means that `forward` now needs one more token of it at most.
        """
        row = self._row_of(context, in_use=set())
        return self._catch_up([context.token_ids], first=row, budget=budget)

    @torch.inference_mode()
    def release(self, keys: Sequence[int]) -> None:
        """Free the slots of sequences that ended; the last row moves into each hole."""
        for key in keys:
            hole = self._index.pop(key, None)
            if hole is None:
                continue
            last = self._rows.pop()
            if last.key != key:
                self._cache.copy(len(self._rows), hole, len(last.ids))
                self._rows[hole] = last
                self._index[last.key] = hole

    def _place(self, contexts: Sequence[Context]) -> list[int]:
        """Bring the contexts' rows to slots 0..R-1 and return each context's slot."""
        if len(contexts) > self.num_slots:
            raise ConfigError(
                f"{len(contexts)} contexts in one call, but {self.num_slots} slots. "
                "Raise num_slots or send fewer."
            )
        self._clock += 1
        in_use = {context.key for context in contexts}
        for context in contexts:
            if len(context.token_ids) > self.max_length:
                raise PromptError(
                    f"a context of {len(context.token_ids)} tokens, but the model takes at most "
                    f"{self.max_length}. Shorten the prompt or lower max_tokens."
                )
            self._row_of(context, in_use)
        outside = [slot for slot in map(self._index.__getitem__, in_use) if slot >= len(contexts)]
        inside = (slot for slot in range(len(contexts)) if self._rows[slot].key not in in_use)
        for stray, front in zip(outside, inside, strict=False):
            self._swap(stray, front)
        return [self._index[context.key] for context in contexts]

    def _row_of(self, context: Context, in_use: set[int]) -> int:
        """Return the slot of a context, taking a free or the least recently used one if new."""
        slot = self._index.get(context.key)
        if slot is None:
            if len(self._rows) == self.num_slots:
                idle = [row for row in self._rows if row.key not in in_use]
                self.release([min(idle, key=lambda row: row.used_at).key])
            slot = len(self._rows)
            self._rows.append(_Row(context.key))
            self._index[context.key] = slot
        row = self._rows[slot]
        row.used_at = self._clock
        # The last token is always fed again: its logits are what is asked for.
        del row.ids[_common_prefix(row.ids, context.token_ids, len(context.token_ids) - 1) :]
        return slot

    def _swap(self, one: int, other: int) -> None:
        rows = self._rows
        self._cache.swap(one, other, max(len(rows[one].ids), len(rows[other].ids)))
        rows[one], rows[other] = rows[other], rows[one]
        self._index[rows[one].key], self._index[rows[other].key] = one, other

    def _catch_up(self, tokens: Sequence[Sequence[int]], *, first: int, budget: int | None) -> int:
        """Feed rows `first`.. all of their tokens but the last; return the tokens fed."""
        fed = 0
        while budget is None or fed < budget:
            missing = [
                len(ids) - 1 - len(self._rows[first + row].ids) for row, ids in enumerate(tokens)
            ]
            span = _first_run(missing)
            if span is None:
                break
            width = min(self.prefill_chunk, max(missing[span]))
            if budget is not None:
                width = min(width, budget - fed)
            new = []
            for row in range(span.start, span.stop):
                held = len(self._rows[first + row].ids)
                new.append(tokens[row][held : held + min(width, missing[row])])
            # The body alone: no logits are wanted for tokens that are known.
            self._feed(self.model.base_model, new, first=first + span.start)
            fed += sum(map(len, new))
        return fed

    def _feed(self, module: torch.nn.Module, new: Sequence[Sequence[int]], *, first: int) -> Any:
        """Run one forward over slots `first`.., feeding `new[r]` to row r, ragged on the right."""
        width = max(map(len, new))
        padded = [[*ids, *[0] * (width - len(ids))] for ids in new]
        ids_RQ = torch.tensor(padded, device=self.device)
        rows = self._rows[first : first + len(new)]
        lengths = [len(row.ids) for row in rows]
        starts_R1 = torch.tensor(lengths, device=self.device)[:, None]
        positions_RQ = starts_R1 + torch.arange(width, device=self.device)
        mask = self._cache.begin(
            first=first, positions_RQ=positions_RQ, longest=max(lengths) + width
        )
        if self._additive_mask:
            floor = torch.finfo(self.model.dtype).min
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, floor)
        output = module(
            input_ids=ids_RQ,
            attention_mask=mask,
            position_ids=positions_RQ.clamp(max=self.max_length - 1),
            past_key_values=self._cache,
            use_cache=True,
        )
        for row, ids in zip(rows, new, strict=True):
            row.ids.extend(ids)
        return output

    def _keep_hidden(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]


def _check_full_attention(config) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"model type {config.model_type!r} has layers of kind {sorted(kinds)}; the slot cache "
            "holds full attention only. Use a model without sliding-window or recurrent layers."
        )


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax in at least float32."""
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    return wide.log_softmax(-1)


def _common_prefix(held: list[int], wanted: Sequence[int], limit: int) -> int:
    """Length of the longest shared prefix, at most `limit`."""
    length = min(len(held), limit)
    if held[:length] == wanted[:length]:
        return length
    return next(at for at in range(length) if held[at] != wanted[at])


def _invert(order: list[int]) -> list[int]:
    inverse = [0] * len(order)
    for place, slot in enumerate(order):
        inverse[slot] = place
    return inverse


def _first_run(missing: list[int]) -> slice | None:
    """The first run of neighbouring rows that miss something."""
    start = next((row for row, count in enumerate(missing) if count > 0), None)
    if start is None:
        return None
    stop = next((row for row in range(start, len(missing)) if missing[row] <= 0), len(missing))
    return slice(start, stop)
