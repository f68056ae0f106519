"""Corrections, scored answers and prompts as examples: what is read, what is learned, what is left.

What a corrector reads in training must be what a serving Aligner asks it.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch

from pilotfish import world
from pilotfish.chat import Message, render_prompt
from pilotfish.context import Prompt
from pilotfish.correction import TEMPLATES, CorrectionTemplate, question_of
from pilotfish.data.collate import (
    CorrectionExample,
    LengthLimits,
    LMBatch,
    PromptExample,
    collate_corrections,
    collate_scored,
    identity,
    tokenize_correction,
    tokenize_scored,
)
from pilotfish.data.formats import Columns, to_correction
from pilotfish.data.records import Correction, ScoredAnswer
from pilotfish.data.tokenized import Rendering, tokenize_all
from pilotfish.errors import DataError
from pilotfish.guides.aligner import AlignerGuide
from pilotfish.guides.base import Writing, Written
from tests.chat_tokenizers import hh_tokenizer, word_tokenizer

TURNS: tuple[Message, ...] = (
    {"role": "system", "content": "You are a careful cook."},
    {"role": "user", "content": "How do I boil an egg?"},
    {"role": "assistant", "content": "In water."},
    {"role": "user", "content": "How long?"},
)
EGG = Correction(TURNS, "An hour.", "Seven minutes.")
WORDS = CorrectionTemplate("how {question} do {answer} make")


class Asked:
    """A corrector's model that only notes what it is asked."""

    max_length = 10_000

    def __init__(self) -> None:
        self.texts: list[str] = []

    def num_tokens(self, text: str) -> int:
        return len(text)

    def write(self, writings: Sequence[Writing]) -> list[Written]:
        self.texts += [writing.text for writing in writings]
        return [Written("") for _ in writings]

    def stream(self, writing: Writing) -> Iterator[str]:
        yield from ()


