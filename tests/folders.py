"""Model folders on disk: a tiny random base and guides that share its tokenizer."""

from pathlib import Path

import torch

from pilotfish.data.bpe import train_byte_bpe
from pilotfish.guides.card import GuideCard, write_card
from pilotfish.models.loading import load_tokenizer
from pilotfish.models.vocab import fingerprint
from tests.fakes import tiny_llama

VOCAB_SIZE = 300
MAX_LENGTH = 1024


def save_base(folder: Path, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Path:
    """A random base whose byte-level tokenizer can write anything."""
    texts = ["the cat sat on the mat, and the dog sat on the cat"] * 3
    tokenizer = train_byte_bpe(texts, vocab_size, max_length=MAX_LENGTH)
    model = tiny_llama(
        seed,
        vocab_size=len(tokenizer),
        dtype=torch.float32,
        max_position_embeddings=MAX_LENGTH,
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = model.config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_guide(
    folder: Path, *, seed: int = 1, weight: float = 1.0, vocab_size: int = VOCAB_SIZE
) -> Path:
    """A guide for `save_base` of the same vocabulary size."""
    save_base(folder, seed=seed, vocab_size=vocab_size)
    vocab = fingerprint(load_tokenizer(folder))
    write_card(folder, GuideCard(kind="genarm", base="base", vocab=vocab, weight=weight))
    return folder
