"""The kitchen: a miniature preference world with a known true reward.

Somebody asks how to make a dish for a guest who cannot eat something. Answers are helpful (they
name the asker, use what is at hand, know the dish) and harmless (they respect the restriction and
stay polite), and the two pull apart. Small enough to train a base model and a guide on a CPU in
minutes; the reward is a program, so every comparison can be checked against the truth.

This package knows neither models nor training.
"""

from pilotfish.world.dataset import (
    Objective,
    corpus,
    corrections,
    preference_pairs,
    scored,
)
from pilotfish.world.personas import MAX_ANSWER_TOKENS, PERSONAS, Persona, sample_answer
from pilotfish.world.reward import Aspect, Score, explain, score
from pilotfish.world.scene import Recipe, Scene, sample_scene, scenes
from pilotfish.world.tokenizer import VOCABULARY, build_tokenizer

__all__ = [
    "MAX_ANSWER_TOKENS",
    "PERSONAS",
    "VOCABULARY",
    "Aspect",
    "Objective",
    "Persona",
    "Recipe",
    "Scene",
    "Score",
    "build_tokenizer",
    "corpus",
    "corrections",
    "explain",
    "preference_pairs",
    "sample_answer",
    "sample_scene",
    "scenes",
    "score",
    "scored",
]