def tokens_of(batch: LMBatch) -> list[list[int]]:
    rows = zip(batch.token_ids_BT, batch.loss_mask_BT, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("prompt", [TURNS, TURNS[1:2], "How long?"], ids=["turns", "turn", "text"])
def test_a_corrector_is_trained_on_what_an_aligner_asks(
    template: CorrectionTemplate, prompt: str | tuple[Message, ...]
) -> None:
    tokenizer, served = hh_tokenizer(), Asked()
    asked = Prompt([], text=prompt) if isinstance(prompt, str) else Prompt([], messages=prompt)
    AlignerGuide(served, template).revise_all([asked], ["An hour."])
    row = Correction(prompt, "An hour.", "Seven minutes.")
    example = tokenize_correction(tokenizer, row, template=template, max_length=1000).corrected
    read = example.token_ids[: example.num_prompt_tokens]
    assert read == render_prompt(tokenizer, served.texts[0])
    assert tokenizer.decode(example.token_ids[example.num_prompt_tokens :]) == "Seven minutes.<eos>"


def test_the_mask_marks_the_correction_even_where_it_would_merge_with_the_template() -> None:
    tokenizer = hh_tokenizer()
    template = CorrectionTemplate("{question} {answer} wa")
    row = Correction("How?", "Raw.", "ter, long.")
    example = tokenize_correction(tokenizer, row, template=template, max_length=100)
    text = template.render("How?", "Raw.")
    # Together they are other tokens, so a boundary counted there would be off.
    assert tokenizer.encode(text + "ter, long.") != tokenizer.encode(text) + tokenizer.encode(
        "ter, long."
    )
    batch = collate_corrections([example], pad_id=1)
    assert tokens_of(batch) == [[*tokenizer.encode("ter, long."), tokenizer.eos_token_id]]
    assert batch.token_ids_BT[0].tolist() == tokenizer.encode(text) + tokens_of(batch)[0]


def test_the_warm_up_row_is_the_same_text_with_the_answer_once_more_as_its_target() -> None:
    tokenizer = hh_tokenizer()
    example = tokenize_correction(tokenizer, EGG, template=TEMPLATES["paper"], max_length=1000)
    warm = identity(example)
    assert identity(warm) == warm
    batch = collate_corrections([example, warm], pad_id=0)
    written = [tokenizer.decode(ids) for ids in tokens_of(batch)]
    assert written == ["Seven minutes.<eos>", "An hour.<eos>"]
    num_read = example.corrected.num_prompt_tokens
    assert torch.equal(batch.token_ids_BT[0, :num_read], batch.token_ids_BT[1, :num_read])


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_rows_of_which_anything_would_be_cut_are_dropped_and_counted(too_long: str) -> None:
    short = Correction("soup ?", "boil it", "boil it .")  # reads 7 tokens, writes 4
    rows = [
        short,
        Correction("soup ?", "boil it", "boil it " * 5),  # the correction would lose its end
        Correction("soup ?", "boil it " * 3, "boil it ."),  # the warm-up copy would
        Correction("soup " * 8, "boil it", "boil it ."),  # the template would lose its beginning
    ]
    limits = LengthLimits.model_validate({"max_length": 16, "too_long": too_long})
    examples, report = tokenize_all(rows, Rendering(word_tokenizer(), limits, WORDS))
    assert [len(example) for example in examples] == [11]
    assert (report.num_records, report.num_dropped, report.num_cut_answers) == (4, 3, 0)
    assert report.mean_answer_tokens == {"correction": 4.0, "original": 3.0}


def test_a_conversation_without_a_question_is_refused() -> None:
    rows = [Correction((TURNS[0],), "yes", "no")]
    with pytest.raises(DataError, match=r"record 0: .*no user message"):
        tokenize_all(rows, Rendering(hh_tokenizer(), LengthLimits(), TEMPLATES["paper"]))


def test_kitchen_corrections_have_a_word_for_everything() -> None:
    tokenizer = world.build_tokenizer()
    template = CorrectionTemplate("<user> {question} <bot> {answer} <fix>")
    rows = [to_correction(row, Columns()) for row in world.corrections(200, 1)]
    examples, report = tokenize_all(
        rows, Rendering(tokenizer, LengthLimits(max_length=256), template)
    )
    assert report.num_dropped == 0
    for row, example in zip(rows, examples, strict=True):
        assert isinstance(example, CorrectionExample)
        assert tokenizer.unk_token_id not in example.corrected.token_ids
        text = template.render(question_of(row.prompt), row.answer)
        assert tokenizer.decode(example.corrected.token_ids) == f"{text} {row.correction} <eos>"


def test_scored_answers_keep_their_rewards_beside_their_rows() -> None:
    tokenizer = word_tokenizer()
    rows = [ScoredAnswer("how do i", "make soup", 0.5), ScoredAnswer("how", "good luck .", -2.0)]
    batch = collate_scored([tokenize_scored(tokenizer, row, max_length=32) for row in rows], 0)
    assert batch.rewards_B is not None
    assert batch.rewards_B.tolist() == [0.5, -2.0]
    assert tokens_of(batch) == [[*tokenizer.encode(r.completion), 2] for r in rows]
    moved = batch.to("cpu").rewards_B
    assert moved is not None
    assert torch.equal(moved, batch.rewards_B)


def test_prompts_are_rendered_as_served_and_dropped_where_they_are_too_long() -> None:
    tokenizer = hh_tokenizer()
    limits = LengthLimits(max_length=40)
    examples, report = tokenize_all([TURNS[1:2], "egg? " * 40], Rendering(tokenizer, limits))
    assert examples == [PromptExample(TURNS[1:2], render_prompt(tokenizer, TURNS[1:2]))]
    assert (report.num_dropped, report.max_tokens) == (1, len(examples[0]))
    assert report.metrics()["data/mean_prompt_tokens"] == len(examples[0])
