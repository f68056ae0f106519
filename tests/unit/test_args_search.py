"""ARGS and controlled decoding: their laws, their limits, and what they cost."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish import Pilot, SamplingParams
from pilotfish.config import parse
from pilotfish.context import Context
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Request, TokenEvent
from pilotfish.errors import CheckpointError, ConfigError, VocabMismatchError
from pilotfish.guides.args_search import ARGSGuide, ARGSSettings
from pilotfish.guides.base import Step
from pilotfish.guides.controlled_decoding import (
    ControlledDecodingGuide,
    ControlledDecodingSettings,
)
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, load_frozen_scorer
from pilotfish.models.reward import RewardModel
from tests.chat_tokenizers import hh_tokenizer, word_tokenizer
from tests.fakes import (
    context,
    plain_logprobs,
    plain_reward,
    request,
    tiny_llama,
    tiny_reward_model,
)
from tests.folders import save_base, save_reward_guide, save_reward_model

BASE, ARM, REWARD = tiny_llama(1), tiny_llama(2), tiny_reward_model(3)
V = 16


def args_law(base: Tensor, token_ids: list[int], *, k: int, w: float, reward=REWARD) -> Tensor:
    """The paper's score over the top k, renormalised: candidate by candidate, nothing cached."""
    law = torch.full_like(base, -torch.inf)
    for token in base.topk(k).indices.tolist():
        law[token] = base[token] + w * plain_reward(reward, [*token_ids, token])
    return law.log_softmax(-1)


def tilt(guide: Any, contexts: Sequence[Context], laws: Tensor, weights: float | list[float]):
    given = weights if isinstance(weights, list) else [weights] * len(contexts)
    step = Step(contexts, torch.tensor(given, dtype=torch.float64))
    return guide.tilt(laws, step, guide.begin(contexts))


def texts(seed: int, count: int = 4) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randrange(2, 15))] for _ in range(count)]


def laws_of(contexts: Sequence[Context]) -> Tensor:
    return torch.stack([plain_logprobs(BASE, one.token_ids) for one in contexts])


def run(guides: dict[str, Any], requests: list[Request]) -> dict[int, list[TokenEvent]]:
    engine = Engine(CausalLM(BASE, num_slots=8), guides, end_ids=frozenset({0}))
    for one in requests:
        engine.submit(one)
    events: dict[int, list[TokenEvent]] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.key, []).append(event)
    return events


class ArmReward:
    """`log pi_r(v | s)` where a reward is wanted."""

    def candidate_rewards(self, contexts: Sequence[Context], candidates_RK: Tensor) -> Tensor:
        laws = torch.stack([plain_logprobs(ARM, one.token_ids) for one in contexts])
        return laws.gather(1, candidates_RK)

    def release(self, keys: Sequence[int]) -> None: ...


class ShiftedReward:
    """Another reward model plus a number that depends on the text so far alone."""

    def __init__(self, source: RewardModel) -> None:
        self._source = source

    def candidate_rewards(self, contexts: Sequence[Context], candidates_RK: Tensor) -> Tensor:
        shift = torch.tensor([10.0 * sum(one.token_ids) for one in contexts])
        return self._source.candidate_rewards(contexts, candidates_RK) + shift[:, None]

    def release(self, keys: Sequence[int]) -> None: ...


@pytest.mark.parametrize("kind", [ARGSGuide, ControlledDecodingGuide])
def test_every_event_reports_the_law_of_the_formula(kind: Any) -> None:
    """Through the engine: rows of different weights and lengths, greedy and sampled."""
    guides = {"a": kind(RewardModel(REWARD, num_slots=8), num_candidates=5)}
    settings = [(0.5, 0.0), (2.0, 1.0), (-1.0, 0.7), (30.0, 0.0)]
    prompts = texts(1)
    requests = [
        request(at, prompts[at], guides={"a": weight}, temperature=t, ignore_eos=True)
        for at, (weight, t) in enumerate(settings)
    ]
    for at, events in run(guides, requests).items():
        ids, (weight, temperature) = list(prompts[at]), settings[at]
        for event in events:
            law = args_law(plain_logprobs(BASE, ids), ids, k=5, w=weight)
            assert event.logprob == pytest.approx(law[event.token_id].item(), abs=1e-9)
            assert event.logprob > -torch.inf
            if temperature == 0:
                assert event.token_id == int(law.argmax())
            ids.append(event.token_id)


@pytest.mark.parametrize("chunk_size", [*range(1, 8), 50, None])
def test_chunks_of_any_size_leave_the_law_as_it_is(chunk_size: int | None) -> None:
    contexts = [context(key, ids) for key, ids in enumerate(texts(2))]
    guide = ARGSGuide(RewardModel(REWARD), num_candidates=7, chunk_size=chunk_size)
    for _ in range(3):
        laws = laws_of(contexts)
        guided = tilt(guide, contexts, laws, 1.5)
        for row, one in enumerate(contexts):
            expected = args_law(laws[row], one.token_ids, k=7, w=1.5)
            torch.testing.assert_close(guided[row], expected)
            one.token_ids.append(int(guided[row].argmax()))


