"""GenARM: an autoregressive reward model tilts the base, token by token.

Xu et al., "GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-Time
Alignment", ICLR 2025. Shapes: R rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pilotfish.config import Config
from pilotfish.context import Context
from pilotfish.guides.base import LogprobSource, Stage, Step, max_length_of
from pilotfish.guides.card import GuideCard
from pilotfish.guides.host import GuideHost


class GenARMGuide:
    """Equation (5) of the paper, and (6) when several stand in a chain.

    `log p(v|s) = log p_base(v|s) + w * log p_guide(v|s) - log Z(s)`, with `w = 1/beta`. A chain of
    guides multiplies its factors whatever their order. The guide's forward needs nothing from the
    base, so it starts before the base's and runs beside it where it can.
    """

    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = True
    Settings: ClassVar[type[Config]] = Config
    varies: ClassVar[tuple[str, ...]] = ()
    needs_hidden = False

    def __init__(self, source: LogprobSource) -> None:
        self.source = source

    @classmethod
    def load(
        cls, folder: str | Path, card: GuideCard, settings: Config, host: GuideHost
    ) -> "GenARMGuide":
        return cls(host.load_source(folder))

    def vary(self, settings: Config) -> "GenARMGuide":
        return self

    @property
    def max_length(self) -> int:
        return max_length_of(self.source)

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        return self.source.begin(contexts)

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: Callable[[], Tensor]) -> Tensor:
        guide_RV = evidence().to(logprobs_RV.dtype)
        weights_R1 = step.weights_R[:, None].to(logprobs_RV.dtype)
        # The evidence is ours alone, so it holds the sum; a large vocabulary makes copies dear.
        torch.addcmul(logprobs_RV, weights_R1, guide_RV, out=guide_RV)
        return guide_RV.log_softmax(-1)

    def release(self, keys: Sequence[int]) -> None:
        self.source.release(keys)
