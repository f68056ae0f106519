"""What every guide must do, whatever its kind. A new kind needs one line in `SAVED` here.

The models are random and run in float64, so equality is to rounding; folders go through disk.
"""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pilotfish import Completion, Pilot, SamplingParams
from pilotfish.context import Context, Prompt
from pilotfish.errors import PilotfishError
from pilotfish.guides import GUIDES, load_guide
from pilotfish.guides.base import Draft, ResponseGuide, Selector, Stage, Step, TokenGuide
from pilotfish.guides.card import read_card, write_card
from pilotfish.guides.host import GuideHost
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, load_tokenizer
from tests.folders import (
    byte_tokenizer,
    save_aligner,
    save_base,
    save_card,
    save_guide,
    save_proxy,
    save_reward_guide,
    save_reward_model,
)


def _with_lms(kind: str, **settings: Any) -> Callable[[Path], Path]:
    """A card whose settings name models, which are saved beside it: a seed is an LM, `reward` a
    reward model."""

    def save(folder: Path) -> Path:
        folder.mkdir(parents=True)
        paths = {}
        for name, value in settings.items():
            if isinstance(value, tuple):
                save, seed = value
                paths[name] = str(save(folder / name, seed=seed))
            else:
                paths[name] = value
        return save_card(folder, kind=kind, **paths)

    return save


SAVED: dict[str, Callable[[Path], Path]] = {
    "aligner": save_aligner,
    "args": lambda folder: save_reward_guide(folder, num_candidates=7, chunk_size=3),
    "best_of_n": _with_lms("best_of_n", num_drafts=3, reward=(save_reward_model, 4)),
    "blockwise": _with_lms("blockwise", num_drafts=2, block_tokens=3, value=(save_reward_model, 4)),
    "controlled_decoding": lambda folder: save_reward_guide(folder, kind="controlled_decoding"),
    "genarm": save_guide,
    "proxy": save_proxy,
    "proxy_tuning": _with_lms("proxy_tuning", expert=(save_base, 5), anti_expert=(save_base, 6)),
    "transfer_q": _with_lms(
        "transfer_q",
        rollout=(save_base, 7),
        reward=(save_reward_model, 8),
        num_candidates=3,
        num_rollouts=2,
        rollout_tokens=3,
    ),
}
VARIED: dict[str, list[dict[str, Any]]] = {
    "aligner": [{"max_tokens": 4}, {"temperature": 1.5, "seed": 5}],
    "args": [{"num_candidates": 2, "chunk_size": 1}, {"gate": 4.3}],
    "best_of_n": [{"num_drafts": 5}, {"num_drafts": 8, "inverse_temperature": 0.5}],
    "blockwise": [{"num_drafts": 4, "block_tokens": 2}],
    "controlled_decoding": [{"num_candidates": None}, {"num_candidates": 3}],
    "genarm": [{"gate": 4.3}],
    "proxy": [
        {"p_t": 0.3, "top_k": 7},
        {"candidate_order": "iid", "max_tries": 2, "fallback": "top1", "temperature": 1.3},
        {"p_t_rule": "cumulative", "gate": 4.3},
    ],
    "proxy_tuning": [{"gate": 4.3}],
    "transfer_q": [
        {"num_candidates": 5, "num_rollouts": 3, "rollout_temperature": 0.7, "seed": 3},
        {"rollout_tokens": None, "max_rollout_tokens": 4, "proposal": "rollout"},
    ],
}
"""Settings that a loaded guide can have anew, and that change what is drawn."""
TILTING = sorted(kind for kind, guide in GUIDES.items() if guide.stage is Stage.TOKEN)
VOCAB = len(byte_tokenizer())


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = SAVED[kind](tmp_path_factory.mktemp("guides") / kind)
        return folders[kind]

    return find


class Bench:
    """A guide of one kind beside its base, asked by hand."""

    def __init__(self, base_folder: Path, folder: Path) -> None:
        self.base = CausalLM(load_frozen(base_folder, dtype="float64"), vocab_size=VOCAB)
        host = GuideHost(
            base=self.base, tokenizer=load_tokenizer(base_folder), dtype="float64", num_slots=16
        )
        self.guide = cast("TokenGuide", load_guide(folder, read_card(folder), host))

    @torch.inference_mode()
    def law(self, contexts: Sequence[Context], weights: Sequence[float]) -> Tensor:
        """Tilt the base's law as the engine does."""
        evidence = self.guide.begin(contexts)
        logprobs_RV, hidden_RD = self.base.forward(contexts)
        before_RV = logprobs_RV.clone()
        weights_R = torch.tensor(weights, dtype=torch.float64)
        step = Step(contexts, weights_R, hidden_RD, logprobs_RV)
        guided_RV = self.guide.tilt(logprobs_RV, step, evidence)
        assert torch.equal(logprobs_RV, before_RV), "the incoming law belongs to the caller"
        for note_R in step.notes.values():
            assert note_R.shape == (len(contexts),)
        return guided_RV


