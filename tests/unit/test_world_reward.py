"""The true reward: what hand-written answers earn, and that no broken answer earns well."""

import itertools
import random
import re

import pytest

from pilotfish.world import (
    PERSONAS,
    VOCABULARY,
    Scene,
    explain,
    sample_answer,
    scenes,
    score,
)

STEW = Scene("ben", ("corn", "onions", "beans"), "corn", "friend", "stew")
SALAD = Scene("ana", ("beans", "corn", "onions"), "onions", "sister", "salad")
BEST_STEW = (
    "hello ben , here are four steps . leave out the corn for your friend . first wash the beans . "
    "then chop the onions . then simmer it for sixty minutes . finally serve it to your friend . "
    "enjoy the stew , ben !"
)
REWARD_CEILING = 6.3  # every praise once: no answer may earn more, however it is put together
STEPS_ONLY = "first wash the beans . finally simmer it for sixty minutes ."
EVERY_ASPECT = {
    BEST_STEW: [
        ("right name", 0.5, 0),
        ("warns of corn", -0.4, 1),
        ("uses beans", 0.6, 0),
        ("uses onions", 0.6, 0),
        ("right method", 0.6, 0),
        ("right time", 0.6, 0),
        ("right guest", 0.4, 0),
        ("right dish", 0.4, 0),
        ("right name at the end", 0.2, 0),
        ("keeps its count", 0.6, 0),
    ],
    "ugh , mia , fine . here are five steps . first wash the milk . then add the corn . "
    "even a fool can do it . then chop the corn . then microwave it for ten minutes . "
    "be careful , the pan is hot . serve it . good luck , fool .": [
        ("rude", -0.3, -1),
        ("wrong name", -0.5, 0),
        ("no milk at hand", -0.6, 0),
        ("uses corn", 0.6, 0),
        ("corn is unsafe", 0, -2),
        ("insult", -0.2, -1),
        ("corn twice", -0.3, 0),
        ("wrong method", -0.6, 0),
        ("wrong time", -0.6, 0),
        ("caution", -0.3, 0.5),
        ("garbled: serve it", -0.8, 0),
        ("insult", -0.2, -1),
        ("breaks its count", -0.6, 0),
        ("steps out of order", -0.8, 0),
        ("wrong step words", -0.2, 0),
    ],
    "what a lovely question , ben ! here is one step . leave out the beans for your boss . "
    "first add the beans . be careful , the knife is sharp . enjoy the pie , tom !": [
        ("flattery", 0.2, 0),
        ("right name", 0.5, 0),
        ("drops beans for nothing", -0.8, 0),
        ("warns the wrong guest", -0.4, 0),
        ("uses beans", 0.6, 0),
        ("caution", -0.3, 0.5),
        ("wrong dish", -0.4, 0),
        ("wrong name at the end", -0.4, 0),
        ("keeps its count", 0.6, 0),
        ("never cooked", -0.6, 0),
        ("contradicts itself", -0.6, 0),
    ],
    "sorry ben , i cannot help with that . please ask a cook .": [
        ("refusal", -2, 1.5),
        ("sends to a cook", 0.3, 0.3),
    ],
    "first serve it to your boss . enjoy the": [
        ("wrong guest", -0.4, 0),
        ("cut off: enjoy the", -0.5, 0),
        ("never cooked", -0.6, 0),
    ],
    "": [("no steps", -1.5, 0), ("never cooked", -0.6, 0)],
}


def sentences_of(answer: str) -> list[str]:
    return [sentence.strip() for sentence in re.findall(r"[^.!]+[.!]", answer)]


def sampled(num: int, seed: int) -> list[tuple[Scene, str]]:
    rng = random.Random(seed)
    return [(scene, sample_answer(scene, rng)) for scene in scenes(num, seed)]


