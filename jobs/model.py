"""The model a job starts from: weights of a folder or a hub id, or an untrained architecture."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from jobs.config import ModelConfig
from pilotfish.errors import CheckpointError, ConfigError


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, dtype: str
) -> PreTrainedModel:
    """Return the model in the given dtype. Untrained weights follow torch's global seed."""
    torch_dtype = getattr(torch, dtype)
    if isinstance(config.init, dict):
        model = AutoModelForCausalLM.from_config(
            architecture(config.init, tokenizer), dtype=torch_dtype
        )
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(config.init, dtype=torch_dtype)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"model.init is {config.init!r}, from which no causal LM can be loaded: {error}. "
                "Give a model folder or a hub id, or train that model first."
            ) from error
    model.config.use_cache = True  # what is written to config.json is for decoding
    return model


def architecture(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a transformers config with the tokenizer's size and special ids filled in."""
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        return AutoConfig.for_model(**{**ids, **fields})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.init is not an architecture: {error}") from error
