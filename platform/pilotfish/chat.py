"""Messages to token ids: the one place where a chat template is applied.

Training and serving both call these functions, so a guide is trained on exactly the ids that it
will be fed: `render_prompt` gives what a model reads, `render_completion` what it should then
write, and their concatenation is a training example. Knows no model and no data format.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, cast

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pilotfish.errors import PromptError


class Message(TypedDict):
    """One turn of a conversation, as every chat API writes it."""

    role: Literal["system", "user", "assistant"]
    content: str


PromptInput: TypeAlias = str | Sequence[Message]
"""Raw text, or a conversation whose last turn waits for an answer."""

_ROLES = ("system", "user", "assistant")


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptInput) -> list[int]:
    """Return the ids a model reads before it answers.

    Messages pass through the chat template once and bring their own special tokens. A string is
    raw text: it gets what the tokenizer adds to any text (such as a begin token), nothing more.
    """
    check_prompt(prompt)
    if isinstance(prompt, str):
        token_ids = _encode(tokenizer, prompt, add_special_tokens=True)
    else:
        text = _apply_template(tokenizer, prompt, add_generation_prompt=True)
        token_ids = _encode(tokenizer, text, add_special_tokens=False)
    if not token_ids:
        raise PromptError("the prompt has no tokens. Give it some text.")
    return token_ids


def render_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptInput,
    answer: str,
    *,
    end_ids: frozenset[int] | None = None,
) -> list[int]:
    """Return the ids a model should write behind `render_prompt(tokenizer, prompt)`.

    They end with exactly one end token, the first at which serving would stop; `end_ids` are those
    it stops at (default: `stop_ids(tokenizer)`). The answer is tokenised on its own, so no token
    straddles the boundary between what is read and what is written.
    """
    check_prompt(prompt)
    ends = stop_ids(tokenizer) if end_ids is None else end_ids
    if not ends:
        raise PromptError(
            "the tokenizer has no end token, so no answer could ever end. Set "
            "`tokenizer.eos_token`, or give the ids at which decoding stops."
        )
    _refuse_end_text(tokenizer, answer, ends)
    text = answer if isinstance(prompt, str) else _answer_text(tokenizer, prompt, answer)
    token_ids = _encode(tokenizer, text, add_special_tokens=False)
    for position, token_id in enumerate(token_ids):
        if token_id in ends:  # what a template writes behind the end is never decoded
            return token_ids[: position + 1]
    eos = tokenizer.eos_token_id
    return [*token_ids, eos if eos in ends else min(ends)]


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Return the ids that end a completion: the tokenizer's eos and those of a model's config."""
    named: list[Any] = [tokenizer.eos_token_id]
    if generation_config is not None:
        named.append(generation_config.eos_token_id)
    found: set[int] = set()
    for eos in named:
        found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(found)


def check_prompt(prompt: object) -> None:
    """Raise `PromptError` unless this is text, or messages of which the last is not an answer."""
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is an empty string. Give it some text.")
        return
    if not isinstance(prompt, Sequence):
        raise PromptError(
            f"the prompt is a {type(prompt).__name__}, wanted a string or a list of messages."
        )
    if not prompt:
        raise PromptError("the prompt is an empty list of messages. Add a user message.")
    for position, message in enumerate(prompt):
        _check_message(message, position)
    if prompt[-1]["role"] == "assistant":
        raise PromptError(
            "the last message is from the assistant, so there is nothing to answer. End the "
            "conversation with a user message."
        )


def _check_message(message: object, position: int) -> None:
    where = f"message {position}"
    if not isinstance(message, Mapping):
        raise PromptError(
            f"{where} is a {type(message).__name__}, wanted an object with role and content."
        )
    for key in ("role", "content"):
        if key not in message:
            raise PromptError(f"{where} has no {key!r}, wanted role and content.")
    if message["role"] not in _ROLES:
        raise PromptError(f"{where} has role {message['role']!r}, wanted one of {_ROLES}.")
    if not isinstance(message["content"], str):
        kind = type(message["content"]).__name__
        raise PromptError(f"{where} has content of type {kind}, wanted a string.")


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool
) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    if tokenizer.chat_template is None:
        raise PromptError(
            "the tokenizer has no chat template, so messages cannot be rendered. Pass the prompt "
            "as text, or set `tokenizer.chat_template`."
        )
    try:
        rendered = tokenizer.apply_chat_template(
            cast(list[dict[str, str]], list(messages)),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except jinja2.TemplateError as error:
        raise PromptError(
            f"the tokenizer's chat template refuses these messages: {error}. Change the "
            "messages, or set another `tokenizer.chat_template`."
        ) from error
    return cast(str, rendered)  # a string, since tokenize=False


def _answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: str) -> str:
    """Return what the template writes for the answer, behind what it writes for the prompt."""
    before = _apply_template(tokenizer, prompt, add_generation_prompt=True)
    turn = Message(role="assistant", content=answer)
    whole = _apply_template(tokenizer, [*prompt, turn], add_generation_prompt=False)
    if not whole.startswith(before):
        raise PromptError(
            "the tokenizer's chat template renders an answered conversation as "
            f"{whole[-120:]!r}, which does not begin with its own prompt {before[-120:]!r}; a "
            "model would be trained on other text than it is served. Set a chat template whose "
            "generation prompt is the beginning of its assistant turn."
        )
    behind = whole.removeprefix(before)
    if answer.strip() not in behind:
        raise PromptError(
            f"the tokenizer's chat template changes the answer {answer[:80]!r} to "
            f"{behind[:80]!r}. Set a chat template that keeps assistant turns as they are."
        )
    return behind


def _refuse_end_text(tokenizer: PreTrainedTokenizerBase, answer: str, ends: frozenset[int]) -> None:
    for token in tokenizer.convert_ids_to_tokens(sorted(ends)):
        if token in answer:
            raise PromptError(
                f"the answer contains the end token {token!r} as text, so everything behind it "
                "would be lost. Remove it from the answer."
            )
