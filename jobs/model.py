"""The model a job starts from: weights of a folder or a hub id, or an untrained architecture."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from jobs.config import LoRA, ModelConfig
from pilotfish.errors import CheckpointError, ConfigError
from pilotfish.train.learner import LMLearner, ScoreLearner
from pilotfish.train.objectives.base import Head

_AUTO_MODEL: dict[Head, Any] = {
    "lm": AutoModelForCausalLM,
    "score": AutoModelForSequenceClassification,
}


def build_learner(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, head: Head, dtype: str
) -> LMLearner | ScoreLearner:
    """Return what is trained, in the given dtype. New weights follow torch's global seed."""
    model = build_model(config.init, tokenizer, head=head, dtype=dtype)
    if config.lora is not None:
        _add_lora(model, config.lora)
    return LMLearner(model) if head == "lm" else ScoreLearner(model)


def merged(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    trained: Mapping[str, Tensor],
    *,
    head: Head,
    dtype: str,
) -> PreTrainedModel:
    """Return the whole model: what it started from, with what was trained in place.

    `trained` are tensors by name: whole weights, and adapters, of which `alpha / rank * B A` is
    added.
    """
    model = build_model(config.init, tokenizer, head=head, dtype=dtype)
    weights = model.state_dict()
    with torch.no_grad():
        for name, tensor in trained.items():
            if ".lora_A." in name:
                assert config.lora is not None, "adapters come from its settings"
                scale = config.lora.alpha / config.lora.rank
                up_OR = trained[name.replace(".lora_A.", ".lora_B.")]
                weight = weights[name.split(".lora_A.")[0] + ".weight"]
                weight += (scale * (up_OR.float() @ tensor.float())).to(weight)
            elif ".lora_B." not in name:
                weights[name].copy_(tensor)
    return model


def build_model(
    init: str | dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, head: Head, dtype: str
) -> PreTrainedModel:
    """Return a model that `model.init` names. Raises `CheckpointError` or `ConfigError`."""
    torch_dtype = getattr(torch, dtype)
    labels = {"num_labels": 1} if head == "score" else {}
    if isinstance(init, dict):
        shape = architecture({**init, **labels}, tokenizer)
        model = _AUTO_MODEL[head].from_config(shape, dtype=torch_dtype)
    else:
        try:
            model = _AUTO_MODEL[head].from_pretrained(init, dtype=torch_dtype, **labels)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"model.init is {init!r}, from which no model can be loaded: {error}. "
                "Give a model folder or a hub id, or train that model first."
            ) from error
    model.config.use_cache = True  # what is written to config.json is for decoding
    if head == "score" and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _add_lora(model: PreTrainedModel, config: LoRA) -> None:
    """Freeze the model and add adapters to it; a new head is trained whole."""
    from peft import LoraConfig, inject_adapter_in_model  # optional: only LoRA needs it

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),  # a float will do
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    try:
        inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.targets is {list(config.targets)}, which this model does not have: "
            f"{error}. Name linear layers of the model, such as q_proj."
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("score."))


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
