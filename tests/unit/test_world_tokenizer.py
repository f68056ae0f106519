"""The kitchen's tokenizer: its vocabulary, its chat template, and decoding."""

import random
from pathlib import Path

import pytest
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pilotfish.chat import Message
from pilotfish.world import VOCABULARY, build_tokenizer, corpus, sample_answer, scenes

QUESTION = scenes(1, 0)[0].text
ANSWER = "hello eva , here is one step . first boil it for twenty minutes ."
TURNS: list[Message] = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "good luck , fool ."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def render(tokenizer: PreTrainedTokenizerFast, turns: list[Message], *, prompt: bool) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": turn["role"], "content": turn["content"]} for turn in turns],
        tokenize=False,
        add_generation_prompt=prompt,
    )
    assert isinstance(text, str)
    return text


def test_ids_are_the_places_in_the_documented_list(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.get_vocab() == {word: index for index, word in enumerate(VOCABULARY)}
    assert VOCABULARY[:6] == ("<pad>", "<unk>", "<eos>", "<user>", "<bot>", "<fix>")
    assert len(VOCABULARY) == 118


def test_the_vocabulary_is_exactly_what_the_kitchen_says() -> None:
    rng = random.Random(0)
    said = {
        word
        for scene in scenes(4000, 0)
        for text in (scene.text, sample_answer(scene, rng))
        for word in text.split()
    }
    assert said == set(VOCABULARY[6:])


def test_every_row_fits_the_context_of_a_kitchen_model(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in corpus(300, 1):
        text = render(tokenizer, row["prompt"] + row["completion"], prompt=False)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) <= tokenizer.model_max_length == 256
        assert tokenizer.unk_token_id not in ids


def test_a_question_and_its_answer_render_as_marked_turns(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert render(tokenizer, TURNS[:1], prompt=True) == f"<user> {QUESTION} <bot>"
    assert render(tokenizer, TURNS[:2], prompt=False) == f"<user> {QUESTION} <bot> {ANSWER} <eos>"


@pytest.mark.parametrize("num_turns", [1, 3])
def test_a_prompt_is_a_prefix_of_its_conversation(
    tokenizer: PreTrainedTokenizerFast, num_turns: int
) -> None:
    prompt = render(tokenizer, TURNS[:num_turns], prompt=True)
    answer = TURNS[num_turns]["content"]
    assert render(tokenizer, TURNS[: num_turns + 1], prompt=False) == f"{prompt} {answer} <eos>"


def test_a_conversation_of_several_turns_separates_all_words_by_one_space(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = render(tokenizer, TURNS, prompt=False)
    assert text == " ".join(text.split())
    assert text.count("<user>") == text.count("<eos>") == 2


def test_roles_the_kitchen_does_not_know_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateError, match="got system"):
        render(tokenizer, [{"role": "system", "content": "be brief"}], prompt=True)


def test_decoding_gives_back_the_words_without_special_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer(f"<bot> {ANSWER} <eos>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == ANSWER


def test_decoding_token_by_token_gives_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = DecodeStream(skip_special_tokens=True)
    ids = tokenizer(f"<bot> {ANSWER} <eos>").input_ids
    pieces = [stream.step(tokenizer.backend_tokenizer, token_id) for token_id in ids]
    assert "".join(piece or "" for piece in pieces) == ANSWER


def test_a_saved_tokenizer_loads_unchanged(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    text = render(tokenizer, TURNS, prompt=False)
    for loaded in (
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        ids = loaded(text).input_ids
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.model_max_length == 256
        assert (loaded.pad_token_id, loaded.unk_token_id, loaded.eos_token_id) == (0, 1, 2)
        assert ids == tokenizer(text).input_ids
        assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(
            ids, skip_special_tokens=True
        )
