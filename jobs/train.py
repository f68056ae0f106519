"""Train a base model or a guide on Ray Train with DeepSpeed.

    python -m jobs.train CONFIG [key=value ...] [--dry-run]

Exit codes: 0 done, 1 the job failed, 2 the config cannot be honoured.
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
from transformers import AutoTokenizer

from jobs import cluster, tracking
from jobs.checkpoint import MODEL_FOLDER
from jobs.config import JobConfig
from jobs.dataset import prepare
from jobs.progress import progress_bar
from jobs.resolve import config_hash, resolved
from jobs.worker import WorkerSettings, train_loop
from pilotfish import config as configs
from pilotfish.data.tokenized import LengthReport
from pilotfish.errors import CheckpointError, ConfigError, PilotfishError
from pilotfish.guides.card import GuideCard, write_card
from pilotfish.models.vocab import fingerprint
from pilotfish.train.export import read_record, whole_folder, write_record

logger = logging.getLogger(__name__)

WorkerLoop = Callable[[dict[str, Any]], list[dict[str, float]]]


def train(config: JobConfig, *, loop: WorkerLoop = train_loop) -> Path:
    """Run the job and return the folder it wrote.

    Returns at once when the output was trained from the same settings before. Raises `ConfigError`
    for an output of other settings, unless `force` is set. `loop` is what each worker runs.
    """
    config = resolved(config)
    digest = config_hash(config)
    output = Path(config.output)
    if _is_done(config, digest):
        logger.info("%s is trained already from these settings; reusing it", output)
        return output
    if config.model is not None:
        _check_init(config.model.init)
    # Ray Train resumes from what lies here. ZeRO checkpoints fit one number of workers only.
    run_name = f"{_slug(config)}-{digest}-{config.scaling.num_workers}w"
    run_folder = Path(config.root) / "train" / run_name
    if config.force:
        shutil.rmtree(run_folder, ignore_errors=True)
    cluster.connect(num_cpus=config.num_cpus, gpus=config.scaling.use_gpu)
    with ExitStack() as stack:
        run = _open_run(config, digest, stack)
        history, model = _fit(config, run_folder, run, loop)
        record = _record(config, digest, history, run)
        with whole_folder(output) as folder:
            shutil.copytree(model, folder, dirs_exist_ok=True)
            _describe(folder, config, record)
        if run is not None:
            _publish(run, config, history, record)
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


def _open_run(config: JobConfig, digest: str, stack: ExitStack) -> tracking.TrackedRun | None:
    if not config.tracking.enabled:
        return None
    return stack.enter_context(
        tracking.tracked_run(
            config.tracking,
            root=config.root,
            name=_slug(config),
            settings=config.model_dump(mode="json"),
            tags={"config_hash": digest, "job": "train", "objective": config.objective.kind},
        )
    )


def _fit(
    config: JobConfig, run_folder: Path, run: tracking.TrackedRun | None, loop: WorkerLoop
) -> tuple[list[dict[str, float]], Path]:
    """Run the workers; return their reports and the folder with the finished model."""
    prepared, lengths = _prepare(config)
    logger.info("training rows: %s", lengths)
    if run is not None:
        run.log_metrics(lengths.metrics())
    with progress_bar(_slug(config)) as board:
        job = WorkerSettings(config=config, prepared=prepared, progress=board)
        trainer = TorchTrainer(
            loop,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=config.scaling.num_workers,
                use_gpu=config.scaling.use_gpu,
                resources_per_worker=config.scaling.resources_per_worker,
            ),
            run_config=RunConfig(
                name=run_folder.name,
                storage_path=str(run_folder.parent),
                failure_config=FailureConfig(max_failures=config.scaling.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=[] if run is None else [tracking.MetricsWriter(run)],
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        result: Result = trainer.fit()
    assert result.checkpoint is not None, "the loop ends with a checkpoint"
    assert result.return_value is not None, "the loop returns its reports"
    return result.return_value, Path(result.checkpoint.path) / MODEL_FOLDER


def _prepare(config: JobConfig) -> tuple[Any, LengthReport]:
    """Prepare the data in a task; return a reference to them, and what was cut.

    What is wrong with the data or the tokenizer is raised here, before workers start.
    """
    task: Any = ray.remote(num_cpus=1, num_returns=2)(prepare)
    prepared, report = task.remote(config)
    try:
        return prepared, ray.get(report)
    except RayTaskError as error:
        with suppress(RayTaskError):  # the other half failed alike; Ray would report it unasked
            ray.get(prepared)
        if isinstance(error.cause, PilotfishError):
            raise error.cause from None
        raise


def _record(
    config: JobConfig,
    digest: str,
    history: Sequence[dict[str, float]],
    run: tracking.TrackedRun | None,
) -> dict[str, Any]:
    return {
        "config_hash": digest,
        "config": config.model_dump(mode="json"),
        "run_id": None if run is None else run.run_id,
        "tracking_uri": None if run is None else run.uri,
        "metrics": history[-1],
        "history": list(history),
        **tracking.git_state(),
    }


def _describe(folder: Path, config: JobConfig, record: dict[str, Any]) -> None:
    """Write the training record, and for a guide its card."""
    write_record(folder, record)
    kind = config.guide_kind
    if kind is None:
        return
    keys = ("config_hash", "run_id", "git_commit", "metrics")
    card = GuideCard(
        kind=kind,
        base=config.base_name,
        vocab=fingerprint(AutoTokenizer.from_pretrained(folder)),
        dtype=config.train.dtype,
        training={key: record[key] for key in keys},
        **config.card_fields(record["metrics"]),
    )
    write_card(folder, card)


def _publish(
    run: tracking.TrackedRun,
    config: JobConfig,
    history: Sequence[dict[str, float]],
    record: dict[str, Any],
) -> None:
    """Log the curves, and register the model if the config names it."""
    run.log_figure(tracking.loss_figure(history, _slug(config)), "loss.png")
    if config.tracking.register_as is not None:
        tags = {
            "kind": config.guide_kind or "base",
            "base": config.base_name[:200],
            "config_hash": record["config_hash"],
            "git_commit": record["git_commit"],
        }
        run.register(config.output, config=config.tracking, tags=tags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description="Train a model.")
    parser.add_argument("config", help="YAML file, such as jobs/configs/kitchen/genarm.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted overrides: train.learning_rate=5e-4")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    for name in (__name__, "jobs", "pilotfish"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        config = configs.load(JobConfig, args.config, args.overrides)
        if args.dry_run:
            sys.stdout.write(configs.dump(resolved(config)))
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
