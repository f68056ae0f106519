"""A causal LM that answers "what comes after these tokens?".

Shapes: R rows (contexts), K candidates per row, V vocabulary, D hidden size.

The base, every LM guide and every rollout model is a `CausalLM`: a `Body` with an output embedding.
"""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.context import Context
from pilotfish.errors import ConfigError
from pilotfish.models.body import Body


class NextToken(NamedTuple):
    """The law of the next token at each context."""

    logprobs_RV: Tensor
    hidden_RD: Tensor
    """Last hidden state, as it enters the output embedding."""


class _Said(NamedTuple):
    """An answer that will be asked for once more: by a guide, after its LM was the drafter."""

    contexts: Sequence[Context]
    lengths: list[int]
    law: NextToken

    def answers(self, contexts: Sequence[Context], lengths: list[int]) -> bool:
        """Whether these are the same, unchanged: a context only grows."""
        return self.lengths == lengths and all(map(is_, self.contexts, contexts))


class CausalLM:
    """One Hugging Face causal LM and its slots."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int | None = None,
        num_slots: int = 32,
        prefill_chunk: int = 512,
        max_cache_tokens: int | None = None,
        pack: bool = True,
    ) -> None:
        """Wrap a model, which is set to `eval` and whose weights must not change from now on.

        `vocab_size` cuts logits that pad the vocabulary (a multiple of 64, say) and renormalises;
        by default the model's own size. The rest is as in `Body`.
        """
        self.body = Body(
            model,
            num_slots=num_slots,
            prefill_chunk=prefill_chunk,
            max_cache_tokens=max_cache_tokens,
            pack=pack,
        )
        self.model = model
        config = model.config.get_text_config()
        self.vocab_size: int = vocab_size or config.vocab_size
        output_embedding = model.get_output_embeddings()
        assert output_embedding is not None, "a causal LM has an output embedding"
        self._output_embedding = output_embedding
        self._finish = logit_rule(config)
        self._said: _Said | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._check_head()

    @property
    def device(self) -> torch.device:
        return self.body.device

    @property
    def max_length(self) -> int:
        return self.body.max_length

    @property
    def num_slots(self) -> int:
        return self.body.num_slots

    @property
    def num_forwards(self) -> int:
        return self.body.num_forwards

    @torch.inference_mode()
    def forward(self, contexts: Sequence[Context], *, remember: bool = False) -> NextToken:
        """Return the next-token law at each context, feeding only what the cache lacks.

        `remember` is as in `Body.hidden`; a call about the same contexts right after then gets the
        same tensors. They belong to the caller.
        """
        lengths = [len(context.token_ids) for context in contexts]
        said, self._said = self._said, None
        if said is not None and said.answers(contexts, lengths):
            return said.law
        hidden_RD = self.body.hidden(contexts, remember=remember)
        law = NextToken(self.logprobs(hidden_RD), hidden_RD)
        if remember:
            self._said = _Said(tuple(contexts), lengths, law)
        return law

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        """Start `forward` and hand out its log-probs when asked: the local `LogprobSource`.

        On a CUDA device it runs on a stream of its own, beside whatever is called next.
        """
        if self._stream is None:
            logprobs_RV = self.forward(contexts).logprobs_RV
            return lambda: logprobs_RV
        return self._begin_beside(contexts, self._stream)

    def _begin_beside(
        self, contexts: Sequence[Context], stream: torch.cuda.Stream
    ) -> Callable[[], Tensor]:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            logprobs_RV = self.forward(contexts).logprobs_RV

        def wait() -> Tensor:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            logprobs_RV.record_stream(current)  # its memory is not reused before we are done
            return logprobs_RV

        return wait

    @torch.inference_mode()
    def logprobs(self, hidden_RD: Tensor) -> Tensor:
        """Return the next-token law [R, V] of hidden states, in at least float32."""
        logits_RV = self._finish(self._output_embedding(hidden_RD))[..., : self.vocab_size]
        wide = logits_RV.dtype in (torch.float32, torch.float64)
        return (logits_RV if wide else logits_RV.float()).log_softmax(-1)

    def candidates(self, contexts: Sequence[Context], candidates_RK: Tensor) -> Tensor:
        """Return the hidden state [R, K, D] of each candidate as the next token of its context.

        One forward, whatever K; nothing that is cached about the contexts changes.
        """
        return self.body.candidates(contexts, candidates_RK)

    def prefill(self, context: Context, budget: int) -> int:
        """Feed at most `budget` tokens of a context and return how many were fed.

        Fewer than `budget` means that `forward` now needs one more token of it at most.
        """
        return self.body.prefill(context, budget)

    def release(self, keys: Sequence[int]) -> None:
        """Sequences that ended: their slots may be taken."""
        self.body.release(keys)

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Fail at once where a model does more to its logits than we know of."""
        ids = torch.tensor([[0, 1]], device=self.device)
        output: Any = self.model(input_ids=ids, use_cache=False)
        body: Any = self.model.base_model(input_ids=ids, use_cache=False)
        ours = self._finish(self._output_embedding(body.last_hidden_state))
        if not torch.allclose(ours, output.logits, rtol=1e-3, atol=1e-3):
            raise ConfigError(
                f"model type {self.model.config.model_type!r} changes its logits behind the output "
                "embedding in a way that is not known here. Use another architecture."
            )


def logit_rule(config: Any) -> Callable[[Tensor], Tensor]:
    """Return what a few families do to their logits: scaling (Cohere, Granite), soft capping."""
    factor = getattr(config, "logit_scale", None) or 1.0
    factor /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        return lambda logits: torch.tanh(logits * (factor / cap)) * cap
    if factor != 1:
        return lambda logits: logits * factor
    return lambda logits: logits
