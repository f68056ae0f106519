"""Which guides act on a request, and when: token guides, then one selection, then revisions."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pilotfish.errors import PromptError
from pilotfish.guides.base import Stage, Staged

_ACTS = {
    Stage.TOKEN: "tilts tokens",
    Stage.SELECTION: "selects among drafts",
    Stage.REVISION: "revises finished answers",
}


@dataclass(frozen=True, slots=True)
class Chain:
    """The guides of a request by stage; guides of weight 0 are gone."""

    tilts: Mapping[str, float] = field(default_factory=dict)
    """Weight by token guide, in the order of tilting."""
    selection: str | None = None
    revisions: tuple[str, ...] = ()
    """In order: each revises what the one before it wrote."""


def make_chain(weights: Mapping[str, float], guides: Mapping[str, Staged | type[Staged]]) -> Chain:
    """Split weights by name, in order, into a chain of the guides that are loaded.

    Raises `PromptError` for a guide that is not loaded, for a weight that it does not take, and for
    an order in which the guides cannot act.
    """
    for name, weight in weights.items():
        _check_weight(name, weight, guides)
    names = [name for name, weight in weights.items() if weight != 0]
    for before, name in itertools.pairwise(names):
        _check_order(before, name, guides)
    tilts = {name: weights[name] for name in names if guides[name].stage is Stage.TOKEN}
    selections = [name for name in names if guides[name].stage is Stage.SELECTION]
    revisions = [name for name in names if guides[name].stage is Stage.REVISION]
    return Chain(tilts, next(iter(selections), None), tuple(revisions))


def _check_weight(name: str, weight: float, guides: Mapping[str, Staged | type[Staged]]) -> None:
    if name not in guides:
        known = ", ".join(guides) or "none"
        raise PromptError(f"no guide named {name!r} is loaded; loaded: {known}.")
    if not guides[name].takes_weight and weight not in (0, 1):
        raise PromptError(
            f"guide {name!r} is on or off and has no strength: its weight is {weight}, wanted 0 "
            "or 1."
        )
    if not math.isfinite(weight):
        raise PromptError(f"guide {name!r} has weight {weight}, wanted a finite number.")


def _check_order(before: str, name: str, guides: Mapping[str, Staged | type[Staged]]) -> None:
    """Neighbours suffice: stages that never fall from one guide to the next never fall at all."""
    earlier, later = guides[before].stage, guides[name].stage
    if later < earlier:
        raise PromptError(
            f"guide {name!r} {_ACTS[later]}, but stands behind {before!r}, which "
            f"{_ACTS[earlier]}. Put {name!r} first, or give one of them weight 0."
        )
    if later is earlier is Stage.SELECTION:
        raise PromptError(
            f"guides {before!r} and {name!r} both select among drafts, and a chain has one "
            "selection. Leave one out, or give it weight 0."
        )
