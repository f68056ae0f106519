"""The methods of the decode benchmark: random models, and a guide for each way of steering.

Random weights cost what trained ones cost, wherever the cost does not depend on what is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pilotfish.decode.engine import Engine
from pilotfish.guides.args_search import ARGSGuide
from pilotfish.guides.base import TokenGuide
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.proxy_features import Features, ProxySettings, feature_sizes
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.guides.proxy_tuning import ProxyTuningGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.heads import AcceptHead, HeadSettings
from pilotfish.models.reward import RewardModel

VOCAB = 32_000
BASE = {"hidden": 512, "layers": 9, "heads": 8, "kv_heads": 4, "ffn": 1536}
GUIDE = {"hidden": 88, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 256}
# A random model's nucleus is most of the vocabulary; what a trained one leaves differs. The base of
# the miniature world leaves 2.2 candidates on average at p_t = .95, and one at 65% of positions.
PROXY_CANDIDATES = (2, 4)


@dataclass(frozen=True)
class Method:
    """One way of decoding, by weights of the guides in `Bench.engine`."""

    name: str
    guides: Mapping[str, float]
    bytes_read: int
    """Weights that one step must read, whatever the batch."""


@dataclass(frozen=True)
class Bench:
    """One engine with every guide, and the models whose forwards are counted."""

    engine: Engine
    methods: list[Method]
    helpers: list[Any]


def config(*, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> LlamaConfig:
    """An untied Llama with a vocabulary of 32,000."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_lm(sizes: Mapping[str, int], seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**sizes)).eval().requires_grad_(False)


def random_scorer(sizes: Mapping[str, int], seed: int) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    one_label = config(**sizes)
    one_label.num_labels = 1
    return LlamaForSequenceClassification(one_label).eval().requires_grad_(False)


def build(base: LlamaForCausalLM, guide_sizes: Mapping[str, int], *, batch: int) -> Bench:
    """Make guides of every kind beside a base."""
    lm = CausalLM(base, num_slots=batch)
    small = [CausalLM(random_lm(guide_sizes, seed), num_slots=batch) for seed in (1, 2)]
    reward = RewardModel(random_scorer(guide_sizes, 3), num_slots=batch)
    guides: dict[str, TokenGuide] = {
        "genarm": GenARMGuide(small[0]),
        "genarm2": GenARMGuide(small[1]),
        "proxy_tuning": ProxyTuningGuide(*small),
        "gated": Gated(GenARMGuide(small[0]), 1e9),  # always closed: what the gate itself costs
        "args": ARGSGuide(reward, num_candidates=10),
        **{f"post_token{k}": _proxy(lm, "post_token", k) for k in PROXY_CANDIDATES},
        **{f"pre_token{k}": _proxy(lm, "pre_token", k) for k in PROXY_CANDIDATES},
    }
    own, guide, scorer = _read(base), _read(small[0].model), _read(reward.body.model)
    methods = [
        Method("base", {}, own),
        Method("GenARM", {"genarm": 1.0}, own + guide),
        Method("2 x GenARM", {"genarm": 0.5, "genarm2": 0.5}, own + 2 * guide),
        Method("proxy-tuning", {"proxy_tuning": 1.0}, own + 2 * guide),
        Method("GenARM, gate closed", {"gated": 1.0}, own),
        Method("ARGS, k=10", {"args": 1.0}, own + scorer),
        *(
            Method(f"proxy {features}, k={k}", {f"{features}{k}": 1.0}, own)
            for features in ("post_token", "pre_token")
            for k in PROXY_CANDIDATES
        ),
    ]
    return Bench(Engine(lm, guides), methods, [*small, reward])


def _proxy(lm: CausalLM, features: Features, top_k: int) -> ProxyGuide:
    settings = ProxySettings(top_k=top_k, features=features)
    torch.manual_seed(4)
    block_sizes, num_extra = feature_sizes(settings.features, lm.model)
    head = AcceptHead(HeadSettings(), block_sizes=block_sizes, num_extra=num_extra)
    return ProxyGuide(lm, head.eval().requires_grad_(False), settings)


def _read(model: Any) -> int:
    """Bytes of all weights but the input embedding, of which a step reads a row per token."""
    skipped = model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not skipped)
