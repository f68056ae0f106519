"""The frozen base that an objective is trained beside."""

import torch
from torch import Tensor

from pilotfish.config import Config
from pilotfish.models.loading import load_frozen


class FrozenBaseConfig(Config):
    path: str | None = None


class FrozenBase:
    def __init__(self, config: FrozenBaseConfig) -> None:
        assert config.path is not None
        self.model = load_frozen(config.path)

    @torch.no_grad()
    def logits(
        self, token_ids_BT: Tensor, attention_mask: Tensor, position_ids_BT: Tensor | None = None
    ) -> Tensor:
        return self.model(
            input_ids=token_ids_BT, attention_mask=attention_mask, position_ids=position_ids_BT
        ).logits


def load_frozen_base(config: FrozenBaseConfig) -> FrozenBase:
    return FrozenBase(config)
