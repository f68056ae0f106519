"""Answers decoded and judged by actors, chunk by chunk."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from jobs.decoding_config import DecodingJobConfig
from jobs.evaluation_config import EvaluationConfig
from jobs.pool import Chunk, chunks_of, run_chunks, settle_in
from pilotfish import Pilot, SamplingParams
from pilotfish.chain import make_chain
from pilotfish.data.records import PromptText
from pilotfish.evaluation.report import Answer
from pilotfish.evaluation.rewards import Reward, build_reward
from pilotfish.evaluation.settings import Setting
from pilotfish.evaluation.summary import Decoded, to_answer
from pilotfish.guides import GUIDES, check_guide, make_card, vary_card
from pilotfish.guides.card import GuideCard
from pilotfish.models.vocab import fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The answers of a chunk, and what decoding them cost."""

    answers: Sequence[Answer]
    seconds: float
    num_forwards: int


class Decoder:
    """Holds the models; see `jobs.pool.Worker`."""

    def __init__(self, job: DecodingJobConfig, settings: Sequence[Setting]) -> None:
        """`settings` are the ways to decode; a chunk is labelled with the name of one."""
        self._job = job
        self._settings = {setting.name: setting for setting in settings}
        self._loaded: tuple[Pilot, Reward] | None = None

    def process(self, chunk: Chunk[PromptText]) -> Part:
        """Answer prompts; the seed of each is its place behind the seed of the job.

        Raises what loading the models raises, at the first chunk.
        """
        return self.answer(chunk, self._settings[chunk.label])

    def answer(self, chunk: Chunk[PromptText], setting: Setting) -> Part:
        """Answer prompts in a way that the decoder need not have been told of."""
        pilot, reward = self._load()
        guides = {
            pilot.vary(name, **setting.args.get(name, {})): weight
            for name, weight in setting.guides.items()
        }
        numbers = range(chunk.start, chunk.start + len(chunk.items))
        params = [self._params(setting, number) for number in numbers]
        num_before = pilot.num_forwards
        started = time.perf_counter()
        completions = pilot.generate(chunk.items, params, guides=guides)
        seconds = time.perf_counter() - started
        judged = reward.judge(chunk.items, [completion.text for completion in completions])
        return Part(
            answers=[to_answer(*both) for both in zip(completions, judged, strict=True)],
            seconds=seconds,
            num_forwards=pilot.num_forwards - num_before,
        )

    def _load(self) -> tuple[Pilot, Reward]:
        if self._loaded is None:
            job = self._job
            settle_in(job.decoding)
            pilot = Pilot(
                job.base,
                guides=job.guides,
                device=job.decoding.device,
                dtype=job.decoding.dtype,
                num_slots=job.decoding.batch_size,
            )
            self._loaded = pilot, build_reward(job.reward, device=job.decoding.device)
        return self._loaded

    def _params(self, setting: Setting, number: int) -> SamplingParams:
        return SamplingParams(
            temperature=setting.temperature,
            top_p=setting.top_p,
            top_k=setting.top_k,
            max_tokens=self._job.decoding.max_tokens,
            seed=self._job.seed + number,
            stop=self._job.decoding.stop,
        )


def read_cards(
    config: DecodingJobConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, GuideCard]:
    """Return the cards of the guides by name, without loading anything.

    A wrong guide should not cost a cluster's start. Raises what `check_guide` and
    `make_card` raise.
    """
    where = {"base": config.base, "base_vocab": fingerprint(tokenizer)}
    return {
        name: (
            check_guide(source, **where) if isinstance(source, str) else make_card(source, **where)
        )
        for name, source in config.guides.items()
    }


def check_setting(setting: Setting, cards: Mapping[str, GuideCard]) -> None:
    """Raise `ConfigError` for args, and `PromptError` for weights, that guides cannot honour."""
    for name, args in setting.args.items():
        vary_card(cards[name], args)
    make_chain(setting.guides, {name: GUIDES[card.kind] for name, card in cards.items()})


def decode_all(config: EvaluationConfig, prompts: Sequence[PromptText]) -> list[Decoded]:
    """Decode every setting on actors, with a progress bar.

    Raises what a decoder raises (`CheckpointError`, `PromptError`, `DataError`).
    """
    size = config.decoding.chunk_size
    chunks = [
        chunk
        for setting in config.settings
        for chunk in chunks_of(prompts, size, label=setting.name)
    ]
    told = (config, config.settings)
    parts: dict[str, list[tuple[int, Part]]] = {setting.name: [] for setting in config.settings}
    for chunk, part in run_chunks(Decoder, told, chunks, config.decoding, title="evaluating"):
        parts[chunk.label].append((chunk.start, part))
    return [_join(setting, parts[setting.name]) for setting in config.settings]


def _join(setting: Setting, parts: Sequence[tuple[int, Part]]) -> Decoded:
    ordered = [part for _, part in sorted(parts, key=lambda pair: pair[0])]
    return Decoded(
        setting=setting,
        answers=[answer for part in ordered for answer in part.answers],
        seconds=sum(part.seconds for part in ordered),
        num_forwards=sum(part.num_forwards for part in ordered),
    )
