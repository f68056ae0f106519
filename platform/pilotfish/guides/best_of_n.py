"""Draw several drafts and keep one: best-of-N, its soft form, and controlled decoding by blocks.

Shapes: N drafts.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt

from pilotfish.config import Config
from pilotfish.context import Prompt
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides.base import Draft, Stage
from pilotfish.guides.card import GuideCard
from pilotfish.guides.host import GuideHost, beside
from pilotfish.guides.scoring import DraftScorer, RewardScorer, scores_of
from pilotfish.models.reward import RewardReading
from pilotfish.noise import invert_cdf


class BestOfNSettings(RewardReading):
    """What a best-of-N card says beside its kind."""

    reward: str = "."
    """Folder or hub id of a reward model over the base's token ids; "." is the guide's folder."""
    num_drafts: PositiveInt = 16
    inverse_temperature: NonNegativeFloat | None = None
    """None keeps the best; a number b draws among the drafts in proportion to exp(b * reward)."""


class BlockwiseSettings(RewardReading):
    """What the card of controlled decoding by blocks says beside its kind."""

    value: str = "."
    """Folder or hub id of a value model (a sequence classifier with one label, trained on prefixes)
    over the base's token ids; "." is the guide's folder."""
    num_drafts: PositiveInt = 4
    """`K` of the paper."""
    block_tokens: PositiveInt = 16
    """`M` of the paper."""


class BestOfN:
    """Keep the best of N whole answers, as a reward sees them.

    With F the distribution of the reward of one draft, the law is `F(y)^N - F(y-)^N`, and its KL
    from that of one draft is at most `log N - (N-1)/N` (Beirami et al., "Theoretical guarantees on
    the best-of-n alignment policy", ICML 2025). With `inverse_temperature` b draft i goes on with
    probability proportional to `exp(b r_i)` (Verdun et al., "Soft Best-of-n Sampling for Model
    Alignment", ISIT 2025): 0 is one draft, and the limit is the best. The first of equals wins.
    """

    stage: ClassVar[Stage] = Stage.SELECTION
    takes_weight: ClassVar[bool] = False
    Settings: ClassVar[type[Config]] = BestOfNSettings
    varies: ClassVar[tuple[str, ...]] = ("num_drafts", "inverse_temperature")
    block_tokens: int | None = None

    def __init__(
        self,
        scorer: DraftScorer,
        *,
        num_drafts: int = 16,
        inverse_temperature: float | None = None,
        max_length: int | None = None,
    ) -> None:
        """`max_length` bounds the tokens of prompt and draft that the scorer can read."""
        _check_at_least_one("num_drafts", num_drafts)
        if inverse_temperature is not None and not 0 <= inverse_temperature < math.inf:
            raise ConfigError(
                f"inverse_temperature is {inverse_temperature}, wanted a finite number >= 0, or "
                "None for the best draft."
            )
        self.num_drafts = num_drafts
        self.scorer = scorer
        self._inverse_temperature = inverse_temperature
        self._max_length = max_length

    @classmethod
    def load(
        cls, folder: str | Path, card: GuideCard, settings: BestOfNSettings, host: GuideHost
    ) -> "BestOfN":
        rewards = host.load_reward(beside(folder, settings.reward), settings)
        return cls(RewardScorer(rewards), max_length=rewards.max_length).vary(settings)

    def vary(self, settings: BestOfNSettings) -> "BestOfN":
        return BestOfN(
            self.scorer,
            num_drafts=settings.num_drafts,
            inverse_temperature=settings.inverse_temperature,
            max_length=self._max_length,
        )

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        _check_length(prompt, max_tokens, self._max_length)

    def choose(self, prompt: Prompt, drafts: Sequence[Draft], uniform: float) -> int:
        return self.choose_all([prompt], [drafts], [uniform])[0]

    def choose_all(
        self,
        prompts: Sequence[Prompt],
        drafts: Sequence[Sequence[Draft]],
        uniforms: Sequence[float],
    ) -> list[int]:
        scores = scores_of(self.scorer, prompts, drafts)
        return [self._pick(*both) for both in zip(scores, uniforms, strict=True)]

    def _pick(self, rewards: Sequence[float], uniform: float) -> int:
        if self._inverse_temperature is None:
            return _best(rewards)
        rewards_1N = torch.tensor([rewards], dtype=torch.float64)
        probs_1N = (self._inverse_temperature * rewards_1N).softmax(-1)
        return int(invert_cdf(probs_1N, torch.tensor([uniform])))


class BlockwiseCD:
    """Draw K continuations of M tokens, keep the one of highest value, and go on behind it.

    Mudgal et al., "Controlled Decoding from Language Models", ICML 2024, the blockwise form. With M
    as long as the answer this is best-of-K with the value as reward. The first of equals wins.
    """

    stage: ClassVar[Stage] = Stage.SELECTION
    takes_weight: ClassVar[bool] = False
    Settings: ClassVar[type[Config]] = BlockwiseSettings
    varies: ClassVar[tuple[str, ...]] = ("num_drafts", "block_tokens")

    def __init__(
        self,
        scorer: DraftScorer,
        *,
        num_drafts: int = 4,
        block_tokens: int = 16,
        max_length: int | None = None,
    ) -> None:
        """`scorer` sees beginnings of answers; `max_length` is as in `BestOfN`."""
        _check_at_least_one("num_drafts", num_drafts)
        _check_at_least_one("block_tokens", block_tokens)
        self.num_drafts = num_drafts
        self.block_tokens: int | None = block_tokens
        self.scorer = scorer
        self._max_length = max_length

    @classmethod
    def load(
        cls, folder: str | Path, card: GuideCard, settings: BlockwiseSettings, host: GuideHost
    ) -> "BlockwiseCD":
        values = host.load_reward(
            beside(folder, settings.value),
            settings,
            # Room for the beginnings that were just looked at, since the next ones share them.
            num_slots=2 * max(host.num_slots, settings.num_drafts),
        )
        return cls(RewardScorer(values), max_length=values.max_length).vary(settings)

    def vary(self, settings: BlockwiseSettings) -> "BlockwiseCD":
        return BlockwiseCD(
            self.scorer,
            num_drafts=settings.num_drafts,
            block_tokens=settings.block_tokens,
            max_length=self._max_length,
        )

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        _check_length(prompt, max_tokens, self._max_length)

    def choose(self, prompt: Prompt, drafts: Sequence[Draft], uniform: float) -> int:
        return self.choose_all([prompt], [drafts], [uniform])[0]

    def choose_all(
        self,
        prompts: Sequence[Prompt],
        drafts: Sequence[Sequence[Draft]],
        uniforms: Sequence[float],
    ) -> list[int]:
        return [_best(scores) for scores in scores_of(self.scorer, prompts, drafts)]


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _check_at_least_one(name: str, number: int) -> None:
    if number < 1:
        raise ConfigError(f"{name} is {number}, wanted an integer >= 1.")


def _check_length(prompt: Prompt, max_tokens: int, max_length: int | None) -> None:
    num_prompt = len(prompt.token_ids)
    if max_length is not None and num_prompt + max_tokens > max_length:
        raise PromptError(
            f"prompt of {num_prompt} tokens plus max_tokens={max_tokens} is more than the "
            f"{max_length} positions of the model that compares the drafts. Shorten one of them, "
            "or leave the selection out."
        )
