"""Ranks that share the weights of one model decode together, though their answers differ in length.

A model partitioned by ZeRO-3 gathers its weights in every forward, from all ranks. A decode engine
makes as many forwards as its own answers need, so a rank that has finished would leave the others
waiting for its share of the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def lockstep(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block each rank may run the model as often as it likes; all ranks enter and leave.

    The parts of a model that are called by themselves (the decoder, the output and the input
    embedding) announce each forward to the other ranks, which join in with a forward of no
    consequence. A rank that leaves the block goes on joining until every rank has left.
    """
    meetings = _Meetings(model)
    with meetings.attend():
        yield
        # Not after an error: the group is lost then, and whoever waits for it is told by Ray.
        meetings.adjourn()


class _Meetings:
    """Rounds of all ranks, in each of which one part of the model runs once on every rank."""

    def __init__(self, model: PreTrainedModel) -> None:
        head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        self._device, dtype = model.device, model.dtype
        token = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        hidden = torch.zeros((1, head.in_features), dtype=dtype, device=self._device)
        # By cost: ranks that ask for different parts are soon in step again, at little cost.
        self._parts: list[tuple[nn.Module, Callable[[], Any]]] = [
            (embedding, lambda: embedding(token)),
            (head, lambda: head(hidden)),
            (model.base_model, lambda: model.base_model(input_ids=token, use_cache=False)),
        ]
        self._running: nn.Module | None = None

    @contextmanager
    def attend(self) -> Iterator[None]:
        """Hold a meeting before each forward of a part."""
        with ExitStack() as hooks:
            for part, _ in self._parts:
                # Before ZeRO's own hook, which gathers the weights.
                before = part.register_forward_pre_hook(self._before, prepend=True)
                after = part.register_forward_hook(self._after)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            yield

    def adjourn(self) -> None:
        """Join the forwards of the other ranks until no rank has any left."""
        self._meet(None)

    def _before(self, part: nn.Module, _: Any) -> None:
        if self._running is None:  # else it is a piece of the part that runs, as the embedding is
            self._meet(part)
            self._running = part

    def _after(self, part: nn.Module, _: Any, __: Any) -> None:
        if self._running is part:
            self._running = None

    def _meet(self, wanted: nn.Module | None) -> None:
        """Run what other ranks want until it is the turn of `wanted`."""
        while True:
            votes = torch.tensor([int(part is wanted) for part, _ in self._parts])
            votes = votes.to(self._device)
            dist.all_reduce(votes)
            turn = next((at for at, count in enumerate(votes.tolist()) if count), None)
            if turn is None:
                return
            part, join = self._parts[turn]
            if part is wanted:
                return
            self._running = part
            with torch.inference_mode():
                join()
