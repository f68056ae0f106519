"""The policies that learn from reward, as the training loop sees them, and how each decodes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jobs.checkpoint import gathered_state
from jobs.config import JobConfig
from jobs.engine import partitioned_loading
from jobs.model import build_model, merged
from jobs.rollouts import Sampler
from pilotfish.chat import stop_ids
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import SamplingParams
from pilotfish.guides.proxy_features import ProxySettings, feature_sizes
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.heads import AcceptHead, save_accept_head
from pilotfish.train import lm_policy, proxy_policy
from pilotfish.train.experience import Episode
from pilotfish.train.export import save_model
from pilotfish.train.lm_policy import LMPolicy, actor_engine, with_reference
from pilotfish.train.ppo import Evaluation, PPOConfig
from pilotfish.train.proxy_policy import ProxyPolicy, new_policy, trainable_share
from pilotfish.train.recording import RecordingProxy
from pilotfish.train.reward_learning import PolicyConfig, ProxyConfig
from pilotfish.train.rollout import Ask
from pilotfish.train.rollout import collect as collect_episodes
from pilotfish.train.sac import SACConfig

_GUIDE = "proxy"


class PolicyLearning(Protocol):
    """What is trained from reward. `evaluate`, `weights` and `write` are collectives."""

    @property
    def module(self) -> nn.Module:
        """Everything that has gradients."""
        ...

    @property
    def algorithm(self) -> PPOConfig | SACConfig: ...

    @property
    def facts(self) -> Mapping[str, float]:
        """What is worth reporting about it before it learns."""
        ...

    def evaluate(self, engine: Any, episodes: Sequence[Episode]) -> Evaluation:
        """Judge the decisions of episodes anew, through the engine around `module`."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return what a sampler loads, on the CPU."""
        ...

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None: ...


