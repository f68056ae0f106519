"""Sampling: the law after temperature and truncation, and exact inversion of its CDF."""

import re
from typing import Any

import pytest
import torch

from pilotfish.decode.sampling import SamplingBatch
from pilotfish.decode.sequence import SamplingParams
from pilotfish.errors import PromptError
from pilotfish.noise import invert_cdf

CPU = torch.device("cpu")


def law_of(logprobs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, min-p, top-k, top-p for one row, written from their definitions."""
    probs = (logprobs / params.temperature).softmax(-1)
    if params.min_p:
        probs = torch.tensor([p if p >= params.min_p * max(probs) else 0.0 for p in probs])
        probs = probs.double() / probs.sum()
    if params.top_k:
        kept = set(probs.topk(min(params.top_k, len(probs))).indices.tolist())
        probs = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probs.tolist())])
        probs = probs.double() / probs.sum()
    if params.top_p < 1:
        total, kept = 0.0, set()
        for token in probs.argsort(descending=True).tolist():
            if total >= params.top_p:
                break
            kept.add(token)
            total += probs[token].item()
        probs = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probs.tolist())])
    return probs / probs.sum()


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(top_k=3),
    SamplingParams(top_p=0.7),
    SamplingParams(temperature=1.7, top_k=7, top_p=0.5),
    SamplingParams(top_k=1000),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.5, min_p=0.3, top_k=6, top_p=0.8),
    SamplingParams(min_p=1),
]


def test_rows_with_different_settings_share_a_batch() -> None:
    torch.manual_seed(0)
    logprobs = torch.randn(len(MIXED), 40, dtype=torch.float64).log_softmax(-1)
    probs = SamplingBatch(MIXED, CPU).probs(logprobs)
    for row, params in enumerate(MIXED):
        expected = law_of(logprobs[row], params).double()
        torch.testing.assert_close(probs[row] / probs[row].sum(), expected)


def test_min_p_goes_before_top_p_which_counts_what_is_left() -> None:
    logprobs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    probs = SamplingBatch([SamplingParams(min_p=0.5, top_p=0.6)], CPU).probs(logprobs)
    assert (probs[0] > 0).tolist() == [True, False, False]  # 0.5 / 0.8 is 0.6 and more


def test_greedy_rows_take_the_mode_beside_sampled_rows() -> None:
    torch.manual_seed(0)
    logprobs = torch.randn(3, 40).log_softmax(-1)
    params = [SamplingParams(temperature=0), SamplingParams(), SamplingParams(temperature=0)]
    drawn = SamplingBatch(params, CPU).draw(logprobs, torch.full((3,), 0.999))
    assert drawn[[0, 2]].tolist() == logprobs.argmax(-1)[[0, 2]].tolist()


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000])
def test_inverse_cdf_equals_the_textbook_definition(vocab_size: int) -> None:
    torch.manual_seed(1)
    probs = torch.randn(1, vocab_size, dtype=torch.float64).mul(3).softmax(-1)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = invert_cdf(probs.expand(4000, -1).contiguous(), grid)
    running = probs[0].cumsum(-1)
    expected = [int((running <= u).sum()) for u in grid]
    assert drawn.tolist() == expected


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    edges = torch.tensor([0.0, 2.0**-60, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        probs = torch.zeros(4, 700, dtype=dtype)
        probs[:, [300, 301, 555]] = torch.tensor([0.1, 0.7, 0.2], dtype=dtype)
        assert set(invert_cdf(probs, edges).tolist()) <= {300, 301, 555}


def test_float32_sums_over_a_large_vocabulary_stay_exact() -> None:
    """A running float32 sum over 128,000 equal terms is off by far more than one token."""
    probs = torch.full((3, 128_000), 1 / 128_000)
    drawn = invert_cdf(probs, torch.tensor([0.25, 0.5, 0.999], dtype=torch.float64))
    expected = torch.tensor([32_000, 64_000, 127_872])
    assert ((drawn - expected).abs() <= 1).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("min_p", float("nan")),
        ("top_k", -1),
        ("max_tokens", -1),
        ("min_tokens", 257),
        ("seed", -1),
        ("top_logprobs", -1),
        ("logit_bias", {3: 100.5}),
        ("logit_bias", {3: float("nan")}),
    ],
)
def test_bad_parameters_name_themselves(name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=re.escape(f"{name} is {value}")):
        SamplingParams(**{name: value})
