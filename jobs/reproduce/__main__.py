"""Train, tune, measure, and write what came of four papers' claims as one page.

    python -m jobs.reproduce [--root runs] [--jobs 2] [--only CHAPTER ...] [--seeds 3]
                             [--prompts 500] [--study kitchen|hh-rlhf] [--dry-run]

What was trained or measured before from the same settings is not done again, so a run that was
killed goes on. Exit codes: 0 done, 1 a stage failed or a hard criterion does not hold (the page is
written anyhow), 2 what was asked cannot be honoured.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import ray

from jobs import cluster, reproduce_hh
from jobs.reproduce.chapter import Chapter, Evidence
from jobs.reproduce.chapters import CHAPTERS
from jobs.reproduce.measured import Results
from jobs.reproduce.page import Colophon, failed, write_page
from jobs.reproduce.plan import draw_plan
from jobs.reproduce.seeds import names_of
from jobs.reproduce.study import NUM_QUESTIONS, NUM_SEEDS, stages
from jobs.reproduce.trainings import MAX_SEEDS
from jobs.stages import Failed, Stage, run_stages
from jobs.tracking import git_state
from pilotfish.errors import ConfigError, PilotfishError

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "ray", "deepspeed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        root = cluster.check_root(args.root)
        todo = _stages(args)
        if args.dry_run:
            sys.stdout.write(draw_plan(todo, root) + "\n")
            return 0
        started = time.monotonic()
        cluster.connect(num_cpus=args.jobs, gpus=args.study == "hh-rlhf")
        if args.study == "hh-rlhf":
            _check_gpus()
        seconds = run_stages(
            todo, root, logs=root / "reproduce" / "logs", num_lanes=args.jobs, label="reproduce"
        )
        if args.study == "hh-rlhf":
            sys.stdout.write(f"The reports lie under {root / 'reproduce'}\n")
            return 0
        return _report(args, root, _kept_seconds(root, seconds), time.monotonic() - started)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except (Failed, PilotfishError) as error:
        logger.error("%s", error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.reproduce", description=__doc__)
    parser.add_argument("--root", default="runs", help="folder of everything that is made")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="stages at a time")
    parser.add_argument("--only", nargs="+", metavar="CHAPTER", choices=CHAPTERS, help="chapters")
    parser.add_argument(
        "--seeds",
        type=int,
        default=NUM_SEEDS,
        choices=range(1, MAX_SEEDS + 1),
        help="training seeds of the headline rows",
    )
    parser.add_argument(
        "--prompts", type=int, default=NUM_QUESTIONS, help="questions to measure on"
    )
    parser.add_argument("--study", choices=("kitchen", "hh-rlhf"), default="kitchen")
    parser.add_argument("--dry-run", action="store_true", help="list the stages and what is done")
    return parser


def _stages(args: argparse.Namespace) -> Mapping[str, Stage]:
    """Return what the command line asks for. Raises `ConfigError`."""
    if args.prompts < 2:
        raise ConfigError(f"--prompts is {args.prompts}, wanted at least two: intervals need them.")
    if args.study == "hh-rlhf":
        if args.only:
            raise ConfigError("--only names chapters of the kitchen's study. Leave it out.")
        return reproduce_hh.STAGES
    specs = [CHAPTERS[name] for name in args.only or CHAPTERS]
    headline = [
        name for spec in specs for stage in spec.headline for name in names_of(stage, args.seeds)
    ]
    methods = [*headline, *(name for spec in specs for name in spec.methods)]
    extra = [name for spec in specs for name in spec.stages]
    return stages(dict.fromkeys(methods), extra, num=args.prompts)


def _check_gpus() -> None:
    if not ray.cluster_resources().get("GPU"):
        raise ConfigError(
            "the study hh-rlhf trains models of seven billion parameters, and this cluster has no "
            "GPU. Name a cluster by RAY_ADDRESS that has some, or look at the study by --dry-run."
        )


def _report(
    args: argparse.Namespace, root: Path, seconds: Mapping[str, float], elapsed: float
) -> int:
    """Write the page and print what came of it; return the exit code."""
    evidence = Evidence(results=Results(root=root), root=root, num_seeds=args.seeds)
    chapters = {name: CHAPTERS[name].write(evidence) for name in args.only or CHAPTERS}
    path = root / "reproduce" / "report.html"
    colophon = Colophon(facts=_facts(args, seconds, elapsed), seconds=seconds)
    write_page(chapters, colophon, path)
    sys.stdout.write(f"{draw_verdicts(chapters)}\n\n{colophon.facts['time']}\nreport: {path}\n")
    return 1 if any(failed(chapter) for chapter in chapters.values()) else 0


def draw_verdicts(chapters: Mapping[str, Chapter]) -> str:
    """Return a line for every criterion."""
    lines = []
    for chapter in chapters.values():
        lines.append(f"\n{chapter.title}: {chapter.ours}")
        for one in chapter.criteria:
            kind = "hard" if one.hard else "soft"
            lines.append(
                f"  {one.verdict:9}  {kind}  {one.claim}: {one.found} (wanted {one.wanted})"
            )
    return "\n".join(lines)


def _kept_seconds(root: Path, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of every stage when it was really run, over all runs of the study."""
    path = root / "reproduce" / "seconds.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # A stage that finds its work done is over in a moment.
    kept = {name: max(one, before.get(name, 0.0)) for name, one in seconds.items()}
    path.write_text(json.dumps({**before, **kept}, indent=2) + "\n", encoding="utf-8")
    return kept


def _facts(
    args: argparse.Namespace, seconds: Mapping[str, float], elapsed: float
) -> dict[str, str]:
    resources = ray.cluster_resources()
    git = git_state()
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    changed = " (changed)" if git["git_dirty"] == "true" else ""
    return {
        "date": datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        "machine": (
            f"{platform.machine()}, {resources.get('CPU', 0):g} CPUs and "
            f"{resources.get('memory', 0) / 2**30:.0f} GiB for Ray on {len(ray.nodes())} node(s)"
        ),
        "versions": f"Python {platform.python_version()}, {libraries}",
        "code": f"{git['git_commit'][:12]}{changed}",
        "seeds": f"{args.seeds} training seeds of GenARM, DPO, Proxy-RLHF and Aligner; one base",
        "questions": f"{args.prompts}, the same for every method, new to all that was trained",
        "time": (
            f"this run took {elapsed / 60:.1f} minutes, {args.jobs} stages at a time; all stages "
            f"together, when each was really run, {sum(seconds.values()) / 60:.0f} minutes"
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
