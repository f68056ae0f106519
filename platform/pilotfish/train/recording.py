"""A proxy that remembers what it was asked, so that it can learn from its episodes.

Shapes: R rows, V vocabulary, K candidates padded on the right, N rows with a choice (or decisions
of an episode), M candidates of all of them, F features, D hidden size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pilotfish.context import Context
from pilotfish.decode.sequence import Request, TokenEvent
from pilotfish.guides.base import Stage, Step
from pilotfish.guides.proxy_rlhf import Judgement, ProxyGuide
from pilotfish.train.experience import Episode, Offers, ending


@dataclass(frozen=True, slots=True)
class _Page:
    """What was asked in one step about all rows that had a choice."""

    ids_M: NDArray[np.int64]
    features_MF: NDArray[np.float16]
    logprobs_M: NDArray[np.float64]
    mass_M: NDArray[np.float64]
    states_ND: NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One row of a page: where its candidates stand, and its state."""

    page: _Page
    candidates: slice
    row: int


class RecordingProxy:
    """A `ProxyGuide` to the engine, the same bit for bit, that also keeps what it was asked.

    Records are found by sequence and position; one that is made again, since the sequence had lost
    its slot or a draft was refused, replaces the first. They stay until `episode` takes them.
    """

    stage: ClassVar[Stage] = Stage.TOKEN
    takes_weight: ClassVar[bool] = False
    needs_hidden = True
    reads_base = True

    def __init__(self, guide: ProxyGuide, *, dtype: torch.dtype = torch.float16) -> None:
        """`dtype` is that of recorded features and states."""
        self._guide = guide
        self._dtype = dtype
        self._asked: dict[int, dict[int, _Asked]] = {}
        """By sequence, and by position in its completion."""

    def begin(self, contexts: Sequence[Context]) -> None:
        self._guide.begin(contexts)

    @torch.inference_mode()
    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: None) -> Tensor:
        judgement = self._guide.judge(logprobs_RV, step)
        if judgement.rows:
            self._record(judgement, step)
        return self._guide.follow(judgement, logprobs_RV, step)

    def release(self, keys: Sequence[int]) -> None:
        """Records outlive their sequence: its last token is known only now."""
        self._guide.release(keys)

    def episode(self, request: Request, events: Sequence[TokenEvent]) -> Episode:
        """Return the episode of a request, and forget it; `events` are all the tokens it drew."""
        asked = self._asked.pop(request.key, {})
        positions = sorted(position for position in asked if position < len(events))
        taken = [events[position] for position in positions]
        base_logprobs = np.array([event.base_logprob for event in events])
        spans = itertools.pairwise([*positions, len(events)])
        return Episode(
            prompt_ids=np.array(request.prompt.token_ids, dtype=np.int32),
            completion_ids=np.array([event.token_id for event in events], dtype=np.int32),
            finish_reason=ending(events),
            positions_N=np.array(positions, dtype=np.int32),
            logprobs_N=np.array([event.logprob for event in taken], dtype=np.float32),
            base_logprobs_N=np.array(
                [base_logprobs[start:end].sum() for start, end in spans], dtype=np.float32
            ),
            offers=self._offers(
                [asked[position] for position in positions], [event.token_id for event in taken]
            ),
        )

    def _record(self, judgement: Judgement, step: Step) -> None:
        assert step.hidden_RD is not None, "a guide with needs_hidden is given hidden states"
        found, rows = judgement.candidates, judgement.rows
        counts = [found.counts[row] for row in rows]
        places_K = torch.arange(found.ids_RK.shape[1], device=found.ids_RK.device)
        real_NK = places_K < found.count_R[rows][:, None]
        page = _Page(
            ids_M=found.ids_RK[rows][real_NK].cpu().numpy(),
            features_MF=judgement.features_NKF[real_NK].to(self._dtype).cpu().numpy(),
            logprobs_M=found.logprobs_RK[rows][real_NK].cpu().numpy(),
            mass_M=found.mass_RK[rows][real_NK].cpu().numpy(),
            states_ND=step.hidden_RD[rows].to(self._dtype).cpu().numpy(),
        )
        edges = itertools.pairwise(itertools.accumulate(counts, initial=0))
        for place, (row, (start, end)) in enumerate(zip(rows, edges, strict=True)):
            context = step.contexts[row]
            position = len(context.token_ids) - len(context.prompt.token_ids)
            asked = self._asked.setdefault(context.key, {})
            asked[position] = _Asked(page, slice(start, end), place)

    def _offers(self, asked: Sequence[_Asked], token_ids: Sequence[int]) -> Offers:
        head = self._guide.head
        ids = [one.page.ids_M[one.candidates] for one in asked]
        choices = [own.tolist().index(token) for own, token in zip(ids, token_ids, strict=True)]
        # The first entry gives an episode without decisions its width.
        features = [np.zeros((0, head.num_features), np.float16)]
        states = [np.zeros((0, head.block_sizes[0]), np.float16)]
        return Offers(
            counts_N=np.array([len(own) for own in ids], dtype=np.int32),
            choices_N=np.array(choices, dtype=np.int32),
            features_MF=np.concatenate(
                features + [one.page.features_MF[one.candidates] for one in asked]
            ),
            logprobs_M=np.concatenate(
                [np.zeros(0), *(one.page.logprobs_M[one.candidates] for one in asked)]
            ),
            mass_M=np.concatenate(
                [np.zeros(0), *(one.page.mass_M[one.candidates] for one in asked)]
            ),
            states_ND=np.concatenate(
                states + [one.page.states_ND[one.row : one.row + 1] for one in asked]
            ),
        )
