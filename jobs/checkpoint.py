"""Checkpoints of a training run: what resuming needs, whatever is trained.

A checkpoint is a folder that all workers wrote into: DeepSpeed's files hold the trained weights,
the optimizer and the schedule, and never what is frozen; beside them lie the position of the run
and the random state of each worker. Nothing here knows Ray.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.universal import to_universal
from pilotfish.errors import CheckpointError

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
_POSITION_NAME = "position.pt"
_DECIDED = ("betas", "weight_decay")
"""Settings of an optimizer that a config gives and a checkpoint holds too."""


@dataclass(slots=True)
class Position:
    """How far a run has come."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    """What the trainee keeps beside its engine; the same on every worker."""
    num_workers: int = 0
    """How many wrote this checkpoint."""


def save(engine: Any, folder: Path, position: Position) -> None:
    """Write this worker's part of a checkpoint; the names of the parts' files do not collide."""
    rank = dist.get_rank()
    engine.save_checkpoint(str(folder), tag=f"step_{position.step}", exclude_frozen_parameters=True)
    torch.save(_random_state(), _random_state_path(folder, rank))
    if rank == 0:
        position.num_workers = dist.get_world_size()
        torch.save(position, folder / _POSITION_NAME)


def resume(engine: Any, folder: Path) -> Position:
    """Restore weights, optimizer, schedule and random state of a checkpoint that all workers see.

    Learning rate, betas and weight decay stay those that the engine was started with, whatever the
    checkpoint's were. ZeRO's shards fit the number of workers that wrote them; for another number
    the first worker converts them. Then the data and the optimizer go on exactly, and random
    numbers as `_restore_random_state` says. Raises `CheckpointError`.
    """
    position = read_position(folder)
    if position.num_workers != dist.get_world_size() and engine.zero_optimization():
        logger.info("%d workers wrote the checkpoint; converting it", position.num_workers)
        source = to_universal(folder, tag=f"step_{position.step}")
        # DeepSpeed asks its config when it loads, and an engine must exist by then.
        engine._config.load_universal_checkpoint = True
    else:
        source = folder
    settings = _optimizer_settings(engine)
    # What is frozen is not in there.
    path, _ = engine.load_checkpoint(str(source), load_module_strict=False)
    if path is None:
        raise CheckpointError(
            f"{str(folder)!r} holds no DeepSpeed checkpoint. Train with force=true to start from "
            "the beginning."
        )
    _set_optimizer(engine, settings)
    _restore_random_state(folder, position.num_workers)
    logger.info("resuming behind step %d", position.step)
    return position


def read_position(folder: Path) -> Position:
    """Return how far a checkpoint's run had come. Raises `CheckpointError`."""
    path = folder / _POSITION_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no {_POSITION_NAME}, so it is not a checkpoint. Give a folder "
            "named checkpoint_... of a run, under train/ of the job's root."
        )
    return torch.load(path, weights_only=False)


def gathered_state(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return whole weights on the CPU, gathered from ZeRO-3 shards one by one.

    Of a module with frozen weights these are the trained ones.

    A collective: every worker calls it, and those that do not `keep` get an empty dictionary.
    Tied weights stay one tensor.
    """
    import deepspeed  # here: the driver imports this module and has no use for it

    weights = module.state_dict(keep_vars=True)
    if not all(parameter.requires_grad for parameter in module.parameters()):
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        sharded = [tensor] if hasattr(tensor, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            if keep:
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().cpu().clone()
                state[name] = copies[id(tensor)]
    return state


def _optimizer_settings(engine: Any) -> list[dict[str, Any]]:
    """Return what the config decides of each group of weights, less the learning rate."""
    if engine.lr_scheduler is None:
        return []
    groups = engine.lr_scheduler.optimizer.param_groups
    return [{name: group[name] for name in _DECIDED if name in group} for group in groups]


def _set_optimizer(engine: Any, settings: list[dict[str, Any]]) -> None:
    """Undo what restoring the optimizer did to its settings."""
    schedule = engine.lr_scheduler
    if schedule is None:
        return
    for group, decided in zip(schedule.optimizer.param_groups, settings, strict=True):
        group.update(decided)
    # A schedule remembers how many steps were taken, and no rates: this gives the rate of the step.
    schedule.step(schedule.last_batch_iteration)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _random_state_path(folder: Path, rank: int) -> Path:
    return folder / f"random_state_{rank:05d}.pt"


def _restore_random_state(folder: Path, num_saved: int) -> None:
    """Go on with this worker's random numbers.

    At another number of workers, those that were there before keep theirs, and each new one is
    seeded from the numbers of one that was: worker r from those of r modulo the number before.
    """
    rank = dist.get_rank()
    state = torch.load(_random_state_path(folder, rank % num_saved), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if rank >= num_saved:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
    elif "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