@pytest.fixture
def new_bench(base_folder: Path, saved: Callable[[str], Path]) -> Callable[[str], Bench]:
    return lambda kind: Bench(base_folder, saved(kind))


def some_contexts(num: int, seed: int = 0) -> list[Context]:
    rng = random.Random(seed)
    texts = [[rng.randrange(5, VOCAB) for _ in range(rng.randrange(2, 15))] for _ in range(num)]
    return [Context(key, Prompt(ids[:2]), ids) for key, ids in enumerate(texts)]


def weights_for(kind: str, num: int) -> list[float]:
    return [0.4 + 0.3 * at if GUIDES[kind].takes_weight else 1.0 for at in range(num)]


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_every_kind_is_held_to_this_suite() -> None:
    assert set(SAVED) == set(VARIED) == set(GUIDES)


@pytest.mark.parametrize("kind", TILTING)
def test_laws_are_normalised_and_finite_or_minus_infinity(kind: str, new_bench) -> None:
    contexts = some_contexts(6)
    law_RV = new_bench(kind).law(contexts, weights_for(kind, 6))
    assert law_RV.shape == (6, VOCAB)
    assert not law_RV.isnan().any()
    assert (law_RV < torch.inf).all()
    same(law_RV.exp().sum(-1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("kind", TILTING)
def test_rows_are_independent_whatever_their_batch_and_order(kind: str, new_bench) -> None:
    contexts, weights = some_contexts(5), weights_for(kind, 5)
    together = new_bench(kind).law(contexts, weights)
    shuffled = [3, 0, 4, 1, 2]
    mixed = new_bench(kind).law([contexts[i] for i in shuffled], [weights[i] for i in shuffled])
    same(mixed, together[shuffled])
    for row, context in enumerate(contexts):
        same(new_bench(kind).law([context], [weights[row]])[0], together[row])


@pytest.mark.parametrize("kind", TILTING)
def test_caches_are_invisible(kind: str, new_bench) -> None:
    """Growing, rewinding, changing, ending and joining rows get a fresh guide's answers."""
    bench, rng = new_bench(kind), random.Random(7)
    texts = {context.key: list(context.token_ids) for context in some_contexts(4)}
    for turn in range(6):
        keys = rng.sample(sorted(texts), 3)
        for key in keys:
            text = texts[key]
            change = rng.choice(["grow", "rewind", "replace", "release"])
            if change == "grow":
                text += [rng.randrange(5, VOCAB) for _ in range(rng.randrange(1, 4))]
            elif change == "rewind":
                del text[max(2, len(text) - 2) :]
            elif change == "replace":
                text[-1] = rng.randrange(5, VOCAB)
            else:
                bench.guide.release([key])
        contexts = [Context(key, Prompt(texts[key][:2]), list(texts[key])) for key in keys]
        weights = weights_for(kind, 3)
        found = bench.law(contexts, weights)
        # Keys of its own, so that a fresh guide finds no cache of these rows.
        strangers = [Context(100 * turn + c.key + 50, c.prompt, c.token_ids) for c in contexts]
        same(found, new_bench(kind).law(strangers, weights))


@pytest.mark.parametrize("kind", TILTING)
def test_positions_of_one_sequence_are_answered_as_if_each_stood_alone(
    kind: str, new_bench
) -> None:
    ids = [*some_contexts(1, seed=3)[0].token_ids, 9, 8, 7]
    nested = [Context(1, Prompt(ids[:2]), ids[: len(ids) - 3 + at]) for at in range(4)]
    other = some_contexts(1, seed=4)[0]
    weights = weights_for(kind, 1) * 5
    found = new_bench(kind).law([*nested, other], weights)
    for row, context in enumerate([*nested, other]):
        same(found[row], new_bench(kind).law([context], weights[:1])[0])


def completions(
    base: Path, loaded: dict[str, Path], guides: dict[str, float] | None = None
) -> list[Any]:
    return decoded(Pilot(base, guides=loaded), guides)


def decoded(pilot: Pilot, guides: dict[str, float] | None = None) -> list[Any]:
    prompts = ["the cat", "a dog sat on"]
    params = SamplingParams(max_tokens=6, seed=3, temperature=0.9)
    return pilot.generate(prompts, params, guides=guides)


def bare(completion: Completion) -> Completion:
    """Without the names that guides go by."""
    return replace(completion, moved_by=[], notes=[], revised_by=())


@pytest.mark.parametrize("kind", sorted(SAVED))
def test_weight_zero_is_the_base_bit_for_bit(kind: str, base_folder: Path, saved) -> None:
    plain = completions(base_folder, {})
    assert completions(base_folder, {"it": saved(kind)}, guides={"it": 0.0}) == plain


@pytest.mark.parametrize("kind", sorted(SAVED))
def test_a_folder_loaded_twice_answers_alike(kind: str, base_folder: Path, saved) -> None:
    chosen = {"it": 1.0}
    first = completions(base_folder, {"it": saved(kind)}, guides=chosen)
    assert first == completions(base_folder, {"it": saved(kind)}, guides=chosen)
    assert first != completions(base_folder, {})


@pytest.mark.parametrize(("kind", "args"), [(k, args) for k in VARIED for args in VARIED[k]])
def test_a_variant_is_the_guide_loaded_with_those_settings(
    kind: str, args: dict[str, Any], base_folder: Path, saved, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved(kind), tmp_path / "changed")
    card, settings = read_card(folder), {k: v for k, v in args.items() if k != "gate"}
    update = {"settings": {**card.settings, **settings}, "gate": args.get("gate")}
    write_card(folder, card.model_copy(update=update))
    expected = completions(base_folder, {"it": folder}, {"it": 1.0})

    pilot = Pilot(base_folder, guides={"it": saved(kind)})
    num_models = len(pilot._host.lms)
    name = pilot.vary("it", **args)
    found = [bare(one) for one in decoded(pilot, {name: 1.0})]
    assert found == [bare(one) for one in expected]
    assert found != [bare(one) for one in decoded(pilot, {"it": 1.0})]
    assert len(pilot._host.lms) == num_models


@pytest.mark.parametrize("kind", TILTING)
def test_token_guides_cannot_act_on_a_text_that_is_finished(
    kind: str, base_folder: Path, saved
) -> None:
    for late in ("aligner", "best_of_n"):
        guides = {"late": saved(late), "it": saved(kind)}
        with pytest.raises(PilotfishError, match="it"):
            Pilot(base_folder, guides=guides)


@pytest.mark.parametrize("kind", sorted(kind for kind in GUIDES if not GUIDES[kind].takes_weight))
def test_a_guide_without_a_weight_is_on_or_off(kind: str, base_folder: Path, saved) -> None:
    with pytest.raises(PilotfishError, match=r"0\.5"):
        completions(base_folder, {"it": saved(kind)}, guides={"it": 0.5})


def response_guide(kind: str, base_folder: Path, saved) -> Any:
    folder = saved(kind)
    return load_guide(folder, read_card(folder), Pilot(base_folder)._host)


@pytest.mark.parametrize("kind", sorted(k for k in GUIDES if GUIDES[k].stage is Stage.SELECTION))
def test_selectors_pick_one_of_the_drafts_and_always_the_same(
    kind: str, base_folder: Path, saved
) -> None:
    selector = cast("Selector", response_guide(kind, base_folder, saved))
    drafts = [Draft("a", [70, 71]), Draft("b", [72]), Draft("c", [73, 74, 75])]
    prompt = Prompt([60, 61])
    picks = {selector.choose(prompt, drafts, 0.3) for _ in range(3)}
    assert len(picks) == 1
    assert picks <= {0, 1, 2}


@pytest.mark.parametrize("kind", sorted(k for k in GUIDES if GUIDES[k].stage is Stage.REVISION))
def test_revisions_are_a_function_of_prompt_and_draft(kind: str, base_folder: Path, saved) -> None:
    guide = cast("ResponseGuide", response_guide(kind, base_folder, saved))
    prompt = Prompt([60, 61], text="the cat")
    texts = {"".join(guide.revise(prompt, "sat on the mat")) for _ in range(2)}
    assert len(texts) == 1
