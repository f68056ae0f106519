"""Streams: the rows of a set without holding it, in batches that restart where they stopped."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.config import parse
from pilotfish.data.batching import Batches
from pilotfish.data.collate import LengthLimits, TokenExample
from pilotfish.data.formats import to_demonstration, to_pair
from pilotfish.data.loading import load_demonstrations, load_pairs
from pilotfish.data.records import Demonstration
from pilotfish.data.sources import DataSource
from pilotfish.data.streaming import ExampleStream, StreamedBatches
from pilotfish.data.tokenized import Rendering
from pilotfish.errors import ConfigError, DataError
from tests.chat_tokenizers import hh_tokenizer
from tests.real_data import hh_source


class Render:
    """Tokenises "row n of length k" into k times n, and remembers which rows it was asked for.

    Rows of length 0 are dropped.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, record: Demonstration) -> TokenExample | None:
        row, length = map(int, record.completion.split())
        self.asked.append(row)
        return TokenExample([row] * length, num_prompt_tokens=0) if length else None


def write_rows(path: Path, num: int, *, dropped: int = 0, bad: int = 0) -> str:
    """Write rows of random length; each `dropped`-th has length 0, each `bad`-th cannot be read."""
    rng = np.random.default_rng(num)
    rows = []
    for row in range(num):
        length = 0 if dropped and row % dropped == 1 else int(rng.integers(1, 60))
        answer = "" if bad and row % bad == 2 else f"{row} {length}"
        rows.append({"prompt": f"q{row}", "completion": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def batches(
    path: str, render: Render | None = None, *, buffer: int | None = 12, **share: int
) -> StreamedBatches[TokenExample]:
    source = DataSource(path=path, streaming=True, shuffle_buffer=buffer, bad_rows="skip")
    stream = ExampleStream(source, to_demonstration, render or Render())
    return StreamedBatches(stream, **{"batch_size": 4, "seed": 3, **share})


def rows_of(given: Batches[TokenExample], step: int) -> list[int]:
    return [example.token_ids[0] for example in given.examples(step)]


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """50 rows, of which some are dropped and some cannot be read: 38 examples, 9 batches."""
    path = tmp_path_factory.mktemp("rows") / "fifty.jsonl"
    return write_rows(path, 50, dropped=7, bad=9)


def test_an_epoch_gives_every_example_once_but_for_the_ragged_remainder(fifty: str) -> None:
    usable = {row for row in range(50) if row % 7 != 1 and row % 9 != 2}
    assert len(usable) == 38
    stream = batches(fifty)
    for epoch in range(3):
        seen = [row for step in range(9 * epoch, 9 * epoch + 9) for row in rows_of(stream, step)]
        assert len(seen) == len(set(seen)) == 36
        assert set(seen) <= usable


def test_a_batch_depends_on_the_step_alone_not_on_the_calls_before(fifty: str) -> None:
    in_order = batches(fifty)
    expected = {step: rows_of(in_order, step) for step in range(30)}
    other = batches(fifty)
    for step in (29, 3, 4, 17, 0, 28):
        assert rows_of(other, step) == expected[step]


@settings(deadline=None, max_examples=40)
@given(stop=st.integers(0, 40), more=st.integers(0, 12), world=st.sampled_from([1, 2, 4]))
def test_a_run_goes_on_from_a_saved_position_at_any_world_size(
    fifty: str, stop: int, more: int, world: int
) -> None:
    whole = batches(fifty)
    for step in range(stop):
        whole.examples(step)
    state = json.loads(json.dumps(whole.state()))
    shares = [batches(fifty, world_size=world, rank=rank) for rank in range(world)]
    for share in shares:
        share.resume(state)
    gathered = [rows_of(share, stop + more) for share in shares]
    assert {len(rows) for rows in gathered} == {4 // world}
    assert Counter(row for rows in gathered for row in rows) == Counter(rows_of(whole, stop + more))


def test_rows_before_a_position_are_not_tokenised_again(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 100)
    before, after = Render(), Render()
    stream = batches(path, before)
    for step in range(20):
        stream.examples(step)
    resumed = batches(path, after)
    resumed.resume(stream.state())
    assert rows_of(resumed, 20) == rows_of(stream, 20)
    assert stream.state() == {"buffer": 6, "step": 18, "epoch": 0, "row": 72}
    assert after.asked == list(range(72, 84))


def test_no_more_than_a_buffer_is_read_ahead(tmp_path: Path) -> None:
    render = Render()
    stream = batches(write_rows(tmp_path / "a.jsonl", 100), render)
    for step in range(12):
        stream.examples(step)
        assert len(render.asked) == 12 * (step // 3 + 1)


def test_rows_are_shuffled_anew_in_every_epoch_and_for_every_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 64)
    one, other = batches(path, buffer=None), batches(path, buffer=None, seed=4)
    epochs = [[rows_of(one, 16 * epoch + step) for step in range(16)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [rows_of(other, step) for step in range(16)]
    flat = [row for batch in epochs[0] for row in batch]
    assert sorted(flat) == list(range(64))
    assert abs(np.corrcoef(flat, np.arange(64))[0, 1]) < 0.4


def test_rows_of_a_batch_have_similar_lengths(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 512)

    def padding(buffer: int) -> int:
        stream = batches(path, buffer=buffer)
        lengths = [[len(e) for e in stream.examples(step)] for step in range(128)]
        return sum(4 * max(batch) - sum(batch) for batch in lengths)

    assert padding(256) < 0.25 * padding(4)


def test_a_set_smaller_than_a_batch_and_a_buffer_smaller_than_one_are_refused(
    tmp_path: Path,
) -> None:
    path = write_rows(tmp_path / "a.jsonl", 5)
    with pytest.raises(DataError, match="gives 5 examples, fewer than one batch of 8"):
        batches(path, batch_size=8).examples(0)
    with pytest.raises(ConfigError, match="shuffle_buffer is 12, less than one batch of 16"):
        batches(path, batch_size=16)
    with pytest.raises(ConfigError, match="4 cannot be shared by 3 workers"):
        batches(path, world_size=3)


def test_a_row_that_cannot_be_tokenised_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 9)
    tokenizer = hh_tokenizer()
    text = Path(path).read_text().replace('"q4", "completion": "', '"q4", "completion": "<eos>')
    Path(path).write_text(text)
    source = DataSource(path=path, streaming=True)
    render: Any = Rendering(tokenizer, LengthLimits())
    stream = ExampleStream(source, to_demonstration, render)
    with pytest.raises(DataError, match=r"row 4 of .*contains the end token"):
        StreamedBatches(stream, batch_size=4, seed=0).examples(0)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"holdout": 10, "streaming": True}, "cannot be drawn from a stream.*Give a share"),
        ({"limit": 10, "streaming": True}, "limit cannot be drawn from a stream"),
        ({"shuffle_buffer": 10}, "shuffle_buffer is for streaming=true"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(DataSource, {"path": "a.jsonl", **wrong}, source="data")


def test_a_list_in_one_file_cannot_be_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[]")
    with pytest.raises(DataError, match=r"one list, which cannot be streamed.*\.jsonl"):
        load_pairs(DataSource(path=str(path), streaming=True))


def test_held_out_rows_are_never_trained_on_and_none_is_lost(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 400)
    source = DataSource(path=path, streaming=True, holdout=0.2)
    heldout = {record.prompt for record in load_demonstrations(source, part="heldout").records}
    train = {record.prompt for record in load_demonstrations(source).records}
    assert not heldout & train
    assert len(heldout | train) == 400
    assert len(heldout) == pytest.approx(80, abs=25)
    render = Render()
    stream = StreamedBatches(ExampleStream(source, to_demonstration, render), batch_size=8, seed=0)
    stream.examples(0)
    assert {f"q{row}" for row in render.asked} == train


def test_the_held_out_rows_are_ranked_as_those_of_a_set_read_whole(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 200)

    def heldout(**settings: Any) -> set[object]:
        source = DataSource(path=path, seed=5, **settings)
        return {record.prompt for record in load_demonstrations(source, part="heldout").records}

    streamed = heldout(streaming=True, holdout=0.3)
    assert streamed == heldout(holdout=len(streamed))


def test_parquet_streams_like_lines(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    lines = write_rows(tmp_path / "a.jsonl", 60)
    rows = [json.loads(line) for line in Path(lines).read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    one, other = batches(lines), batches(str(tmp_path / "a.parquet"))
    assert [rows_of(one, step) for step in range(20)] == [
        rows_of(other, step) for step in range(20)
    ]


def test_a_hub_set_is_streamed_by_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    file = write_rows(tmp_path / "a.jsonl", 30)
    load = datasets.load_dataset

    def fetch(path: str, *, streaming: bool, split: str, **_: Any) -> Any:
        assert (path, streaming) == ("acme/rows", True)
        return load("json", data_files=file, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    local, hub = batches(file), batches("acme/rows")
    assert [rows_of(hub, step) for step in range(9)] == [rows_of(local, step) for step in range(9)]


def test_hh_rlhf_gives_the_same_pairs_streamed_or_not() -> None:
    whole = load_pairs(hh_source(bad_rows="skip")).records
    source = hh_source(bad_rows="skip", streaming=True, shuffle_buffer=256)
    assert load_pairs(source).records == whole

    seen: list[object] = []

    def number(pair: object) -> TokenExample:
        seen.append(pair)
        return TokenExample([len(seen) - 1], num_prompt_tokens=0)

    stream = StreamedBatches(ExampleStream(source, to_pair, number), batch_size=16, seed=1)
    num_batches = len(whole) // 16
    drawn = [e.token_ids[0] for step in range(num_batches) for e in stream.examples(step)]
    assert len(set(drawn)) == len(drawn) == 16 * num_batches
    assert seen == whole
