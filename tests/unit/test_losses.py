"""Losses against the formulas written out, on logits drawn at random."""

import math

import pytest
import torch
from torch import Tensor

from pilotfish.losses import (
    bradley_terry,
    genarm_loss,
    response_logprobs,
    sft_loss,
    token_logprobs,
)

BETA = 0.3
VOCAB = 7


def random_batch(seed: int, rows: int = 4, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = torch.randn(rows, length, VOCAB, generator=generator, dtype=torch.float64)
    token_ids_BT = torch.randint(VOCAB, (rows, length), generator=generator)
    mask_BT = torch.zeros(rows, length)
    for row in range(rows):
        mask_BT[row, 3 : 5 + row] = 1
    return logits_BTV, token_ids_BT, mask_BT


def dpo_loss(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> Tensor:
    """DPO as published (arXiv 2305.18290, equation 7)."""
    chosen = BETA * (policy[0] - reference[0])
    rejected = BETA * (policy[1] - reference[1])
    return -torch.log(torch.sigmoid(chosen - rejected)).mean()


def uniform(lengths: list[int]) -> Tensor:
    """Log-probs of responses of these lengths under a uniform model."""
    return torch.tensor([-n * math.log(VOCAB) for n in lengths], dtype=torch.float64)


def test_token_logprobs_predict_the_next_token_and_are_zero_outside_the_mask() -> None:
    logits_BTV, token_ids_BT, mask_BT = random_batch(0)
    got_BS = token_logprobs(logits_BTV, token_ids_BT, mask_BT)
    for row in range(4):
        for position in range(1, 9):
            logprobs_V = logits_BTV[row, position - 1].log_softmax(0)
            want = logprobs_V[token_ids_BT[row, position]] * mask_BT[row, position]
            assert got_BS[row, position - 1].item() == pytest.approx(want.item(), abs=1e-6)


def test_a_large_vocabulary_costs_no_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BTV = 3 * torch.randn(2, 20, 32_000, generator=generator)
    token_ids_BT = torch.randint(32_000, (2, 20), generator=generator)
    exact_BSV = logits_BTV[:, :-1].double().log_softmax(dim=-1)
    want_BS = exact_BSV.gather(-1, token_ids_BT[:, 1:, None])[..., 0]
    got_BS = token_logprobs(logits_BTV, token_ids_BT, torch.ones(2, 20))
    assert (got_BS - want_BS).abs().max() < 1e-5


def test_response_logprobs_sum_and_do_not_average() -> None:
    token_ids_BT = torch.zeros(2, 6, dtype=torch.long)
    mask_BT = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    got_B = response_logprobs(torch.zeros(2, 6, VOCAB), token_ids_BT, mask_BT)
    assert got_B.tolist() == pytest.approx([-2 * math.log(VOCAB), -5 * math.log(VOCAB)])


def test_a_forbidden_token_outside_the_mask_does_not_make_the_loss_infinite() -> None:
    logits_BTV, token_ids_BT, mask_BT = random_batch(0)
    logits_BTV[:, 0, :] = -torch.inf
    logits_BTV[:, 0, int(token_ids_BT[0, 1] + 1) % VOCAB] = 0.0
    assert sft_loss(logits_BTV, token_ids_BT, mask_BT).isfinite()


def test_genarm_is_dpo_with_a_uniform_reference_when_lengths_agree() -> None:
    chosen_P, rejected_P = torch.randn(2, 5, dtype=torch.float64).unbind()
    want = dpo_loss((chosen_P, rejected_P), (uniform([4] * 5), uniform([4] * 5)))
    assert genarm_loss(chosen_P, rejected_P, BETA).item() == pytest.approx(want.item(), abs=1e-12)


def test_genarm_differs_from_dpo_with_a_uniform_reference_by_the_length_term() -> None:
    chosen_P, rejected_P = torch.randn(2, 2, dtype=torch.float64).unbind()
    reference = (uniform([3, 8]), uniform([5, 2]))
    bias_P = BETA * torch.tensor([3 - 5, 8 - 2], dtype=torch.float64) * math.log(VOCAB)
    # DPO's margin is GenARM's plus beta (len chosen - len rejected) log V.
    shifted = genarm_loss(chosen_P + bias_P / BETA, rejected_P, BETA)
    assert dpo_loss((chosen_P, rejected_P), reference).item() == pytest.approx(shifted.item())
    assert genarm_loss(chosen_P, rejected_P, BETA).item() != pytest.approx(shifted.item())


def test_genarm_of_equal_rewards_is_log_two() -> None:
    logprobs_P = torch.tensor([-3.0, -40.0])
    assert genarm_loss(logprobs_P, logprobs_P, BETA).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("margin", [0.0, 0.4, -3.0, 12.0])
def test_the_losses_of_a_pair_and_of_the_swapped_pair_are_probabilities_of_one_coin(
    margin: float,
) -> None:
    chosen_P = torch.tensor([margin], dtype=torch.float64)
    rejected_P = torch.zeros(1, dtype=torch.float64)
    loss = genarm_loss(chosen_P, rejected_P, BETA).item()
    swapped = genarm_loss(rejected_P, chosen_P, BETA).item()
    assert math.exp(-loss) + math.exp(-swapped) == pytest.approx(1.0, abs=1e-12)


def test_bradley_terry_prefers_the_larger_reward() -> None:
    losses = [
        bradley_terry(torch.tensor([gap]), torch.tensor([0.0])).item() for gap in (-1.0, 0.0, 1.0)
    ]
    assert losses == sorted(losses, reverse=True)


def test_labels_outside_the_response_change_no_loss() -> None:
    logits_BTV, token_ids_BT, mask_BT = random_batch(1)
    perturbed_BT = torch.where(mask_BT > 0, token_ids_BT, (token_ids_BT + 3) % VOCAB)
    assert not perturbed_BT.equal(token_ids_BT)
    for loss in (sft_loss, response_logprobs):
        want = loss(logits_BTV, token_ids_BT, mask_BT)
        assert loss(logits_BTV, perturbed_BT, mask_BT).equal(want)


def test_labels_inside_the_response_change_the_loss() -> None:
    logits_BTV, token_ids_BT, mask_BT = random_batch(1)
    perturbed_BT = torch.where(mask_BT > 0, (token_ids_BT + 3) % VOCAB, token_ids_BT)
    want = sft_loss(logits_BTV, token_ids_BT, mask_BT)
    assert not sft_loss(logits_BTV, perturbed_BT, mask_BT).equal(want)


def test_sft_averages_over_tokens_and_not_over_rows() -> None:
    logits_BTV, token_ids_BT, mask_BT = random_batch(2)
    total = sum(
        -logits_BTV[row, position - 1].log_softmax(0)[token_ids_BT[row, position]].item()
        for row in range(4)
        for position in range(1, 9)
        if mask_BT[row, position]
    )
    want = total / int(mask_BT.sum())
    assert sft_loss(logits_BTV, token_ids_BT, mask_BT).item() == pytest.approx(want, abs=1e-6)
