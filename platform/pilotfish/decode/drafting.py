"""Drafted decoding: small LMs propose tokens, base and guides check all of them at once.

Shapes: R rows (a sequence with k drafts has k + 1), V vocabulary.

At every position of a request that names a drafter, the token is a coupling of the guided law and
the drafter's law, decided by numbers that depend on seed and position alone. Whether the drafter
had spoken before the base did changes how fast the token came, not which token it is. So the number
of drafts may follow the clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pilotfish.context import Context
from pilotfish.decode.batch import Batch
from pilotfish.decode.bias import Bias
from pilotfish.decode.coupling import couple
from pilotfish.decode.sampling import SamplingBatch
from pilotfish.decode.tape import Tape
from pilotfish.models.causal_lm import CausalLM
from pilotfish.noise import Purpose, invert_cdf


class _Turn:
    """Rows for which one drafter speaks: its powers and their sampling parameters."""

    def __init__(self, batch: Batch, rows: Sequence[int]) -> None:
        self.rows = rows
        running = [batch.running[batch.owners[row]] for row in rows]
        self.sampling = SamplingBatch([one.request.params for one in running], batch.device)
        self._bias = Bias(running, batch.device)
        powers = [one.draft_power for one in running]
        self._powers_R1 = torch.tensor(powers, device=batch.device, dtype=torch.float64)[:, None]

    def draw(
        self, logprobs_RV: Tensor, positions: Sequence[int], uniforms_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the drafter's tokens [R] and the law [R, V] that they are of.

        `positions` are those of all rows of the batch.
        """
        powered_RV = (logprobs_RV * self._powers_R1.to(logprobs_RV.dtype)).log_softmax(-1)
        powered_RV = self._bias.add(powered_RV, [positions[row] for row in self.rows])
        law_RV = self.sampling.probs(powered_RV)
        return self.sampling.settle(invert_cdf(law_RV, uniforms_R), powered_RV), law_RV


class _Group:
    """The sequences of a batch that share a drafter."""

    def __init__(self, batch: Batch, places: Sequence[int]) -> None:
        self.places = places
        self.rows = batch.rows_of(places)
        self.rows_R = torch.tensor(self.rows, device=batch.device)
        self.turn = _Turn(batch, self.rows)
        first_row = {place: batch.owners.index(place) for place in places}
        self.rounds: list[tuple[list[int], _Turn]] = []
        """Sequences that still draft, and their turn: token by token."""
        for depth in range(max(batch.num_drafts[place] for place in places)):
            speaking = [place for place in places if batch.num_drafts[place] > depth]
            rows = [first_row[place] + depth for place in speaking]
            self.rounds.append((speaking, _Turn(batch, rows)))


@dataclass(frozen=True, slots=True)
class Proposals:
    """What the drafters said in one round."""

    chains: dict[int, list[Context]]
    """By sequence: its context, then the same behind each of its drafted tokens."""
    laws: list[Tensor]
    """Per group: the drafter's law at each of its rows [R, V]."""
    heard: dict[int, list[int]]
    """By sequence: the token the drafter takes at each of its rows, the last one said too late to
    be checked in this round."""


class Drafting:
    """The drafters' part of a batch."""

    def __init__(self, batch: Batch, drafters: Mapping[str, CausalLM]) -> None:
        by_name: dict[str, list[int]] = {}
        for place, sequence in enumerate(batch.running):
            if sequence.request.draft is not None:
                by_name.setdefault(sequence.request.draft.drafter, []).append(place)
        self._batch = batch
        self._groups = [(drafters[name], _Group(batch, at)) for name, at in by_name.items()]

        num_rows = sum(len(group.rows) for _, group in self._groups)
        self.covers_all = num_rows == len(batch.owners)
        """Whether every row has a drafter, so that nothing is drawn from the guided law alone."""

    def __bool__(self) -> bool:
        return bool(self._groups)

    def propose(self, tape: Tape, positions: Sequence[int]) -> Proposals:
        """Let every drafter speak, ending with its law behind its own last token."""
        said = Proposals({}, [], {})
        for lm, group in self._groups:
            said.chains.update(self._speak(lm, group, positions, tape))
            contexts = [context for place in group.places for context in said.chains[place]]
            law = lm.forward(contexts, remember=True)
            numbers_R = self._batch.numbers(tape, group.rows, positions, Purpose.DRAFT)
            late_R, law_RV = group.turn.draw(law.logprobs_RV, positions, numbers_R)
            said.laws.append(law_RV)
            # What was said stays said: a second look at the same law may differ in the last bit.
            late, row = late_R.tolist(), 0
            for place in group.places:
                words = [context.token_ids[-1] for context in said.chains[place][1:]]
                row += len(words) + 1
                said.heard[place] = [*words, late[row - 1]]
        return said

    def _speak(
        self, lm: CausalLM, group: _Group, positions: Sequence[int], tape: Tape
    ) -> dict[int, list[Context]]:
        """Draw the drafts of a group, one more token of all its sequences at a time."""
        batch = self._batch
        chains = {place: [batch.live[place]] for place in group.places}
        for speaking, turn in group.rounds:
            law = lm.forward([chains[place][-1] for place in speaking], remember=True)
            numbers_R = batch.numbers(tape, turn.rows, positions, Purpose.DRAFT)
            tokens_R, _ = turn.draw(law.logprobs_RV, positions, numbers_R)
            for place, token in zip(speaking, tokens_R.tolist(), strict=True):
                chain = chains[place]
                chain.append(replace(chain[0], token_ids=[*chain[-1].token_ids, token]))
        return chains

    def couple(
        self,
        drawn_R: Tensor,
        target_RV: Tensor,
        said: Proposals,
        tape: Tape,
        positions: Sequence[int],
    ) -> Tensor:
        """Replace the tokens of drafted rows [R] by ones coupled with what the drafters said."""
        batch = self._batch
        for (_, group), law_RV in zip(self._groups, said.laws, strict=True):
            own_RV = target_RV[group.rows_R]
            heard = [word for place in group.places for word in said.heard[place]]
            found_R = couple(
                group.turn.sampling.probs(own_RV),
                law_RV,
                torch.tensor(heard, device=batch.device),
                batch.numbers(tape, group.rows, positions, Purpose.ACCEPT),
                batch.numbers(tape, group.rows, positions, Purpose.RESIDUAL),
            )
            found_R = group.turn.sampling.settle(found_R, own_RV)
            drawn_R = drawn_R.index_copy(0, group.rows_R, found_R)
        return drawn_R
