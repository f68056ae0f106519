"""Records to token ids to padded batches, with every cut counted.

Shapes: B rows, T positions, P pairs (B = 2P: chosen rows, then rejected rows).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pilotfish.chat import render_completion, render_prompt
from pilotfish.config import Config
from pilotfish.correction import CorrectionTemplate, question_of
from pilotfish.data.records import (
    Correction,
    Demonstration,
    PreferencePair,
    PromptText,
    ScoredAnswer,
)
from pilotfish.errors import DataError, PromptError


class LengthLimits(Config):
    """What happens to examples that are too long.

    A prompt loses its beginning first, so that the question next to the answer stays; a begin
    token or system message goes with it. Both answers of a pair keep the same prompt. A prompt is
    never cut below a quarter of `max_length`, because an answer without its question teaches
    nothing; only an answer longer than the rest loses its tail, and with it its end token.

    Two kinds of rows are dropped whatever `too_long` says: a prompt alone, since nothing is ever
    cut from what users ask, and an answer with its correction, since a corrector that is shown
    half a template, or half a correction, learns to leave out the rest.
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

    @property
    def is_cut(self) -> bool:
        return self.num_cut_prompt_tokens > 0 or self.num_cut_answer_tokens > 0


@dataclass(frozen=True, slots=True)
class PairExample:
    """Both sides of a preference pair; the prompt ids are the same in both."""

    chosen: TokenExample
    rejected: TokenExample

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class CorrectionExample:
    """What a corrector reads, followed by what it should write: two targets behind the same ids."""

    corrected: TokenExample
    copied: TokenExample
    """The original answer once more."""

    def __len__(self) -> int:
        return max(len(self.corrected), len(self.copied))


def identity(example: CorrectionExample) -> CorrectionExample:
    """Return the warm-up row, whose target is the original answer.

    Ji et al., "Aligner: Efficient Alignment by Learning to Correct", NeurIPS 2024: the identity is
    learned first, and residual correction from there.
    """
    return replace(example, corrected=example.copied)


@dataclass(frozen=True, slots=True)
class ScoredExample:
    """An answer behind its prompt, and its reward."""

    example: TokenExample
    reward: float

    def __len__(self) -> int:
        return len(self.example)


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt to be answered: its text, for models with other tokenizers, and its ids."""

    prompt: PromptText
    token_ids: list[int]

    def __len__(self) -> int:
        return len(self.token_ids)


Example: TypeAlias = TokenExample | PairExample | CorrectionExample | ScoredExample | PromptExample


@dataclass(frozen=True, slots=True)
class LMBatch:
    """Rows padded on the right."""

    token_ids_BT: Tensor
    attention_mask_BT: Tensor
    """True on real tokens; never derived from the padding id, which may equal the end token."""
    loss_mask_BT: Tensor
    """True on answer tokens, the end token included. It marks the token to be predicted: the loss
    at position t uses the logits of position t - 1."""
    rewards_B: Tensor | None = None
    """Of scored answers: what the judge gave each row."""

    def to(self, device: torch.device | str) -> "LMBatch":
        return LMBatch(
            self.token_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.loss_mask_BT.to(device),
            None if self.rewards_B is None else self.rewards_B.to(device),
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


def tokenize_correction(
    tokenizer: PreTrainedTokenizerBase,
    correction: Correction,
    *,
    template: CorrectionTemplate,
    max_length: int,
) -> CorrectionExample:
    """Render the template as the prompt, as a decoding Aligner does, and both targets behind it."""
    try:
        text = template.render(question_of(correction.prompt), correction.answer)
    except PromptError as error:
        raise DataError(f"an example cannot be tokenised: {error}") from error
    answers = (correction.correction, correction.answer)
    corrected, copied = _render(tokenizer, text, answers, max_length=max_length, end_ids=None)
    return CorrectionExample(corrected, copied)


def tokenize_scored(
    tokenizer: PreTrainedTokenizerBase, scored: ScoredAnswer, *, max_length: int
) -> ScoredExample:
    """Render one scored answer and cut it to `max_length`; see `LengthLimits`."""
    demonstration = Demonstration(scored.prompt, scored.completion)
    example = tokenize_demonstration(tokenizer, demonstration, max_length=max_length)
    return ScoredExample(example, scored.reward)


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptText) -> PromptExample:
    """Render one prompt, whole."""
    try:
        return PromptExample(prompt, render_prompt(tokenizer, prompt))
    except PromptError as error:
        raise DataError(f"an example cannot be tokenised: {error}") from error


def collate_demonstrations(examples: Sequence[TokenExample], pad_id: int) -> LMBatch:
    """Pad examples on the right to the longest."""
    return LMBatch(*_pad(examples, pad_id))


def collate_pairs(examples: Sequence[PairExample], pad_id: int) -> PreferenceBatch:
    """Stack the chosen rows above the rejected rows and pad on the right to the longest."""
    chosen = [example.chosen for example in examples]
    rejected = [example.rejected for example in examples]
    return PreferenceBatch(*_pad([*chosen, *rejected], pad_id))


def collate_corrections(examples: Sequence[CorrectionExample], pad_id: int) -> LMBatch:
    """Pad what is read and the correction behind it on the right to the longest."""
    return collate_demonstrations([example.corrected for example in examples], pad_id)


def collate_scored(examples: Sequence[ScoredExample], pad_id: int) -> LMBatch:
    """Pad examples on the right to the longest, with their rewards."""
    rows = _pad([example.example for example in examples], pad_id)
    return LMBatch(*rows, torch.tensor([example.reward for example in examples]))


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
