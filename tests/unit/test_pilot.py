"""Pilot: folders in, completions out; every mistake is named before any work is done."""

from pathlib import Path

import pytest

from pilotfish import Pilot, SamplingParams
from pilotfish.chat import Message
from pilotfish.errors import CheckpointError, ConfigError, PromptError, VocabMismatchError
from pilotfish.guides.card import GuideCard, read_card, write_card
from pilotfish.models.vocab import fingerprint
from tests.chat_tokenizers import hh_tokenizer, word_tokenizer
from tests.folders import save_base, save_guide

QUESTION: list[Message] = [{"role": "user", "content": "how do i make soup ?"}]
PARAMS = SamplingParams(max_tokens=20, seed=3, temperature=0.9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "base": save_base(root / "base", tokenizer=word_tokenizer()),
        "guide": save_guide(root / "guide", tokenizer=word_tokenizer(), weight=0.5),
        "foreign": save_guide(root / "foreign", tokenizer=hh_tokenizer()),
        "unknown": save_guide(root / "unknown", tokenizer=word_tokenizer(), kind="compass"),
    }


@pytest.fixture(scope="module")
def pilot(folders: dict[str, Path]) -> Pilot:
    return Pilot(folders["base"], guides={"helpful": folders["guide"]}, num_slots=4)


def test_completions_carry_text_ids_and_telemetry_per_token(pilot: Pilot) -> None:
    [done] = pilot.generate([QUESTION], PARAMS, guides={"helpful": 1.0})
    assert done.text == pilot.tokenizer.decode(done.token_ids, skip_special_tokens=True)
    lengths = {len(getattr(done, n)) for n in ("token_ids", "logprobs", "base_logprobs", "kl")}
    assert lengths == {len(done.token_ids)}
    assert any(done.kl)
    assert done.logprobs != done.base_logprobs


def test_no_guides_and_weight_zero_are_exactly_the_base(
    pilot: Pilot, folders: dict[str, Path]
) -> None:
    alone = Pilot(folders["base"]).generate([QUESTION], PARAMS)
    assert pilot.generate([QUESTION], PARAMS, guides={}) == alone
    assert pilot.generate([QUESTION], PARAMS, guides={"helpful": 0.0}) == alone


def test_without_weights_every_guide_has_the_weight_of_its_card(pilot: Pilot) -> None:
    assert pilot.generate([QUESTION], PARAMS) == pilot.generate(
        [QUESTION], PARAMS, guides={"helpful": 0.5}
    )


def test_weights_in_units_of_reward_are_scaled_by_the_card(folders: dict[str, Path]) -> None:
    folder = folders["guide"]
    card = read_card(folder)
    write_card(folder, card.model_copy(update={"beta_r": 0.25}))
    try:
        scaled = Pilot(folders["base"], guides={"helpful": folder})
    finally:
        write_card(folder, card)
    found = scaled.generate([QUESTION], PARAMS, guides={"helpful": 4.0}, weight_units="reward")
    assert found == scaled.generate([QUESTION], PARAMS, guides={"helpful": 1.0})
    assert found != scaled.generate([QUESTION], PARAMS, guides={"helpful": 4.0})
    with pytest.raises(ConfigError, match="no weights are given"):
        scaled.generate([QUESTION], PARAMS, weight_units="reward")
    with pytest.raises(PromptError, match="no guide named 'kind'"):
        scaled.generate([QUESTION], PARAMS, guides={"kind": 1.0}, weight_units="reward")


def test_more_prompts_than_slots_keep_their_order_and_their_text(pilot: Pilot) -> None:
    prompts = ["how do i", QUESTION, "soup", "make it", "good luck", "boil", "i make"]
    together = pilot.generate(prompts, PARAMS)
    alone = [pilot.generate([prompt], PARAMS)[0] for prompt in prompts]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]


def test_stop_strings_end_the_text_before_them(pilot: Pilot) -> None:
    params = SamplingParams(max_tokens=60, seed=11, ignore_eos=True)
    [free] = pilot.generate([QUESTION], params, guides={})
    words = free.text.split()
    stop = " ".join(words[4:6])
    stopping = SamplingParams(max_tokens=60, seed=11, ignore_eos=True, stop=(stop,))
    [stopped] = pilot.generate([QUESTION], stopping, guides={})
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]


def test_a_bad_prompt_is_named_before_anything_is_decoded(pilot: Pilot) -> None:
    long = "soup " * 1100
    with pytest.raises(PromptError, match="more than the 1024 positions"):
        pilot.generate(["soup", long], PARAMS)
    with pytest.raises(PromptError, match="no guide named 'kind'"):
        pilot.generate(["soup"], PARAMS, guides={"kind": 1.0})
    with pytest.raises(ConfigError, match="wanted a list of prompts"):
        pilot.generate("soup", PARAMS)
    with pytest.raises(ConfigError, match="2 sampling parameters for 1 prompts"):
        pilot.generate(["soup"], [PARAMS, PARAMS])
    assert not pilot.engine.busy


def test_an_interrupted_call_leaves_nothing_to_the_next(
    pilot: Pilot, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = pilot.engine.step
    calls = 0

    def interrupt():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(pilot.engine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pilot.generate([QUESTION] * 6, PARAMS)
    monkeypatch.undo()
    expected = pilot.generate(["soup"], PARAMS)
    assert pilot.generate(["soup"], PARAMS) == expected


def test_a_guide_for_another_vocabulary_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(VocabMismatchError, match="must share the base's token ids"):
        Pilot(folders["base"], guides={"helpful": folders["foreign"]})


@pytest.mark.parametrize(
    ("guide", "message"),
    [("base", "is not a guide folder"), ("unknown", "kind 'compass'.*knows .*genarm")],
)
def test_folders_that_are_no_known_guide_are_refused(
    folders: dict[str, Path], guide: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Pilot(folders["base"], guides={"helpful": folders[guide]})


def test_a_missing_base_folder_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Pilot(tmp_path / "nothing")


def test_fingerprints_tell_vocabularies_apart_and_ignore_padding() -> None:
    words = word_tokenizer()
    assert fingerprint(words) == fingerprint(words)
    assert fingerprint(words) != fingerprint(hh_tokenizer())


def test_a_card_survives_its_round_trip_and_refuses_strange_keys(tmp_path: Path) -> None:
    card = GuideCard(kind="genarm", base="b", vocab="v", beta_r=0.3, training={"steps": 5})
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card
    text = (tmp_path / "guide.json").read_text()
    (tmp_path / "guide.json").write_text(text.replace('"beta_r"', '"beta"'))
    with pytest.raises(CheckpointError, match="beta"):
        read_card(tmp_path)
