"""Candidates, proxies and rules that tests of acceptance share."""

import math
from typing import Any

import numpy as np
import torch

from pilotfish.guides.acceptance import AcceptLaw, AcceptRules, accept_law, count_candidates

P, A = (0.5, 0.25, 0.12, 0.08, 0.05), (0.2, 0.9, 0.5, 0.5, 0.1)
ORDERS = ("ordered", "sample_no_repeat", "iid")
P_T_RULES = ("nucleus", "cumulative", "min_prob", "literal")


def rules(**settings: Any) -> AcceptRules:
    return AcceptRules(**{"p_t": 1.0, **settings})


def solve(probs: Any, accept: Any, which: AcceptRules) -> AcceptLaw:
    """The law of one row, all of whose entries may be offered as far as the rules allow it."""
    probs_RK = torch.as_tensor(probs, dtype=torch.float64)[None]
    accept_RK = torch.as_tensor(accept, dtype=torch.float64)[None]
    return accept_law(probs_RK, accept_RK, count_candidates(probs_RK, which), which)


def law_of(probs: Any, accept: Any, which: AcceptRules) -> list[float]:
    return solve(probs, accept, which).law_RK[0].tolist()


def random_row(generator: np.random.Generator, num: int, spread: float) -> tuple[Any, Any]:
    """Descending probabilities over `spread` nats, and accept probabilities with 0 and 1 among."""
    probs = np.sort(np.exp(-spread * generator.random(num)))[::-1]
    accept = generator.choice([0.0, 1.0, 1e-3, -1.0], num, p=[0.1, 0.1, 0.1, 0.7])
    accept = np.where(accept < 0, generator.random(num), accept)
    return (probs / probs.sum()).tolist(), accept.tolist()


def by_recursion(
    probs: list[float],
    accept: list[float],
    *,
    fallback: str,
    limit: float = math.inf,
    mass: list[float] | None = None,
) -> tuple[list[float], float]:
    """Law and expected rejections without replacement, from the definition: offer one of those
    that are left, and accept it or go on. Rejected mass never exceeds `limit`."""
    num, mass = len(probs), mass or probs
    law = [0.0] * num
    reach = {frozenset[int](): 1.0}
    expected = -1.0
    for _ in range(num):
        longer: dict[frozenset[int], float] = {}
        for rejected, chance in reach.items():
            left = set(range(num)) - rejected
            total = math.fsum(probs[j] for j in left)
            for j in left:
                offered = chance * probs[j] / total
                expected += offered
                both = rejected | {j}
                must = math.fsum(mass[i] for i in both) > limit
                must = must or (fallback == "last" and len(both) == num)
                law[j] += offered * (1.0 if must else accept[j])
                if not must:
                    longer[both] = longer.get(both, 0.0) + offered * (1 - accept[j])
        reach = longer
    law[0] += sum(reach.values())
    return law, expected
