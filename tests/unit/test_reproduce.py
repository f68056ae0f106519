"""The study of the papers: its criteria, its page, what it caches, and what it would run."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.config import JobConfig
from jobs.kitchen_stages import STAGES as KITCHEN
from jobs.reproduce import enumerated
from jobs.reproduce.__main__ import draw_verdicts, main
from jobs.reproduce.chapter import Chapter, Evidence, above, at_least, margin
from jobs.reproduce.chapters import CHAPTERS
from jobs.reproduce.chapters.limits import best_of
from jobs.reproduce.figures import new_figure, svg
from jobs.reproduce.measure import keep
from jobs.reproduce.measured import Results, measured_path
from jobs.reproduce.methods import UNSEEN_DISHES, UNSEEN_NAMES, folder_of, questions
from jobs.reproduce.page import Colophon, failed, write_page
from jobs.reproduce.seeds import names_of, over_seeds
from jobs.reproduce.study import METHODS, stages
from jobs.reproduce.trainings import ROUNDS, SEARCHES, TRAININGS
from jobs.resolve import resolved
from jobs.rounds_config import RoundsConfig
from pilotfish import config as configs
from pilotfish.evaluation.metrics import compare
from pilotfish.train.export import write_record
from tests.enumerable import World
from tests.studied import made_up, made_up_results, write_records


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_records(folder)
    return folder


@pytest.fixture(scope="module")
def chapters(root: Path) -> dict[str, Chapter]:
    return written(root, made_up_results())


def written(root: Path, results: Results) -> dict[str, Chapter]:
    evidence = Evidence(results=results, root=root, num_seeds=3)
    return {name: spec.write(evidence) for name, spec in CHAPTERS.items()}


def test_sound_methods_pass_every_hard_criterion(chapters: dict[str, Chapter]) -> None:
    missed = [one for chapter in chapters.values() for one in failed(chapter)]
    assert missed == []
    assert all(any(one.hard for one in chapter.criteria) for chapter in chapters.values())


@pytest.mark.parametrize(
    ("chapter", "name", "like", "claim"),
    [
        ("proxy", "proxy_seed2", "base_t1", "Every decile"),
        ("proxy", "proxy_untrained", "proxy", "An untrained proxy is not above"),
        ("proxy", "proxy_off", "base_t1", "nucleus rule"),
        ("genarm", "genarm", "base_greedy", "GenARM is above ARGS"),
        ("genarm", "weak_base_m", "base_m", "recovers the larger base's gap"),
        ("genarm", "mix_100", "mix_75", "All weight on helpful"),
        ("transfer_q", "transfer_w3", "base", "above the greedy base"),
        ("aligner", "aligned_dpo", "base", "answers of DPO"),
        ("aligner", "aligner_twice", "base", "A second pass does no harm"),
        ("aligner", "aligner_copyist", "aligner", "changes nothing"),
        ("limits", "genarm", "args_w3", "GenARM: forwards per token"),
        ("limits", "transfer_w3", "genarm", "seconds per answer"),
    ],
)
def test_a_method_that_does_not_do_its_part_fails_its_hard_criterion(
    chapter: str, name: str, like: str, claim: str, root: Path
) -> None:
    results = made_up_results(**{name: made_up(like)})
    found = CHAPTERS[chapter].write(Evidence(results=results, root=root, num_seeds=3))
    [criterion] = [one for one in failed(found) if claim in one.claim]
    assert criterion.verdict == "FAIL"
    assert "FAIL       hard" in draw_verdicts({chapter: found})


def test_a_proxy_of_more_than_a_hundredth_of_the_base_fails(tmp_path: Path) -> None:
    write_records(tmp_path)
    fat = {"config_hash": "fat", "metrics": {"trainable_parameters": 3500}}
    write_record(folder_of(tmp_path, "proxy"), fat)
    found = CHAPTERS["proxy"].write(Evidence(results=made_up_results(), root=tmp_path, num_seeds=1))
    [criterion] = failed(found)
    assert criterion.found == "1.02%"


def test_a_gain_must_lie_above_zero_with_its_whole_interval() -> None:
    clear, unclear = compare([1.0, 1.1] * 20, [0.0] * 40), compare([1.0, -0.9] * 20, [0.0] * 40)
    assert above("x", clear, hard=True).verdict == "pass"
    assert above("x", unclear, hard=True).verdict == "FAIL"
    assert above("x", unclear).verdict == "not shown"
    assert at_least("x", 5.0, 5.0).holds


def test_the_margin_is_that_of_wins_over_losses() -> None:
    one, other = [1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 4.0, 3.0]
    assert margin(one, other) == 25
    assert margin(other, one) == -25
    assert margin(one, one) == 0


def test_headline_rows_are_means_over_seeds_with_their_spread() -> None:
    results = made_up_results()
    found = over_seeds(results, "genarm", 3)
    means = [results[name].mean("rewards") for name in names_of("genarm", 3)]
    assert names_of("genarm", 3) == ["genarm", "genarm_seed2", "genarm_seed3"]
    assert found.mean == pytest.approx(np.mean(means))
    assert found.spread == pytest.approx(np.std(means, ddof=1))
    assert found.low < found.mean < found.high


def test_the_page_holds_every_chapter_and_asks_for_nothing_else(
    chapters: dict[str, Chapter], tmp_path: Path
) -> None:
    facts = {"date": "today", "machine": "two cores", "time": "an hour"}
    path = tmp_path / "report.html"
    write_page(chapters, Colophon(facts=facts, seconds={"base": 60.0}), path)
    page = path.read_text()
    for name, chapter in chapters.items():
        assert f'<section id="{name}">' in page
        assert page.count(f"<h2>{chapter.title}</h2>") == 1
    num_plots = sum(len(chapter.plots) for chapter in chapters.values())
    assert page.count("<svg") == num_plots >= 12
    assert not re.search(r"<(script|link|img|iframe)|@import|\bsrc=", page)
    # Namespaces are names; a place that a browser would go to is an attribute or a url().
    assert not re.search(r"""(?<!xmlns:xlink=")(?<!xmlns=")https?://""", page)
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))
    assert "Every hard criterion holds" in page


