"""Multi-round alignment: a model answers, an Aligner corrects, the model learns to prefer that.

    python -m jobs.rounds CONFIG [key=value ...] [--dry-run]

Ji et al., "Aligner: Efficient Alignment by Learning to Correct", NeurIPS 2024. In round i, with
A = Model_{i-1}(x) on prompts that no round has seen:

    A* = Aligner(x, A)      D_i = {(x, A* over A)}      Model_i = training of Model_{i-1} on D_i

by DPO with Model_{i-1} as its reference, or by PPO with a reward model that D_i has taught.
A gold reward that nothing was trained on watches every model. What the rounds make lies under
`root/rounds`, and a driver that died goes on where it was.

Exit codes: 0 done, 1 the job failed, 2 the config cannot be honoured.
"""

import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs import cluster, tracking
from jobs.answer import answer
from jobs.command import run_command
from jobs.correct import correct
from jobs.output import is_current
from jobs.pool import ActorsConfig
from jobs.rounds_config import (
    AlignerPairs,
    RoundsConfig,
    answer_job,
    correct_job,
    monitor_job,
    resolved,
    reward_job,
    rounds_hash,
    training_job,
)
from jobs.rows import metrics_of
from jobs.tracking import TrackedRun, tracked_run
from jobs.train import train
from pilotfish.errors import DataError
from pilotfish.evaluation.metrics import Estimate, has_fallen
from pilotfish.train.export import read_record, whole_folder, write_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A model and what was found about it. Round 0 is the model to start from."""

    number: int
    model: str
    metrics: dict[str, float]

    @property
    def reward(self) -> Estimate:
        """Its gold reward."""
        return Estimate(
            mean=self.metrics["monitor/reward"], error=self.metrics["monitor/reward_error"]
        )


def align(config: RoundsConfig) -> list[Round]:
    """Run the rounds and write the model of the best one; return what each has come to.

    Returns at once when the output was made from the same settings before. Raises what the jobs of
    a round raise, `DataError` when already the first has nothing to learn from, and `ConfigError`
    for an output of other settings, unless `force` is set.
    """
    config = resolved(config)
    output, digest = Path(config.output), rounds_hash(config)
    work = Path(config.root) / "rounds" / digest  # whatever the output: more rounds go on from here
    made_from = f"{digest}-{config.num_rounds}-{config.monitor.patience}"
    if config.force:
        shutil.rmtree(work, ignore_errors=True)
    else:
        record = read_record(output) or {}
        if is_current(output, record.get("config_hash"), made_from):
            logger.info("%s is made already from these settings; reusing it", output)
            return [Round(**one) for one in record["rounds"]]
    _connect(config)
    settings = config.model_dump(mode="json")
    with tracked_run(
        config.tracking,
        root=config.root,
        name=output.name,
        settings=settings,
        tags={"job": "rounds", "config_hash": made_from, "base": config.base},
    ) as run:
        rounds = _rounds(config, work, run)
        best = best_of(rounds)
        record = {
            "config_hash": made_from,
            "config": settings,
            "run_id": None if run is None else run.run_id,
            "tracking_uri": None if run is None else run.uri,
            "metrics": best.metrics,
            "best_round": best.number,
            "rounds": [asdict(one) for one in rounds],
            **tracking.git_state(),
        }
        with whole_folder(output) as folder:
            shutil.copytree(best.model, folder, dirs_exist_ok=True)
            write_record(folder, record)
        if run is not None and config.tracking.register_as is not None:
            tags = {"kind": "base", "base": config.base, "config_hash": made_from}
            run.register(output, config=config.tracking, tags=tags)
    logger.info("wrote %s, the model of round %d", output, best.number)
    return rounds


def best_of(rounds: Sequence[Round]) -> Round:
    """Return the trained round of highest gold reward; warn if training has not helped."""
    start, *trained = rounds
    if not trained:
        raise DataError(
            "the first round has nothing to learn from: no answer was changed. Look at the rows "
            "under root/rounds: the Aligner may be untrained, or asked in the wrong template."
        )
    best = max(trained, key=lambda one: one.reward.mean)
    if best.reward.mean <= start.reward.mean:
        logger.warning(
            "no round is better than the model it began with: %s in round %d, %s before",
            *(best.reward, best.number, start.reward),
        )
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    return run_command(
        argv,
        job="rounds",
        about="Align a model in rounds of answers, corrections and training.",
        config_type=RoundsConfig,
        resolved=resolved,
        run=lambda config: _show(align(config)),
    )


def _connect(config: RoundsConfig) -> None:
    """Connect to Ray with room for the largest of the jobs."""
    job = training_job(config, Path("any"), config.base, parent=None)
    actors: list[ActorsConfig] = [config.decoding]
    if isinstance(config.pairs, AlignerPairs):
        actors.append(config.pairs.actors)
    cluster.connect(
        num_cpus=max(job.num_cpus, *(one.num_cpus for one in actors)),
        gpus=job.scaling.use_gpu or any(one.gpus_per_actor > 0 for one in actors),
    )


def _rounds(config: RoundsConfig, work: Path, run: TrackedRun | None) -> list[Round]:
    """Go through the rounds until it is time to stop."""
    metrics = _monitor(config, work / "round_0", config.base)
    rounds = [Round(number=0, model=config.base, metrics=metrics)]
    _log(run, rounds[0])
    for number in range(1, config.num_rounds + 1):
        folder = work / f"round_{number}"
        with _tracked_round(config, folder.name, run) as nested:
            pairs = _pairs(config, folder, number, rounds[-1].model)
            if not pairs["pairs/num"]:
                logger.warning("round %d: no answer is changed any more; stopping", number)
                break
            parent = None if nested is None else nested.run_id
            if config.reward_training is not None:
                train(reward_job(config, folder, rounds[-1].model, parent=parent))
            model = str(train(training_job(config, folder, rounds[-1].model, parent=parent)))
            metrics = {**pairs, **_monitor(config, folder, model)}
            rounds.append(Round(number=number, model=model, metrics=metrics))
            _log(nested, rounds[-1])
        _log(run, rounds[-1])
        logger.info("round %d: gold reward %s", number, rounds[-1].reward)
        if has_fallen([one.reward for one in rounds], config.monitor.patience):
            logger.warning(
                "round %d: the gold reward has fallen to %s; stopping. The best round so far is "
                "kept.",
                *(number, rounds[-1].reward),
            )
            break
    return rounds


def _pairs(config: RoundsConfig, folder: Path, number: int, model: str) -> dict[str, float]:
    """Make the preference pairs of a round; return numbers about them."""
    metrics = metrics_of(answer(answer_job(config, folder, number, model)))
    if isinstance(config.pairs, AlignerPairs):
        corrections = correct(correct_job(config, config.pairs, folder, number))
        metrics |= metrics_of(corrections)
        if metrics["corrections/gain"] <= 0:
            logger.warning(
                "round %d: the Aligner improves these answers no more (gold reward %+.2f ± %.2f). "
                "Train one on answers of this round's model, and list an Aligner per round.",
                *(number, metrics["corrections/gain"], metrics["corrections/gain_error"]),
            )
    return metrics


def _monitor(config: RoundsConfig, folder: Path, model: str) -> dict[str, float]:
    """Judge a model by the gold reward."""
    metrics = metrics_of(answer(monitor_job(config, folder, model)))
    return {name.replace("answers/", "monitor/"): value for name, value in metrics.items()}


def _tracked_round(
    config: RoundsConfig, name: str, run: TrackedRun | None
) -> AbstractContextManager[TrackedRun | None]:
    parent = None if run is None else run.run_id
    return tracked_run(
        config.tracking.model_copy(update={"parent": parent}),
        root=config.root,
        name=f"{Path(config.output).name} {name}",
        settings=config.model_dump(mode="json"),
        tags={"job": "round"},
    )


def _log(run: TrackedRun | None, found: Round) -> None:
    if run is not None:
        run.log_metrics(found.metrics, step=found.number)


def _show(rounds: Sequence[Round]) -> str:
    lines = ["round  gold reward      bad  pairs  copied"]
    for one in rounds:
        numbers = [one.metrics.get(name, 0) for name in ("pairs/num", "pairs/copied")]
        bad = one.metrics["monitor/bad_share"]
        lines.append(
            f"{one.number:5}  {one.reward!s:13}  {bad:5.1%}  {numbers[0]:5}  {numbers[1]:6}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
