"""Chains: which guides act when, which orders are refused, and a whole chain through `Pilot`."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from pilotfish import Pilot, SamplingParams
from pilotfish.chain import Chain, make_chain
from pilotfish.chat import Message, render_prompt
from pilotfish.correction import TEMPLATES
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides.base import Stage
from pilotfish.models.loading import load_frozen, load_frozen_scorer
from pilotfish.noise import draft_seed
from tests.chat_tokenizers import word_tokenizer
from tests.fakes import plain_logprobs, plain_reward
from tests.folders import (
    byte_tokenizer,
    save_aligner,
    save_base,
    save_card,
    save_guide,
    save_reward_guide,
    save_reward_model,
)

QUESTION: list[Message] = [{"role": "user", "content": "how do i make soup ?"}]
PARAMS = SamplingParams(max_tokens=12, seed=3, temperature=0.9)


class Tilting:
    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = True


class Switch:
    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = False


class Selecting:
    stage: ClassVar[Stage] = Stage.SELECTION
    takes_weight: ClassVar[bool] = False


class Revising:
    stage: ClassVar[Stage] = Stage.REVISION
    takes_weight: ClassVar[bool] = False


GUIDES = {
    "a": Tilting,
    "b": Tilting,
    "proxy": Switch,
    "best": Selecting,
    "blocks": Selecting,
    "polish": Revising,
    "shorten": Revising,
}


def test_a_chain_keeps_its_order_within_each_stage() -> None:
    weights = {"b": 0.5, "proxy": 1, "a": -2.0, "best": 1, "shorten": 1, "polish": 1.0}
    chain = make_chain(weights, GUIDES)
    assert list(chain.tilts.items()) == [("b", 0.5), ("proxy", 1), ("a", -2.0)]
    assert chain.selection == "best"
    assert chain.revisions == ("shorten", "polish")
    assert make_chain({}, GUIDES) == Chain()


def test_weight_zero_takes_a_guide_out_whatever_its_place() -> None:
    weights = {"polish": 0, "best": 0.0, "a": 1.0, "blocks": 1}
    assert make_chain(weights, GUIDES) == Chain({"a": 1.0}, "blocks")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["polish", "a"], "'a' tilts tokens, but stands behind 'polish', which revises"),
        (["polish", "best"], "'best' selects among drafts, but stands behind 'polish'"),
        (["best", "a"], "'a' tilts tokens, but stands behind 'best', which selects.*Put 'a' first"),
        (["a", "best", "polish", "b"], "'b' tilts tokens, but stands behind 'polish'"),
        (["best", "blocks"], "'best' and 'blocks' both select.*Leave one out"),
        (["a", "c"], "no guide named 'c' is loaded; loaded: a, b, proxy"),
    ],
)
def test_orders_that_cannot_act_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        make_chain(dict.fromkeys(names, 1.0), GUIDES)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("polish", 0.5, "'polish' is on or off.*its weight is 0.5, wanted 0 or 1"),
        ("best", 2.0, "'best' is on or off"),
        ("proxy", -1.0, "'proxy' is on or off"),
        ("a", float("nan"), "'a' has weight nan, wanted a finite number"),
    ],
)
def test_weights_that_mean_nothing_are_refused(name: str, weight: float, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        make_chain({name: weight}, GUIDES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    words = word_tokenizer()
    return {
        "base": save_base(root / "base", tokenizer=words),
        "a": save_guide(root / "a", seed=1, tokenizer=words, weight=0.5),
        "b": save_guide(root / "b", seed=2, tokenizer=words),
        "reward": save_reward_model(root / "reward", seed=5, tokenizer=words),
        "best": save_card(
            root / "best", kind="best_of_n", tokenizer=words, reward="../reward", num_drafts=5
        ),
        "blocks": save_reward_guide(
            root / "blocks", kind="blockwise", tokenizer=words, num_drafts=3, block_tokens=4
        ),
        # Of another vocabulary than the base, as an Aligner may be.
        "polish": save_aligner(
            root / "polish",
            tokenizer=byte_tokenizer(),
            settings={"template": "paper", "max_tokens": 9},
        ),
        "halved": save_aligner(root / "halved", weight=0.5),
    }


@pytest.fixture(scope="module")
def pilot(folders: dict[str, Path]) -> Pilot:
    names = ("a", "b", "best", "polish")
    loaded = {name: folders[name] for name in names}
    return Pilot(folders["base"], guides=loaded, dtype="float64", num_slots=4)


CHAIN = {"a": 0.5, "b": 1.5, "best": 1, "polish": 1}


def reference_draft(folders: dict[str, Path], drafts: list[list[int]]) -> list[int]:
    """The best of these drafts, as the reward model alone sees them."""
    scorer = load_frozen_scorer(folders["reward"], dtype="float64")
    prompt = render_prompt(word_tokenizer(), QUESTION)
    rewards = [plain_reward(scorer, [*prompt, *draft]) for draft in drafts]  # pyright: ignore[reportArgumentType] - a Llama
    return drafts[max(range(len(drafts)), key=rewards.__getitem__)]


def reference_revision(folders: dict[str, Path], draft: str) -> tuple[list[int], str]:
    """Greedy decoding by the Aligner, without cache or engine."""
    tokenizer, model = byte_tokenizer(), load_frozen(folders["polish"], dtype="float64")
    question = QUESTION[0]["content"]
    ids = tokenizer.encode(TEMPLATES["paper"].render(question, draft))
    written: list[int] = []
    while len(written) < 9 and tokenizer.eos_token_id not in written:
        law = plain_logprobs(model, [*ids, *written])  # pyright: ignore[reportArgumentType] - a Llama
        written.append(int(law.argmax()))
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert isinstance(text, str)
    return written, text.rstrip("\ufffd")  # half a character at the end is no text


def test_two_token_guides_a_selection_and_an_aligner_run_one_after_the_other(
    pilot: Pilot, folders: dict[str, Path]
) -> None:
    tilts = {"a": 0.5, "b": 1.5}
    [done] = pilot.generate([QUESTION], PARAMS, guides=CHAIN)
    [selected] = pilot.generate([QUESTION], PARAMS, guides={**tilts, "best": 1})
    _, revised = reference_revision(folders, selected.text)

    assert done.text == revised != selected.text
    assert done.draft_text == selected.text
    assert done.revised_by == ("polish",)
    assert (selected.draft_text, selected.revised_by) == (None, ())
    assert done.token_ids == selected.token_ids
    assert done.logprobs == pytest.approx(selected.logprobs)
    assert done.kl == pytest.approx(selected.kl)
    assert any(done.kl)


def test_the_drafts_of_a_selection_are_what_their_seeds_draw_alone(
    pilot: Pilot, folders: dict[str, Path]
) -> None:
    tilts = {"a": 0.5, "b": 1.5}
    [selected] = pilot.generate([QUESTION], PARAMS, guides={**tilts, "best": 1})
    [first] = pilot.generate([QUESTION], PARAMS, guides=tilts)
    seeds = [draft_seed(3, number) for number in range(5)]
    params = [SamplingParams(max_tokens=12, seed=seed, temperature=0.9) for seed in seeds]
    drafts = pilot.generate([QUESTION] * 5, params, guides=tilts)
    assert drafts[0].token_ids == first.token_ids
    assert len({tuple(draft.token_ids) for draft in drafts}) > 2
    assert selected.token_ids == reference_draft(folders, [draft.token_ids for draft in drafts])


def test_every_model_of_a_chain_counts_its_forwards(pilot: Pilot, folders: dict[str, Path]) -> None:
    def beside_the_base(guides: dict[str, float]) -> int:
        before, before_base = pilot.num_forwards, pilot.engine.base.num_forwards
        pilot.generate([QUESTION], PARAMS, guides=guides)
        base = pilot.engine.base.num_forwards - before_base
        return pilot.num_forwards - before - base

    [draft] = pilot.generate([QUESTION], PARAMS, guides={})
    written, _ = reference_revision(folders, draft.text)
    assert beside_the_base({}) == 0
    assert beside_the_base({"best": 1}) == 5
    assert beside_the_base({"polish": 1}) == len(written)


def test_many_prompts_are_answered_as_one_by_one(pilot: Pilot) -> None:
    prompts = ["soup ?", QUESTION, "how do i boil it", "good luck", "make", "i make soup"]
    params = [SamplingParams(max_tokens=5 + i, seed=i, temperature=0.9) for i in range(6)]
    together = pilot.generate(prompts, params, guides=CHAIN)
    for prompt, own, done in zip(prompts, params, together, strict=True):
        [alone] = pilot.generate([prompt], own, guides=CHAIN)
        assert (alone.text, alone.draft_text) == (done.text, done.draft_text)
        assert alone.token_ids == done.token_ids
    assert not pilot.engine.busy


@pytest.mark.parametrize(
    "guides", [{}, {"a": 1.0}, {"a": 1.0, "best": 1}, CHAIN, {"polish": 1}], ids=str
)
def test_a_stream_joins_to_what_generate_returns(pilot: Pilot, guides: dict[str, float]) -> None:
    pieces = list(pilot.stream(QUESTION, PARAMS, guides))
    [done] = pilot.generate([QUESTION], PARAMS, guides=guides)
    assert "".join(pieces) == done.text
    assert all(pieces)
    assert len(pieces) > 1 or "best" in guides


def test_a_selection_streams_what_was_chosen_and_blocks_stream_one_by_one(
    folders: dict[str, Path],
) -> None:
    pilot = Pilot(folders["base"], {"blocks": folders["blocks"]}, dtype="float64")
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    pieces = list(pilot.stream(QUESTION, params))
    [done] = pilot.generate([QUESTION], params)
    assert "".join(pieces) == done.text
    assert len(pieces) == 3  # 12 tokens in blocks of 4


def test_streams_may_overlap_and_be_left_unread(pilot: Pilot) -> None:
    [expected] = pilot.generate([QUESTION], PARAMS, guides={"a": 1.0})
    one, other = (pilot.stream(QUESTION, PARAMS, {"a": 1.0}) for _ in range(2))
    left = pilot.stream(QUESTION, PARAMS, CHAIN)
    pieces = [next(one), next(other), next(one), next(left)]
    assert pilot.generate([QUESTION], PARAMS, guides={"a": 1.0}) == [expected]
    assert pieces[0] + pieces[2] + "".join(one) == expected.text
    assert pieces[1] + "".join(other) == expected.text
    left.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    pilot.generate([QUESTION], PARAMS, guides={"polish": 1})
    assert not pilot.engine.busy


def test_drafts_of_many_prompts_wait_outside_the_engine(
    pilot: Pilot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the blocks of one answer would stand in line behind every other prompt."""
    step, seen = pilot.engine.step, []

    def look() -> Any:
        seen.append(pilot.engine.num_running + pilot.engine.num_waiting)
        return step()

    monkeypatch.setattr(pilot.engine, "step", look)
    pilot.generate(["soup"] * 9, PARAMS, guides={"best": 1})
    assert max(seen) < 4 + 5  # slots, and the drafts of one prompt
    assert all(num >= 4 for num in seen[:8])


