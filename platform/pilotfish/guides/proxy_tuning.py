"""Proxy-tuning: what tuning did to a small model, done to a large one while it decodes.

Liu et al., "Tuning Language Models by Proxy", COLM 2024; the same rule with other experts is
DExperts (Liu et al., ACL 2021). Shapes: R rows, V vocabulary.
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
from pilotfish.guides.host import GuideHost, beside

_NEVER = -1e4  # no model spreads its log-probs so far; zero over zero then says nothing


class ProxyTuningSettings(Config):
    """The two small models, as paths relative to the guide's folder, or hub ids."""

    expert: str
    """The tuned one."""
    anti_expert: str
    """The same model before it was tuned."""


class ProxyTuningGuide:
    """The paper's product of the base and a ratio of experts, with a weight on the ratio.

    `log p(v|s) = log p_base(v|s) + w * (log p_expert(v|s) - log p_anti(v|s)) - log Z(s)`. A
    probability that underflowed to zero counts as exp(-10000), so the ratio is always a number.
    """

    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = True
    Settings: ClassVar[type[Config]] = ProxyTuningSettings
    varies: ClassVar[tuple[str, ...]] = ()
    needs_hidden = False

    def __init__(self, expert: LogprobSource, anti_expert: LogprobSource) -> None:
        self._expert = expert
        self._anti_expert = anti_expert

    @classmethod
    def load(
        cls, folder: str | Path, card: GuideCard, settings: ProxyTuningSettings, host: GuideHost
    ) -> "ProxyTuningGuide":
        return cls(
            host.load_lm(beside(folder, settings.expert)),
            host.load_lm(beside(folder, settings.anti_expert)),
        )

    def vary(self, settings: ProxyTuningSettings) -> "ProxyTuningGuide":
        return self

    @property
    def max_length(self) -> int:
        return max_length_of(self._expert, self._anti_expert)

    def begin(self, contexts: Sequence[Context]) -> tuple[Callable[[], Tensor], ...]:
        return self._expert.begin(contexts), self._anti_expert.begin(contexts)

    def tilt(
        self, logprobs_RV: Tensor, step: Step, evidence: tuple[Callable[[], Tensor], ...]
    ) -> Tensor:
        expert_RV, anti_RV = (found().to(logprobs_RV.dtype) for found in evidence)
        ratio_RV = expert_RV.clamp_min(_NEVER).sub_(anti_RV.clamp_min(_NEVER))
        weights_R1 = step.weights_R[:, None].to(logprobs_RV.dtype)
        return torch.addcmul(logprobs_RV, weights_R1, ratio_RV, out=ratio_RV).log_softmax(-1)

    def release(self, keys: Sequence[int]) -> None:
        self._expert.release(keys)
        self._anti_expert.release(keys)
