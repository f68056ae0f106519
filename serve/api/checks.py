"""What is checked of a request beyond its fields: its ids, its end, and what its guides can do."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pilotfish.decode.detokenize import TextStream
from serve.api.choices import Chain, Task
from serve.api.schema.chat import ChatRequest
from serve.api.schema.generation import GenerationRequest
from serve.api.schema.text import CompletionRequest
from serve.catalog import BaseEntry
from serve.errors import APIError


def check_ids(body: GenerationRequest, base: BaseEntry) -> None:
    """Raise `APIError` for token ids that the base does not have."""
    check_vocabulary("completed_token_ids", body.completed_token_ids, base)
    check_vocabulary("stop_token_ids", body.stop_token_ids, base)
    check_vocabulary("logit_bias", [int(token_id) for token_id in body.logit_bias], base)


def check_vocabulary(param: str, token_ids: Sequence[int], base: BaseEntry) -> None:
    """Raise `APIError` for ids that the base does not have; `param` named them."""
    strange = next((i for i in token_ids if i >= base.vocab_size), None)
    if strange is not None:
        message = f"{param} token id {strange} is outside the vocabulary of {base.vocab_size}."
        raise APIError(400, message, param=param)


def check_chain(body: ChatRequest | CompletionRequest, chain: Chain) -> None:
    """Raise `APIError` for what means nothing where guides act on whole answers."""
    if body.completed_token_ids and (chain.selection is not None or chain.revisions):
        message = "A guide that selects or rewrites answers cannot go on with half of one."
        raise APIError(400, message, param="completed_token_ids")
    wants = {
        "logprobs": body.wants_logprobs,
        "echo": isinstance(body, CompletionRequest) and body.echo,
        "include_stop_str_in_output": body.include_stop_str_in_output,
    }
    for name, wanted in wants.items():
        if wanted and chain.revisions:
            message = f"{name} is about the tokens of an answer, which a guide is to rewrite."
            raise APIError(400, message, param=name)


def check_unfinished(
    task: Task, tokenizer: PreTrainedTokenizerBase, base: BaseEntry, *, ignore_eos: bool
) -> None:
    """Raise `APIError` unless there is something to draw behind what is completed."""
    params = task.params
    text = TextStream(tokenizer, params["stop"], min_tokens=params["min_tokens"])
    for token_id in task.completed:
        text.push(token_id)
    ends = {*params["stop_token_ids"], *(() if ignore_eos else base.end_ids)}
    if text.stopped or task.completed[-1] in ends or len(task.completed) >= params["max_tokens"]:
        message = "completed_token_ids are a finished answer: nothing is missing behind them."
        raise APIError(400, message, param="completed_token_ids")


def check_whole_answers(chain: Chain, task: Task) -> None:
    """Raise `APIError`, or `PromptError`, if guides could not select or rewrite such an answer."""
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
