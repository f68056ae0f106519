"""Guides for a model that transformers loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilotfish.errors import ConfigError
from pilotfish.guides import GUIDES, check_guide, load_guide
from pilotfish.guides.base import Stage, TokenGuide
from pilotfish.guides.host import GuideHost
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.vocab import fingerprint


def load_guides(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folders: Mapping[str, str | Path],
    *,
    num_slots: int = 32,
) -> tuple[CausalLM, dict[str, TokenGuide]]:
    """Wrap a model as a base and load token guides for it, by name.

    The model's weights must stay as they are from now on. Caches hold `num_slots` rows; a larger
    batch is answered as well, but slowly. Raises `ConfigError` for guides that act
    on answers, and what `check_guide` and `load_guide` raise.
    """
    base = CausalLM(model, vocab_size=len(tokenizer), num_slots=num_slots)
    name = str(model.name_or_path or type(model).__name__)
    host = GuideHost(
        base=base, tokenizer=tokenizer, name=name, num_slots=num_slots, device=base.device
    )
    vocab = fingerprint(tokenizer)
    cards = {
        guide: check_guide(folder, base=name, base_vocab=vocab) for guide, folder in folders.items()
    }
    for guide, card in cards.items():
        if GUIDES[card.kind].stage is not Stage.TOKEN:
            raise ConfigError(
                f"guide {guide!r} is of kind {card.kind!r}, which acts on whole answers, but "
                "`generate` asks guides about tokens. Use pilotfish.Pilot."
            )
    return base, {
        guide: cast(TokenGuide, load_guide(folders[guide], card, host))
        for guide, card in cards.items()
    }
