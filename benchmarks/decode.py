"""Tokens per second of base-only and guided decoding beside Hugging Face `generate`.

    python -m benchmarks.decode [--json] [--batches 1 8 32] [--tokens 64]

Random weights, vocabulary 32,000, sampled at temperature 1. The three loops take turns within each
round of one run, so what disturbs one disturbs all; ratios are medians over rounds of rows that
stood side by side. Decoding speed is the time of a longer run minus that of a shorter one, over the
difference in tokens: prefill and set-up cancel.
"""

import argparse
import copy
import datetime
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pilotfish.context import Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Request, SamplingParams
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM

logger = logging.getLogger(__name__)
VOCAB, PROMPT_TOKENS, SHORT = 32_000, 32, 8


@dataclass(frozen=True)
class Row:
    """One measured setting: medians over rounds, and ratios between loops of the same round."""

    batch: int
    generate_tokens_per_second: float
    """Hugging Face, unguided."""
    base_tokens_per_second: float
    guided_tokens_per_second: float
    base_over_generate: float
    guided_over_base: float


def random_llama(*, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, seed: int):
    """An untied Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def generate_seconds(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """Time Hugging Face `generate`, sampling from the full vocabulary."""
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
    )
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return time.perf_counter() - start


def engine_seconds(
    engine: Engine, prompts: list[list[int]], tokens: int, guides: dict[str, float]
) -> float:
    """Time our loop on the same work."""
    params = SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True)
    start = time.perf_counter()
    for key, prompt in enumerate(prompts):
        engine.submit(Request(key=key, prompt=Prompt(prompt), params=params, guides=guides))
    while engine.busy:
        engine.step()
    return time.perf_counter() - start


def measure(batch: int, *, tokens: int, rounds: int, models: Sequence[LlamaForCausalLM]) -> Row:
    """Measure one batch size."""
    base, guide, plain = models
    base_lm = CausalLM(base, num_slots=batch)
    engine = Engine(base_lm, {"guide": GenARMGuide(CausalLM(guide, num_slots=batch))})
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(VOCAB, (batch, PROMPT_TOKENS), generator=generator).tolist()
    loops: dict[str, Callable[[int], float]] = {
        "generate": lambda n: generate_seconds(plain, prompts, n),
        "base": lambda n: engine_seconds(engine, prompts, n, {}),
        "guided": lambda n: engine_seconds(engine, prompts, n, {"guide": 1.0}),
    }
    for loop in loops.values():
        loop(SHORT)
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            seconds = loop(SHORT + tokens) - loop(SHORT)
            speeds[name].append(batch * tokens / seconds)
    ratios = [b / g for b, g in zip(speeds["base"], speeds["generate"], strict=True)]
    guided = [g / b for g, b in zip(speeds["guided"], speeds["base"], strict=True)]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return Row(
        batch,
        medians["generate"],
        medians["base"],
        medians["guided"],
        statistics.median(ratios),
        statistics.median(guided),
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="tokens per timed row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    base = random_llama(hidden=512, layers=9, heads=8, kv_heads=4, ffn=1536, seed=0)
    guide = random_llama(hidden=88, layers=4, heads=4, kv_heads=4, ffn=256, seed=1)
    # `generate` gets a copy of its own: our loop lays the weights of its models out anew.
    models = (base, guide, copy.deepcopy(base))
    rows = [
        measure(batch, tokens=options.tokens, rounds=options.rounds, models=models)
        for batch in options.batches
    ]
    report = {
        "hardware": f"{_cpu_name()}, {options.threads} threads",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": {
            "base": base.num_parameters(),
            "guide": guide.num_parameters(),
        },
        "rows": [asdict(row) for row in rows],
    }
    sys.stdout.write(json.dumps(report, indent=None if options.json else 2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
