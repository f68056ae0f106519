import itertools
import math
import random
import statistics

import pytest

from pilotfish.evaluation.pareto import (
    decile_shifts,
    hypervolume,
    mip,
    non_dominated,
    recovered_gap,
    spearman,
    worst_point,
)


def random_points(seed: int, num: int = 40) -> list[tuple[float, float]]:
    """Small whole numbers, so that points share values and some are equal."""
    rng = random.Random(seed)
    return [(float(rng.randint(0, 12)), float(rng.randint(0, 12))) for _ in range(num)]


@pytest.mark.parametrize("seed", range(5))
def test_a_point_stays_unless_another_is_better_somewhere_and_worse_nowhere(seed: int):
    points = random_points(seed, num=12)

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    want = [at for at, p in enumerate(points) if not any(beats(other, p) for other in points)]
    assert non_dominated(points) == want


def test_dominance_is_for_any_number_of_objectives():
    assert non_dominated([(1, 1, 1), (1, 1, 2), (2, 0, 0), (1, 1, 2)]) == [1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_the_hypervolume_is_the_number_of_unit_squares_that_some_point_dominates(seed: int):
    points, reference = random_points(seed), (3.0, 4.0)
    squares = itertools.product(range(3, 13), range(4, 13))
    want = sum(any(x >= a + 1 and y >= b + 1 for x, y in points) for a, b in squares)
    assert hypervolume(points, reference) == want


def test_points_that_do_not_reach_the_reference_add_nothing():
    assert hypervolume([(2.0, 3.0), (-1.0, 9.0), (9.0, 0.0)], (0.0, 0.0)) == 6.0
    assert hypervolume([], (0.0, 0.0)) == 0.0


def test_the_reference_is_the_worst_of_all_methods_in_each_objective():
    assert worst_point([(1.0, 5.0), (3.0, 2.0)], [(2.0, 4.0)], [(7.0, 7.0)]) == (1.0, 2.0)


def test_mip_weighs_what_each_preference_was_given():
    points = [(4.0, -1.0), (2.0, 2.0), (0.0, 3.0)]
    alphas = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    assert mip(points, alphas) == pytest.approx((4.0 + 2.0 + 3.0) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_without_ties_is_the_formula_of_squared_rank_differences(seed: int):
    rng = random.Random(seed)
    xs, ys = ([rng.random() for _ in range(15)] for _ in range(2))
    rank = [[sorted(side).index(value) for value in side] for side in (xs, ys)]
    squares = sum((a - b) ** 2 for a, b in zip(*rank, strict=True))
    assert spearman(xs, ys) == pytest.approx(1 - 6 * squares / (15 * (15**2 - 1)))


def test_spearman_gives_ties_their_mean_rank_and_a_constant_no_number():
    ranks = [1.0, 2.5, 2.5, 4.0]
    want = statistics.correlation(ranks, [1.0, 2.0, 4.0, 3.0])
    assert spearman([0.0, 7.0, 7.0, 9.0], [1.0, 2.0, 9.0, 4.0]) == pytest.approx(want)
    assert math.isnan(spearman([1.0, 1.0], [1.0, 2.0]))


def test_the_recovered_gap_is_the_share_of_the_way_to_the_strong_model():
    base, guided, strong = [0.0, 2.0, 1.0], [1.0, 4.0, 1.0], [4.0, 4.0, 4.0]
    assert recovered_gap(base, guided, strong).value == pytest.approx((2 - 1) / (4 - 1), abs=1e-6)
    assert recovered_gap(base, base, strong).value == 0.0


def test_its_interval_is_that_of_all_resamples_of_a_small_set():
    base, guided = [0.0, 1.0, -1.0, 0.5, 0.2], [2.0, 1.5, 0.5, 2.5, 0.7]
    strong = [3.0, 4.0, 2.5, 2.0, 3.5]
    shares = sorted(
        (sum(guided[at] for at in draw) - sum(base[at] for at in draw))
        / (sum(strong[at] for at in draw) - sum(base[at] for at in draw))
        for draw in itertools.product(range(5), repeat=5)
    )
    found = recovered_gap(base, guided, strong)
    assert found.low == pytest.approx(shares[round(0.025 * len(shares))], abs=0.03)
    assert found.high == pytest.approx(shares[round(0.975 * len(shares))], abs=0.03)


def test_pairing_removes_what_makes_a_prompt_hard_from_the_recovered_gap():
    rng = random.Random(0)
    hard = [rng.gauss(0, 10) for _ in range(200)]
    found = recovered_gap(hard, [one + 1 for one in hard], [one + 2 for one in hard])
    assert found.low == pytest.approx(0.5, abs=1e-6)
    assert found.high == pytest.approx(0.5, abs=1e-6)


def test_a_shift_of_the_whole_distribution_moves_every_decile_by_as_much():
    rng = random.Random(1)
    before = [rng.gauss(0, 1) for _ in range(300)]
    shifts = decile_shifts([one + 0.5 for one in before], before)
    assert [shift.value for shift in shifts] == pytest.approx([0.5] * 9, abs=1e-6)
    assert all(shift.low > 0 for shift in shifts)


def test_a_gain_of_the_upper_half_alone_leaves_the_lower_deciles_where_they_were():
    before = [float(value) for value in range(101)]
    after = [value + 10 if value > 50 else value for value in before]
    shifts = decile_shifts(after, before)
    deciles = [statistics.quantiles(side, n=10, method="inclusive") for side in (after, before)]
    want = [ours - theirs for ours, theirs in zip(*deciles, strict=True)]
    assert [shift.value for shift in shifts] == pytest.approx(want, abs=1e-6)
    assert want[:4] == [0.0] * 4
    assert want[5:] == [10.0] * 4
    assert not shifts[0].low > 0


def test_the_interval_of_a_decile_is_that_of_prompts_drawn_again():
    """The median of a noisy gain, against a bootstrap in plain Python with draws of its own."""
    rng = random.Random(2)
    before = [rng.gauss(0, 1) for _ in range(60)]
    after = [value + rng.gauss(0.5, 1) for value in before]
    drawn: list[float] = []
    for _ in range(2000):
        places = rng.choices(range(60), k=60)
        drawn.append(
            statistics.median(after[at] for at in places)
            - statistics.median(before[at] for at in places)
        )
    drawn.sort()
    found = decile_shifts(after, before)[4]
    assert found.low == pytest.approx(drawn[50], abs=0.05)
    assert found.high == pytest.approx(drawn[1950], abs=0.05)
