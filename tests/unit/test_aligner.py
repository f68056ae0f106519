"""Aligner: what it reads, what it refuses, and that a copy comes back byte by byte."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from pilotfish import Pilot, SamplingParams
from pilotfish.chat import Message
from pilotfish.context import Prompt
from pilotfish.correction import TEMPLATES, CorrectionTemplate, question_of
from pilotfish.decode.detokenize import TextStream
from pilotfish.decode.writer import Writer
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides.aligner import AlignerGuide
from pilotfish.guides.base import Guide, Writing, Written
from pilotfish.guides.card import read_card
from pilotfish.guides.host import GuideHost
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen
from tests.chat_tokenizers import hh_tokenizer, word_tokenizer
from tests.fakes import plain_logprobs, tiny_llama
from tests.folders import byte_tokenizer, save_aligner, save_base

QUESTION: list[Message] = [{"role": "user", "content": "how do i make soup ?"}]
PROMPT = Prompt([1, 2], tuple(QUESTION))
PAPER = TEMPLATES["paper"]


class Editor:
    """Stands in for an Aligner's LM that has learned to copy, or to edit in some other way.

    It knows nothing but the tokens of what it reads, and writes tokens.
    """

    def __init__(
        self,
        edit: Callable[[str], str] = str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 40_000,
    ) -> None:
        self.max_length = max_length
        self.asked: list[Writing] = []
        self._tokenizer = tokenizer or byte_tokenizer()
        self._edit = edit
        before, self._behind = PAPER.text.split("{answer}")
        self._before = before.rsplit("{question}", 1)[1]

    def num_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def write(self, writings: Sequence[Writing]) -> list[Written]:
        return [Written("".join(self.stream(writing))) for writing in writings]

    def stream(self, writing: Writing) -> Iterator[str]:
        self.asked.append(writing)
        read = self._tokenizer.decode(self._tokenizer.encode(writing.text))
        assert isinstance(read, str)
        draft = read.split(self._before, 1)[1].removesuffix(self._behind)
        stream = TextStream(self._tokenizer)
        for token_id in self._tokenizer.encode(self._edit(draft), add_special_tokens=False):
            yield stream.push(token_id)
        yield stream.flush()


AWKWARD = [
    "",
    " ",
    "plain words",
    "  leading, trailing and\n\n\tother space \n",
    "Naïve café 🍲👩‍🍳 — ½ λ ≠ 水\u200b\u00a0!",
    "{question} {answer} {} %s | Answer: ASSISTANT:",
    "10k: " + "no comma, then a wörd. " * 450,
]


@pytest.mark.parametrize("draft", AWKWARD, ids=range(len(AWKWARD)))
def test_an_aligner_that_copies_gives_back_every_byte(draft: str) -> None:
    aligner = AlignerGuide(Editor())
    assert "".join(aligner.revise(PROMPT, draft)) == draft
    assert aligner.revise_all([PROMPT] * 2, [draft, "x"]) == [Written(draft), Written("x")]


def test_the_templates_are_the_three_that_aligners_were_trained_on() -> None:
    start = "BEGINNING OF CONVERSATION: USER: "
    assert {name: template.render("Q?", "A.") for name, template in TEMPLATES.items()} == {
        "paper": f"{start}Editing the following Question-Answer pair to make it more helpful and "
        "harmless: Question: Q? | Answer: A. ASSISTANT:",
        "released": f"{start}Edit the following Question-Answer pair to make it more helpful and "
        "harmless: Q? | A. ASSISTANT:",
        "repo": f"{start}##Question: Q?\n##Answer: A.\n##Correction:  ASSISTANT:",
    }


def test_braces_of_users_are_never_placeholders() -> None:
    template = CorrectionTemplate("{answer} <- {question} {x}")
    assert template.render("{answer}", "{question} {x}") == "{question} {x} <- {answer} {x}"


@pytest.mark.parametrize("text", ["{question} only", "{answer}", "{question}{answer}{question}"])
def test_a_template_wants_question_and_answer_once_each(text: str) -> None:
    with pytest.raises(ConfigError, match=r"wants {question} and {answer}, once each"):
        CorrectionTemplate(text)


USER: Message = {"role": "user", "content": "and peel it ?"}
SYSTEM: Message = {"role": "system", "content": "be brief"}
EARLIER: list[Message] = [
    {"role": "user", "content": "how do i boil an egg ?"},
    {"role": "assistant", "content": "seven minutes"},
]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("any {raw} text", "any {raw} text"),
        ([USER], "and peel it ?"),
        ([SYSTEM, USER], "and peel it ?"),
        (
            [SYSTEM, *EARLIER, USER],
            "USER: how do i boil an egg ?\nASSISTANT: seven minutes\nUSER: and peel it ?",
        ),
    ],
)
def test_the_question_is_the_text_or_the_turns_without_the_system(
    prompt: Any, question: str
) -> None:
    assert question_of(prompt) == question
    editor = Editor()
    text = prompt if isinstance(prompt, str) else None
    messages = None if isinstance(prompt, str) else tuple(prompt)
    AlignerGuide(editor).revise_all([Prompt([1], messages, text)], ["draft"])
    assert editor.asked[0].text == PAPER.render(question, "draft")


def test_a_prompt_without_a_question_is_refused() -> None:
    aligner = AlignerGuide(Editor())
    with pytest.raises(PromptError, match="token ids alone, but an Aligner reads the question"):
        aligner.check(Prompt([1, 2, 3]))
    with pytest.raises(PromptError, match="no user message"):
        aligner.check(Prompt([1], (SYSTEM,)))


def test_a_draft_whose_copy_would_not_fit_is_refused_and_never_cut() -> None:
    tokenizer = byte_tokenizer()
    draft = "wörds and more of them " * 5
    num_read = len(tokenizer.encode(PAPER.render(question_of(QUESTION), draft)))
    enough = num_read + len(tokenizer.encode(draft)) + 1
    editor = Editor(max_length=enough)
    assert AlignerGuide(editor).revise_all([PROMPT], [draft]) == [Written(draft)]
    assert editor.asked[0].max_tokens == enough - num_read
    with pytest.raises(PromptError, match="not enough to write such a draft again"):
        AlignerGuide(Editor(max_length=enough - 1)).revise(PROMPT, draft)


def writer(seed: int = 4, num_slots: int = 4, **overrides: Any) -> tuple[Writer, Any]:
    tokenizer = byte_tokenizer()
    model = tiny_llama(seed, vocab_size=len(tokenizer), max_position_embeddings=512, **overrides)
    lm = CausalLM(model, num_slots=num_slots)
    assert isinstance(tokenizer.eos_token_id, int)
    return Writer(lm, tokenizer, frozenset({tokenizer.eos_token_id})), model


def greedy(model: Any, text: str, num_tokens: int) -> str:
    """Decode without cache or engine."""
    tokenizer = byte_tokenizer()
    ids, written = tokenizer.encode(text), []
    while len(written) < num_tokens and tokenizer.eos_token_id not in written:
        written.append(int(plain_logprobs(model, [*ids, *written]).argmax()))
    found = tokenizer.decode(written, skip_special_tokens=True)
    assert isinstance(found, str)
    return found.rstrip("\ufffd")  # half a character at the end is no text


def test_a_writer_decodes_greedily_in_one_batch_what_it_streams_one_by_one() -> None:
    writes, model = writer()
    texts = [f"{'please ' * (i % 3)}mind the gap {i}" for i in range(7)]
    writings = [Writing(text=text, max_tokens=6 + i) for i, text in enumerate(texts)]
    together = [written.text for written in writes.write(writings)]
    assert together == [greedy(model, one.text, one.max_tokens) for one in writings]
    assert together == ["".join(writes.stream(writing)) for writing in writings]
    assert len(set(together)) == 7


def test_a_writer_says_what_was_cut_and_samples_what_its_seed_says() -> None:
    writes, _ = writer()
    cut = Writing(text="soup", max_tokens=5)
    drawn = [Writing(text="soup", max_tokens=400, temperature=1.5, seed=i) for i in range(6)]
    assert not writes.write([cut])[0].complete
    once = writes.write(drawn)
    assert writes.write(drawn) == once
    assert any(written.complete for written in once)
    assert len({written.text for written in once}) == 6


def test_a_stream_that_is_closed_frees_its_slot() -> None:
    writes, model = writer(num_slots=1)
    left = writes.stream(Writing(text="never read to its end", max_tokens=400))
    assert next(left)
    left.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    writes.stream(Writing(text="not read at all", max_tokens=400))
    [written] = writes.write([Writing(text="soup", max_tokens=4)])
    assert written.text == greedy(model, "soup", 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pilot(root: Path) -> Pilot:
    """A base of words, and Aligners that read bytes."""
    base = save_base(root / "base", tokenizer=word_tokenizer())
    guides: dict[str, str | Path | Guide] = {
        "copy": AlignerGuide(Editor()),
        "shout": AlignerGuide(Editor(str.upper, tokenizer=hh_tokenizer())),
        "mark": AlignerGuide(Editor(lambda draft: f"{draft} ok?")),
        "erase": AlignerGuide(Editor(lambda _: "")),
    }
    return Pilot(base, guides=guides, dtype="float64")


PARAMS = SamplingParams(max_tokens=15, seed=5)


def test_a_copying_aligner_changes_nothing_but_who_is_named(pilot: Pilot) -> None:
    prompts = ["soup ?", QUESTION, "boil it"]
    plain = pilot.generate(prompts, PARAMS, guides={})
    copied = pilot.generate(prompts, PARAMS, guides={"copy": 1})
    assert [done.text for done in copied] == [done.text for done in plain]
    assert [done.draft_text for done in copied] == [done.text for done in plain]
    assert [done.token_ids for done in copied] == [done.token_ids for done in plain]
    assert {done.revised_by for done in copied} == {("copy",)}


def test_aligners_stack_in_order_and_a_copy_in_between_is_nothing(pilot: Pilot) -> None:
    def texts(*names: str) -> list[str]:
        weights = dict.fromkeys(names, 1.0)
        done = pilot.generate([QUESTION, "soup ?"], PARAMS, guides=weights)
        assert all(one.revised_by == names for one in done)
        return [one.text for one in done]

    drafts = texts()
    assert texts("shout", "mark") == [f"{draft.upper()} ok?" for draft in drafts]
    assert texts("mark", "shout") == [f"{draft} ok?".upper() for draft in drafts]
    assert texts("copy", "shout") == texts("shout", "copy") == texts("shout")
    assert texts("erase", "mark") == [" ok?"] * 2
    assert texts("mark", "erase") == [""] * 2


def test_the_draft_is_what_was_before_the_first_revision(pilot: Pilot) -> None:
    [plain] = pilot.generate([QUESTION], PARAMS, guides={})
    [done] = pilot.generate([QUESTION], PARAMS, guides={"shout": 1, "mark": 1})
    assert done.draft_text == plain.text
    assert "".join(pilot.stream(QUESTION, PARAMS, {"shout": 1, "mark": 1})) == done.text


def test_an_aligner_folder_brings_its_own_model_tokenizer_and_template(
    pilot: Pilot, root: Path
) -> None:
    template = "<<{question}>> {answer} =>"
    folder = save_aligner(
        root / "own", seed=9, settings={"template_text": template, "max_tokens": 7}
    )
    [draft] = pilot.generate([QUESTION], PARAMS, guides={})
    loaded = Pilot(root / "base", {"own": folder}, dtype="float64")
    [done] = loaded.generate([QUESTION], PARAMS)
    model = load_frozen(folder, dtype="float64")
    read = f"<<how do i make soup ?>> {draft.text} =>"
    assert done.text == greedy(model, read, 7)
    assert done.draft_text == draft.text
    assert done.finish_reason == "length"  # cut by the Aligner's own max_tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "wanted either template .*paper, released, repo.* or template_text"),
        ({"template": "paper", "template_text": "{question}{answer}"}, "wanted either template"),
        ({"template": "papr"}, "template: Input should be 'paper', 'released' or 'repo'"),
        ({"template_text": "{question}"}, "wants {question} and {answer}, once each"),
        ({"template": "paper", "top_k": 3}, "top_k: unknown key"),
        ({"template": "paper", "seed": 2**64}, "seed: Input should be less than"),
    ],
)
def test_a_folder_without_a_valid_template_is_refused(
    root: Path, tmp_path: Path, pilot: Pilot, settings: dict[str, Any], message: str
) -> None:
    folder = save_aligner(tmp_path / "bad", settings=settings)
    assert read_card(folder).kind == "aligner"
    with pytest.raises(ConfigError, match=message):
        Pilot(root / "base", {"bad": folder})


def test_an_aligner_needs_a_decode_loop_to_load(root: Path, pilot: Pilot) -> None:
    host = GuideHost(base=pilot.engine.base, tokenizer=pilot.tokenizer)
    with pytest.raises(ConfigError, match=r"nothing here can decode it\. Load it with Pilot"):
        host.load_text_model(save_aligner(root / "alone"))


def test_a_long_draft_is_refused_by_name_of_its_limit(root: Path, pilot: Pilot) -> None:
    """The prompt fits, so it is decoded; the draft with its question does not."""
    folder = save_aligner(root / "short")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 330
    (folder / "config.json").write_text(json.dumps(config))
    short = Pilot(root / "base", {"short": folder}, dtype="float64")
    long = SamplingParams(max_tokens=120, seed=5, ignore_eos=True)
    with pytest.raises(PromptError, match=r"model has 330 positions, .* not enough to write"):
        short.generate([QUESTION], long)
    [done] = short.generate([QUESTION], PARAMS)
    assert done.revised_by == ("short",)
