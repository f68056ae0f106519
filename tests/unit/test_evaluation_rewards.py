from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from pilotfish import world
from pilotfish.chat import render_completion, render_prompt
from pilotfish.data.records import PromptText
from pilotfish.errors import CheckpointError, DataError
from pilotfish.evaluation.rewards import (
    KitchenReward,
    KitchenRewardConfig,
    ModelReward,
    ModelRewardConfig,
    NoReward,
    NoRewardConfig,
    build_reward,
    describe,
)

SCENES = world.scenes(7, seed=5)
PROMPTS: list[PromptText] = [tuple(scene.messages) for scene in SCENES]
ANSWERS = [
    "hello ben , here is one step .",
    "good luck , fool .",
    "",
    *["first wash the rice ."] * 4,
]


def save_classifier(folder: Path, *, num_labels: int = 1) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(world.VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=None,
    )
    config.num_labels = num_labels
    LlamaForSequenceClassification(config).save_pretrained(folder)
    world.build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_kitchen_judges_as_the_world_does_and_says_why():
    judged = KitchenReward().judge(PROMPTS, ANSWERS)
    for scene, answer, judgement in zip(SCENES, ANSWERS, judged, strict=True):
        score = world.score(scene, answer)
        assert judgement.reward == score.total
        assert judgement.parts == {"helpful": score.helpful, "harmless": score.harmless}
        assert judgement.bad == score.bad
        assert [(r.label, r.value) for r in judgement.reasons] == [
            (aspect.label, aspect.total) for aspect in score.aspects
        ]


def test_the_kitchen_judges_plain_text_prompts_too():
    [by_text] = KitchenReward().judge([SCENES[0].text], ANSWERS[:1])
    [by_messages] = KitchenReward().judge(PROMPTS[:1], ANSWERS[:1])
    assert by_text == by_messages


def test_the_kitchen_refuses_other_questions():
    with pytest.raises(DataError, match="not a kitchen question"):
        KitchenReward().judge(["how are you ?"], ["fine ."])


def test_the_kitchen_refuses_conversations_of_several_turns():
    turns: PromptText = (
        *SCENES[0].messages,
        {"role": "assistant", "content": "hm ."},
        {"role": "user", "content": "well ?"},
    )
    with pytest.raises(DataError, match="3 turns"):
        KitchenReward().judge([turns], ["fine ."])


def test_a_model_reward_in_padded_batches_is_that_of_each_answer_alone(tmp_path: Path):
    path = save_classifier(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(path).eval()
    tokenizer = world.build_tokenizer()
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = render_prompt(tokenizer, prompt) + render_completion(tokenizer, prompt, answer)
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
            expected.append(model.score(hidden[0, -1]).item())
    config = ModelRewardConfig(path=path, batch_size=3)
    judged = ModelReward(config, device="cpu").judge(PROMPTS, ANSWERS)
    assert [judgement.reward for judgement in judged] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected[:3])) == 3


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path):
    path = save_classifier(tmp_path, num_labels=3)
    with pytest.raises(CheckpointError, match="3 labels"):
        ModelReward(ModelRewardConfig(path=path), device="cpu")


def test_a_missing_reward_model_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere"):
        ModelReward(ModelRewardConfig(path=str(tmp_path / "nowhere")), device="cpu")


def test_without_a_reward_nothing_is_judged():
    judged = NoReward().judge(PROMPTS, ANSWERS)
    assert len(judged) == len(ANSWERS)
    assert {judgement.reward for judgement in judged} == {None}


def test_configs_build_the_judge_they_name(tmp_path: Path):
    model = ModelRewardConfig(path=save_classifier(tmp_path))
    assert isinstance(build_reward(KitchenRewardConfig()), KitchenReward)
    assert isinstance(build_reward(NoRewardConfig()), NoReward)
    assert isinstance(build_reward(model, device="cpu"), ModelReward)
    assert model.path in describe(model)
