"""Training speed: GenARM's loop beside TRL's DPO trainer, and where a proxy's step goes.

    python -m benchmarks.train --trl-python ~/trl/bin/python [--json] [--root runs]

Both loops train the same random model, in float32, on the same kitchen pairs in the same batches,
and take turns within each round of one run; ratios are medians over rounds that stood side by side.
TRL lives in an environment of its own; without its interpreter our numbers stand alone.

GenARM has no reference model, so it stands beside a DPO whose reference log-probs were computed
before the clock started; our own DPO stands beside one that asks the reference in every step. As
these two do the same work, their losses are the same number.

The proxy's loop is that of jobs/configs/kitchen/proxy.yaml with one worker, which decodes itself.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.machine import describe
from benchmarks.trainers import (
    BETA,
    ROOT,
    OurLoop,
    Size,
    Taken,
    TRLLoop,
    job,
    only_worker,
    save_random_model,
)
from jobs.config import JobConfig
from jobs.dataset import prepare
from jobs.reward_training import reward_training
from pilotfish import config as configs
from pilotfish.train.objectives import DPOConfig, GenARMConfig

logger = logging.getLogger(__name__)

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
SIZES = {
    "kitchen": Size(  # its base
        {
            **_LLAMA,
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 256,
        },
        pairs=32,
        steps=10,
    ),
    "larger": Size(  # arithmetic decides, and a vocabulary such as real models have
        {
            **_LLAMA,
            "vocab_size": 32_000,
            "hidden_size": 384,
            "num_hidden_layers": 9,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "intermediate_size": 1152,
        },
        pairs=8,
        steps=1,
    ),
}
PROXY_JOB = ROOT / "jobs" / "configs" / "kitchen" / "proxy.yaml"
OBJECTIVES = (GenARMConfig(beta_r=BETA), DPOConfig(beta=BETA))


@dataclass(frozen=True)
class Against:
    """TRL's loop beside ours. Ratios are of tokens per second, ours to its."""

    version: str
    tokens_per_second: float
    tokens_per_cpu_second: float
    ratio: float
    ratios: tuple[float, float]
    """The least and the greatest of all rounds."""
    cpu_ratio: float
    cpu_ratios: tuple[float, float]
    loss: float
    """Of the last round."""


@dataclass(frozen=True)
class Row:
    """One objective on one model: medians over rounds."""

    model: str
    parameters: int
    pairs: int
    objective: str
    tokens_per_second: float
    tokens_per_cpu_second: float
    loss: float
    """Of the last round."""
    trl: Against | None


def race(
    name: str, objective: GenARMConfig | DPOConfig, folder: Path, options: argparse.Namespace
) -> Row:
    """Measure one objective on one model."""
    size = SIZES[name]
    num_parameters = save_random_model(size, folder / "model")
    total_steps = (options.rounds + 1) * size.steps
    config = job(objective, size, model=folder / "model", total_steps=total_steps)
    prepared, _ = prepare(config)
    ours = OurLoop(config, prepared, steps=size.steps)
    trl = options.trl_python and TRLLoop(
        options.trl_python,
        config,
        prepared,
        folder=folder,
        steps=size.steps,
        threads=options.threads,
        precompute=objective.kind == "genarm",
    )
    loops = [ours, trl] if trl else [ours]
    rounds: list[dict[Any, Taken]] = []
    for at in range(options.rounds + 1):
        order = loops if at % 2 else loops[::-1]
        rounds.append({loop: loop.take() for loop in order})
        if len({taken.num_tokens for taken in rounds[-1].values()}) > 1:
            raise SystemExit(f"the loops did not read the same tokens: {rounds[-1]}")
        logger.info("%s, %s: %s", name, objective.kind, [rounds[-1][loop] for loop in loops])
    if trl:
        trl.close()
    measured = rounds[1:]  # the first warmed up
    own = [taken[ours] for taken in measured]
    return Row(
        model=name,
        parameters=num_parameters,
        pairs=size.pairs,
        objective=objective.kind,
        tokens_per_second=_speed(own),
        tokens_per_cpu_second=_cpu_speed(own),
        loss=own[-1].loss,
        trl=_against(trl.version, own, [taken[trl] for taken in measured]) if trl else None,
    )


