"""Transfer Q*: the value of a token is the reward of what an aligned model would write after it.

Chakraborty et al., "Transfer Q Star: Principled Decoding for LLM Alignment", NeurIPS 2024. Shapes:
R rows, V vocabulary, K candidates per row, N rollouts per candidate.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pilotfish.config import Config
from pilotfish.context import Context
from pilotfish.errors import ConfigError
from pilotfish.guides.base import Stage, Step
from pilotfish.guides.candidates import tilt_candidates, top_candidates
from pilotfish.guides.card import GuideCard
from pilotfish.guides.host import GuideHost, beside
from pilotfish.guides.rollouts import Rollout, RolloutSource, roll_out
from pilotfish.guides.transfer_q_settings import TransferQSettings
from pilotfish.models.reward import RewardModel
from pilotfish.noise import request_key


class TextRewards(Protocol):
    """A reward model that reads whole texts: `RewardModel`."""

    @property
    def max_length(self) -> int: ...
    def rewards(self, contexts: Sequence[Context]) -> Tensor: ...
    def release(self, keys: Sequence[int]) -> None: ...


def direct_values(rewards: Tensor) -> Tensor:
    """Return `E[r]` under the rollout model [...], which was aligned to `r` itself [..., N]."""
    return rewards.mean(-1)


def indirect_values(rewards: Tensor, baseline: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return `E[r]` under the model aligned to `r` [...], and the effective sample size [...].

    The rollouts [..., N] are of a model aligned to another reward, `baseline`. The model aligned to
    `r` is that one tilted by `exp((r - r_BL) / beta)`, up to a factor nobody knows: hence weights
    that sum to one (self-normalised importance sampling), exact as N grows.
    """
    weights = ((rewards - baseline) / beta).softmax(-1)
    return (weights * rewards).sum(-1), 1 / weights.square().sum(-1)


def published_indirect_values(rewards: Tensor, baseline: Tensor) -> Tensor:
    """Return what the authors' program computes: weights `exp((r - r_BL) / 2)` as they are.

    They do not sum to one, so this is no expectation; `indirect_values` is.
    """
    return (((rewards - baseline) / 2).exp() * rewards).mean(-1)


