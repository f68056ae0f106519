"""Rows to token ids: prepared once per job, shared with every worker through Ray's object store."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs.config import BPEConfig, JobConfig, KitchenData, ModelConfig, RowsData
from pilotfish import world
from pilotfish.chat import Message
from pilotfish.correction import CorrectionTemplate
from pilotfish.data.batching import Batches, StoredBatches
from pilotfish.data.bpe import train_byte_bpe
from pilotfish.data.collate import (
    Example,
    LMBatch,
    PreferenceBatch,
    collate_corrections,
    collate_demonstrations,
    collate_pairs,
    collate_scored,
)
from pilotfish.data.formats import (
    Columns,
    Reader,
    Row,
    to_correction,
    to_demonstration,
    to_pair,
    to_prompt,
    to_scored,
)
from pilotfish.data.loading import Part, load_records, stream_records
from pilotfish.data.records import (
    Correction,
    Demonstration,
    PreferencePair,
    PromptText,
    Record,
    ScoredAnswer,
)
from pilotfish.data.streaming import ExampleStream, StreamedBatches
from pilotfish.data.tokenized import LengthReport, Rendering, tokenize_all
from pilotfish.errors import CheckpointError, ConfigError
from pilotfish.train.objectives import OBJECTIVES, AlignerConfig

_REPORTED_OF_STREAM = 1024


@dataclass(frozen=True, slots=True)
class RowKind:
    """One kind of rows: how one is read, how the kitchen draws them, and how they are padded."""

    read: Reader[Any]
    draw: Callable[[KitchenData], Sequence[Row]]
    collate: Callable[[Any, int], LMBatch | PreferenceBatch] | None
    """(examples, padding id) -> batch; None where the rows have to be answered first."""


def _draw_corpus(kitchen: KitchenData) -> Sequence[Row]:
    return world.corpus(kitchen.num, kitchen.seed)


def _draw_pairs(kitchen: KitchenData) -> Sequence[Row]:
    objective, noise = kitchen.objective, kitchen.noise
    return world.preference_pairs(kitchen.num, kitchen.seed, objective=objective, noise=noise)


def _draw_corrections(kitchen: KitchenData) -> Sequence[Row]:
    return world.corrections(kitchen.num, kitchen.seed)


def _draw_scored(kitchen: KitchenData) -> Sequence[Row]:
    objective, noise = kitchen.objective, kitchen.noise
    return world.scored(kitchen.num, kitchen.seed, objective=objective, noise=noise)


def _draw_prompts(kitchen: KitchenData) -> Sequence[Row]:
    return [{"prompt": scene.messages} for scene in world.scenes(kitchen.num, kitchen.seed)]


ROW_KINDS: Mapping[str, RowKind] = {
    "demonstrations": RowKind(to_demonstration, _draw_corpus, collate_demonstrations),
    "pairs": RowKind(to_pair, _draw_pairs, collate_pairs),
    "corrections": RowKind(to_correction, _draw_corrections, collate_corrections),
    "scored": RowKind(to_scored, _draw_scored, collate_scored),
    "prompts": RowKind(to_prompt, _draw_prompts, None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the workers of a job share."""

    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Example]
    """Empty where the training rows are streamed."""
    heldout: Sequence[Example]
    stream: ExampleStream[Any] | None = None

    def batches(
        self, *, batch_size: int, seed: int, world_size: int = 1, rank: int = 0
    ) -> Batches[Any]:
        """Return one worker's batches; `batch_size` is the global one."""
        if self.stream is None:
            return StoredBatches(
                self.train, batch_size=batch_size, seed=seed, world_size=world_size, rank=rank
            )
        return StreamedBatches(
            self.stream, batch_size=batch_size, seed=seed, world_size=world_size, rank=rank
        )


