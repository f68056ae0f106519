"""The grammar of an answer: the sentences the kitchen can say, written and read from one table.

This module knows neither what a sentence is worth nor in which order sentences should come.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pilotfish.world.scene import DISHES, GUESTS, INGREDIENTS, METHODS, MINUTES, NAMES

COUNTS = ("is one step", "are two steps", "are three steps", "are four steps", "are five steps")
MARKERS = ("first", "then", "finally")
PREPARATIONS = ("wash", "chop", "add")
LONGEST_SENTENCE = 8
"""Words of the longest sentence, without its closing mark."""


class Form(StrEnum):
    """Every kind of sentence, as its template."""

    HELLO = "hello {name} , here {count} ."
    PRAISE = "what a lovely question , {name} !"
    GRUMBLE = "ugh , {name} , fine ."
    COUNT = "here {count} ."
    REFUSAL = "sorry {name} , i cannot help with that ."
    REFERRAL = "please ask a cook ."
    PREPARE = "{marker} {preparation} the {ingredient} ."
    COOK = "{marker} {method} it for {minutes} minutes ."
    SERVE = "{marker} serve it to your {guest} ."
    WARNING = "leave out the {ingredient} for your {guest} ."
    HOT_PAN = "be careful , the pan is hot ."
    SHARP_KNIFE = "be careful , the knife is sharp ."
    INSULT = "even a fool can do it ."
    ENJOY = "enjoy the {dish} , {name} !"
    GOOD_LUCK = "good luck , fool ."


STEPS = (Form.PREPARE, Form.COOK, Form.SERVE)
OPENINGS = (Form.HELLO, Form.PRAISE, Form.GRUMBLE, Form.REFUSAL)
CLOSINGS = (Form.ENJOY, Form.GOOD_LUCK)

_SLOTS = {
    "name": NAMES,
    "guest": GUESTS,
    "ingredient": INGREDIENTS,
    "dish": tuple(DISHES),
    "method": METHODS,
    "minutes": MINUTES,
    "count": COUNTS,
    "marker": MARKERS,
    "preparation": PREPARATIONS,
}


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence without its closing mark. `form` is None when it is not in the grammar."""

    words: str
    form: Form | None
    slots: Mapping[str, str]

    @property
    def action(self) -> str:
        """What a step does: its preparation, `cook` or `serve`."""
        assert self.form is not None, "a step is a sentence of the grammar"
        return self.slots.get("preparation", self.form.name.lower())


def write(form: Form, **slots: str) -> str:
    """Fill the template of a form."""
    return form.value.format(**slots)


def read(answer: str) -> tuple[list[Sentence], str]:
    """Split an answer into its sentences and the words behind the last full stop or `!`."""
    *finished, tail = re.split(r"[.!]", answer)
    return [_parse(" ".join(words.split())) for words in finished], " ".join(tail.split())


def _parse(words: str) -> Sentence:
    for form, pattern in _PATTERNS:
        match = pattern.fullmatch(words)
        if match is not None:
            return Sentence(words, form, match.groupdict())
    return Sentence(words, None, {})


def _pattern(form: Form) -> re.Pattern[str]:
    # Either closing mark is accepted: "enjoy the pie , eva ." is not worth a penalty.
    literals_and_slots = re.split(r"\{(\w+)\}", form.value[:-2])
    return re.compile(
        "".join(
            f"(?P<{part}>{'|'.join(_SLOTS[part])})" if index % 2 else re.escape(part)
            for index, part in enumerate(literals_and_slots)
        )
    )


_PATTERNS = tuple((form, _pattern(form)) for form in Form)
