"""Proxy-tuning: the limits in which it is known what comes out, and how it is loaded."""

from pathlib import Path

import pytest
import torch

from pilotfish.errors import ConfigError
from pilotfish.guides import check_guide, load_guide
from pilotfish.guides.card import GuideCard, write_card
from pilotfish.guides.host import GuideHost
from pilotfish.guides.proxy_tuning import ProxyTuningGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.vocab import fingerprint
from tests.chat_tokenizers import word_tokenizer
from tests.fakes import context, plain_logprobs, tiny_llama
from tests.folders import save_base
from tests.guide_laws import Table, distance, guided

BASE, GUIDE = tiny_llama(1), tiny_llama(2)
TEXTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]


def base_law(ids: list[int]) -> torch.Tensor:
    return plain_logprobs(BASE, ids)


def test_an_expert_that_learnt_nothing_changes_nothing() -> None:
    for ids in TEXTS:
        same = ProxyTuningGuide(CausalLM(GUIDE), CausalLM(GUIDE))
        torch.testing.assert_close(guided(base_law(ids), ids, (same, 2.0)), base_law(ids))


def test_a_base_that_is_the_anti_expert_becomes_the_expert() -> None:
    for ids in TEXTS:
        guide = ProxyTuningGuide(CausalLM(GUIDE), CausalLM(BASE))
        law = guided(base_law(ids), ids, (guide, 1.0))
        torch.testing.assert_close(law, plain_logprobs(GUIDE, ids))


def test_an_expert_tuned_for_a_reward_gives_the_base_that_is_best_at_its_divergence() -> None:
    """One step: max E[r] - beta KL(p || base) has p = base * exp(r / beta) / Z."""
    generator = torch.Generator().manual_seed(3)
    reward, anti = torch.randn(2, 16, dtype=torch.float64, generator=generator)
    beta, anti = 0.4, anti.log_softmax(-1)
    expert = (anti + reward / beta).log_softmax(-1)
    law = guided(base_law([3]), [3], (ProxyTuningGuide(Table(expert), Table(anti)), 1.0))
    best = (base_law([3]) + reward / beta).log_softmax(-1)
    torch.testing.assert_close(law, best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_probabilities_of_zero_make_no_holes_in_the_law(weight: float) -> None:
    zero = -torch.inf
    expert = torch.tensor([zero, -1.0, zero, -0.7], dtype=torch.float64)
    anti = torch.tensor([zero, -1.0, -0.7, -1.2], dtype=torch.float64)
    base = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    guide = ProxyTuningGuide(Table(expert), Table(anti))
    law = guided(base, [3], (guide, weight))
    assert not law.isnan().any()
    if weight > 0:  # zero over zero says nothing; zero over something forbids
        assert law[2].exp() == 0
        torch.testing.assert_close(law[0] - law[1], base[0] - base[1])
        no_anti = ProxyTuningGuide(Table(expert), Table(torch.full_like(anti, zero)))
        assert not guided(base, [3], (no_anti, weight)).isnan().any()


def test_both_models_of_proxy_tuning_are_loaded_from_beside_the_card(tmp_path: Path) -> None:
    words = word_tokenizer()
    folder = tmp_path / "guide"
    for seed, name in enumerate(("expert", "small")):
        save_base(folder / name, seed=seed + 1, tokenizer=words)
    settings = {"expert": "expert", "anti_expert": "small"}
    card = GuideCard(
        kind="proxy_tuning", base="b", vocab=fingerprint(words), settings=settings, weight=0.5
    )
    write_card(folder, card)
    base = CausalLM(tiny_llama(1, vocab_size=len(words), dtype=torch.float32))
    host = GuideHost(base=base, tokenizer=words)
    guide = load_guide(folder, check_guide(folder, base="b", base_vocab=card.vocab), host)
    assert isinstance(guide, ProxyTuningGuide)
    expert, anti = (plain_logprobs(lm.model, [3]) for lm in host.lms)  # type: ignore[arg-type]
    law = base.forward([context(1, [3])]).logprobs_RV[0]
    expected = (law + 0.5 * (expert - anti)).log_softmax(-1)
    torch.testing.assert_close(guided(law, [3], (guide, 0.5)), expected, rtol=0, atol=1e-5)
    assert distance(expert, anti) > 0.05
    far = GuideHost(base=base, tokenizer=words, remote=Table(law))
    with pytest.raises(ConfigError, match="no single LM"):
        load_guide(folder, card, far)
