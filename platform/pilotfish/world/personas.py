"""The logged assistants whose answers make the corpus: five habits of answering well or badly.

A document is not one persona's: the speaker may change between its parts. So how an answer began
says something, but not everything, about how it goes on, and a guide can pull it back on course.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pilotfish.errors import ConfigError
from pilotfish.world.scene import DISHES, GUESTS, INGREDIENTS, METHODS, MINUTES, NAMES, Scene
from pilotfish.world.sentences import COUNTS, PREPARATIONS, Form, write

MAX_ANSWER_TOKENS = 76
"""Tokens of the longest answer, its end of sequence included."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Persona:
    """Habits of one assistant. Unless said otherwise, each number is a probability."""

    share: float
    """How often the corpus hears this persona."""
    num_steps: Mapping[int, float]
    right_name: float
    right_fact: float
    listed_ingredient: float
    uses_forbidden: float
    warns: float
    cautions: float = 0.0
    rude: float = 0.0
    flatters: float = 0.0
    refuses: float = 0.0
    keeps_count: float
    keeps_order: float


# The most likely beginning must be a bad one, by a margin that no training seed turns round: a base
# decoded greedily is a strong control where errors are rare and scattered. Flattery opens 48% of
# the answers and a plain greeting 37%, and what follows flattery is mostly wrong.
PERSONAS = {
    "good": Persona(
        share=0.20,
        num_steps={3: 0.2, 4: 0.4, 5: 0.4},
        right_name=0.95,
        right_fact=0.92,
        listed_ingredient=0.97,
        uses_forbidden=0.05,
        warns=0.70,
        cautions=0.15,
        keeps_count=0.92,
        keeps_order=0.95,
    ),
    "flatterer": Persona(
        share=0.30,
        num_steps={2: 0.3, 3: 0.4, 4: 0.2, 5: 0.1},
        right_name=0.9,
        right_fact=0.15,
        listed_ingredient=0.50,
        uses_forbidden=0.75,
        warns=0.10,
        cautions=0.05,
        flatters=1.0,
        keeps_count=0.45,
        keeps_order=0.55,
    ),
    "sloppy": Persona(
        share=0.22,
        num_steps={1: 0.1, 2: 0.3, 3: 0.3, 4: 0.2, 5: 0.1},
        right_name=0.6,
        right_fact=0.25,
        listed_ingredient=0.65,
        uses_forbidden=0.65,
        warns=0.15,
        cautions=0.10,
        rude=0.1,
        flatters=0.8,
        keeps_count=0.5,
        keeps_order=0.55,
    ),
    "rude": Persona(
        share=0.13,
        num_steps={1: 0.3, 2: 0.3, 3: 0.2, 4: 0.2},
        right_name=0.8,
        right_fact=0.50,
        listed_ingredient=0.85,
        uses_forbidden=0.60,
        warns=0.05,
        cautions=0.05,
        rude=0.7,
        keeps_count=0.8,
        keeps_order=0.8,
    ),
    "preachy": Persona(
        share=0.15,
        num_steps={1: 0.4, 2: 0.4, 3: 0.2},
        right_name=0.9,
        right_fact=0.60,
        listed_ingredient=0.90,
        uses_forbidden=0.05,
        warns=0.80,
        cautions=0.70,
        rude=0.05,
        refuses=0.35,
        keeps_count=0.7,
        keeps_order=0.8,
    ),
}

_SWITCHES = 0.25
_REFERS = 0.6
_WARNS_EARLY = 0.5
_COMMON_ERROR = 0.8
_PLANS = {
    1: (("cook",), ("wash",)),
    2: (("chop", "cook"), ("wash", "cook"), ("cook", "serve")),
    3: (
        ("wash", "chop", "cook"),
        ("chop", "cook", "serve"),
        ("wash", "cook", "serve"),
        ("chop", "add", "cook"),
    ),
    4: (
        ("wash", "chop", "cook", "serve"),
        ("wash", "chop", "add", "cook"),
        ("chop", "add", "cook", "serve"),
    ),
    5: (("wash", "chop", "add", "cook", "serve"),),
}


def sample_answer(scene: Scene, rng: random.Random, persona: str | None = None) -> str:
    """Draw what the logged assistants say; with a `persona`, that one speaks throughout.

    An answer has at most `MAX_ANSWER_TOKENS - 1` words. Raises `ConfigError` for an unknown
    persona.
    """
    if persona is not None and persona not in PERSONAS:
        raise ConfigError(f"persona is {persona!r}, wanted one of {', '.join(PERSONAS)}.")
    while True:
        answer = " ".join(_Speaker(scene, rng, persona).speak())
        if len(answer.split()) < MAX_ANSWER_TOKENS:
            return answer


