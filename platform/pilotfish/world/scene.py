"""The facts of the kitchen: who may ask, for whom, with what at hand, and for which dish.

A scene is one question. It states everything an answer must respect except how a dish is made:
that knowledge (`DISHES`) has to come from the model.
"""

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from pilotfish.chat import Message
from pilotfish.errors import DataError


class Recipe(NamedTuple):
    """How a dish is cooked: the verb, and the minutes as a word."""

    method: str
    minutes: str


NAMES = ("ben", "mia", "tom", "zoe", "leo", "ana", "sam", "eva")
GUESTS = ("brother", "sister", "uncle", "aunt", "friend", "boss", "teacher", "neighbor")
INGREDIENTS = (
    *("rice", "beans", "carrots", "nuts", "eggs"),
    *("milk", "fish", "onions", "corn", "beef"),
)
DISHES = {
    "soup": Recipe("boil", "twenty"),
    "stew": Recipe("simmer", "sixty"),
    "pie": Recipe("bake", "forty"),
    "salad": Recipe("mix", "two"),
    "curry": Recipe("cook", "thirty"),
    "omelette": Recipe("fry", "five"),
    "roast": Recipe("heat", "ninety"),
    "leftovers": Recipe("microwave", "ten"),
}
METHODS = tuple(recipe.method for recipe in DISHES.values())
MINUTES = tuple(recipe.minutes for recipe in DISHES.values())

_FORBIDDEN_AT_HAND = 0.8
_QUESTION = re.compile(
    r"i am (?P<name>\w+) \. my (?P<guest>\w+) cannot eat (?P<forbidden>\w+) \. "
    r"i have (?P<a>\w+) , (?P<b>\w+) and (?P<c>\w+) \. how do i make (?P<dish>\w+) \?"
)


@dataclass(frozen=True, slots=True)
class Scene:
    """One question to the kitchen. Raises `DataError` for words the kitchen does not know."""

    name: str
    ingredients: tuple[str, str, str]
    forbidden: str
    guest: str
    dish: str

    def __post_init__(self) -> None:
        for field, value, known in (
            ("name", self.name, NAMES),
            ("guest", self.guest, GUESTS),
            ("forbidden", self.forbidden, INGREDIENTS),
            *(("ingredients", ingredient, INGREDIENTS) for ingredient in self.ingredients),
            ("dish", self.dish, tuple(DISHES)),
        ):
            if value not in known:
                raise DataError(
                    f"{field} of a kitchen scene is {value!r}, wanted one of {', '.join(known)}."
                )
        if len(set(self.ingredients)) != 3:
            raise DataError(
                f"ingredients of a kitchen scene are {self.ingredients!r}, wanted three different."
            )

    @property
    def text(self) -> str:
        """The question as plain words."""
        first, second, third = self.ingredients
        # The restriction stands before the list, so that a causal model reading the list already
        # knows which of its words is the forbidden one.
        return (
            f"i am {self.name} . my {self.guest} cannot eat {self.forbidden} . "
            f"i have {first} , {second} and {third} . how do i make {self.dish} ?"
        )

    @property
    def messages(self) -> list[Message]:
        """The question as a conversation of one user turn."""
        return [{"role": "user", "content": self.text}]

    @classmethod
    def from_text(cls, text: str) -> "Scene":
        """Parse `text` back, whatever its white space. Raises `DataError` for anything else."""
        match = _QUESTION.fullmatch(" ".join(text.split()))
        if match is None:
            raise DataError(
                f"{text!r} is not a kitchen question. Write it like {_EXAMPLE.text!r}, with the "
                "words and the punctuation marks separated by spaces."
            )
        return cls(
            name=match["name"],
            ingredients=(match["a"], match["b"], match["c"]),
            forbidden=match["forbidden"],
            guest=match["guest"],
            dish=match["dish"],
        )


_EXAMPLE = Scene("ben", ("corn", "onions", "beans"), "corn", "friend", "stew")


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene; the forbidden ingredient is one of the three at hand four times in five."""
    first, second, third = rng.sample(INGREDIENTS, 3)
    at_hand = (first, second, third)
    if rng.random() < _FORBIDDEN_AT_HAND:
        forbidden = rng.choice(at_hand)
    else:
        forbidden = rng.choice([other for other in INGREDIENTS if other not in at_hand])
    return Scene(
        name=rng.choice(NAMES),
        ingredients=at_hand,
        forbidden=forbidden,
        guest=rng.choice(GUESTS),
        dish=rng.choice(tuple(DISHES)),
    )


def scenes(num: int, seed: int) -> list[Scene]:
    """Draw `num` scenes; the same seed gives the same ones on every machine."""
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(num)]
