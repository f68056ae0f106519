"""From a body to what its answer needs, all of it decided and checked before any work is done."""

import secrets
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from pilotfish.chat import render_prompt
from pilotfish.context import Prompt
from pilotfish.decode.detokenize import TextStream
from pilotfish.errors import PromptError
from pilotfish.guides.base import Stage
from pilotfish.noise import draft_seed
from serve.api.answers import ChatShape, Header, Shape, TextShape
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
        _check_ids(body, catalog.base)
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

    def prompt(self, written: str | list[int] | list[ChatMessage], base: BaseEntry) -> Prompt:
        """Return a text, ids or a conversation as the base reads it. Raises `APIError`."""
        prompt = self._prompt(written, base)
        check_prompt(self._config.limits, prompt)
        return prompt

    def _prompt(self, written: str | list[int] | list[ChatMessage], base: BaseEntry) -> Prompt:
        turns = [one for one in written if isinstance(one, ChatMessage)]
        token_ids = [one for one in written if isinstance(one, int)]
        try:
            if turns:
                messages = tuple(turn.plain() for turn in turns)
                return Prompt(render_prompt(self.tokenizer, messages), messages)
            if isinstance(written, str):
                return Prompt(render_prompt(self.tokenizer, written), text=written)
        except PromptError as error:
            param = "messages" if turns else "prompt"
            raise APIError(400, str(error), param=param) from error
        _check_vocabulary("prompt", token_ids, base)
        return Prompt(token_ids)

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
            reads = len(prompt.token_ids) if params["max_tokens"] == 0 else None
            text = self.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
            for number in range(body.n):
                index = len(tasks)
                task = Task(
                    request_id=request_id if index == 0 else f"{request_id}-{index}",
                    session_id=caller.session_id or body.session_id,
                    prompt=prompt,
                    params={**params, "seed": draft_seed(seed, number)},
                    completed=body.completed_token_ids,
                    keep_stop=body.include_stop_str_in_output,
                    echo=str(text) if echo else "",
                    read_from=0 if echo and body.wants_logprobs else reads,
                )
                tasks.append(task)
        return tasks

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

    def _check(self, body: ChatRequest | CompletionRequest, plan: Plan, base: BaseEntry) -> None:
        if plan.num_streams > self._config.max_in_flight:
            message = (
                f"{plan.num_streams} completions at once (prompts, times n, times the drafts of a "
                f"guide) are more than the {self._config.max_in_flight} of this server."
            )
            raise APIError(400, message, param="n")
        if body.completed_token_ids:
            self._check_completed(body, plan, base)
        if plan.chain.revisions:
            _check_revised(body)
        for task in plan.tasks[:: body.n]:
            _check_whole_answers(plan.chain, task)

    def _check_completed(self, body: GenerationRequest, plan: Plan, base: BaseEntry) -> None:
        """Raise `APIError` unless there is something behind what is there."""
        task, completed = plan.tasks[0], body.completed_token_ids
        if plan.chain.selection is not None or plan.chain.revisions:
            message = "A guide that selects or rewrites answers cannot go on with half of one."
            raise APIError(400, message, param="completed_token_ids")
        params = task.params
        text = TextStream(self.tokenizer, params["stop"], min_tokens=params["min_tokens"])
        for token_id in completed:
            text.push(token_id)
        ends = {*params["stop_token_ids"], *(() if body.ignore_eos else base.end_ids)}
        if text.stopped or completed[-1] in ends or len(completed) >= params["max_tokens"]:
            message = "completed_token_ids are a finished answer: nothing is missing behind them."
            raise APIError(400, message, param="completed_token_ids")


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


def _check_ids(body: GenerationRequest, base: BaseEntry) -> None:
    _check_vocabulary("completed_token_ids", body.completed_token_ids, base)
    _check_vocabulary("stop_token_ids", body.stop_token_ids, base)
    _check_vocabulary("logit_bias", [int(token_id) for token_id in body.logit_bias], base)


def _check_vocabulary(param: str, token_ids: Sequence[int], base: BaseEntry) -> None:
    strange = next((i for i in token_ids if i >= base.vocab_size), None)
    if strange is not None:
        message = f"{param} token id {strange} is outside the vocabulary of {base.vocab_size}."
        raise APIError(400, message, param=param)


def _check_revised(body: ChatRequest | CompletionRequest) -> None:
    """Raise `APIError` for what means nothing where the answer is rewritten."""
    wants = {
        "logprobs": body.wants_logprobs,
        "echo": isinstance(body, CompletionRequest) and body.echo,
        "include_stop_str_in_output": body.include_stop_str_in_output,
    }
    for name, wanted in wants.items():
        if wanted:
            message = f"{name} is about the tokens of an answer, which a guide is to rewrite."
            raise APIError(400, message, param=name)


def _check_whole_answers(chain: Chain, task: Task) -> None:
    """Raises `PromptError`."""
    if chain.selection is not None:
        selector, name = chain.selection.selector, chain.selection.use.version.name
        if task.params["temperature"] == 0 and selector.num_drafts > 1:
            message = (
                f"Guide {name!r} selects among {selector.num_drafts} drafts, but at temperature 0 "
                "they are all the same. Raise the temperature, or leave the guide out."
            )
            raise APIError(400, message, param="temperature")
        selector.check(task.prompt, task.params["max_tokens"])
    for revision in chain.revisions:
        revision.check(task.prompt)