def test_one_candidate_is_the_greedy_base_whatever_the_weight() -> None:
    contexts = [context(key, ids) for key, ids in enumerate(texts(3))]
    laws = laws_of(contexts)
    for weight in (0.0, 1.0, -40.0, 1e6):
        guided = tilt(ARGSGuide(RewardModel(REWARD), num_candidates=1), contexts, laws, weight)
        assert guided.argmax(-1).tolist() == laws.argmax(-1).tolist()
        assert guided.exp().sort(-1).values[:, :-1].eq(0).all()


def test_weight_zero_is_the_base_on_its_candidates() -> None:
    contexts = [context(key, ids) for key, ids in enumerate(texts(4))]
    laws = laws_of(contexts)
    for k in (1, 3, V):
        guided = tilt(ARGSGuide(RewardModel(REWARD), num_candidates=k), contexts, laws, 0.0)
        assert guided.argmax(-1).tolist() == laws.argmax(-1).tolist()
        kept = laws.topk(k).indices
        conditional = laws.gather(1, kept).softmax(-1)
        torch.testing.assert_close(guided.exp().gather(1, kept), conditional)
    torch.testing.assert_close(guided, laws)  # every token is a candidate: sampling from the base


def test_a_reward_plus_a_constant_is_the_same_guide() -> None:
    contexts = [context(key, ids) for key, ids in enumerate(texts(5))]
    laws, reward = laws_of(contexts), RewardModel(REWARD)
    shifted = tilt(ARGSGuide(ShiftedReward(reward)), contexts, laws, 1.3)
    torch.testing.assert_close(shifted, tilt(ARGSGuide(reward), contexts, laws, 1.3))


def test_a_large_weight_takes_the_best_reward_among_the_candidates() -> None:
    contexts = [context(key, ids) for key, ids in enumerate(texts(6))]
    laws = laws_of(contexts)
    guided = tilt(ARGSGuide(RewardModel(REWARD), num_candidates=4), contexts, laws, 1e6)
    for row, one in enumerate(contexts):
        kept = laws[row].topk(4).indices.tolist()
        best = max(kept, key=lambda token: plain_reward(REWARD, [*one.token_ids, token]))
        assert guided[row].exp()[best].item() == pytest.approx(1)


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
def test_with_an_autoregressive_reward_and_all_candidates_it_is_genarm(weight: float) -> None:
    contexts = [context(key, ids) for key, ids in enumerate(texts(7))]
    laws = laws_of(contexts)
    with torch.inference_mode():
        genarm = tilt(GenARMGuide(CausalLM(ARM)), contexts, laws, weight)
    for guide in (
        ARGSGuide(ArmReward(), num_candidates=V),
        ARGSGuide(ArmReward(), num_candidates=1000),
        ControlledDecodingGuide(ArmReward(), num_candidates=None),
    ):
        torch.testing.assert_close(tilt(guide, contexts, laws, weight), genarm)


def test_tokens_that_an_earlier_guide_forbids_stay_forbidden() -> None:
    contexts = [context(key, ids) for key, ids in enumerate(texts(8))]
    laws = laws_of(contexts)
    laws[:, 3:] = -torch.inf  # three tokens are left for ten candidates
    laws = laws.log_softmax(-1)
    for guide in (
        ARGSGuide(RewardModel(REWARD), num_candidates=10),
        ControlledDecodingGuide(RewardModel(REWARD), num_candidates=None),
    ):
        guided = tilt(guide, contexts, laws, 5.0)
        for row, one in enumerate(contexts):
            expected = args_law(laws[row], one.token_ids, k=3, w=5.0)
            torch.testing.assert_close(guided[row], expected)


def test_the_end_token_is_scored_where_it_stands() -> None:
    """Token 0 as padding and as the end: neither shifts what is read, for it or its neighbours."""
    reward = tiny_reward_model(3)
    reward.config.pad_token_id = reward.config.eos_token_id = 0
    contexts = [context(0, [4, 0, 0]), context(1, [0]), context(2, [7, 8, 9, 0])]
    laws = laws_of(contexts)
    guided = tilt(ARGSGuide(RewardModel(reward), num_candidates=V), contexts, laws, 1.0)
    for row, one in enumerate(contexts):
        torch.testing.assert_close(guided[row], args_law(laws[row], one.token_ids, k=V, w=1.0))


def test_positions_of_one_sequence_are_answered_as_if_each_stood_alone() -> None:
    ids = texts(9)[0] * 2
    contexts = [context(1, ids[:3]), context(1, ids), context(2, [5, 6]), context(1, ids[:4])]
    laws = laws_of(contexts)
    guide = ARGSGuide(RewardModel(REWARD, num_slots=2), num_candidates=4)
    for _ in range(2):
        guided = tilt(guide, contexts, laws, [1.0, 2.0, 0.5, -1.0])
        for row, weight in enumerate((1.0, 2.0, 0.5, -1.0)):
            expected = args_law(laws[row], contexts[row].token_ids, k=4, w=weight)
            torch.testing.assert_close(guided[row], expected)


