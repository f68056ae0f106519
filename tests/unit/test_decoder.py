"""The worker that decodes for jobs, without a cluster: settings of guides at decode time."""

from pathlib import Path
from typing import Any

import pytest

from jobs.decoder import Decoder, check_setting, read_cards
from jobs.decoding_config import DecodingConfig, DecodingJobConfig, KitchenPrompts
from jobs.pool import Chunk
from pilotfish.errors import ConfigError, PromptError
from pilotfish.evaluation.rewards import NoRewardConfig
from pilotfish.evaluation.settings import Setting
from tests.folders import byte_tokenizer, save_base, save_proxy, save_reward_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decoder")
    save_base(root / "base")
    save_proxy(root / "loose", p_t=0.001, top_k=6)
    save_proxy(root / "tight", p_t=0.9, top_k=6)
    save_reward_model(root / "reward")
    return root


def job(root: Path, guide: str | dict[str, Any]) -> DecodingJobConfig:
    return DecodingJobConfig(
        output=str(root / "out"),
        base=str(root / "base"),
        guides={"g": guide},
        prompts=KitchenPrompts(source="kitchen"),
        reward=NoRewardConfig(),
        decoding=DecodingConfig(max_tokens=16),
    )


def texts(config: DecodingJobConfig, **args: Any) -> list[str]:
    setting = Setting(name="x", guides={"g": 1.0}, args={"g": args} if args else {})
    chunk = Chunk(items=["the cat", "the dog", "on the mat"], start=0, label="x")
    return [answer.text for answer in Decoder(config, [setting]).process(chunk).answers]


def test_args_decode_as_a_card_with_those_settings_would(root: Path):
    loose, tight = job(root, str(root / "loose")), job(root, str(root / "tight"))
    assert texts(loose, p_t=0.9) == texts(tight) != texts(loose)


def test_a_guide_may_be_the_fields_of_a_card_over_models_that_lie_elsewhere(root: Path):
    best = {"kind": "best_of_n", "settings": {"reward": str(root / "reward"), "num_drafts": 2}}
    assert texts(job(root, best)) != texts(job(root, best), num_drafts=1)


def test_settings_are_checked_on_cards_without_loading_anything(root: Path):
    cards = read_cards(job(root, str(root / "loose")), byte_tokenizer())
    with pytest.raises(ConfigError, match="head of a guide of kind 'proxy' cannot change"):
        check_setting(Setting(name="x", guides={"g": 1.0}, args={"g": {"head": 1}}), cards)
    with pytest.raises(PromptError, match="no strength"):
        check_setting(Setting(name="x", guides={"g": 0.3}), cards)
