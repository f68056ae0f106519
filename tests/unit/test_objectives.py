"""Objectives: their losses and metrics on small batches, each against a plain reading of its paper.

Shapes: B rows, T positions, V vocabulary, P pairs.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish.models.reward import RewardReading, whole_rewards
from pilotfish.train.learner import LMLearner, ScoreLearner
from pilotfish.train.metrics import Tally, add, tally, wilson_interval
from pilotfish.train.objectives import (
    OBJECTIVES,
    AlignerConfig,
    DPOConfig,
    GenARMConfig,
    Models,
    RewardModelConfig,
    ValueConfig,
)
from pilotfish.train.objectives.reward_model import prefix_loss
from pilotfish.train.objectives.value import expected_values
from tests.fakes import plain_logprobs, tiny_llama, tiny_reward_model

BASE, LEARNER, SCORER = tiny_llama(1), tiny_llama(2), tiny_reward_model(3)


@dataclass(frozen=True)
class Rows:
    token_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    rewards_B: Tensor

    def part(self, rows: list[int]) -> "Rows":
        return Rows(*(getattr(self, name)[rows] for name in Rows.__annotations__))


def some_rows(prompt: int = 2, lengths: tuple[int, ...] = (2, 3, 5, 4)) -> Rows:
    """Answers of these lengths behind equal prompts, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    width = prompt + max(lengths)
    ids_BT = torch.randint(1, 16, (len(lengths), width), generator=generator)
    ids_BT[:, :prompt] = ids_BT[:1, :prompt]
    real_BT = torch.arange(width) < prompt + torch.tensor(lengths)[:, None]
    answer_BT = real_BT & (torch.arange(width) >= prompt)
    rewards_B = torch.linspace(-1, 1, len(lengths), dtype=torch.float64)
    return Rows(ids_BT, real_BT, answer_BT, rewards_B)


def models_for(name: str) -> Models:
    head = OBJECTIVES[name].head
    learner = LMLearner(LEARNER) if head == "lm" else ScoreLearner(SCORER)
    return Models(learner=learner, base=LMLearner(BASE).requires_grad_(False))


def loss_of(name: str, config: Any, rows: Rows | None = None) -> float:
    return OBJECTIVES[name].loss(models_for(name), rows or some_rows(), config).loss.item()


def answer_logprob(model: Any, rows: Rows, row: int) -> float:
    """log p(answer | prompt), by one fresh forward per token."""
    ids = rows.token_ids_BT[row, rows.attention_mask_BT[row]].tolist()
    start = int(rows.loss_mask_BT[row].int().argmax())
    return sum(plain_logprobs(model, ids[:t])[ids[t]].item() for t in range(start, len(ids)))


def scores(rows: Rows) -> Tensor:
    return ScoreLearner(SCORER)(rows.token_ids_BT, rows.attention_mask_BT)


# Pairs are rows (0, 2) and (1, 3): chosen rows first.
CASES: list[tuple[str, Any, list[list[int]]]] = [
    ("sft", OBJECTIVES["sft"].config(), [[0, 1, 2], [3]]),
    ("aligner", AlignerConfig(template="paper"), [[0, 1, 2], [3]]),
    ("genarm", GenARMConfig(), [[0, 2], [1, 3]]),
    ("genarm", GenARMConfig(length_normalization=True), [[0, 2], [1, 3]]),
    ("dpo", DPOConfig(sft_weight=0.3), [[0, 2], [1, 3]]),
    ("reward_model", RewardModelConfig(), [[0, 2], [1, 3]]),
    ("reward_model", RewardModelConfig(prefixes=True), [[0, 2], [1, 3]]),
    ("value", ValueConfig(), [[0, 1, 2], [3]]),
    ("value", ValueConfig(loss="q", num_candidates=3), [[0, 1, 2], [3]]),
]


def test_every_objective_is_tested_here() -> None:
    assert {name for name, _, _ in CASES} == set(OBJECTIVES)


