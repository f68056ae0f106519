"""Checkpoints of a training run: what resuming needs, and the finished model."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pilotfish.errors import CheckpointError

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"


@dataclass(slots=True)
class Position:
    """How far a run has come."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    """What the trainee keeps beside its engine; the same on every worker."""


class Checkpointer:
    """Writes one worker's part of a checkpoint, and reads it back.

    Ray Train merges the workers' folders into one; the names of their files do not collide.
    """

    def __init__(self, engine: Any, write_model: Callable[[Path], None]) -> None:
        """`write_model` writes the finished model into a folder; every worker calls it."""
        self._engine = engine
        self._write_model = write_model
        self._rank = dist.get_rank()

    def resume(self) -> Position | None:
        """Restore weights, optimizer, schedule and random state; None without a checkpoint."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            # What is frozen is not in there.
            path, client = self._engine.load_checkpoint(folder, load_module_strict=False)
            if path is None or client is None:
                raise CheckpointError(
                    f"{folder!r} holds no DeepSpeed checkpoint. Train with force=true to start "
                    "from the beginning."
                )
            self._restore_random_state(Path(folder))
        logger.info("resuming behind step %d", client["step"])
        return Position(client["step"], client["history"], client["state"])

    @contextmanager
    def write(self, position: Position, *, export: bool) -> Iterator[str]:
        """Give a folder that holds this worker's part; with `export`, the finished model too."""
        with tempfile.TemporaryDirectory(prefix="pilotfish-checkpoint-") as folder:
            self._engine.save_checkpoint(
                folder,
                tag=f"step_{position.step}",
                client_state=asdict(position),
                exclude_frozen_parameters=True,
            )
            torch.save(_random_state(), self._random_state_path(Path(folder)))
            if export:
                self._write_model(Path(folder) / MODEL_FOLDER)
            yield folder

    def _random_state_path(self, folder: Path) -> Path:
        return folder / f"random_state_{self._rank:05d}.pt"

    def _restore_random_state(self, folder: Path) -> None:
        state = torch.load(self._random_state_path(folder), weights_only=True)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


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


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