def prepare(config: JobConfig) -> tuple[Prepared, LengthReport]:
    """Prepare the rows that the objective learns from; see `prepare_rows`.

    Raises `ConfigError` for a stream without a number of steps.
    """
    data = config.data
    if isinstance(data, RowsData) and data.streaming and config.train.steps is None:
        raise ConfigError(
            "data.streaming is true, so the number of rows is unknown, and train.epochs does not "
            "say how many steps to take. Give train.steps."
        )
    if config.learns_from_reward:
        base = config.frozen_base.path
        assert base is not None, "the validator saw it"
        return prepare_rows("prompts", data, config.model or ModelConfig(init=base))
    kind = OBJECTIVES[config.objective.kind].rows
    template = None
    if isinstance(config.objective, AlignerConfig):
        template = config.objective.correction
    return prepare_rows(kind, data, config.started, template=template)


def prepare_rows(
    kind: str,
    data: KitchenData | RowsData,
    model: ModelConfig,
    *,
    template: CorrectionTemplate | None = None,
) -> tuple[Prepared, LengthReport]:
    """Read rows of one of `ROW_KINDS`, make or load the tokenizer, and tokenise.

    Corrections need a template. Of a stream, the held-out rows are kept and the report is about
    its first training rows. Raises `DataError`.
    """
    rows = ROW_KINDS[kind]
    if isinstance(data, RowsData) and data.streaming:
        return _prepare_stream(rows, data, model, template)
    train = _records(rows, data, "train")
    render = Rendering(_tokenizer(model, _texts(train)), data.limits, template)
    examples, report = tokenize_all(train, render)
    heldout, _ = tokenize_all(_records(rows, data, "heldout"), render)
    return Prepared(tokenizer=render.tokenizer, train=examples, heldout=heldout), report


def _prepare_stream(
    rows: RowKind, data: RowsData, model: ModelConfig, template: CorrectionTemplate | None
) -> tuple[Prepared, LengthReport]:
    def train() -> Iterator[Record]:
        return (record for _, record in stream_records(data, rows.read))

    render = Rendering(_tokenizer(model, _texts(train())), data.limits, template)
    _, report = tokenize_all(islice(train(), _REPORTED_OF_STREAM), render)
    heldout, _ = tokenize_all(_records(rows, data, "heldout"), render)
    stream = ExampleStream(data, rows.read, render)
    return Prepared(tokenizer=render.tokenizer, train=(), heldout=heldout, stream=stream), report


def _records(rows: RowKind, data: KitchenData | RowsData, part: Part) -> list[Record]:
    if isinstance(data, RowsData):
        return load_records(data, rows.read, part=part).records
    if part == "heldout":
        data = data.model_copy(
            update={
                "num": data.num_heldout,
                "seed": data.heldout_seed,
                "noise": data.heldout_noise,
            }
        )
    return [rows.read(row, Columns(), None) for row in rows.draw(data)]


def _tokenizer(model: ModelConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    if isinstance(model.tokenizer, BPEConfig):
        return train_byte_bpe(texts, model.tokenizer.vocab_size)
    if model.tokenizer == "kitchen":
        return world.build_tokenizer()
    name = model.init if model.tokenizer is None else model.tokenizer
    assert isinstance(name, str), "an architecture comes with a tokenizer"
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer can be loaded from {name!r}: {error}. Give a model folder, a hub id, or "
            "model.tokenizer."
        ) from error


def _texts(records: Iterable[Record]) -> Iterator[str]:
    """Yield the turns as HH-RLHF writes them, which is how the BPE's chat template does."""
    for record in records:
        prompt, *answers = _parts(record)
        turns = [prompt] if isinstance(prompt, str) else [_turn(message) for message in prompt]
        yield from turns
        yield from (f"\n\nAssistant: {answer}" for answer in answers)


def _parts(record: Record) -> tuple[PromptText, *tuple[str, ...]]:
    """Return the prompt and the answers to it."""
    match record:
        case PreferencePair():
            return record.prompt, record.chosen, record.rejected
        case Correction():
            return record.prompt, record.answer, record.correction
        case Demonstration() | ScoredAnswer():
            return record.prompt, record.completion
        case _:
            return (record,)


def _turn(message: Message) -> str:
    speaker = "Assistant" if message["role"] == "assistant" else "Human"
    return f"\n\n{speaker}: {message['content']}"
