"""Rollouts: exact draws, the same whatever runs beside them."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from pilotfish.context import Context, Prompt
from pilotfish.guides.rollouts import Rollout, roll_out
from pilotfish.guides.transfer_q import (
    TransferQGuide,
)
from pilotfish.models.causal_lm import CausalLM
from tests.enumerable import (
    TabularLM,
    TabularReward,
    context_of,
    guided,
    random_policy,
    random_world,
)
from tests.fakes import (
    request,
)
from tests.transfer_q import (
    END,
    RHO,
    new_guide,
    plain_rollout,
    run,
    settings,
    texts,
)


def rolled(starts: Sequence[list[int]], keys: Sequence[int], **changes: Any) -> list[list[int]]:
    lm = CausalLM(RHO, num_slots=changes.pop("num_slots", 32))
    made = [
        Rollout(Context(-1 - at, Prompt(ids[:1]), list(ids)), len(ids) + 8, key)
        for at, (ids, key) in enumerate(zip(starts, keys, strict=True))
    ]
    given: dict[str, Any] = {"end_ids": END, "temperature": 0.9, "at_once": 32, **changes}
    roll_out(lm, made, **given)
    return [one.context.token_ids for one in made]


def test_a_rollout_is_the_same_whatever_runs_beside_it() -> None:
    starts, keys = texts(10, 12), list(range(100, 112))
    together = rolled(starts, keys)
    assert [rolled([ids], [key])[0] for ids, key in zip(starts, keys, strict=True)] == together
    assert rolled(starts, keys, at_once=5, num_slots=3) == together
    assert rolled(starts[::-1], keys[::-1])[::-1] == together
    assert len({len(ids) - len(start) for ids, start in zip(together, starts, strict=True)}) > 1


def test_the_draws_depend_on_the_key_and_greedy_ones_do_not() -> None:
    starts = [[3, 1, 4]] * 30
    assert len({tuple(ids) for ids in rolled(starts, range(30))}) > 25
    assert len({tuple(ids) for ids in rolled(starts, [7] * 30)}) == 1
    [only] = {tuple(ids) for ids in rolled(starts, range(30), temperature=0.0)}
    assert list(only) == plain_rollout([3, 1, 4], 8)


def test_temperature_tempers_every_draw() -> None:
    law = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        lm = TabularLM(lambda prefix: law.log(), horizon=1)
        drawn = [Rollout(context_of((), -1 - at), 2, noise_key=at) for at in range(4000)]
        roll_out(lm, drawn, end_ids=END, temperature=temperature, at_once=4000)
        counts = torch.bincount(torch.tensor([one.context.token_ids[1] for one in drawn]))
        wanted = law ** (1 / temperature)
        expected = 4000 * wanted / wanted.sum()
        assert ((counts - expected).abs() < 4 * expected.sqrt()).all()


def test_rollouts_follow_the_law_of_their_model() -> None:
    """The mean reward of 3,000 rollouts is the model's expectation, for every candidate."""
    world = random_world(5, vocab_size=3, horizon=4, end_id=0)
    rho = random_policy(6, vocab_size=3, horizon=4)
    config = settings(num_candidates=3, num_rollouts=3000, rollout_slots=512)
    guide = TransferQGuide(
        lm := TabularLM(rho, horizon=4),
        TabularReward(world.reward, horizon=4),
        settings=config,
        end_ids=frozenset({0}),
    )
    policy = guided(guide, world.base, 1.0)
    for prefix in ((), (1,), (2, 1)):
        values = policy(prefix) - world.base(prefix)
        exact = [world.expected_reward(rho, (*prefix, token)) for token in range(3)]
        found = (values - values[0]).tolist()
        for token in range(3):
            spread = world.law(rho, (*prefix, token))
            square = sum(p * world.reward(one) ** 2 for one, p in spread.items())
            error = math.sqrt(max(0.0, square - exact[token] ** 2) / 3000) + 1e-9
            # Token 0 ends the text, so its value is exact.
            assert abs(found[token] - (exact[token] - exact[0])) < 4 * error
    assert lm.num_forwards > 3000


def test_requests_with_sampled_rollouts_write_the_same_alone_and_in_a_batch() -> None:
    config = settings(num_candidates=3, num_rollouts=2, rollout_tokens=3)
    requests = [
        request(at, ids, guides={"q": 2.0}, max_tokens=4 + at, seed=at, ignore_eos=True)
        for at, ids in enumerate(texts(12, 5))
    ]
    together = run({"q": new_guide(config)}, requests)
    for one in requests:
        alone = run({"q": new_guide(config, num_slots=4)}, [one])[one.key]
        assert [e.token_id for e in alone] == [e.token_id for e in together[one.key]]
