"""A logits processor for transformers' `generate` that lets one guide tilt.

Shapes: B rows of a call, V vocabulary, N rows that the guide tilts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from pilotfish.chat import Message
from pilotfish.errors import ConfigError
from pilotfish.guides.base import Step, TokenGuide, reads_base
from pilotfish.hf.rows import Rows


class GuideLogitsProcessor(LogitsProcessor):
    """One guide and its weight, for `model.generate(..., logits_processor=[...])`.

    It runs before temperature and truncation, as transformers orders its own. Rows may be sampled,
    expanded, reordered by a beam search, or end early.
    """

    def __init__(
        self,
        guide: TokenGuide,
        weight: float = 1.0,
        *,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        messages: Sequence[Sequence[Message]] | None = None,
        vocab_size: int | None = None,
        after: "GuideLogitsProcessor | None" = None,
    ) -> None:
        """Padding is what the prompts' mask hides, or leading `pad_token_id`; a batch needs one.

        `eos_token_id` spares the guide the rows that ended. `messages` are the conversations, for
        guides with a template of their own. A processor that was given a mask or messages serves
        one call of `generate`. `vocab_size` cuts columns that pad the model's vocabulary. `after`
        is the processor of the guide before this one: rows are described there, and a gate needs
        it to know the base's law. Raises `ConfigError` for a guide that asks the base itself.
        """
        if reads_base(guide):
            raise ConfigError(
                "a logits processor sees no hidden states and cannot ask the base about "
                "candidates, as this guide does. Pass custom_generate=guided_generate(...)."
            )
        own = (attention_mask, pad_token_id, eos_token_id, messages)
        if after is not None and any(given is not None for given in own):
            raise ConfigError("the rows are those of `after`. Describe them there alone.")
        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        self._rows = (
            Rows(attention_mask, pad_token_id, ends, messages) if not after else after._rows
        )
        self._guide = guide
        self._weight = weight
        self._vocab_size = vocab_size
        self._after = after
        self._base_BV: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return guided log-probs [B, V]; rows that ended keep their scores."""
        rows, contexts, gone = self._rows.follow(input_ids)
        self._guide.release(gone)
        logits_BV = scores[:, : self._vocab_size]
        wide = logits_BV.dtype in (torch.float32, torch.float64)
        incoming_BV = (logits_BV if wide else logits_BV.float()).log_softmax(-1)
        self._base_BV = incoming_BV if self._after is None else self._after._base_BV
        assert self._base_BV is not None, "generate runs processors in the order of their list"
        if self._weight == 0 or not rows:
            return scores
        rows_N = torch.tensor(rows, device=scores.device)
        weights_N = torch.full((len(rows),), self._weight, dtype=torch.float64)
        step = Step(contexts, weights_N.to(scores.device), base_RV=self._base_BV[rows_N])
        with torch.inference_mode():
            evidence = self._guide.begin(contexts)
            tilted_NV = self._guide.tilt(incoming_BV[rows_N], step, evidence)
        # Others may write to what we return, so it is no inference tensor; padding is forbidden.
        guided_BV = scores.clone()
        guided_BV[rows_N, : self._vocab_size] = tilted_NV.to(scores.dtype)
        if self._vocab_size is not None:
            guided_BV[rows_N, self._vocab_size :] = -torch.inf
        return guided_BV