def test_neither_the_incoming_law_nor_what_is_cached_changes() -> None:
    contexts = [context(0, [3, 1, 4, 1, 5])]
    laws = laws_of(contexts)
    given, reward = laws.clone(), RewardModel(REWARD)
    guide = ARGSGuide(reward, num_candidates=4)

    def cached() -> list[Tensor]:
        return [buffer[0, :, :5].clone() for buffer in reward.body._cache._buffers()]

    reward.rewards(contexts)
    before = cached()
    for seed in range(4):  # other candidates each time, none of which is chosen
        order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
        tilt(guide, contexts, laws[:, order], 1.0)
        assert all(map(torch.equal, cached(), before))
    tilt(guide, contexts, laws, 1.0)
    assert laws.equal(given)


def test_a_token_costs_as_many_forwards_as_there_are_candidates() -> None:
    reward = RewardModel(REWARD, num_slots=8)
    guides = {"a": ARGSGuide(reward, num_candidates=6)}
    requests = [
        request(at, ids, guides={"a": 1.0}, ignore_eos=True, max_tokens=9)
        for at, ids in enumerate(texts(11, 3))
    ]
    run(guides, requests)
    assert reward.num_forwards == 3 * 9 * 6


def test_a_sequence_that_ended_makes_room_before_one_that_runs() -> None:
    reward = RewardModel(REWARD, num_slots=2)
    guide = ARGSGuide(reward, num_candidates=4)
    for key in (1, 2, 3):
        contexts = [context(key, texts(key)[0])]
        tilt(guide, contexts, laws_of(contexts), 1.0)
        if key == 2:
            guide.release([2])
    assert {row.key for row in reward.body._placement.rows} == {1, 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, words = tmp_path_factory.mktemp("models"), word_tokenizer()
    save_reward_model(root / "reward", tokenizer=words, seed=7)
    return {
        "base": save_base(root / "base", tokenizer=words),
        "args": save_reward_guide(root / "args", tokenizer=words, num_candidates=4, chunk_size=3),
        "cd": save_reward_guide(
            root / "cd", kind="controlled_decoding", tokenizer=words, num_candidates=None
        ),
        "elsewhere": save_reward_guide(
            root / "elsewhere", tokenizer=words, reward="../reward", num_candidates=4
        ),
        "pooled": save_reward_guide(
            root / "pooled", tokenizer=words, pooling="pooled", pool_length=9.0
        ),
        "foreign": save_reward_guide(root / "foreign", tokenizer=hh_tokenizer()),
        "typo": save_reward_guide(root / "typo", tokenizer=words, num_candidate=4),
    }


@pytest.mark.parametrize(
    ("guide", "reward", "num_candidates"),
    [("args", "args", 4), ("cd", "cd", None), ("elsewhere", "reward", 4)],
)
def test_a_saved_guide_is_loaded_and_decodes_by_its_formula(
    folders: dict[str, Path], guide: str, reward: str, num_candidates: int | None
) -> None:
    pilot = Pilot(folders["base"], guides={"g": folders[guide]}, num_slots=2)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    [done] = pilot.generate(["how do i make soup ?"], params, guides={"g": 1.5})
    base: Any = load_frozen(folders["base"])
    scorer: Any = load_frozen_scorer(folders["base"].parent / reward)
    ids = pilot.tokenizer("how do i make soup ?")["input_ids"]
    k = num_candidates or len(pilot.tokenizer)
    for token, logprob in zip(done.token_ids, done.logprobs, strict=True):
        law = args_law(plain_logprobs(base, ids), ids, k=k, w=1.5, reward=scorer)
        assert token == int(law.argmax())
        assert logprob == pytest.approx(law[token].item(), abs=1e-3)
        ids.append(token)
    steps = len(done.token_ids)
    assert pilot.num_forwards == steps + steps * k


def test_a_pooled_reward_is_another_reward(folders: dict[str, Path]) -> None:
    pilot = Pilot(folders["base"], guides={g: folders[g] for g in ("args", "pooled")})
    params = SamplingParams(temperature=0, max_tokens=8)
    one, other = (pilot.generate(["soup"], params, guides={g: 3.0})[0] for g in ("args", "pooled"))
    assert one.logprobs != other.logprobs


def test_folders_that_cannot_steer_this_base_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(VocabMismatchError, match="must share the base's token ids"):
        Pilot(folders["base"], guides={"g": folders["foreign"]})
    with pytest.raises(ConfigError, match="did you mean 'num_candidates'"):
        Pilot(folders["base"], guides={"g": folders["typo"]})
    lm = save_reward_guide(
        folders["base"].parent / "lm", tokenizer=word_tokenizer(), reward="../base"
    )
    with pytest.raises(CheckpointError, match="is no reward model"):
        Pilot(folders["base"], guides={"g": lm})


@pytest.mark.parametrize("settings", [ARGSSettings, ControlledDecodingSettings])
def test_a_length_that_would_be_ignored_is_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"pool_length is 35\.0, but pooling 'last'"):
        parse(settings, {"pool_length": 35.0}, source="card")
    assert parse(settings, {"pool_length": 35.0, "pooling": "pooled"}, source="card")
