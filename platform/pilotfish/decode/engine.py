"""The decode loop: continuous batching of one base and any guides.

Shapes: R rows (running requests), V vocabulary.

Requests join and leave at every step and share one base batch, whatever their guides, weights and
sampling parameters. The loop knows token ids only; text enters where stop strings were asked for.
"""

import secrets
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pilotfish.decode.batch import Batch
from pilotfish.decode.detokenize import TextStream
from pilotfish.decode.running import Running
from pilotfish.decode.sequence import Request, TokenEvent
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides.base import ChecksPrompts, Evidence, Step, TokenGuide
from pilotfish.models.causal_lm import CausalLM, NextToken


class Engine:
    """Decodes requests under the guided law, one token per running request and step.

    Not thread-safe: one thread owns it. `submit` and `cancel` only mark; `step` does the work.
    """

    def __init__(
        self,
        base: CausalLM,
        guides: Mapping[str, TokenGuide] | None = None,
        *,
        end_ids: frozenset[int] = frozenset(),
        tokenizer: PreTrainedTokenizerBase | None = None,
        prefill_budget: int = 512,
    ) -> None:
        """`end_ids` end every completion; `prefill_budget` bounds the prompt tokens per step."""
        self.base = base
        self.guides = dict(guides or {})
        self._end_ids = end_ids
        self._tokenizer = tokenizer
        self._prefill_budget = prefill_budget
        self._waiting: deque[Running] = deque()
        self._filling: deque[Running] = deque()
        self._running: list[Running] = []
        self._cancelled: set[int] = set()
        self._batch: Batch | None = None

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._filling)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._filling or self._running)

    def check(self, request: Request) -> None:
        """Raise `PromptError` if a request can never be decoded here."""
        unknown = [name for name in request.guides if name not in self.guides]
        if unknown:
            known = ", ".join(self.guides) or "none"
            raise PromptError(f"no guide named {unknown[0]!r} is loaded; loaded: {known}.")
        num_prompt, num_new = len(request.prompt.token_ids), request.params.max_tokens
        if num_prompt == 0:
            raise PromptError("the prompt has no tokens. Give at least one.")
        if num_prompt + num_new > self.base.max_length:
            raise PromptError(
                f"prompt of {num_prompt} tokens plus max_tokens={num_new} is more than the "
                f"{self.base.max_length} positions of the model. Shorten one of them."
            )
        size = self.base.vocab_size
        strange = next((i for i in request.prompt.token_ids if not 0 <= i < size), None)
        if strange is not None:
            raise PromptError(f"prompt token id {strange} is outside the vocabulary of {size}.")
        for name, weight in request.guides.items():
            guide = self.guides[name]
            if weight != 0 and isinstance(guide, ChecksPrompts):
                guide.check_prompt(request.prompt)
        if request.params.stop and self._tokenizer is None:
            raise ConfigError("stop strings need a tokenizer. Build the engine with one.")

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `PromptError` if it can never be decoded."""
        self.check(request)
        params = request.params
        text = None
        if params.stop:
            assert self._tokenizer is not None
            text = TextStream(self._tokenizer, params.stop)
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        self._waiting.append(Running(request, seed=seed, end_ids=self._end_ids, text=text))

    def cancel(self, key: int) -> None:
        """Drop a request before the next token; unknown keys are ignored."""
        self._cancelled.add(key)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advance everything by one token; return the tokens drawn."""
        self._drop_cancelled()
        self._admit()
        if not self._running:
            return []
        if self._batch is None:
            self._batch = Batch(self._running, self.base.device)
        batch = self._batch
        evidence = [self.guides[tilt.guide].begin(tilt.contexts) for tilt in batch.tilts]
        law = self.base.forward(batch.contexts)
        guided_RV = self._tilt(batch, law, evidence)
        tokens_R = batch.sampling.draw(guided_RV, batch.uniforms())
        return self._emit(law.logprobs_RV, guided_RV, tokens_R)

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        for queue in (self._waiting, self._filling):
            for running in [r for r in queue if r.request.key in self._cancelled]:
                queue.remove(running)
                self._release(running)
        for row in reversed(range(len(self._running))):
            if self._running[row].request.key in self._cancelled:
                self._remove(row)
        self._cancelled.clear()

    def _admit(self) -> None:
        """Move waiting requests to free slots and prefill them, within the step's budget."""
        while self._waiting and self.num_running < self.base.num_slots:
            self._filling.append(self._waiting.popleft())
        budget = self._prefill_budget
        while self._filling and budget > 0:
            running = self._filling[0]
            length = len(running.context.token_ids)
            if length > self._prefill_budget:
                budget -= self.base.prefill(running.context, budget)
                if budget <= 0:
                    return
            else:  # fed with its neighbours, by the next forward of all rows
                budget -= length
            self._running.append(self._filling.popleft())
            self._batch = None

    def _tilt(self, batch: Batch, law: NextToken, evidence: Sequence[Evidence]) -> Tensor:
        guided_RV = law.logprobs_RV
        for tilt, found in zip(batch.tilts, evidence, strict=True):
            guide, rows = self.guides[tilt.guide], tilt.rows
            if rows is None:
                step = Step(tilt.contexts, tilt.weights_R, law.hidden_RD, law.logprobs_RV)
                guided_RV = guide.tilt(guided_RV, step, found)
            else:
                incoming_RV = guided_RV[rows]
                first = guided_RV is law.logprobs_RV
                base_RV = incoming_RV if first else law.logprobs_RV[rows]
                step = Step(tilt.contexts, tilt.weights_R, law.hidden_RD[rows], base_RV)
                tilted_RV = guide.tilt(incoming_RV, step, found)
                guided_RV = guided_RV.index_copy(0, rows, tilted_RV)
        return guided_RV

    def _emit(self, base_RV: Tensor, guided_RV: Tensor, tokens_R: Tensor) -> list[TokenEvent]:
        picked_R1 = tokens_R[:, None]
        logprobs = guided_RV.gather(1, picked_R1)[:, 0].tolist()
        if guided_RV is base_RV:
            base_logprobs, kl = logprobs, [0.0] * len(logprobs)
        else:
            base_logprobs = base_RV.gather(1, picked_R1)[:, 0].tolist()
            kl = _kl(guided_RV, base_RV).tolist()
        events = []
        for row, token_id in enumerate(tokens_R.tolist()):
            running = self._running[row]
            index = running.num_completed
            reason = running.append(token_id)
            key = running.request.key
            events.append(
                TokenEvent(key, index, token_id, logprobs[row], base_logprobs[row], kl[row], reason)
            )
        for row in reversed(range(len(events))):
            if events[row].finish_reason is not None:
                self._remove(row)
        return events

    def _remove(self, row: int) -> None:
        """Take out a running row; the last one fills the hole, as it does in the models' slots."""
        self._release(self._running[row])
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last
        self._batch = None

    def _release(self, running: Running) -> None:
        keys = [running.request.key]
        self.base.release(keys)
        for name, _ in running.guides:
            self.guides[name].release(keys)


def _kl(guided_RV: Tensor, base_RV: Tensor) -> Tensor:
    """KL(guided || base) per row, in nats; a forbidden token counts nothing."""
    terms_RV = torch.sub(guided_RV, base_RV).mul_(guided_RV.exp())
    kl_R = terms_RV.sum(-1)
    if kl_R.isnan().any():  # 0 * -inf, where a guide forbids tokens
        kl_R = terms_RV.nan_to_num_(nan=0.0).sum(-1)
    return kl_R.clamp_min(0)
