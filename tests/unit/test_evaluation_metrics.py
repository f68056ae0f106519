import itertools
import math
import random
import statistics

import pytest

from pilotfish.evaluation.metrics import compare, distinct, estimate, share


def test_the_standard_error_is_the_sample_deviation_over_the_root_of_n():
    values = [1.0, 4.0, -2.5, 0.3]
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.mean(values), abs=1e-6)
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(4), abs=1e-6)


def test_wins_ties_and_losses_are_counted_prompt_by_prompt():
    found = compare([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 5.0, -1.0])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.win_rate == 2.5 / 4
    assert found.gain == pytest.approx(0.0)


def test_the_bootstrap_interval_is_that_of_all_resamples_of_a_small_set():
    ours, theirs = [3.0, 1.0, 2.5, 4.0, 0.0], [1.0, 1.0, 3.0, 0.5, -2.0]
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    means = sorted(sum(draw) / 5 for draw in itertools.product(gains, repeat=5))
    low, high = (means[round(tail * len(means))] for tail in (0.025, 0.975))
    found = compare(ours, theirs)
    assert found.gain_low == pytest.approx(low, abs=0.12)
    assert found.gain_high == pytest.approx(high, abs=0.12)


def test_pairing_removes_what_makes_a_prompt_hard():
    rng = random.Random(0)
    hard = [rng.gauss(0, 10) for _ in range(200)]
    found = compare([value + 1 for value in hard], hard)
    assert found.gain_low == pytest.approx(1, abs=1e-6)
    assert found.gain_high == pytest.approx(1, abs=1e-6)


def test_the_same_seed_gives_the_same_interval():
    rng = random.Random(1)
    ours, theirs = ([rng.random() for _ in range(30)] for _ in range(2))
    assert compare(ours, theirs, seed=3) == compare(ours, theirs, seed=3)
    assert compare(ours, theirs, seed=3) != compare(ours, theirs, seed=4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_counts_different_runs_of_words(n: int):
    texts = ["a b a b a b", "a b c", "d", ""]
    runs = []
    for text in texts:
        words = text.split()
        for start in range(len(words)):
            if start + n <= len(words):
                runs.append(" ".join(words[start : start + n]))
    assert distinct(texts, n) == pytest.approx(len(set(runs)) / len(runs), abs=1e-6)


def test_distinct_n_of_texts_too_short_for_a_run_is_zero():
    assert distinct(["a", "b"], 2) == 0.0


def test_share_is_the_part_of_set_flags():
    assert share([True, False, False, True]) == 0.5
