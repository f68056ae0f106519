"""What drafts are worth: by a reward model over the base's token ids, or by any program."""

import itertools
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from pilotfish.context import Context, Prompt
from pilotfish.errors import ConfigError
from pilotfish.guides.base import Draft


class DraftScorer(Protocol):
    """Says what drafts are worth: a reward model, or any program."""

    def score(self, prompt: Prompt, drafts: Sequence[Draft]) -> Sequence[float]:
        """Return one finite number per draft; more is better."""
        ...


@runtime_checkable
class Judges(Protocol):
    """A guide with a model that says what whole answers are worth."""

    @property
    def scorer(self) -> DraftScorer: ...


class Rewards(Protocol):
    """A reward or value model: `RewardModel`, or something that answers like one."""

    def rewards(self, contexts: Sequence[Context]) -> Tensor: ...

    def release(self, keys: Sequence[int]) -> None: ...


class RewardScorer:
    """A reward model reads the base's own token ids: the prompt, then the draft."""

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards
        self._keys = itertools.count()

    def score(self, prompt: Prompt, drafts: Sequence[Draft]) -> list[float]:
        return self.score_all([prompt], [drafts])[0]

    def score_all(
        self, prompts: Sequence[Prompt], drafts: Sequence[Sequence[Draft]]
    ) -> list[list[float]]:
        """Score the drafts of several prompts in one batch."""
        contexts = [
            Context(next(self._keys), prompt, [*prompt.token_ids, *draft.token_ids])
            for prompt, some in zip(prompts, drafts, strict=True)
            for draft in some
        ]
        rewards = iter(self._rewards.rewards(contexts).tolist())
        self._rewards.release([context.key for context in contexts])
        return [[next(rewards) for _ in some] for some in drafts]


def scores_of(
    scorer: DraftScorer, prompts: Sequence[Prompt], drafts: Sequence[Sequence[Draft]]
) -> list[list[float]]:
    """Return a finite score per draft and prompt. Raises `ConfigError` for anything else."""
    if isinstance(scorer, RewardScorer):
        found = scorer.score_all(prompts, drafts)
    else:
        pairs = zip(prompts, drafts, strict=True)
        found = [[float(score) for score in scorer.score(*pair)] for pair in pairs]
    for scores, some in zip(found, drafts, strict=True):
        if len(scores) != len(some) or not all(map(math.isfinite, scores)):
            raise ConfigError(
                f"{type(scorer).__name__}.score gave {scores} for {len(some)} drafts, wanted one "
                "finite number for each."
            )
    return found
