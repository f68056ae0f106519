"""The schedule of batches: covering, sharing and purity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.data.batching import BatchPlan
from pilotfish.errors import ConfigError, DataError

PLANS = st.tuples(
    st.integers(1, 4),  # rows per rank
    st.integers(1, 4),  # world size
    st.integers(1, 5),  # chunk
    st.integers(0, 40),  # rows beyond one batch
    st.integers(0, 2**32),  # seed
)


def lengths(number: int) -> list[int]:
    return np.random.default_rng(number).integers(1, 100, number).tolist()


@settings(deadline=None, max_examples=60)
@given(PLANS, st.integers(0, 3))
def test_an_epoch_holds_each_row_at_most_once_and_drops_only_the_remainder(
    plan: tuple[int, int, int, int, int], epoch: int
) -> None:
    per_rank, world, chunk, more, seed = plan
    size = per_rank * world
    rows = size + more
    batches = BatchPlan(lengths(rows), batch_size=size, seed=seed, chunk_batches=chunk)
    first = epoch * batches.batches_per_epoch
    steps = range(first, first + batches.batches_per_epoch)
    seen = [row for step in steps for row in batches.global_batch(step)]
    assert len(seen) == len(set(seen)) == rows - rows % size
    assert set(seen) <= set(range(rows))


@settings(deadline=None, max_examples=60)
@given(PLANS, st.integers(0, 50))
def test_ranks_partition_the_global_batch_of_any_world_size(
    plan: tuple[int, int, int, int, int], step: int
) -> None:
    per_rank, world, chunk, more, seed = plan
    size = per_rank * world
    rows = lengths(size + more)
    whole = BatchPlan(rows, batch_size=size, seed=seed, chunk_batches=chunk).batch(step)
    shares = [
        BatchPlan(
            rows, batch_size=size, seed=seed, chunk_batches=chunk, world_size=world, rank=rank
        ).batch(step)
        for rank in range(world)
    ]
    assert {len(share) for share in shares} == {per_rank}
    assert sorted(row for share in shares for row in share) == sorted(whole)


def test_a_batch_depends_on_the_step_alone_not_on_the_calls_before() -> None:
    def plan() -> BatchPlan:
        return BatchPlan(lengths(50), batch_size=4, seed=7)

    in_order = plan()
    expected = {step: in_order.batch(step) for step in range(60)}
    shuffled = np.random.default_rng(0).permutation(60).tolist()
    other = plan()
    assert {step: other.batch(step) for step in shuffled} == expected
    assert plan().batch(59) == expected[59]


def test_epochs_and_seeds_give_other_orders() -> None:
    plan = BatchPlan(lengths(64), batch_size=4, seed=7)
    one, two = ([plan.batch(e * 16 + i) for i in range(16)] for e in range(2))
    reseeded = BatchPlan(lengths(64), batch_size=4, seed=8)
    assert one != two
    assert one != [reseeded.batch(i) for i in range(16)]


def test_batches_hold_rows_of_similar_length_in_no_order_of_length() -> None:
    rows = lengths(512)

    def padding(chunk_batches: int) -> int:
        plan = BatchPlan(rows, batch_size=8, seed=1, chunk_batches=chunk_batches)
        batches = [plan.batch(step) for step in range(plan.batches_per_epoch)]
        return sum(8 * max(rows[r] for r in b) - sum(rows[r] for r in b) for b in batches)

    assert padding(16) < 0.25 * padding(1)
    plan = BatchPlan(rows, batch_size=8, seed=1)
    longest = [max(rows[row] for row in plan.batch(step)) for step in range(64)]
    assert abs(np.corrcoef(longest, np.arange(64))[0, 1]) < 0.4


def test_the_schedule_is_pinned_so_that_runs_can_be_repeated() -> None:
    plan = BatchPlan([3, 1, 4, 1, 5, 9, 2, 6], batch_size=4, seed=0)
    assert [plan.batch(step) for step in range(4)] == [
        [3, 1, 6, 0],
        [2, 4, 7, 5],
        [2, 4, 7, 5],
        [1, 3, 6, 0],
    ]


@pytest.mark.parametrize(
    ("settings_", "error", "complaint"),
    [
        ({"batch_size": 16}, DataError, "8 rows, fewer than one batch of 16"),
        ({"batch_size": 4, "world_size": 3}, ConfigError, "4 cannot be shared by 3 workers"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, ConfigError, "rank=2 of 2"),
        ({"batch_size": 4, "seed": -1}, ConfigError, "seed=-1"),
    ],
)
def test_an_impossible_plan_is_refused(
    settings_: dict[str, int], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        BatchPlan([1] * 8, **{"seed": 0, **settings_})
