"""What holds for every guide that multiplies the base's law: GenARM and proxy-tuning.

Each law is compared with the formula on fresh forwards of the models, in float64.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pilotfish.decode.engine import Engine
from pilotfish.decode.sampling import SamplingBatch
from pilotfish.decode.sequence import SamplingParams
from pilotfish.errors import ConfigError, VocabMismatchError
from pilotfish.guides import check_guide, load_guide
from pilotfish.guides.base import LogprobSource, TokenGuide
from pilotfish.guides.card import GuideCard, read_card, resolve_weight, write_card
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.host import GuideHost
from pilotfish.guides.proxy_tuning import ProxyTuningGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.vocab import fingerprint
from tests.chat_tokenizers import word_tokenizer
from tests.fakes import context, plain_logprobs, request, tiny_llama
from tests.folders import save_guide
from tests.guide_laws import Shifted, Table, distance, guided

BASE, GUIDE, OTHER = tiny_llama(1), tiny_llama(2), tiny_llama(3)
KINDS = pytest.mark.parametrize("kind", ["genarm", "proxy_tuning"])
TEXTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]


UNIFORM = Table(torch.zeros(16, dtype=torch.float64).log_softmax(-1))


def build(kind: str, first: LogprobSource, second: LogprobSource) -> TokenGuide:
    """`second` is what a kind with one model has no use for."""
    return GenARMGuide(first) if kind == "genarm" else ProxyTuningGuide(first, second)


def new_guide(kind: str) -> TokenGuide:
    return build(kind, CausalLM(GUIDE), CausalLM(OTHER))


def factor(kind: str, ids: list[int]) -> Tensor:
    """What `new_guide` multiplies with, from the formula."""
    log_factor = plain_logprobs(GUIDE, ids)
    return log_factor if kind == "genarm" else log_factor - plain_logprobs(OTHER, ids)


def base_law(ids: list[int]) -> Tensor:
    return plain_logprobs(BASE, ids)


def greedy(model: LlamaForCausalLM, ids: list[int], length: int) -> list[int]:
    hf: Any = model
    out = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=length, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def decode(engine: Engine, ids: list[int], weight: float, **params) -> list[int]:
    engine.submit(request(1, ids, guides={"g": weight}, **params))
    tokens = []
    while engine.busy:
        tokens += [event.token_id for event in engine.step()]
    return tokens


@KINDS
@pytest.mark.parametrize("weight", [-0.7, 0.4, 1.0, 3.0])
def test_the_law_is_that_of_the_formula(kind: str, weight: float) -> None:
    for ids in TEXTS:
        expected = (base_law(ids) + weight * factor(kind, ids)).log_softmax(-1)
        found = guided(base_law(ids), ids, (new_guide(kind), weight))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@KINDS
def test_weight_zero_is_the_base_and_smaller_weights_come_nearer(kind: str) -> None:
    engine = Engine(CausalLM(BASE), {"g": new_guide(kind)})
    for ids in TEXTS:
        base = base_law(ids)
        assert decode(engine, ids, 0.0, temperature=0, max_tokens=9) == greedy(BASE, ids, 9)
        weights = (1.0, 0.5, 0.1, 0.01, 0.0)
        far = [distance(guided(base, ids, (new_guide(kind), w)), base) for w in weights]
        assert far == sorted(far, reverse=True)
        assert far[0] > 0.05
        assert far[-1] < 1e-12


@KINDS
def test_a_uniform_guide_is_the_base_and_constants_change_nothing(kind: str) -> None:
    for ids in TEXTS:
        base = base_law(ids)
        same = guided(base, ids, (build(kind, UNIFORM, UNIFORM), 2.0))
        torch.testing.assert_close(same, base, rtol=0, atol=1e-12)
        shifted = build(kind, Shifted(CausalLM(GUIDE), 3.7), Shifted(CausalLM(OTHER), -1.2))
        torch.testing.assert_close(
            guided(base, ids, (shifted, 1.5)), guided(base, ids, (new_guide(kind), 1.5))
        )


@KINDS
def test_a_guide_that_is_the_base_sharpens_it(kind: str) -> None:
    """It is the base at temperature 1 / (1 + w), not the base."""
    twin = build(kind, CausalLM(BASE), UNIFORM)
    for ids in TEXTS:
        law = guided(base_law(ids), ids, (twin, 0.5))
        torch.testing.assert_close(law, (base_law(ids) * 1.5).log_softmax(-1), rtol=0, atol=1e-12)
        assert distance(law, base_law(ids)) > 0.01


@KINDS
def test_chains_add_weights_and_know_no_order(kind: str) -> None:
    one, other = new_guide(kind), build(kind, CausalLM(OTHER), CausalLM(BASE))
    for ids in TEXTS:
        base = base_law(ids)
        single = guided(base, ids, (one, 0.8))
        torch.testing.assert_close(guided(base, ids, (one, 0.8), (other, 0.0)), single)
        torch.testing.assert_close(guided(base, ids, (one, 0.3), (one, 0.5)), single)
        torch.testing.assert_close(
            guided(base, ids, (one, 0.8), (other, 1.7)), guided(base, ids, (other, 1.7), (one, 0.8))
        )


def model_arithmetic(base: Tensor, factors: Sequence[tuple[Tensor, float]], temperature: float):
    """The law of an expression that is divided by the sum of its weights before the temperature."""
    total = 1 + sum(weight for _, weight in factors)
    mixed = base + sum(weight * log_factor for log_factor, weight in factors)
    return (mixed / total / temperature).log_softmax(-1)


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_temperature_comes_after_mixing_and_model_arithmetic_divides_it(
    kind: str, temperature: float
) -> None:
    weight = 1.5
    sampling = SamplingBatch([SamplingParams(temperature=temperature)], torch.device("cpu"))
    for ids in TEXTS:
        law = guided(base_law(ids), ids, (new_guide(kind), weight))
        direct = sampling.probs(law[None])[0]
        expected = ((base_law(ids) + weight * factor(kind, ids)) / temperature).softmax(-1)
        torch.testing.assert_close(direct, expected, rtol=0, atol=1e-12)
        factors = [(factor(kind, ids), weight)]
        divided = model_arithmetic(base_law(ids), factors, temperature / (1 + weight))
        torch.testing.assert_close(divided.exp(), direct, rtol=0, atol=1e-12)
        forgotten = model_arithmetic(base_law(ids), factors, temperature)
        assert distance(forgotten, direct.log()) > 0.03


@KINDS
def test_a_heavy_guide_decides_inside_the_support_of_the_base(kind: str) -> None:
    for ids in TEXTS:
        best = factor(kind, ids)
        forbidden = int(best.argmax())
        law = base_law(ids).index_fill(0, torch.tensor([forbidden]), -torch.inf).log_softmax(-1)
        heavy = guided(law, ids, (new_guide(kind), 1e5))
        best[forbidden] = -torch.inf
        assert heavy[forbidden] == -torch.inf
        assert heavy.exp()[int(best.argmax())].item() == pytest.approx(1)


@KINDS
def test_a_uniform_base_leaves_greedy_decoding_to_the_guide(kind: str) -> None:
    flat = tiny_llama(9)
    torch.nn.init.zeros_(flat.lm_head.weight)
    engine = Engine(CausalLM(flat), {"g": new_guide(kind)})
    for ids in TEXTS:
        wanted = list(ids)
        for _ in range(8):
            wanted.append(int(factor(kind, wanted).argmax()))
        decoded = decode(engine, ids, 0.3, temperature=0, max_tokens=8)
        assert decoded == wanted[len(ids) :]
        assert kind != "genarm" or decoded == greedy(GUIDE, ids, 8)


@KINDS
def test_truncation_comes_after_mixing(kind: str) -> None:
    """Where base and guided law disagree on the best token, `top_k=1` draws the guided one.

    Truncated before mixing it could only be the base's.
    """
    engine = Engine(CausalLM(BASE), {"g": new_guide(kind)})
    ids = [2]
    law = guided(base_law(ids), ids, (new_guide(kind), 3.0))
    before = base_law(ids).masked_fill(base_law(ids) < base_law(ids).max(), -torch.inf)
    truncated_first = guided(before, ids, (new_guide(kind), 3.0))
    assert law.argmax() != truncated_first.argmax() == base_law(ids).argmax()
    drawn = decode(engine, ids, 3.0, temperature=1.0, top_k=1, max_tokens=1)
    assert drawn == [int(law.argmax())]


@KINDS
def test_trailing_ids_are_cut_and_the_rest_renormalised(kind: str) -> None:
    """The law is the one of models that never had those ids."""
    wide = [tiny_llama(seed, vocab_size=20) for seed in (5, 6, 7)]
    narrow = [tiny_llama(0) for _ in wide]
    for small, large in zip(narrow, wide, strict=True):
        weights = large.state_dict()
        cut = {name: w[:16] if w.shape[0] == 20 else w for name, w in weights.items()}
        small.load_state_dict(cut)
    laws = []
    for base, one, other in (wide, narrow):
        lms = [CausalLM(model, vocab_size=16) for model in (base, one, other)]
        law = lms[0].forward([context(1, [3, 1, 4])]).logprobs_RV[0]
        laws.append(guided(law, [3, 1, 4], (build(kind, lms[1], lms[2]), 1.3)))
        assert laws[-1].logsumexp(-1).item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(*laws)


def permuted_tokenizer():
    tokenizer = word_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    swapped = text.replace('"how":5', '"how":6').replace('"do":6', '"do":5')
    assert swapped != text
    copy = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(swapped),
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    assert sorted(copy.get_vocab()) == sorted(tokenizer.get_vocab())
    return copy


@KINDS
def test_a_permuted_vocabulary_is_refused_and_the_message_says_what_works(
    kind: str, tmp_path: Path
) -> None:
    folder = save_guide(tmp_path / "guide", tokenizer=permuted_tokenizer(), kind=kind)
    settings = {} if kind == "genarm" else {"expert": ".", "anti_expert": "."}
    card = read_card(folder).model_copy(update={"settings": settings})
    write_card(folder, card)
    words = word_tokenizer()
    with pytest.raises(VocabMismatchError, match=r"`aligner`.*`best_of_n`"):
        check_guide(folder, base="b", base_vocab=fingerprint(words))
    write_card(folder, card.model_copy(update={"vocab": fingerprint(words)}))
    base = CausalLM(tiny_llama(1, vocab_size=len(words)))
    with pytest.raises(VocabMismatchError, match="must share the base's token ids"):
        load_guide(folder, card, GuideHost(base=base, tokenizer=words))


@pytest.mark.parametrize("beta_r", [0.5, 0.01])
def test_a_weight_in_units_of_reward_multiplies_the_reward_whatever_beta_r(beta_r: float) -> None:
    reward = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    trained = (reward / beta_r).log_softmax(-1)  # so that beta_r * log p_guide is the reward
    card = GuideCard(kind="genarm", base="b", vocab="v", beta_r=beta_r)
    weight = resolve_weight(card, 1.7, "reward")
    law = guided(base_law([3]), [3], (GenARMGuide(Table(trained)), weight))
    expected = (base_law([3]) + 1.7 * reward).log_softmax(-1)
    torch.testing.assert_close(law, expected, rtol=0, atol=1e-12)
    assert resolve_weight(card, 1.7, "logprob") == 1.7


def test_a_weight_in_units_of_reward_needs_the_scale_of_the_reward() -> None:
    card = GuideCard(kind="proxy_tuning", base="b", vocab="v")
    with pytest.raises(ConfigError, match="has no beta_r"):
        resolve_weight(card, 1.0, "reward")
