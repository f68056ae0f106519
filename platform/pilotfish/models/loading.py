"""Load models and tokenizers from folders or hub ids, frozen and ready to decode."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pilotfish.errors import CheckpointError, ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float64"]


def load_architecture(path: str | Path) -> PreTrainedConfig:
    """Read a model's config, without its weights and without remote code.

    Raises `CheckpointError` if the folder or hub id holds none.
    """
    _check_folder(path)
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read a model config from {str(path)!r}: {error}") from error


def load_frozen(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: Dtype = "auto",
    distributed: Any = None,
) -> PreTrainedModel:
    """Load a causal LM for inference only: eval mode, no gradients, safetensors, no remote code.

    `distributed` is transformers' `DistributedConfig`, if the processes of a group share the
    weights: all of them load at once. Raises `CheckpointError` if the folder or hub id holds no
    such model.
    """
    sharding = {} if distributed is None else {"distributed_config": distributed}
    return _load(AutoModelForCausalLM, "causal LM", path, device=device, dtype=dtype, **sharding)


def load_frozen_scorer(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: Dtype = "auto"
) -> PreTrainedModel:
    """Load a reward or value model: a sequence classifier with one label, as `load_frozen` does.

    Raises `CheckpointError` for anything else.
    """
    kind = "reward model (a sequence classifier with one label)"
    model = _load(AutoModelForSequenceClassification, kind, path, device=device, dtype=dtype)
    if model.config.num_labels != 1:
        raise CheckpointError(
            f"{str(path)!r} is a classifier with {model.config.num_labels} labels, wanted a {kind}."
        )
    if not hasattr(model, "score"):
        raise CheckpointError(f"{str(path)!r} has no linear head named `score`, wanted a {kind}.")
    return model


def _load(auto: Any, kind: str, path: str | Path, *, device, dtype: Dtype, **settings: Any):
    _check_folder(path)
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model, info = auto.from_pretrained(
            str(path),
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load a {kind} from {str(path)!r}: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(f"{str(path)!r} is no {kind}: it holds no weights for {missing}.")
    model.requires_grad_(False).eval()
    torch.nn.Module.to(model, device)  # transformers' wrapper hides its signature
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises `CheckpointError` if the folder or hub id holds none."""
    _check_folder(path)
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a tokenizer from {str(path)!r}: {error}") from error


def pick_device(device: str = "auto") -> torch.device:
    """Resolve `auto` to the accelerator if there is one, else the CPU."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}, wanted auto, cpu, cuda or cuda:N.") from error


def _check_folder(path: str | Path) -> None:
    """Fail early on a local path that does not exist; a hub id has at most one slash."""
    text = str(path)
    looks_local = isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if not Path(path).is_dir() and looks_local:
        raise CheckpointError(
            f"{text!r} is not a folder. Train the model first (python -m jobs.train), or give the "
            "folder of an existing one."
        )
