"""Transfer Q*: the law, against one rollout at a time without cache or batch."""

import math

import pytest
import torch

from pilotfish.guides.args_search import ARGSGuide
from pilotfish.guides.transfer_q import (
    TransferQGuide,
)
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.reward import RewardModel
from tests.enumerable import (
    TabularLM,
    TabularReward,
    context_of,
    greedy,
    guided,
    random_policy,
    random_reward,
    random_world,
)
from tests.fakes import (
    context,
    plain_logprobs,
    plain_reward,
    request,
    tiny_reward_model,
)
from tests.transfer_q import (
    BASE,
    BASELINE,
    REWARD,
    RHO,
    V,
    direct_law,
    indirect,
    law_over,
    new_guide,
    num_forwards,
    plain_rollout,
    rows,
    run,
    settings,
    texts,
    tilt,
)


@pytest.mark.parametrize("slots", [2, 7, 256])
def test_every_event_reports_the_law_of_the_formula(slots: int) -> None:
    """Through the engine: rows of different weights and lengths, in batches of any size."""
    config = settings(num_candidates=4, rollout_tokens=3, rollout_slots=slots)
    guides = {"q": new_guide(config, num_slots=8 + slots)}
    wanted = [(0.5, 0.0), (2.0, 1.0), (-1.0, 0.7)]
    prompts = texts(1, 3)
    requests = [
        request(at, prompts[at], guides={"q": w}, temperature=t, ignore_eos=True, max_tokens=6)
        for at, (w, t) in enumerate(wanted)
    ]
    for at, events in run(guides, requests).items():
        ids, (weight, _) = list(prompts[at]), wanted[at]
        for event in events:
            law = direct_law(plain_logprobs(BASE, ids), ids, k=4, w=weight, length=3)
            assert event.logprob == pytest.approx(law[event.token_id].item(), abs=1e-9)
            ids.append(event.token_id)


def test_without_a_length_rollouts_go_on_to_their_end_or_to_the_cap() -> None:
    contexts, laws = rows(2, 3)
    end = frozenset({0, 3, 7, 9})
    guide = new_guide(settings(num_candidates=5, max_rollout_tokens=9), end=end)
    found = tilt(guide, contexts, laws)
    lengths: set[int] = set()
    for row, one in enumerate(contexts):
        expected = direct_law(laws[row], one.token_ids, k=5, w=1.0, length=9, end=end)
        torch.testing.assert_close(found[row], expected)
        for token in laws[row].topk(5).indices.tolist():
            text = plain_rollout([*one.token_ids, token], 9, end=end)
            lengths.add(len(text) - len(one.token_ids) - 1)
    assert {0, 9} < lengths  # ended at once, in between, and not at all


def test_rollouts_stop_where_the_positions_of_a_model_end() -> None:
    short = tiny_reward_model(3, max_position_embeddings=12)
    guide = TransferQGuide(
        CausalLM(RHO), RewardModel(short), settings=settings(num_candidates=3), end_ids=frozenset()
    )
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    laws = plain_logprobs(BASE, ids)[None]
    for length in (9, 10, 11):
        one = context(1, [7] * (length - 9) + ids)
        law = tilt(guide, [one], laws)[0]
        expected = torch.full_like(law, -torch.inf)
        for token in laws[0].topk(3).indices.tolist():
            text = plain_rollout([*one.token_ids, token], 11 - length, end=frozenset())
            assert len(text) == 12
            expected[token] = laws[0, token] + plain_reward(short, text)
        torch.testing.assert_close(law, expected.log_softmax(-1))


def test_without_rollouts_it_is_args() -> None:
    contexts, laws = rows(3)
    config = settings(num_candidates=5, rollout_tokens=0)
    args = ARGSGuide(RewardModel(REWARD), num_candidates=5)
    for weight in (-1.0, 0.0, 2.0):
        found = tilt(new_guide(config), contexts, laws, weight)
        torch.testing.assert_close(found, tilt(args, contexts, laws, weight))


def test_one_candidate_is_the_mode_of_the_base_and_weight_zero_keeps_it() -> None:
    contexts, laws = rows(4)
    one = tilt(new_guide(settings(num_candidates=1, rollout_tokens=2)), contexts, laws, 30.0)
    assert one.exp().argmax(-1).tolist() == laws.argmax(-1).tolist()
    assert one.isfinite().sum(-1).tolist() == [1] * 4
    zero = tilt(new_guide(settings(num_candidates=6, rollout_tokens=2)), contexts, laws, 0.0)
    assert zero.argmax(-1).tolist() == laws.argmax(-1).tolist()


