"""Rows made chunk by chunk: what a driver's death leaves, and what actors make of a chunk."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.corrector import Corrector, aligner_settings
from jobs.decoder import Decoder
from jobs.pool import Chunk, chunks_of
from jobs.rows import ROWS_NAME, Recipe, Row, make_rows, metrics_of
from jobs.rows_config import AnswerConfig, CorrectConfig, RowsConfig
from pilotfish import Pilot, SamplingParams, world
from pilotfish.data.formats import Columns, to_answered
from pilotfish.data.records import Demonstration
from pilotfish.errors import ConfigError, DataError
from pilotfish.evaluation.settings import Setting
from tests.folders import save_aligner, save_base, save_guide

FIX = {"template_text": "<user> {question} <bot> {answer} <fix>", "max_tokens": 20}


class DriverDies(Exception):
    pass


class Kitchen:
    """Doubles numbers, and may die after so many chunks."""

    def __init__(self, *, dies_after: int | None = None) -> None:
        self.asked: list[int] = []
        self._dies_after = dies_after

    def make(self, chunks: Sequence[Chunk[int]]) -> Iterator[tuple[Chunk[int], list[Row]]]:
        for chunk in reversed(chunks):  # actors end in any order
            if len(self.asked) == self._dies_after:
                raise DriverDies
            self.asked.append(chunk.start)
            yield chunk, [{"number": item, "double": 2 * item} for item in chunk.items]

    def recipe(self, num: int = 10, digest: str = "abc") -> Recipe:
        return Recipe(
            job="double",
            digest=digest,
            chunks=chunks_of(range(num), 4),
            make=self.make,
            finish=lambda folder, rows: {"num": len(rows)},
        )


def config(tmp_path: Path, **more: Any) -> RowsConfig:
    output = str(tmp_path / "rows")
    return RowsConfig.model_validate(
        {"root": str(tmp_path), "output": output, "tracking": {"enabled": False}, **more}
    )


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ROWS_NAME).read_text().splitlines()]


def test_rows_come_in_the_order_of_the_items_with_their_numbers(tmp_path: Path) -> None:
    folder = make_rows(config(tmp_path), Kitchen().recipe())
    assert rows_in(folder) == [{"number": n, "double": 2 * n} for n in range(10)]
    assert metrics_of(folder) == {"num": 10}
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows"], "nothing is left beside it"


def test_a_driver_that_dies_leaves_no_rows_but_finished_chunks_are_kept(tmp_path: Path) -> None:
    with pytest.raises(DriverDies):
        make_rows(config(tmp_path), Kitchen(dies_after=2).recipe())
    assert not (tmp_path / "rows").exists()
    again = Kitchen()
    folder = make_rows(config(tmp_path), again.recipe())
    assert again.asked == [0], "8 and 4 were finished"
    assert rows_in(folder) == [{"number": n, "double": 2 * n} for n in range(10)]


def test_chunks_of_other_settings_are_never_mixed_in(tmp_path: Path) -> None:
    with pytest.raises(DriverDies):
        make_rows(config(tmp_path), Kitchen(dies_after=2).recipe(digest="old"))
    again = Kitchen()
    make_rows(config(tmp_path), again.recipe(digest="new"))
    assert again.asked == [8, 4, 0]


def test_rows_of_the_same_settings_are_reused_and_of_others_refused(tmp_path: Path) -> None:
    make_rows(config(tmp_path), Kitchen().recipe())
    idle = Kitchen()
    make_rows(config(tmp_path), idle.recipe())
    assert idle.asked == []
    with pytest.raises(ConfigError, match="not made from these settings"):
        make_rows(config(tmp_path), idle.recipe(digest="other"))
    make_rows(config(tmp_path, force=True), idle.recipe(num=8, digest="other"))
    assert len(rows_in(tmp_path / "rows")) == 8


def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not made by this command"):
        make_rows(config(tmp_path), Kitchen().recipe())
    assert (tmp_path / "rows" / "thesis.txt").exists()


def test_fewer_rows_than_a_standard_error_needs_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 items gave 1 rows"):
        make_rows(config(tmp_path), Kitchen().recipe(num=1))


ASKED = {"role": "user", "content": "how ?"}
SAID = {"role": "assistant", "content": "so"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "how ?", "answer": "so"}, (ASKED,)),
        ({"prompt": "how ?", "answer": "so"}, "how ?"),
        ({"prompt": [ASKED], "answer": "so", "correction": "x"}, (ASKED,)),
        ({"prompt": "how ?", "completion": "so", "label": False}, "how ?"),
        ({"prompt": [ASKED], "completion": [SAID], "seed": 3}, (ASKED,)),
        ({"messages": [ASKED, SAID]}, (ASKED,)),
        (
            {"chosen": "\n\nHuman: how ?\n\nAssistant: so", "rejected": "\n\nHuman: x"},
            (ASKED,),
        ),
    ],
)
def test_any_row_with_an_answer_can_be_corrected(row: dict[str, Any], prompt: Any) -> None:
    assert to_answered(row, Columns()) == Demonstration(prompt, "so")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = world.build_tokenizer()
    save_base(folder / "base", tokenizer=tokenizer)
    save_aligner(folder / "aligner", tokenizer=tokenizer, settings=FIX)
    return folder


def correcting(models: Path, **more: Any) -> CorrectConfig:
    answers = {"source": "kitchen", "num": 2}
    told = {"output": "rows", "aligner": str(models / "aligner"), "answers": answers, **more}
    return CorrectConfig.model_validate(told)


def test_a_corrector_without_a_base_writes_what_an_aligner_writes_behind_one(models: Path) -> None:
    pilot = Pilot(models / "base", guides={"fix": models / "aligner"}, device="cpu")
    prompts = [tuple(scene.messages) for scene in world.scenes(3, 5)]
    params = [SamplingParams(max_tokens=8, seed=seed) for seed in range(3)]
    revised = pilot.generate(prompts, params, guides={"fix": 1})
    drafts = [one.draft_text or "" for one in revised]
    chunk = chunks_of([Demonstration(*both) for both in zip(prompts, drafts, strict=True)], 3)[0]
    rows = Corrector(correcting(models)).process(chunk)
    assert [row["answer"] for row in rows] == drafts
    assert [row["correction"] for row in rows] == [one.text for one in revised]
    assert [row["finish_reason"] for row in rows] == [one.finish_reason for one in revised]
    assert all(text.strip() for text in drafts)


def test_a_judge_scores_answers_and_corrections_by_the_same_truth(models: Path) -> None:
    scene, answer = world.scenes(1, 5)[0], "hello ben , here is one step ."
    chunk = Chunk(items=[Demonstration(tuple(scene.messages), answer)], start=0)
    [row] = Corrector(correcting(models, reward={"kind": "kitchen"})).process(chunk)
    assert row["answer_reward"] == world.score(scene, answer).total
    assert row["correction_reward"] == world.score(scene, row["correction"]).total


def test_an_answer_without_room_for_its_copy_is_left_out_and_logged(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [Demonstration("how ?", "chop " * num) for num in (3, 600, 5)]
    rows = Corrector(correcting(models)).process(Chunk(items=items, start=0))
    assert [len(row["answer"].split()) for row in rows] == [3, 5]
    assert "1 of 3 answers left out" in caplog.text


def test_only_an_aligner_corrects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind 'genarm'"):
        aligner_settings(str(save_guide(tmp_path / "guide")))


def test_every_answer_has_the_seed_of_its_place_whatever_its_chunk(models: Path) -> None:
    prompts = [tuple(scene.messages) for scene in world.scenes(4, 5)]
    told = {"output": "rows", "base": str(models / "base"), "prompts": {"source": "kitchen"}}
    job = AnswerConfig.model_validate({**told, "decoding": {"max_tokens": 8}})
    decoder = Decoder(job, [Setting(name="base")])

    def texts(size: int) -> list[str]:
        chunks = chunks_of(prompts, size, label="base")
        return [answer.text for chunk in chunks for answer in decoder.process(chunk).answers]

    assert texts(4) == texts(1)
    assert texts(4) != [
        answer.text
        for prompt in prompts
        for answer in decoder.process(Chunk(items=[prompt], start=0, label="base")).answers
    ]
