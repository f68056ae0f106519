"""Train a base model or a guide on Ray Train with DeepSpeed.

    python -m jobs.train CONFIG [key=value ...] [--dry-run] [--quiet]

Run it again after it was killed, and it goes on from its last checkpoint, with any number of
workers. Exit codes: 0 done, 1 the job failed, 2 the config cannot be honoured.
"""

import argparse
import logging
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer

from jobs import cluster, tracking
from jobs.checkpoint import MODEL_FOLDER
from jobs.config import JobConfig
from jobs.dry_run import check_base, memory_plan
from jobs.progress import hide_bars, progress_bar
from jobs.records import describe, training_record, version_tags
from jobs.resolve import config_hash, resolved
from jobs.run_folder import RunInfo, prepare_in, read_run_info, write_run_info
from jobs.stretch import CHECKPOINT_FOLDER, Stretch, stretch_hash
from jobs.worker import WorkerSettings, train_loop
from pilotfish import config as configs
from pilotfish.data.tokenized import LengthReport
from pilotfish.errors import CheckpointError, ConfigError, PilotfishError
from pilotfish.train.export import read_record, whole_folder

logger = logging.getLogger(__name__)

WorkerLoop = Callable[[dict[str, Any]], list[dict[str, float]]]


def train(
    config: JobConfig, *, loop: WorkerLoop = train_loop, stretch: Stretch | None = None
) -> Path:
    """Run the job and return the folder it wrote.

    Returns at once when the output was trained from the same settings before. Raises `ConfigError`
    for an output of other settings, unless `force` is set. `loop` is what each worker runs. With
    `stretch` those steps are taken alone, and the folder also holds what the next ones start from.
    """
    config = resolved(config)
    digest = config_hash(config) if stretch is None else stretch_hash(config, stretch)
    output = Path(config.output)
    if _is_done(config, digest):
        logger.info("%s is trained already from these settings; reusing it", output)
        return output
    if config.model is not None:
        _check_init(config.model.init)
    check_base(config)
    # Ray Train resumes from what lies here.
    run_folder = Path(config.root) / "train" / f"{_slug(config)}-{digest}"
    if config.force:
        shutil.rmtree(run_folder, ignore_errors=True)
    cluster.connect(num_cpus=config.num_cpus, gpus=config.scaling.use_gpu)
    with ExitStack() as stack:
        run = _open_run(config, digest, run_folder, stretch, stack)
        info = RunInfo(
            config_hash=digest,
            run_id=None if run is None else run.run_id,
            tracking_uri=None if run is None else run.uri,
        )
        write_run_info(run_folder, info, config)
        history, checkpoint = _fit(config, run_folder, run, loop, stretch)
        record = training_record(config, info, history)
        # A job that is killed in here does all of it again.
        with whole_folder(output) as folder:
            shutil.copytree(checkpoint / MODEL_FOLDER, folder, dirs_exist_ok=True)
            if stretch is not None:
                rest = shutil.ignore_patterns(MODEL_FOLDER)
                shutil.copytree(checkpoint, folder / CHECKPOINT_FOLDER, ignore=rest)
            describe(folder, config, record)
            if run is not None:
                _publish(run, config, folder, record)
    # The checkpoints were for resuming this run, and it is over.
    shutil.rmtree(run_folder, ignore_errors=True)
    logger.info("wrote %s", output)
    return output


def _is_done(config: JobConfig, digest: str) -> bool:
    output = Path(config.output)
    if config.force or not output.exists():
        return False
    record = read_record(output)
    if record is not None and record.get("config_hash") == digest:
        return True
    how = "by this command" if record is None else "from these settings"
    raise ConfigError(
        f"output {str(output)!r} exists and was not trained {how}. Choose another output, or pass "
        "force=true to replace it."
    )


def _check_init(init: str | dict[str, Any]) -> None:
    """Raise `CheckpointError` for a path of a folder that is not there (hub ids pass)."""
    if not isinstance(init, str) or Path(init).is_dir():
        return
    if Path(init).is_absolute() or init.startswith(".") or init.count("/") > 1:
        raise CheckpointError(
            f"model.init is {init!r}, but there is no such folder. Train that model first, with "
            "the config whose output it is, or give another folder or a hub id."
        )


def _slug(config: JobConfig) -> str:
    output = Path(config.output)
    root = Path(config.root)
    name = str(output.relative_to(root)) if output.is_relative_to(root) else output.name
    return re.sub(r"[^\w.-]+", "-", name)


