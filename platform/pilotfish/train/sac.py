"""Discrete SAC on accepts and rejects, as MARA learns its proxy.

Haarnoja et al., "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement Learning with a
Stochastic Actor", ICML 2018; Christodoulou, "Soft Actor-Critic for Discrete Action Settings", 2019;
Zhang et al., "Token-level Accept or Reject: A Micro Alignment Approach for Large Language Models",
IJCAI 2025, for the settings. Unlike MARA's code, the reward of a completion counts once and a
penalty is a log-ratio of probabilities.

Shapes: B decisions of a batch, A = 2 actions (reject, accept), F features of a candidate.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from pilotfish.config import Config
from pilotfish.errors import ConfigError
from pilotfish.guides.proxy_features import ProxySettings
from pilotfish.models.heads import AcceptHead
from pilotfish.train.experience import Episode
from pilotfish.train.metrics import Tally, add
from pilotfish.train.replay import Replay, Transitions, judged


class SACConfig(Config):
    """MARA's settings, but for `beta_kl`; its learning rate is 3e-4."""

    kind: Literal["sac"] = "sac"
    batch_size: PositiveInt = 1024
    """Decisions per update."""
    updates_per_episode: PositiveInt = 10
    learning_starts: NonNegativeInt = 64 * 1024
    """Decisions to hold before the first update."""
    replay_size: PositiveInt = 1_000_000
    """Decisions to hold at most."""
    replay_bytes: PositiveInt = 8 * 2**30
    """Memory to hold them in, at most."""
    gamma: float = Field(default=0.99, gt=0, le=1)
    """Discount per accept or reject."""
    tau: float = Field(default=0.005, gt=0, le=1)
    """How far the target critics follow in one update."""
    initial_alpha: PositiveFloat = 0.01
    """Weight of the entropy at the start; it is tuned to `target_entropy` from there on."""
    target_entropy: float = Field(default=0.6, gt=0, lt=1)
    """Mean entropy of accepting or rejecting, as a share of log 2."""
    gradient_clipping: PositiveFloat = 0.5
    """Largest gradient norm of the actor, and of each critic."""
    beta_kl: NonNegativeFloat = 0.0
    """Price, in reward, of each nat by which a token is likelier than under the base."""


