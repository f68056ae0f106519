"""The trainings of the kitchen and what each needs, run side by side as jobs of their own."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from jobs.cluster import REPOSITORY

_CONFIGS = "jobs/configs/kitchen"
_POLL_SECONDS = 0.2


class Failed(Exception):
    """A stage ended with an error."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command, run from the repository."""

    module: str = "jobs.train"
    arguments: tuple[str, ...] = ()
    """`{root}` is the root; by default the stage's own config, trained by one worker."""
    needs: tuple[str, ...] = ("base",)

    def command(self, name: str, root: Path) -> list[str]:
        arguments = self.arguments or (
            f"{_CONFIGS}/{name}.yaml",
            "root={root}",
            "scaling.num_workers=1",
        )
        filled = [argument.format(root=root) for argument in arguments]
        return [sys.executable, "-m", self.module, *filled]


STAGES: Mapping[str, Stage] = {
    "base": Stage(needs=()),
    "base_m": Stage(needs=()),
    "reward_model": Stage(),
    "aligner": Stage(),
    "genarm": Stage(),
    "proxy": Stage(needs=("base", "reward_model")),
    "dpo": Stage(),
    "ppo": Stage(needs=("base", "reward_model")),
    "reward_helpful": Stage(),
    "reward_harmless": Stage(),
    "morl": Stage(needs=("base", "reward_helpful", "reward_harmless")),
    "proxy_mara": Stage(needs=("base", "reward_model")),
    "reward_prefix": Stage(),
    "value": Stage(),
    "value_q": Stage(),
    "dpo_helpful": Stage(),
    "dpo_harmless": Stage(),
    "genarm_helpful": Stage(),
    "genarm_harmless": Stage(),
    "soup": Stage(
        "jobs.export",
        (
            *(
                "--replace",
                "--soup",
                "{root}/kitchen/dpo_helpful=0.5",
                "{root}/kitchen/dpo_harmless=0.5",
            ),
            "{root}/kitchen/soup",
        ),
        needs=("dpo_helpful", "dpo_harmless"),
    ),
}
"""In the order in which they are begun, as far as their needs allow."""


def wanted_stages(names: Sequence[str] | None) -> list[str]:
    """Return these stages and all that they need, or all there are, in the order of `STAGES`."""
    if names is None:
        return list(STAGES)
    wanted: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += STAGES[name].needs
    return [name for name in STAGES if name in wanted]


def run_stages(
    root: Path,
    *,
    names: Sequence[str] | None = None,
    num_jobs: int,
    stages: Mapping[str, Stage] = STAGES,
) -> dict[str, float]:
    """Run stages, `num_jobs` at a time; return the seconds that each took.

    Each writes to a log of its own. Raises `Failed`, with the end of the log, for the first that
    fails; the others that run are ended.
    """
    logs = root / "kitchen" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting = wanted_stages(names) if stages is STAGES else list(stages)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    seconds: dict[str, float] = {}
    with tqdm(total=len(waiting), desc="kitchen", unit="stage", ncols=100, mininterval=2) as bar:
        try:
            while waiting or running:
                ready = [name for name in waiting if set(stages[name].needs) <= set(seconds)]
                for name in ready[: num_jobs - len(running)]:
                    waiting.remove(name)
                    command = stages[name].command(name, root)
                    running[name] = _start(command, logs / f"{name}.log"), time.monotonic()
                bar.set_postfix_str(", ".join(running), refresh=False)
                bar.update(0)
                time.sleep(_POLL_SECONDS)
                for name in [name for name, (job, _) in running.items() if job.poll() is not None]:
                    job, started = running.pop(name)
                    seconds[name] = time.monotonic() - started
                    if job.returncode:
                        raise Failed(_failure(name, job.returncode, logs / f"{name}.log"))
                    tqdm.write(f"{name:18} {seconds[name]:6.0f} s")
                    bar.update()
        finally:
            for job, _ in running.values():
                job.terminate()
    return seconds


def _start(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file)


def _failure(name: str, code: int, log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"stage {name} ended with exit code {code}; the end of {log}:\n" + "\n".join(lines[-8:])
