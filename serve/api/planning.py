"""From a body to what its answer needs, all of it decided and checked before any work is done."""

import secrets
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from pilotfish.chat import PromptInput, render_prompt
from pilotfish.context import Prompt
from pilotfish.errors import PromptError
from pilotfish.guides.base import Stage
from pilotfish.noise import choice_seed
from serve.api.answers import ChatShape, Header, Shape, TextShape
from serve.api.checks import (
    check_chain,
    check_ids,
    check_unfinished,
    check_vocabulary,
    check_whole_answers,
)
from serve.api.choices import Chain, Task
from serve.api.limits import check_prompt, check_sizes
from serve.api.schema.chat import ChatMessage, ChatRequest
from serve.api.schema.generation import GenerationRequest
from serve.api.schema.text import CompletionRequest
from serve.api.whole_answers import WholeAnswerGuide
from serve.catalog import BaseEntry, Catalog
from serve.choosing import Chosen, GuideAsk, choose
from serve.errors import APIError
from serve.ingress_config import IngressConfig
from serve.replicas.shelf import Shelf
from serve.wire import DraftUse


class Caller(NamedTuple):
    """What a request says in its headers."""

    request_id: str | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One request, decided."""

    request_id: str
    shape: Shape
    header: Header
    chosen: Chosen
    chain: Chain
    prompts: Sequence[Prompt]
    tasks: Sequence[Task]
    """One per choice: all of the first prompt, then of the second."""

    @property
    def num_streams(self) -> int:
        """Completions that are decoded at a time."""
        selection = self.chain.selection
        return len(self.tasks) * (1 if selection is None else selection.selector.num_drafts)


class Planner:
    """Knows the vocabulary, the limits, and the guides that act on whole answers."""

    def __init__(
        self,
        config: IngressConfig,
        tokenizer: PreTrainedTokenizerBase,
        whole_answers: Shelf[WholeAnswerGuide],
    ) -> None:
        self._config = config
        self.tokenizer = tokenizer
        self._whole_answers = whole_answers

    async def plan(
        self,
        body: ChatRequest | CompletionRequest,
        caller: Caller,
        catalog: Catalog,
        held: AsyncExitStack,
    ) -> Plan:
        """Decide a request. Versions of guides that it needs here are kept until `held` closes.

        Raises `APIError`, and `PromptError` and `ConfigError` of guides.
        """
        shape: Shape = ChatShape() if isinstance(body, ChatRequest) else TextShape()
        # Serve gives every request an id in its header, so the body's own goes first.
        request_id = body.request_id or caller.request_id or uuid.uuid4().hex
        chosen = _choose(body, catalog, request_id)
        check_ids(body, catalog.base)
        written = [body.messages] if isinstance(body, ChatRequest) else body.prompt
        check_sizes(self._config.limits, body, num_prompts=len(written))
        prompts = [self.prompt(one, catalog.base) for one in written]
        plan = Plan(
            request_id=request_id,
            shape=shape,
            header=Header(
                id=shape.id_prefix + request_id,
                created=int(time.time()),
                model=body.model,
                system_fingerprint=catalog.system_fingerprint([u.version for u in chosen.uses]),
            ),
            chosen=chosen,
            chain=await self._chain(body, chosen, catalog, held),
            prompts=prompts,
            tasks=self._tasks(body, prompts, caller, catalog.base, request_id),
        )
        self._check(body, plan, catalog.base)
        return plan

    def _check(self, body: ChatRequest | CompletionRequest, plan: Plan, base: BaseEntry) -> None:
        if plan.num_streams > self._config.max_in_flight:
            message = (
                f"{plan.num_streams} completions at once (prompts, times n, times the drafts of a "
                f"guide) are more than the {self._config.max_in_flight} of this server."
            )
            raise APIError(400, message, param="n")
        check_chain(body, plan.chain)
        if body.completed_token_ids:
            check_unfinished(plan.tasks[0], self.tokenizer, base, ignore_eos=body.ignore_eos)
        for task in plan.tasks[:: body.n]:
            check_whole_answers(plan.chain, task)

    def prompt(self, written: str | list[int] | list[ChatMessage], base: BaseEntry) -> Prompt:
        """Return a text, ids or a conversation as the base reads it. Raises `APIError`."""
        prompt = self._prompt(written, base)
        check_prompt(self._config.limits, prompt)
        return prompt

    def _prompt(self, written: str | list[int] | list[ChatMessage], base: BaseEntry) -> Prompt:
        if isinstance(written, str):
            return Prompt(self._rendered(written, "prompt"), text=written)
        messages = tuple(one.plain() for one in written if isinstance(one, ChatMessage))
        if messages:
            return Prompt(self._rendered(messages, "messages"), messages)
        token_ids = [one for one in written if isinstance(one, int)]
        check_vocabulary("prompt", token_ids, base)
        return Prompt(token_ids)

    def _rendered(self, prompt: PromptInput, param: str) -> list[int]:
        try:
            return render_prompt(self.tokenizer, prompt)
        except PromptError as error:
            raise APIError(400, str(error), param=param) from error

    def _tasks(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[Prompt],
        caller: Caller,
        base: BaseEntry,
        request_id: str,
    ) -> list[Task]:
        seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
        tasks: list[Task] = []
        for prompt in prompts:
            params = self._params(body, len(prompt.token_ids), base)
            echo = isinstance(body, CompletionRequest) and body.echo
            # Who draws nothing reads, be it nothing.
            reads = len(prompt.token_ids) if params["max_tokens"] == 0 else None
            for number in range(body.n):
                index = len(tasks)
                task = Task(
                    request_id=request_id if index == 0 else f"{request_id}-{index}",
                    session_id=caller.session_id or body.session_id,
                    prompt=prompt,
                    params={**params, "seed": choice_seed(seed, number)},
                    completed=body.completed_token_ids,
                    keep_stop=body.include_stop_str_in_output,
                    echo=self._text(prompt) if echo else "",
                    read_from=0 if echo and body.wants_logprobs else reads,
                )
                tasks.append(task)
        return tasks

    def _text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return str(self.tokenizer.decode(prompt.token_ids, skip_special_tokens=True))

    def _params(
        self, body: ChatRequest | CompletionRequest, num_prompt: int, base: BaseEntry
    ) -> dict[str, Any]:
        """Return the fields of `SamplingParams` but the seed, with the length decided."""
        room = base.max_length - num_prompt
        wanted = body.token_limit
        least = 1 if wanted is None else wanted
        if room < least:
            message = (
                f"This model's maximum context length is {base.max_length} tokens, but the prompt "
                f"has {num_prompt} and {least} more were asked for. Shorten the prompt, or lower "
                "max_tokens."
            )
            param = "messages" if isinstance(body, ChatRequest) else "prompt"
            raise APIError(400, message, param=param, code="context_length_exceeded")
        max_tokens = min(room, self._config.max_tokens) if wanted is None else wanted
        if body.min_tokens > max_tokens:
            message = f"min_tokens is {body.min_tokens}, more than max_tokens: {max_tokens}."
            raise APIError(400, message, param="min_tokens")
        return {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": min(max(0, body.top_k), base.vocab_size),
            "min_p": body.min_p,
            "max_tokens": max_tokens,
            "min_tokens": body.min_tokens,
            "stop": body.stops,
            "stop_token_ids": body.stop_token_ids,
            "ignore_eos": body.ignore_eos,
            "logit_bias": {int(token_id): bias for token_id, bias in body.logit_bias.items()},
            "top_logprobs": body.num_top,
        }

    async def _chain(
        self, body: GenerationRequest, chosen: Chosen, catalog: Catalog, held: AsyncExitStack
    ) -> Chain:
        draft, tilts = _draft(body, catalog), chosen.tilts
        if draft is not None and all(use.version.name != draft["guide"] for use in tilts):
            tilts = [*tilts, chosen.use(draft["guide"])]
        whole = {
            name: await held.enter_async_context(
                self._whole_answers.lease(chosen.use(name).version)
            )
            for name in (chosen.chain.selection, *chosen.chain.revisions)
            if name is not None
        }
        selecting = chosen.chain.selection
        return Chain(
            tilts=tilts,
            draft=draft,
            selection=None
            if selecting is None
            else whole[selecting].selecting(chosen.use(selecting)),
            revisions=[whole[n].revising(chosen.use(n)) for n in chosen.chain.revisions],
        )


def _choose(body: GenerationRequest, catalog: Catalog, request_id: str) -> Chosen:
    also = [GuideAsk(name=name, param="response_guide") for name in body.response_guides]
    for ask in also:
        entry = catalog.guide(ask.name)
        if entry is not None and entry.current.stage is not Stage.REVISION:
            message = f"Guide {ask.name!r} rewrites no answers. Name it in guides."
            raise APIError(400, message, param="response_guide", code="invalid_guides")
    if body.drafting is not None:
        also.append(GuideAsk(name=body.drafting.guide, weight=0.0, param="draft"))
    return choose(catalog, body.model, body.asked_guides, also=also, request_id=request_id)


def _draft(body: GenerationRequest, catalog: Catalog) -> DraftUse | None:
    if body.drafting is None:
        return None
    entry = catalog.guide(body.drafting.guide)
    assert entry is not None, "the guides of the request were found"
    if entry.current.kind != "genarm" or entry.placement != "colocated" or not entry.enabled:
        message = (
            f"Guide {entry.name!r} cannot draft: that takes a GenARM guide in the process of the "
            "base, and one that is not switched off."
        )
        raise APIError(400, message, param="draft")
    return DraftUse(guide=entry.name, num_tokens=body.drafting.num_tokens)