@pytest.mark.parametrize(("name", "config", "parts"), CASES)
def test_parts_weighted_by_units_make_the_loss_of_the_whole(
    name: str, config: Any, parts: list[list[int]]
) -> None:
    objective, rows, models = OBJECTIVES[name], some_rows(), models_for(name)
    whole = objective.loss(models, rows, config)
    pieces = [rows.part(part) for part in parts]
    units = [objective.units(piece) for piece in pieces]
    outputs = [objective.loss(models, piece, config) for piece in pieces]
    weighted = sum(
        output.loss.item() * num for output, num in zip(outputs, units, strict=True)
    ) / objective.units(rows)
    assert weighted == pytest.approx(whole.loss.item(), rel=1e-6)
    summed = add(outputs[0].metrics, outputs[1].metrics)
    for metric, total in whole.metrics.items():
        assert summed[metric].mean == pytest.approx(total.mean, rel=1e-6), metric


@pytest.mark.parametrize(("name", "config", "_"), CASES)
def test_nothing_is_learned_from_the_prompt_and_the_padding(name: str, config: Any, _: Any) -> None:
    rows, logits = some_rows(), models_for(name).logits
    noisy = models_for(name)

    def disturbed(ids_BT: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        said = models_for(name).learner(ids_BT, mask, positions).clone()
        said[:, 0] += 7.0  # predicts a token of the prompt
        said[:, rows.token_ids_BT.shape[1] - 1 : rows.token_ids_BT.shape[1]][
            ~rows.attention_mask_BT[:, -1]
        ] -= 5.0
        return said

    assert logits(rows).shape[:2] == rows.token_ids_BT.shape
    want = OBJECTIVES[name].loss(noisy, rows, config).loss.item()
    found = OBJECTIVES[name].loss(replace(noisy, learner=disturbed), rows, config).loss.item()
    assert found == pytest.approx(want, abs=1e-9)


def test_genarm_reports_accuracy_margin_and_both_lengths() -> None:
    rows = some_rows(prompt=1, lengths=(2, 1, 1, 3))

    def uniform(ids_BT: Tensor, *_: Any) -> Tensor:
        return torch.zeros(*ids_BT.shape, 3)

    output = OBJECTIVES["genarm"].loss(
        Models(learner=uniform),
        replace(rows, token_ids_BT=rows.token_ids_BT % 3),
        GenARMConfig(beta_r=0.5),
    )
    # Under a uniform model the shorter response wins: the rejected of pair 0, the chosen of pair 1.
    assert output.metrics["accuracy"] == Tally(1.0, 2)
    assert output.metrics["length_accuracy"] == Tally(1.0, 2)
    want = 0.5 * math.log(3) * ((-2 + 1) + (-1 + 3)) / 2
    assert output.metrics["reward_margin"].mean == pytest.approx(want)
    assert output.metrics["chosen_length"].mean == 1.5
    assert output.metrics["rejected_length"].mean == 2.0


def test_dpo_starts_at_log_two() -> None:
    models = Models(learner=LMLearner(BASE), base=LMLearner(BASE))
    output = OBJECTIVES["dpo"].loss(models, some_rows(), DPOConfig())
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)  # float32
    assert output.metrics["accuracy"].mean == 0.5


def test_dpo_is_the_bradley_terry_loss_of_log_ratios() -> None:
    rows, beta = some_rows(), 0.4
    ratio = [answer_logprob(LEARNER, rows, b) - answer_logprob(BASE, rows, b) for b in range(4)]
    margins = [beta * (ratio[0] - ratio[2]), beta * (ratio[1] - ratio[3])]
    want = sum(math.log1p(math.exp(-margin)) for margin in margins) / 2
    assert loss_of("dpo", DPOConfig(beta=beta)) == pytest.approx(want, abs=1e-6)


def test_dpo_with_a_term_of_sft_adds_the_mean_nll_per_token_of_the_chosen() -> None:
    rows = some_rows()
    nll = [-answer_logprob(LEARNER, rows, 0) / 2, -answer_logprob(LEARNER, rows, 1) / 3]
    want = loss_of("dpo", DPOConfig()) + 0.3 * sum(nll) / 2
    assert loss_of("dpo", DPOConfig(sft_weight=0.3)) == pytest.approx(want, abs=1e-6)


