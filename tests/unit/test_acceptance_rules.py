"""What the settings of accepting and rejecting mean, and where they meet the base."""

import numpy as np
import pytest
import torch

from pilotfish.config import parse
from pilotfish.errors import ConfigError
from pilotfish.guides.acceptance import AcceptRules, count_candidates
from tests.acceptance_cases import ORDERS, P_T_RULES, A, P, law_of, random_row, rules, solve


def test_a_constant_proxy_is_the_base_when_resampling_but_not_without_repeats() -> None:
    for constant, far in ((0.7, 0.076), (0.5, 0.155), (0.3, 0.306)):
        accept = [constant] * 5
        for tries in (None, 1, 4):
            iid = law_of(P, accept, rules(candidate_order="iid", max_tries=tries))
            assert iid == pytest.approx(P, abs=1e-14)
        law = law_of(P, accept, rules(candidate_order="sample_no_repeat"))
        distance = sum(abs(one - p) for one, p in zip(law, P, strict=True)) / 2
        assert distance == pytest.approx(far, abs=5e-4)


@pytest.mark.parametrize("p_t_rule", P_T_RULES)
def test_a_proxy_that_accepts_everything_is_the_base(p_t_rule: str) -> None:
    which = {"p_t_rule": p_t_rule, "p_t": 0.0 if p_t_rule == "min_prob" else 1.0}
    assert law_of(P, [1.0] * 5, rules(**which)) == [1, 0, 0, 0, 0]
    for order in ("sample_no_repeat", "iid"):
        found = solve(P, [1.0] * 5, rules(candidate_order=order, **which))
        assert found.law_RK[0].tolist() == pytest.approx(P, abs=1e-12)
        assert found.rejects_R.item() == pytest.approx(0, abs=1e-12)


def test_a_proxy_that_rejects_everything_emits_the_fallback() -> None:
    assert law_of(P, [0.0] * 5, rules()) == [0, 0, 0, 0, 1]
    for order in ORDERS:
        top = law_of(P, [0.0] * 5, rules(candidate_order=order, fallback="top1"))
        assert top == pytest.approx([1, 0, 0, 0, 0], abs=1e-12)
    for tries in (None, 4):
        last = law_of(P, [0.0] * 5, rules(candidate_order="iid", max_tries=tries))
        assert last == pytest.approx(P, abs=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_p_t_of_zero_is_the_base_for_any_proxy(order: str) -> None:
    """`cumulative` lets nothing be rejected, `nucleus` leaves the top token alone."""
    base = pytest.approx((1, 0, 0, 0, 0) if order == "ordered" else P, abs=1e-12)
    none = rules(candidate_order=order, p_t_rule="cumulative", p_t=0.0)
    top = rules(candidate_order=order, p_t=0.0)
    for seed in range(5):
        accept = np.random.default_rng(seed).random(5).tolist()
        assert law_of(P, accept, none) == base
        assert law_of(P, accept, top) == pytest.approx([1, 0, 0, 0, 0], abs=1e-12)


def test_p_t_bounds_what_may_be_rejected() -> None:
    """Halves and quarters, so that masses meet p_t exactly."""
    probs, never = [0.5, 0.25, 0.125, 0.125], [0.0] * 4
    last = [1, 1, 1, 2, 2, 3, 4]
    for p_t, place in zip((0.0, 0.4, 0.5, 0.6, 0.75, 0.8, 1.0), last, strict=True):
        assert count_candidates(torch.tensor([probs]), rules(p_t=p_t)).item() == place
        assert law_of(probs, never, rules(p_t=p_t))[place - 1] == 1
    # Rejecting as much as p_t is allowed, so that at equality one more candidate is reached.
    cumulative = [1, 1, 2, 2, 3, 3, 4]
    for p_t, place in zip((0.0, 0.4, 0.5, 0.6, 0.75, 0.8, 1.0), cumulative, strict=True):
        assert law_of(probs, never, rules(p_t_rule="cumulative", p_t=p_t))[place - 1] == 1


def test_rules_of_mass_agree_in_order_away_from_equality_and_differ_when_sampled() -> None:
    generator = np.random.default_rng(2)
    for _ in range(30):
        probs, accept = random_row(generator, 6, 3.0)
        p_t = float(generator.random())
        same = [rules(p_t_rule=rule, p_t=p_t) for rule in ("nucleus", "cumulative")]
        assert law_of(probs, accept, same[0]) == pytest.approx(law_of(probs, accept, same[1]))
    sampled = {"candidate_order": "sample_no_repeat", "p_t": 0.6}
    nucleus, cumulative = (law_of(P, A, rules(p_t_rule=r, **sampled)) for r in P_T_RULES[:2])
    assert max(abs(a - b) for a, b in zip(nucleus, cumulative, strict=True)) > 0.01


def test_a_larger_p_t_keeps_every_candidate_and_a_larger_floor_adds_none() -> None:
    mass_RK = torch.tensor([random_row(np.random.default_rng(s), 9, 5.0)[0] for s in range(20)])
    grid = [step / 20 for step in range(21)]
    for rule, sign in (("nucleus", 1), ("min_prob", -1)):
        counts = torch.stack([count_candidates(mass_RK, rules(p_t_rule=rule, p_t=x)) for x in grid])
        assert (sign * counts.diff(dim=0) >= 0).all()
        ends = counts[[0, -1]] if sign > 0 else counts[[-1, 0]]
        assert (ends[0] == 1).all()
        assert (ends[1] == 9).all()


def test_forbidden_tokens_are_no_candidates() -> None:
    mass_RK = torch.tensor([[0.9, 0.1, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    for rule in P_T_RULES:
        which = rules(p_t_rule=rule, p_t=0.0 if rule == "min_prob" else 1.0)
        assert count_candidates(mass_RK, which).tolist() == [2, 1]


@pytest.mark.parametrize("order", ORDERS)
def test_the_literal_rule_accepts_what_the_base_thinks_unlikely(order: str) -> None:
    """One rejection of a near-certain token ends at a near-impossible one."""
    probs = [0.98, 0.01, 0.006, 0.004]
    literal = law_of(probs, [0.0] * 4, rules(candidate_order=order, p_t_rule="literal", p_t=0.05))
    assert literal[0] == pytest.approx(0, abs=1e-12)
    if order == "ordered":
        assert literal == [0, 1, 0, 0]
    else:
        assert literal == pytest.approx([0, 0.5, 0.3, 0.2], abs=1e-12)
    nucleus = law_of(probs, [0.0] * 4, rules(candidate_order=order, p_t=0.95))
    assert nucleus == pytest.approx([1, 0, 0, 0], abs=1e-12)


def test_what_cannot_be_computed_or_honoured_is_refused() -> None:
    which = rules(candidate_order="sample_no_repeat", p_t_rule="cumulative", p_t=0.5)
    with pytest.raises(ConfigError, match=r"13 candidates.*at most 12.*Lower top_k"):
        law_of([1 / 13] * 13, [0.5] * 13, which)
    with pytest.raises(ConfigError, match="only candidate_order=iid counts tries; got ordered"):
        parse(AcceptRules, {"max_tries": 3}, source="here")
    with pytest.raises(ConfigError, match="p_t"):
        parse(AcceptRules, {"p_t": 1.5}, source="here")
