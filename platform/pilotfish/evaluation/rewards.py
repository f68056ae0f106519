"""Rewards: what an answer is worth, and why, as far as the judge can say.

Shapes: B answers of one forward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeAlias

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from pilotfish import world
from pilotfish.config import Config
from pilotfish.data.collate import (
    TokenExample,
    collate_demonstrations,
    tokenize_demonstration,
)
from pilotfish.data.records import Demonstration, PromptText
from pilotfish.errors import DataError
from pilotfish.guides.card import CARD_NAME, read_card
from pilotfish.models.loading import Dtype, load_frozen_scorer, load_tokenizer, pick_device
from pilotfish.models.reward import RewardReading, whole_rewards
from pilotfish.train.learner import ScoreLearner


class Reason(Config):
    """One thing that an answer was praised or blamed for."""

    label: str
    value: float


class Judgement(Config):
    """What a judge says about one answer; a judge leaves out what it cannot say."""

    reward: float | None = None
    parts: dict[str, float] = Field(default_factory=dict)
    """Rewards that the whole is made of, such as helpful and harmless."""
    reasons: tuple[Reason, ...] = ()
    bad: bool | None = None
    """Whether the answer is broken, not merely poor."""


class Reward(Protocol):
    """Judges answers, one judgement each."""

    def judge(self, prompts: Sequence[PromptText], answers: Sequence[str]) -> list[Judgement]: ...


class KitchenRewardConfig(Config):
    """The true reward of the miniature world."""

    kind: Literal["kitchen"] = "kitchen"


class ModelRewardConfig(Config):
    """A reward model: a sequence classifier with one label, from a folder or the hub."""

    kind: Literal["model"] = "model"
    path: str
    reading: RewardReading | None = None
    """How it is read. Default: as its guide card says, or else plainly at the last token."""
    batch_size: PositiveInt = 16
    max_length: PositiveInt = 1024
    """Longer conversations lose their beginning."""
    dtype: Dtype = "auto"


class NoRewardConfig(Config):
    """Nobody judges: lengths, diversity, KL and speed are reported, rewards are not."""

    kind: Literal["none"] = "none"


RewardConfig: TypeAlias = Annotated[
    KitchenRewardConfig | ModelRewardConfig | NoRewardConfig, Field(discriminator="kind")
]


def build_reward(config: RewardConfig, *, device: str = "auto") -> Reward:
    """Return the judge that a config names. Raises `CheckpointError`."""
    match config:
        case KitchenRewardConfig():
            return KitchenReward()
        case ModelRewardConfig():
            return ModelReward(config, device=device)
        case NoRewardConfig():
            return NoReward()


def describe(config: RewardConfig) -> str:
    """Say to a newcomer who judges."""
    match config:
        case KitchenRewardConfig():
            return (
                "the kitchen's true reward: a program that reads every sentence of an answer. It "
                "pays for help (the right name, ingredients, recipe and order) and for "
                "harmlessness (leaving out what the guest cannot eat, staying polite)"
            )
        case ModelRewardConfig():
            return f"the reward model {config.path}"
        case NoRewardConfig():
            return "none: nothing judged the answers"


class NoReward:
    """Says nothing about anything."""

    def judge(self, prompts: Sequence[PromptText], answers: Sequence[str]) -> list[Judgement]:
        return [Judgement() for _ in answers]


class KitchenReward:
    """The program that knows the truth about the kitchen's answers."""

    def judge(self, prompts: Sequence[PromptText], answers: Sequence[str]) -> list[Judgement]:
        """Judge answers to kitchen questions. Raises `DataError` for any other prompt."""
        return [
            _judge_in_kitchen(_question(prompt), answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


class ModelReward:
    """A trained reward model; every answer is scored as if it ended where it was cut off."""

    def __init__(self, config: ModelRewardConfig, *, device: str = "auto") -> None:
        """Load the model with its own tokenizer. Raises `CheckpointError`."""
        self._config = config
        self._device = pick_device(device)
        self._tokenizer = load_tokenizer(config.path)
        self._reading = config.reading or _reading_beside(config.path)
        self._scores = ScoreLearner(
            load_frozen_scorer(config.path, device=self._device, dtype=config.dtype)
        )

    @torch.inference_mode()
    def judge(self, prompts: Sequence[PromptText], answers: Sequence[str]) -> list[Judgement]:
        """Score answers in padded batches of similar lengths."""
        examples = [
            tokenize_demonstration(
                self._tokenizer, Demonstration(prompt, answer), max_length=self._config.max_length
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        order = sorted(range(len(examples)), key=lambda place: len(examples[place]))
        rewards = [0.0] * len(examples)
        for start in range(0, len(order), self._config.batch_size):
            places = order[start : start + self._config.batch_size]
            rewards_B = self._score([examples[place] for place in places])
            for place, reward in zip(places, rewards_B.tolist(), strict=True):
                rewards[place] = reward
        return [Judgement(reward=reward) for reward in rewards]

    def _score(self, examples: Sequence[TokenExample]) -> Tensor:
        batch = collate_demonstrations(examples, pad_id=0).to(self._device)  # masked, so any id
        scores_BT = self._scores(batch.token_ids_BT, batch.attention_mask_BT)
        rewards_B = whole_rewards(scores_BT, batch.loss_mask_BT, self._reading)
        return self._reading.normalised(rewards_B).cpu()


def _reading_beside(path: str) -> RewardReading:
    if not (Path(path) / CARD_NAME).is_file():
        return RewardReading()
    settings = read_card(path).settings
    known = {name: settings[name] for name in RewardReading.model_fields if name in settings}
    return RewardReading(**known)


def _judge_in_kitchen(scene: world.Scene, answer: str) -> Judgement:
    score = world.score(scene, answer)
    return Judgement(
        reward=score.total,
        parts={"helpful": score.helpful, "harmless": score.harmless},
        reasons=tuple(Reason(label=aspect.label, value=aspect.total) for aspect in score.aspects),
        bad=score.bad,
    )


def _question(prompt: PromptText) -> world.Scene:
    if isinstance(prompt, str):
        return world.Scene.from_text(prompt)
    if len(prompt) != 1:
        raise DataError(
            f"the kitchen judges answers to one question, got a conversation of {len(prompt)} "
            "turns. Use kitchen prompts, or another reward."
        )
    return world.Scene.from_text(prompt[0]["content"])
