"""Files, folders and hub sets to records, the held-out part, and real HH-RLHF rows."""

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pilotfish.config import parse
from pilotfish.data.loading import load_demonstrations, load_pairs, load_prompts
from pilotfish.data.sources import DataSource, load_rows
from pilotfish.errors import ConfigError, DataError
from tests.real_data import REPO, hh_source


def pairs(number: int, *, prompts: int | None = None) -> list[dict[str, Any]]:
    return [
        {"prompt": f"q{i % (prompts or number)}", "chosen": f"yes {i}", "rejected": "no"}
        for i in range(number)
    ]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return str(path)


def chosen(source: DataSource) -> list[str]:
    return [pair.chosen for pair in load_pairs(source).records]


def test_every_file_format_gives_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"prompt": "Crème?", "chosen": "oui\n\nbien sûr", "rejected": "non"}, *pairs(3)]
    paths = [write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "a.jsonl.gz", rows)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    paths += [str(tmp_path / "a.json"), str(tmp_path / "a.parquet")]
    assert [list(load_rows(DataSource(path=path))) for path in paths] == [rows] * 4


def test_message_lists_survive_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    [record] = load_demonstrations(DataSource(path=str(tmp_path / "a.parquet"))).records
    assert (record.prompt, record.completion) == (({"role": "user", "content": "hi"},), "yo")


def test_a_list_a_glob_and_a_folder_name_the_same_files(tmp_path: Path) -> None:
    rows = pairs(4)
    first = write_jsonl(tmp_path / "one.jsonl", rows[:2])
    second = write_jsonl(tmp_path / "two.jsonl.gz", rows[2:])
    (tmp_path / "README.md").write_text("not data")
    for path in ((first, second), str(tmp_path / "*.jsonl*"), str(tmp_path)):
        assert list(load_rows(DataSource(path=path))) == rows


@pytest.mark.parametrize("name", ["{}.jsonl.gz", "{}-00000-of-00001.jsonl", "{}/part0.jsonl"])
def test_a_folder_with_files_named_after_splits_gives_the_wanted_split(
    tmp_path: Path, name: str
) -> None:
    write_jsonl(tmp_path / name.format("train"), pairs(3))
    write_jsonl(tmp_path / name.format("test"), pairs(1))
    assert len(list(load_rows(DataSource(path=str(tmp_path))))) == 3
    assert len(list(load_rows(DataSource(path=str(tmp_path), split="test")))) == 1
    with pytest.raises(DataError, match=r"no file of split 'dev', but of \['test', 'train'\]"):
        list(load_rows(DataSource(path=str(tmp_path), split="dev")))


def test_splits_with_longer_names_are_told_apart(tmp_path: Path) -> None:
    for number, split in enumerate(("train_prefs", "train_sft", "test_prefs"), start=1):
        write_jsonl(tmp_path / f"{split}-00000-of-00001.jsonl", pairs(number))

    def count(split: str) -> int:
        return len(list(load_rows(DataSource(path=str(tmp_path), split=split))))

    assert (count("train_prefs"), count("train_sft"), count("test_prefs")) == (1, 2, 3)
    assert count("test") == 3  # no other file is of a test split
    with pytest.raises(DataError, match=r"'train', but of \['test_prefs', 'train_prefs', 'train_s"):
        count("train")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "x", r"unknown extension, wanted one of \.jsonl, "),
        ("a.jsonl", '{"prompt": 1}\n{"prompt": ', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", "[1, 2]\n", r"a\.jsonl:1 holds a list, wanted an object"),
        ("a.json", '{"a": 1}', r"holds a JSON dict, wanted a list"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_place(
    tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint):
        list(load_rows(DataSource(path=str(tmp_path / name))))


def test_a_missing_file_is_refused_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data/none.jsonl' is no file or folder.*paths start at"):
        list(load_rows(DataSource(path="data/none.jsonl")))
    with pytest.raises(DataError, match="holds no data file"):
        list(load_rows(DataSource(path=str(tmp_path))))


def test_a_bad_row_is_an_error_with_its_number_and_what_to_do(tmp_path: Path) -> None:
    rows = pairs(3)
    rows[2]["chosen"] = ""
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"row 2 of .*chosen answer is empty.*bad_rows=skip"):
        load_pairs(DataSource(path=path))


def test_skipped_rows_are_counted_by_reason_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pairs(6)
    rows[1]["chosen"] = rows[4]["chosen"] = " "
    del rows[2]["rejected"]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        loaded = load_pairs(DataSource(path=path, bad_rows="skip"))
    assert [pair.chosen for pair in loaded.records] == ["yes 0", "yes 3", "yes 5"]
    assert sorted(loaded.report.skipped.values()) == [(1, 4), (2,)]
    assert (loaded.report.num_rows, loaded.report.num_skipped) == (6, 3)
    assert "2 x the chosen answer is empty (rows 1, 4)" in caplog.text


def test_a_source_of_bad_rows_alone_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "hi"}] * 3)
    with pytest.raises(DataError, match=r"no row can be used.*3 x there is no column 'chosen'"):
        load_pairs(DataSource(path=path, bad_rows="skip"))