def test_a_picture_takes_its_ink_from_the_page() -> None:
    figure, [axes] = new_figure()
    axes.plot([1, 2], [3, 4])
    axes.set_xlabel("x")
    text = svg(figure, "one")
    assert "currentColor" in text
    assert "#010203" not in text
    assert "background" not in text


def test_measurements_are_cached_until_a_model_or_the_questions_change(tmp_path: Path) -> None:
    write_records(tmp_path)
    method = METHODS["proxy"]
    digest = method.digest(tmp_path, 500)
    assert digest == method.digest(tmp_path, 500)
    assert digest == replace(method, label="by another name").digest(tmp_path, 500)
    assert digest != method.digest(tmp_path, 400)
    assert digest != replace(method, temperature=0.5).digest(tmp_path, 500)
    write_record(folder_of(tmp_path, "proxy"), {"config_hash": "trained anew"})
    assert digest != method.digest(tmp_path, 500)


def test_what_was_measured_is_neither_measured_nor_written_again(tmp_path: Path) -> None:
    write_records(tmp_path)
    path = measured_path(tmp_path, "base")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"digest": METHODS["base"].digest(tmp_path, 7)}))
    assert keep(tmp_path, "base", 7) is False


def test_a_dry_run_lists_every_stage_and_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", str(tmp_path), "--only", "limits", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("stages, 0 of them done")
    assert any(line.startswith("to do  genarm  ") for line in lines)
    [measuring] = [line for line in lines if "measure genarm_w8 " in line]
    assert f"jobs.reproduce.measure genarm_w8 --root {tmp_path} --prompts 500" in measuring
    assert not any("rounds" in line for line in lines)


def test_too_few_questions_cannot_be_honoured(tmp_path: Path) -> None:
    assert main(["--root", str(tmp_path), "--prompts", "1", "--dry-run"]) == 2


