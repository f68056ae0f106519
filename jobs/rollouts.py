"""Completions of the policy that is trained, decoded and judged: in a worker, or in actors.

Every completion has a seed of its own, counted by iteration, prompt and sample: what comes of a
rollout depends neither on who decodes it, nor on how often it is begun anew.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jobs.rollout_config import RewardTerm, RolloutConfig
from pilotfish.chat import render_prompt
from pilotfish.context import Prompt
from pilotfish.data.records import PromptText
from pilotfish.decode.detokenize import TextStream
from pilotfish.decode.sequence import SamplingParams
from pilotfish.errors import ConfigError
from pilotfish.evaluation.rewards import Judgement, Reward, build_reward
from pilotfish.train.experience import Episode
from pilotfish.train.rollout import Ask, rollout_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The prompts of one iteration that one worker takes."""

    iteration: int
    places: Sequence[int]
    """Of the prompts among those of all workers."""
    prompts: Sequence[PromptText]
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Episodes, those of one prompt side by side, and what they earned."""

    episodes: list[Episode]
    rewards: list[float]
    monitored: list[Judgement] | None
    decode_seconds: float
    reward_seconds: float


class Sampler(Protocol):
    """Decodes with the policy."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights that the policy has now."""
        ...

    def collect(
        self, asks: Sequence[Ask], params: SamplingParams, *, guided: bool = True
    ) -> list[Episode]:
        """Decode; without `guided`, from the base alone."""
        ...


class Roller:
    """Decodes and judges."""

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutConfig,
        *,
        seed: int,
        device: str,
    ) -> None:
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._config = config
        self._seed = seed
        self._judges = [build_reward(term.judge, device=device) for term in config.rewards]
        self._monitor = None if config.monitor is None else build_reward(config.monitor)

    def roll(self, share: Share, weights: Mapping[str, Tensor], *, guided: bool = True) -> Rollout:
        """Answer a share of the prompts with these weights."""
        self._sampler.load(weights)
        asks = [
            Ask(self._prompt(prompt), self._seed_of(share.iteration, place, sample))
            for place, prompt in zip(share.places, share.prompts, strict=True)
            for sample in range(share.num_samples)
        ]
        params = SamplingParams(max_tokens=self._config.max_tokens, stop=self._config.stop)
        started = time.perf_counter()
        episodes = self._sampler.collect(asks, params, guided=guided)
        decoded = time.perf_counter()
        prompts = [prompt for prompt in share.prompts for _ in range(share.num_samples)]
        texts = [self._text(episode) for episode in episodes]
        rewards = weighted_rewards(self._config.rewards, self._judges, prompts, texts)
        judged = time.perf_counter()
        monitored = None if self._monitor is None else self._monitor.judge(prompts, texts)
        return Rollout(
            episodes=episodes,
            rewards=rewards,
            monitored=monitored,
            decode_seconds=decoded - started,
            reward_seconds=judged - decoded,
        )

    def _seed_of(self, iteration: int, place: int, sample: int) -> int:
        return rollout_seed(self._seed, iteration=iteration, prompt=place, sample=sample)

    def _prompt(self, prompt: PromptText) -> Prompt:
        token_ids = render_prompt(self._tokenizer, prompt)
        if isinstance(prompt, str):
            return Prompt(token_ids, text=prompt)
        return Prompt(token_ids, messages=tuple(prompt))

    def _text(self, episode: Episode) -> str:
        """Return the text that would be served."""
        stream = TextStream(self._tokenizer, self._config.stop)
        for token_id in episode.completion_ids.tolist():
            stream.push(token_id)
        stream.flush()
        return stream.text


def weighted_rewards(
    terms: Sequence[RewardTerm],
    judges: Sequence[Reward],
    prompts: Sequence[PromptText],
    texts: Sequence[str],
) -> list[float]:
    """Return the weighted sum of what the judges say of each text."""
    totals = [0.0] * len(texts)
    for term, judge in zip(terms, judges, strict=True):
        for place, judgement in enumerate(judge.judge(prompts, texts)):
            totals[place] += term.weight * _value(judgement, term)
    return totals


def _value(judgement: Judgement, term: RewardTerm) -> float:
    found = judgement.reward if term.part is None else judgement.parts.get(term.part)
    if found is None:
        what = "reward" if term.part is None else f"part {term.part!r}"
        raise ConfigError(
            f"the judge {term.judge.kind!r} gives no {what} (its parts: "
            f"{', '.join(judgement.parts) or 'none'}). Name another part or judge in "
            "rollout.rewards."
        )
    return found