def _open_run(
    config: JobConfig, digest: str, run_folder: Path, stretch: Stretch | None, stack: ExitStack
) -> tracking.TrackedRun | None:
    info = read_run_info(run_folder)
    before = None if info is None else (info.run_id, info.tracking_uri)
    if before is None and stretch is not None:
        before = stretch.run_before(config)
    uri = tracking.tracking_uri(config.tracking, config.root)
    return stack.enter_context(
        tracking.tracked_run(
            config.tracking,
            root=config.root,
            name=_slug(config),
            settings=config.model_dump(mode="json"),
            tags={"config_hash": digest, "job": "train", "objective": config.objective.kind},
            continued=before[0] if before is not None and before[1] == uri else None,
        )
    )


def _fit(
    config: JobConfig,
    run_folder: Path,
    run: tracking.TrackedRun | None,
    loop: WorkerLoop,
    stretch: Stretch | None,
) -> tuple[list[dict[str, float]], Path]:
    """Run the workers; return their reports and their last checkpoint, which holds the model."""
    prepared, lengths = _prepare(config, run_folder)
    logger.info("training rows: %s", lengths)
    if run is not None:
        run.log_metrics(lengths.metrics())
    with progress_bar(_slug(config)) as progress:
        job = WorkerSettings(
            config=config,
            prepared=prepared,
            progress=progress.board,
            run_id=None if run is None else run.run_id,
            tracking_uri=None if run is None else run.uri,
            stretch=stretch,
        )
        trainer = TorchTrainer(
            loop,
            # By reference: Ray Train's controller would import for nothing what settings are of.
            train_loop_config={"job": ray.put(job)},
            scaling_config=ScalingConfig(
                num_workers=config.scaling.num_workers,
                use_gpu=config.scaling.use_gpu,
                resources_per_worker=config.scaling.resources_per_worker,
                elastic_resize_monitor_interval_s=config.scaling.resize_every,
            ),
            run_config=RunConfig(
                name=run_folder.name,
                storage_path=str(run_folder.parent),
                failure_config=FailureConfig(max_failures=config.scaling.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=config.train.num_to_keep),
                callbacks=[] if run is None else [tracking.MetricsWriter(run)],
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        result: Result = trainer.fit()
        assert result.checkpoint is not None, "the loop ends with a checkpoint"
        assert result.return_value is not None, "the loop returns its reports"
        progress.finished = int(result.return_value[-1]["step"])
    return result.return_value, Path(result.checkpoint.path)


def _prepare(config: JobConfig, run_folder: Path) -> tuple[Any, LengthReport]:
    """Prepare the data in a task; return a reference to them, and what was cut.

    What is wrong with the data or the tokenizer is raised here, before workers start.
    """
    task: Any = ray.remote(num_cpus=1, num_returns=2)(prepare_in)
    prepared, report = task.remote(run_folder, config)
    try:
        return prepared, ray.get(report)
    except RayTaskError as error:
        with suppress(RayTaskError):  # the other half failed alike; Ray would report it unasked
            ray.get(prepared)
        if isinstance(error.cause, PilotfishError):
            raise error.cause from None
        raise


def _publish(
    run: tracking.TrackedRun,
    config: JobConfig,
    folder: Path,
    record: dict[str, Any],
) -> None:
    """Log the curves, and register the model in the folder if the config names it."""
    name, quantities = "loss.png", ("loss", "accuracy")
    if config.learns_from_reward:
        name, quantities = "reward.png", ("reward", "true_reward", "bad_share")
    figure = tracking.curves_figure(record["history"], quantities, _slug(config))
    run.log_figure(figure, name)
    if config.tracking.register_as is not None:
        run.register(folder, config=config.tracking, tags=version_tags(config, record))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description="Train a model.")
    parser.add_argument("config", help="YAML file, such as jobs/configs/kitchen/genarm.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted overrides: train.learning_rate=5e-4")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config, and plan memory"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GIB", help="of one GPU, for --dry-run"
    )
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors alone")
    args = parser.parse_intermixed_args(argv)
    if args.quiet:
        hide_bars()
    logging.basicConfig(format="%(levelname)s %(message)s")
    for name in (__name__, "jobs", "pilotfish"):
        logging.getLogger(name).setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        config = configs.load(JobConfig, args.config, args.overrides)
        if args.dry_run:
            config = resolved(config)
            sys.stdout.write(configs.dump(config))
            if (memory := memory_plan(config, gpu_memory_gib=args.gpu_memory)) is not None:
                logger.info("memory by arithmetic, nothing was loaded:\n%s", memory.table())
            return 0
        train(config)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except (PilotfishError, RayError, TrainingFailedError) as error:
        logger.error("training failed: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
