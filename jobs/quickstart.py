"""The main job, end to end, on this machine: a world, a base, a guide, a report, a server.

    python -m jobs.quickstart [--root runs]

What is trained already is reused.
"""

import argparse
import logging
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from openai import OpenAI

from jobs import cluster
from jobs.config import JobConfig
from jobs.evaluate import evaluate
from jobs.evaluation_config import EvaluationConfig
from jobs.serving import application, free_port, served, write_serve_config
from jobs.tracking import tracking_uri
from jobs.train import train
from pilotfish import config as configs
from pilotfish import world
from pilotfish.errors import PilotfishError
from pilotfish.evaluation.report import Report
from pilotfish.evaluation.text import as_table
from pilotfish.world import Scene

CONFIGS = cluster.REPOSITORY / "jobs" / "configs" / "kitchen"
GUIDE = "helpful"
WIDTH = 96
NUM_SHOWN = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run every step; 0 if all went well."""
    parser = argparse.ArgumentParser(prog="python -m jobs.quickstart", description=__doc__)
    parser.add_argument("--root", default="runs", help="folder of everything that is made")
    root = Path(parser.parse_args(argv).root).expanduser().resolve()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    started = time.monotonic()
    try:
        _run(root)
    except PilotfishError as error:
        say(f"\n{error}")
        return 1
    say(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def _run(root: Path) -> None:
    overrides = [f"root={root}"]
    base_job = configs.load(JobConfig, CONFIGS / "base.yaml", overrides)
    guide_job = configs.load(JobConfig, CONFIGS / "genarm.yaml", overrides)
    evaluation = configs.load(EvaluationConfig, CONFIGS / "evaluate.yaml", overrides)
    cluster.connect()

    headline("1/5  A world where the true reward is known")
    show_world()
    headline("2/5  Train the base: a language model of what assistants said (Ray Train, DeepSpeed)")
    base = train(base_job)
    headline("3/5  Train the guide: a GenARM reward model, from 6,000 noisy preferences")
    guide = train(guide_job)
    headline("4/5  Measure: 500 new questions, with and without the guide")
    report = evaluate(evaluation)
    show_table(report)
    headline("5/5  Serve base and guide on Ray Serve, and ask both through the OpenAI client")
    port = free_port(8000)
    serve_config = root / "kitchen" / "serve.yaml"
    args = {
        "base": {"path": str(base), "num_cpus": 0.5},
        "guides": [{"name": GUIDE, "path": str(guide)}],
        "ingress": {"num_cpus": 0.5},
    }
    write_serve_config(serve_config, [application("pilotfish", args)], port=port)
    with served(serve_config, port=port) as client:
        show_before_and_after(client)
    show_what_next(root, base_job, serve_config, Path(evaluation.output))


def show_world() -> None:
    """Show one question, one logged answer, and why it scores as it does."""
    [row] = world.corpus(1, seed=4)
    scene = Scene.from_text(row["prompt"][0]["content"])
    answer = row["completion"][0]["content"]
    say("Somebody asks how to cook for a guest. One of 30,000 logged answers:")
    _show_answer("question", scene.text)
    _show_answer("answer", answer)
    _show_answer("reward", world.explain(scene, answer))


def show_table(report: Report) -> None:
    """Show every setting beside the controls that it has to beat."""
    say(as_table(report))
    say(
        "Base rows are controls. Wins are against the sampled base. KL: nats per answer, guided law"
    )
    say("against the base. Bad: garbled, cut off or repeated sentences.")


def show_before_and_after(client: OpenAI) -> None:
    """Ask base and guided base the same questions, and judge both."""
    say("The first three questions of a fresh list; the reward is the truth, which no model saw.")
    for scene in world.scenes(NUM_SHOWN, seed=2026):
        say("")
        _show_answer("question", scene.text)
        for model, label in (("base", "base"), (f"base:{GUIDE}", "guided")):
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": scene.text}],
                temperature=0.7,
                seed=1,
                max_tokens=world.MAX_ANSWER_TOKENS,
            )
            text = (answer.choices[0].message.content or "").strip()
            _show_answer(label, text)
            _show_answer("", world.explain(scene, text))


def show_what_next(root: Path, job: JobConfig, serve_config: Path, report: Path) -> None:
    """Say where everything is, and what to type."""
    headline("What is where, and what to type next")
    say(f"report and plots   {report}/report.html")
    say(f"models             {root}/kitchen/base, {root}/kitchen/genarm")
    say(f"MLflow             mlflow ui --backend-store-uri {tracking_uri(job.tracking, root)}")
    say(f"serve it           serve run {serve_config}")
    say("other weights      python -m jobs.evaluate jobs/configs/kitchen/evaluate.yaml")
    say("another guide      python -m jobs.train jobs/configs/kitchen/genarm.yaml \\")
    say("                       train.learning_rate=5e-4 output=runs/kitchen/genarm-slow")
    say("real dialogues     python -m jobs.train jobs/configs/hh-rlhf/base.yaml")


def headline(text: str) -> None:
    say(f"\n{text}\n{'─' * min(WIDTH, len(text))}")


def say(text: str) -> None:
    """Write a line for the person in front of the terminal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _show_answer(label: str, text: str) -> None:
    indent = " " * 12
    say(textwrap.fill(text, WIDTH, initial_indent=f"  {label:10}", subsequent_indent=indent))


if __name__ == "__main__":
    sys.exit(main())
