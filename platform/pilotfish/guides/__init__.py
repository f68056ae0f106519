"""Guides by kind. A new guide is one file here, one line in `GUIDES`, and one training config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from transformers import PreTrainedTokenizerBase

from pilotfish.config import Config, parse
from pilotfish.errors import CheckpointError, ConfigError
from pilotfish.guides.aligner import AlignerGuide
from pilotfish.guides.args_search import ARGSGuide
from pilotfish.guides.base import Guide, Stage, Staged, TokenGuide
from pilotfish.guides.best_of_n import BestOfN, BlockwiseCD
from pilotfish.guides.card import GuideCard, read_card
from pilotfish.guides.controlled_decoding import ControlledDecodingGuide
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.host import GuideHost
from pilotfish.guides.own_template import OwnTemplate
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.guides.proxy_tuning import ProxyTuningGuide
from pilotfish.guides.scoring import DraftScorer, Judges
from pilotfish.guides.transfer_q import TransferQGuide
from pilotfish.models.vocab import check_same_vocab


class GuideKind(Staged, Protocol):
    """What the classes in `GUIDES` have in common: how they are configured and loaded."""

    Settings: ClassVar[type[Config]]
    varies: ClassVar[tuple[str, ...]]
    """Settings that a loaded guide can have anew without loading anything."""

    @classmethod
    def load(cls, folder: str | Path, card: GuideCard, settings: Any, host: GuideHost) -> Guide:
        """Load the guide. `settings` is the card's, as an instance of `Settings`."""
        ...

    def vary(self, settings: Any) -> Guide:
        """Return a guide with these settings that shares all models with this one.

        They differ from those it was loaded with in what `varies` alone.
        """
        ...


GUIDES: dict[str, type[GuideKind]] = {
    "args": ARGSGuide,
    "controlled_decoding": ControlledDecodingGuide,
    "genarm": GenARMGuide,
    "proxy_tuning": ProxyTuningGuide,
    "transfer_q": TransferQGuide,
    "proxy": ProxyGuide,
    "best_of_n": BestOfN,
    "blockwise": BlockwiseCD,
    "aligner": AlignerGuide,
}
_REMOTE = ("genarm",)


def check_guide(folder: str | Path, *, base: str, base_vocab: str) -> GuideCard:
    """Return a guide's card if it can steer a base with this vocabulary fingerprint.

    Raises `CheckpointError` for a folder that is no guide or of an unknown kind, `ConfigError` for
    a card whose settings, gate or template the kind cannot honour, and `VocabMismatchError` for a
    token guide trained for other token ids.
    """
    card = read_card(folder)
    if card.kind not in GUIDES:
        raise CheckpointError(
            f"{str(folder)!r} holds a guide of kind {card.kind!r}; this version knows "
            f"{', '.join(GUIDES)}. Upgrade pilotfish, or pick another guide."
        )
    _check_card(card, str(folder))
    if GUIDES[card.kind].stage is Stage.TOKEN:
        check_same_vocab(
            base=base, base_vocab=base_vocab, guide=str(folder), guide_vocab=card.vocab
        )
    return card


def make_card(fields: Mapping[str, Any], *, base: str, base_vocab: str) -> GuideCard:
    """Return the card of a guide without a folder: one made of models that lie elsewhere.

    `fields` are those of the card; paths in its settings are as they stand. Raises `ConfigError`
    for an unknown kind, field or setting.
    """
    known = {"base": base, "vocab": base_vocab, **fields}
    card = parse(GuideCard, known, source="guide")
    if card.kind not in GUIDES:
        raise ConfigError(f"kind is {card.kind!r}, wanted one of {', '.join(GUIDES)}.")
    _check_card(card, f"a guide of kind {card.kind}")
    return card


def check_remote(card: GuideCard, guide: str) -> None:
    """Raise `ConfigError` unless a guide of this kind can have its LM somewhere else."""
    if card.kind not in _REMOTE:
        raise ConfigError(
            f"{guide!r} is a guide of kind {card.kind!r}, which has no single LM that could run "
            f"elsewhere, as {', '.join(_REMOTE)} has. Place it with the base: placement: colocated."
        )


