"""One worker's share of learning from rows: any objective, through one DeepSpeed engine.

Shapes: B rows, T positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jobs.checkpoint import gathered_state
from jobs.config import JobConfig
from jobs.dataset import ROW_KINDS, Prepared
from jobs.engine import partitioned_loading, start_engine
from jobs.frozen_base import FrozenBase, load_frozen_base
from jobs.length_check import GuidedLengths, length_report
from jobs.model import build_learner, build_model, merged
from jobs.steps import NUM_TOKENS, means, reduced, summed_over_workers
from pilotfish.chat import stop_ids
from pilotfish.data.collate import identity
from pilotfish.train.export import save_model
from pilotfish.train.metrics import Tally, add
from pilotfish.train.objectives import (
    OBJECTIVES,
    AlignerConfig,
    GenARMConfig,
    LossOutput,
    Models,
)


class SupervisedTraining:
    """See `jobs.steps.Trainee`."""

    def __init__(self, config: JobConfig, prepared: Prepared) -> None:
        self._config = config
        self._prepared = prepared
        self._objective = OBJECTIVES[config.objective.kind]
        torch.manual_seed(config.seed)
        on_cpu = not config.scaling.use_gpu
        base: FrozenBase | None = None
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        if config.needs_base:
            # The workers of a tensor group see the same rows.
            base = load_frozen_base(config.frozen_base, on_cpu=on_cpu)
            self._rank, self._size = base.data_rank, base.data_size
        self.total_steps = config.train.total_steps(len(prepared.train))
        self._batches = prepared.batches(
            batch_size=config.train.batch_size,
            seed=config.seed,
            world_size=self._size,
            rank=self._rank,
        )
        self._num_copied = 0
        if isinstance(config.objective, AlignerConfig):
            self._num_copied = round(config.objective.identity_share * self.total_steps)
        with partitioned_loading(config.started.init, config.train, on_cpu=on_cpu):
            self._learner = build_learner(
                config.started,
                prepared.tokenizer,
                head=self._objective.head,
                dtype=config.train.dtype,
            )
        trained = (one for one in self._learner.parameters() if one.requires_grad)
        # Partitioned ones have no elements here.
        self._num_trained = sum(getattr(one, "ds_numel", one.numel()) for one in trained)
        self.engine = start_engine(
            self._learner,
            config.train,
            total_steps=self.total_steps,
            on_cpu=on_cpu,
            num_alike=dist.get_world_size() // self._size,
        )
        self._models = Models(learner=self.engine, base=None if base is None else base.logits)
        self._lengths = None if base is None else self._length_check(base)

    def step(self, number: int) -> dict[str, Tally]:
        """Take one optimizer step; return this worker's tallies."""
        self.engine.train()
        examples = self._batches.examples(number)
        if number < self._num_copied:
            examples = [identity(example) for example in examples]
        batches = self._collated(examples, self.engine.train_micro_batch_size_per_gpu())
        units = [self._objective.units(batch) for batch in batches]
        total_units = summed_over_workers(self.engine, torch.tensor([float(sum(units))]))[0]
        # DeepSpeed averages over workers and passes as if all held the same number of units.
        share = dist.get_world_size() * len(batches) / total_units
        tallies: dict[str, Tally] = {}
        for batch, num in zip(batches, units, strict=True):
            output = self._loss(batch)
            self.engine.backward(output.loss * (num * share))
            self.engine.step()
            tokens = Tally(float(batch.attention_mask_BT.sum()), 1.0)
            tallies = add(tallies, {**output.metrics, NUM_TOKENS: tokens})
        return tallies

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics over all held-out rows."""
        self.engine.eval()
        rows = sorted(self._prepared.heldout, key=len)
        size = self.engine.train_micro_batch_size_per_gpu()
        chunk = size * self._size
        tallies: dict[str, Tally] = {}
        for start in range(0, len(rows), chunk):
            mine = rows[start : start + chunk][self._rank :: self._size]
            # ZeRO-3 gathers weights in every forward pass, so all workers must run as many: one
            # without rows runs a row that does not count.
            [batch] = self._collated(mine or rows[:1], size)
            metrics = self._loss(batch).metrics
            tallies = add(tallies, metrics if mine else dict.fromkeys(metrics, Tally(0.0, 0.0)))
        num_alike = dist.get_world_size() // self._size  # workers that saw the same rows
        summed = reduced(self.engine, tallies)
        report = means("eval", {name: one / num_alike for name, one in summed.items()})
        report["trainable_parameters"] = float(self._num_trained)
        if self._lengths is not None:
            weights = gathered_state(self._learner.model, keep=True)
            rows: Sequence[Any] = self._prepared.heldout
            found = self._lengths.tally(rows, weights)
            report |= length_report(reduced(self.engine, found))
        return report

    def write(self, folder: Path) -> None:
        """Write the whole model, adapters merged."""
        is_first = dist.get_rank() == 0
        state = gathered_state(self._learner, keep=is_first)
        if is_first:
            # Adapters take a model without them; otherwise the one at hand will do.
            model = self._learner.model if self._config.started.lora is None else None
            write_trained(folder, self._config, self._prepared.tokenizer, state, model=model)

    def state(self) -> dict[str, Any]:
        """Return the position in the rows."""
        return {"batches": dict(self._batches.state())}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position in the rows."""
        if state:
            self._batches.resume(state["batches"])

    def _length_check(self, base: FrozenBase) -> GuidedLengths | None:
        objective, tokenizer = self._config.objective, self._prepared.tokenizer
        if not isinstance(objective, GenARMConfig) or objective.length_check is None:
            return None
        guide = build_model(
            self._config.started.init, tokenizer, head="lm", dtype=self._config.train.dtype
        )
        torch.nn.Module.to(guide, self.engine.device)  # transformers' wrapper hides its signature
        return GuidedLengths(
            objective.length_check,
            base,
            guide,
            end_ids=stop_ids(tokenizer, base.model.generation_config),
            seed=self._config.seed,
        )

    def _loss(self, batch: Any) -> LossOutput:
        batch = batch.to(self.engine.device)
        return self._objective.loss(self._models, batch, self._config.objective)

    def _collated(self, rows: Sequence[Any], size: int) -> list[Any]:
        collate = ROW_KINDS[self._objective.rows].collate
        assert collate is not None, "rows that are learned from"
        # Padding is masked everywhere, so any id will do.
        return [collate(rows[at : at + size], 0) for at in range(0, len(rows), size)]


def write_trained(
    folder: Path,
    config: JobConfig,
    tokenizer: PreTrainedTokenizerBase,
    trained: Mapping[str, Tensor],
    *,
    model: PreTrainedModel | None = None,
) -> None:
    """Write the whole model that was trained, from trained tensors by name in the learner.

    Of `model`, if it is given, the architecture alone is read, and `trained` is all of its weights.
    """
    trained = {name.removeprefix("model."): tensor for name, tensor in trained.items()}
    if model is None:
        head = OBJECTIVES[config.objective.kind].head
        model = merged(config.started, tokenizer, trained, head=head, dtype=config.train.dtype)
        trained = model.state_dict()
    save_model(folder, model, tokenizer, state=trained)
