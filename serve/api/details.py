"""What an answer says of its tokens besides their text: log-probs in OpenAI's shapes, and steering.

Log-probs are those of the guided law, before bias, temperature and truncation.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from serve.api.token_text import TokenText, TokenTexts
from serve.wire import Token

_FORBIDDEN = -9999.0
"""What OpenAI writes for a token that cannot come: JSON has no infinities."""


class Piece(NamedTuple):
    """What is new of one choice."""

    text: str
    tokens: Sequence[Token] = ()
    """Of the completion; where it was rewritten, of the last draft, all of them at the end."""
    readings: Sequence[Token] = ()
    """Of the prompt, where it is echoed with its log-probs."""
    finish_reason: str | None = None
    """Set with the last piece."""
    draft_text: str | None = None
    """What was rewritten, with the last piece."""


def join(pieces: Sequence[Piece]) -> Piece:
    """Return all of a choice as one piece."""
    return pieces[-1]._replace(
        text="".join([piece.text for piece in pieces]),
        tokens=[token for piece in pieces for token in piece.tokens],
        readings=[token for piece in pieces for token in piece.readings],
    )


class Vocabulary:
    """How tokens are written in an answer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: TokenTexts, *, as_ids: bool
    ) -> None:
        """`as_ids` writes `token_id:17` for a token, since two of them may read alike."""
        self.tokenizer = tokenizer
        self._texts = texts
        self._as_ids = as_ids

    def __getitem__(self, token_id: int) -> TokenText:
        found = self._texts[token_id]
        return found._replace(text=f"token_id:{token_id}") if self._as_ids else found


class Logprobs(Protocol):
    """How a route writes log-probs."""

    def of(self, piece: Piece) -> dict[str, Any]: ...


class ChatLogprobs:
    """As in /v1/chat/completions."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def of(self, piece: Piece) -> dict[str, Any]:
        return {"content": [self._entry(token) for token in piece.tokens], "refusal": None}

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._one(token_id, logprob) for token_id, logprob, _ in token.top]
        return {**self._one(token.token_id, token.logprob), "top_logprobs": top}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, utf8 = self._vocabulary[token_id]
        return {"token": text, "logprob": finite(logprob), "bytes": utf8}


class TextLogprobs:
    """As in /v1/completions: parallel lists. What is above all else comes first."""

    def __init__(self, vocabulary: Vocabulary, first: int | None) -> None:
        """`first` is the prompt's first token, where the prompt is echoed: it has no log-prob."""
        self._vocabulary = vocabulary
        self._first = first
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._backend = getattr(vocabulary.tokenizer, "backend_tokenizer")  # noqa: B009
        self._offset = 0

    def of(self, piece: Piece) -> dict[str, Any]:
        tokens, logprobs, tops, offsets = [], [], [], []
        for token_id, token in self._entries(piece):
            text = self._vocabulary[token_id].text
            tokens.append(text)
            logprobs.append(None if token is None else finite(token.logprob))
            tops.append(None if token is None else self._tops(token, text))
            offsets.append(self._offset)
            self._offset += len(self._decoder.step(self._backend, token_id) or "")
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _entries(self, piece: Piece) -> Iterator[tuple[int, Token | None]]:
        if self._first is not None:
            yield self._first, None
            self._first = None
        for token in (*piece.readings, *piece.tokens):
            yield token.token_id, token

    def _tops(self, token: Token, text: str) -> dict[str, float]:
        tops: dict[str, float] = {}
        for token_id, logprob, _ in token.top:
            tops.setdefault(self._vocabulary[token_id].text, finite(logprob))
        tops.setdefault(text, finite(token.logprob))  # the token that came is always among them
        return tops


class Details:
    """What one choice says of its tokens, as far as it was asked for."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        logprobs: Logprobs | None,
        steering: bool,
        token_ids: bool,
    ) -> None:
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._steering = steering
        self._token_ids = token_ids
        self.wanted = logprobs is not None or steering or token_ids

    def of(self, piece: Piece) -> dict[str, Any]:
        """Return fields of a choice."""
        fields: dict[str, Any] = {}
        if self._logprobs is not None:
            fields["logprobs"] = self._logprobs.of(piece)
        if self._token_ids:
            fields["token_ids"] = [token.token_id for token in piece.tokens]
        if self._steering:
            fields["steering"] = [self._steered(token) for token in piece.tokens]
            if piece.draft_text is not None:
                fields["draft_text"] = piece.draft_text
        return fields

    def _steered(self, token: Token) -> dict[str, Any]:
        return {
            **self._compared(token.token_id, token.logprob, token.base_logprob),
            "kl": token.kl,
            "moved_by": token.moved_by,
            "drafted": token.drafted,
            "notes": token.notes,
            "top": [self._compared(*top) for top in token.top],
        }

    def _compared(self, token_id: int, logprob: float, base_logprob: float) -> dict[str, Any]:
        return {
            "token_id": token_id,
            "token": self._vocabulary[token_id].text,
            "logprob": finite(logprob),
            "base_logprob": finite(base_logprob),
        }


def finite(logprob: float) -> float:
    """Return a log-prob as JSON can say it."""
    return max(logprob, _FORBIDDEN)
