"""A gate: let a guide act only where the base hesitates.

Shapes: R rows, V vocabulary, N open rows.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pilotfish.context import Context, Prompt
from pilotfish.errors import ConfigError
from pilotfish.guides.base import ChecksPrompts, Step, TokenGuide, max_length_of, reads_base


class Gated:
    """A token guide that tilts rows on which the entropy of the base's law exceeds a threshold.

    Other rows pass as they are, and cost the guide nothing: its forwards start when the entropy is
    known. What it missed is fed when the gate opens next. Leaves the note `gate_open` (1 or 0) per
    row; the guide's own notes read 0 on closed rows.
    """

    def __init__(self, guide: TokenGuide, threshold: float) -> None:
        """`threshold` is in nats. Raises `ConfigError` unless it is a number >= 0."""
        if math.isnan(threshold) or threshold < 0:
            raise ConfigError(f"gate is {threshold}, wanted a number of nats >= 0.")
        self.needs_hidden = guide.needs_hidden
        self.reads_base = reads_base(guide)
        self.num_rows = 0
        """Rows seen so far."""
        self.num_open = 0
        """Rows tilted so far."""
        self.guide = guide
        self._threshold = threshold

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise `PromptError` where the guide itself does."""
        if isinstance(self.guide, ChecksPrompts):
            self.guide.check_prompt(prompt)

    @property
    def max_length(self) -> int:
        return max_length_of(self.guide)

    def begin(self, contexts: Sequence[Context]) -> None:
        """Start nothing: which rows are open is not known yet."""

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: None) -> Tensor:
        assert step.base_RV is not None, "a gate reads the base's law"
        open_R = torch.special.entr(step.base_RV.exp()).sum(-1) > self._threshold
        rows_N = open_R.nonzero()[:, 0]
        self.num_rows += len(open_R)
        self.num_open += len(rows_N)
        step.notes["gate_open"] = open_R.to(logprobs_RV.dtype)
        if len(rows_N) == 0:
            return logprobs_RV
        if len(rows_N) == len(open_R):
            return self.guide.tilt(logprobs_RV, step, self.guide.begin(step.contexts))
        some = _rows(step, rows_N)
        tilted_NV = self.guide.tilt(logprobs_RV[rows_N], some, self.guide.begin(some.contexts))
        for name, note_N in some.notes.items():
            note_R = note_N.new_zeros((len(open_R), *note_N.shape[1:]))
            step.notes[name] = note_R.index_copy(0, rows_N, note_N)
        return logprobs_RV.index_copy(0, rows_N, tilted_NV)

    def release(self, keys: Sequence[int]) -> None:
        self.guide.release(keys)


def _rows(step: Step, rows_N: Tensor) -> Step:
    """Return the step of some rows only, with notes of its own."""
    return replace(
        step,
        contexts=[step.contexts[row] for row in rows_N.tolist()],
        weights_R=step.weights_R[rows_N],
        hidden_RD=None if step.hidden_RD is None else step.hidden_RD[rows_N],
        base_RV=None if step.base_RV is None else step.base_RV[rows_N],
        notes={},
    )
