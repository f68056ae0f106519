"""Model and guide folders on disk, as jobs would have written them."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pilotfish.guides.card import GuideCard, write_card
from pilotfish.models.vocab import fingerprint
from tests.chat_tokenizers import word_tokenizer
from tests.fakes import tiny_llama


def save_base(folder: Path, *, seed: int = 1, tokenizer: PreTrainedTokenizerBase | None = None):
    """Save a tiny random base with its tokenizer; return the folder."""
    tokenizer = tokenizer or word_tokenizer()
    model = tiny_llama(seed, vocab_size=len(tokenizer), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_guide(
    folder: Path,
    *,
    seed: int = 2,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kind: str = "genarm",
    weight: float = 1.0,
):
    """Save a tiny random guide with its card; return the folder."""
    tokenizer = tokenizer or word_tokenizer()
    save_base(folder, seed=seed, tokenizer=tokenizer)
    card = GuideCard(kind=kind, base="base", vocab=fingerprint(tokenizer), weight=weight)
    write_card(folder, card)
    return folder
