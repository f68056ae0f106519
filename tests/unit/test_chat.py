"""Prompts and completions: what is trained on is what is served."""

from collections.abc import Callable
from copy import deepcopy

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from pilotfish.chat import Message, render_completion, render_prompt, stop_ids
from pilotfish.errors import PromptError
from tests.chat_tokenizers import chatml_tokenizer, hh_tokenizer, word_tokenizer


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# Tokenizer, answer, what serving feeds and what the model should write, both as text by hand.
CASES = [
    pytest.param(
        word_tokenizer,
        "boil it .",
        "<user> how do i make soup ? <bot>",
        " boil it . <eos>",
        id="words",
    ),
    pytest.param(
        hh_tokenizer,
        "Boil it.",
        "\n\nHuman: how do i make soup ?\n\nAssistant:",
        " Boil it.<eos>",
        id="hh",
    ),
    pytest.param(
        chatml_tokenizer,
        "Boil it.",
        "<|im_start|>user\nhow do i make soup ?<|im_end|>\n<|im_start|>assistant\n",
        "Boil it.<|im_end|>",
        id="chatml",
    ),
]
TOKENIZERS = [
    pytest.param(build, id=build.__name__)
    for build in (word_tokenizer, hh_tokenizer, chatml_tokenizer)
]
Build = Callable[[], PreTrainedTokenizerFast]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = deepcopy(hh_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("build", "answer", "fed", "written"), CASES)
def test_training_sees_what_serving_feeds_and_what_it_should_emit(
    build: Build, answer: str, fed: str, written: str
) -> None:
    tokenizer = build()
    prompt = [user("how do i make soup ?")]
    assert render_prompt(tokenizer, prompt) == tokenizer.encode(fed, add_special_tokens=False)
    completion = render_completion(tokenizer, prompt, answer)
    assert completion == tokenizer.encode(written, add_special_tokens=False)


@pytest.mark.parametrize(("build", "answer", "fed", "written"), CASES)
def test_a_completion_ends_at_its_first_and_only_end_token(
    build: Build, answer: str, fed: str, written: str
) -> None:
    tokenizer = build()
    completion = render_completion(tokenizer, [user("how do i make soup ?")], answer)
    ends = [position for position, i in enumerate(completion) if i in stop_ids(tokenizer)]
    assert ends == [len(completion) - 1]


@pytest.mark.parametrize("build", TOKENIZERS)
def test_a_served_completion_decodes_to_the_answer(build: Build) -> None:
    tokenizer = build()
    completion = render_completion(tokenizer, [user("how do i make soup ?")], "boil it .")
    decoded = tokenizer.decode(completion, skip_special_tokens=True)
    assert isinstance(decoded, str)
    assert decoded.strip() == "boil it ."


@pytest.mark.parametrize("build", TOKENIZERS)
def test_the_next_turn_begins_with_what_was_read_and_written(build: Build) -> None:
    tokenizer = build()
    first = [user("how do i make soup ?")]
    so_far = render_prompt(tokenizer, first) + render_completion(tokenizer, first, "boil it .")
    later = render_prompt(tokenizer, [*first, assistant("boil it ."), user("good ?")])
    assert later[: len(so_far)] == so_far


def test_a_string_is_raw_text_with_what_the_tokenizer_adds_to_any_text() -> None:
    tokenizer = deepcopy(hh_tokenizer())
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    bare = tokenizer.encode("How do I", add_special_tokens=False)
    assert render_prompt(tokenizer, "How do I") == [0, *bare]
    templated = render_prompt(tokenizer, [user("How do I")])
    assert templated[0] != 0


def test_the_answer_to_raw_text_is_its_tokens_and_the_end_token() -> None:
    tokenizer = hh_tokenizer()
    completion = render_completion(tokenizer, "How do I", " boil it")
    assert completion == [*tokenizer.encode(" boil it", add_special_tokens=False), 1]


def test_an_end_token_is_added_when_the_template_writes_none() -> None:
    tokenizer = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    completion = render_completion(tokenizer, [user("hi")], "Boil it.")
    written = tokenizer.encode("assistant: Boil it.\n", add_special_tokens=False)
    assert completion == [*written, tokenizer.eos_token_id]


def test_a_completion_ends_at_the_end_ids_of_the_model_when_given() -> None:
    tokenizer = deepcopy(chatml_tokenizer())
    [im_end] = stop_ids(tokenizer)
    tokenizer.eos_token = "<eos>"
    ends = stop_ids(tokenizer, GenerationConfig(eos_token_id=im_end))
    completion = render_completion(tokenizer, [user("hi")], "Boil it.", end_ids=ends)
    assert ends == {im_end, 1}
    assert completion[-1] == im_end


def test_stop_ids_join_the_tokenizer_and_the_generation_config() -> None:
    tokenizer = word_tokenizer()
    assert stop_ids(tokenizer) == {2}
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[4, 2])) == {2, 4}
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=4)) == {2, 4}
    assert stop_ids(tokenizer, GenerationConfig()) == {2}


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("", "empty string"),
        ([], "empty list"),
        (42, "is a int, wanted a string or a list of messages"),
        (["hi"], "message 0 is a str"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ([{"role": "human", "content": "hi"}], "message 0 has role 'human'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of type list"),
        ([user("hi"), assistant("hello")], "last message is from the assistant"),
    ],
)
def test_a_malformed_prompt_is_refused_with_the_reason(prompt: object, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        render_prompt(hh_tokenizer(), prompt)  # pyright: ignore[reportArgumentType] - the point


def test_messages_without_a_chat_template_are_refused_with_what_to_do() -> None:
    with pytest.raises(PromptError, match=r"no chat template.*Pass the prompt as text"):
        render_prompt(with_template(None), [user("hi")])


def test_what_a_template_refuses_is_a_prompt_error_with_its_reason() -> None:
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="roles must alternate"):
        render_prompt(tokenizer, [user("hi")])


def test_a_template_whose_answer_does_not_continue_its_prompt_is_refused() -> None:
    tokenizer = with_template(
        "{% for m in messages %}{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}<think></think>{% endif %}"
    )
    with pytest.raises(PromptError, match="does not begin with its own prompt"):
        render_completion(tokenizer, [user("hi")], "Boil it.")


def test_a_template_that_changes_the_answer_is_refused() -> None:
    tokenizer = with_template("{% for m in messages %}{{ m.content | upper }}|{% endfor %}")
    with pytest.raises(PromptError, match="changes the answer"):
        render_completion(tokenizer, [user("HI")], "Boil it.")


@pytest.mark.parametrize("prompt", ["hi", [user("hi")]])
def test_an_answer_with_the_end_token_as_text_is_refused(prompt: str | list[Message]) -> None:
    with pytest.raises(PromptError, match="contains the end token '<eos>'"):
        render_completion(hh_tokenizer(), prompt, "Boil it.<eos> And eat it.")


def test_a_tokenizer_without_an_end_token_cannot_render_answers() -> None:
    tokenizer = deepcopy(hh_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match="no end token"):
        render_completion(tokenizer, "hi", "Boil it.")
