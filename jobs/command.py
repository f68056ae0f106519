"""The command line of a job: a config, dotted overrides, and exit codes.

0 done, 1 the job failed, 2 the config cannot be honoured.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from ray.exceptions import RayError
from ray.train import TrainingFailedError

from jobs.progress import hide_bars
from pilotfish import config as configs
from pilotfish.config import Config
from pilotfish.errors import ConfigError, PilotfishError

C = TypeVar("C", bound=Config)

logger = logging.getLogger(__name__)


def run_command(
    argv: Sequence[str] | None,
    *,
    job: str,
    about: str,
    config_type: type[C],
    resolved: Callable[[C], C],
    run: Callable[[C], str],
) -> int:
    """Run a job as its command line says, print what `run` returns, and return the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{job}", description=about)
    parser.add_argument("config", help=f"YAML file, such as jobs/configs/kitchen/{job}.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted overrides: seed=3 prompts.num=100")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config")
    parser.add_argument("--quiet", action="store_true", help="show warnings and the result alone")
    args = parser.parse_intermixed_args(argv)
    if args.quiet:
        hide_bars()
    logging.basicConfig(format="%(levelname)s %(message)s")
    for name in ("jobs", "pilotfish"):
        logging.getLogger(name).setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        config = configs.load(config_type, args.config, args.overrides)
        if args.dry_run:
            sys.stdout.write(configs.dump(resolved(config)))
            return 0
        sys.stdout.write(run(config) + "\n")
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except (PilotfishError, RayError, TrainingFailedError) as error:
        logger.error("%s failed: %s", job, error)
        return 1
    return 0
