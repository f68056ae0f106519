import html
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from pilotfish import world
from pilotfish.decode.sequence import Completion, FinishReason
from pilotfish.errors import DataError
from pilotfish.evaluation.page import samples, write_page
from pilotfish.evaluation.plots import draw_plots
from pilotfish.evaluation.report import REPORT_NAME, Answer, Report, load_report, save_report
from pilotfish.evaluation.rewards import Judgement, KitchenReward
from pilotfish.evaluation.settings import Setting, with_controls
from pilotfish.evaluation.summary import About, Decoded, summarise, to_answer
from pilotfish.evaluation.text import as_table

SCENES = world.scenes(12, seed=5)
SETTINGS = with_controls(
    [
        Setting(name="G w=1", guides={"g": 1.0}),
        Setting(name="G w=1 cool", guides={"g": 1.0}, temperature=0.7),
    ]
)
ABOUT = About(
    title="A <title> & more",
    base="runs/base",
    guides={"g": "runs/g"},
    prompts_from="12 questions",
    reward="the truth",
    config={"seed": 3, "text": "</pre><b>"},
)


def decoded(setting: Setting, *, judge: bool = True) -> Decoded:
    """Answers of the good persona for guided settings, of anybody for the base."""
    rng = random.Random(setting.name)
    answers = []
    for scene in SCENES:
        text = world.sample_answer(scene, rng, persona=None if setting.is_base else "good")
        num = len(text.split())
        completion = Completion(
            text=text,
            token_ids=list(range(num)),
            logprobs=[-1.0] * num,
            base_logprobs=[-1.0] * num,
            kl=[0.0 if setting.is_base else 0.125] * num,
            finish_reason=FinishReason.STOP,
        )
        [judged] = KitchenReward().judge([scene.text], [text]) if judge else [Judgement()]
        answers.append(to_answer(completion, judged))
    total = sum(answer.num_tokens for answer in answers)
    forwards = total if setting.is_base else 2 * total
    return Decoded(setting=setting, answers=answers, seconds=0.5, num_forwards=forwards)


def make_report(*, judge: bool = True) -> Report:
    every = [decoded(setting, judge=judge) for setting in SETTINGS]
    return summarise(every, [tuple(scene.messages) for scene in SCENES], about=ABOUT)


def answer(**changes: Any) -> Answer:
    values: dict[str, Any] = {
        "text": "a b c",
        "num_tokens": 4,
        "finish_reason": "stop",
        "kl": 0.0,
        "reward": 1.0,
        "bad": False,
    }
    return Answer(**{**values, **changes})


def two_settings(base: list[Answer], guided: list[Answer]) -> Report:
    settings = (Setting(name="base"), Setting(name="guided", guides={"g": 1.0}))
    every = [
        Decoded(setting=setting, answers=answers, seconds=2.0, num_forwards=8)
        for setting, answers in zip(settings, (base, guided), strict=True)
    ]
    return summarise(every, ["p"] * len(base), about=ABOUT)


def test_metrics_are_those_of_the_answers():
    answers = [
        answer(text="a b", num_tokens=3, kl=1.5, reward=2.0),
        answer(text="a b", num_tokens=5, kl=0.5, reward=1.0, bad=True),
    ]
    metrics = two_settings([answer(), answer()], answers).result("guided").metrics
    assert metrics.num_answers == 2
    assert metrics.reward is not None
    assert metrics.reward.mean == 1.5
    assert metrics.length.mean == 4
    assert metrics.kl.mean == 1.0
    assert metrics.kl_per_token == 2.0 / 8
    assert metrics.bad_share == 0.5
    assert metrics.unique == 0.0
    assert metrics.distinct_1 == 0.5
    assert metrics.tokens_per_second == 4.0
    assert metrics.forwards_per_token == 1.0


def test_guided_settings_are_compared_with_each_of_their_controls():
    report = make_report()
    assert set(report.result("G w=1").metrics.versus) == {"base", "base T=0.5", "base greedy"}
    cool = {"base", "base T=0.7", "base T=0.5", "base T=0.35", "base greedy"}
    assert set(report.result("G w=1 cool").metrics.versus) == cool
    assert set(report.result("base greedy").metrics.versus) == {"base"}
    assert report.result("base").metrics.versus == {}


def test_the_hardest_control_is_the_one_beaten_by_least():
    report = make_report()
    found = report.hardest_control("G w=1")
    assert found is not None
    gains = {name: versus.gain for name, versus in report.result("G w=1").metrics.versus.items()}
    assert gains[found[0]] == found[1].gain == min(gains.values())


