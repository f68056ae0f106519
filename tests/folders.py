"""Model and guide folders on disk, as jobs would have written them: random, and tiny."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pilotfish.data.bpe import train_byte_bpe
from pilotfish.guides.card import GuideCard, write_card
from pilotfish.guides.proxy_features import ProxySettings
from pilotfish.models.heads import save_accept_head
from pilotfish.models.vocab import fingerprint
from tests.fakes import random_head, tiny_llama, tiny_reward_model

MAX_LENGTH = 1024


@cache
def byte_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer that can write anything."""
    texts = ["the cat sat on the mat, and the dog sat on the cat"] * 3
    return train_byte_bpe(texts, vocab_size, max_length=MAX_LENGTH)


def save_base(
    folder: Path, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Save a random base with its tokenizer; return the folder."""
    tokenizer = tokenizer or byte_tokenizer()
    model = tiny_llama(
        seed,
        vocab_size=len(tokenizer),
        dtype=torch.float32,
        max_position_embeddings=MAX_LENGTH,
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_proxy(
    folder: Path,
    *,
    seed: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> Path:
    """Save a random proxy guide, for a base of `save_base` with the same tokenizer."""
    proxy = ProxySettings(**{"head": {"hidden": [24], "activation": "tanh"}, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    save_accept_head(folder, random_head(seed, proxy, dtype=torch.float32).state_dict())
    card = GuideCard(
        kind="proxy",
        base="base",
        vocab=fingerprint(tokenizer or byte_tokenizer()),
        settings=proxy.model_dump(mode="json"),
    )
    write_card(folder, card)
    return folder


def save_aligner(
    folder: Path,
    *,
    seed: int = 3,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weight: float = 1.0,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Save a random Aligner: an LM with a tokenizer of its own, for any base.

    Without `settings` it has the paper's template.
    """
    tokenizer = tokenizer or byte_tokenizer()
    save_base(folder, seed=seed, tokenizer=tokenizer)
    settings = {"template": "paper"} if settings is None else settings
    return save_card(folder, kind="aligner", tokenizer=tokenizer, weight=weight, **settings)


def save_guide(
    folder: Path,
    *,
    seed: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kind: str = "genarm",
    weight: float = 1.0,
) -> Path:
    """Save a random guide with its card, for a base with the same tokenizer."""
    tokenizer = tokenizer or byte_tokenizer()
    save_base(folder, seed=seed, tokenizer=tokenizer)
    card = GuideCard(kind=kind, base="base", vocab=fingerprint(tokenizer), weight=weight)
    write_card(folder, card)
    return folder


def save_reward_model(
    folder: Path, *, seed: int = 2, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Save a random reward or value model with its tokenizer; return the folder."""
    tokenizer = tokenizer or byte_tokenizer()
    model = tiny_reward_model(
        seed,
        vocab_size=len(tokenizer),
        dtype=torch.float32,
        max_position_embeddings=MAX_LENGTH,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reward_guide(
    folder: Path,
    *,
    kind: str = "args",
    seed: int = 2,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weight: float = 1.0,
    **settings: Any,
) -> Path:
    """Save a guide that is a random reward model itself: `args`, or `controlled_decoding`."""
    tokenizer = tokenizer or byte_tokenizer()
    save_reward_model(folder, seed=seed, tokenizer=tokenizer)
    return save_card(folder, kind=kind, tokenizer=tokenizer, weight=weight, **settings)


def save_card(
    folder: Path,
    *,
    kind: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weight: float = 1.0,
    **settings: Any,
) -> Path:
    """Save a guide's card alone: for kinds whose models lie elsewhere, as `settings` say."""
    folder.mkdir(exist_ok=True)
    vocab = fingerprint(tokenizer or byte_tokenizer())
    write_card(
        folder, GuideCard(kind=kind, base="base", vocab=vocab, weight=weight, settings=settings)
    )
    return folder
