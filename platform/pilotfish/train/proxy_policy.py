"""What learns when a proxy learns from reward: its accept head, and a critic beside it.

Zhu et al., "Proxy-RLHF: Decoupling Generation and Alignment in Large Language Model with Proxy",
2024, whose decisions are accepts and rejects. We act on tokens instead: the law of the emitted
token is exact and differentiable, so its log-prob is all that PPO needs. For the order `ordered`
with the fallback `last` it is the joint log-prob of the rejects and the accept behind them; else it
sums over the draws that nobody saw, which is the served law with less variance.

Shapes: E episodes, T decisions of the longest one, N decisions of all of them, K candidates padded
on the right, M candidates of all decisions, F features, D hidden size.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilotfish.config import Config
from pilotfish.errors import ConfigError
from pilotfish.guides.acceptance import AcceptRules, accept_law
from pilotfish.guides.proxy_features import ProxySettings, feature_sizes
from pilotfish.models.heads import AcceptHead, HeadSettings
from pilotfish.train.experience import Episode, Offers, mask_of
from pilotfish.train.ppo import Evaluation

MAX_SHARE = 0.01
"""Of the base's parameters that a proxy and its critic may have: Proxy-RLHF's own claim."""

_TINY = 1e-30  # a law may come to forbid the token once drawn; its log stays finite


class ProxyLearnerConfig(Config):
    """How a proxy starts, and what learns beside it."""

    initial_accept: float = Field(default=0.88, gt=0, lt=1)
    """Probability to accept any candidate before the first update. All start alike, so that the
    untrained proxy is a known law to compare with."""
    critic: HeadSettings = HeadSettings(hidden=(64,), activation="tanh")


class ProxyPolicy(nn.Module):
    """An accept head as the actor, and as the critic a network like it that reads the base's last
    hidden state. It is asked about recorded states; the base takes no part."""

    def __init__(self, actor: AcceptHead, critic: AcceptHead, rules: AcceptRules) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic
        self._rules = rules

    @property
    def num_trainable(self) -> int:
        return sum(one.numel() for one in self.parameters() if one.requires_grad)

    def forward(
        self,
        mask_ET: Tensor,
        features_MF: Tensor,
        states_ND: Tensor,
        logprobs_NK: Tensor,
        mass_NK: Tensor,
        count_N: Tensor,
        choice_N: Tensor,
    ) -> Evaluation:
        """Judge recorded decisions anew; the arguments are what `collate` makes."""
        real_NK = torch.arange(logprobs_NK.shape[1], device=count_N.device) < count_N[:, None]
        accept_M = self.actor(features_MF).double().sigmoid()
        accept_NK = torch.zeros_like(logprobs_NK).masked_scatter(real_NK, accept_M)
        law_NK = accept_NK  # of no rows, where no episode of a minibatch had a choice
        if len(count_N):
            law_NK = accept_law(
                logprobs_NK.exp(), accept_NK, count_N, self._rules, mass_RK=mass_NK
            ).law_RK
        log_law_NK = law_NK.clamp_min(_TINY).log()
        found = (
            log_law_NK.gather(1, choice_N[:, None])[:, 0],
            -(law_NK * log_law_NK).sum(-1),
            self.critic(states_ND).double(),
        )
        blank_ET = torch.zeros(mask_ET.shape, dtype=torch.float64, device=mask_ET.device)
        return Evaluation(*(blank_ET.masked_scatter(mask_ET, one_N) for one_N in found))


def collate(
    episodes: Sequence[Episode], *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return what `ProxyPolicy.forward` takes, of some episodes."""
    offers = [_offers(episode) for episode in episodes]
    counts = np.concatenate([one.counts_N for one in offers])
    counts_N = torch.from_numpy(counts).long()
    real_NK = torch.arange(counts.max(initial=1)) < counts_N[:, None]

    def rows(flat: list[np.ndarray], padding: float) -> Tensor:
        padded_NK = torch.full(real_NK.shape, padding, dtype=torch.float64)
        return padded_NK.masked_scatter(real_NK, torch.from_numpy(np.concatenate(flat)))

    inputs = {
        "mask_ET": mask_of(episodes),
        "features_MF": torch.from_numpy(np.concatenate([one.features_MF for one in offers])),
        "states_ND": torch.from_numpy(np.concatenate([one.states_ND for one in offers])),
        "logprobs_NK": rows([one.logprobs_M for one in offers], -math.inf),
        "mass_NK": rows([one.mass_M for one in offers], 0.0),
        "count_N": counts_N,
        "choice_N": torch.from_numpy(np.concatenate([one.choices_N for one in offers])).long(),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _offers(episode: Episode) -> Offers:
    assert episode.offers is not None, "the episode of a proxy"
    return episode.offers


def new_policy(
    settings: ProxySettings, config: ProxyLearnerConfig, base: PreTrainedModel
) -> ProxyPolicy:
    """Return an untrained policy: one accept probability for all, one value for all."""
    block_sizes, num_extra = feature_sizes(settings.features, base)
    actor = AcceptHead(settings.head, block_sizes=block_sizes, num_extra=num_extra)
    critic = AcceptHead(config.critic, block_sizes=block_sizes[:1])
    odds = config.initial_accept / (1 - config.initial_accept)
    for head, value in ((actor, math.log(odds)), (critic, 0.0)):
        last = head.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, value)
    return ProxyPolicy(actor, critic, settings)


def trainable_share(num_trainable: int, num_base: int) -> float:
    """Return trained parameters over the base's. Raises `ConfigError` above `MAX_SHARE`."""
    share = num_trainable / num_base
    if share > MAX_SHARE:
        raise ConfigError(
            f"the proxy and its critic have {num_trainable:,} parameters, {share:.2%} of the "
            f"base's {num_base:,}, wanted at most {MAX_SHARE:.0%}. Shrink head.hidden (of the "
            "proxy) or critic.hidden."
        )
    return share
