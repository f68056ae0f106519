"""Have one method answer the questions, judge the answers, and keep all of it.

    python -m jobs.reproduce.measure NAME --root runs --prompts 500

What was measured before from the same models is not measured again. Exit codes: 0 done, 1 the
method cannot be measured.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from jobs import cluster
from jobs.reproduce.answers import measure
from jobs.reproduce.measured import Measured, measured_path, read_digest
from jobs.reproduce.study import METHODS
from pilotfish.errors import PilotfishError

logger = logging.getLogger(__name__)


def keep(root: Path, name: str, num: int) -> bool:
    """Measure on the connected cluster and write the file, unless it is there; say if it was not.

    Raises what `measure` raises.
    """
    method, path = METHODS[name], measured_path(root, name)
    digest = method.digest(root, num)
    if read_digest(path) == digest:
        return False
    task: Any = ray.remote(num_cpus=1)(measure)
    try:
        found: Measured = ray.get(task.remote(root, method, num))
    except RayTaskError as error:
        if isinstance(error.cause, PilotfishError):
            raise error.cause from None
        raise
    content = {"digest": digest, "method": asdict(method), **asdict(found)}
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = path.with_suffix(".tmp")
    incoming.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    os.replace(incoming, path)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m jobs.reproduce.measure", description=__doc__)
    parser.add_argument("name", choices=METHODS, metavar="NAME")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--prompts", type=int, default=500)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        cluster.connect()
        made = keep(Path(args.root).expanduser().resolve(), args.name, args.prompts)
    except PilotfishError as error:
        logger.error("measuring failed: %s", error)
        return 1
    logger.info("%s %s", args.name, "is measured" if made else "was measured before")
    return 0


if __name__ == "__main__":
    sys.exit(main())
