"""Answers for an evaluation, decoded and judged by actors, chunk by chunk.

A chunk is always decoded alone and from the seeds of its prompts, so what comes of it depends
neither on the number of actors nor on which of them takes it.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from ray.util import ActorPool
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from jobs.evaluation_config import EvaluationConfig
from pilotfish import Pilot, SamplingParams
from pilotfish.data.records import PromptText
from pilotfish.errors import PilotfishError
from pilotfish.evaluation.report import Answer
from pilotfish.evaluation.rewards import Reward, build_reward
from pilotfish.evaluation.settings import Setting
from pilotfish.evaluation.summary import Decoded, to_answer

# Where every refresh is a new line (a log file, `ray job submit`), few lines are enough.
_SECONDS_PER_LINE = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Neighbouring prompts under one setting."""

    place: int
    """Of the setting among all settings."""
    start: int
    """Of the first prompt among all prompts."""
    prompts: Sequence[PromptText]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The answers of a chunk, and what decoding them cost."""

    chunk: Chunk
    answers: Sequence[Answer]
    seconds: float
    num_forwards: int


class Decoder:
    """Holds the models; a plain class, so that it can be used without a cluster."""

    def __init__(self, config: EvaluationConfig) -> None:
        self._config = config
        self._loaded: tuple[Pilot, Reward] | None = None

    def decode(self, chunk: Chunk) -> Part:
        """Answer a chunk. Raises what loading the models raises, at the first one."""
        pilot, reward = self._load()
        setting = self._config.settings[chunk.place]
        numbers = range(chunk.start, chunk.start + len(chunk.prompts))
        params = [self._params(setting, number) for number in numbers]
        num_before = pilot.num_forwards
        started = time.perf_counter()
        completions = pilot.generate(chunk.prompts, params, guides=setting.guides)
        seconds = time.perf_counter() - started
        judged = reward.judge(chunk.prompts, [completion.text for completion in completions])
        return Part(
            chunk=chunk,
            answers=[to_answer(*both) for both in zip(completions, judged, strict=True)],
            seconds=seconds,
            num_forwards=pilot.num_forwards - num_before,
        )

    def _load(self) -> tuple[Pilot, Reward]:
        if self._loaded is None:
            config = self._config
            torch.set_num_threads(config.decoding.threads)
            transformers_logging.disable_progress_bar()  # one per file, in the driver's terminal
            device = "auto" if config.decoding.gpus_per_actor else "cpu"
            pilot = Pilot(
                config.base,
                guides=config.guides,
                device=device,
                dtype=config.decoding.dtype,
                num_slots=config.decoding.batch_size,
            )
            self._loaded = pilot, build_reward(config.reward, device=device)
        return self._loaded

    def _params(self, setting: Setting, number: int) -> SamplingParams:
        return SamplingParams(
            temperature=setting.temperature,
            top_p=setting.top_p,
            top_k=setting.top_k,
            max_tokens=self._config.decoding.max_tokens,
            seed=self._config.seed + number,
            stop=self._config.decoding.stop,
        )


def decode_all(
    config: EvaluationConfig, prompts: Sequence[PromptText], *, quiet: bool = False
) -> list[Decoded]:
    """Decode every setting on actors, with a progress bar unless `quiet`; Ray must be connected.

    Raises what a decoder raises (`CheckpointError`, `PromptError`, `DataError`).
    """
    parts: list[list[Part]] = [[] for _ in config.settings]
    for part in _run(config, _chunks(config, prompts), quiet=quiet):
        parts[part.chunk.place].append(part)
    return [_join(setting, found) for setting, found in zip(config.settings, parts, strict=True)]


def _chunks(config: EvaluationConfig, prompts: Sequence[PromptText]) -> list[Chunk]:
    size = config.decoding.chunk_size
    return [
        Chunk(place=place, start=start, prompts=prompts[start : start + size])
        for place in range(len(config.settings))
        for start in range(0, len(prompts), size)
    ]


def _run(config: EvaluationConfig, chunks: Sequence[Chunk], *, quiet: bool) -> Iterator[Part]:
    decoding = config.decoding
    remote: Any = ray.remote(
        num_cpus=decoding.threads,
        num_gpus=decoding.gpus_per_actor,
        # Decoding again gives the same answers, so a lost node costs time alone.
        max_restarts=2,
        max_task_retries=2,
    )(Decoder)
    actors = [remote.remote(config) for _ in range(min(decoding.num_actors, len(chunks)))]
    interval = 0.1 if sys.stderr.isatty() else _SECONDS_PER_LINE
    total = sum(len(chunk.prompts) for chunk in chunks)
    results: Any = ActorPool(actors).map_unordered(
        lambda actor, chunk: actor.decode.remote(chunk), list(chunks)
    )
    try:
        with tqdm(
            desc="evaluating",
            total=total,
            unit="answer",
            mininterval=interval,
            dynamic_ncols=True,
            disable=quiet,
        ) as bar:
            for part in results:
                bar.set_postfix_str(config.settings[part.chunk.place].name, refresh=False)
                bar.update(len(part.answers))
                yield part
    except RayTaskError as error:
        if isinstance(error.cause, PilotfishError):
            raise error.cause from None
        raise
    finally:
        for actor in actors:
            ray.kill(actor)


def _join(setting: Setting, parts: Sequence[Part]) -> Decoded:
    ordered = sorted(parts, key=lambda part: part.chunk.start)
    return Decoded(
        setting=setting,
        answers=[answer for part in ordered for answer in part.answers],
        seconds=sum(part.seconds for part in ordered),
        num_forwards=sum(part.num_forwards for part in ordered),
    )
