"""Proxy-RLHF: a tiny network accepts or rejects the tokens that the base proposes.

Zhu et al., "Proxy-RLHF: Decoupling Generation and Alignment in Large Language Model with Proxy",
2024. Its stable knowledge-aware module changes how candidates are drawn and restricts what may be
rejected: see `AcceptRules`. Features and network follow MARA: Zhang et al., "Token-level Accept or
Reject: A Micro Alignment Approach for Large Language Models", IJCAI 2025.

Shapes: R rows, V vocabulary, K candidates in descending order of probability, padded on the right,
N rows that the proxy is asked about, D hidden size, F features.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pilotfish.config import Config
from pilotfish.context import Context
from pilotfish.errors import ConfigError
from pilotfish.guides.acceptance import AcceptLaw, AcceptRules, accept_law
from pilotfish.guides.base import Stage, Step
from pilotfish.guides.card import GuideCard
from pilotfish.guides.host import GuideHost
from pilotfish.guides.proxy_features import (
    Candidates,
    ProxySettings,
    feature_sizes,
    find_candidates,
    post_token_features,
    pre_token_features,
)
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.heads import AcceptHead, load_accept_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the proxy was asked, and what it said."""

    candidates: Candidates
    rows: list[int]
    """The rows with a choice, N of them; the others have one candidate and no decision."""
    features_NKF: Tensor
    """What the head read; with the rows' candidates, all that is needed to ask it again."""
    logits_NK: Tensor
    """The head's answer, through which gradients pass where they are enabled."""

    @property
    def accept_RK(self) -> Tensor:
        """Probability to accept each candidate, 1 in rows without a choice [R, K]."""
        ids_RK = self.candidates.ids_RK
        accept_RK = self.logits_NK.new_ones(ids_RK.shape, dtype=torch.float64)
        if not self.rows:
            return accept_RK
        rows_N = torch.tensor(self.rows, device=ids_RK.device)
        return accept_RK.index_copy(0, rows_N, self.logits_NK.double().sigmoid())


class ProxyGuide:
    """The law of the token that is emitted when the proxy has accepted one.

    It is exact, so that no candidate is ever drawn here, and a chain's sampler, its seeds and its
    telemetry work as with any other guide. `step.notes["expected_rejects"]` counts rejections.
    """

    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = False
    Settings: ClassVar[type[Config]] = ProxySettings
    varies: ClassVar[tuple[str, ...]] = (*AcceptRules.model_fields, "top_k", "temperature")
    reads_base = True

    def __init__(self, base: CausalLM, head: AcceptHead, settings: ProxySettings) -> None:
        self.settings = settings
        self.head = head
        self.needs_hidden = settings.features == "pre_token"
        self.num_calls = 0
        """Candidates that the proxy was asked about so far."""
        self._base = base
        if settings.p_t_rule == "literal":
            logger.warning(
                "p_t_rule=literal: rejecting a near-certain token forces a near-impossible one, "
                "so that the proxy can leave the language. Use nucleus for anything but ablations."
            )

    @classmethod
    def load(
        cls, folder: str | Path, card: GuideCard, settings: ProxySettings, host: GuideHost
    ) -> "ProxyGuide":
        if card.template != "base":
            raise ConfigError(
                f"template is {card.template!r} in the card of {str(folder)!r}, but a proxy reads "
                "the base's own states. Set template to 'base' in its guide.json."
            )
        block_sizes, num_extra = feature_sizes(settings.features, host.base.model)
        head = load_accept_head(
            folder,
            settings.head,
            block_sizes=block_sizes,
            num_extra=num_extra,
            device=host.device,
        )
        if host.dtype != "auto":
            head = head.to(getattr(torch, host.dtype))
        return cls(host.base, head, settings)

    def vary(self, settings: ProxySettings) -> "ProxyGuide":
        return ProxyGuide(self._base, self.head, settings)

    def begin(self, contexts: Sequence[Context]) -> None:
        """Nothing can start before the base has said what it proposes."""

    def judge(self, logprobs_RV: Tensor, step: Step) -> Judgement:
        """Find the candidates of each row and ask the proxy about them.

        A trainer calls this with gradients enabled; those of the base are not computed.
        """
        candidates = find_candidates(logprobs_RV, self.settings)
        rows = [row for row, count in enumerate(candidates.counts) if count > 1]
        features_NKF = self._features(candidates, rows, step)
        self.num_calls += sum(candidates.counts[row] for row in rows)
        return Judgement(candidates, rows, features_NKF, self.head(features_NKF))

    @torch.inference_mode()
    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: None) -> Tensor:
        return self.follow(self.judge(logprobs_RV, step), logprobs_RV, step)

    def follow(self, judgement: Judgement, logprobs_RV: Tensor, step: Step) -> Tensor:
        """Return the tilt that follows from a judgement of these very rows."""
        law_RK, rejects_R = self.law(judgement)
        step.notes["expected_rejects"] = rejects_R
        guided_RV = torch.full_like(logprobs_RV, -torch.inf)
        logprobs_RK = law_RK.log().log_softmax(-1).to(logprobs_RV.dtype)
        return guided_RV.scatter_(1, judgement.candidates.ids_RK, logprobs_RK)

    def law(self, judgement: Judgement) -> AcceptLaw:
        """Return the law over the candidates that follows from a judgement."""
        found = judgement.candidates
        return accept_law(
            found.logprobs_RK.exp(),
            judgement.accept_RK,
            found.count_R,
            self.settings,
            mass_RK=found.mass_RK,
        )

    def release(self, keys: Sequence[int]) -> None:
        """The caches are the base's, and so is their release."""

    def _features(self, candidates: Candidates, rows: Sequence[int], step: Step) -> Tensor:
        some = list(rows)
        ids_NK, logprobs_NK = candidates.ids_RK[some], candidates.logprobs_RK[some]
        if not some:
            return logprobs_NK.new_empty((*ids_NK.shape, self.head.num_features))
        if self.settings.features == "post_token":
            contexts = [step.contexts[row] for row in rows]
            return post_token_features(self._base.candidates(contexts, ids_NK), logprobs_NK)
        assert step.hidden_RD is not None, "a guide with needs_hidden is given hidden states"
        embedded_NKE = self._base.model.get_input_embeddings()(ids_NK)
        return pre_token_features(step.hidden_RD[some], embedded_NKE, logprobs_NK)
