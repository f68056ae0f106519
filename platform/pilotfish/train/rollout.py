"""Completions to learn from: the serving decode loop, asked to remember.

The law that is trained is the law that is served: exploration is nothing but sampling from it.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pilotfish.context import Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Request, SamplingParams, TokenEvent
from pilotfish.errors import ConfigError
from pilotfish.train.experience import Episode, ending
from pilotfish.train.recording import RecordingProxy


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion to collect."""

    prompt: Prompt
    seed: int


def rollout_seed(seed: int, *, iteration: int, prompt: int, sample: int) -> int:
    """Return the seed of one completion: of the run's seed and its place, and of nothing else.

    `prompt` counts over all workers, so a rollout does not depend on how they share the prompts.
    """
    packed = struct.pack("<4Q", seed, iteration, prompt, sample)
    digest = hashlib.blake2b(packed, digest_size=8, person=b"rollout")
    return int.from_bytes(digest.digest(), "little")


def collect(
    engine: Engine, asks: Sequence[Ask], params: SamplingParams, *, proxy: str | None = None
) -> list[Episode]:
    """Decode everything asked for and return the episodes, in order.

    `proxy` names a `RecordingProxy` among the engine's guides; without one the policy is the
    engine's LM itself. Nobody else may use the engine meanwhile. Raises `ConfigError` for
    parameters that reshape the law, and `PromptError` before anything is decoded.
    """
    _check(params)
    requests = [
        Request(
            key=key,
            prompt=ask.prompt,
            params=replace(params, seed=ask.seed),
            guides={} if proxy is None else {proxy: 1.0},
        )
        for key, ask in enumerate(asks)
    ]
    for request in requests:
        engine.check(request)
    for request in requests:
        engine.submit(request)
    events: list[list[TokenEvent]] = [[] for _ in requests]
    while engine.busy:
        for event in engine.step():
            events[event.key].append(event)
    drawn = zip(requests, events, strict=True)
    if proxy is None:
        return [_lm_episode(request, own) for request, own in drawn]
    recorder = engine.guides[proxy]
    assert isinstance(recorder, RecordingProxy), "an engine that learns records"
    return [recorder.episode(request, own) for request, own in drawn]


def _check(params: SamplingParams) -> None:
    if params.reshapes:
        raise ConfigError(
            f"rollouts sample from the policy itself, but got {params}: PPO would compare "
            "log-probs of another law. Leave temperature, top_k, top_p, min_p, min_tokens and "
            "logit_bias at their defaults; a proxy has a temperature of its own in its settings."
        )


def _lm_episode(request: Request, events: Sequence[TokenEvent]) -> Episode:
    logprobs_N = np.array([event.logprob for event in events], dtype=np.float32)
    return Episode(
        prompt_ids=np.array(request.prompt.token_ids, dtype=np.int32),
        completion_ids=np.array([event.token_id for event in events], dtype=np.int32),
        finish_reason=ending(events),
        positions_N=np.arange(len(events), dtype=np.int32),
        logprobs_N=logprobs_N,
        base_logprobs_N=logprobs_N,
    )
