"""What is done with a base, once in one process and once in each of several.

Shapes: B rows, T positions, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from jobs.engine import import_deepspeed
from jobs.frozen_base import FrozenBase, load_frozen_base, parameter_hash
from jobs.sharding_rules import FrozenBaseConfig
from pilotfish.decode.engine import Engine
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.proxy_features import ProxySettings, feature_sizes
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.heads import AcceptHead
from pilotfish.models.loading import load_frozen
from tests.fakes import drain, request, tiny_config, tiny_llama

VOCAB = 19  # odd, as is the width of the MLP: neither need divide
_HIDDEN = 256  # large enough that linears are packed where they are whole
_ROWS = torch.arange(4 * 9).reshape(4, 9) * 7 % VOCAB
_MASK = torch.ones_like(_ROWS).index_fill_(1, torch.tensor([0, 1]), 0)
_STEPS, _RATE = 3, 0.01


def save_models(folder: Path) -> None:
    """Save a base, its twin with tied embeddings, and a small guide."""
    for name, tied in (("base", False), ("tied", True)):
        torch.manual_seed(1)
        config = tiny_config(VOCAB, hidden_size=_HIDDEN, intermediate_size=515)
        config.initializer_range, config.tie_word_embeddings = 0.1, tied
        LlamaForCausalLM(config).save_pretrained(folder / name)
    tiny_llama(2, vocab_size=VOCAB, dtype=torch.float32).save_pretrained(folder / "guide")


# What each process of a world does.


def use_all(
    folder: Path, configs: dict[str, FrozenBaseConfig], stages: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Use a base under each of the configs, with guides at these ZeRO stages."""
    return {name: _use(folder, config, stages) for name, config in configs.items()}


def _use(folder: Path, config: FrozenBaseConfig, stages: Sequence[int]) -> dict[str, Any]:
    base = _load(folder / "base", config)
    found: dict[str, Any] = {
        "share": (base.data_rank, base.data_size),
        "resident": sum(map(_resident, base.model.parameters())),
        "hash": base.parameter_hash(),
        "logits": base.logits(_ROWS, _MASK),
        "hidden": hidden_states(base.model),
    }
    lm, share = base.causal_lm(num_slots=3), (base.data_rank, base.data_size)
    with base.lockstep():
        found["answers"] = decode(lm, folder, *share)
    with base.lockstep():
        found["answers while others wait"] = decode(lm, folder, *share) if share[0] == 0 else None
    found["gradient"] = gradient_through(base.model)
    found["losses"] = {stage: _train_beside(base, folder, stage) for stage in stages}
    found["hash after"] = base.parameter_hash()
    for other in ("tied", "bfloat16", "offloaded"):
        found[other] = _other(folder, config, other)
    return found


def _other(folder: Path, config: FrozenBaseConfig, kind: str) -> tuple[Tensor, str] | None:
    """Logits and hash of other bases and other settings."""
    if kind == "offloaded" and config.sharding != "zero3":
        return None
    changes = {"tied": {}, "bfloat16": {"dtype": "bfloat16"}, "offloaded": {"offload": "cpu"}}
    name = "tied" if kind == "tied" else "base"
    base = _load(folder / name, config.model_copy(update=changes[kind]))
    return base.logits(_ROWS, _MASK), base.parameter_hash()


def _load(path: Path, config: FrozenBaseConfig) -> FrozenBase:
    named = config.model_copy(update={"path": str(path)})
    return load_frozen_base(named, on_cpu=True)


def _resident(parameter: Any) -> int:
    if hasattr(parameter, "ds_tensor"):
        return parameter.numel() + parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def _train_beside(base: FrozenBase, folder: Path, stage: int) -> list[float]:
    """Train a guide in an engine of its own; return the losses over all data."""
    guide = LlamaForCausalLM.from_pretrained(folder / "guide")
    tree = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": False},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(guide.parameters(), lr=_RATE)
    deepspeed = import_deepspeed(on_cpu=True)
    engine: Any = deepspeed.initialize(model=guide, optimizer=optimizer, config=tree)[0]
    share = slice(base.data_rank, None, base.data_size)
    losses = []
    for _ in range(_STEPS):
        base_BTV = base.logits(_ROWS[share], _MASK[share])
        guide_BTV = engine(input_ids=_ROWS[share], attention_mask=_MASK[share]).logits
        loss = guided_loss(base_BTV, guide_BTV, _ROWS[share])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


# What one process does with the whole model, for comparison, and parts of the above.


