"""Selection through `Pilot`: folders with their reward models, blocks of text, and refusals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pilotfish import Pilot, SamplingParams
from pilotfish.context import Prompt
from pilotfish.errors import ConfigError, PromptError, VocabMismatchError
from pilotfish.guides.base import Draft
from pilotfish.guides.best_of_n import BestOfN, BlockwiseCD
from tests.chat_tokenizers import hh_tokenizer
from tests.folders import byte_tokenizer, save_base, save_reward_guide


class ByLength:
    """Prefers long drafts, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def score(self, prompt: Prompt, drafts: Sequence[Draft]) -> list[int]:
        self.asked += [tuple(draft.token_ids) for draft in drafts]
        return [len(draft.token_ids) for draft in drafts]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_base(root / "base", tokenizer=hh_tokenizer())
    return root


def save(folder: Path, kind: str, **settings: Any) -> Path:
    return save_reward_guide(folder, kind=kind, tokenizer=hh_tokenizer(), **settings)


PARAMS = SamplingParams(max_tokens=9, seed=2)


@pytest.mark.parametrize(
    ("pooling", "pool_length"), [("last", 1.0), ("pooled", 8.0)], ids=["last", "pooled"]
)
def test_folders_bring_their_reward_model_and_one_block_is_best_of_n(
    root: Path, tmp_path: Path, pooling: str, pool_length: float
) -> None:
    shared: dict[str, Any] = {"num_drafts": 6, "pooling": pooling, "pool_length": pool_length}
    folders = {
        "best": save(tmp_path / "best", "best_of_n", **shared),
        "soft": save(tmp_path / "soft", "best_of_n", **shared, inverse_temperature=0.3, weight=0),
        "blocks": save(tmp_path / "blocks", "blockwise", **shared, block_tokens=9, weight=0),
        "short": save(tmp_path / "short", "blockwise", **shared, block_tokens=2, weight=0),
    }
    pilot = Pilot(root / "base", folders, dtype="float64", num_slots=8)
    prompts = ["soup ?", "how do i boil it"]
    found = {
        name: [done.text for done in pilot.generate(prompts, PARAMS, guides={name: 1})]
        for name in folders
    }
    assert found["best"] == found["blocks"] != found["short"]
    assert found["best"] == [done.text for done in pilot.generate(prompts, PARAMS)]
    again = [done.text for done in pilot.generate(prompts, PARAMS, guides={"soft": 1})]
    assert found["soft"] == again


def test_blocks_keep_what_the_whole_answer_keeps(root: Path) -> None:
    """Per token lists, stop strings across the seam of two blocks, and the length asked for."""
    guides: dict[str, Any] = {
        f"by{m}": BlockwiseCD(ByLength(), num_drafts=1, block_tokens=m) for m in (1, 2, 5)
    }
    pilot = Pilot(root / "base", guides={}, dtype="float64")
    params = SamplingParams(max_tokens=40, seed=8, ignore_eos=True)
    [free] = pilot.generate(["soup"], params)
    stop = next(free.text[at : at + 3] for at in range(8, 30) if free.text[at : at + 3].isascii())
    stopping = SamplingParams(max_tokens=40, seed=8, ignore_eos=True, stop=(stop,))
    [whole] = pilot.generate(["soup"], stopping)
    assert whole.finish_reason == "stop"
    for name, guide in guides.items():
        blocks = Pilot(root / "base", guides={name: guide}, dtype="float64")
        [done] = blocks.generate(["soup"], stopping)
        assert (done.text, done.token_ids) == (whole.text, whole.token_ids)
        assert done.finish_reason == "stop"
        assert len(done.logprobs) == len(done.kl) == len(done.token_ids)
        assert "".join(blocks.stream("soup", stopping)) == whole.text


def test_without_a_seed_drafts_differ_from_call_to_call(root: Path) -> None:
    scorer = ByLength()
    pilot = Pilot(root / "base", guides={"best": BestOfN(scorer, num_drafts=3)})
    pilot.generate(["soup"] * 2, SamplingParams(max_tokens=20, ignore_eos=True))
    assert len(set(scorer.asked)) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_drafts": 0}, "num_drafts: Input should be greater than 0"),
        ({"inverse_temperature": -1}, "inverse_temperature: Input should be greater than or equal"),
        ({"pool_length": 3.0}, "pool_length is 3.0, but pooling 'last'"),
        ({"block_tokens": 3}, "block_tokens: unknown key"),
    ],
)
def test_cards_that_cannot_be_honoured_are_refused(
    root: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Pilot(root / "base", {"best": save(tmp_path / "bad", "best_of_n", **settings)})


def test_a_reward_model_of_another_vocabulary_is_refused(root: Path, tmp_path: Path) -> None:
    folder = save_reward_guide(tmp_path / "foreign", kind="best_of_n", tokenizer=byte_tokenizer())
    with pytest.raises(VocabMismatchError):
        Pilot(root / "base", {"best": folder})


@pytest.mark.parametrize("kind", [BestOfN, BlockwiseCD])
def test_what_the_reward_model_cannot_read_is_refused_before_any_work(
    root: Path, kind: Any
) -> None:
    guide = kind(ByLength(), max_length=12)
    pilot = Pilot(root / "base", {"best": guide})
    num_prompt = len(pilot.tokenizer.encode("soup"))
    pilot.generate(["soup"], SamplingParams(max_tokens=12 - num_prompt, seed=1))
    before = pilot.num_forwards
    with pytest.raises(PromptError, match="more than the 12 positions of the model that compares"):
        pilot.generate(["soup"], SamplingParams(max_tokens=13 - num_prompt, seed=1))
    assert pilot.num_forwards == before