def test_genarm_is_dpo_against_a_uniform_base_up_to_the_length_term() -> None:
    def uniform(ids_BT: Tensor, *_: Any) -> Tensor:
        return torch.zeros(*ids_BT.shape, 16, dtype=torch.float64)

    def both(rows: Rows) -> tuple[float, float]:
        models = Models(learner=LMLearner(LEARNER), base=uniform)
        arm = OBJECTIVES["genarm"].loss(models, rows, GenARMConfig(beta_r=0.2))
        dpo = OBJECTIVES["dpo"].loss(models, rows, DPOConfig(beta=0.2))
        return arm.metrics["reward_margin"].mean, dpo.metrics["reward_margin"].mean

    arm, dpo = both(some_rows(lengths=(3, 4, 3, 4)))
    assert arm == pytest.approx(dpo, abs=1e-6)
    arm, dpo = both(some_rows(lengths=(2, 2, 5, 5)))
    assert dpo - arm == pytest.approx(0.2 * (2 - 5) * math.log(16), abs=1e-5)


@pytest.mark.parametrize("reading", [{}, {"pooling": "pooled", "pool_length": 3.0}])
def test_a_reward_is_read_at_the_last_answer_token_or_from_all_of_them(reading: Any) -> None:
    rows = some_rows()
    found = whole_rewards(scores(rows), rows.loss_mask_BT, RewardReading(**reading))
    for row, length in enumerate((2, 3, 5, 4)):
        answer = scores(rows)[row, 2 : 2 + length].tolist()
        want = sum(answer) / 3.0 if reading else answer[-1]
        assert found[row].item() == pytest.approx(want, abs=1e-6)


def test_the_loss_of_prefixes_compares_equally_long_beginnings() -> None:
    rows, reading = some_rows(), RewardReading(pooling="pooled", pool_length=3.0)
    values = scores(rows).tolist()

    def reward(row: int, length: int, num: int) -> float:
        return sum(values[row][2 : 2 + min(num, length)]) / 3.0

    pairs = [((0, 2), (2, 5)), ((1, 3), (3, 4))]
    want = 0.0
    for (chosen, len_c), (rejected, len_r) in pairs:
        steps = range(1, max(len_c, len_r) + 1)
        gaps = [reward(chosen, len_c, n) - reward(rejected, len_r, n) for n in steps]
        want += sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps) / len(pairs)
    found = prefix_loss(scores(rows), rows.loss_mask_BT, reading)
    assert found.item() == pytest.approx(want, abs=1e-6)


def test_fudge_regresses_every_prefix_on_the_reward_of_the_whole() -> None:
    rows, values = some_rows(), scores(some_rows())
    gaps = (values - rows.rewards_B[:, None])[rows.loss_mask_BT]
    want = 0.5 * (gaps**2).mean().item()
    assert loss_of("value", ValueConfig(loss="fudge")) == pytest.approx(want, abs=1e-6)


def test_the_expected_value_of_what_follows_is_what_fresh_forwards_say() -> None:
    rows, models = some_rows(), models_for("value")
    found = expected_values(models, rows, 3)
    for row in range(4):
        ids = rows.token_ids_BT[row, rows.attention_mask_BT[row]].tolist()
        for t in range(len(ids)):
            top = plain_logprobs(BASE, ids[: t + 1]).topk(3)
            longer = torch.tensor([[*ids[: t + 1], z] for z in top.indices.tolist()])
            values = ScoreLearner(SCORER)(longer, torch.ones_like(longer))[:, -1]
            want = (top.values.softmax(0) * values).sum().item()
            assert found[row, t].item() == pytest.approx(want, abs=1e-6)


def test_q_learns_from_what_follows_and_from_the_reward_at_the_end() -> None:
    rows, models = some_rows(), models_for("value")
    targets = expected_values(models, rows, 3)
    for row, length in enumerate((2, 3, 5, 4)):
        targets[row, 2 + length - 1] = rows.rewards_B[row]
    gaps = (scores(rows) - targets)[rows.loss_mask_BT]
    want = 0.5 * (gaps**2).mean().item()
    found = loss_of("value", ValueConfig(loss="q", num_candidates=3))
    assert found == pytest.approx(want, abs=1e-6)


def test_a_reward_models_card_holds_the_mean_and_spread_of_its_rewards() -> None:
    report = {"eval/reward": 2.0, "eval/squared_reward": 13.0}
    card = OBJECTIVES["reward_model"].card(RewardModelConfig(), report)
    assert card["settings"]["shift"] == 2.0
    assert card["settings"]["scale"] == 3.0


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
