"""Tokens per second of every decoding method beside Hugging Face `generate` without a guide.

    python -m benchmarks.decode [--json] [--batches 1 8 32] [--tokens 64] [--methods GenARM ...]

Random weights, vocabulary 32,000, sampled at temperature 1. All methods take turns within each
round of one run, so what disturbs one disturbs all; ratios are medians over rounds of numbers that
stood side by side. Decoding speed is the time of a longer run minus that of a shorter one, over the
difference in tokens: prefill and set-up cancel. The floor is the time to read every weight once per
step, at the bandwidth measured in the same run.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from benchmarks.machine import describe, read_bandwidth
from benchmarks.methods import BASE, GUIDE, VOCAB, Bench, Method, build, random_lm
from pilotfish.context import Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Request, SamplingParams

logger = logging.getLogger(__name__)
PROMPT_TOKENS, SHORT = 32, 8
GENERATE = "generate"


@dataclass(frozen=True)
class Row:
    """One method at one batch size: medians over rounds, ratios between loops of the same round."""

    method: str
    batch: int
    tokens_per_second: float
    over_generate: float
    """Hugging Face `generate` of the same base, unguided, at the same batch."""
    over_base: float
    """Our own loop without a guide."""
    base_forwards_per_token: float
    guide_forwards_per_token: float
    share_of_floor: float
    """Speed over that of a step which only reads each weight once."""


def generate_seconds(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """Time Hugging Face `generate`, sampling from the full vocabulary."""
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
    )
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return time.perf_counter() - start


def engine_seconds(engine: Engine, prompts: list[list[int]], tokens: int, method: Method) -> float:
    """Time our loop on the same work."""
    params = SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True)
    start = time.perf_counter()
    for key, prompt in enumerate(prompts):
        engine.submit(Request(key=key, prompt=Prompt(prompt), params=params, guides=method.guides))
    while engine.busy:
        engine.step()
    return time.perf_counter() - start


def count(bench: Bench, prompts: list[list[int]], method: Method) -> tuple[float, float]:
    """Return forwards per token of the base and of everything beside it."""
    helpers = bench.helpers
    before = bench.engine.base.num_forwards, sum(one.num_forwards for one in helpers)
    engine_seconds(bench.engine, prompts, SHORT, method)
    num_tokens = len(prompts) * SHORT
    base = bench.engine.base.num_forwards - before[0]
    beside = sum(one.num_forwards for one in helpers) - before[1]
    return base / num_tokens, beside / num_tokens


def measure(
    batch: int, base: LlamaForCausalLM, plain: LlamaForCausalLM, options: argparse.Namespace
) -> list[Row]:
    """Measure all methods at one batch size."""
    bench = build(base, GUIDE, batch=batch)
    methods = [one for one in bench.methods if not options.methods or one.name in options.methods]
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(VOCAB, (batch, PROMPT_TOKENS), generator=generator).tolist()
    loops: dict[str, Callable[[int], float]] = {
        GENERATE: lambda n: generate_seconds(plain, prompts, n)
    }
    for one in methods:
        loops[one.name] = lambda n, one=one: engine_seconds(bench.engine, prompts, n, one)
    forwards = {one.name: count(bench, prompts, one) for one in methods}  # warms up, too
    loops[GENERATE](SHORT)
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, loop in loops.items():
            seconds = loop(SHORT + options.tokens) - loop(SHORT)
            speeds[name].append(batch * options.tokens / seconds)
        logger.info("batch %d: %s", batch, {name: round(s[-1]) for name, s in speeds.items()})
    bandwidth = read_bandwidth()
    return [
        Row(
            method=one.name,
            batch=batch,
            tokens_per_second=statistics.median(speeds[one.name]),
            over_generate=_ratio(speeds[one.name], speeds[GENERATE]),
            over_base=_ratio(speeds[one.name], speeds[methods[0].name]),
            base_forwards_per_token=forwards[one.name][0],
            guide_forwards_per_token=forwards[one.name][1],
            share_of_floor=statistics.median(speeds[one.name]) / batch * one.bytes_read / bandwidth,
        )
        for one in methods
    ]


def _ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on a line")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="tokens per timed row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", help="names to measure, base among them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    if options.methods and "base" not in options.methods:
        parser.error("--methods must hold base: ratios are to it")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    base = random_lm(BASE, 0)
    # `generate` gets a copy of its own: our loop lays the weights of its models out anew.
    plain = copy.deepcopy(base)
    rows = [row for batch in options.batches for row in measure(batch, base, plain, options)]
    report = {
        **describe(options.threads),
        "parameters": {
            "base": base.num_parameters(),
            "guide": random_lm(GUIDE, 1).num_parameters(),
        },
        "read_bandwidth_gb_per_second": read_bandwidth() / 1e9,
        "rows": [asdict(row) for row in rows],
    }
    sys.stdout.write(json.dumps(report, indent=None if options.json else 2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
