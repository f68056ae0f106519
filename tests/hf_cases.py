"""What the tests of `generate` share: models, chains of guides, and what the formulas say."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pilotfish.guides.base import TokenGuide
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.proxy_tuning import ProxyTuningGuide
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import plain_logprobs, tiny_llama

BASE, GUIDE, OTHER = tiny_llama(1), tiny_llama(2), tiny_llama(3)
HF: Any = BASE
EOS, PAD, GATE = 6, 15, 1.9
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
LENGTH = 12


def law_of(ids: list[int], chain: str) -> Tensor:
    """The guided law without cache or batch. The gates look at the base."""
    base = law = plain_logprobs(BASE, ids)
    for link in chain.split():
        gated = link.startswith("gated-")
        if gated and -(base.exp() * base).sum() <= GATE:
            continue
        if link.endswith("genarm"):
            law = law + 1.2 * plain_logprobs(GUIDE, ids)
        elif link.endswith("other"):
            law = law + 0.7 * plain_logprobs(OTHER, ids)
        elif link.endswith("proxy"):
            law = law + 0.9 * (plain_logprobs(GUIDE, ids) - plain_logprobs(OTHER, ids))
    return law.log_softmax(-1)


def guide_of(link: str) -> tuple[TokenGuide, float]:
    name = link.removeprefix("gated-")
    one, other = CausalLM(GUIDE), CausalLM(OTHER)
    guide, weight = {
        "genarm": (GenARMGuide(one), 1.2),
        "other": (GenARMGuide(other), 0.7),
        "proxy": (ProxyTuningGuide(one, other), 0.9),
    }[name]
    return (Gated(guide, GATE) if link.startswith("gated-") else guide), weight


def greedy(prompt: list[int], chain: str) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + LENGTH:
        ids.append(int(law_of(ids, chain).argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def batch(prompts: Sequence[list[int]], pad: int = PAD) -> dict[str, Tensor]:
    """Padded on the left, as a tokenizer does it."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


OPTIONS: dict[str, Any] = {
    "max_new_tokens": LENGTH,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "do_sample": False,
}


def completions(out: Tensor, inputs: dict[str, Tensor]) -> list[list[int]]:
    """What was written behind each prompt, up to the end token."""
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


CHAINS = ["genarm", "proxy", "genarm other", "gated-genarm", "other gated-genarm"]
