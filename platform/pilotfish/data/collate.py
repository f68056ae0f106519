"""Records to token ids to padded batches, with every cut counted.

Shapes: B rows, T positions, P pairs (B = 2P: chosen rows, then rejected rows).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pilotfish.chat import render_completion, render_prompt
from pilotfish.config import Config
from pilotfish.data.records import Demonstration, PreferencePair, PromptText
from pilotfish.errors import DataError, PromptError


class LengthLimits(Config):
    """What happens to examples that are too long.

    A prompt loses its beginning first, so that the question next to the answer stays; a begin
    token or system message goes with it. Both answers of a pair keep the same prompt. A prompt is
    never cut below a quarter of `max_length`, because an answer without its question teaches
    nothing; only an answer longer than the rest loses its tail, and with it its end token.
    """

    max_length: int = Field(default=1024, ge=8)
    too_long: Literal["cut", "drop"] = "cut"


@dataclass(frozen=True, slots=True)
class TokenExample:
    """A prompt and its answer as ids, and how many ids were cut from each."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_cut_prompt_tokens: int = 0
    num_cut_answer_tokens: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class PairExample:
    """Both sides of a preference pair; the prompt ids are the same in both."""

    chosen: TokenExample
    rejected: TokenExample

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class LMBatch:
    """Rows padded on the right."""

    token_ids_BT: Tensor
    attention_mask_BT: Tensor
    """True on real tokens; never derived from the padding id, which may equal the end token."""
    loss_mask_BT: Tensor
    """True on answer tokens, the end token included. It marks the token to be predicted: the loss
    at position t uses the logits of position t - 1."""

    def to(self, device: torch.device | str) -> "LMBatch":
        return LMBatch(
            self.token_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.loss_mask_BT.to(device),
        )


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """P pairs as 2P rows, chosen rows first, so that one forward pass serves both sides."""

    token_ids_BT: Tensor
    attention_mask_BT: Tensor
    """As in `LMBatch`."""
    loss_mask_BT: Tensor
    """As in `LMBatch`."""

    @property
    def num_pairs(self) -> int:
        return self.token_ids_BT.shape[0] // 2

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        return PreferenceBatch(
            self.token_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.loss_mask_BT.to(device),
        )


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase,
    pair: PreferencePair,
    *,
    max_length: int,
    end_ids: frozenset[int] | None = None,
) -> PairExample:
    """Render one pair and cut it to `max_length`; see `LengthLimits` and `render_completion`."""
    answers = (pair.chosen, pair.rejected)
    chosen, rejected = _render(
        tokenizer, pair.prompt, answers, max_length=max_length, end_ids=end_ids
    )
    return PairExample(chosen, rejected)


def tokenize_demonstration(
    tokenizer: PreTrainedTokenizerBase,
    demonstration: Demonstration,
    *,
    max_length: int,
    end_ids: frozenset[int] | None = None,
) -> TokenExample:
    """Render one demonstration and cut it to `max_length`; see `LengthLimits`."""
    answers = (demonstration.completion,)
    [example] = _render(
        tokenizer, demonstration.prompt, answers, max_length=max_length, end_ids=end_ids
    )
    return example


def collate(examples: Sequence[Any], pad_id: int) -> Any:
    """Pad examples of one kind on the right to the longest."""
    if isinstance(examples[0], PairExample):
        return collate_pairs(examples, pad_id)
    return collate_demonstrations(examples, pad_id)


def collate_demonstrations(examples: Sequence[TokenExample], pad_id: int) -> LMBatch:
    """Pad examples on the right to the longest."""
    return LMBatch(*_pad(examples, pad_id))


def collate_pairs(examples: Sequence[PairExample], pad_id: int) -> PreferenceBatch:
    """Stack the chosen rows above the rejected rows and pad on the right to the longest."""
    chosen = [example.chosen for example in examples]
    rejected = [example.rejected for example in examples]
    return PreferenceBatch(*_pad([*chosen, *rejected], pad_id))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptText,
    answers: Sequence[str],
    *,
    max_length: int,
    end_ids: frozenset[int] | None,
) -> list[TokenExample]:
    try:
        prompt_ids = render_prompt(tokenizer, prompt)
        answer_ids = [
            render_completion(tokenizer, prompt, answer, end_ids=end_ids) for answer in answers
        ]
    except PromptError as error:
        raise DataError(f"an example cannot be tokenised: {error}") from error
    return _fit(prompt_ids, answer_ids, max_length)


def _fit(
    prompt_ids: list[int], answers: Sequence[list[int]], max_length: int
) -> list[TokenExample]:
    least = min(len(prompt_ids), max(1, max_length // 4))
    room = max_length - max(len(answer) for answer in answers)
    num_prompt = min(len(prompt_ids), max(least, room))
    num_answer = max_length - num_prompt
    kept = prompt_ids[len(prompt_ids) - num_prompt :]
    return [
        TokenExample(
            token_ids=kept + answer[:num_answer],
            num_prompt_tokens=num_prompt,
            num_cut_prompt_tokens=len(prompt_ids) - num_prompt,
            num_cut_answer_tokens=max(0, len(answer) - num_answer),
        )
        for answer in answers
    ]


def _pad(examples: Sequence[TokenExample], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    assert examples, "a batch has at least one example"
    longest = max(len(example) for example in examples)
    token_ids_BT = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    starts_B = torch.tensor([example.num_prompt_tokens for example in examples])
    lengths_B = torch.tensor([len(example) for example in examples])
    for row, example in enumerate(examples):
        token_ids_BT[row, : len(example)] = torch.tensor(example.token_ids)
    positions_T = torch.arange(longest)
    attention_mask_BT = positions_T < lengths_B[:, None]
    loss_mask_BT = attention_mask_BT & (positions_T >= starts_B[:, None])
    return token_ids_BT, attention_mask_BT, loss_mask_BT
