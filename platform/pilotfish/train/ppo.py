"""PPO: from rewards to advantages, and from advantages to a loss.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, on advantages of Schulman et al.,
"High-Dimensional Continuous Control Using Generalized Advantage Estimation", ICLR 2016.

Shapes: E episodes, T decisions of the longest one, padded on the right.

Pure functions of tensors, which know neither policies nor workers. What must be summed over all
workers goes through `total`, which adds a tensor over them; alone, it is the tensor itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from pilotfish.config import Config
from pilotfish.errors import ConfigError
from pilotfish.train.experience import Decisions
from pilotfish.train.metrics import Tally
from pilotfish.train.objectives import LossOutput

Total = Callable[[Tensor], Tensor]


class PPOConfig(Config):
    """How a policy learns from the rewards of its own completions."""

    kind: Literal["ppo"] = "ppo"
    clip: PositiveFloat = 0.2
    """How far the probability ratio of a token may move from 1 before it earns nothing more."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per decision."""
    epochs: PositiveInt = 4
    """Passes over the episodes of one rollout."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps per epoch."""
    entropy: NonNegativeFloat = 0.01
    value: NonNegativeFloat = 0.5
    """Weight of the squared error of the values."""
    value_clip: PositiveFloat | None = None
    """How far a value may move from the one of the rollout before it earns nothing more."""
    target_kl: PositiveFloat | None = 0.03
    """Stop with these episodes when a minibatch's KL to the law that drew them exceeds this many
    nats per decision; None never stops."""
    normalize_rewards: bool = True
    """Whiten the rewards over the episodes of all workers."""
    normalize_advantages: bool = True
    """Whiten the advantages over the decisions of all workers."""
    beta_kl: NonNegativeFloat = 0.0
    """Price, in reward, of each nat by which a token is likelier than under the base."""

    @model_validator(mode="after")
    def _check_price(self) -> Self:
        if self.beta_kl and self.normalize_rewards:
            raise ValueError(
                f"beta_kl is {self.beta_kl}, a price in units of the reward, which "
                "normalize_rewards changes with every batch: as rewards come to agree, the price "
                "would fall to nothing. Set normalize_rewards: false"
            )
        return self


class Evaluation(NamedTuple):
    """What a policy says today about decisions of a rollout; padding is 0."""

    logprobs_ET: Tensor
    entropy_ET: Tensor
    values_ET: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What PPO must know about each decision; no gradients."""

    mask_ET: Tensor
    logprobs_ET: Tensor
    """Under the law that drew them."""
    values_ET: Tensor
    """Before the first update."""
    advantages_ET: Tensor
    returns_ET: Tensor

    @property
    def num_units(self) -> int:
        """Decisions: what the loss is a mean over, so what weighs it among minibatches."""
        return int(self.mask_ET.sum())

    def select(self, episodes: Sequence[int]) -> "Targets":
        """Return those of some episodes, no wider than they need."""
        rows = list(episodes)
        longest = int(self.mask_ET[rows].sum(1).max())
        return Targets(
            **{field.name: getattr(self, field.name)[rows, :longest] for field in fields(self)}
        )


def alone(tensor: Tensor) -> Tensor:
    """The `total` of one worker."""
    return tensor


def estimate(
    taken: Decisions,
    rewards_E: Tensor,
    values_ET: Tensor,
    config: PPOConfig,
    *,
    total: Total = alone,
) -> tuple[Targets, dict[str, Tally]]:
    """Return what to learn from a rollout, and metrics of it.

    `values_ET` is what the critic said of each decision. Every worker must call this together.
    """
    mask_ET = taken.mask_ET
    if config.normalize_rewards:
        rewards_E = whiten(rewards_E, torch.ones_like(rewards_E, dtype=torch.bool), total=total)
    rewards_ET = token_rewards(rewards_E, taken, beta_kl=config.beta_kl)
    values_ET = values_ET.detach().where(mask_ET, 0.0)
    advantages_ET = gae(rewards_ET, values_ET, gamma=config.gamma, gae_lambda=config.gae_lambda)
    advantages_ET = advantages_ET.where(mask_ET, 0.0)
    returns_ET = advantages_ET + values_ET
    unexplained, spread = (
        _variance(one_ET, mask_ET, total) for one_ET in (advantages_ET, returns_ET)
    )
    metrics = {
        "kl": Tally(float((taken.logprobs_ET - taken.base_logprobs_ET).sum()), len(mask_ET)),
        "explained_variance": Tally(1 - unexplained / spread if spread > 0 else 0.0, 1),
    }
    if config.normalize_advantages:
        advantages_ET = whiten(advantages_ET, mask_ET, total=total)
    targets = Targets(
        mask_ET=mask_ET,
        logprobs_ET=taken.logprobs_ET,
        values_ET=values_ET,
        advantages_ET=advantages_ET,
        returns_ET=returns_ET,
    )
    return targets, metrics


def token_rewards(
    rewards_E: Tensor, taken: Decisions, *, beta_kl: float = 0.0, baseline: float = 0.0
) -> Tensor:
    """Return the reward of each decision [E, T].

    The reward of the whole completion, less a baseline, counts once, at its last decision; each
    decision costs `beta_kl` times its log-ratio to the base. So they sum to
    `reward - baseline - beta_kl * KL`. An episode without decisions has none to reward.
    """
    num_E1 = taken.mask_ET.sum(1, keepdim=True)
    last_ET = torch.arange(taken.mask_ET.shape[1], device=num_E1.device) == num_E1 - 1
    penalty_ET = beta_kl * (taken.logprobs_ET - taken.base_logprobs_ET)
    return last_ET * (rewards_E - baseline)[:, None] - penalty_ET


def gae(rewards_ET: Tensor, values_ET: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Return generalised advantages [E, T] (Schulman et al., 2016, equations (11) and (16)).

    `A_t = sum_l (gamma lambda)^l delta_{t+l}` with `delta_t = r_t + gamma V_{t+1} - V_t`. Episodes
    end: what stands behind their last decision must be 0 in both, and is worth nothing.
    """
    advantages_ET = torch.zeros_like(rewards_ET)
    advantage_E = next_E = rewards_ET.new_zeros(len(rewards_ET))
    for at in reversed(range(rewards_ET.shape[1])):
        delta_E = rewards_ET[:, at] + gamma * next_E - values_ET[:, at]
        advantage_E = delta_E + gamma * gae_lambda * advantage_E
        advantages_ET[:, at], next_E = advantage_E, values_ET[:, at]
    return advantages_ET