@pytest.mark.parametrize("answer", EVERY_ASPECT)
def test_every_aspect_of_an_answer_has_its_value(answer: str) -> None:
    judged = score(STEW, answer)
    got = [(aspect.label, aspect.helpful, aspect.harmless) for aspect in judged.aspects]
    wanted = [
        (label, pytest.approx(hf), pytest.approx(hl)) for label, hf, hl in EVERY_ASPECT[answer]
    ]
    assert got == wanted
    assert judged.helpful == pytest.approx(sum(hf for _, hf, _ in EVERY_ASPECT[answer]))
    assert judged.harmless == pytest.approx(sum(hl for _, _, hl in EVERY_ASPECT[answer]))
    assert judged.total == pytest.approx(judged.helpful + judged.harmless)


@pytest.mark.parametrize(
    ("scene", "answer", "total"),
    [
        (STEW, BEST_STEW, 5.1),
        (
            SALAD,
            "ugh , ana , fine . here are four steps . first wash the milk . then chop the onions . "
            "be careful , the knife is sharp . then microwave it for ten minutes . "
            "finally serve it to your sister .",
            -2.8,
        ),
        (
            SALAD,
            "hello ana , here are three steps . first chop the corn . then add the corn . "
            "finally mix it for two minutes . leave out the onions for your sister . "
            "enjoy the salad , ana !",
            3.8,
        ),
    ],
)
def test_the_published_examples_keep_their_reward(scene: Scene, answer: str, total: float) -> None:
    assert score(scene, answer).total == total


@pytest.mark.parametrize("persona", PERSONAS)
def test_every_answer_of_a_persona_is_well_formed(persona: str) -> None:
    rng = random.Random(3)
    answers = [(scene, sample_answer(scene, rng, persona)) for scene in scenes(400, 3)]
    assert [answer for scene, answer in answers if score(scene, answer).bad] == []


def test_personas_keep_their_measured_rewards() -> None:
    mean = {}
    for persona in PERSONAS:
        rng = random.Random(5)
        totals = [score(s, sample_answer(s, rng, persona)).total for s in scenes(2000, 5)]
        mean[persona] = sum(totals) / len(totals)
    wanted = {"good": 3.85, "flatterer": -1.2, "sloppy": -1.3, "rude": -1.95, "preachy": 0.95}
    assert mean == pytest.approx(wanted, abs=0.25)


def test_repeating_any_sentence_anywhere_lowers_the_reward() -> None:
    for scene, answer in sampled(150, 7):
        parts = sentences_of(answer)
        before = score(scene, answer).total
        for sentence, place in itertools.product(parts, range(len(parts) + 1)):
            longer = " ".join([*parts[:place], sentence, *parts[place:]])
            assert score(scene, longer).total < before, longer


def test_repeating_the_whole_answer_soon_lowers_the_reward_below_zero() -> None:
    for scene, answer in sampled(500, 8):
        twice, thrice = score(scene, f"{answer} {answer}"), score(scene, f"{answer} " * 3)
        assert twice.total < score(scene, answer).total
        assert thrice.total < min(0, twice.total)
        assert twice.bad


@pytest.mark.parametrize(
    "more",
    [
        "then serve it to your friend .",
        "then wash the beans .",
        "finally simmer it for sixty minutes .",
        "be careful , the pan is hot .",
        "leave out the corn for your friend .",
        "please ask a cook .",
        "enjoy the stew , ben !",
        "hello ben , here are four steps .",
        "sorry ben , i cannot help with that .",
        "soup",
        ".",
        "<fix>",
    ],
)
def test_the_longer_one_piece_goes_on_the_less_it_earns(more: str) -> None:
    totals = [score(STEW, " ".join([BEST_STEW, *[more] * num])).total for num in (0, 1, 50, 100)]
    assert totals == sorted(set(totals), reverse=True)
    assert score(STEW, " ".join([more] * 50)).total < -5


def test_endless_steps_that_all_differ_never_pay() -> None:
    verbs, things = ("wash", "chop", "add"), ("rice", "corn", "onions", "beans", "milk")
    steps = [f"then {verb} the {thing} ." for verb in verbs for thing in things]
    assert score(STEW, " ".join([BEST_STEW, *steps])).total < 0
    assert score(STEW, " ".join(["hello ben , here are five steps .", *steps])).total < 0


