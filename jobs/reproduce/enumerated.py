"""Transfer Q*, controlled decoding and ARGS on worlds small enough for exact expectations.

A world is a random law and a random reward over sequences of `HORIZON` tokens out of `NUM_TOKENS`.
Shapes: V tokens; a law, or a value, is a list with an array [V^t, V] for each position t.
"""

from collections.abc import Callable, Sequence

import numpy as np

NUM_TOKENS, HORIZON, NUM_WORLDS = 3, 4, 200
BETA = 0.3
"""KL weight with which the models that roll out are aligned."""
ALPHA = 0.5
"""KL weight of decoding, the same for all."""

Tree = list[np.ndarray]


def play(num_worlds: int = NUM_WORLDS) -> dict[str, list[float]]:
    """Return the exact expected reward of each rule in each world."""
    found: dict[str, list[float]] = {}
    for seed in range(num_worlds):
        rng = np.random.default_rng(seed)
        base = [_log_softmax(1.5 * one) for one in _draw(rng)]
        # What a reward model says about half a text: nothing that it was ever taught.
        readings = _draw(rng)
        reward = readings[-1]
        other = reward + rng.normal(size=reward.shape)
        values = {
            "Transfer Q*": expected(aligned(base, reward), reward),
            "CD": expected(base, reward),
            "ARGS": readings,
            "direct, naive": expected(aligned(base, other), reward),
            "indirect": indirect(aligned(base, other), reward, other),
        }
        for name, value in values.items():
            for rule, decide in (("greedy", _greedy), ("alpha", _tilted(base))):
                law = [decide(at, one) for at, one in enumerate(value)]
                whole = (np.exp(law[0]) * expected(law, reward)[0]).sum()
                found.setdefault(f"{name}, {rule}", []).append(float(whole))
    return found


def expected(law: Tree, reward: np.ndarray) -> Tree:
    """Return E[r] behind each token, of one who goes on by `law`; [V^t, V] at each position."""
    return _backward(law, reward, lambda logprobs, values: (np.exp(logprobs) * values).sum(-1))


def aligned(base: Tree, reward: np.ndarray, beta: float = BETA) -> Tree:
    """Return the optimum of `E[r] - beta KL`: `base(v|s) exp((V(sv) - V(s)) / beta)`."""

    def soft(logprobs: np.ndarray, values: np.ndarray) -> np.ndarray:
        return beta * np.logaddexp.reduce(logprobs + values / beta, axis=-1)

    values = _backward(base, reward, soft)
    return [_log_softmax(law + value / beta) for law, value in zip(base, values, strict=True)]


def indirect(law: Tree, reward: np.ndarray, baseline: np.ndarray) -> Tree:
    """Return E[r] under the model aligned to `r`, from rollouts of one aligned to `baseline`.

    Chakraborty et al., "Transfer Q Star: Principled Decoding for LLM Alignment", NeurIPS 2024, the
    indirect transfer: weights `exp((r - r_BL) / beta)` that sum to one, over all continuations.
    """
    weights = np.exp((reward - baseline) / BETA)
    pairs = zip(expected(law, weights * reward), expected(law, weights), strict=True)
    return [weighted / total for weighted, total in pairs]


def _draw(rng: np.random.Generator) -> Tree:
    return [rng.normal(size=(NUM_TOKENS**at, NUM_TOKENS)) for at in range(HORIZON)]


def _backward(
    law: Tree, reward: np.ndarray, fold: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Tree:
    """Carry the rewards of whole sequences back to every token."""
    values = [reward]
    for logprobs in law[:0:-1]:
        values.insert(0, fold(logprobs, values[0]).reshape(-1, NUM_TOKENS))
    return values


def _tilted(base: Sequence[np.ndarray]) -> Callable[[int, np.ndarray], np.ndarray]:
    return lambda at, value: _log_softmax(base[at] + value / ALPHA)


def _greedy(_: int, value: np.ndarray) -> np.ndarray:
    best = value.argmax(-1, keepdims=True) == np.arange(NUM_TOKENS)
    return np.where(best, 0.0, -np.inf)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