def test_an_interrupted_selection_leaves_nothing_to_the_next(
    pilot: Pilot, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pilot.generate([QUESTION], PARAMS, guides=CHAIN)
    step, calls = pilot.engine.step, 0

    def interrupt() -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(pilot.engine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pilot.generate([QUESTION] * 4, PARAMS, guides=CHAIN)
    monkeypatch.undo()
    assert pilot.generate([QUESTION], PARAMS, guides=CHAIN) == expected
    assert not pilot.engine.busy


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("polish", "a"), "cannot act together.*'a' tilts tokens, but stands behind 'polish'"),
        (("polish", "best"), "cannot act together.*'best' selects among drafts"),
        (("best", "blocks"), "cannot act together.*both select among drafts"),
        (("halved",), "cannot act together.*its weight is 0.5, wanted 0 or 1"),
    ],
)
def test_guides_that_cannot_act_together_are_refused_before_anything_is_loaded(
    folders: dict[str, Path], names: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.pilot.load_frozen", None)
    with pytest.raises(ConfigError, match=message):
        Pilot(folders["base"], guides={name: folders[name] for name in names})


def test_what_a_chain_cannot_answer_is_refused_before_anything_is_decoded(pilot: Pilot) -> None:
    before = pilot.num_forwards
    with pytest.raises(PromptError, match="stands behind 'polish'"):
        pilot.generate([QUESTION], PARAMS, guides={"polish": 1, "a": 1.0})
    with pytest.raises(PromptError, match="5 drafts, but at temperature 0 they are all the same"):
        pilot.generate([QUESTION], SamplingParams(temperature=0), guides={"best": 1})
    with pytest.raises(PromptError, match="Aligner's model has 1024 positions"):
        pilot.generate(["soup", "soup " * 500], PARAMS, guides=CHAIN)
    with pytest.raises(PromptError, match="stands behind 'polish'"):
        pilot.stream(QUESTION, PARAMS, {"polish": 1, "a": 1.0})
    assert pilot.num_forwards == before
    assert not pilot.engine.busy


def test_an_object_that_is_no_guide_is_refused(folders: dict[str, Path]) -> None:
    made: Any = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="'mine' is a Linear, wanted a folder, a mapping"):
        Pilot(folders["base"], guides={"mine": made})