def test_where_the_judge_is_silent_empty_and_cut_off_answers_are_bad():
    def made(text: str, reason: FinishReason) -> Answer:
        completion = Completion(
            text=text, token_ids=[1], logprobs=[0], base_logprobs=[0], kl=[0], finish_reason=reason
        )
        return to_answer(completion, Judgement())

    assert made(" ", FinishReason.STOP).bad
    assert made("a", FinishReason.LENGTH).bad
    assert not made("a", FinishReason.STOP).bad


def test_mostly_bad_answers_are_warned_about(caplog: pytest.LogCaptureFixture):
    bad = [answer(bad=True), answer(bad=True), answer()]
    report = two_settings([answer()] * 3, bad)
    assert any("guided: 67% of the answers are bad" in text for text in report.warnings)
    assert report.warnings[0] in caplog.text


@pytest.mark.parametrize(("length", "words"), [(13, "guided +30%"), (7, "guided -30%")])
def test_a_shift_of_length_is_warned_about(length: int, words: str):
    report = two_settings([answer(num_tokens=10)] * 2, [answer(num_tokens=length)] * 2)
    assert [words in text for text in report.warnings] == [True]


def test_small_shifts_and_few_bad_answers_are_not_warned_about():
    guided = [answer(num_tokens=11, bad=True), answer(num_tokens=11)]
    assert two_settings([answer(num_tokens=10)] * 2, guided).warnings == ()


def test_a_saved_report_is_read_back_as_it_was(tmp_path: Path):
    report = make_report()
    save_report(report, tmp_path)
    assert load_report(tmp_path) == report


def test_a_folder_without_a_report_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        load_report(tmp_path)


def test_the_page_holds_every_number_of_the_json(tmp_path: Path):
    report = make_report()
    save_report(report, tmp_path)
    page = write_page(report, tmp_path, draw_plots(report, tmp_path)).read_text()
    shown = {cell.strip() for cell in re.findall(r"<td[^>]*>([^<]*)</td>", page)}
    numbers: list[str] = []

    def collect(tree: Any) -> None:
        if isinstance(tree, dict):
            for value in tree.values():
                collect(value)
        elif isinstance(tree, int | float):
            numbers.append(str(tree))

    for result in json.loads((tmp_path / REPORT_NAME).read_text())["results"]:
        collect(result["metrics"])
    assert len(numbers) > 100
    assert set(numbers) <= shown


def test_trackers_are_given_every_number_of_the_json(tmp_path: Path):
    report = make_report()
    metrics = report.metrics()
    best = report.result("G w=1").metrics
    assert best.reward is not None
    assert metrics["G w1/reward.mean"] == best.reward.mean
    assert metrics["G w1/versus.base T0.5.wins"] == best.versus["base T=0.5"].wins
    assert all(re.fullmatch(r"[\w.\- /]+", name) for name in metrics)
    assert len(metrics) == sum(len(result.metrics.flat()) for result in report.results)


def test_the_page_shows_the_first_prompts_before_and_after_with_reasons(tmp_path: Path):
    report = make_report()
    page = html.unescape(write_page(report, tmp_path, []).read_text())
    best = report.best()
    assert best is not None
    shown = samples(report, best)
    assert [sample.prompt for sample in shown] == [scene.text for scene in SCENES[: len(shown)]]
    for sample in shown:
        assert sample.prompt in page
        assert sample.before.text in page
        assert sample.after.text in page
        assert all(reason.label in page for reason in sample.after.reasons)


def test_text_from_outside_cannot_write_html(tmp_path: Path):
    page = write_page(make_report(), tmp_path, []).read_text()
    assert "<title>A &lt;title&gt; &amp; more</title>" in page
    assert "</pre><b>" not in page


def test_plots_are_pictures_of_some_size(tmp_path: Path):
    pictures = draw_plots(make_report(), tmp_path)
    names = [picture.path.name for picture in pictures]
    assert names == ["rewards.png", "distribution.png", "reward_kl.png", "lengths.png"]
    for picture in pictures:
        data = picture.path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_pictures_are_inside_the_page(tmp_path: Path):
    report = make_report()
    page = write_page(report, tmp_path, draw_plots(report, tmp_path)).read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_a_report_without_a_reward_has_a_page_a_table_and_a_plot_of_lengths(tmp_path: Path):
    report = make_report(judge=False)
    pictures = draw_plots(report, tmp_path)
    assert [picture.path.name for picture in pictures] == ["lengths.png"]
    page = write_page(report, tmp_path, pictures).read_text()
    assert "win + ½ tie" not in page
    assert report.best() is None
    assert len(as_table(report).splitlines()) == 2 + len(SETTINGS)


def test_the_table_shows_each_setting_with_its_reward():
    report = make_report()
    lines = as_table(report).splitlines()[2:]
    for line, result in zip(lines, report.results, strict=True):
        assert line.startswith(result.setting.name)
        assert str(result.metrics.reward) in line