def test_an_end_token_is_worth_the_text_as_it_is() -> None:
    guide = new_guide(settings(num_candidates=2, rollout_tokens=4))
    law = tilt(guide, [context(1, [5, 3])], law_over(0, 7))[0]
    ended = plain_reward(REWARD, [5, 3, 0])
    other = plain_reward(REWARD, plain_rollout([5, 3, 7], 4))
    assert (law[0] - law[7]).item() == pytest.approx(ended - other, abs=1e-9)


def test_an_end_token_costs_one_text_and_no_rollout() -> None:
    guide = new_guide(settings(num_candidates=2, num_rollouts=3, rollout_tokens=4))
    tilt(guide, [context(1, [5, 3])], law_over(0))
    assert num_forwards(guide) == (1, 1 + 1)
    tilt(guide, [context(1, [5, 3])], law_over(0, 7))
    rollout, reward = num_forwards(guide)
    assert 1 + 1 < rollout <= 1 + 1 + 3 * 4
    assert reward == (1 + 1) + (1 + 1 + 3)


def test_tokens_that_an_earlier_guide_forbids_stay_forbidden_and_cost_nothing() -> None:
    contexts, laws = rows(5)
    laws = laws.index_fill(1, torch.arange(4, V), -torch.inf).log_softmax(-1)
    for proposal in ("base", "rollout"):
        guide = new_guide(settings(num_candidates=9, rollout_tokens=2, proposal=proposal))
        found = tilt(guide, contexts, laws, 3.0)
        assert found.isfinite().sum(-1).tolist() == [4] * 4
        assert num_forwards(guide)[1] == 4 + 4 * 4
        if proposal == "base":
            for row, one in enumerate(contexts):
                expected = direct_law(laws[row], one.token_ids, k=4, w=3.0, length=2)
                torch.testing.assert_close(found[row], expected)


def test_positions_of_one_sequence_are_answered_as_if_each_stood_alone() -> None:
    ids = texts(9)[0] * 2
    contexts = [context(1, ids[:3]), context(1, ids), context(2, [5, 6]), context(1, ids[:4])]
    laws = torch.stack([plain_logprobs(BASE, one.token_ids) for one in contexts])
    guide = new_guide(settings(num_candidates=3, rollout_tokens=3))
    for _ in range(2):
        found = tilt(guide, contexts, laws)
        for row, one in enumerate(contexts):
            expected = direct_law(laws[row], one.token_ids, k=3, w=1.0, length=3)
            torch.testing.assert_close(found[row], expected)


def test_the_incoming_law_stays_as_it_is() -> None:
    contexts, laws = rows(6)
    given = laws.clone()
    for proposal in ("base", "rollout"):
        tilt(new_guide(settings(rollout_tokens=1, proposal=proposal)), contexts, laws)
        assert laws.equal(given)


def test_candidates_come_from_the_incoming_law_and_rollouts_from_their_own_model() -> None:
    """Two handles: the base is never asked for a rollout, the rollout model never for a law."""
    base = CausalLM(BASE, num_slots=8)
    config = settings(num_candidates=4, rollout_tokens=3)
    guide = new_guide(config)
    requests = [
        request(at, ids, guides={"q": 1.0}, max_tokens=5, ignore_eos=True)
        for at, ids in enumerate(texts(13, 2))
    ]
    run({"q": guide}, requests, base)
    assert base.num_forwards == 2 * 5
    contexts, laws = rows(13)
    found = tilt(guide, contexts, laws)
    assert found.isfinite().equal(laws >= laws.topk(4).values[:, -1:])


@pytest.mark.parametrize(("num_rollouts", "length"), [(1, 3), (3, 2)])
def test_a_token_costs_what_the_formula_says(num_rollouts: int, length: int) -> None:
    """1 + k N L of the rollout model and 1 + k N of each reward model, from cached prefixes."""
    config = indirect if num_rollouts > 1 else settings
    guide = TransferQGuide(
        lm := CausalLM(RHO, num_slots=64),
        reward := RewardModel(REWARD, num_slots=64),
        second := RewardModel(BASELINE, num_slots=64) if num_rollouts > 1 else None,
        settings=config(num_candidates=4, num_rollouts=num_rollouts, rollout_tokens=length),
    )
    ids = texts(14, 1)[0]
    run({"q": guide}, [request(1, ids, guides={"q": 1.0}, max_tokens=6, ignore_eos=True)])
    texts_read = 4 * num_rollouts
    assert lm.num_forwards == 6 * (1 + texts_read * length)
    assert reward.num_forwards == 6 * (1 + texts_read)
    assert second is None or second.num_forwards == reward.num_forwards
    # Every rollout starts from a copy of its text's keys and values.
    prefixes = sum(len(ids) + at for at in range(6)) * texts_read
    assert lm.body.num_shared == reward.body.num_shared == prefixes