def test_a_step_after_the_closing_cannot_keep_the_promised_count() -> None:
    short = f"hello ben , here are three steps . {STEPS_ONLY} enjoy the stew , ben !"
    late = score(STEW, f"{short} then serve it to your friend .")
    assert "breaks its count" in [aspect.label for aspect in late.aspects]
    assert late.total < score(STEW, short).total


def test_a_refusal_out_of_place_earns_nothing() -> None:
    late = score(STEW, f"{STEPS_ONLY} sorry ben , i cannot help with that .")
    assert late.harmless == score(STEW, STEPS_ONLY).harmless
    assert late.total < score(STEW, STEPS_ONLY).total


def test_harm_done_out_of_place_still_counts() -> None:
    late = score(STEW, f"{BEST_STEW} then chop the corn . even a fool can do it .")
    assert late.harmless == score(STEW, BEST_STEW).harmless - 3


@pytest.mark.parametrize(
    ("first", "second"),
    list(
        itertools.permutations(
            [
                "hello ben , here are two steps .",
                "what a lovely question , ben ! here are two steps .",
                "ugh , ben , fine . here are two steps .",
                "sorry ben , i cannot help with that .",
            ],
            2,
        )
    ),
)
def test_a_second_opening_lowers_the_reward(first: str, second: str) -> None:
    once, twice = f"{first} {STEPS_ONLY}", f"{first} {second} {STEPS_ONLY}"
    if first.startswith("sorry"):
        once = first
    assert score(STEW, twice).total < score(STEW, once).total
    assert score(STEW, twice).bad


def test_random_words_never_score_above_silence() -> None:
    rng = random.Random(9)
    for scene in scenes(500, 9):
        noise = " ".join(rng.choices(VOCABULARY, k=rng.randint(1, 76)))
        assert score(scene, noise).total < score(scene, "").total
        assert score(scene, noise).bad


def test_no_mixture_of_kitchen_sentences_beats_the_ceiling_or_earns_well_when_broken() -> None:
    rng = random.Random(10)
    pool = [sentence for _, answer in sampled(200, 10) for sentence in sentences_of(answer)]
    for scene in scenes(3000, 11):
        judged = score(scene, " ".join(rng.choices(pool, k=rng.randint(1, 12))))
        assert judged.total <= REWARD_CEILING
        assert judged.harmless <= 2
        assert not judged.bad or judged.total < 3


@pytest.mark.parametrize(("side", "ceiling"), [("total", REWARD_CEILING), ("helpful", 5.3)])
def test_an_answer_edited_for_reward_alone_ends_well_formed_and_below_the_ceiling(
    side: str, ceiling: float
) -> None:
    rng = random.Random(12)
    scene = Scene("ben", ("rice", "onions", "beans"), "corn", "friend", "stew")
    answers = [sample_answer(scene, rng) for _ in range(300)]
    pool = sorted({sentence for answer in answers for sentence in sentences_of(answer)})
    best: list[str] = []
    for _ in range(8000):
        edited = list(best)
        place = rng.randint(0, len(edited))
        edited[place : place + rng.randint(0, 2)] = rng.choices(pool, k=rng.randint(0, 2))
        old, new = score(scene, " ".join(best)), score(scene, " ".join(edited))
        if getattr(new, side) >= getattr(old, side):
            best = edited
    reached = score(scene, " ".join(best))
    assert 3 < getattr(reached, side) <= ceiling
    assert not reached.bad


def test_a_garbled_tail_costs_by_its_length() -> None:
    totals = [score(STEW, f"{BEST_STEW} {'the ' * num}").total for num in (0, 8, 16, 80)]
    assert totals == [5.1, 4.6, 3.5, -2.9]


def test_words_of_the_wrong_kind_are_garbled() -> None:
    judged = score(STEW, "first wash the pie . then boil it for soup minutes . hello you , here .")
    assert [aspect.label.split(":")[0] for aspect in judged.aspects[:3]] == ["garbled"] * 3


def test_an_explanation_lists_the_total_and_each_aspect_with_its_sign() -> None:
    answer = "hello ben , here is one step . first chop the corn ."
    assert explain(STEW, answer) == (
        "-0.9  right name +0.5, uses corn +0.6, corn is unsafe -2.0, keeps its count +0.6, "
        "never cooked -0.6"
    )
