"""Rows to token ids: prepared once per job, shared with every worker through Ray's object store."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs.config import BPEConfig, JobConfig, KitchenData, ModelConfig, RowsData
from pilotfish import world
from pilotfish.chat import Message
from pilotfish.data.bpe import train_byte_bpe
from pilotfish.data.collate import TokenExample
from pilotfish.data.formats import Columns, to_demonstration, to_pair
from pilotfish.data.loading import Part, load_demonstrations, load_pairs
from pilotfish.data.records import Demonstration, PreferencePair, PromptText
from pilotfish.data.tokenized import LengthReport, tokenize_demonstrations, tokenize_pairs
from pilotfish.errors import CheckpointError
from pilotfish.train.objectives import OBJECTIVES


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the workers of a job share."""

    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Any]
    """Examples of the objective's kind; prompts, where it learns from reward."""
    heldout: Sequence[Any]
    warmup: Sequence[TokenExample] = ()
    """Rows of the first steps, where those differ."""
    warmup_share: float = 0.0
    """Of the steps."""


def prepare(config: JobConfig) -> tuple[Prepared, LengthReport]:
    """Read the rows, make or load the tokenizer, and tokenise. Raises `DataError`."""
    if config.learns_from_reward:
        return _prepare_prompts(config)
    pairs = OBJECTIVES[config.objective.kind].rows == "pairs"
    return _prepare_pairs(config) if pairs else _prepare_demonstrations(config)


def _prepare_prompts(config: JobConfig) -> tuple[Prepared, LengthReport]:
    data = config.data
    assert isinstance(data, KitchenData)
    train, heldout = (
        [tuple(scene.messages) for scene in world.scenes(num, seed)]
        for num, seed in ((data.num, data.seed), (data.num_heldout, data.heldout_seed))
    )
    tokenizer = AutoTokenizer.from_pretrained(config.frozen_base.path)
    report = LengthReport(
        num_records=len(train),
        num_dropped=0,
        num_cut_prompts=0,
        num_cut_answers=0,
        max_tokens=0,
        mean_tokens=0.0,
        mean_answer_tokens={},
    )
    return Prepared(tokenizer=tokenizer, train=train, heldout=heldout), report


def _prepare_pairs(config: JobConfig) -> tuple[Prepared, LengthReport]:
    train, heldout = _pairs(config.data, "train"), _pairs(config.data, "heldout")
    texts = (text for pair in train for text in _texts(pair.prompt, pair.chosen, pair.rejected))
    tokenizer = _tokenizer(config.started, texts)
    limits = config.data.limits
    examples, report = tokenize_pairs(tokenizer, train, limits=limits)
    held, _ = tokenize_pairs(tokenizer, heldout, limits=limits)
    return Prepared(tokenizer=tokenizer, train=examples, heldout=held), report


def _prepare_demonstrations(config: JobConfig) -> tuple[Prepared, LengthReport]:
    train = _demonstrations(config.data, "train")
    heldout = _demonstrations(config.data, "heldout")
    texts = (text for row in train for text in _texts(row.prompt, row.completion))
    tokenizer = _tokenizer(config.started, texts)
    limits = config.data.limits
    examples, report = tokenize_demonstrations(tokenizer, train, limits=limits)
    held, _ = tokenize_demonstrations(tokenizer, heldout, limits=limits)
    return Prepared(tokenizer=tokenizer, train=examples, heldout=held), report


def _pairs(data: KitchenData | RowsData, part: Part) -> list[PreferencePair]:
    if isinstance(data, RowsData):
        return load_pairs(data, part=part).records
    train = part == "train"
    rows = world.preference_pairs(
        data.num if train else data.num_heldout,
        data.seed if train else data.heldout_seed,
        objective=data.objective,
        noise=data.noise if train else data.heldout_noise,
    )
    return [to_pair(row, Columns()) for row in rows]


def _demonstrations(data: KitchenData | RowsData, part: Part) -> list[Demonstration]:
    if isinstance(data, RowsData):
        return load_demonstrations(data, part=part).records
    train = part == "train"
    rows = world.corpus(
        data.num if train else data.num_heldout, data.seed if train else data.heldout_seed
    )
    return [to_demonstration(row, Columns()) for row in rows]


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


def _texts(prompt: PromptText, *answers: str) -> Iterator[str]:
    """Yield the turns as HH-RLHF writes them, which is how the BPE's chat template does."""
    turns = [prompt] if isinstance(prompt, str) else [_turn(message) for message in prompt]
    yield from turns
    yield from (f"\n\nAssistant: {answer}" for answer in answers)


def _turn(message: Message) -> str:
    speaker = "Assistant" if message["role"] == "assistant" else "Human"
    return f"\n\n{speaker}: {message['content']}"
