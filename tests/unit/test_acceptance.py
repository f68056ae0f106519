"""Accept or reject: every law against its definition, by enumeration or by draws."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pilotfish.guides.acceptance import accept_law, count_candidates, reject_to
from tests.acceptance_cases import (
    ORDERS,
    P_T_RULES,
    A,
    P,
    by_recursion,
    law_of,
    random_row,
    rules,
    solve,
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.2, 0.72, 0.04, 0.02, 0.02)),
        (
            {"candidate_order": "sample_no_repeat"},
            (0.122968, 0.584505, 0.152902, 0.116340, 0.023285),
        ),
        (
            {"candidate_order": "sample_no_repeat", "p_t_rule": "cumulative", "p_t": 0.6},
            (0.177835, 0.525061, 0.192969, 0.088444, 0.015691),
        ),
    ],
)
def test_laws_that_are_known_by_number(settings: dict[str, Any], expected: tuple) -> None:
    assert law_of(P, A, rules(**settings)) == pytest.approx(expected, abs=5.1e-7)


def test_resampling_without_end_weighs_candidates_by_their_acceptance() -> None:
    weighed = [p * a for p, a in zip(P, A, strict=True)]
    expected = [one / sum(weighed) for one in weighed]
    assert law_of(P, A, rules(candidate_order="iid")) == pytest.approx(expected, abs=1e-14)
    late = law_of(P, A, rules(candidate_order="iid", max_tries=200))
    assert late == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("fallback", ["last", "top1"])
@pytest.mark.parametrize("spread", [1.0, 30.0, 70.0, 500.0])
def test_the_race_gives_the_sum_over_all_orders(fallback: str, spread: float) -> None:
    generator = np.random.default_rng(int(spread))
    which = rules(candidate_order="sample_no_repeat", fallback=fallback)
    for num in range(1, 9):
        probs, accept = random_row(generator, num, spread)
        expected, rejects = by_recursion(probs, accept, fallback=fallback)
        found = solve(probs, accept, which)
        assert found.law_RK[0].tolist() == pytest.approx(expected, abs=1e-12)
        assert found.rejects_R.item() == pytest.approx(rejects, abs=1e-12)


@pytest.mark.parametrize(
    "groups",
    [
        [(1.0, 0.3, 40)],
        [(1.0, 1e-4, 20), (0.5, 0.9, 20)],
        [(1.0, 0.0, 10), (1e-3, 0.2, 15), (1e-12, 1.0, 15)],
        [(1.0, 0.0, 39), (1e-30, 0.5, 1)],
        [(1.0, 1e-3, 20), (0.7, 0.0, 20)],
    ],
)
def test_the_race_is_exact_for_forty_candidates(groups: list[tuple[float, float, int]]) -> None:
    """Candidates that are alike are interchangeable, so that counts are enough to enumerate."""
    total = sum(weight * size for weight, _, size in groups)
    num = sum(size for _, _, size in groups)
    law = [0.0] * len(groups)
    reach = {(0,) * len(groups): 1.0}
    for turn in range(num):
        longer: dict[tuple[int, ...], float] = {}
        for gone, chance in reach.items():
            left = [size - out for (_, _, size), out in zip(groups, gone, strict=True)]
            mass = math.fsum(weight * n for (weight, _, _), n in zip(groups, left, strict=True))
            for g, (weight, accept, _) in enumerate(groups):
                offered = chance * left[g] * weight / mass
                law[g] += offered * (1 if turn == num - 1 else accept)
                key = (*gone[:g], gone[g] + 1, *gone[g + 1 :])
                if left[g]:
                    longer[key] = longer.get(key, 0.0) + offered * (1 - accept)
        reach = longer
    probs = [weight / total for weight, _, size in groups for _ in range(size)]
    accept = [one for _, one, size in groups for _ in range(size)]
    expected = [
        one / size for one, (_, _, size) in zip(law, groups, strict=True) for _ in range(size)
    ]
    found = law_of(probs, accept, rules(candidate_order="sample_no_repeat"))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("fallback", ["last", "top1"])
@pytest.mark.parametrize("p_t", [0.0, 0.3, 0.8, 0.99, 1.0])
def test_the_sum_over_sets_obeys_the_bound_on_rejected_mass(fallback: str, p_t: float) -> None:
    generator = np.random.default_rng(3)
    which = rules(
        candidate_order="sample_no_repeat", p_t_rule="cumulative", p_t=p_t, fallback=fallback
    )
    for num in range(1, 8):
        probs, accept = random_row(generator, num, 4.0)
        limit = p_t if p_t < 1 else math.inf
        expected, rejects = by_recursion(probs, accept, fallback=fallback, limit=limit)
        found = solve(probs, accept, which)
        assert found.law_RK[0].tolist() == pytest.approx(expected, abs=1e-13)
        assert found.rejects_R.item() == pytest.approx(rejects, abs=1e-12)


def test_without_a_bound_the_sum_over_sets_is_the_race() -> None:
    probs, accept = random_row(np.random.default_rng(5), 12, 6.0)
    race = rules(candidate_order="sample_no_repeat")
    sets = rules(candidate_order="sample_no_repeat", p_t_rule="cumulative")
    assert law_of(probs, accept, race) == pytest.approx(law_of(probs, accept, sets), abs=1e-12)


def draw_without_repeat(limit: float, num_draws: int, generator: np.random.Generator) -> Any:
    """Emitted candidate and rejections of many draws, played move by move."""
    probs, accept = np.array(P), np.array(A)
    gone = np.zeros((num_draws, len(P)), dtype=bool)
    emitted, rejects = np.full(num_draws, -1), np.zeros(num_draws)
    for turn in range(len(P)):
        left = np.where(gone, 0.0, probs)
        passed = left.cumsum(1) > generator.random((num_draws, 1)) * left.sum(1, keepdims=True)
        pick = passed.argmax(1)
        must = (gone @ probs + probs[pick] > limit) | (turn == len(P) - 1)
        taken = must | (generator.random(num_draws) < accept[pick])
        rejects += (emitted < 0) & ~taken
        emitted = np.where((emitted < 0) & taken, pick, emitted)
        gone[np.arange(num_draws), pick] = True
    return emitted, rejects


def draw_iid(tries: int, num_draws: int, generator: np.random.Generator) -> Any:
    emitted, rejects = np.full(num_draws, -1), np.zeros(num_draws)
    for turn in range(tries):
        pick = generator.choice(len(P), num_draws, p=P)
        taken = (generator.random(num_draws) < np.array(A)[pick]) | (turn == tries - 1)
        rejects += (emitted < 0) & ~taken
        emitted = np.where((emitted < 0) & taken, pick, emitted)
    return emitted, rejects


@pytest.mark.parametrize(
    ("settings", "play"),
    [
        ({"candidate_order": "sample_no_repeat"}, lambda *a: draw_without_repeat(2.0, *a)),
        (
            {"candidate_order": "sample_no_repeat", "p_t_rule": "cumulative", "p_t": 0.6},
            lambda *a: draw_without_repeat(0.6, *a),
        ),
        ({"candidate_order": "iid", "max_tries": 3}, lambda *a: draw_iid(3, *a)),
        ({"candidate_order": "iid"}, lambda *a: draw_iid(100, *a)),
    ],
)
def test_draws_follow_the_law_and_reject_as_often_as_expected(
    settings: dict[str, Any], play: Callable
) -> None:
    num = 200_000
    emitted, rejects = play(num, np.random.default_rng(1))
    found = solve(P, A, rules(**settings))
    for place, chance in enumerate(found.law_RK[0].tolist()):
        sigma = math.sqrt(chance * (1 - chance) / num)
        assert abs((emitted == place).mean() - chance) < 4 * sigma
    assert abs(rejects.mean() - found.rejects_R.item()) < 4 * rejects.std() / math.sqrt(num)


@pytest.mark.parametrize("fallback", ["last", "top1"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("p_t_rule", P_T_RULES)
def test_laws_sum_to_one_and_padding_neither_matters_nor_is_emitted(
    order: str, p_t_rule: str, fallback: str
) -> None:
    generator = np.random.default_rng(11)
    which = rules(candidate_order=order, p_t_rule=p_t_rule, p_t=0.4, fallback=fallback)
    rows = [random_row(generator, num, 3.0) for num in (7, 5, 3, 1)]
    probs_RK = torch.tensor([[*probs, *[0.7] * (7 - len(probs))] for probs, _ in rows])
    accept_RK = torch.tensor([[*a, *[math.nan] * (7 - len(a))] for _, a in rows])
    counts = [int(count_candidates(torch.tensor([probs]), which)) for probs, _ in rows]
    found = accept_law(probs_RK.double(), accept_RK.double(), torch.tensor(counts), which)
    torch.testing.assert_close(found.law_RK.sum(-1), torch.ones(4, dtype=torch.float64))
    for row, (probs, accept) in enumerate(rows):
        assert found.law_RK[row, counts[row] :].abs().sum() == 0
        alone = solve(probs, accept, which)
        expected = alone.law_RK[0, : counts[row]].tolist()
        assert found.law_RK[row, : counts[row]].tolist() == pytest.approx(expected, abs=1e-6)
        assert found.rejects_R[row].item() == pytest.approx(alone.rejects_R.item(), abs=1e-6)
        if order != "iid":
            assert -1e-12 <= found.rejects_R[row].item() <= counts[row] - 1 + 1e-12
    assert found.rejects_R[3].item() == pytest.approx(0, abs=1e-12)


def test_ordered_candidates_reach_any_law() -> None:
    target = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3], dtype=torch.float64)
    accept = target / target.flip(0).cumsum(0).flip(0)
    assert law_of(P, accept, rules()) == pytest.approx(target.tolist(), abs=1e-15)


def test_rejecting_to_a_fallback_law_lies_between_the_two() -> None:
    torch.manual_seed(0)
    p_RV, q_RV, mu_RV = (torch.rand(3, 6, dtype=torch.float64) for _ in range(3))
    p_RV, q_RV = p_RV / p_RV.sum(-1, keepdim=True), q_RV / q_RV.sum(-1, keepdim=True)
    torch.testing.assert_close(reject_to(p_RV, torch.zeros_like(mu_RV), q_RV), p_RV)
    torch.testing.assert_close(reject_to(p_RV, torch.ones_like(mu_RV), q_RV), q_RV)
    mixed_RV = reject_to(p_RV, mu_RV, q_RV)
    torch.testing.assert_close(mixed_RV.sum(-1), torch.ones(3, dtype=torch.float64))
    for v in range(6):
        terms = [p_RV[0, w] * mu_RV[0, w] * q_RV[0, v] for w in range(6)]
        expected = p_RV[0, v] * (1 - mu_RV[0, v]) + sum(terms)
        assert mixed_RV[0, v].item() == pytest.approx(float(expected), abs=1e-15)


def test_two_tries_are_a_rejection_to_the_base_itself() -> None:
    probs_RV, accept_RV = torch.tensor([P]).double(), torch.tensor([A]).double()
    twice = law_of(P, A, rules(candidate_order="iid", max_tries=2))
    assert twice == pytest.approx(reject_to(probs_RV, 1 - accept_RV, probs_RV)[0].tolist())
    assert law_of(P, A, rules(candidate_order="iid", max_tries=1)) == pytest.approx(P)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("p_t_rule", P_T_RULES)
def test_gradients_are_those_of_the_law(order: str, p_t_rule: str) -> None:
    which = rules(candidate_order=order, p_t_rule=p_t_rule, p_t=0.3)
    probs_RK = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.9, 0.1, 0.0, 0.0]], dtype=torch.float64)

    def law(accept_RK: Tensor) -> Tensor:
        return accept_law(probs_RK, accept_RK, torch.tensor([4, 2]), which).law_RK

    accept_RK = torch.tensor([[0.3, 0.6, 0.9, 0.5], [0.4, 0.8, 0.5, 0.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(law, accept_RK.requires_grad_())
    for edge in (0.0, 1.0):
        at_edge_RK = torch.full((2, 4), edge, dtype=torch.float64, requires_grad=True)
        law(at_edge_RK)[:, 0].sum().backward()
        assert at_edge_RK.grad is not None
        assert at_edge_RK.grad.isfinite().all()
