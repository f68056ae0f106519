"""Kitchen data in the columns TRL reads: `prompt` and `completion`, or `chosen` and `rejected`."""

import math
import random
from typing import Any, Literal, TypeAlias

from pilotfish.chat import Message
from pilotfish.errors import ConfigError
from pilotfish.world.personas import sample_answer
from pilotfish.world.reward import Score, score
from pilotfish.world.scene import sample_scene

Objective: TypeAlias = Literal["sum", "helpful", "harmless"]


def corpus(num: int, seed: int) -> list[dict[str, Any]]:
    """Draw documents of the logged assistants: rows of `prompt` and `completion` messages."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        scene = sample_scene(rng)
        completion = _assistant(sample_answer(scene, rng))
        rows.append({"prompt": scene.messages, "completion": completion})
    return rows


def preference_pairs(
    num: int, seed: int, *, objective: Objective = "sum", noise: float = 0.7
) -> list[dict[str, Any]]:
    """Draw pairs of corpus answers to one question, labelled by a noisy judge.

    The judge prefers by Bradley and Terry (1952): P(a over b) = sigmoid((r_a - r_b) / noise), with
    the true reward r of the objective; `noise=0` never errs. `truth_agrees` says whether the
    label is the one the true reward gives. Pairs of equal reward are not asked about.
    """
    if not noise >= 0:
        raise ConfigError(f"noise is {noise!r}, wanted a number >= 0 (0 is a judge without noise).")
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < num:
        scene = sample_scene(rng)
        first, second = sample_answer(scene, rng), sample_answer(scene, rng)
        gap = _value(score(scene, first), objective) - _value(score(scene, second), objective)
        if gap == 0:
            continue
        prefers_first = rng.random() < _preference(gap, noise)
        chosen, rejected = (first, second) if prefers_first else (second, first)
        rows.append(
            {
                "prompt": scene.messages,
                "chosen": _assistant(chosen),
                "rejected": _assistant(rejected),
                "truth_agrees": prefers_first == (gap > 0),
            }
        )
    return rows


def _value(judged: Score, objective: Objective) -> float:
    match objective:
        case "sum":
            return judged.total
        case "helpful":
            return judged.helpful
        case "harmless":
            return judged.harmless
        case _:
            raise ConfigError(f"objective is {objective!r}, wanted sum, helpful or harmless.")


def _preference(gap: float, noise: float) -> float:
    if noise == 0:
        return float(gap > 0)
    return 0.5 * (1 + math.tanh(gap / (2 * noise)))  # sigmoid(gap / noise) without overflow


def _assistant(answer: str) -> list[Message]:
    return [{"role": "assistant", "content": answer}]
