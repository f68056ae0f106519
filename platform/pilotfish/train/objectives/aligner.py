"""Aligner: a model that learns to rewrite answers, at first by copying them.

Ji et al., "Aligner: Efficient Alignment by Learning to Correct", NeurIPS 2024, equation (3).
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from pilotfish.correction import TemplateChoice
from pilotfish.train.objectives.base import Objective, num_answer_tokens
from pilotfish.train.objectives.sft import demonstration_loss


class AlignerConfig(TemplateChoice):
    """A corrector: it reads a question and an answer in a template, and writes a better answer."""

    kind: Literal["aligner"] = "aligner"
    identity_share: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps, the first ones, in which the answer itself is the target: what remains
    to be learned afterwards is the correction alone."""


def _card(config: AlignerConfig, _: Mapping[str, float]) -> dict[str, Any]:
    chosen = config.model_dump(include={"template", "template_text"}, exclude_none=True)
    return {"settings": chosen}


ALIGNER = Objective(
    config=AlignerConfig,
    rows="corrections",
    loss=demonstration_loss,
    units=num_answer_tokens,
    guide_kind="aligner",
    card=_card,
)
