"""What single tokens of a vocabulary read like."""

import re
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}


class TokenText(NamedTuple):
    """One token, as text and as bytes."""

    text: str
    """What it adds to a text; a part of a character reads as the replacement character."""
    utf8: list[int]
    """Exactly, whatever part of a character it is."""


class TokenTexts:
    """The texts of a vocabulary, each found when it is first asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The tokenizer has a fast backend."""
        self._backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
        decoder = self._backend.decoder
        self._of_bytes = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self._special = frozenset(tokenizer.all_special_ids)
        # Some tokens read otherwise at the beginning of a text, so each is read behind this one.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before_text = self._decode(self._before)
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token_id: int) -> TokenText:
        if token_id not in self._known:
            text = self._text(token_id)
            self._known[token_id] = TokenText(text, list(self._bytes(token_id, text)))
        return self._known[token_id]

    def _text(self, token_id: int) -> str:
        behind = self._decode([*self._before, token_id])
        if behind.startswith(self._before_text):
            return behind.removeprefix(self._before_text)
        return self._decode([token_id])

    def _bytes(self, token_id: int, text: str) -> bytes:
        piece = self._backend.id_to_token(token_id) or ""
        if token_id in self._special:
            return piece.encode()
        if self._of_bytes and all(char in _BYTES for char in piece):
            return bytes(_BYTES[char] for char in piece)
        byte = _BYTE.fullmatch(piece)
        return text.encode() if byte is None else bytes.fromhex(byte[1])

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)
