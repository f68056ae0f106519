"""Which guides a request asks for, in which versions: from names in a body to pinned uses."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pilotfish.chain import Chain, make_chain
from pilotfish.errors import PromptError
from pilotfish.guides import GUIDES
from serve.catalog import Catalog, GuideEntry, GuideVersion
from serve.errors import APIError
from serve.wire import GuideUse, OnFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideAsk:
    """One guide as a body names it."""

    name: str
    weight: float | None = None
    """None is the guide's default."""
    version: str | None = None
    """None is whichever is served: the current one, or for a share of the requests the canary."""
    args: Mapping[str, Any] = field(default_factory=dict)
    on_failure: OnFailure = "fail"
    param: str = "guides"
    """The field that names it."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The guides of a request, in the order in which they act."""

    uses: Sequence[GuideUse]
    """All that were named, weight 0 included."""
    chain: Chain
    """The same by stage, of those that act."""
    off: frozenset[str] = frozenset()
    """Names of those that were asked for, but are switched off; their weight is 0."""

    def use(self, name: str) -> GuideUse:
        return next(use for use in self.uses if use.version.name == name)

    @property
    def tilts(self) -> list[GuideUse]:
        """The token guides that act."""
        return [self.use(name) for name in self.chain.tilts]


def choose(
    catalog: Catalog,
    model: str,
    asked: Sequence[GuideAsk] | None,
    *,
    also: Sequence[GuideAsk] = (),
    request_id: str,
) -> Chosen:
    """Return the guides of a request, each pinned to a version.

    `asked` (the body) goes before the suffix of `model`; None is not asked. `also` are added to
    them unless they are named already. A canary's share of the requests is decided by `request_id`.
    Raises `APIError`: 404 for a model, guide or version that is not served, 400 for weights and
    orders that cannot act, 503 for a guide that is switched off.
    """
    suffix = _suffix(catalog, model)
    if asked is None:
        asked = [GuideAsk(name=suffix)] if suffix else []
    named = {ask.name for ask in asked}
    if len(named) < len(asked):
        raise APIError(400, "Each guide can be named once.", param="guides", code="invalid_guides")
    asked = [*asked, *(ask for ask in also if ask.name not in named)]
    off = frozenset(ask.name for ask in asked if _is_off(catalog, ask))
    uses = [_use(catalog, ask, request_id) for ask in asked]
    uses = [use._replace(weight=0.0) if use.version.name in off else use for use in uses]
    try:
        chain = make_chain(
            {use.version.name: use.weight for use in uses},
            {use.version.name: GUIDES[use.version.kind] for use in uses},
        )
    except PromptError as error:
        raise APIError(400, str(error), param="guides", code="invalid_guides") from error
    return Chosen(uses, chain, off)


def _is_off(catalog: Catalog, ask: GuideAsk) -> bool:
    entry = _entry(catalog, ask)
    if entry.enabled or ask.weight == 0:
        return False
    if ask.on_failure != "base":
        message = (
            f"Guide {ask.name!r} is switched off. Set its on_failure to base, or leave it out."
        )
        raise APIError(503, message, param="guides", code="guide_disabled")
    return True


def _entry(catalog: Catalog, ask: GuideAsk) -> GuideEntry:
    entry = catalog.guide(ask.name)
    if entry is None:
        known = ", ".join(guide.name for guide in catalog.guides) or "none"
        message = f"No guide named {ask.name!r} is served; served: {known}."
        raise APIError(404, message, param=ask.param, code="guide_not_found")
    return entry


def _use(catalog: Catalog, ask: GuideAsk, request_id: str) -> GuideUse:
    entry = _entry(catalog, ask)
    version = _version(entry, ask.version, request_id)
    weight = version.weight if ask.weight is None else ask.weight
    return GuideUse(version, weight, dict(ask.args), ask.on_failure)


def _version(entry: GuideEntry, wanted: str | None, request_id: str) -> GuideVersion:
    if wanted is None:
        canary = entry.canary
        if canary is not None and share_of(request_id, entry.name) < canary.share:
            return canary.version
        return entry.current
    found = next((version for version in entry.versions if version.version == wanted), None)
    if found is None:
        served = ", ".join(version.version for version in entry.versions)
        message = f"Guide {entry.name!r} is served as version {served}, not {wanted!r}."
        raise APIError(404, message, param="guides", code="guide_version_not_found")
    return found


def share_of(request_id: str, name: str) -> float:
    """Return a number in [0, 1) that a request always has, and that is another for every guide."""
    digest = hashlib.blake2b(f"{name}\0{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _suffix(catalog: Catalog, model: str) -> str:
    if model not in catalog.model_ids():
        known = ", ".join(catalog.model_ids())
        message = f"The model {model!r} does not exist; served: {known}."
        raise APIError(404, message, param="model", code="model_not_found")
    return model.removeprefix(catalog.base.model_id).removeprefix(":")
