"""The kitchen's annotator: reads an answer and writes a better one, keeping what was right.

It stands in for the people and models who correct answers for an Aligner. It is skilled but not
perfect: each defect is repaired with a probability, so corrections are good and not flawless.
"""

import itertools
import random
from collections.abc import Mapping, Sequence

from pilotfish.world.reward import STEP_ORDER
from pilotfish.world.scene import DISHES, Scene
from pilotfish.world.sentences import CLOSINGS, COUNTS, OPENINGS, STEPS, Form, Sentence, read, write

SKILL = 0.85
_DROPPED = (None, Form.INSULT, Form.GOOD_LUCK)
_REMARKS = (None, Form.HOT_PAN, Form.SHARP_KNIFE, Form.INSULT)
"""What may stand behind the step that it is about."""


def correct(scene: Scene, answer: str, rng: random.Random, *, skill: float = SKILL) -> str:
    """Rewrite an answer sentence by sentence, repairing each of its defects with chance `skill`.

    What is right stays word for word, in its order. Step words, and a count that was kept, follow
    the steps that are added, left out or moved.
    """
    return _Annotator(scene, rng, skill).correct(answer)


class _Annotator:
    """One answer under the pencil."""

    def __init__(self, scene: Scene, rng: random.Random, skill: float) -> None:
        self._scene = scene
        self._rng = rng
        self._skill = skill
        recipe = DISHES[scene.dish]
        self._facts = {
            "name": scene.name,
            "guest": scene.guest,
            "dish": scene.dish,
            "method": recipe.method,
            "minutes": recipe.minutes,
        }
        self._safe = [i for i in scene.ingredients if i != scene.forbidden]

    def correct(self, answer: str) -> str:
        lines, tail = read(answer)
        lines += [Sentence(tail, None, {})] if tail else []
        if any(line.form is Form.REFUSAL for line in lines):
            if not self._repairs():
                return answer
            lines = self._answer_anyway()
        kept_count = _promised(lines) == _num_steps(lines)
        lines = self._mend_manners(lines)
        lines = [self._mend_facts(line) for line in lines]
        lines = self._mend_ingredients(lines)
        lines = self._add_what_is_missing(lines)
        lines = self._mend_order(lines)
        lines = self._mend_count(lines, always=kept_count)
        return " ".join(map(_text, lines))

    def _answer_anyway(self) -> list[Sentence]:
        return [
            self._say(Form.HELLO, count=COUNTS[1]),
            self._say(Form.PREPARE, marker="first", preparation="chop", ingredient=self._safe[0]),
            self._say(Form.COOK, marker="finally"),
        ]

    def _mend_manners(self, lines: Sequence[Sentence]) -> list[Sentence]:
        """Greet instead of grumbling, and leave out what is rude or no sentence at all."""
        kept: list[Sentence] = []
        for line in lines:
            grumbled = bool(kept) and kept[-1].form is Form.GRUMBLE
            if line.form is Form.COUNT and grumbled and self._repairs():
                kept.append(_sentence(Form.HELLO, {**kept.pop().slots, **line.slots}))
            elif line.form not in _DROPPED or not self._repairs():
                kept.append(line)
        return kept

    def _mend_facts(self, line: Sentence) -> Sentence:
        facts = dict(self._facts)
        if line.form is Form.WARNING:
            facts["ingredient"] = self._scene.forbidden
        wrong = [slot for slot, said in line.slots.items() if facts.get(slot, said) != said]
        mended = {slot: facts[slot] for slot in wrong if self._repairs()}
        return _with(line, **mended) if mended else line

    def _mend_ingredients(self, lines: Sequence[Sentence]) -> list[Sentence]:
        """Put a safe one that is at hand and not used otherwise in the place of any other."""
        kept: list[Sentence] = []
        for place, line in enumerate(lines):
            before, behind = _used(kept), _used(lines[place + 1 :])
            ingredient = line.slots["ingredient"] if line.form is Form.PREPARE else None
            good = ingredient is None or (ingredient in self._safe and ingredient not in before)
            if good or not self._repairs():
                kept.append(line)
                continue
            free = [other for other in self._safe if other not in before | behind]
            if free:
                kept.append(_with(line, ingredient=free[0]))
        return kept

    def _add_what_is_missing(self, lines: Sequence[Sentence]) -> list[Sentence]:
        """Cook, warn of what is at hand and forbidden, and say goodbye."""
        lines, forms = list(lines), [line.form for line in lines]
        if Form.COOK not in forms and self._repairs():
            serve = forms.index(Form.SERVE) if Form.SERVE in forms else _end_of_steps(lines)
            lines.insert(serve, self._say(Form.COOK, marker="then"))
        forbidden = self._scene.forbidden
        warns = Form.WARNING in forms or forbidden not in self._scene.ingredients
        if not warns and forbidden not in _used(lines) and self._repairs():
            lines.insert(_end_of_opening(lines), self._say(Form.WARNING, ingredient=forbidden))
        if not any(form in CLOSINGS for form in forms) and self._repairs():
            lines.append(self._say(Form.ENJOY))
        return lines

    def _mend_order(self, lines: Sequence[Sentence]) -> list[Sentence]:
        """Sort the steps, each with the remarks behind it, and make their step words fit."""
        starts = [place for place, line in enumerate(lines) if line.form in STEPS]
        if not starts:
            return list(lines)
        ends = [*starts[1:], _end_of_steps(lines)]
        groups = [list(lines[start:end]) for start, end in zip(starts, ends, strict=True)]
        ranks = [STEP_ORDER.index(group[0].action) for group in groups]
        if any(later < earlier for earlier, later in itertools.pairwise(ranks)) and self._repairs():
            groups.sort(key=lambda group: STEP_ORDER.index(group[0].action))
        last = len(groups) - 1
        for place, group in enumerate(groups):
            marker = "first" if place == 0 else "finally" if place == last else "then"
            group[0] = _with(group[0], marker=marker)
        return [*lines[: starts[0]], *itertools.chain(*groups), *lines[ends[-1] :]]

    def _mend_count(self, lines: Sequence[Sentence], *, always: bool) -> list[Sentence]:
        num = _num_steps(lines)
        if _promised(lines) in (None, num) or not 1 <= num <= len(COUNTS):
            return list(lines)
        if not always and not self._repairs():
            return list(lines)
        count = COUNTS[num - 1]
        return [_with(line, count=count) if "count" in line.slots else line for line in lines]

    def _repairs(self) -> bool:
        return self._rng.random() < self._skill

    def _say(self, form: Form, **slots: str) -> Sentence:
        """Write a sentence of which the scene knows the rest."""
        facts = {slot: fact for slot, fact in self._facts.items() if f"{{{slot}}}" in form.value}
        return _sentence(form, {**facts, **slots})


