"""Token ids to text, piece by piece: never half a character, never past a stop string."""

import copy
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from pilotfish.errors import ConfigError


class TextStream:
    """The text of one completion as its tokens arrive.

    A pure function of the ids pushed so far, so it can be rebuilt anywhere by pushing them again.
    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        keep_stop: bool = False,
    ) -> None:
        """A stop string that ends with one of the first `min_tokens` tokens is plain text.

        The one that ends the text is left out of it, unless `keep_stop`.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"tokenizer {type(tokenizer).__name__} has no fast backend, which streaming text "
                "needs. Save it with its tokenizer.json."
            )
        self._backend = backend
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._keep_stop = keep_stop
        self._held = ""
        self._num_tokens = 0
        self.min_tokens = min_tokens
        """May change as long as fewer tokens were pushed."""
        self.text = ""
        """All text released so far; after `stopped` it ends where the stop string began, or behind
        it."""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add one token and return the text it releases, which may be empty."""
        if self.stopped:
            return ""
        known = len(self._held)
        self._held += self._decoder.step(self._backend, token_id) or ""
        self._num_tokens += 1
        if self._num_tokens > self.min_tokens and (found := self._stops(known)):
            self.stopped = True
            start, end = min(found)
            return self._release(end if self._keep_stop else start)
        return self._release(len(self._held) - self._undecided())

    def fork(self) -> "TextStream":
        """Return a stream that goes on from here by itself."""
        other = copy.copy(self)
        other._decoder = copy.copy(self._decoder)
        return other

    def flush(self) -> str:
        """Release what was held back; call once no more tokens come."""
        return "" if self.stopped else self._release(len(self._held))

    def _stops(self, known: int) -> list[tuple[int, int]]:
        """Where stop strings begin and end in the held text, behind what is `known` of it."""
        found = [
            (self._held.find(stop, max(0, known + 1 - len(stop))), len(stop)) for stop in self._stop
        ]
        return [(at, at + size) for at, size in found if at >= 0]

    def _undecided(self) -> int:
        """Length of the longest tail that a stop string begins with."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )

    def _release(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self.text += piece
        return piece
