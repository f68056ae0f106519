"""Rewarded soups: one model from several that were trained for different rewards.

Rame et al., "Rewarded soups: towards Pareto-optimal alignment by interpolating weights fine-tuned
on diverse rewards", NeurIPS 2023, equation (2): theta = sum_i lambda_i theta_i, whose weights sum
to 1. What was trained beside a base theta_0 is thereby averaged too,
theta = theta_0 + sum_i lambda_i (theta_i - theta_0), so the base itself is not needed.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from pilotfish.errors import CheckpointError, ConfigError, VocabMismatchError
from pilotfish.guides.card import CARD_NAME, GuideCard, read_card, write_card
from pilotfish.models.vocab import fingerprint
from pilotfish.train.export import WEIGHTS_NAME, read_record, whole_folder, write_record

_SUM_TOLERANCE = 1e-6
# What two models of one architecture may differ in.
_OWN_FIELDS = ("_name_or_path", "transformers_version", "dtype", "use_cache")


def soup(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of whole weights, in the first model's dtypes.

    Raises `ConfigError` unless the weights sum to 1, and `CheckpointError` for tensors that cannot
    be averaged: of another name or shape, or the factors of adapters, since the mean of products
    is not the product of means.
    """
    if not math.isclose(math.fsum(weights), 1.0, rel_tol=0, abs_tol=_SUM_TOLERANCE):
        raise ConfigError(f"the weights of a soup are {list(weights)}, but they must sum to 1.")
    factors = [name for name in states[0] if ".lora_" in name]
    if factors:
        raise CheckpointError(
            f"{factors[0]!r} is a factor of an adapter. The mean of adapters is not made of the "
            "means of their factors: merge each into its model, and mix those."
        )
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    for other in shapes[1:]:
        names = sorted(
            name for name in {*shapes[0], *other} if shapes[0].get(name) != other.get(name)
        )
        if names:
            raise CheckpointError(
                f"{len(names)} tensors differ in name or shape ({', '.join(names[:3])}), so the "
                "models cannot be mixed. Mix models that were trained from the same one."
            )
    mixed = {}
    for name, first in states[0].items():
        parts = (w * state[name].float() for w, state in zip(weights, states, strict=True))
        mixed[name] = sum(parts, torch.zeros(())).to(first.dtype)
    return mixed


def write_soup(parts: Mapping[str, float], output: str | Path) -> None:
    """Mix model or guide folders by weight into one such folder.

    Raises `ConfigError`, `CheckpointError` or `VocabMismatchError` for folders that do not go
    together.
    """
    folders, weights = list(parts), list(parts.values())
    first = Path(folders[0])
    states = [_load(folder) for folder in folders]
    card = _common_card(folders)
    _check_alike(folders)
    mixed = soup(states, weights)
    identities = [(read_record(folder) or {}).get("config_hash", folder) for folder in folders]
    text = json.dumps(sorted(zip(identities, weights, strict=True)))
    record = {"config_hash": hashlib.sha256(text.encode()).hexdigest()[:12], "soup": dict(parts)}
    with whole_folder(output) as folder:
        shutil.copytree(first, folder, dirs_exist_ok=True)
        save_file(mixed, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        write_record(folder, record)
        if card is not None:
            write_card(folder, card.model_copy(update={"training": record}))


def _load(folder: str) -> dict[str, Tensor]:
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder!r} holds no {WEIGHTS_NAME}. Give folders that python -m jobs.train or "
            "python -m jobs.export wrote."
        )
    return load_file(path)


def _common_card(folders: Sequence[str]) -> GuideCard | None:
    """Return what the cards agree on; None for models that are no guides."""
    if not any((Path(folder) / CARD_NAME).is_file() for folder in folders):
        return None
    first, *others = [read_card(folder) for folder in folders]
    content = first.model_dump(exclude={"training"})
    for folder, other in zip(folders[1:], others, strict=True):
        different = _differing(content, other.model_dump(exclude={"training"}))
        if different:
            raise ConfigError(
                f"the guide cards of {folders[0]!r} and {folder!r} differ in "
                f"{', '.join(different)}. Mix guides of one kind, base and settings."
            )
    return first


def _check_alike(folders: Sequence[str]) -> None:
    first_config, first_vocab = _architecture(folders[0]), _vocab(folders[0])
    for folder in folders[1:]:
        different = _differing(first_config, _architecture(folder))
        if different:
            raise ConfigError(
                f"the models {folders[0]!r} and {folder!r} differ in {', '.join(different)} of "
                "config.json. Mix models that were trained from the same one."
            )
        vocab = _vocab(folder)
        if vocab != first_vocab:
            raise VocabMismatchError(
                f"{folders[0]!r} has vocabulary {first_vocab}, but {folder!r} has {vocab}. Mix "
                "models that were trained from the same one."
            )


def _architecture(folder: str) -> dict[str, Any]:
    fields = AutoConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in fields.items() if name not in _OWN_FIELDS}


def _vocab(folder: str) -> str:
    return fingerprint(AutoTokenizer.from_pretrained(folder))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