def _check_card(card: GuideCard, name: str) -> None:
    kind = GUIDES[card.kind]
    parse(kind.Settings, card.settings, source=f"settings of {name}")
    if kind.stage is not Stage.TOKEN:
        _refuse_wrappers(name, card)


def load_guide(folder: str | Path, card: GuideCard, host: GuideHost) -> Guide:
    """Load the guide of a folder whose card was checked, prompted and gated as the card says."""
    _check_card(card, str(folder))
    kind = GUIDES[card.kind]
    if host.remote is not None:
        check_remote(card, str(folder))
    settings = parse(kind.Settings, card.settings, source=f"settings of {folder}")
    loaded = kind.load(folder, card, settings, host)
    if kind.stage is not Stage.TOKEN:
        return loaded
    own = host.load_tokenizer(folder) if card.template == "own" else None
    return _wrap(cast(TokenGuide, loaded), own, card.gate)


def variant_name(guide: str, args: Mapping[str, Any]) -> str:
    """Return what a guide with other settings is called, such as `proxy{"p_t":0.9}`."""
    written = json.dumps(args, sort_keys=True, separators=(",", ":"))
    return guide + written if args else guide


def vary_card(card: GuideCard, args: Mapping[str, Any]) -> GuideCard:
    """Return the card of a loaded guide's variant, with the settings and the `gate` of `args`.

    Raises `ConfigError` for what cannot change without loading anything, and for bad values.
    """
    kind = GUIDES[card.kind]
    can = (*kind.varies, "gate") if kind.stage is Stage.TOKEN else kind.varies
    fixed = [name for name in args if name not in can]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} of a guide of kind {card.kind!r} cannot change while it is "
            f"loaded; what can: {', '.join(can)}."
        )
    changed = {name: value for name, value in args.items() if name != "gate"}
    fields = {
        **card.model_dump(),
        "gate": args.get("gate", card.gate),
        "settings": {**card.settings, **changed},
    }
    varied = parse(GuideCard, fields, source=f"a variant of kind {card.kind}")
    _check_card(varied, f"a variant of kind {card.kind}")
    return varied


def vary_guide(guide: Guide, card: GuideCard, args: Mapping[str, Any]) -> Guide:
    """Return a loaded guide with other decode-time settings; all models and caches are shared.

    `card` is the one it was loaded with. Raises what `vary_card` raises.
    """
    varied, kind, own = vary_card(card, args), GUIDES[card.kind], None
    if isinstance(guide, Gated):
        guide = guide.guide
    if isinstance(guide, OwnTemplate):
        guide, own = guide.guide, guide.tokenizer
    settings = parse(kind.Settings, varied.settings, source=f"a variant of kind {card.kind}")
    changed = cast(GuideKind, guide).vary(settings)
    if kind.stage is not Stage.TOKEN:
        return changed
    return _wrap(cast(TokenGuide, changed), own, varied.gate)


def scorer_of(guide: Guide) -> DraftScorer | None:
    """Return what judges whole answers in a guide with a reward or value model; None in others."""
    while isinstance(guide, Gated | OwnTemplate):
        guide = guide.guide
    return guide.scorer if isinstance(guide, Judges) else None


def _wrap(guide: TokenGuide, own: PreTrainedTokenizerBase | None, gate: float | None) -> TokenGuide:
    """Prompt a guide its own way, if it has a tokenizer for that, and gate it, if need be."""
    if own is not None:
        guide = OwnTemplate(guide, own)
    return guide if gate is None else Gated(guide, gate)


def _refuse_wrappers(guide: str, card: GuideCard) -> None:
    """A gate and a template of its own mean something for token guides alone."""
    for name, value, off in (("gate", card.gate, None), ("template", card.template, "base")):
        if value != off:
            raise ConfigError(
                f"{name} is {value!r} in the card of {guide!r}, but a guide of kind "
                f"{card.kind!r} tilts no tokens. Remove {name} from its guide.json."
            )
