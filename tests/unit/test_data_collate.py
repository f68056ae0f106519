"""Records to examples to batches: exact masks, honest cuts, and an account of both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.chat import Message, render_completion, render_prompt
from pilotfish.data.collate import (
    LengthLimits,
    PairExample,
    TokenExample,
    collate_demonstrations,
    collate_pairs,
    tokenize_demonstration,
    tokenize_pair,
)
from pilotfish.data.loading import load_pairs
from pilotfish.data.records import Demonstration, PreferencePair
from pilotfish.data.tokenized import Rendering, tokenize_all
from pilotfish.errors import DataError
from tests.chat_tokenizers import hh_tokenizer, word_tokenizer
from tests.real_data import hh_source

ASK: tuple[Message, ...] = ({"role": "user", "content": "How do I boil an egg?"},)


def raw_pair(num_prompt: int, num_chosen: int, num_rejected: int) -> PreferencePair:
    """A pair of words, one token each; answers get an end token on top."""
    prompt = " ".join(("how", "do", "i", "make", "soup")[i % 5] for i in range(num_prompt))
    answers = (" ".join([word] * n) for word, n in (("good", num_chosen), ("luck", num_rejected)))
    return PreferencePair(prompt, *answers)


def test_an_example_is_the_prompt_as_served_and_the_completion() -> None:
    tokenizer = hh_tokenizer()
    pair = PreferencePair(ASK, "Seven minutes.", "I will not say.")
    example = tokenize_pair(tokenizer, pair, max_length=200)
    prompt = render_prompt(tokenizer, ASK)
    for side, answer in ((example.chosen, pair.chosen), (example.rejected, pair.rejected)):
        assert side.token_ids == prompt + render_completion(tokenizer, ASK, answer)
        assert side.num_prompt_tokens == len(prompt)
        assert (side.num_cut_prompt_tokens, side.num_cut_answer_tokens) == (0, 0)


def test_the_loss_mask_marks_the_answer_and_its_end_token_alone() -> None:
    tokenizer = hh_tokenizer()
    demonstrations = [Demonstration(ASK, "Seven minutes."), Demonstration("How", " do I peel it?")]
    examples = [tokenize_demonstration(tokenizer, d, max_length=200) for d in demonstrations]
    # The end token doubles as padding: masks must not confuse the two.
    batch = collate_demonstrations(examples, pad_id=1)
    marked = [
        tokenizer.decode(ids[mask])
        for ids, mask in zip(batch.token_ids_BT, batch.loss_mask_BT, strict=True)
    ]
    assert marked == [" Seven minutes.<eos>", " do I peel it?<eos>"]
    assert batch.attention_mask_BT.sum(1).tolist() == [len(example) for example in examples]


def test_pairs_are_stacked_chosen_first_and_padded_on_the_right() -> None:
    examples = [
        PairExample(TokenExample([5, 6, 7], 1), TokenExample([5, 8], 1)),
        PairExample(TokenExample([9, 3], 1), TokenExample([9, 4, 4, 2], 1)),
    ]
    batch = collate_pairs(examples, pad_id=0)
    assert batch.num_pairs == 2
    assert batch.token_ids_BT.tolist() == [[5, 6, 7, 0], [9, 3, 0, 0], [5, 8, 0, 0], [9, 4, 4, 2]]
    mask = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    assert batch.loss_mask_BT.int().tolist() == mask
    assert batch.loss_mask_BT.dtype == batch.attention_mask_BT.dtype == torch.bool
    moved = batch.to("cpu")
    assert torch.equal(moved.token_ids_BT, batch.token_ids_BT)


@pytest.mark.parametrize(
    ("lengths", "kept", "cut"),
    [
        # prompt, chosen, rejected words; kept prompt, chosen, rejected ids; cut ids likewise
        pytest.param((4, 5, 9), (4, 6, 10), (0, 0, 0), id="fits"),
        pytest.param((14, 5, 9), (6, 6, 10), (8, 0, 0), id="prompt-makes-room-on-both-sides"),
        pytest.param((14, 5, 30), (4, 6, 12), (10, 0, 19), id="long-answer-leaves-a-quarter"),
        pytest.param((2, 5, 30), (2, 6, 14), (0, 0, 17), id="short-prompt-stays-whole"),
    ],
)
def test_a_prompt_is_cut_from_the_left_before_an_answer_loses_its_tail(
    lengths: tuple[int, int, int], kept: tuple[int, int, int], cut: tuple[int, int, int]
) -> None:
    tokenizer = word_tokenizer()
    pair = raw_pair(*lengths)
    example = tokenize_pair(tokenizer, pair, max_length=16)
    sides = (example.chosen, example.rejected)
    assert {side.num_prompt_tokens for side in sides} == {kept[0]}
    assert tuple(side.num_answer_tokens for side in sides) == kept[1:]
    assert {side.num_cut_prompt_tokens for side in sides} == {cut[0]}
    assert tuple(side.num_cut_answer_tokens for side in sides) == cut[1:]
    whole = tokenizer.encode(str(pair.prompt))
    assert example.chosen.token_ids[: kept[0]] == whole[len(whole) - kept[0] :]
    assert (example.rejected.token_ids[-1] == tokenizer.eos_token_id) == (cut[2] == 0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(min_value=8, max_value=80),
)
def test_cutting_never_exceeds_the_limit_and_accounts_for_every_token(
    num_prompt: int, num_chosen: int, num_rejected: int, max_length: int
) -> None:
    pair = raw_pair(num_prompt, num_chosen, num_rejected)
    example = tokenize_pair(word_tokenizer(), pair, max_length=max_length)
    assert len(example) <= max_length
    for side, words in ((example.chosen, num_chosen), (example.rejected, num_rejected)):
        assert side.num_prompt_tokens + side.num_cut_prompt_tokens == num_prompt
        assert side.num_answer_tokens + side.num_cut_answer_tokens == words + 1
        assert side.num_prompt_tokens >= 1
        assert side.num_answer_tokens >= 1


def test_the_report_counts_what_was_cut() -> None:
    pairs = [raw_pair(4, 5, 9), raw_pair(14, 5, 9), raw_pair(14, 5, 30)]
    examples, report = tokenize_all(pairs, Rendering(word_tokenizer(), LengthLimits(max_length=16)))
    assert len(examples) == 3
    assert (report.num_records, report.num_dropped) == (3, 0)
    assert (report.num_cut_prompts, report.num_cut_answers) == (2, 1)
    assert report.max_tokens == 16
    assert report.mean_answer_tokens == {"chosen": 6.0, "rejected": (10 + 10 + 12) / 3}
    assert report.mean_tokens == pytest.approx((10 + 14 + 12 + 16 + 10 + 16) / 6)
    assert report.metrics()["data/cut_prompts"] == 2
    assert "2 prompts cut, 1 answers cut, 0 dropped" in str(report)


def test_too_long_records_are_dropped_and_counted_on_request() -> None:
    limits = LengthLimits(max_length=16, too_long="drop")
    demonstrations = [Demonstration("how do", "good luck"), Demonstration("how do", "good " * 20)]
    examples, report = tokenize_all(demonstrations, Rendering(word_tokenizer(), limits))
    assert [len(example) for example in examples] == [5]
    assert (report.num_dropped, report.num_cut_answers) == (1, 0)


def test_a_pair_whose_cut_answers_became_equal_is_dropped_and_counted() -> None:
    pairs = [PreferencePair("how", "good " * 20 + "luck", "good " * 20 + "soup"), raw_pair(1, 2, 3)]
    examples, report = tokenize_all(pairs, Rendering(word_tokenizer(), LengthLimits(max_length=8)))
    assert len(examples) == 1
    assert report.num_dropped == 1


def test_a_record_that_cannot_be_tokenised_is_named() -> None:
    pairs = [PreferencePair("how", "good", "luck"), PreferencePair("how", "good <eos>", "luck")]
    with pytest.raises(DataError, match=r"record 1: .*contains the end token '<eos>'"):
        tokenize_all(pairs, Rendering(word_tokenizer(), LengthLimits()))


def test_a_data_set_of_which_nothing_is_left_is_refused() -> None:
    limits = LengthLimits(max_length=8, too_long="drop")
    with pytest.raises(DataError, match=r"none of 1 records is left.*max_length"):
        tokenize_all([raw_pair(9, 9, 9)], Rendering(word_tokenizer(), limits))


def test_hh_rlhf_examples_decode_to_the_served_dialogue_and_the_answer() -> None:
    tokenizer = hh_tokenizer()
    speaker = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    pairs = load_pairs(hh_source(bad_rows="skip", limit=100)).records
    examples, report = tokenize_all(pairs, Rendering(tokenizer, LengthLimits(max_length=4096)))
    assert (report.num_cut_prompts, report.num_cut_answers, report.num_dropped) == (0, 0, 0)
    for pair, example in zip(pairs, examples, strict=True):
        assert isinstance(example, PairExample)
        ids, boundary = example.chosen.token_ids, example.chosen.num_prompt_tokens
        turns = [turn for turn in pair.prompt if not isinstance(turn, str)]
        fed = "".join(
            speaker[turn["role"]] + turn["content"] + "<eos>" * (turn["role"] == "assistant")
            for turn in turns
        )
        assert tokenizer.decode(ids[:boundary]) == fed + "\n\nAssistant:"
        assert tokenizer.decode(ids[boundary:]) == f" {pair.chosen}<eos>"
