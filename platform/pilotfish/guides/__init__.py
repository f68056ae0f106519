"""Guides by kind. A new guide is one file here, one line in `GUIDES`, and one training config."""

from pathlib import Path
from typing import Any, ClassVar, Protocol

from pilotfish.config import Config, parse
from pilotfish.errors import CheckpointError
from pilotfish.guides.aligner import AlignerGuide
from pilotfish.guides.base import Guide, Stage, Staged
from pilotfish.guides.best_of_n import BestOfN, BlockwiseCD
from pilotfish.guides.card import GuideCard, read_card
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.host import GuideHost
from pilotfish.models.vocab import check_same_vocab


class GuideKind(Staged, Protocol):
    """What the classes in `GUIDES` have in common: how they are configured and loaded."""

    Settings: ClassVar[type[Config]]

    @classmethod
    def load(cls, folder: str | Path, card: GuideCard, settings: Any, host: GuideHost) -> Guide:
        """Load the guide. `settings` is the card's, as an instance of `Settings`."""
        ...


GUIDES: dict[str, type[GuideKind]] = {
    "genarm": GenARMGuide,
    "best_of_n": BestOfN,
    "blockwise": BlockwiseCD,
    "aligner": AlignerGuide,
}


def check_guide(folder: str | Path, *, base: str, base_vocab: str) -> GuideCard:
    """Return a guide's card if it can steer a base with this vocabulary fingerprint.

    Raises `CheckpointError` for a folder that is no guide, of an unknown kind or with settings the
    kind does not know, and `VocabMismatchError` for a token guide trained for other token ids.
    """
    card = read_card(folder)
    if card.kind not in GUIDES:
        raise CheckpointError(
            f"{str(folder)!r} holds a guide of kind {card.kind!r}; this version knows "
            f"{', '.join(GUIDES)}. Upgrade pilotfish, or pick another guide."
        )
    kind = GUIDES[card.kind]
    parse(kind.Settings, card.settings, source=f"settings of {folder}")
    if kind.stage is Stage.TOKEN:
        check_same_vocab(
            base=base, base_vocab=base_vocab, guide=str(folder), guide_vocab=card.vocab
        )
    return card


def load_guide(folder: str | Path, card: GuideCard, host: GuideHost) -> Guide:
    """Load the guide of a folder whose card was checked."""
    kind = GUIDES[card.kind]
    settings = parse(kind.Settings, card.settings, source=f"settings of {folder}")
    return kind.load(folder, card, settings, host)
