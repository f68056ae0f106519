"""ARGS: a reward model scores the most likely next tokens.

Khanov et al., "ARGS: Alignment as Reward-Guided Search", ICLR 2024. Shapes: R rows, V vocabulary,
K candidates per row.
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


class ARGSSettings(RewardReading):
    """Where the reward model is, how it is read, and how many tokens it sees."""

    reward: str = "."
    """Folder or hub id of a reward model over the base's token ids; "." is the guide's folder."""
    num_candidates: PositiveInt = 10
    """`k` of the paper."""
    chunk_size: PositiveInt | None = None
    """Candidates per row and forward. None is all of them: fastest, if they fit in memory."""


class ARGSGuide:
    """The paper's score as a law: `log p(v|s) + w * r(s, v)` over the k most likely tokens.

    Temperature 0 is ARGS-greedy and sampling is ARGS-stochastic, whose temperature is the
    request's. `r` is the reward of the text so far with `v` appended. A reward model trained on
    whole answers was never asked about half of one; one that was trained on every prefix turns the
    rule into PARGS (Rashid et al., "A Critical Look At Tokenwise Reward-Guided Text Generation",
    2024), or RAD (Deng and Raffel, "Reward-Augmented Decoding", EMNLP 2023).

    The reward model reads each candidate at the candidate's own position, so one that is the end or
    the padding token is scored like any other. Cost: k forwards of the reward model over one token,
    in one batch.
    """

    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = True
    Settings: ClassVar[type[Config]] = ARGSSettings
    varies: ClassVar[tuple[str, ...]] = ("num_candidates", "chunk_size")
    needs_hidden = False

    def __init__(
        self,
        reward: CandidateRewards,
        *,
        num_candidates: int = 10,
        chunk_size: int | None = None,
    ) -> None:
        self._reward = reward
        self._num_candidates = num_candidates
        self._chunk_size = chunk_size

    @classmethod
    def load(
        cls, folder: str | Path, card: GuideCard, settings: ARGSSettings, host: GuideHost
    ) -> "ARGSGuide":
        return cls(host.load_reward(beside(folder, settings.reward), settings)).vary(settings)

    def vary(self, settings: ARGSSettings) -> "ARGSGuide":
        return ARGSGuide(
            self._reward, num_candidates=settings.num_candidates, chunk_size=settings.chunk_size
        )

    @property
    def scorer(self) -> RewardScorer:
        """The same model, reading whole answers."""
        return RewardScorer(cast(Rewards, self._reward))

    @property
    def max_length(self) -> int:
        return max_length_of(self._reward)

    def begin(self, contexts: Sequence[Context]) -> None:
        """Nothing to start: the candidates are the law's, which is not there yet."""

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: None) -> Tensor:
        candidates_RK = top_candidates(logprobs_RV, self._num_candidates)
        rewards_RK = values_in_chunks(self._reward, step.contexts, candidates_RK, self._chunk_size)
        return tilt_candidates(logprobs_RV, candidates_RK, rewards_RK, step.weights_R)

    def release(self, keys: Sequence[int]) -> None:
        self._reward.release(keys)
