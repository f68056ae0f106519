"""Transfer Q* guides on disk, and the settings that are refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish import Pilot, SamplingParams
from pilotfish.chat import stop_ids
from pilotfish.config import parse
from pilotfish.errors import ConfigError
from pilotfish.guides.transfer_q_settings import TransferQSettings
from pilotfish.models.loading import load_frozen, load_frozen_scorer
from tests.chat_tokenizers import word_tokenizer
from tests.fakes import (
    plain_logprobs,
    plain_reward,
)
from tests.folders import save_base, save_card, save_reward_model
from tests.transfer_q import (
    indirect,
    plain_rollout,
    settings,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, words = tmp_path_factory.mktemp("models"), word_tokenizer()
    save_base(root / "base", tokenizer=words)
    save_base(root / "dpo", seed=5, tokenizer=words)
    save_reward_model(root / "reward", tokenizer=words)
    save_reward_model(root / "old_reward", seed=6, tokenizer=words)
    return root


def test_a_saved_guide_is_loaded_and_decodes_by_its_formula(root: Path) -> None:
    card = save_card(
        root / "direct",
        kind="transfer_q",
        tokenizer=word_tokenizer(),
        rollout="../dpo",
        reward="../reward",
        num_candidates=5,
        rollout_tokens=4,
        rollout_slots=3,
    )
    pilot = Pilot(root / "base", guides={"q": card}, num_slots=2)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    [done] = pilot.generate(["how do i make soup ?"], params, guides={"q": 1.5})
    base: Any = load_frozen(root / "base")
    rho: Any = load_frozen(root / "dpo")
    scorer: Any = load_frozen_scorer(root / "reward")
    end = stop_ids(pilot.tokenizer)
    ids: Any = pilot.tokenizer("how do i make soup ?")["input_ids"]
    for token, logprob in zip(done.token_ids, done.logprobs, strict=True):
        incoming = plain_logprobs(base, ids)
        law = torch.full_like(incoming, -torch.inf)
        for one in incoming.topk(5).indices.tolist():
            text = plain_rollout([*ids, one], 4, model=rho, end=end)
            law[one] = incoming[one] + 1.5 * plain_reward(scorer, text)
        law = law.log_softmax(-1)
        assert token == int(law.argmax())
        assert logprob == pytest.approx(law[token].item(), abs=1e-3)
        ids.append(token)


def test_the_end_tokens_of_the_base_end_the_rollouts_of_a_loaded_guide(root: Path) -> None:
    """With a rollout model that draws the end token at once, whatever it reads."""
    model: Any = load_frozen(root / "dpo")
    [end] = stop_ids(word_tokenizer())
    model.lm_head.weight.data.zero_()[end] = 1.0
    model.model.embed_tokens.weight.data.fill_(1.0)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(root / "brief")
    word_tokenizer().save_pretrained(root / "brief")
    card = save_card(
        root / "ending",
        kind="transfer_q",
        tokenizer=word_tokenizer(),
        rollout="../brief",
        reward="../reward",
        num_candidates=3,
    )
    pilot = Pilot(root / "base", guides={"q": card})
    pilot.generate(["soup"], SamplingParams(max_tokens=1))
    base, rollout, reward = 1, 1 + 3, 1 + 3
    assert pilot.num_forwards == base + rollout + reward


def test_an_indirect_guide_with_pooled_rewards_decodes(root: Path) -> None:
    card = save_card(
        root / "indirect",
        kind="transfer_q",
        tokenizer=word_tokenizer(),
        rollout="../dpo",
        reward="../reward",
        baseline_reward="../old_reward",
        mode="indirect",
        beta=0.5,
        num_rollouts=4,
        num_candidates=3,
        rollout_tokens=3,
        pooling="pooled",
        pool_length=8.0,
        rollout_slots=5,
    )
    pilot = Pilot(root / "base", guides={"q": card}, num_slots=2)
    params = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
    prompts = ["soup", "how do i make soup ?", "make it"]
    together = pilot.generate(prompts, params)
    assert [pilot.generate([prompt], params)[0].token_ids for prompt in prompts] == [
        done.token_ids for done in together
    ]
    assert together != pilot.generate(prompts, params, guides={})


REFUSED = [
    ({"mode": "indirect", "beta": 1.0, "num_rollouts": 4}, "needs baseline_reward"),
    ({"mode": "indirect", "baseline_reward": "r", "num_rollouts": 4}, "needs beta"),
    ({"mode": "indirect", "baseline_reward": "r", "beta": 1.0}, "num_rollouts 1 is mode direct"),
    ({"baseline_reward": "r"}, "are for mode: indirect"),
    ({"beta": 0.1}, "are for mode: indirect"),
    ({"num_rollouts": 2, "rollout_temperature": 0.0}, "they are all the same"),
    ({"num_rollouts": 2, "rollout_tokens": 0}, "they are all the same"),
    ({"rollout_tokens": 5, "max_rollout_tokens": 9}, "set one"),
    ({"pool_length": 5.0}, "divides by nothing"),
    ({"mode": "sideways"}, "'direct' or 'indirect'"),
    ({"num_rollout": 3}, "did you mean 'num_rollouts'"),
    *[
        ({"reference_parity": True, name: value}, f"reference_parity fixes {name}")
        for name, value in {
            "num_rollouts": 4,
            "proposal": "rollout",
            "rollout_tokens": 20,
            "max_rollout_tokens": 20,
            "rollout_temperature": 1.0,
        }.items()
    ],
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_settings_that_cannot_be_honoured_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_parity_fixes_beta_too_and_every_valid_card_survives_its_own_dump() -> None:
    with pytest.raises(ConfigError, match="reference_parity fixes beta"):
        indirect(reference_parity=True)
    for config in (
        settings(),
        settings(rollout_tokens=7),
        indirect(num_rollouts=4),
        settings(reference_parity=True),
        settings(mode="indirect", baseline_reward="r", reference_parity=True),
    ):
        assert parse(TransferQSettings, config.model_dump(), source="card") == config


def test_one_rollout_is_greedy_and_several_are_sampled_unless_told_otherwise() -> None:
    cases = itertools.product((1, 4), (None, 0.7))
    found = [settings(num_rollouts=n, rollout_temperature=t).temperature for n, t in cases]
    assert found == [0.0, 0.7, 1.0, 0.7]
