"""POST /tokenize and /detokenize: the base's vocabulary, for clients that count or send ids."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from pilotfish.chat import render_prompt
from pilotfish.errors import PromptError
from serve.api.schema.reading import DetokenizeRequest, TokenizeRequest
from serve.catalog import BaseEntry
from serve.errors import APIError


def tokenize(
    tokenizer: PreTrainedTokenizerBase, base: BaseEntry, body: TokenizeRequest
) -> dict[str, Any]:
    """Return the ids of a text or a conversation, in vLLM's shape. Raises `APIError`."""
    if body.messages is None:
        text = body.prompt or ""
        tokens = tokenizer.encode(text, add_special_tokens=body.add_special_tokens, verbose=False)
    else:
        try:
            tokens = render_prompt(tokenizer, [message.plain() for message in body.messages])
        except PromptError as error:
            raise APIError(400, str(error), param="messages") from error
    strings = tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": base.max_length,
        "tokens": tokens,
        "token_strs": strings,
    }


def detokenize(
    tokenizer: PreTrainedTokenizerBase, base: BaseEntry, body: DetokenizeRequest
) -> dict[str, Any]:
    """Return the text of ids, special tokens included. Raises `APIError`."""
    strange = next((i for i in body.tokens if i >= base.vocab_size), None)
    if strange is not None:
        message = f"token id {strange} is outside the vocabulary of {base.vocab_size}."
        raise APIError(400, message, param="tokens")
    return {"prompt": tokenizer.decode(body.tokens)}
