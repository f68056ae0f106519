"""Linears on weights laid out for oneDNN."""

import pytest
import torch
from torch import nn

from pilotfish.models.packed import pack_linears


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not built in")
def test_gradients_pass_through_packed_linears() -> None:
    """As through plain ones, also around them: a residual must not hide a missing gradient."""
    torch.manual_seed(0)
    plain = nn.Linear(512, 512, bias=False).requires_grad_(False)
    packed = nn.Linear(512, 512, bias=False).requires_grad_(False)
    packed.load_state_dict(plain.state_dict())
    pack_linears(packed)
    assert "forward" in vars(packed)
    gradients = []
    for linear in (plain, packed):
        x = torch.linspace(-1, 1, 512).requires_grad_()
        torch.testing.assert_close(linear(x.detach()), plain(x.detach()))
        (x + linear(x)).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
