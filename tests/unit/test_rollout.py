"""Rollouts of a proxy: what is drawn is what is served, and what is kept is what was asked."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from pilotfish.context import Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Drafting, FinishReason, SamplingParams, TokenEvent
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.train.experience import Episode, decisions
from pilotfish.train.recording import RecordingProxy
from pilotfish.train.rollout import Ask, collect, rollout_seed
from tests.fakes import drain, plain_logprobs, random_head, request, tiny_llama
from tests.learning import BASE, asks, proxy_settings, recording_engine

OTHER = tiny_llama(2).requires_grad_(False)
PROMPTS = [Prompt([(5 * i) % 16, 2, i + 1]) for i in range(5)]
FEATURES = ("post_token", "pre_token")


def new_guide(base: CausalLM, **variant: Any) -> ProxyGuide:
    settings = proxy_settings(**variant)
    return ProxyGuide(base, random_head(3, settings), settings)


def rollout(dtype: torch.dtype = torch.float16, **variant: Any) -> list[Episode]:
    base = CausalLM(BASE, num_slots=4)
    engine = recording_engine(new_guide(base, **variant), base, dtype=dtype, end_ids=frozenset([3]))
    wanted = asks(3, prompts=PROMPTS)
    return collect(engine, wanted, SamplingParams(max_tokens=9), proxy="proxy")


def busy_engine(recorded: bool, features: str) -> dict[int, list[TokenEvent]]:
    """Proxied and plain requests beside each other, more than there is room for."""
    base = CausalLM(BASE, num_slots=5, max_cache_tokens=3 * 128)
    guide = new_guide(base, features=features)
    engine = Engine(base, {"proxy": RecordingProxy(guide) if recorded else guide})
    for key in range(8):
        chain = {} if key % 3 == 1 else {"proxy": 1.0}
        prompt = [(3 * key + j) % 16 for j in range(30 + 6 * key)]
        engine.submit(request(key, prompt, guides=chain, seed=key, max_tokens=90, priority=-key))
    events = drain(engine)
    assert engine.num_preempted > 0
    return events


@pytest.mark.parametrize("features", FEATURES)
def test_a_recording_proxy_draws_what_is_drawn_without_one(features: str) -> None:
    """To the last bit, also where sequences lose their slots and others have no guide."""
    assert busy_engine(True, features) == busy_engine(False, features)


@pytest.mark.parametrize("features", FEATURES)
def test_records_are_what_plain_forwards_say(features: str) -> None:
    episodes = rollout(dtype=torch.float64, features=features, p_t=0.8)
    num_decisions = 0
    for episode in episodes:
        offers, ids = episode.offers, [*episode.prompt_ids, *episode.completion_ids]
        assert offers is not None
        starts = np.cumsum([0, *offers.counts_N])
        decided = iter(range(len(episode.positions_N)))
        for position, token in enumerate(episode.completion_ids):
            seen = ids[: len(episode.prompt_ids) + position]
            law = plain_logprobs(BASE, seen)
            ranked = law.argsort(descending=True)
            count = 1 + int((law[ranked].exp().cumsum(0) < 0.8).sum())
            if count == 1:
                assert position not in episode.positions_N
                assert token == ranked[0]
                continue
            at = next(decided)
            part = slice(starts[at], starts[at + 1])
            assert (episode.positions_N[at], offers.counts_N[at]) == (position, count)
            assert token == ranked[offers.choices_N[at]]
            np.testing.assert_allclose(offers.mass_M[part], law[ranked[:count]].exp(), atol=1e-9)
            drawn = (law[ranked[:count]] / 0.8).log_softmax(0)
            np.testing.assert_allclose(offers.logprobs_M[part], drawn, atol=1e-9)
            states = _states([seen, *([*seen, int(one)] for one in ranked[:count])])
            np.testing.assert_allclose(offers.states_ND[at], states[0], atol=1e-9)
            wanted = states[1:] if features == "post_token" else states[:1].expand(count, -1)
            np.testing.assert_allclose(offers.features_MF[part, :32], wanted, atol=1e-9)
            num_decisions += 1
        assert next(decided, None) is None
    assert num_decisions > 50
    assert {episode.finish_reason for episode in episodes} == set(FinishReason)


@torch.no_grad()
def _states(texts: list[list[int]]) -> torch.Tensor:
    rows = [BASE.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in texts]
    return torch.stack(rows)


def test_log_ratios_of_decisions_sum_to_that_of_all_tokens_behind_the_first() -> None:
    episodes = rollout(p_t=0.4)
    assert sum(len(one.completion_ids) - len(one.positions_N) for one in episodes) > 20, "forced"
    for episode in episodes:
        if len(episode.positions_N) == 0:
            continue
        ids = [*episode.prompt_ids, *episode.completion_ids]
        first = len(episode.prompt_ids) + episode.positions_N[0]
        base = sum(plain_logprobs(BASE, ids[:at])[ids[at]].item() for at in range(first, len(ids)))
        assert episode.base_logprobs_N.sum() == pytest.approx(base, abs=1e-5)


def test_a_rollout_depends_on_its_seeds_and_on_nothing_else() -> None:
    base = CausalLM(BASE, num_slots=3)
    engine = recording_engine(new_guide(base), base)
    params = SamplingParams(max_tokens=6)
    wanted = asks(2, prompts=PROMPTS)
    together = collect(engine, wanted, params, proxy="proxy")
    backwards = collect(engine, wanted[::-1], params, proxy="proxy")[::-1]
    for one, other in zip(together, backwards, strict=True):
        assert one.completion_ids.tolist() == other.completion_ids.tolist()
        np.testing.assert_allclose(one.logprobs_N, other.logprobs_N, atol=1e-6)
    later = collect(engine, asks(2, prompts=PROMPTS, iteration=1), params, proxy="proxy")
    assert _texts(later) != _texts(together)
    seeds = {
        rollout_seed(seed, iteration=iteration, prompt=prompt, sample=sample)
        for seed in range(3)
        for iteration in range(3)
        for prompt in range(3)
        for sample in range(3)
    }
    assert len(seeds) == 81


def _texts(episodes: list[Episode]) -> list[list[int]]:
    return [episode.completion_ids.tolist() for episode in episodes]


def test_a_later_record_of_the_same_place_replaces_the_first() -> None:
    """As drafting makes them: a drafted token was judged behind a draft that was then refused."""
    base, drafter = CausalLM(BASE, num_slots=2), CausalLM(OTHER, num_slots=2)
    recorder = RecordingProxy(new_guide(base), dtype=torch.float64)
    engine = Engine(base, {"proxy": recorder}, drafters={"small": drafter})
    asked = request(
        1,
        [4, 2],
        guides={"proxy": 1.0},
        draft=Drafting(model="small", num_tokens=3),
        max_tokens=30,
    )
    engine.submit(asked)
    events = drain(engine)[1]
    stats = engine.draft_stats
    assert stats.num_accepted < stats.num_drafted, "some were refused"
    episode = recorder.episode(asked, events)
    offers = episode.offers
    assert offers is not None
    ids = [4, 2, *episode.completion_ids]
    for at, position in enumerate(episode.positions_N):
        np.testing.assert_allclose(offers.states_ND[at], _states([ids[: 2 + position]])[0])


def test_an_episode_is_taken_once_and_whole() -> None:
    base = CausalLM(BASE)
    guide = new_guide(base, p_t=0.0)
    engine = recording_engine(guide, base)
    [episode] = collect(engine, [Ask(PROMPTS[0], 1)], SamplingParams(max_tokens=4), proxy="proxy")
    assert len(episode.completion_ids) == 4
    assert episode.offers is not None
    assert episode.positions_N.shape == episode.logprobs_N.shape == (0,)
    assert episode.offers.features_MF.shape == (0, 33)
    assert episode.offers.states_ND.shape == (0, 32)
    recorder = engine.guides["proxy"]
    assert isinstance(recorder, RecordingProxy)
    assert not recorder._asked


def test_experience_is_half_precision_and_survives_being_sent() -> None:
    episodes = rollout()
    sent = pickle.dumps(episodes, protocol=5, buffer_callback=(buffers := []).append)
    frozen = [memoryview(bytes(buffer)) for buffer in buffers]  # read-only, as a store gives them
    found = pickle.loads(sent, buffers=frozen)
    for before, after in zip(episodes, found, strict=True):
        assert before.offers is not None
        assert after.offers is not None
        for name in before.offers.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(before.offers, name), getattr(after.offers, name))
        assert before.completion_ids.tolist() == after.completion_ids.tolist()
        assert after.offers.features_MF.dtype == after.offers.states_ND.dtype == np.float16
        assert after.logprobs_N.dtype == np.float32
        num_candidates, num_decisions = after.offers.counts_N.sum(), len(after.positions_N)
        num_tokens = len(after.completion_ids) + len(after.prompt_ids)
        num_bytes = 82 * num_candidates + 84 * num_decisions + 4 * num_tokens  # 33 and 32 halves
        assert after.num_bytes == num_bytes
    torch.testing.assert_close(decisions(found).logprobs_ET, decisions(episodes).logprobs_ET)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"min_tokens": 2},
        {"logit_bias": {3: 1.0}},
    ],
)
def test_parameters_that_reshape_the_law_are_refused(setting: dict[str, Any]) -> None:
    base = CausalLM(BASE)
    engine = recording_engine(new_guide(base), base)
    with pytest.raises(ConfigError, match="Leave temperature, top_k, top_p"):
        collect(engine, asks(1), SamplingParams(**setting), proxy="proxy")


def test_a_prompt_that_cannot_be_decoded_is_refused_before_any_is() -> None:
    base = CausalLM(BASE)
    engine = recording_engine(new_guide(base), base)
    wanted = [*asks(1), Ask(Prompt([99]), 0)]
    with pytest.raises(PromptError, match="99"):
        collect(engine, wanted, SamplingParams(max_tokens=4), proxy="proxy")
    assert not engine.busy
