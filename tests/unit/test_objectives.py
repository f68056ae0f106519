"""Objectives: their losses and metrics on small batches, and how means are put together."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish.train.metrics import Tally, add, tally, wilson_interval
from pilotfish.train.objectives import OBJECTIVES, GenARMConfig


def random_batch(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(rows, 8, 5, generator=generator, dtype=torch.float64)
    token_ids_BT = torch.randint(5, (rows, 8), generator=generator)
    mask_BT = torch.zeros(rows, 8, dtype=torch.bool)
    for row in range(rows):
        mask_BT[row, 2 : 4 + row] = True
    return logits_BTV, token_ids_BT, mask_BT


Batch = tuple[Tensor, Tensor, Tensor]


def split(batch: Batch, rows: list[int]) -> Batch:
    return batch[0][rows], batch[1][rows], batch[2][rows]


@pytest.mark.parametrize(
    ("name", "parts"),
    # Pairs are rows (0, 2) and (1, 3): chosen rows first.
    [("sft", [[0, 1, 2], [3]]), ("genarm", [[0, 2], [1, 3]])],
)
def test_parts_weighted_by_units_make_the_loss_of_the_whole(
    name: str, parts: list[list[int]]
) -> None:
    objective = OBJECTIVES[name]
    config: Any = objective.config()
    batch = random_batch()
    whole = objective.loss(*batch, config)
    pieces = [split(batch, rows) for rows in parts]
    units = [objective.units(piece[2]) for piece in pieces]
    outputs = [objective.loss(*piece, config) for piece in pieces]
    weighted = sum(
        output.loss.item() * num for output, num in zip(outputs, units, strict=True)
    ) / objective.units(batch[2])
    assert weighted == pytest.approx(whole.loss.item(), rel=1e-6)
    summed = add(outputs[0].metrics, outputs[1].metrics)
    for metric, total in whole.metrics.items():
        assert summed[metric].mean == pytest.approx(total.mean, rel=1e-6), metric


def test_genarm_reports_accuracy_margin_and_both_lengths() -> None:
    token_ids_BT = torch.zeros(4, 4, dtype=torch.long)
    mask_BT = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]])
    output = OBJECTIVES["genarm"].loss(
        torch.zeros(4, 4, 3), token_ids_BT, mask_BT, GenARMConfig(beta_r=0.5)
    )
    # Under a uniform model the shorter response wins: the rejected of pair 0, the chosen of pair 1.
    assert output.metrics["accuracy"] == Tally(1.0, 2)
    assert output.metrics["length_accuracy"] == Tally(1.0, 2)
    want = 0.5 * math.log(3) * ((-2 + 1) + (-1 + 3)) / 2
    assert output.metrics["reward_margin"].mean == pytest.approx(want)
    assert output.metrics["chosen_length"].mean == 1.5
    assert output.metrics["rejected_length"].mean == 2.0


def test_a_tie_counts_half() -> None:
    mask_BT = torch.tensor([[0, 1], [0, 1]])
    output = OBJECTIVES["genarm"].loss(
        torch.zeros(2, 2, 3), torch.zeros(2, 2, dtype=torch.long), mask_BT, GenARMConfig()
    )
    assert output.metrics["accuracy"].mean == 0.5


def test_tallies_add_by_name() -> None:
    total = add({"a": Tally(1, 2)}, {"a": Tally(3, 2), "b": Tally(5, 1)})
    assert total == {"a": Tally(4, 4), "b": Tally(5, 1)}
    assert total["a"].mean == 1.0
    assert tally(torch.tensor([1.0, 0.0, 1.0])) == Tally(2.0, 3)


def test_wilsons_interval_matches_the_published_example() -> None:
    # Newcombe (1998), method 3: 81 of 263.
    low, high = wilson_interval(Tally(81, 263), z=1.959964)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_wilsons_interval_stays_inside_the_unit_interval() -> None:
    assert wilson_interval(Tally(0, 10))[0] == pytest.approx(0.0)
    assert wilson_interval(Tally(10, 10))[1] == pytest.approx(1.0)
    assert wilson_interval(Tally(0, 0)) == (0.0, 1.0)
