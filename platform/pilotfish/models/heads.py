"""The tiny networks that read a frozen base's states.

Shapes: F features of one candidate: the blocks of its state side by side, then extra numbers.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pilotfish.config import Config
from pilotfish.errors import CheckpointError

ACCEPT_HEAD_NAME = "accept_head.safetensors"


class HeadSettings(Config):
    """Hidden layers of a head."""

    hidden: tuple[PositiveInt, ...] = (1024, 256)
    activation: Literal["relu", "tanh"] = "relu"
    """`tanh` with one small layer, such as (24,), suits a tiny base."""


class AcceptHead(nn.Module):
    """Logit of accepting a candidate.

    The network of MARA (Zhang et al., "Token-level Accept or Reject: A Micro Alignment Approach
    for Large Language Models", IJCAI 2025): layer norm, hidden layers, and one logit in place of a
    softmax over two. Each block of the state has a layer norm of its own, since embeddings and
    hidden states differ in scale; extra numbers enter as they are.
    """

    def __init__(
        self, settings: HeadSettings, *, block_sizes: Sequence[int], num_extra: int = 0
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in block_sizes)
        self.block_sizes = list(block_sizes)
        self._sizes = [*block_sizes, num_extra]
        activation = nn.ReLU if settings.activation == "relu" else nn.Tanh
        widths = [sum(self._sizes), *settings.hidden]
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def num_features(self) -> int:
        return sum(self._sizes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [...] of features [..., F]; the accept probability is their sigmoid."""
        *blocks, extra = features.to(self.dtype).split(self._sizes, dim=-1)
        normed = [norm(block) for norm, block in zip(self.norms, blocks, strict=True)]
        return self.layers(torch.cat([*normed, extra], dim=-1))[..., 0]


def save_accept_head(folder: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Write a head's `state_dict` into a guide folder; its `HeadSettings` belong in the card."""
    state = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(state, Path(folder) / ACCEPT_HEAD_NAME)


def load_accept_head(
    folder: str | Path,
    settings: HeadSettings,
    *,
    block_sizes: Sequence[int],
    num_extra: int = 0,
    device: torch.device | str = "cpu",
) -> AcceptHead:
    """Load a head, frozen, in the dtype it was saved in.

    Raises `CheckpointError` for a missing or damaged file, or one of other sizes.
    """
    path = Path(folder) / ACCEPT_HEAD_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no {ACCEPT_HEAD_NAME}. Train the proxy again."
        )
    try:
        state = load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}.") from error
    with torch.device("meta"):  # no draws for weights that are replaced at once
        head = AcceptHead(settings, block_sizes=block_sizes, num_extra=num_extra)
    try:
        head.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit states of {list(block_sizes)} numbers and hidden layers of "
            f"{list(settings.hidden)}: {error}. Load it beside the base named in its guide.json."
        ) from error
    return head.requires_grad_(False).eval()