def test_train_and_held_out_parts_share_no_prompt_and_miss_no_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(60, prompts=20))
    source = DataSource(path=path, holdout=10, seed=3)
    train, heldout = load_pairs(source), load_pairs(source, part="heldout")
    assert not {p.prompt for p in train.records} & {p.prompt for p in heldout.records}
    assert len(train.records) + len(heldout.records) == 60
    assert len(heldout.records) == 12  # whole prompts, three rows each: the first multiple >= 10


def test_the_held_out_part_is_the_same_for_every_reading_of_the_rows(tmp_path: Path) -> None:
    rows = pairs(40)
    rows[5]["rejected"] = ""  # fine as a demonstration, bad as a pair
    source = DataSource(path=write_jsonl(tmp_path / "a.jsonl", rows), holdout=15, bad_rows="skip")
    demonstrations = load_demonstrations(source, part="heldout").records
    assert [d.prompt for d in demonstrations] == load_prompts(source, part="heldout").records
    trained = {pair.prompt for pair in load_pairs(source).records}
    assert not trained & {d.prompt for d in demonstrations}


def test_the_held_out_part_does_not_change_with_file_order_or_limit(tmp_path: Path) -> None:
    forward = write_jsonl(tmp_path / "a.jsonl", pairs(50))
    backward = write_jsonl(tmp_path / "b.jsonl", pairs(50)[::-1])
    sources = [
        DataSource(path=forward, holdout=0.2),
        DataSource(path=backward, holdout=10),
        DataSource(path=forward, holdout=10, limit=7),
    ]
    parts = [set(load_prompts(source, part="heldout").records) for source in sources]
    assert parts[0] == parts[1] == parts[2]
    assert len(parts[0]) == 10
    reseeded = load_prompts(DataSource(path=forward, holdout=10, seed=1), part="heldout")
    assert set(reseeded.records) != parts[0]


def test_a_limit_draws_a_seeded_subset_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(50))
    some = chosen(DataSource(path=path, limit=10))
    order = [int(text.split()[1]) for text in some]
    assert len(order) == 10
    assert order == sorted(order)
    assert order != list(range(10))
    assert some == chosen(DataSource(path=path, limit=10))
    assert some != chosen(DataSource(path=path, limit=10, seed=1))


def test_a_part_without_rows_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(4))
    with pytest.raises(DataError, match=r"nothing of .* is held out"):
        load_pairs(DataSource(path=path), part="heldout")
    with pytest.raises(DataError, match="leaves none for part 'train'"):
        load_pairs(DataSource(path=path, holdout=4))
    with pytest.raises(ConfigError, match=r"a share in \[0, 1\)"):
        parse(DataSource, {"path": path, "holdout": 1.5}, source="data")


READ_HUB_SET = """
import sys
from pilotfish.data.loading import load_prompts
from pilotfish.data.sources import DataSource
from pilotfish.errors import DataError
print(load_prompts(DataSource(path="acme/pairs")).records)
for wrong in ({"path": "acme/none"}, {"path": "acme/pairs", "split": "dev"}):
    try:
        load_prompts(DataSource(**wrong))
    except DataError as error:
        print(error)
"""


def test_a_hub_set_is_read_from_the_library_cache_when_offline(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = write_jsonl(tmp_path / "a.jsonl", pairs(2))
    built = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path))
    arrow = Path(built.cache_files[0]["filename"])
    cached = tmp_path / "home" / "datasets" / "acme___pairs" / "default" / "0.0.0" / "1a2b"
    shutil.copytree(arrow.parent, cached)
    (cached / arrow.name).rename(cached / "pairs-train.arrow")
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPO / "platform"),
    }
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", READ_HUB_SET]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    read, missing, no_split = answer.stdout.strip().splitlines()
    assert read == "['q0', 'q1']"
    assert "hub set 'acme/none' cannot be loaded" in missing
    assert "HF_HUB_OFFLINE" in missing
    assert "split 'dev'" in no_split


def test_hh_rlhf_reads_with_its_thirteen_broken_rows_named() -> None:
    loaded = load_pairs(hh_source(bad_rows="skip"))
    assert loaded.report.num_rows == 2312
    assert len(loaded.records) == 2299
    assert dict(loaded.report.skipped) == {
        "the chosen answer is empty": (86, 516, 925, 1103),
        "the dialogue has two turns of one speaker in a row": (
            *(667, 763, 1254, 1319, 1688, 1849, 1950, 1952, 2036),
        ),
    }


def test_hh_rlhf_records_render_back_to_the_published_text() -> None:
    source = hh_source(bad_rows="skip")
    rows = list(load_rows(source))
    loaded = load_pairs(source)
    skipped = {number for numbers in loaded.report.skipped.values() for number in numbers}
    kept = [row for number, row in enumerate(rows) if number not in skipped]
    speaker = {"user": "Human", "assistant": "Assistant"}
    for row, pair in zip(kept, loaded.records, strict=True):
        assert not isinstance(pair.prompt, str)
        said = [f"\n\n{speaker[turn['role']]}: {turn['content']}" for turn in pair.prompt]
        for side in ("chosen", "rejected"):
            text = "".join(said) + "\n\nAssistant: " + getattr(pair, side)
            assert text.split() == row[side].split()  # but for white space around turns


def test_hh_rlhf_stops_at_its_first_broken_row_by_default() -> None:
    with pytest.raises(DataError, match=r"row 86 of .*: the chosen answer is empty"):
        load_pairs(hh_source())