def reference(folder: Path) -> dict[str, Any]:
    """Return what `use_all` finds, from a plain model."""
    model = load_frozen(folder / "base")
    found: dict[str, Any] = {
        "num": sum(p.numel() for p in model.parameters()),
        "hash": parameter_hash(model),
        "logits": model(input_ids=_ROWS, attention_mask=_MASK, use_cache=False).logits,
        "hidden": hidden_states(model),
        "gradient": gradient_through(model),
        "answers": decode(CausalLM(load_frozen(folder / "base")), folder, 0, 1),
        "losses": _train_alone(model, folder),
    }
    others = {
        "tied": load_frozen(folder / "tied"),
        "bfloat16": load_frozen(folder / "base", dtype="bfloat16"),
    }
    for name, other in others.items():
        logits = other(input_ids=_ROWS, attention_mask=_MASK, use_cache=False).logits
        found[name] = logits, parameter_hash(other)
    return found


def _train_alone(base: PreTrainedModel, folder: Path) -> list[float]:
    guide = LlamaForCausalLM.from_pretrained(folder / "guide")
    optimizer = torch.optim.AdamW(guide.parameters(), lr=_RATE)
    losses = []
    for _ in range(_STEPS):
        base_BTV = base(input_ids=_ROWS, attention_mask=_MASK).logits
        guide_BTV = guide(input_ids=_ROWS, attention_mask=_MASK).logits
        loss = guided_loss(base_BTV, guide_BTV, _ROWS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def guided_loss(base_BTV: Tensor, guide_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Negative log-likelihood of the rows under the guided law."""
    law_BTV = (base_BTV.log_softmax(-1) + guide_BTV.log_softmax(-1)).log_softmax(-1)
    return nn.functional.nll_loss(law_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


@torch.no_grad()
def hidden_states(model: PreTrainedModel) -> Tensor:
    """Return all hidden states, from the embeddings to behind the last layer."""
    output: Any = model(
        input_ids=_ROWS, attention_mask=_MASK, use_cache=False, output_hidden_states=True
    )
    return torch.stack(output.hidden_states)


def gradient_through(model: PreTrainedModel) -> Tensor:
    """Return the gradient of a soft prompt in front of a row."""
    soft_1TD = torch.linspace(-1, 1, 3 * _HIDDEN).reshape(1, 3, _HIDDEN).requires_grad_()
    embedded_1TD = model.get_input_embeddings()(_ROWS[:1])
    inputs = torch.cat([soft_1TD, embedded_1TD], dim=1)
    logits: Tensor = model(inputs_embeds=inputs, use_cache=False).logits
    logits.log_softmax(-1)[0, :, 3].sum().backward()
    assert soft_1TD.grad is not None
    return soft_1TD.grad


def decode(
    lm: CausalLM, folder: Path, data_rank: int, data_size: int
) -> dict[int, list[tuple[int, float]]]:
    """Decode a share of nine requests: greedy and sampled, of all lengths, guided and not."""
    guides = {
        "genarm": GenARMGuide(CausalLM(load_frozen(folder / "guide"), num_slots=3)),
        "proxy": _proxy(lm, "post_token"),
        "cheap_proxy": _proxy(lm, "pre_token"),
    }
    engine = Engine(lm, guides)
    chains = [{}, {"genarm": 0.7}, {"proxy": 1.0}, {"cheap_proxy": 1.0}, {"genarm": 1, "proxy": 1}]
    for key in range(data_rank, 9, data_size):
        prompt = [(5 * key + at) % VOCAB for at in range(1 + 4 * key % 23)]
        engine.submit(
            request(
                key,
                prompt,
                guides=chains[key % len(chains)],
                temperature=(key % 3) / 2,
                max_tokens=3 + 3 * key % 11,
                seed=key,
            )
        )
    return {
        key: [(event.token_id, event.logprob) for event in events]
        for key, events in drain(engine).items()
    }


def _proxy(lm: CausalLM, features: Any) -> ProxyGuide:
    settings = ProxySettings.model_validate(
        {"features": features, "head": {"hidden": [24], "activation": "tanh"}}
    )
    sizes, num_extra = feature_sizes(features, lm.model)
    torch.manual_seed(3)
    head = AcceptHead(settings.head, block_sizes=sizes, num_extra=num_extra)
    torch.nn.init.normal_(head.layers[-1].weight)  # pyright: ignore
    return ProxyGuide(lm, head, settings)
