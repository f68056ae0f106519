"""Train everything there is on the miniature world, measure it, and write one table.

    python -m jobs.kitchen [--root runs] [--jobs 2] [--only NAME ...]

Stages that were trained before from the same settings are not trained again. Exit codes: 0 done, 1
a stage failed or fell short of what it must show.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs import cluster
from jobs.kitchen_stages import STAGES
from jobs.kitchen_table import check_shape, draw_table, measure, write_table
from jobs.stages import Failed, run_stages, with_needs
from pilotfish.errors import PilotfishError

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m jobs.kitchen", description=__doc__)
    parser.add_argument("--root", default="runs", help="folder of everything that is made")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="stages at a time")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="stages, with what they need")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    root = Path(args.root).expanduser().resolve()
    unknown = [name for name in args.only or () if name not in STAGES]
    if unknown:
        parser.error(f"no stage is named {unknown[0]!r}; there are {', '.join(STAGES)}")
    started = time.monotonic()
    try:
        cluster.connect(num_cpus=args.jobs)
        names = with_needs(args.only or list(STAGES), STAGES)
        run_stages(
            {name: STAGES[name] for name in names},
            root,
            logs=root / "kitchen" / "logs",
            num_lanes=args.jobs,
            label="kitchen",
        )
        if args.only:
            return 0
        rows = measure(root)
    except Failed as failure:
        logger.error("%s", failure)
        return 1
    except PilotfishError as error:
        logger.error("measuring failed: %s", error)
        return 1
    write_table(rows, root / "kitchen" / "table")
    sys.stdout.write(draw_table(rows) + "\n\n")
    checks = check_shape(root, rows)
    for check in checks:
        sys.stdout.write(f"{check}\n")
    minutes = (time.monotonic() - started) / 60
    sys.stdout.write(f"\nDone in {minutes:.1f} minutes. Table: {root / 'kitchen' / 'table'}\n")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