class TransferQGuide:
    """`log p(v|s) + w * Q(s, v)` over the k most likely tokens, renormalised, with `w = 1/alpha`.

    `Q(s, v)` is the reward of the whole text after `v`, in expectation over the continuations of an
    aligned rollout model; or, indirectly, of one that was aligned to another reward. A candidate
    that ends the text has no continuation, and its value is the reward of the text as it is. With
    rollouts of length 0 the rule is ARGS.

    All rollouts of all rows run in one batch, from the keys and values of their row's text. Cost
    per token: 1 + k * N * L forwards of the rollout model over one token (L is the mean length of
    a rollout) and 1 + k * N texts to each reward model; the 1 keeps the row's own text cached.
    """

    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = True
    Settings: ClassVar[type[Config]] = TransferQSettings
    varies: ClassVar[tuple[str, ...]] = (
        "mode",
        "baseline_reward",
        "beta",
        "num_candidates",
        "num_rollouts",
        "rollout_tokens",
        "max_rollout_tokens",
        "rollout_temperature",
        "proposal",
        "reference_parity",
        "seed",
    )
    needs_hidden = False

    def __init__(
        self,
        rollout: RolloutSource,
        reward: TextRewards,
        baseline_reward: TextRewards | None = None,
        *,
        settings: TransferQSettings,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`baseline_reward` is what the rollout model was aligned to, where that is not `reward`.

        Of the settings, the folders are not looked at here.
        """
        self._rollout = rollout
        self._readers = [reward] if baseline_reward is None else [reward, baseline_reward]
        self._settings = settings
        self._end_ids = end_ids
        self.max_length = min(one.max_length for one in (rollout, *self._readers))
        # Rows have keys from 0 on; those of rollouts only have to differ.
        self._keys = itertools.count(-1, -1)

    @classmethod
    def load(
        cls, folder: str | Path, card: GuideCard, settings: TransferQSettings, host: GuideHost
    ) -> "TransferQGuide":
        # The rows' own texts stay in place beside the rollouts that begin like them.
        num_slots = host.num_slots + settings.rollout_slots

        def load_reward(path: str) -> RewardModel:
            return host.load_reward(
                beside(folder, path),
                settings,
                num_slots=num_slots,
            )

        baseline = settings.baseline_reward
        return cls(
            host.load_lm(beside(folder, settings.rollout), num_slots=num_slots),
            load_reward(settings.reward),
            None if baseline is None else load_reward(baseline),
            settings=settings,
            end_ids=host.end_ids,
        )

    def vary(self, settings: TransferQSettings) -> "TransferQGuide":
        """Raises `ConfigError` for a `baseline_reward` that is not loaded; None leaves it out."""
        reward, *baseline = self._readers
        if settings.baseline_reward is None:
            baseline = [None]
        elif settings.baseline_reward != self._settings.baseline_reward:
            raise ConfigError(
                f"baseline_reward is {settings.baseline_reward!r}, but what is loaded is "
                f"{self._settings.baseline_reward!r}. Leave it as it is, or set it to null."
            )
        return TransferQGuide(
            self._rollout, reward, *baseline, settings=settings, end_ids=self._end_ids
        )

    @torch.inference_mode()
    def begin(self, contexts: Sequence[Context]) -> Tensor:
        """Bring every model to where the rollouts begin; return the rollout model's law [R, V]."""
        for reader in self._readers:
            reader.rewards(contexts)
        return self._rollout.forward(contexts).logprobs_RV

    @torch.inference_mode()
    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: Tensor) -> Tensor:
        settings = self._settings
        proposal_RV = logprobs_RV
        if settings.proposes_from_rollout:
            forbidden_RV = logprobs_RV == -torch.inf
            proposal_RV = evidence.to(logprobs_RV.dtype).masked_fill(forbidden_RV, -torch.inf)
        candidates_RK = top_candidates(proposal_RV, settings.num_candidates)
        allowed_RK = proposal_RV.gather(1, candidates_RK) > -torch.inf
        rewards = self._rewards(step.contexts, candidates_RK, allowed_RK)
        values_RK, ess_RK = self._estimate(rewards)
        if ess_RK is not None:
            step.notes["ess"] = (ess_RK * allowed_RK).sum(-1) / allowed_RK.sum(-1)
        return tilt_candidates(proposal_RV, candidates_RK, values_RK, step.weights_R)

    def _estimate(self, rewards: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return `Q` [R, K] from the rewards [R, K, N], and the sample size that is left of N."""
        if len(rewards) == 1:
            return direct_values(rewards[0]), None
        reward_RKN, baseline_RKN = rewards
        if self._settings.reference_parity:
            return published_indirect_values(reward_RKN, baseline_RKN), None
        assert self._settings.beta is not None, "the settings' validator asks for it"
        return indirect_values(reward_RKN, baseline_RKN, self._settings.beta)

    def release(self, keys: Sequence[int]) -> None:
        for model in (self._rollout, *self._readers):
            model.release(keys)

    def _rewards(
        self, contexts: Sequence[Context], candidates_RK: Tensor, allowed_RK: Tensor
    ) -> list[Tensor]:
        """Return what each reward model says about the candidates' rollouts [R, K, N]."""
        settings = self._settings
        rollouts: list[Rollout] = []
        places: list[int] = []  # in `rollouts`, for each row, candidate and rollout
        for context, tokens, allowed in zip(
            contexts, candidates_RK.tolist(), allowed_RK.tolist(), strict=True
        ):
            noise_key = request_key(settings.seed, context.token_ids)
            for token, may_be in zip(tokens, allowed, strict=True):
                if not may_be:
                    places += [0] * settings.num_rollouts  # no value brings it back
                    continue
                branch = self._branch(context, token, noise_key)
                numbers = range(settings.num_rollouts)
                places += [len(rollouts) + number % len(branch) for number in numbers]
                rollouts += branch
        roll_out(
            self._rollout,
            rollouts,
            end_ids=self._end_ids,
            temperature=settings.temperature,
            at_once=settings.rollout_slots,
        )
        texts = [one.context for one in rollouts]
        shape = (*candidates_RK.shape, settings.num_rollouts)
        return [self._read(reader, texts)[places].view(shape) for reader in self._readers]

    def _branch(self, context: Context, token: int, noise_key: int) -> list[Rollout]:
        """The rollouts of one candidate, not grown yet; a single text where the token ends it."""
        ids, ends = [*context.token_ids, token], token in self._end_ids
        longest = min(len(ids) + self._settings.most_tokens, self.max_length)
        return [
            Rollout(
                Context(next(self._keys), context.prompt, ids.copy(), parent=context.key),
                len(ids) if ends else longest,
                request_key(noise_key, (token, number)),
            )
            for number in range(1 if ends else self._settings.num_rollouts)
        ]

    def _read(self, reader: TextRewards, texts: Sequence[Context]) -> Tensor:
        """Return the reward of each text, as many at a time as leave the rows' own texts alone."""
        found = []
        for at in range(0, len(texts), self._settings.rollout_slots):
            some = texts[at : at + self._settings.rollout_slots]
            found.append(reader.rewards(some))
            reader.release([one.key for one in some])
        return torch.cat(found)
