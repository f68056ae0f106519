from pathlib import Path

import pytest

from pilotfish.errors import ConfigError, DataError
from pilotfish.evaluation.judge import (
    TEMPLATES,
    JudgeTemplate,
    Scores,
    Shown,
    cut,
    find_template,
    read_scores,
    weigh,
)


def test_braces_in_answers_are_never_placeholders():
    template = JudgeTemplate("{question} / {first} / {second} / {other}")
    text = template.render("why {first}?", "{second} {", "}")
    assert text == "why {first}? / {second} { / } / {other}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_shows_the_question_and_both_answers_in_their_order(name: str):
    text = TEMPLATES[name].render("QUESTION", "ONE", "TWO")
    places = [text.index(part) for part in ("QUESTION", "ONE", "TWO")]
    assert places == sorted(places)


def test_a_template_is_an_id_or_a_file_with_all_three_parts(tmp_path: Path):
    path = tmp_path / "template.txt"
    path.write_text("{first} or {second}, to {question}?")
    assert find_template(str(path)).render("c", "a", "b") == "a or b, to c?"
    path.write_text("{first} or {second}?")
    with pytest.raises(ConfigError, match=r"\{question\}"):
        find_template(str(path))
    with pytest.raises(ConfigError, match="none of hh"):
        find_template("hhh")


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 6\nThe first is better.", (8, 6)),
        ("\n  **7.5, 10**.\n", (7.5, 10)),
        ("1 1", (1, 1)),
        ("0 11", None),
        ("8", None),
        ("8 6 7", None),
        ("Assistant 1: 8, assistant 2: 6", None),
        ("I would say\n8 6", None),
        ("", None),
    ],
)
def test_two_scores_from_1_to_10_alone_in_the_first_line_are_read_and_nothing_else(
    reply: str, scores: tuple[float, float] | None
):
    assert read_scores(reply) == scores


def test_an_answer_ends_where_the_model_speaks_for_the_user():
    marks = ["###Human:", "\n\nHuman:"]
    assert cut(" yes.\n\nHuman: and?\n\n###Human: so", marks) == "yes."
    assert cut("Human: no mark", marks) == "Human: no mark"


def shown(ours_first: tuple[float, float] | None, ours_second: tuple[float, float] | None) -> Shown:
    """Two replies, as (score of the answer shown first, score of the one shown second)."""
    return Shown(
        None if ours_first is None else Scores(*ours_first),
        None if ours_second is None else Scores(*ours_second),
    )


WIN, LOSS = shown((9, 2), (3, 8)), shown((2, 9), (6, 5))
TIE, SPLIT = shown((5, 5), (5, 5)), shown((8, 4), (7, 3))


def test_a_prompt_is_won_by_the_higher_mean_over_both_orders():
    verdict = weigh([WIN, WIN, LOSS, TIE, SPLIT])
    found = verdict.comparison
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)
    assert found.win_rate == pytest.approx(3 / 5)
    ours = [(9 + 8) / 2, (9 + 8) / 2, (2 + 5) / 2, 5, (8 + 3) / 2]
    theirs = [(2 + 3) / 2, (2 + 3) / 2, (9 + 6) / 2, 5, (4 + 7) / 2]
    assert verdict.score == pytest.approx(sum(ours) / 5)
    assert verdict.other_score == pytest.approx(sum(theirs) / 5)
    assert found.gain == pytest.approx((sum(ours) - sum(theirs)) / 5)
    assert found.win_rate_low < found.win_rate < found.win_rate_high


def test_what_the_order_did_is_told():
    """First shown and higher: once in a win, once in a loss, twice in a split."""
    verdict = weigh([WIN, LOSS, TIE, SPLIT])
    assert verdict.first_rate == pytest.approx((1 + 1 + 2 * 0.5 + 2) / 8)
    assert verdict.agreement == pytest.approx(3 / 4)


def test_a_judge_that_sees_nothing_but_the_order_decides_nothing():
    verdict = weigh([shown((9, 4), (9, 4))] * 20)
    assert (verdict.comparison.ties, verdict.comparison.win_rate) == (20, 0.5)
    assert (verdict.first_rate, verdict.agreement) == (1.0, 0.0)


def test_an_unreadable_reply_is_an_error_and_no_tie():
    with_errors = weigh([WIN, shown(None, (3, 8)), shown((9, 2), None), shown(None, None), LOSS])
    assert (with_errors.num_errors, with_errors.num_left_out) == (4, 3)
    assert with_errors.comparison == weigh([WIN, LOSS]).comparison


def test_a_judge_that_cannot_be_read_at_all_is_an_error():
    with pytest.raises(DataError, match="none of 2 prompts"):
        weigh([shown(None, (1, 2)), shown(None, None)])
