"""What a study would do: every stage, whether its work is done, and its command."""

from collections.abc import Mapping
from pathlib import Path

from jobs.cluster import REPOSITORY
from jobs.config import JobConfig
from jobs.reproduce.measured import measured_path, read_digest
from jobs.reproduce.study import METHODS
from jobs.resolve import config_hash, resolved
from jobs.stages import Stage
from pilotfish import config as configs
from pilotfish.train.export import read_record


def draw_plan(stages: Mapping[str, Stage], root: Path) -> str:
    """Return a line per stage, in the order in which they are begun."""
    lines = []
    num_done = 0
    for name, stage in stages.items():
        done = is_done(stage, root)
        num_done += done
        command = " ".join([stage.module, *arguments_of(stage, root)])
        lines.append(f"{'done' if done else 'to do':6} {name:26} python -m {command}")
    return "\n".join([*lines, f"{len(lines)} stages, {num_done} of them done"])


def arguments_of(stage: Stage, root: Path) -> list[str]:
    return [argument.format(root=root) for argument in stage.arguments]


def is_done(stage: Stage, root: Path) -> bool:
    """Say whether a stage would find its work done.

    Of a stage that is neither a training nor a measurement, whether there is anything.
    """
    arguments = arguments_of(stage, root)
    if stage.module == "jobs.reproduce.measure":
        name, num = arguments[0], int(arguments[-1])
        return read_digest(measured_path(root, name)) == METHODS[name].digest(root, num)
    if stage.module == "jobs.train":
        config = resolved(configs.load(JobConfig, REPOSITORY / arguments[0], arguments[1:]))
        record = read_record(config.output) or {}
        return record.get("config_hash") == config_hash(config)
    named = [one.partition("=")[2] for one in arguments if one.startswith("output=")]
    output = Path((named or arguments)[-1])
    return (output / "winner.json" if stage.module == "tune.search" else output).exists()
