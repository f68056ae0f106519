"""Which point is best, which are in the Pareto set, and what search algorithms are told."""

import random

import pytest

from tune.choice import Trial, best_of, nearest_to_feasible, pareto_set, scores, violations
from tune.config import Constraint, Objective

REWARD, LENGTH = Objective(metric="reward"), Objective(metric="length", mode="min")


def trial(
    number: int, reward: float, length: float = 0.0, *, complete: bool = True, broken: float = 0.0
) -> Trial:
    return Trial(
        number=number,
        knobs={"t": number},
        metrics={"reward": reward, "length": length},
        progress=8 if complete else 4,
        complete=complete,
        violations={"kl <= 1": broken} if broken else {},
    )


def test_the_best_point_ran_to_its_end_and_keeps_every_constraint():
    trials = [
        trial(0, 1.0),
        trial(1, 9.0, broken=0.1),
        trial(2, 5.0, complete=False),
        trial(3, 2.0),
    ]
    assert best_of(trials, [REWARD]) == trials[3]
    assert best_of(trials[1:3], [REWARD]) is None


def test_equals_are_told_apart_by_the_next_objective_and_then_by_who_came_first():
    trials = [trial(0, 1.0, 9), trial(1, 1.0, 3), trial(2, 1.0, 3)]
    assert best_of(trials, [REWARD, LENGTH]) == trials[1]


def test_the_pareto_set_is_what_no_other_point_dominates():
    rng = random.Random(0)
    trials = [trial(n, rng.randint(0, 9), rng.randint(0, 9)) for n in range(40)]

    def dominated(one: Trial) -> bool:
        a, b = one.metrics["reward"], one.metrics["length"]
        return any(
            other.metrics["reward"] >= a
            and other.metrics["length"] <= b
            and (other.metrics["reward"], other.metrics["length"]) != (a, b)
            for other in trials
        )

    front = pareto_set(trials, [REWARD, LENGTH])
    points = {(one.metrics["reward"], one.metrics["length"]) for one in front}
    assert len(points) == len(front) > 1
    assert points == {
        (one.metrics["reward"], one.metrics["length"]) for one in trials if not dominated(one)
    }


@pytest.mark.parametrize(
    ("written", "value", "broken"),
    [
        ("kl <= 6", 5.0, None),
        ("kl <= 6", 7.5, 0.25),
        ("kl >= 6", 3.0, 0.5),
        ("kl <= 0", 0.2, 0.2),
        ("kl >= 0.5 * base", 4.0, 0.2),
        ("kl >= 0.5 * base", 5.0, None),
    ],
)
def test_a_constraint_is_broken_by_a_share_of_its_bound(
    written: str, value: float, broken: float | None
):
    found = violations({"kl": value}, [Constraint.model_validate(written)], {"kl": 10.0})
    assert list(found.values()) == pytest.approx([] if broken is None else [broken])


def test_scores_put_feasible_points_first_and_then_those_that_break_least():
    def score(reward: float, broken: float = 0.0) -> float:
        metrics = {"reward": reward, "length": 1.0}
        return scores(metrics, {"c": broken} if broken else {}, [REWARD, LENGTH])["score_0"]

    assert score(-100.0) > score(100.0, broken=0.01) > score(100.0, broken=0.02)
    assert scores({"reward": 1.0, "length": 7.0}, {}, [REWARD, LENGTH]) == {
        "score_0": 1.0,
        "score_1": -7.0,
    }


def test_the_nearest_point_ran_to_its_end_if_any_did():
    trials = [trial(0, 1.0, broken=0.5), trial(1, 1.0, broken=0.1, complete=False)]
    assert nearest_to_feasible(trials) == trials[0]