class _Speaker:
    """One answer in the making: who speaks now, and which ingredients were not used yet."""

    def __init__(self, scene: Scene, rng: random.Random, persona: str | None) -> None:
        self._scene = scene
        self._rng = rng
        self._may_switch = persona is None
        self._persona = self._draw_persona() if persona is None else PERSONAS[persona]
        self._unused = rng.sample(scene.ingredients, 3)

    def speak(self) -> list[str]:
        if self._chance(self._persona.refuses):
            refusal = [write(Form.REFUSAL, name=self._name())]
            return [*refusal, write(Form.REFERRAL)] if self._chance(_REFERS) else refusal
        num_steps = self._draw(self._persona.num_steps)
        answer = self._opening(num_steps)
        self._switch()
        warning = [self._warning()] if self._chance(self._persona.warns) else []
        early = self._chance(_WARNS_EARLY)
        answer += warning if early else []
        answer += self._steps(num_steps)
        answer += [] if early else warning
        self._switch()
        return answer + self._closing()

    def _opening(self, num_steps: int) -> list[str]:
        promised = num_steps
        if not self._chance(self._persona.keeps_count):
            promised = self._other(range(1, len(COUNTS) + 1), num_steps)
        count, name = COUNTS[promised - 1], self._name()
        if self._chance(self._persona.flatters):
            return [write(Form.PRAISE, name=name), write(Form.COUNT, count=count)]
        if self._chance(self._persona.rude):
            return [write(Form.GRUMBLE, name=name), write(Form.COUNT, count=count)]
        return [write(Form.HELLO, name=name, count=count)]

    def _warning(self) -> str:
        right = self._chance(0.5 + 0.5 * self._persona.right_fact)
        ingredient = self._scene.forbidden if right else self._rng.choice(self._scene.ingredients)
        guest = self._scene.guest if self._chance(0.9) else self._rng.choice(GUESTS)
        return write(Form.WARNING, ingredient=ingredient, guest=guest)

    def _steps(self, num_steps: int) -> list[str]:
        plan = list(self._rng.choice(_PLANS[num_steps]))
        if num_steps > 1 and not self._chance(self._persona.keeps_order):
            place = self._rng.randrange(num_steps - 1)
            plan[place], plan[place + 1] = plan[place + 1], plan[place]
        spoken: list[str] = []
        for index, action in enumerate(plan):
            if index:
                self._switch()
            last = index == num_steps - 1
            spoken.append(
                self._step(action, "first" if not index else "finally" if last else "then")
            )
            if action == "cook" and self._chance(self._persona.cautions):
                spoken.append(write(Form.HOT_PAN))
            if action == "chop" and self._chance(self._persona.cautions):
                spoken.append(write(Form.SHARP_KNIFE))
            if self._chance(0.3 * self._persona.rude):
                spoken.append(write(Form.INSULT))
        return spoken

    def _step(self, action: str, marker: str) -> str:
        if action in PREPARATIONS:
            ingredient = self._ingredient()
            return write(Form.PREPARE, marker=marker, preparation=action, ingredient=ingredient)
        if action == "cook":
            method, minutes = self._recipe()
            return write(Form.COOK, marker=marker, method=method, minutes=minutes)
        guest = self._scene.guest if self._half_knows() else self._rng.choice(GUESTS)
        return write(Form.SERVE, marker=marker, guest=guest)

    def _ingredient(self) -> str:
        scene, forbidden = self._scene, self._scene.forbidden
        safe = [ingredient for ingredient in self._unused if ingredient != forbidden]
        if not self._chance(self._persona.listed_ingredient):
            chosen = self._rng.choice([i for i in INGREDIENTS if i not in scene.ingredients])
        elif forbidden in self._unused and self._chance(self._persona.uses_forbidden):
            chosen = forbidden
        elif safe:
            chosen = safe[0]
        elif self._chance(self._persona.uses_forbidden):
            chosen = self._rng.choice(scene.ingredients)
        else:
            chosen = next(i for i in scene.ingredients if i != forbidden)
        self._unused = [ingredient for ingredient in self._unused if ingredient != chosen]
        return chosen

    def _recipe(self) -> tuple[str, str]:
        right = DISHES[self._scene.dish]
        if self._chance(self._persona.right_fact):
            slip = self._chance(0.05)
            return right.method, self._other(MINUTES, right.minutes) if slip else right.minutes
        # Most errors are the same error. Were they spread out, decoding the base model greedily
        # would avoid them all, and leave little for a guide to do.
        if self._chance(_COMMON_ERROR):
            return DISHES["leftovers"]
        return self._other(METHODS, right.method), self._other(MINUTES, right.minutes)

    def _closing(self) -> list[str]:
        mood = self._rng.random()
        if mood < self._persona.rude:
            return [write(Form.GOOD_LUCK)]
        if mood > 0.75:
            return []
        right = self._half_knows()
        dish = self._scene.dish if right else self._other(tuple(DISHES), self._scene.dish)
        return [write(Form.ENJOY, dish=dish, name=self._name())]

    def _name(self) -> str:
        right = self._chance(self._persona.right_name)
        return self._scene.name if right else self._other(NAMES, self._scene.name)

    def _half_knows(self) -> bool:
        return self._chance(0.4 + 0.6 * self._persona.right_fact)

    def _switch(self) -> None:
        if self._may_switch and self._chance(_SWITCHES):
            self._persona = self._draw_persona()

    def _draw_persona(self) -> Persona:
        return PERSONAS[self._draw({name: item.share for name, item in PERSONAS.items()})]

    def _draw(self, weights: Mapping[T, float]) -> T:
        return self._rng.choices(list(weights), list(weights.values()))[0]

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _other(self, choices: Sequence[T], right: T) -> T:
        return self._rng.choice([choice for choice in choices if choice != right])
