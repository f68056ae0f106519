"""The proxy's network: its size, its blocks, its features, and its folder."""

from pathlib import Path

import pytest
import torch

from pilotfish.errors import CheckpointError
from pilotfish.guides.proxy_features import ProxySettings, post_token_features
from pilotfish.models.heads import AcceptHead, HeadSettings, load_accept_head, save_accept_head
from tests.fakes import random_head


def test_the_head_is_small_beside_a_base_of_billions() -> None:
    head = AcceptHead(HeadSettings(), block_sizes=[4096], num_extra=1)
    assert sum(p.numel() for p in head.parameters()) == 4_467_201
    assert round(4_467_201 / 1e6, 2) == 4.47
    tiny = AcceptHead(HeadSettings(hidden=(24,), activation="tanh"), block_sizes=[96], num_extra=1)
    assert sum(p.numel() for p in tiny.parameters()) == 2 * 96 + 97 * 24 + 24 + 24 + 1


def test_a_head_survives_its_folder_and_another_size_is_refused(tmp_path: Path) -> None:
    settings = ProxySettings(head=HeadSettings(hidden=(24,), activation="tanh"))
    head = random_head(1, settings)
    save_accept_head(tmp_path, head.state_dict())
    before = torch.get_rng_state()
    loaded = load_accept_head(tmp_path, settings.head, block_sizes=[32], num_extra=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(CheckpointError, match=r"does not fit states of \[48\]"):
        load_accept_head(tmp_path, settings.head, block_sizes=[48], num_extra=1)
    (tmp_path / "accept_head.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_accept_head(tmp_path, settings.head, block_sizes=[32], num_extra=1)
    with pytest.raises(CheckpointError, match=r"holds no accept_head.safetensors"):
        load_accept_head(tmp_path / "none", settings.head, block_sizes=[32], num_extra=1)


def test_blocks_are_normed_each_by_itself_and_extra_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    head = AcceptHead(HeadSettings(hidden=(8,)), block_sizes=[4, 3], num_extra=2).double()
    state, embedded = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    extra = torch.randn(5, 2).double()
    logits = head(torch.cat([state, embedded, extra], dim=-1))
    scaled = torch.cat([7 * state + 3, 1000 * embedded, extra], dim=-1)
    torch.testing.assert_close(head(scaled), logits, rtol=1e-3, atol=1e-3)
    assert (head(torch.cat([state, embedded, 7 * extra], dim=-1)) - logits).abs().min() > 1e-3


def test_features_of_a_half_precision_base_keep_the_digits_of_the_log_prob() -> None:
    hidden_RKD = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    logprobs_RK = torch.tensor([[0.501, 0.499]], dtype=torch.float64).log()
    features_RKF = post_token_features(hidden_RKD, logprobs_RK)
    assert features_RKF.dtype is torch.float32
    torch.testing.assert_close(features_RKF[..., -1].double(), logprobs_RK, rtol=1e-6, atol=0)
    unlikely = post_token_features(hidden_RKD, torch.tensor([[0.0, -torch.inf]]))
    assert unlikely.isfinite().all()
