"""Variants of loaded guides: what may change, what may not, and what they are called."""

from pathlib import Path
from typing import Any

import pytest

from pilotfish import Pilot
from pilotfish.errors import ConfigError
from pilotfish.guides import variant_name, vary_guide
from pilotfish.guides.base import TokenGuide
from pilotfish.guides.card import GuideCard
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.own_template import OwnTemplate
from pilotfish.guides.transfer_q import TransferQGuide
from pilotfish.guides.transfer_q_settings import TransferQSettings
from pilotfish.models.causal_lm import CausalLM
from tests.chat_tokenizers import word_tokenizer
from tests.enumerable import TabularLM, TabularReward, random_policy, random_reward
from tests.fakes import tiny_llama
from tests.folders import save_base, save_guide, save_proxy


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Pilot:
    root: Path = tmp_path_factory.mktemp("models")
    guides = {"proxy": save_proxy(root / "proxy"), "helpful": save_guide(root / "guide")}
    return Pilot(save_base(root / "base"), guides=guides)


def test_a_variant_is_called_after_its_settings_in_any_order(pilot: Pilot) -> None:
    name = pilot.vary("proxy", top_k=5, p_t=0.9)
    assert name == 'proxy{"p_t":0.9,"top_k":5}' == pilot.vary("proxy", p_t=0.9, top_k=5)
    assert pilot.cards[name].settings["top_k"] == 5
    assert pilot.vary("proxy") == variant_name("proxy", {}) == "proxy"


@pytest.mark.parametrize(
    ("guide", "args", "message"),
    [
        ("proxy", {"features": "pre_token"}, "features of .*'proxy' cannot change.*p_t.*gate"),
        ("proxy", {"p_t": 1.5}, "p_t: .*less than or equal to 1"),
        ("proxy", {"max_tries": 3}, "only candidate_order=iid counts tries"),
        ("proxy", {"gate": -1.0}, "wanted a number of nats >= 0"),
        ("proxy", {"p_t": float("nan")}, "p_t"),
        ("helpful", {"p_t": 0.5}, "what can: gate"),
        ("nobody", {}, "no guide named 'nobody' has a card to vary; loaded with one: proxy"),
    ],
)
def test_what_cannot_change_is_refused(
    pilot: Pilot, guide: str, args: dict[str, Any], message: str
) -> None:
    before = list(pilot.engine.guides)
    with pytest.raises(ConfigError, match=message):
        pilot.vary(guide, **args)
    assert list(pilot.engine.guides) == before


def test_gate_and_template_of_its_own_are_put_around_the_variant_anew() -> None:
    words = word_tokenizer()
    inner = GenARMGuide(CausalLM(tiny_llama(1, vocab_size=len(words))))
    card = GuideCard(kind="genarm", base="b", vocab="v", template="own", gate=0.5)
    loaded: TokenGuide = Gated(OwnTemplate(inner, words), 0.5)
    shut = vary_guide(loaded, card, {"gate": 2.0})
    assert isinstance(shut, Gated)
    assert isinstance(shut.guide, OwnTemplate)
    assert shut.guide.guide is inner
    assert isinstance(vary_guide(loaded, card, {"gate": None}), OwnTemplate)


def transfer_q() -> tuple[TransferQGuide, GuideCard]:
    settings = {
        "rollout": "r",
        "reward": "w",
        "mode": "indirect",
        "baseline_reward": "b",
        "beta": 0.5,
        "num_rollouts": 4,
    }
    rewards = [TabularReward(random_reward(seed), horizon=3) for seed in (1, 2)]
    lm = TabularLM(random_policy(3), horizon=3)
    guide = TransferQGuide(lm, *rewards, settings=TransferQSettings(**settings))
    return guide, GuideCard(kind="transfer_q", base="b", vocab="v", settings=settings)


def test_transfer_q_can_leave_out_its_baseline_but_not_have_another() -> None:
    guide, card = transfer_q()
    direct = vary_guide(guide, card, {"mode": "direct", "baseline_reward": None, "beta": None})
    assert isinstance(direct, TransferQGuide)
    assert direct._readers == guide._readers[:1]
    sharper = vary_guide(guide, card, {"beta": 0.1})
    assert isinstance(sharper, TransferQGuide)
    assert sharper._readers == guide._readers
    with pytest.raises(ConfigError, match="what is loaded is 'b'"):
        vary_guide(guide, card, {"baseline_reward": "other"})
    with pytest.raises(ConfigError, match="set them to null"):
        vary_guide(guide, card, {"mode": "direct"})