@pytest.mark.parametrize("name", [n for n in TRAININGS if TRAININGS[n].module == "jobs.train"])
def test_every_training_resolves_and_needs_what_it_reads(name: str, tmp_path: Path) -> None:
    stage = TRAININGS[name]
    path, *overrides = (one.format(root=tmp_path) for one in stage.arguments)
    config = resolved(configs.load(JobConfig, path, overrides))
    assert Path(config.output) == folder_of(tmp_path, name)
    text = json.dumps(config.model_dump(mode="json", exclude={"output"}))
    read = {one for one in {**KITCHEN, **TRAININGS} if f'{folder_of(tmp_path, one)}"' in text}
    assert read <= set(stage.needs)
    assert config.tracking.register_as is None


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_resolve(name: str, tmp_path: Path) -> None:
    path, *overrides = (one.format(root=tmp_path) for one in ROUNDS[name].arguments)
    config = configs.load(RoundsConfig, path, overrides)
    assert config.output == str(folder_of(tmp_path, name))
    assert config.pairs.kind == name.removeprefix("rounds_")


def test_everything_a_chapter_reads_is_measured_and_every_measurement_is_read() -> None:
    read = {name for spec in CHAPTERS.values() for name in (*spec.methods, *spec.headline)}
    assert read <= set(METHODS)
    assert {name for name in METHODS if "_seed" not in name} <= read
    todo = stages(METHODS, [*ROUNDS, *SEARCHES])
    order = list(todo)
    for name, stage in todo.items():
        assert all(order.index(need) < order.index(name) for need in stage.needs)


def test_unseen_questions_are_of_unseen_names_and_dishes() -> None:
    found = questions("unseen", 500)
    assert len(found) == 500
    assert {one.dish for one in found} == set(UNSEEN_DISHES)
    assert {one.name for one in found} == set(UNSEEN_NAMES)


def test_the_best_of_some_drafts_is_that_over_all_choices() -> None:
    rng = np.random.default_rng(1)
    scores, rewards = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for num in range(1, 7):
        chosen = [
            max(drafts, key=lambda draft: scores[question, draft])
            for question in range(3)
            for drafts in itertools.combinations(range(6), num)
        ]
        places = np.reshape(chosen, (3, -1))
        expected = [np.take_along_axis(one, places, axis=1).mean() for one in (scores, rewards)]
        assert best_of(scores, rewards, num) == pytest.approx(tuple(expected))


def test_enumerated_values_are_those_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enumerated, "HORIZON", 3)
    rng = np.random.default_rng(5)
    draw = [rng.normal(size=(3**at, 3)) for at in range(4)]
    base = [one - np.logaddexp.reduce(one, axis=-1, keepdims=True) for one in draw[:3]]
    reward = draw[2] + 1.0

    def place(prefix: tuple[int, ...]) -> int:
        return sum(token * 3**power for power, token in enumerate(reversed(prefix)))

    world = World(
        3,
        3,
        lambda prefix: torch.from_numpy(base[len(prefix)][place(prefix)]),
        lambda prefix: float(reward.reshape(-1)[place(prefix)]),
    )
    value = enumerated.expected(base, reward)
    law = enumerated.aligned(base, reward, 0.3)
    optimum = world.optimal_policy(0.3)
    for prefix in world.prefixes():
        at = len(prefix)
        theirs = [world.expected_reward(world.base, (*prefix, token)) for token in range(3)]
        assert value[at][place(prefix)] == pytest.approx(theirs, abs=1e-12)
        assert law[at][place(prefix)] == pytest.approx(optimum(prefix).numpy(), abs=1e-10)


def test_indirect_values_are_those_of_the_model_aligned_to_the_right_reward() -> None:
    rng = np.random.default_rng(7)
    base = [one - np.logaddexp.reduce(one, axis=-1, keepdims=True) for one in enumerated._draw(rng)]
    reward, other = enumerated._draw(rng)[-1], enumerated._draw(rng)[-1]
    right = enumerated.expected(enumerated.aligned(base, reward), reward)
    found = enumerated.indirect(enumerated.aligned(base, other), reward, other)
    naive = enumerated.expected(enumerated.aligned(base, other), reward)
    for one, two, three in zip(found[:-1], right[:-1], naive[:-1], strict=True):
        assert one == pytest.approx(two, abs=1e-9)
        assert np.abs(three - two).max() > 0.05
