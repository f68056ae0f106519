"""Reading prompts: what the guided law says about tokens that are there already.

Shapes: R rows, each a position of a prompt.
"""

from collections.abc import Sequence

import torch

from pilotfish.context import Context, Prompt
from pilotfish.decode.running import Running
from pilotfish.decode.sequence import FinishReason, PromptEvent, Reading
from pilotfish.decode.telemetry import Tops
from pilotfish.decode.tilting import make_tilts


class PromptBatch:
    """The positions that are read in one step, in order: those of the first requests.

    Every row is what a request would be whose prompt ends before the token that is read.
    """

    def __init__(self, reading: Sequence[Running], budget: int, device: torch.device) -> None:
        """At most `budget` rows. A request that has nothing to read takes part with none."""
        self._parts: list[tuple[Running, range]] = []
        for one in reading:
            some = one.unread[:budget]
            if some or not one.unread:
                self._parts.append((one, some))
                budget -= len(some)
        rows = [(one, at) for one, some in self._parts for at in some]
        self.contexts = [_before(one, at) for one, at in rows]
        if rows:
            tokens = [one.context.token_ids[at] for one, at in rows]
            self.tokens_R = torch.tensor(tokens, device=device)
            self.tilts = make_tilts([one.guides for one, _ in rows], device)
            self.tops = Tops([one.request.params.top_logprobs for one, _ in rows], device)

    def advance(self, readings: Sequence[Reading]) -> list[PromptEvent]:
        """Take the rows' readings: they are no longer to be read."""
        events, rest = [], iter(readings)
        for one, some in self._parts:
            own = tuple(next(rest) for _ in some)
            one.unread = one.unread[len(some) :]
            ends = one.request.params.max_tokens == 0 and not one.unread
            first = some.start if some else len(one.request.prompt.token_ids)
            reason = FinishReason.LENGTH if ends else None
            events.append(PromptEvent(one.request.key, first, own, reason))
        return events


def _before(one: Running, position: int) -> Context:
    ids = one.context.token_ids[:position]
    return Context(one.request.key, Prompt(ids), ids)
