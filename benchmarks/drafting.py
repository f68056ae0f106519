"""Drafted beside undrafted decoding, on a trained base and a trained guide.

    python -m benchmarks.drafting --base runs/kitchen/base_m --guide runs/kitchen/genarm_xs

The guide drafts and steers. Both loops answer the same questions with the same seeds, taking turns
within each round; the speed-up is the median ratio of seconds per token. Trained models matter:
random ones agree on nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.machine import describe
from pilotfish import world
from pilotfish.chat import render_prompt, stop_ids
from pilotfish.context import Prompt
from pilotfish.decode.engine import DraftStats, Engine
from pilotfish.decode.sequence import Drafting, Request, SamplingParams
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, load_tokenizer


@dataclass(frozen=True)
class Row:
    """One batch size."""

    batch: int
    plain_tokens_per_second: float
    drafted_tokens_per_second: float
    speed_up: float
    acceptance_length: float
    """Tokens per round of a sequence."""
    drafts_per_round: float


def seconds_per_token(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    weight: float,
    draft: Drafting | None,
) -> float:
    """Answer all prompts at once and time it."""
    for key, prompt in enumerate(prompts):
        engine.submit(
            Request(
                key=key,
                prompt=Prompt(prompt),
                params=params,
                guides={"guide": weight},
                draft=draft,
            )
        )
    start, num_tokens = time.perf_counter(), 0
    while engine.busy:
        num_tokens += len(engine.step())
    return (time.perf_counter() - start) / num_tokens


def measure(batch: int, options: argparse.Namespace) -> Row:
    """Measure one batch size: `rounds` lots of fresh questions."""
    tokenizer = load_tokenizer(options.base)
    base = load_frozen(options.base)
    guide = CausalLM(load_frozen(options.guide), num_slots=batch)
    engine = Engine(
        CausalLM(base, num_slots=batch),
        {"guide": GenARMGuide(guide)},
        drafters={"guide": guide},
        end_ids=stop_ids(tokenizer, base.generation_config),
    )
    draft = Drafting(guide="guide", num_tokens=options.num_tokens)
    scenes = world.scenes((options.rounds + 1) * batch * options.lots, seed=9)
    prompts = [render_prompt(tokenizer, scene.messages) for scene in scenes]
    plain, drafted = [], []
    for at in range(options.rounds + 1):
        params = SamplingParams(max_tokens=80, seed=at, temperature=options.temperature)
        own = prompts[at * batch * options.lots : (at + 1) * batch * options.lots]
        plain.append(seconds_per_token(engine, own, params, options.weight, None))
        if at == 1:
            engine.draft_stats = DraftStats()  # what came before was warming up
        drafted.append(seconds_per_token(engine, own, params, options.weight, draft))
    stats = engine.draft_stats
    return Row(
        batch=batch,
        plain_tokens_per_second=1 / statistics.median(plain[1:]),
        drafted_tokens_per_second=1 / statistics.median(drafted[1:]),
        speed_up=statistics.median(
            one / other for one, other in zip(plain[1:], drafted[1:], strict=True)
        ),
        acceptance_length=stats.acceptance_length,
        drafts_per_round=stats.num_drafted / stats.num_rounds,
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the base")
    parser.add_argument("--guide", required=True, help="folder of a GenARM guide")
    parser.add_argument("--json", action="store_true", help="print one JSON object on a line")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-tokens", type=int, default=4)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--lots", type=int, default=4, help="questions per slot and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    report = {
        **describe(options.threads),
        "rows": [asdict(measure(batch, options)) for batch in options.batches],
    }
    sys.stdout.write(json.dumps(report, indent=None if options.json else 2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
