"""One request while it is decoded."""

from pilotfish.context import Context
from pilotfish.decode.detokenize import TextStream
from pilotfish.decode.sequence import FinishReason, Request
from pilotfish.models.rows import prefix
from pilotfish.noise import request_key

_PRIOR, _MEMORY = 0.7, 0.1


class Running:
    """A request, its context, and what decides when it ends."""

    def __init__(
        self,
        request: Request,
        *,
        seed: int,
        end_ids: frozenset[int],
        text: TextStream | None,
        arrival: int = 0,
    ) -> None:
        """`text` follows the completion where stop strings were asked for."""
        self.request = request
        self.arrival = arrival
        self.context = Context(
            request.key, request.prompt, [*request.prompt.token_ids, *request.completed]
        )
        self.noise_key = request_key(seed, request.prompt.token_ids)
        self.guides = tuple((name, w) for name, w in request.guides.items() if w != 0)
        """Guides in order of tilting. Weight 0 is no guide, so that it is the base exactly."""
        self.accepted = _PRIOR
        """How often a drafted token is kept, lately."""
        self.unread = _to_read(request)
        """Positions of the prompt that are still to be read."""
        params = request.params
        self.end_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else end_ids
        )
        """Ids that end the completion."""
        self._text = text
        for token_id in request.completed:
            self._push(token_id)

    @property
    def num_completed(self) -> int:
        return len(self.context.token_ids) - len(self.context.prompt.token_ids)

    @property
    def draft_power(self) -> float:
        """The power of the drafter's law that comes closest to the guided law.

        If base and guide agreed, `p_base * p_guide^w` would be `p_guide^(1 + w)`; a drafter that
        does not steer this request stands for the guided law as it is.
        """
        draft = self.request.draft
        assert draft is not None
        return 1 + max(0.0, dict(self.guides).get(draft.guide or "", 0.0))

    @property
    def reads(self) -> bool:
        """Whether it has to read, or to say that there is nothing to read, before all else."""
        return bool(self.unread) or self.request.params.max_tokens == 0

    @property
    def start(self) -> Context:
        """What should be cached before its next turn: all of it, or what it reads behind."""
        return prefix(self.context, self.unread.start) if self.reads else self.context

    @property
    def num_left(self) -> int:
        """Tokens until `max_tokens`."""
        return self.request.params.max_tokens - self.num_completed

    def note_draft(self, accepted: bool) -> None:
        """Remember whether a drafted token was kept."""
        self.accepted += _MEMORY * (accepted - self.accepted)

    def give_up(self, guide: str) -> None:
        """Go on as if the guide had weight 0."""
        self.guides = tuple((name, w) for name, w in self.guides if name != guide)

    def append(self, token_id: int) -> FinishReason | None:
        """Take one token and say whether the completion ends with it."""
        self.context.token_ids.append(token_id)
        self._push(token_id)
        if token_id in self.end_ids or (self._text is not None and self._text.stopped):
            return FinishReason.STOP
        if self.num_completed >= self.request.params.max_tokens:
            return FinishReason.LENGTH
        return None

    def _push(self, token_id: int) -> None:
        if self._text is not None:
            self._text.push(token_id)


def _to_read(request: Request) -> range:
    if request.read_from is None:
        return range(0)
    return range(max(1, request.read_from), len(request.prompt.token_ids))