def new_learning(
    config: JobConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PolicyLearning:
    """Return what a job trains; of the base, shapes are all that is read."""
    objective = config.objective
    if isinstance(objective, ProxyConfig):
        return ProxyLearning(objective, base)
    assert isinstance(objective, PolicyConfig)
    return LMLearning(config, objective, tokenizer)


def new_sampler(config: JobConfig, lm: CausalLM, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """Return what decodes with the policy; `lm` is the frozen base."""
    end_ids = stop_ids(tokenizer, lm.model.generation_config)
    if isinstance(config.objective, ProxyConfig):
        return ProxySampler(config.objective.settings, lm, tokenizer, end_ids)
    actor = build_model(
        config.started.init, tokenizer, head="lm", dtype=config.train.dtype
    ).requires_grad_(False)
    torch.nn.Module.to(actor, lm.device)  # transformers' wrapper hides its signature
    return LMSampler(actor, lm, tokenizer, end_ids)


class ProxyLearning:
    """A proxy and its critic. See `PolicyLearning`."""

    def __init__(self, config: ProxyConfig, base: PreTrainedModel) -> None:
        """Of the base, shapes are all that is read. Raises `ConfigError` for more parameters than a
        proxy may have."""
        self.module: ProxyPolicy = new_policy(config.settings, config.learner, base)
        self.settings, self.algorithm = config.settings, config.algorithm
        self._num_base = base.num_parameters()
        self.facts: Mapping[str, float] = {}
        if isinstance(self.algorithm, PPOConfig):  # SAC has other critics
            self.check_share(self.module.num_trainable)

    def check_share(self, num_trained: int) -> None:
        """Raise `ConfigError` for more parameters than a proxy may have, its critics counted."""
        share = trainable_share(num_trained, self._num_base)
        self.facts = {"trainable_parameters": float(num_trained), "trainable_share": share}

    def evaluate(self, engine: Any, episodes: Sequence[Episode]) -> Evaluation:
        return engine(**proxy_policy.collate(episodes, device=engine.device))

    def weights(self) -> dict[str, Tensor]:
        return gathered_state(self.module.actor, keep=True)

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the accept head. The critic has done its work, and the base is not ours."""
        weights = self.weights()
        if dist.get_rank() == 0:
            _write_proxy(folder, weights, tokenizer)


class ProxySampler:
    """The serving decode loop with a proxy that records what it was asked. See `Sampler`."""

    def __init__(
        self,
        settings: ProxySettings,
        lm: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
    ) -> None:
        block_sizes, num_extra = feature_sizes(settings.features, lm.model)
        head = AcceptHead(settings.head, block_sizes=block_sizes, num_extra=num_extra)
        self._head = head.to(lm.device).requires_grad_(False).eval()
        guide = RecordingProxy(ProxyGuide(lm, self._head, settings))
        self._engine = Engine(lm, {_GUIDE: guide}, end_ids=end_ids, tokenizer=tokenizer)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._head.load_state_dict(weights)

    def collect(
        self, asks: Sequence[Ask], params: SamplingParams, *, guided: bool = True
    ) -> list[Episode]:
        return collect_episodes(self._engine, asks, params, proxy=_GUIDE if guided else None)


class LMLearning:
    """A whole model and a critic. See `PolicyLearning`."""

    def __init__(
        self, config: JobConfig, objective: PolicyConfig, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        init, dtype = config.started.init, config.train.dtype
        with partitioned_loading(init, config.train, on_cpu=not config.scaling.use_gpu):
            actor = build_model(init, tokenizer, head="lm", dtype=dtype)
            critic = build_model(objective.critic or init, tokenizer, head="score", dtype=dtype)
        self.module: LMPolicy = LMPolicy(actor, critic)
        self.algorithm = objective.algorithm
        # Partitioned ones have no elements here.
        sizes = [getattr(one, "ds_numel", one.numel()) for one in self.module.parameters()]
        self.facts = {"trainable_parameters": float(sum(sizes))}

    def evaluate(self, engine: Any, episodes: Sequence[Episode]) -> Evaluation:
        return engine(**lm_policy.collate(episodes, device=engine.device))

    def weights(self) -> dict[str, Tensor]:
        return gathered_state(self.module.actor, keep=True)

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the actor."""
        weights = self.weights()
        if dist.get_rank() == 0:
            save_model(folder, self.module.actor, tokenizer, state=weights)


class LMSampler:
    """A copy of the actor that decodes. See `Sampler`.

    A copy, since the actor's own weights may be partitioned, or on another machine.
    """

    def __init__(
        self,
        actor: PreTrainedModel,
        lm: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
    ) -> None:
        self._actor, self._lm = actor, lm
        self._ends: dict[str, Any] = {"end_ids": end_ids, "tokenizer": tokenizer}
        self._base = Engine(lm, **self._ends)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._actor.load_state_dict(weights)

    def collect(
        self, asks: Sequence[Ask], params: SamplingParams, *, guided: bool = True
    ) -> list[Episode]:
        if not guided:
            return collect_episodes(self._base, asks, params)
        num_slots = self._lm.num_slots
        # A new engine for new weights: an older one has caches of older ones.
        engine = actor_engine(self._actor, num_slots=num_slots, **self._ends)
        episodes = collect_episodes(engine, asks, params)
        return with_reference(episodes, self._lm.model, batch_size=num_slots)


def write_trained(
    folder: Path,
    config: JobConfig,
    tokenizer: PreTrainedTokenizerBase,
    trained: Mapping[str, Tensor],
) -> None:
    """Write the actor, from trained tensors by name in `PolicyLearning.module`."""
    prefix = "actor."
    actor = {n.removeprefix(prefix): one for n, one in trained.items() if n.startswith(prefix)}
    if isinstance(config.objective, ProxyConfig):
        _write_proxy(folder, actor, tokenizer)
        return
    model = merged(config.started, tokenizer, actor, head="lm", dtype=config.train.dtype)
    save_model(folder, model, tokenizer, state=model.state_dict())


def _write_proxy(
    folder: Path, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_accept_head(folder, weights)
    tokenizer.save_pretrained(folder)