def test_rollouts_of_many_rows_leave_the_rows_own_texts_cached() -> None:
    """Eight rows with five rollouts each, seven at a time."""
    config = settings(num_candidates=5, rollout_tokens=2, rollout_slots=7)
    guide = new_guide(config, num_slots=8 + 7)
    contexts, laws = rows(15, 8)
    lm = guide._rollout
    assert isinstance(lm, CausalLM)
    for _ in range(3):
        before = lm.body.num_shared, sum(len(one.token_ids) for one in contexts)
        tilt(guide, contexts, laws)
        ended = laws.topk(5).indices.eq(0)
        not_rolled = sum(len(one.token_ids) for row, one in enumerate(contexts) if ended[row].any())
        assert lm.body.num_shared - before[0] == 5 * before[1] - not_rolled
        for one in contexts:
            one.token_ids.append(5)


@pytest.mark.parametrize("mode", ["direct", "indirect"])
def test_reference_parity_does_as_the_authors_program_does(mode: str) -> None:
    contexts, laws = rows(16, 3)
    extra = {"baseline_reward": ""} if mode == "indirect" else {}
    config = settings(mode=mode, reference_parity=True, num_candidates=4, **extra)
    found = tilt(new_guide(config), contexts, laws, 0.8)
    length = {"direct": 20, "indirect": 5}[mode]
    for row, one in enumerate(contexts):
        own = plain_logprobs(RHO, one.token_ids)
        expected = torch.full_like(own, -torch.inf)
        for token in own.topk(4).indices.tolist():
            text = plain_rollout([*one.token_ids, token], length)
            value = plain_reward(REWARD, text)
            if mode == "indirect":
                value *= math.exp(0.5 * (value - plain_reward(BASELINE, text)))
            expected[token] = own[token] + 0.8 * value
        torch.testing.assert_close(found[row], expected.log_softmax(-1))


def test_proposals_from_the_rollout_model_are_an_option_without_parity() -> None:
    contexts, laws = rows(17, 2)
    config = settings(num_candidates=3, rollout_tokens=2, proposal="rollout")
    found = tilt(new_guide(config), contexts, laws, 1.0)
    for row, one in enumerate(contexts):
        own = plain_logprobs(RHO, one.token_ids)
        expected = direct_law(own, one.token_ids, k=3, w=1.0, length=2)
        torch.testing.assert_close(found[row], expected)


def test_with_an_optimal_rollout_model_a_large_weight_finds_the_best_text() -> None:
    """And ARGS, which trusts the reward of half a text, does not."""
    led_astray = 0
    for seed in range(6):
        world = random_world(seed, vocab_size=3, horizon=4, end_id=0)
        best = max(map(world.reward, world.trajectories()))
        rho = TabularLM(greedy(world.optimal_policy(1e-3)), horizon=4)
        reward = TabularReward(world.reward, horizon=4)
        guide = TransferQGuide(rho, reward, settings=settings(), end_ids=frozenset({0}))
        found = world.expected_reward(guided(guide, world.base, 1e6))
        assert found == pytest.approx(best, abs=1e-9)
        args = world.expected_reward(guided(ARGSGuide(reward), world.base, 1e6))
        led_astray += args < best - 0.1
    assert led_astray >= 4


def test_no_guide_with_rollouts_earns_more_than_the_optimum_at_its_kl() -> None:
    for seed in range(4):
        world = random_world(seed, vocab_size=3, horizon=3)
        rho = TabularLM(greedy(world.optimal_policy(0.1)), horizon=3)
        reward = TabularReward(world.reward, horizon=3)
        guide = TransferQGuide(rho, reward, settings=settings(num_candidates=3))
        for weight in (0.3, 1.0, 4.0):
            policy = guided(guide, world.base, weight)
            bound = world.best_reward_at_kl(world.kl(policy))
            assert world.expected_reward(world.base) < world.expected_reward(policy)
            assert world.expected_reward(policy) < bound + 1e-9


def test_sequences_that_ended_are_released_everywhere() -> None:
    rho = TabularLM(random_policy(1), horizon=3)
    reward, second = (TabularReward(random_reward(seed), horizon=3) for seed in (2, 3))
    config = indirect(num_candidates=2, num_rollouts=2)
    guide = TransferQGuide(rho, reward, second, settings=config)
    tilt(guide, [context_of((), key=4)], random_policy(5)(())[None])
    for source in (rho, reward, second):
        assert sorted(source.released) == [-4, -3, -2, -1]
    guide.release([4])
    for source in (rho, reward, second):
        assert 4 in source.released
