"""Preparing a job's data: every kind of rows, from the kitchen, from files and from streams."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from jobs.config import BPEConfig, JobConfig, KitchenData, ModelConfig, RowsData
from jobs.dataset import ROW_KINDS, Prepared, prepare, prepare_rows
from pilotfish.chat import render_prompt
from pilotfish.correction import TEMPLATES, CorrectionTemplate
from pilotfish.data.collate import (
    CorrectionExample,
    LengthLimits,
    PairExample,
    PromptExample,
    ScoredExample,
    TokenExample,
)
from pilotfish.errors import ConfigError
from pilotfish.train.objectives import OBJECTIVES

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
EXAMPLES = {
    "demonstrations": (TokenExample, "hh_rlhf"),
    "pairs": (PairExample, "hh_rlhf"),
    "corrections": (CorrectionExample, "aligner"),
    "scored": (ScoredExample, "trl_unpaired"),
    "prompts": (PromptExample, "ultrafeedback_binarized"),
}
KITCHEN = KitchenData(source="kitchen", num=12, num_heldout=5, limits=LengthLimits(max_length=256))
KITCHEN_MODEL = ModelConfig(init={"model_type": "llama"}, tokenizer="kitchen")
BYTES_MODEL = ModelConfig(init={"model_type": "llama"}, tokenizer=BPEConfig(vocab_size=300))
KITCHEN_TEMPLATE = CorrectionTemplate("<user> {question} <bot> {answer} <fix>")


def rows_data(name: str, **settings: Any) -> RowsData:
    return RowsData(path=str(SAMPLES / f"{name}.jsonl"), holdout=0.5, **settings)


def ids(prepared: Prepared) -> list[Any]:
    return [pickle.dumps(example) for example in prepared.train]


def test_every_objective_learns_from_a_kind_of_rows_that_can_be_prepared() -> None:
    assert {objective.rows for objective in OBJECTIVES.values()} <= set(ROW_KINDS)
    assert set(ROW_KINDS) == set(EXAMPLES)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_the_kitchen_draws_every_kind_of_rows(kind: str) -> None:
    prepared, report = prepare_rows(kind, KITCHEN, KITCHEN_MODEL, template=KITCHEN_TEMPLATE)
    assert (len(prepared.train), len(prepared.heldout)) == (12, 5)
    assert {type(example) for example in prepared.train} == {EXAMPLES[kind][0]}
    assert report.num_dropped == report.num_cut_answers == 0
    again, _ = prepare_rows(
        kind, KITCHEN.model_copy(update={"seed": 2}), KITCHEN_MODEL, template=KITCHEN_TEMPLATE
    )
    assert ids(again) != ids(prepared)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_files_give_every_kind_of_rows_and_the_same_ones_as_a_stream(kind: str) -> None:
    example, name = EXAMPLES[kind]
    template = TEMPLATES["paper"]
    whole, _ = prepare_rows(kind, rows_data(name), BYTES_MODEL, template=template)
    assert {type(row) for row in [*whole.train, *whole.heldout]} == {example}
    streaming = rows_data(name, streaming=True, seed=5)  # the hash leaves both parts some rows
    streamed, report = prepare_rows(kind, streaming, BYTES_MODEL, template=template)
    assert not streamed.train
    assert streamed.stream is not None
    read = [row for _, row in streamed.stream.examples()]
    assert len(read) + len(streamed.heldout) == len(whole.train) + len(whole.heldout) == 4
    assert report.num_records == len(read)
    # Workers get the data through an object store, and read the stream themselves.
    sent: Prepared = pickle.loads(pickle.dumps(streamed))
    sizes = {"batch_size": len(read), "seed": 0}
    first = streamed.batches(**sizes).examples(0)
    assert sent.batches(**sizes).examples(0) == first
    assert sorted(map(pickle.dumps, first)) == sorted(map(pickle.dumps, read))


@pytest.mark.parametrize("kind", [kind for kind in ROW_KINDS if kind != "prompts"])
def test_examples_of_every_kind_make_a_batch(kind: str) -> None:
    prepared, _ = prepare_rows(kind, KITCHEN, KITCHEN_MODEL, template=KITCHEN_TEMPLATE)
    collate = ROW_KINDS[kind].collate
    assert collate is not None
    batches = prepared.batches(batch_size=4, seed=1, world_size=2, rank=1)
    batch = collate(batches.examples(0), 0)
    assert len(batch.token_ids_BT) == (4 if kind == "pairs" else 2)
    assert batch.loss_mask_BT.any(dim=1).all()


def test_held_out_rows_of_the_kitchen_are_scored_by_the_truth() -> None:
    prepared, _ = prepare_rows("scored", KITCHEN, KITCHEN_MODEL)
    for example in prepared.heldout:
        assert isinstance(example, ScoredExample)
        assert round(example.reward, 1) == example.reward
    assert any(
        round(e.reward, 1) != e.reward for e in prepared.train if isinstance(e, ScoredExample)
    )


def test_prompts_are_what_the_base_will_read() -> None:
    prepared, _ = prepare_rows("prompts", KITCHEN, KITCHEN_MODEL)
    for example in prepared.train:
        assert isinstance(example, PromptExample)
        assert example.token_ids == render_prompt(prepared.tokenizer, example.prompt)


def test_the_rows_of_an_aligner_come_in_its_template() -> None:
    config = JobConfig.model_validate(
        {
            "output": "${root}/x",
            "model": KITCHEN_MODEL.model_dump(),
            "objective": {"kind": "aligner", "template_text": KITCHEN_TEMPLATE.text},
            "data": KITCHEN.model_dump(),
            "train": {"steps": 1, "learning_rate": 1e-3},
        }
    )
    prepared, _ = prepare(config)
    expected, _ = prepare_rows("corrections", KITCHEN, KITCHEN_MODEL, template=KITCHEN_TEMPLATE)
    assert prepared.train == expected.train


def test_a_stream_wants_a_number_of_steps() -> None:
    config = JobConfig.model_validate(
        {
            "output": "${root}/x",
            "model": BYTES_MODEL.model_dump(),
            "objective": {"kind": "sft"},
            "data": {"path": str(SAMPLES / "hh_rlhf.jsonl"), "streaming": True, "holdout": 0.3},
            "train": {"epochs": 1, "learning_rate": 1e-3},
        }
    )
    with pytest.raises(ConfigError, match=r"the number of rows is unknown.*Give train.steps"):
        prepare(config)
