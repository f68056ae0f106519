"""The body of a decoder: hidden states after any tokens, with caches nobody sees.

Shapes: R rows (contexts), S slots of one forward, Q new tokens per slot, K candidates per row, T
columns, D hidden size.

Callers pass whole contexts; keys and values are found by `Context.key` or by a shared prefix,
checked against the ids, and recomputed where they do not match. So rolling back, resuming elsewhere
and being evicted are one event: a cache miss. This module knows nothing of heads or sampling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.context import Context
from pilotfish.errors import ConfigError, PromptError
from pilotfish.models.packed import pack_linears
from pilotfish.models.placement import Placement
from pilotfish.models.rows import (
    Ask,
    Row,
    Siblings,
    first_run,
    first_unknown,
    gather,
    group,
    invert,
    prefix,
)
from pilotfish.models.slots import SlotCache

_MERGED = 8  # so many missing tokens ride along with the candidates behind them
_SIBLINGS = 512  # candidates of one sequence per forward: each takes a column of every slot


class Body:
    """A Hugging Face decoder without its head, and its slots."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int = 32,
        prefill_chunk: int = 512,
        max_cache_tokens: int | None = None,
        keep_hidden: bool = False,
        pack: bool = True,
    ) -> None:
        """Wrap a model, which is set to `eval` and whose weights must not change from now on.

        `pack` copies large linear layers into a layout that is faster on a CPU, for good. Where
        weights are to change later, say no, and wrap the model anew after every change.

        `prefill_chunk` bounds the tokens per slot of one forward; `max_cache_tokens` bounds slots
        times columns, so that long sequences leave room for fewer; `keep_hidden` stores the hidden
        state of every token, for `prefix_sum`.
        """
        config = model.config.get_text_config()
        _check_full_attention(config)
        self.model = model.eval()
        self.device: torch.device = model.device
        if pack:
            pack_linears(model)
        self.max_length: int = config.max_position_embeddings
        self.num_slots = num_slots
        self.max_columns = max_cache_tokens or num_slots * self.max_length
        """Columns that there may be, over all slots."""
        self.prefill_chunk = prefill_chunk
        self.num_forwards = 0
        """Rows and candidates so far: model forwards over one token, the unit of papers' cost
        tables. Prefill counts nothing."""
        self._cache = SlotCache(num_slots=num_slots, max_tokens=max_cache_tokens)
        self._placement = Placement(self._cache)
        self._additive_mask = config._attn_implementation == "eager"
        self._keep_hidden = keep_hidden

    @property
    def num_shared(self) -> int:
        """Tokens so far that were not computed, since another sequence began alike."""
        return self._placement.num_shared

    def rows_at(self, longest: int) -> int:
        """How many sequences fit if the longest has this many tokens."""
        return self._cache.rows_at(longest)

    @torch.inference_mode()
    def hidden(self, contexts: Sequence[Context], *, remember: bool = False) -> Tensor:
        """Return the last hidden state behind each context [R, D], feeding what the cache lacks.

        With `remember` the states are kept until a call without it, which need not compute them.
        """
        asks = group(contexts)
        limit = self._limit(asks)
        if len(asks) > limit:
            return self._in_parts(asks, limit, remember=remember)
        for context in self._placement.leaders([ask.context for ask in asks]):
            self.prefill(context, self.max_length)
        by_slot = self._place(asks, limit)
        rows = self._placement.rows[: len(asks)]
        self._promote(rows, by_slot)
        starts = [first_unknown(row, ask) for row, ask in zip(rows, by_slot, strict=True)]
        for row, start in zip(rows, starts, strict=True):
            del row.ids[start:]
        tokens = [ask.context.token_ids for ask in by_slot]
        self._catch_up(tokens, starts)
        new = [ids[start:] for ids, start in zip(tokens, starts, strict=True)]
        self.num_forwards += sum(
            length > start
            for ask, start in zip(by_slot, starts, strict=True)
            for length in ask.lengths
        )
        hidden_RD = gather(self._feed(new) if any(new) else None, rows, by_slot, starts)
        for row, ask in zip(rows, by_slot, strict=True):
            row.siblings = None
            if not remember:
                row.known = {}
            else:
                for place, length in zip(ask.places, ask.lengths, strict=True):
                    row.known[length] = hidden_RD[place]
        return hidden_RD

    @torch.inference_mode()
    def candidates(self, contexts: Sequence[Context], candidates_RK: Tensor) -> Tensor:
        """Return the hidden state of each candidate as the next token of its context [R, K, D].

        All candidates are looked at in one forward, as siblings that do not see each other. What is
        cached about the contexts does not change; the candidate that is chosen need not be
        computed again.
        """
        self.num_forwards += candidates_RK.numel()
        asks = group(contexts)
        depth, num_candidates = max(len(ask.places) for ask in asks), candidates_RK.shape[1]
        deepest = max(1, _SIBLINGS // num_candidates)
        if depth > deepest:
            cuts = [slice(at, at + deepest) for at in range(0, depth, deepest)]
            parts = [[place for ask in asks for place in ask.places[cut]] for cut in cuts]
            return self._candidates_in_parts(contexts, candidates_RK, parts)
        limit = self._limit(asks, extra=depth * num_candidates + _MERGED)
        if len(asks) > limit:
            every = list(range(len(contexts)))
            parts = [every[at : at + limit] for at in range(0, len(every), limit)]
            return self._candidates_in_parts(contexts, candidates_RK, parts)
        by_slot = self._place(asks, limit)
        rows = self._placement.rows[: len(asks)]
        self._promote(rows, by_slot)
        tokens = [ask.context.token_ids for ask in by_slot]
        behind = [
            len(ids) - 1 if len(ids) - len(row.ids) > _MERGED else 0
            for row, ids in zip(rows, tokens, strict=True)
        ]
        self._catch_up(tokens, behind)
        return self._look(rows, by_slot, candidates_RK)

    @torch.inference_mode()
    def prefix_sum(self, contexts: Sequence[Context]) -> Tensor:
        """Return the sum of the hidden states of each context's completion [R, D].

        Needs `keep_hidden`, and a call about the same contexts right before.
        """
        device = self.device
        slots = [self._placement.slot(context.key) for context in contexts]
        longest = max(len(context.token_ids) for context in contexts)
        first_R = torch.tensor([len(c.prompt.token_ids) for c in contexts], device=device)
        end_R = torch.tensor([len(c.token_ids) for c in contexts], device=device)
        hidden_RTD = self._cache.hidden(torch.tensor(slots, device=device), longest)
        columns_T = torch.arange(longest, device=device)
        inside_RT = (columns_T >= first_R[:, None]) & (columns_T < end_R[:, None])
        return (hidden_RTD * inside_RT[..., None]).sum(1)

    @torch.inference_mode()
    def prefill(self, context: Context, budget: int) -> int:
        """Feed at most `budget` tokens of a context and return how many were fed.

        Fewer than `budget` means that `hidden` now needs one more token of it at most.
        """
        asks = group([context])
        self._place(asks, self._limit(asks))
        held = len(self._placement.rows[0].ids)
        end = min(held + budget, len(context.token_ids) - 1)
        self._catch_up([context.token_ids], [end])
        return max(0, end - held)

    def release(self, keys: Sequence[int]) -> None:
        """Sequences that ended: their slots may be taken, and serve shared prefixes until then."""
        self._placement.release(keys)

    def _limit(self, asks: Sequence[Ask], extra: int = 1) -> int:
        longest = max(len(ask.context.token_ids) for ask in asks)
        if longest > self.max_length:
            raise PromptError(
                f"a context of {longest} tokens, but the model takes at most {self.max_length}. "
                "Shorten the prompt or lower max_tokens."
            )
        return self.rows_at(longest + extra)

    def _place(self, asks: Sequence[Ask], limit: int) -> list[Ask]:
        """Bring the rows to slots 0.. and return the asks in the order of their slots."""
        contexts = [ask.context for ask in asks]
        self._placement.place(contexts, num_slots=limit, device=self.device)
        return sorted(asks, key=lambda ask: self._placement.slot(ask.context.key))

    def _in_parts(self, asks: Sequence[Ask], limit: int, *, remember: bool) -> Tensor:
        """More sequences than slots: some caches are lost on the way, no answer is."""
        found, places = [], []
        for at in range(0, len(asks), limit):
            some = asks[at : at + limit]
            contexts = [prefix(ask.context, length) for ask in some for length in ask.lengths]
            found.append(self.hidden(contexts, remember=remember))
            places += [place for ask in some for place in ask.places]
        return torch.cat(found)[invert(places)]

    def _candidates_in_parts(
        self, contexts: Sequence[Context], candidates_RK: Tensor, parts: Sequence[list[int]]
    ) -> Tensor:
        """Some contexts at a time, given by their places in the call."""
        self.num_forwards -= candidates_RK.numel()
        found = [
            self.candidates([contexts[place] for place in part], candidates_RK[part])
            for part in parts
        ]
        return torch.cat(found)[invert([place for part in parts for place in part])]

    def _promote(self, rows: Sequence[Row], asks: Sequence[Ask]) -> None:
        """Where the next token was a candidate, move its keys and values to where they belong."""
        moves = []
        for slot, (row, ask) in enumerate(zip(rows, asks, strict=True)):
            place = row.chosen_sibling(ask.context.token_ids)
            if place is None:
                continue
            assert row.siblings is not None
            moves.append((slot, row.siblings.first_column + place, len(row.ids)))
            row.ids.append(row.siblings.token_ids[place])
            row.known[len(row.ids)] = row.siblings.hidden_KD[place]
        if moves:
            slots, sources, targets = torch.tensor(moves, device=self.device).unbind(1)
            self._cache.move_columns(slots, sources, targets)

    def _catch_up(self, tokens: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        """Feed slots 0.. what they lack of `tokens[s][:ends[s]]`, in chunks."""
        rows = self._placement.rows
        while True:
            missing = [end - len(row.ids) for end, row in zip(ends, rows, strict=False)]
            span = first_run(missing)
            if span is None:
                return
            width = min(self.prefill_chunk, max(missing[span]))
            new = []
            for slot in range(span.start, span.stop):
                held = len(rows[slot].ids)
                new.append(tokens[slot][held : held + min(width, missing[slot])])
            self._feed(new, first=span.start)

    def _feed(self, new: Sequence[Sequence[int]], *, first: int = 0) -> Tensor:
        """Run one forward over slots `first`.., feeding `new[s]` to slot s, ragged on the right."""
        width = max(map(len, new))
        rows = self._placement.rows[first : first + len(new)]
        padded = [[*ids, *[0] * (width - len(ids))] for ids in new]
        held = [len(row.ids) for row in rows]
        end = max(start + len(ids) for start, ids in zip(held, new, strict=True))
        held_S1 = torch.tensor(held, device=self.device)[:, None]
        # Padding writes behind its row; not further than one column behind the longest.
        columns_SQ = (held_S1 + torch.arange(width, device=self.device)).clamp_(max=end)
        columns_T = self._cache.begin(
            first=first,
            columns_RQ=columns_SQ,
            longest=end + 1,
            start=held[0] if len(rows) == 1 else None,
        )
        mask_SQT = columns_T <= columns_SQ[:, :, None]
        hidden_SQD = self._run(torch.tensor(padded, device=self.device), mask_SQT, columns_SQ)
        for row, ids in zip(rows, new, strict=True):
            row.ids.extend(ids)
        return hidden_SQD

    def _look(self, rows: Sequence[Row], asks: Sequence[Ask], candidates_RK: Tensor) -> Tensor:
        """Feed what is missing of the contexts, and their candidates as siblings behind it.

        A sibling stands at the position after its context, sees the context's columns and its own.
        """
        device, (num_rows, num_candidates) = self.device, candidates_RK.shape
        depth = max(len(ask.lengths) for ask in asks)
        new = [ask.context.token_ids[len(row.ids) :] for row, ask in zip(rows, asks, strict=True)]
        width = max(map(len, new))
        # Rows that ask about fewer positions than others repeat their last one.
        places = [[*ask.places, *[ask.places[-1]] * (depth - len(ask.places))] for ask in asks]
        lengths = [[*ask.lengths, *[ask.lengths[-1]] * (depth - len(ask.places))] for ask in asks]
        chain_SW = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in new], device=device)
        siblings_SJ = candidates_RK[torch.tensor(places, device=device)].flatten(1)
        limits_SJ = torch.tensor(lengths, device=device).repeat_interleave(num_candidates, 1)
        ends = [len(ask.context.token_ids) for ask in asks]
        ends_S1 = torch.tensor(ends, device=device)[:, None]
        held_S1 = torch.tensor([len(row.ids) for row in rows], device=device)[:, None]
        columns_SW = held_S1 + torch.arange(width, device=device)
        num_siblings = depth * num_candidates
        # Padding of the chain goes behind the siblings, where it is in nobody's way.
        columns_SW = torch.where(columns_SW < ends_S1, columns_SW, columns_SW + num_siblings)
        columns_SQ = torch.cat(
            [columns_SW, ends_S1 + torch.arange(num_siblings, device=device)], dim=1
        )
        limits_SQ = torch.cat([columns_SW, limits_SJ], dim=1)
        columns_T = self._cache.begin(
            first=0, columns_RQ=columns_SQ, longest=max(ends) + num_siblings + width
        )
        mask_SQT = (columns_T < limits_SQ[..., None]) | (columns_T == columns_SQ[..., None])
        ids_SQ = torch.cat([chain_SW.long(), siblings_SJ], dim=1)
        hidden_SQD = self._run(ids_SQ, mask_SQT, limits_SQ)
        found_SJKD = hidden_SQD[:, width:].unflatten(1, (depth, num_candidates))
        answer = found_SJKD.new_empty((num_rows, *found_SJKD.shape[2:]))
        answer[torch.tensor(places, device=device)] = found_SJKD
        chosen = siblings_SJ.tolist() if depth == 1 else None
        for slot, (row, ids) in enumerate(zip(rows, new, strict=True)):
            row.ids.extend(ids)
            row.known = {}
            if chosen is not None:
                row.siblings = Siblings(ends[slot], ends[slot], chosen[slot], found_SJKD[slot, 0])
        return answer

    def _run(self, ids_SQ: Tensor, mask_SQT: Tensor, positions_SQ: Tensor) -> Tensor:
        mask = mask_SQT[:, None]
        if self._additive_mask:
            floor = torch.finfo(self.model.dtype).min
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, floor)
        hidden_SQD = self.model.base_model(
            input_ids=ids_SQ,
            attention_mask=mask,
            position_ids=positions_SQ.clamp(max=self.max_length - 1),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        if self._keep_hidden:
            self._cache.store_hidden(hidden_SQD)
        return hidden_SQD


def _check_full_attention(config) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"model type {config.model_type!r} has layers of kind {sorted(kinds)}; the slot cache "
            "holds full attention only. Use a model without sliding-window or recurrent layers."
        )
