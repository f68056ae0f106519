"""What is trained, as one module whose output an objective reads.

Shapes: B rows, T positions, V vocabulary.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class LMLearner(nn.Module):
    """A causal LM that answers with its logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids_BT: Tensor,
        attention_mask: Tensor,
        position_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, T, V]. The mask is [B, T], or [B, 1, T, T] for a tree."""
        return self.model(
            input_ids=token_ids_BT,
            attention_mask=attention_mask,
            position_ids=position_ids_BT,
            use_cache=False,
        ).logits


class ScoreLearner(nn.Module):
    """A sequence classifier with one label that answers with its score at every token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self,
        token_ids_BT: Tensor,
        attention_mask: Tensor,
        position_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Return scores [B, T]. The mask is [B, T], or [B, 1, T, T] for a tree."""
        hidden_BTD = self.model.base_model(
            input_ids=token_ids_BT,
            attention_mask=attention_mask,
            position_ids=position_ids_BT,
            use_cache=False,
        ).last_hidden_state
        return self.model.score(hidden_BTD)[..., 0]
