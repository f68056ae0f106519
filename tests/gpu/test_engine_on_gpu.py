"""The decode loop on an accelerator gives the laws of the CPU."""

import pytest
import torch

from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Drafting
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import request, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def guided_logprobs(
    device: str, dtype: torch.dtype, draft: Drafting | None = None
) -> list[tuple[int, float, float]]:
    models = [tiny_llama(seed, dtype=dtype) for seed in (1, 2)]
    base, guide = (CausalLM(torch.nn.Module.to(m, device)) for m in models)  # pyright: ignore[reportArgumentType]
    engine = Engine(base, {"g": GenARMGuide(guide)}, drafters={"g": guide})
    for key in range(6):
        prompt = [key % 5 + 1] * (key + 1)
        greedy = {"temperature": 0.0, "ignore_eos": True}
        engine.submit(request(key, prompt, guides={"g": 1.0}, draft=draft, **greedy))
    events = []
    while engine.busy:
        events += [(event.key, event.logprob, event.kl) for event in engine.step()]
    return events


def test_guided_laws_equal_those_of_the_cpu() -> None:
    on_cpu = guided_logprobs("cpu", torch.float64)
    on_gpu = guided_logprobs("cuda", torch.float64)
    assert [key for key, _, _ in on_gpu] == [key for key, _, _ in on_cpu]
    for (_, logprob, kl), (_, expected_logprob, expected_kl) in zip(on_gpu, on_cpu, strict=True):
        assert logprob == pytest.approx(expected_logprob, abs=1e-9)
        assert kl == pytest.approx(expected_kl, abs=1e-9)


def test_drafted_text_is_that_of_plain_decoding() -> None:
    def by_key(found: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
        return sorted(found, key=lambda event: event[0])

    plain = by_key(guided_logprobs("cuda", torch.float64))
    drafted = by_key(guided_logprobs("cuda", torch.float64, Drafting(guide="g")))
    assert [event[1] for event in drafted] == pytest.approx([event[1] for event in plain])


def test_bfloat16_models_give_float32_laws_close_to_float64() -> None:
    exact = guided_logprobs("cuda", torch.float64)[0]
    rough = guided_logprobs("cuda", torch.bfloat16)[0]
    assert rough[1] == pytest.approx(exact[1], abs=0.2)