def _against(version: str, ours: Sequence[Taken], others: Sequence[Taken]) -> Against:
    pairs = list(zip(ours, others, strict=True))
    ratios = [other.seconds / one.seconds for one, other in pairs]
    cpu_ratios = [other.cpu_seconds / one.cpu_seconds for one, other in pairs]
    return Against(
        version=version,
        tokens_per_second=_speed(others),
        tokens_per_cpu_second=_cpu_speed(others),
        ratio=statistics.median(ratios),
        ratios=(min(ratios), max(ratios)),
        cpu_ratio=statistics.median(cpu_ratios),
        cpu_ratios=(min(cpu_ratios), max(cpu_ratios)),
        loss=others[-1].loss,
    )


def _speed(rounds: Sequence[Taken]) -> float:
    return statistics.median(one.num_tokens / one.seconds for one in rounds)


def _cpu_speed(rounds: Sequence[Taken]) -> float:
    return statistics.median(one.num_tokens / one.cpu_seconds for one in rounds)


def proxy_loop(options: argparse.Namespace) -> dict[str, float]:
    """Return means over steps of a proxy's loop: seconds, where they go, and tokens per second."""
    settings = [
        f"root={options.root}",
        "scaling.num_workers=1",
        f"train.steps={options.proxy_steps + 1}",
    ]
    config = configs.load(JobConfig, PROXY_JOB, settings)
    prepared, _ = prepare(config)
    training = reward_training(config, prepared)
    training.step(0)  # warms up
    steps = range(1, options.proxy_steps + 1)
    started, cpu_started = time.perf_counter(), time.process_time()
    taken = [training.step(number) for number in steps]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    parts = {
        part: sum(tallies[f"{part}_seconds"].total for tallies in taken) / seconds
        for part in ("rollout", "reward", "update")
    }
    num_tokens = sum(tallies["length"].total for tallies in taken)
    return {
        "completions_per_step": taken[0]["length"].count,
        "tokens_per_step": num_tokens / len(steps),
        "seconds_per_step": seconds / len(steps),
        "cpu_seconds_per_step": cpu_seconds / len(steps),
        **{f"{part}_share": share for part, share in parts.items()},
        "tokens_per_second": num_tokens / seconds,
        "rollout_tokens_per_second": num_tokens / seconds / parts["rollout"],
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on a line")
    parser.add_argument(
        "--trl-python",
        default=os.environ.get("PILOTFISH_TRL_PYTHON"),
        help="interpreter that has TRL; default: PILOTFISH_TRL_PYTHON; without one TRL is left out",
    )
    parser.add_argument("--root", default="runs", help="holds kitchen/base, kitchen/reward_model")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--proxy-steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    needed = [Path(options.root, "kitchen", name) for name in ("base", "reward_model")]
    missing = [str(folder) for folder in needed if not folder.is_dir()]
    if not options.trl_python:
        logger.warning("TRL is left out: --trl-python names no interpreter")
    if missing:
        logger.warning("the proxy is left out: there is no %s", " and no ".join(missing))
    with only_worker(), tempfile.TemporaryDirectory() as folder:
        rows = [
            race(name, objective, Path(folder, name, objective.kind), options)
            for name in options.sizes
            for objective in OBJECTIVES
        ]
        proxy = None if missing else proxy_loop(options)
    report = {
        **describe(options.threads),
        "load_average": os.getloadavg()[2],  # of 15 minutes, this benchmark included
        "rows": [asdict(row) for row in rows],
        "proxy": proxy,
    }
    sys.stdout.write(json.dumps(report, indent=None if options.json else 2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
