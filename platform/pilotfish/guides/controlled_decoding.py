"""Controlled decoding, token by token: a value model scores the most likely next tokens.

Mudgal et al., "Controlled Decoding from Language Models", ICML 2024 (CD-FUDGE and CD-Q); Yang and
Klein, "FUDGE: Controlled Text Generation With Future Discriminators", NAACL 2021. Shapes: R rows, V
vocabulary, K candidates per row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

from pydantic import PositiveInt
from torch import Tensor

from pilotfish.config import Config
from pilotfish.context import Context
from pilotfish.guides.base import Stage, Step, max_length_of
from pilotfish.guides.candidates import (
    CandidateRewards,
    tilt_candidates,
    top_candidates,
    values_in_chunks,
)
from pilotfish.guides.card import GuideCard
from pilotfish.guides.host import GuideHost, beside
from pilotfish.guides.scoring import Rewards, RewardScorer
from pilotfish.models.reward import RewardReading


class ControlledDecodingSettings(RewardReading):
    """Where the value model is, how it is read, and how many tokens it sees."""

    value: str = "."
    """Folder or hub id of a value model (a sequence classifier with one label, trained on prefixes)
    over the base's token ids; "." is the guide's folder."""
    num_candidates: PositiveInt | None = 40
    """None is the whole vocabulary, for small ones."""
    chunk_size: PositiveInt | None = None
    """Candidates per row and forward. None is all of them: fastest, if they fit in memory."""


class ControlledDecodingGuide:
    """`p(v|s) exp(w * V(sv))` over the most likely tokens, renormalised.

    `V` is a prefix scorer: what a text that begins like this will earn, in expectation over the
    base's continuations. With the soft value `beta * log E exp(r / beta)` in its place, `w = 1 /
    beta` and the whole vocabulary, the law is the optimum of `E[r] - beta * KL`. With the log of a
    classifier's probability and `w = 1` it is FUDGE. The rule is that of ARGS; what differs is what
    the model was trained to say.

    Cost: k forwards of the value model over one token, in one batch.
    """

    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = True
    Settings: ClassVar[type[Config]] = ControlledDecodingSettings
    varies: ClassVar[tuple[str, ...]] = ("num_candidates", "chunk_size")
    needs_hidden = False

    def __init__(
        self,
        value: CandidateRewards,
        *,
        num_candidates: int | None = 40,
        chunk_size: int | None = None,
    ) -> None:
        self._value = value
        self._num_candidates = num_candidates
        self._chunk_size = chunk_size

    @classmethod
    def load(
        cls,
        folder: str | Path,
        card: GuideCard,
        settings: ControlledDecodingSettings,
        host: GuideHost,
    ) -> "ControlledDecodingGuide":
        return cls(host.load_reward(beside(folder, settings.value), settings)).vary(settings)

    def vary(self, settings: ControlledDecodingSettings) -> "ControlledDecodingGuide":
        return ControlledDecodingGuide(
            self._value, num_candidates=settings.num_candidates, chunk_size=settings.chunk_size
        )

    @property
    def scorer(self) -> RewardScorer:
        """The same model, reading whole answers."""
        return RewardScorer(cast(Rewards, self._value))

    @property
    def max_length(self) -> int:
        return max_length_of(self._value)

    def begin(self, contexts: Sequence[Context]) -> None:
        """Nothing to start: the candidates are the law's, which is not there yet."""

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: None) -> Tensor:
        candidates_RK = top_candidates(logprobs_RV, self._num_candidates)
        values_RK = values_in_chunks(self._value, step.contexts, candidates_RK, self._chunk_size)
        return tilt_candidates(logprobs_RV, candidates_RK, values_RK, step.weights_R)

    def release(self, keys: Sequence[int]) -> None:
        self._value.release(keys)
