"""What learns from the rewards of its own completions, and how: the settings.

Not rows but prompts are given; the loop decodes, judges and updates.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from pilotfish.config import Config
from pilotfish.guides.proxy_features import ProxySettings
from pilotfish.train.ppo import PPOConfig
from pilotfish.train.proxy_policy import ProxyLearnerConfig
from pilotfish.train.sac import SACConfig


class ProxyConfig(Config):
    """Proxy-RLHF: a tiny network that accepts or rejects what the frozen base proposes.

    Zhu et al., "Proxy-RLHF: Decoupling Generation and Alignment in Large Language Model with
    Proxy", 2024.
    """

    kind: Literal["proxy"] = "proxy"
    settings: ProxySettings = ProxySettings()
    """What the guide will be: its candidates, its rules and its network."""
    learner: ProxyLearnerConfig = ProxyLearnerConfig()
    algorithm: Annotated[PPOConfig | SACConfig, Field(discriminator="kind")] = PPOConfig()

    guide_kind: ClassVar[str | None] = "proxy"

    @model_validator(mode="after")
    def _check_critic(self) -> Self:
        if self.algorithm.kind == "sac" and self.learner.critic != ProxyLearnerConfig().critic:
            raise ValueError(
                "learner.critic is PPO's; the critics of SAC are networks like the proxy's. Leave "
                "it out"
            )
        return self

    def card_fields(self) -> dict[str, Any]:
        """Return what the guide's card says beside its kind."""
        return {"settings": self.settings.model_dump(mode="json")}


class PolicyConfig(Config):
    """RLHF by PPO of a whole model: a baseline, with one reward or a weighted sum of several.

    Ouyang et al., "Training language models to follow instructions with human feedback", NeurIPS
    2022. The frozen base is the reference that `beta_kl` is about.
    """

    kind: Literal["ppo"] = "ppo"
    critic: str | None = None
    """What the critic starts from, such as a reward model; its head starts anew where it has none.
    Default: what the actor starts from."""
    algorithm: PPOConfig = PPOConfig(beta_kl=0.02, normalize_rewards=False)

    guide_kind: ClassVar[str | None] = None

    def card_fields(self) -> dict[str, Any]:
        """A whole model is no guide."""
        return {}


RewardLearningConfig: TypeAlias = ProxyConfig | PolicyConfig
REWARD_LEARNING = (ProxyConfig, PolicyConfig)
