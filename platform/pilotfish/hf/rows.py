"""What `generate` hands to a logits processor, read as contexts.

Shapes: B rows of a call, L columns (padding on the left).

A logits processor sees ids alone. Rows are told apart by their beginnings: they may be expanded,
reordered by a beam search, rolled back by an assistant, or end, and their caches still be found.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pilotfish.chat import Message
from pilotfish.context import Context, Prompt
from pilotfish.errors import ConfigError
from pilotfish.models.rows import common_prefix

KEYS = itertools.count(2**48)
"""Keys of contexts, apart from those of engines that share a guide."""


class Live(NamedTuple):
    """The rows that go on."""

    rows: list[int]
    contexts: list[Context]
    gone: list[int]
    """Keys that were live and are no longer."""


class Rows:
    """The rows of a `generate` call as contexts, which keep their keys wherever rows go."""

    def __init__(
        self,
        attention_mask: Tensor | None,
        pad_token_id: int | None,
        eos_token_ids: Iterable[int],
        messages: Sequence[Sequence[Message]] | None,
    ) -> None:
        """The mask and the messages are those of one call; padding and end ids serve many."""
        self._masked = None if attention_mask is None else num_padded(attention_mask)
        self._mask_columns = None if attention_mask is None else attention_mask.shape[1]
        self._pad_token_id = pad_token_id
        self._ends = frozenset(eos_token_ids)
        self._messages = messages
        self._seen_BL: Tensor | None = None
        self._prompt_columns = self._longest = 0
        self._contexts: list[Context] = []
        self._live = Live([], [], [])

    def follow(self, input_ids: Tensor) -> Live:
        """Take the ids [B, L] of a step. Asked again about the same ids, it answers the same."""
        seen = self._seen_BL
        if seen is not None and torch.equal(seen, input_ids):
            return self._live
        if seen is None or not self._continues(input_ids, seen):
            self._start(input_ids)
        elif torch.equal(seen, input_ids[:, :-1]):
            for context, token in zip(self._contexts, input_ids[:, -1].tolist(), strict=True):
                context.token_ids.append(token)
        else:
            self._match(input_ids)
        self._seen_BL = input_ids.clone()
        self._longest = max(self._longest, input_ids.shape[1])
        rows = [row for row, context in enumerate(self._contexts) if not self._ended(context)]
        contexts = [self._contexts[row] for row in rows]
        keys = {context.key for context in contexts}
        gone = [context.key for context in self._live.contexts if context.key not in keys]
        self._live = Live(rows, contexts, gone)
        return self._live

    def _ended(self, context: Context) -> bool:
        return not self._ends.isdisjoint(context.token_ids[len(context.prompt.token_ids) :])

    def _continues(self, input_ids: Tensor, seen: Tensor) -> bool:
        """Whether these are the rows seen before, grown, reordered or rolled back."""
        columns = self._prompt_columns
        prompts = {tuple(ids) for ids in seen[:, :columns].tolist()}
        same = (
            len(seen) == len(input_ids)
            and columns <= input_ids.shape[1] <= self._longest + 1
            and all(tuple(ids) in prompts for ids in input_ids[:, :columns].tolist())
        )
        if not same and (self._masked is not None or self._messages is not None):
            raise ConfigError(
                "a logits processor that was given an attention_mask or messages met another call "
                "of `generate`. Make a new one for each call."
            )
        return same

    def _start(self, input_ids: Tensor) -> None:
        num_rows, self._prompt_columns = input_ids.shape
        if self._mask_columns not in (None, self._prompt_columns):
            raise ConfigError(
                f"attention_mask has {self._mask_columns} columns, but the prompts have "
                f"{self._prompt_columns}. Give the mask that `generate` is given."
            )
        self._longest, self._contexts = 0, []
        padding = self._padding(input_ids)
        for row, ids in enumerate(input_ids.tolist()):
            prompt, messages = ids[padding[row] :], None
            if self._messages is not None:
                messages = tuple(self._messages[row // self._num_copies("messages", num_rows)])
            self._contexts.append(Context(next(KEYS), Prompt(prompt, messages), list(prompt)))

    def _match(self, input_ids: Tensor) -> None:
        """Give each row the key of the one it grew from; a second child gets a key of its own."""
        num_rows, padding = len(input_ids), self._padding(input_ids)
        copies = num_rows if self._masked is None else self._num_copies("attention_mask", num_rows)
        taken, contexts = set(), []
        for row, whole in enumerate(input_ids.tolist()):
            ids, first = whole[padding[row] :], row // copies * copies
            # Beams of one prompt stand together; a row that may have stayed in place did so.
            group = [*self._contexts[row : row + 1], *self._contexts[first : first + copies]]
            shared = [common_prefix(one.token_ids, ids) for one in group]
            best = group[shared.index(max(shared))]
            if best.key not in taken:
                taken.add(best.key)
                contexts.append(Context(best.key, best.prompt, ids))
            else:
                contexts.append(Context(next(KEYS), best.prompt, ids, parent=best.key))
        self._contexts = contexts

    def _padding(self, input_ids: Tensor) -> list[int]:
        """How many columns of each row are padding."""
        if self._masked is not None:
            copies = self._num_copies("attention_mask", len(input_ids))
            return [count for count in self._masked for _ in range(copies)]
        if self._pad_token_id is not None:
            return ((input_ids != self._pad_token_id).cumsum(-1) == 0).sum(-1).tolist()
        if len(input_ids) > 1:
            raise ConfigError(
                "the rows of a batch may be padded. Give the logits processor the prompts' "
                "attention_mask, or the pad_token_id."
            )
        return [0]

    def _num_copies(self, name: str, num_rows: int) -> int:
        """How many rows each prompt was expanded to; they stand together."""
        given = len((self._masked if name == "attention_mask" else self._messages) or [])
        if given == 0 or num_rows % given:
            raise ConfigError(
                f"{name} has {given} rows, but `generate` decodes {num_rows}. Give one for each "
                "prompt."
            )
        return num_rows // given


def num_padded(mask_BL: Tensor) -> list[int]:
    """Count the hidden columns on the left of each row. Raises `ConfigError` for any others."""
    if mask_BL.dim() != 2:
        raise ConfigError(
            f"attention_mask has {mask_BL.dim()} dimensions, wanted rows and columns."
        )
    shown_BL = mask_BL.bool()
    if not torch.equal(shown_BL.cumsum(-1) > 0, shown_BL):
        raise ConfigError(
            "attention_mask hides tokens behind the first one that it shows. Pad on the left: "
            "tokenizer.padding_side = 'left'."
        )
    return (~shown_BL).sum(-1).tolist()
