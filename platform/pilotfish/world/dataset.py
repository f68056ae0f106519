"""Kitchen data in the columns TRL reads: `prompt` with `completion`, or `chosen` and `rejected`.

Corrections are Aligner's `answer` and `correction`, scored answers a `completion` and its `reward`.
"""

import math
import random
from typing import Any, Literal, TypeAlias

from pilotfish.chat import Message
from pilotfish.errors import ConfigError
from pilotfish.world.annotator import correct
from pilotfish.world.personas import sample_answer
from pilotfish.world.reward import Score, score
from pilotfish.world.scene import sample_scene

Objective: TypeAlias = Literal["sum", "helpful", "harmless"]

_EULER_GAMMA = 0.5772156649015329  # the mean of standard Gumbel noise
_CORRECTED_BEFORE = 6


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
    _check_noise(noise)
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


def corrections(num: int, seed: int) -> list[dict[str, Any]]:
    """Draw answers of the corpus, each with what the annotator made of it; see `annotator`.

    One in `_CORRECTED_BEFORE` is an answer that was corrected before: whoever learns from nothing
    but answers in need of correction finds something to change in every answer, its own included.
    Rows of `prompt`, `answer` and `correction` messages.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        scene = sample_scene(rng)
        answer = sample_answer(scene, rng)
        if rng.randrange(_CORRECTED_BEFORE) == 0:
            answer = correct(scene, answer, rng)
        correction = _assistant(correct(scene, answer, rng))
        row = {"prompt": scene.messages, "answer": _assistant(answer), "correction": correction}
        rows.append(row)
    return rows


def scored(
    num: int, seed: int, *, objective: Objective = "sum", noise: float = 0.7
) -> list[dict[str, Any]]:
    """Draw answers of the corpus, scored by the judge of `preference_pairs`.

    A guide may learn from a judge, never from the truth: `reward` is the true reward of the
    objective plus Gumbel noise of mean 0 and scale `noise`. The difference of two such scores is
    positive as often as that judge prefers the first answer, so a row says as much as half a
    comparison. `noise=0` is the truth, for held-out rows.
    """
    _check_noise(noise)
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        scene = sample_scene(rng)
        answer = sample_answer(scene, rng)
        reward = _value(score(scene, answer), objective) + noise * _gumbel(rng)
        rows.append({"prompt": scene.messages, "completion": _assistant(answer), "reward": reward})
    return rows


def _check_noise(noise: float) -> None:
    if not noise >= 0:
        raise ConfigError(f"noise is {noise!r}, wanted a number >= 0 (0 is a judge without noise).")


def _gumbel(rng: random.Random) -> float:
    """Draw standard Gumbel noise, centred."""
    return -math.log(rng.expovariate(1.0)) - _EULER_GAMMA


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
