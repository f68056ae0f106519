"""Worlds small enough to enumerate: a tabular LM, a known reward, and what is exact about them.

Shapes: R rows, V vocabulary.

A *prefix* is what was written so far, without the prompt; a *trajectory* is a prefix that is
complete: `horizon` tokens, or fewer that end with `end_id`. A *policy* answers an incomplete prefix
with the log-probs [V] of its next token. All sums run over every trajectory, in float64, so keep
`vocab_size` and `horizon` at four or less. The reference everywhere is

    pi*(y) = base(y) exp(r(y) / beta) / Z,                                                   (1)
    pi*(v|s) = base(v|s) exp((V(sv) - V(s)) / beta)                                          (2)
    with the soft value V(s) = beta log E_{y ~ base|s} exp(r(y) / beta),

the maximiser of `E[r] - beta KL(pi || base)`. `TabularLM` and `TabularReward` stand in for models
where a guide wants one; `guided` turns a guide back into a policy.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pilotfish.context import Context, Prompt
from pilotfish.guides.base import Step, TokenGuide
from pilotfish.models.causal_lm import NextToken

Prefix = tuple[int, ...]
Policy = Callable[[Prefix], Tensor]
Reward = Callable[[Prefix], float]

PROMPT = Prompt([0])
"""The prompt of every world: models want one token at least."""


@dataclass(frozen=True)
class World:
    """A base LM and the reward of each trajectory. `reward` may answer prefixes too: whatever a
    reward model says about half a text, which nothing here relies on."""

    vocab_size: int
    horizon: int
    base: Policy
    reward: Reward
    end_id: int | None = None

    def complete(self, prefix: Prefix) -> bool:
        return len(prefix) == self.horizon or (bool(prefix) and prefix[-1] == self.end_id)

    def prefixes(self) -> list[Prefix]:
        """Every incomplete prefix: where a policy is asked."""
        return [one for one in self._written() if not self.complete(one)]

    def trajectories(self, prefix: Prefix = ()) -> list[Prefix]:
        """Every trajectory that begins with a prefix."""
        return [
            one for one in self._written() if self.complete(one) and one[: len(prefix)] == prefix
        ]

    def law(self, policy: Policy, prefix: Prefix = ()) -> dict[Prefix, float]:
        """The probability of each trajectory behind a prefix."""
        reached = {prefix: 0.0}
        while not all(map(self.complete, reached)):
            longer: dict[Prefix, float] = {}
            for one, logprob in reached.items():
                if self.complete(one):
                    longer[one] = logprob
                    continue
                for token, step in enumerate(policy(one).tolist()):
                    longer[*one, token] = logprob + step
            reached = longer
        return {one: math.exp(logprob) for one, logprob in reached.items()}

    def expected_reward(self, policy: Policy, prefix: Prefix = ()) -> float:
        """E[r] behind a prefix: the value function of a policy."""
        return self.mean_reward(self.law(policy, prefix))

    def mean_reward(self, law: dict[Prefix, float]) -> float:
        return math.fsum(chance * self.reward(one) for one, chance in law.items())

    def kl(self, policy: Policy) -> float:
        """KL(policy || base) of whole trajectories, in nats."""
        return self.kl_of(self.law(policy))

    def kl_of(self, law: dict[Prefix, float]) -> float:
        base = self.law(self.base)
        terms = (chance * math.log(chance / base[one]) for one, chance in law.items() if chance > 0)
        return math.fsum(terms)

    def optimal_law(self, beta: float) -> dict[Prefix, float]:
        """Equation (1)."""
        base = self.law(self.base)
        best = max(map(self.reward, base))
        masses = {one: p * math.exp((self.reward(one) - best) / beta) for one, p in base.items()}
        total = math.fsum(masses.values())
        return {one: mass / total for one, mass in masses.items()}

    def soft_value(self, prefix: Prefix, beta: float) -> float:
        """V(s); the reward itself where the prefix is complete."""
        law = self.law(self.base, prefix)
        best = max(map(self.reward, law))
        masses = (p * math.exp((self.reward(one) - best) / beta) for one, p in law.items())
        return best + beta * math.log(math.fsum(masses))

    def optimal_policy(self, beta: float) -> Policy:
        """Equation (2)."""

        @cache
        def policy(prefix: Prefix) -> Tensor:
            values = [self.soft_value((*prefix, token), beta) for token in range(self.vocab_size)]
            gains = torch.tensor(values, dtype=torch.float64) - self.soft_value(prefix, beta)
            return self.base(prefix) + gains / beta

        return policy

    def best_reward_at_kl(self, kl: float) -> float:
        """E[r] of the optimum that has this KL: no policy of this KL may have more."""
        low, high = 1e-3, 1e3  # the KL falls as beta grows
        if self.kl_of(self.optimal_law(low)) <= kl:
            return max(map(self.reward, self.trajectories()))
        for _ in range(100):
            middle = math.sqrt(low * high)
            too_far = self.kl_of(self.optimal_law(middle)) > kl
            low, high = (middle, high) if too_far else (low, middle)
        return self.mean_reward(self.optimal_law(low))

    def _written(self) -> list[Prefix]:
        tokens = range(self.vocab_size)
        every = (itertools.product(tokens, repeat=size) for size in range(self.horizon + 1))
        return [one for some in every for one in some if self.end_id not in one[:-1]]


def random_world(
    seed: int, *, vocab_size: int = 3, horizon: int = 3, end_id: int | None = None
) -> World:
    """A world with laws far from uniform and rewards around zero, for every prefix."""
    reward = random_reward(seed + 1, vocab_size=vocab_size, horizon=horizon)
    base = random_policy(seed, vocab_size=vocab_size, horizon=horizon)
    return World(vocab_size, horizon, base, reward, end_id)


def random_policy(seed: int, *, vocab_size: int = 3, horizon: int = 3) -> Policy:
    """A law per prefix, drawn anew for each."""
    generator = torch.Generator().manual_seed(seed)
    table: dict[Prefix, Tensor] = {}
    for size in range(horizon):
        for prefix in itertools.product(range(vocab_size), repeat=size):
            drawn = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
            table[prefix] = (1.5 * drawn).log_softmax(-1)
    return table.__getitem__


def random_reward(seed: int, *, vocab_size: int = 3, horizon: int = 3) -> Reward:
    """A number per prefix, complete or not, drawn anew for each."""
    generator = torch.Generator().manual_seed(seed)
    table: dict[Prefix, float] = {}
    for size in range(horizon + 1):
        for prefix in itertools.product(range(vocab_size), repeat=size):
            table[prefix] = torch.randn((), generator=generator, dtype=torch.float64).item()
    return table.__getitem__


def greedy(policy: Policy) -> Policy:
    """The policy at temperature 0: all its mass on its most likely token."""

    def best(prefix: Prefix) -> Tensor:
        law = policy(prefix)
        return torch.full_like(law, -torch.inf).index_fill(0, law.argmax(), 0.0)

    return best


def context_of(prefix: Prefix, key: int = 0) -> Context:
    return Context(key, PROMPT, [*PROMPT.token_ids, *prefix])


def prefix_of(context: Context) -> Prefix:
    return tuple(context.token_ids[len(context.prompt.token_ids) :])


def guided(guide: TokenGuide, policy: Policy, weight: float) -> Policy:
    """The policy that a guide makes of another one, asked prefix by prefix."""

    @cache
    def law(prefix: Prefix) -> Tensor:
        contexts = [context_of(prefix)]
        evidence = guide.begin(contexts)
        weights_R = torch.tensor([weight], dtype=torch.float64)
        incoming_RV = policy(prefix)[None]
        return guide.tilt(incoming_RV, Step(contexts, weights_R), evidence)[0]

    return law


class TabularLM:
    """A policy where a model is wanted: a `LogprobSource`, and `CausalLM.forward`."""

    def __init__(self, policy: Policy, *, horizon: int) -> None:
        self._policy = policy
        self.max_length = len(PROMPT.token_ids) + horizon
        self.num_forwards = 0
        self.released: list[int] = []

    def forward(self, contexts: Sequence[Context]) -> NextToken:
        self.num_forwards += len(contexts)
        laws = [self._policy(prefix_of(context)) for context in contexts]
        return NextToken(torch.stack(laws), torch.zeros(len(contexts), 1, dtype=torch.float64))

    def begin(self, contexts: Sequence[Context]) -> Callable[[], Tensor]:
        logprobs_RV = self.forward(contexts).logprobs_RV
        return lambda: logprobs_RV

    def release(self, keys: Sequence[int]) -> None:
        self.released += keys


class TabularReward:
    """A function of the prefix where a reward or value model is wanted."""

    def __init__(self, reward: Reward, *, horizon: int) -> None:
        self._reward = reward
        self.max_length = len(PROMPT.token_ids) + horizon
        self.num_forwards = 0
        self.released: list[int] = []

    def rewards(self, contexts: Sequence[Context]) -> Tensor:
        self.num_forwards += len(contexts)
        found = [self._reward(prefix_of(context)) for context in contexts]
        return torch.tensor(found, dtype=torch.float64)

    def candidate_rewards(self, contexts: Sequence[Context], candidates_RK: Tensor) -> Tensor:
        self.num_forwards += candidates_RK.numel()
        found = [
            [self._reward((*prefix_of(context), token)) for token in tokens]
            for context, tokens in zip(contexts, candidates_RK.tolist(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64)

    def release(self, keys: Sequence[int]) -> None:
        self.released += keys