class SACLearner:
    """One learner's actor, twin critics with their targets, and replay."""

    def __init__(
        self,
        actor: AcceptHead,
        settings: ProxySettings,
        config: SACConfig,
        *,
        learning_rate: float,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`actor` is trained in place; MARA's learning rate is the default.

        Raises `ConfigError` for settings whose accepts and rejects cannot be told from the emitted
        tokens, and for a replay that is too small.
        """
        _check_rules(settings)
        self.actor = actor
        self.config = config
        self.replay = Replay(
            actor.num_features, max_decisions=config.replay_size, max_bytes=config.replay_bytes
        )
        self._check_replay()
        self._seed, self._device, self._num_updates = seed, torch.device(device), 0
        # A critic reads the action behind the features.
        num_extra = actor.num_features - sum(actor.block_sizes) + 1
        self.critics = nn.ModuleList(
            AcceptHead(settings.head, block_sizes=actor.block_sizes, num_extra=num_extra)
            for _ in range(2)
        ).to(device)
        self._targets = copy.deepcopy(self.critics).requires_grad_(False)
        self._log_alpha = torch.tensor(
            math.log(config.initial_alpha), device=device, requires_grad=True
        )
        learned = [*actor.parameters(), *self.critics.parameters(), self._log_alpha]
        self._optimizer = torch.optim.Adam(learned, lr=learning_rate)

    @property
    def num_trainable(self) -> int:
        return sum(one.numel() for part in (self.actor, self.critics) for one in part.parameters())

    def learn(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> dict[str, Tally]:
        """Take episodes in, make the updates that are due, and return metrics of them."""
        for episode, reward in zip(episodes, rewards, strict=True):
            self.replay.add(judged(episode, reward, beta_kl=self.config.beta_kl))
        metrics: dict[str, Tally] = {}
        if len(self.replay) >= max(self.config.learning_starts, 1):
            for _ in range(self.config.updates_per_episode * len(episodes)):
                metrics = add(metrics, self.update())
        return metrics

    def update(self) -> dict[str, Tally]:
        """Take one optimizer step on a batch from the replay."""
        batch = self.replay.sample(
            self.config.batch_size, seed=[self._seed, self._num_updates], device=self._device
        )
        losses, entropy = self._losses(batch)
        self._optimizer.zero_grad()
        # Each loss has gradients for its own part alone, so one sum serves them all.
        torch.stack([*losses.values()]).sum().backward()
        for part in (self.actor, *self.critics):
            nn.utils.clip_grad_norm_(part.parameters(), self.config.gradient_clipping)
        self._optimizer.step()
        with torch.no_grad():
            for target, one in zip(
                self._targets.parameters(), self.critics.parameters(), strict=True
            ):
                target.lerp_(one, self.config.tau)
        self._num_updates += 1
        values = {**losses, "entropy": entropy, "alpha": self._log_alpha.exp()}
        return {name: Tally(float(one.detach()), 1) for name, one in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that learning goes on from, the replay included."""
        return {
            "actor": self.actor.state_dict(),
            "critics": self.critics.state_dict(),
            "targets": self._targets.state_dict(),
            "log_alpha": self._log_alpha.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            "num_updates": self._num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.actor.load_state_dict(state["actor"])
        self.critics.load_state_dict(state["critics"])
        self._targets.load_state_dict(state["targets"])
        with torch.no_grad():
            self._log_alpha.copy_(state["log_alpha"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.replay.load_state_dict(state["replay"])
        self._num_updates = state["num_updates"]

    def _losses(self, batch: Transitions) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses of Christodoulou, 2019, equations (4), (12) and (11), and the entropy.

        Critics learn `r + gamma V(s')` with the soft value (10) of the target critics; the actor
        learns `E_pi[alpha log pi - Q]`; alpha rises where the entropy is below its target.
        """
        alpha = self._log_alpha.exp().detach()
        log_pi_BA = _log_policy(self.actor(batch.features_BF))
        pi_BA = log_pi_BA.exp()
        values_BA = [_values(one, batch.features_BF) for one in self.critics]
        with torch.no_grad():
            next_log_pi_BA = _log_policy(self.actor(batch.next_BF))
            next_BA = torch.minimum(*(_values(one, batch.next_BF) for one in self._targets))
            soft_B = (next_log_pi_BA.exp() * (next_BA - alpha * next_log_pi_BA)).sum(-1)
            wanted_B = batch.rewards_B + self.config.gamma * soft_B * ~batch.ended_B
        taken_B1 = batch.accepted_B.long()[:, None]
        errors_B = sum((one.gather(1, taken_B1)[:, 0] - wanted_B).square() for one in values_BA)
        least_BA = torch.minimum(*values_BA).detach()
        entropy_B = -(pi_BA * log_pi_BA).sum(-1)
        surplus = (entropy_B - self.config.target_entropy * math.log(2)).mean().detach()
        losses = {
            "critic_loss": 0.5 * torch.as_tensor(errors_B).mean(),
            "actor_loss": (pi_BA * (alpha * log_pi_BA - least_BA)).sum(-1).mean(),
            "alpha_loss": self._log_alpha.exp() * surplus,
        }
        return losses, entropy_B.mean()

    def _check_replay(self) -> None:
        wanted = max(self.config.learning_starts, self.config.batch_size)
        if self.replay.capacity < wanted:
            raise ConfigError(
                f"a replay of {self.replay.capacity:,} decisions (replay_size="
                f"{self.config.replay_size:,}, replay_bytes={self.config.replay_bytes:,}) never "
                f"holds the {wanted:,} that learning_starts and batch_size want. Raise the first "
                "two, or lower the others."
            )


def _check_rules(settings: ProxySettings) -> None:
    ordered = settings.candidate_order == "ordered" and settings.fallback == "last"
    if not ordered or settings.p_t_rule not in ("nucleus", "min_prob"):
        raise ConfigError(
            "SAC learns from single accepts and rejects, which the emitted tokens show only with "
            "candidate_order=ordered, fallback=last and p_t_rule=nucleus or min_prob; got "
            f"{settings.candidate_order}, {settings.fallback} and {settings.p_t_rule}. "
            "Learn by PPO, or change them."
        )


def _log_policy(logits_B: Tensor) -> Tensor:
    return torch.stack([F.logsigmoid(-logits_B), F.logsigmoid(logits_B)], dim=-1)


def _values(critic: nn.Module, features_BF: Tensor) -> Tensor:
    """Return the value of each action [B, A]."""
    both_BAF = features_BF.float()[:, None].expand(-1, 2, -1)
    action_A1 = torch.tensor([[0.0], [1.0]], device=features_BF.device)
    return critic(torch.cat([both_BAF, action_A1.expand(len(features_BF), 2, 1)], dim=-1))
