"""Turn a checkpoint of a run into a model or guide folder, or mix several folders into one.

    python -m jobs.export CHECKPOINT OUTPUT
    python -m jobs.export --soup FOLDER=WEIGHT FOLDER=WEIGHT ... OUTPUT

A checkpoint lies under train/ of the job's root while its run is unfinished; it may have been
written by any number of workers, under any ZeRO stage. A soup is the mean of models' weights; see
`pilotfish.train.soup`.

Exit codes: 0 done, 1 the checkpoint cannot be read, 2 what was asked cannot be honoured.
"""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs import policies, supervised
from jobs.checkpoint import read_position
from jobs.records import describe, training_record
from jobs.run_folder import load_tokenizer, read_job, read_run_info
from jobs.sac_updates import saved_actor
from pilotfish.errors import CheckpointError, ConfigError, PilotfishError
from pilotfish.train.export import whole_folder
from pilotfish.train.soup import write_soup

logger = logging.getLogger(__name__)


def export(checkpoint: str | Path, output: str | Path) -> None:
    """Write the model or guide folder that the run would have written had it ended here.

    Its record has a hash of its own, so that nobody takes it for the finished run's. Raises
    `CheckpointError`.
    """
    checkpoint = Path(checkpoint).resolve()
    position = read_position(checkpoint)
    info = read_run_info(checkpoint.parent)
    if info is None:
        raise CheckpointError(
            f"{str(checkpoint.parent)!r}, around the checkpoint, is not the folder of a run, so "
            "what was trained is unknown. Leave checkpoints where the run wrote them."
        )
    config = read_job(checkpoint.parent)
    record = training_record(config, info, position.history)
    record["config_hash"] = f"{info.config_hash}-step-{position.step}"
    # Not every report has everything, so the latest of each.
    record["metrics"] = {
        name: value for report in position.history for name, value in report.items()
    }
    with whole_folder(output) as folder:
        state = trained_state(checkpoint, tag=f"step_{position.step}", dtype=config.train.dtype)
        write = policies.write_trained if config.learns_from_reward else supervised.write_trained
        write(folder, config, load_tokenizer(checkpoint.parent), state)
        try:
            describe(folder, config, record)
        except KeyError as error:
            raise CheckpointError(
                f"the card of this guide needs {error}, which was not measured before step "
                f"{position.step}. Take a later checkpoint, or train with train.eval_every."
            ) from error


def trained_state(checkpoint: Path, *, tag: str, dtype: str) -> dict[str, Tensor]:
    """Return what was trained, whole and on the CPU, by its name in the engine's module.

    Raises `CheckpointError` for a checkpoint without some worker's part.
    """
    folder = checkpoint / tag
    actor = saved_actor(folder)
    if actor is not None:
        return {f"actor.{name}": tensor for name, tensor in actor.items()}
    try:
        if list(folder.glob("*_optim_states.pt")):
            # ZeRO keeps what it trains in float32.
            whole = _zero_state(checkpoint, tag)
            return {name: tensor.to(getattr(torch, dtype)) for name, tensor in whole.items()}
        path = folder / "mp_rank_00_model_states.pt"
        return torch.load(path, map_location="cpu", weights_only=False)["module"]
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(
            f"{str(checkpoint)!r} is not complete: {error}. Take another checkpoint of the run."
        ) from error


def _zero_state(checkpoint: Path, tag: str) -> Any:
    # Here: it takes seconds.
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), tag, exclude_frozen_parameters=True
        )


def _parts(sources: Sequence[str]) -> dict[str, float]:
    """Parse FOLDER=WEIGHT. Raises `ConfigError`."""
    parts = {}
    for source in sources:
        folder, _, weight = source.rpartition("=")
        try:
            parts[folder] = float(weight)
        except ValueError as error:
            raise ConfigError(f"{source!r} is not FOLDER=WEIGHT, such as runs/dpo=0.5.") from error
    if len(parts) != len(sources):
        raise ConfigError(f"{list(sources)} name a folder twice. Name each once.")
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.export", description="Turn a checkpoint into a model folder."
    )
    parser.add_argument("sources", nargs="+", help="a checkpoint; with --soup, FOLDER=WEIGHT ...")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--replace", action="store_true", help="write over what is there")
    parser.add_argument("--soup", action="store_true", help="mix model folders by weight")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        if Path(args.output).exists() and not args.replace:
            raise ConfigError(f"output {args.output!r} exists. Choose another, or allow --replace.")
        if args.soup:
            write_soup(_parts(args.sources), args.output)
        elif len(args.sources) == 1:
            export(args.sources[0], args.output)
        else:
            raise ConfigError(f"{len(args.sources)} checkpoints are given, wanted one.")
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except PilotfishError as error:
        logger.error("export failed: %s", error)
        return 1
    logger.info("wrote %s", args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
