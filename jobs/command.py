"""The command line of a job: a config, dotted overrides, and exit codes.

0 done, 1 the job failed, 2 the config cannot be honoured.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
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
    run: Callable[..., str],
    kind_of: Callable[[str, Sequence[str]], type[C]] | None = None,
    package: str = "jobs",
    example: str | None = None,
    flags: Mapping[str, str] | None = None,
) -> int:
    """Run a job as its command line says, print what `run` returns, and return the exit code.

    `kind_of` picks a subtype of `config_type` by the path and the overrides. `flags` are switches
    with their help; `run` gets each by name.
    """
    flags = flags or {}
    parser = argparse.ArgumentParser(prog=f"python -m {package}.{job}", description=about)
    example = example or f"{package}/configs/kitchen/{job}.yaml"
    parser.add_argument("config", help=f"YAML file, such as {example}")
    parser.add_argument("overrides", nargs="*", help="dotted overrides: seed=3 prompts.num=100")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config")
    parser.add_argument("--quiet", action="store_true", help="show warnings and the result alone")
    for flag, purpose in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=purpose)
    args = parser.parse_intermixed_args(argv)
    if args.quiet:
        hide_bars()
    logging.basicConfig(format="%(levelname)s %(message)s")
    for name in ("jobs", "tune", "pilotfish"):
        logging.getLogger(name).setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        chosen = config_type if kind_of is None else kind_of(args.config, args.overrides)
        config = configs.load(chosen, args.config, args.overrides)
        if args.dry_run:
            sys.stdout.write(configs.dump(resolved(config)))
            return 0
        sys.stdout.write(run(config, **{flag: getattr(args, flag) for flag in flags}) + "\n")
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except (PilotfishError, RayError, TrainingFailedError) as error:
        logger.error("%s failed: %s", job, error)
        return 1
    return 0
