"""Guides by kind. A new guide is one file here, one line in `GUIDES`, and one training config."""

from pathlib import Path

import torch

from pilotfish.errors import CheckpointError
from pilotfish.guides.card import GuideCard, read_card
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import Dtype, load_frozen
from pilotfish.models.vocab import check_same_vocab

GUIDES = {
    "genarm": GenARMGuide,
}


def check_guide(folder: str | Path, *, base: str, base_vocab: str) -> GuideCard:
    """Return a guide's card if it can steer a base with this vocabulary fingerprint.

    Raises `CheckpointError` for a folder that is no guide or of an unknown kind, and
    `VocabMismatchError` for a guide trained for other token ids.
    """
    card = read_card(folder)
    if card.kind not in GUIDES:
        raise CheckpointError(
            f"{str(folder)!r} holds a guide of kind {card.kind!r}; this version knows "
            f"{', '.join(sorted(GUIDES))}. Upgrade pilotfish, or pick another guide."
        )
    check_same_vocab(base=base, base_vocab=base_vocab, guide=str(folder), guide_vocab=card.vocab)
    return card


def load_guide_lm(
    folder: str | Path,
    *,
    vocab_size: int,
    num_slots: int,
    device: torch.device,
    dtype: Dtype = "auto",
) -> CausalLM:
    """Load the LM of a guide folder; `vocab_size` is the number of tokens of the base."""
    model = load_frozen(folder, device=device, dtype=dtype)
    return CausalLM(model, vocab_size=vocab_size, num_slots=num_slots)