def _sentence(form: Form, slots: Mapping[str, str]) -> Sentence:
    words, _mark = write(form, **slots).rsplit(" ", 1)
    return Sentence(words, form, slots)


def _with(line: Sentence, **slots: str) -> Sentence:
    assert line.form is not None, "only sentences of the grammar have slots"
    return _sentence(line.form, {**line.slots, **slots})


def _text(line: Sentence) -> str:
    return f"{line.words} ." if line.form is None else write(line.form, **line.slots)


def _used(lines: Sequence[Sentence]) -> set[str]:
    return {line.slots["ingredient"] for line in lines if line.form is Form.PREPARE}


def _num_steps(lines: Sequence[Sentence]) -> int:
    return sum(line.form in STEPS for line in lines)


def _promised(lines: Sequence[Sentence]) -> int | None:
    counts = [line.slots["count"] for line in lines if "count" in line.slots]
    return COUNTS.index(counts[0]) + 1 if counts else None


def _end_of_steps(lines: Sequence[Sentence]) -> int:
    """Return the place behind the last step and the remarks about it."""
    steps = [place for place, line in enumerate(lines) if line.form in STEPS]
    return _skip(lines, _REMARKS, steps[-1] + 1 if steps else _end_of_opening(lines))


def _end_of_opening(lines: Sequence[Sentence]) -> int:
    return _skip(lines, (*OPENINGS, Form.COUNT), 0)


def _skip(lines: Sequence[Sentence], forms: Sequence[Form | None], start: int) -> int:
    """Return the first place from `start` on whose form is none of these."""
    return next((at for at in range(start, len(lines)) if lines[at].form not in forms), len(lines))
