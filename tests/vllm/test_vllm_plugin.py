"""The plugin inside a real vLLM, in an environment of its own: PILOTFISH_VLLM_PYTHON names it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.guides.card import GuideCard, write_card
from pilotfish.models.vocab import fingerprint
from tests.fakes import plain_logprobs, tiny_llama
from tests.folders import byte_tokenizer

PYTHON = os.environ.get("PILOTFISH_VLLM_PYTHON", "")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="PILOTFISH_VLLM_PYTHON names no interpreter that has vllm 0.29"
)

# vLLM's attention on a CPU wants heads of at least 32 units.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "dtype": torch.float32,
}
WEIGHTS: list[dict[str, float]] = [
    {},
    {"a": 1.0},
    {"b": 0.5},
    {"a": 0.3, "b": 2.0},
    {"b": 2.0, "a": -0.4},
    {"a": 0.0},
    {"b": 1.0, "a": 1.0},
]
# Three that fit side by side until each needs another block; one that is filled in chunks.
LENGTHS = (58, 60, 61, 116, 5, 42, 59)


def save(folder: Path, seed: int, *, extra_columns: int) -> Any:
    """A model whose head has more columns than the tokenizer has ids."""
    tokenizer = byte_tokenizer()
    model = tiny_llama(seed, vocab_size=len(tokenizer) + extra_columns, **SHAPE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = GuideCard(kind="genarm", base="base", vocab=fingerprint(tokenizer))
    write_card(folder, card)
    return model


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_reported_law_is_that_of_the_formula(tmp_path: Path, asynchronous: bool) -> None:
    """More requests than slots, chunked prefill, too few blocks for all: preempted, resumed.

    Asynchronous scheduling runs in an engine process of its own, which loads the guides.
    """
    size = len(byte_tokenizer())
    base = save(tmp_path / "base", 1, extra_columns=12)
    guides = {
        name: save(tmp_path / name, seed, extra_columns=extra)
        for name, seed, extra in (("a", 2, 0), ("b", 3, 12))
    }
    asked = questions(tmp_path, asynchronous=asynchronous)
    requests = asked["requests"]
    settings = {"guides": {name: str(tmp_path / name) for name in guides}}
    found = run(asked, settings, own_process=asynchronous)
    assert ["no guide named 'c'" in found["refused"][0], "'x'" in found["refused"][1]] == [True] * 2
    assert found["num_preemptions"] > 0
    worst = 0.0
    for request, weights, answer in zip(requests, WEIGHTS, found["answers"], strict=True):
        ids = list(request["prompt"])
        assert len(answer["token_ids"]) == request["params"]["max_tokens"]
        steered = any(weights.values())
        for token, reported in zip(answer["token_ids"], answer["logprobs"], strict=True):
            law = plain_logprobs(base, ids)
            law = law[:size].log_softmax(-1) if steered else law
            for name, weight in weights.items():
                if weight != 0:
                    own = plain_logprobs(guides[name], ids)[:size].log_softmax(-1)
                    law = law + weight * own
            law = law.log_softmax(-1)
            logprobs = torch.tensor([reported[str(i)] for i in range(len(law))])
            worst = max(worst, (logprobs - law).abs().max().item())
            if request["params"]["temperature"] == 0:
                assert law[token] > law.max() - 1e-3
            ids.append(token)
    print(f"max |dlogp| {worst:.1e}, {found['num_preemptions']:.0f} preemptions")  # noqa: T201
    assert worst < 1e-3


def questions(folder: Path, *, asynchronous: bool) -> dict[str, Any]:
    """What the process with vLLM is to do: more requests than rows, and too few blocks for them."""
    requests = [
        {
            "prompt": [(7 * i + j * j) % 256 for j in range(LENGTHS[i])],
            "params": {
                "max_tokens": 24 + 5 * (i % 3),
                "temperature": float(i % 2),
                "extra_args": {"guides": weights if i % 3 else json.dumps(weights)},
            },
        }
        for i, weights in enumerate(WEIGHTS)
    ]
    return {
        "base": str(folder / "base"),
        "engine": {
            "max_num_seqs": 3,
            "max_num_batched_tokens": 64,
            "enable_chunked_prefill": True,
            "async_scheduling": asynchronous,
            "enforce_eager": True,
            "block_size": 32,
            "num_gpu_blocks_override": 9,
            "disable_log_stats": False,
        },
        "requests": requests,
        "bad": [{"guides": {"c": 1.0}}, {"guides": {"a": "x"}}],
        "metrics": True,
        "out": str(folder / "out.json"),
    }


def run(asked: dict[str, Any], settings: dict[str, Any], *, own_process: bool) -> dict[str, Any]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONPATH": str(ROOT / "platform"),
        "PILOTFISH_VLLM": json.dumps(settings),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "vllm" / "run_vllm.py")],
        input=json.dumps(asked),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(Path(asked["out"]).read_text())