def whiten(values: Tensor, mask: Tensor, *, total: Total = alone) -> Tensor:
    """Return `(x - mean) / std` over the masked entries of all workers, and 0 elsewhere."""
    centred, variance = _centre(values, mask, total)
    return (centred / (variance.sqrt() + 1e-8)).to(values.dtype)


def _variance(values: Tensor, mask: Tensor, total: Total) -> float:
    return float(_centre(values, mask, total)[1])


def _centre(values: Tensor, mask: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """Return deviations from the mean, and their mean square, in float64."""
    # Two sums one after the other: a mean of squares less a squared mean would lose its digits.
    masked = values.double().where(mask, 0.0)
    num, sum_ = total(torch.stack([mask.sum().double(), masked.sum()]))
    centred = (masked - sum_ / num.clamp_min(1)).where(mask, 0.0)
    return centred, total(centred.square().sum()) / num.clamp_min(1)


def ppo_loss(found: Evaluation, targets: Targets, config: PPOConfig) -> LossOutput:
    """Return the loss averaged over the decisions, `targets.num_units` of them.

    Schulman et al., 2017, equations (7) and (9): the clipped surrogate, the squared error of the
    values and an entropy bonus. `approx_kl` estimates KL(law of the rollout || law of today).
    """
    mask_ET, advantages_ET = targets.mask_ET, targets.advantages_ET
    log_ratio_ET = (found.logprobs_ET - targets.logprobs_ET).where(mask_ET, 0.0)
    ratio_ET = log_ratio_ET.exp()
    clipped_ET = ratio_ET.clamp(1 - config.clip, 1 + config.clip)
    policy_ET = -torch.minimum(ratio_ET * advantages_ET, clipped_ET * advantages_ET)
    error_ET = _value_error(found.values_ET, targets, config.value_clip)
    loss_ET = policy_ET + config.value * error_ET - config.entropy * found.entropy_ET
    terms = {
        "loss": loss_ET,
        "policy_loss": policy_ET,
        "value_loss": error_ET,
        "entropy": found.entropy_ET,
        # Never negative, unlike the mean of the log-ratios, and of less variance.
        "approx_kl": ratio_ET - 1 - log_ratio_ET,
        "clip_fraction": (clipped_ET != ratio_ET).double(),
    }
    sums = torch.stack(
        [one_ET.detach().where(mask_ET, 0).sum().double() for one_ET in terms.values()]
    )
    num = targets.num_units
    return LossOutput(
        loss=loss_ET.where(mask_ET, 0.0).sum() / max(num, 1),
        metrics={name: Tally(one, num) for name, one in zip(terms, sums.tolist(), strict=True)},
    )


def _value_error(values_ET: Tensor, targets: Targets, clip: float | None) -> Tensor:
    error_ET = (values_ET - targets.returns_ET).square()
    if clip is None:
        return error_ET
    moved_ET = (values_ET - targets.values_ET).clamp(-clip, clip)
    return torch.maximum(error_ET, (targets.values_ET + moved_ET - targets.returns_ET).square())


def too_far(approx_kl: Tally, config: PPOConfig) -> bool:
    """Say whether to stop with this rollout; `approx_kl` is a minibatch's, over all workers."""
    return config.target_kl is not None and approx_kl.mean > config.target_kl


def minibatches(
    num_episodes: int, config: PPOConfig, *, seed: Sequence[int]
) -> Iterator[list[int]]:
    """Yield the episodes of each optimizer step: every epoch shuffles, and takes each once.

    A function of the seed, which should count iterations and workers. Raises `ConfigError` for
    fewer episodes than minibatches.
    """
    if num_episodes < config.num_minibatches:
        raise ConfigError(
            f"{num_episodes} episodes per worker and iteration cannot make num_minibatches="
            f"{config.num_minibatches}. Collect more episodes, or lower it."
        )
    for epoch in range(config.epochs):
        order = np.random.default_rng([*seed, epoch]).permutation(num_episodes)
        for part in np.array_split(order, config.num_minibatches):
            yield part.tolist()
