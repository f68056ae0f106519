"""One sequence at several positions, candidates behind it, shared prefixes, bounded memory."""

import random

import pytest
import torch
from transformers import LlamaForSequenceClassification

from pilotfish.context import Context, Prompt
from pilotfish.models import body
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.reward import RewardModel, RewardReading
from tests.fakes import context, plain_logprobs, tiny_llama, tiny_reward_model


def ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(16) for _ in range(length)]


@pytest.mark.parametrize("remember", [True, False])
def test_prefixes_of_one_sequence_are_answered_as_if_each_stood_alone(remember: bool) -> None:
    model, rng = tiny_llama(1), random.Random(1)
    lm = CausalLM(model, num_slots=3, prefill_chunk=4)
    for _ in range(20):
        texts = [ids(rng, rng.randrange(2, 20)) for _ in range(3)]
        asked = [
            context(key, texts[key][:length])
            for key in range(3)
            for length in sorted(rng.sample(range(1, len(texts[key]) + 1), 2))
        ]
        rng.shuffle(asked)
        laws = lm.forward(asked, remember=remember).logprobs_RV
        for law, one in zip(laws, asked, strict=True):
            torch.testing.assert_close(law, plain_logprobs(model, one.token_ids))


def test_remembered_states_are_not_computed_again() -> None:
    model = tiny_llama(1)
    lm = CausalLM(model)
    text = [1, 2, 3, 4, 5]
    for length in (3, 4):
        lm.forward([context(1, text[:length])], remember=True)
    before = lm.num_forwards
    laws = lm.forward([context(1, text[:length]) for length in (3, 4, 5)]).logprobs_RV
    assert lm.num_forwards == before + 1
    for law, length in zip(laws, (3, 4, 5), strict=True):
        torch.testing.assert_close(law, plain_logprobs(model, text[:length]))


@pytest.mark.parametrize(("num_slots", "siblings"), [(2, 512), (8, 512), (8, 6), (8, 1)])
def test_candidates_are_read_as_if_each_were_appended_alone(
    num_slots: int, siblings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through growing, rewinding and nested contexts, chosen candidates and strangers."""
    monkeypatch.setattr(body, "_SIBLINGS", siblings)
    model, rng = tiny_llama(2), random.Random(2)
    lm = CausalLM(model, num_slots=num_slots, prefill_chunk=6)
    texts = {key: ids(rng, 3 + 9 * key) for key in range(3)}
    for _ in range(12):
        asked = [context(key, list(text)) for key, text in texts.items()]
        if rng.random() < 0.3:
            asked.append(context(0, texts[0][:2]))
        rng.shuffle(asked)
        picks = torch.tensor([rng.sample(range(16), 4) for _ in asked])
        before = lm.num_forwards
        hidden_RKD = lm.candidates(asked, picks)
        assert lm.num_forwards == before + picks.numel()
        laws = lm.logprobs(hidden_RKD)
        for row, one in enumerate(asked):
            for place, token in enumerate(picks[row].tolist()):
                fresh = plain_logprobs(model, [*one.token_ids, token])
                torch.testing.assert_close(laws[row, place], fresh)
        for one, some in zip(asked, picks.tolist(), strict=True):
            if len(one.token_ids) == len(text := texts[one.key]):
                text.append(rng.choice([*some, rng.randrange(16)]))
        if rng.random() < 0.5:
            asked = [context(key, list(text)) for key, text in texts.items()]
            for law, one in zip(lm.forward(asked).logprobs_RV, asked, strict=True):
                torch.testing.assert_close(law, plain_logprobs(model, one.token_ids))


def test_the_candidate_that_is_chosen_costs_no_second_forward() -> None:
    model = tiny_llama(1)
    lm = CausalLM(model)
    growing = context(1, [3, 1, 4])
    lm.forward([growing])
    lm.candidates([growing], torch.tensor([[5, 9, 2]]))
    before = lm.num_forwards
    growing.token_ids.append(9)
    law = lm.forward([growing]).logprobs_RV[0]
    assert lm.num_forwards == before
    torch.testing.assert_close(law, plain_logprobs(model, [3, 1, 4, 9]))


def test_candidates_of_a_sequence_that_moved_to_another_slot_are_looked_at_again() -> None:
    model = tiny_llama(1)
    lm = CausalLM(model, num_slots=2)
    first, growing, late = context(1, [3, 1, 4, 1]), context(2, [2, 7]), context(3, [9, 9])
    lm.candidates([first, growing], torch.tensor([[5, 9], [6, 8]]))
    lm.release([1])
    growing.token_ids.append(8)
    found = lm.logprobs(lm.candidates([growing, late], torch.tensor([[5, 9], [6, 8]])))
    torch.testing.assert_close(found[0, 0], plain_logprobs(model, [2, 7, 8, 5]))


def test_room_is_made_for_several_at_once_and_nobody_left_loses_anything() -> None:
    model, rng = tiny_llama(1), random.Random(6)
    lm = CausalLM(model, num_slots=9)
    texts = {key: ids(rng, rng.randrange(2, 20)) for key in range(40)}
    lm.forward([context(key, texts[key]) for key in range(9)])
    for start in range(9, 36, 4):
        lm.release(rng.sample(range(start), 3))
        kept = [row.key for row in lm.body._placement.rows if not row.released][:4]
        asked = [context(key, texts[key]) for key in [*kept, *range(start, start + 4)]]
        for law, one in zip(lm.forward(asked).logprobs_RV, asked, strict=True):
            torch.testing.assert_close(law, plain_logprobs(model, one.token_ids))
        rows = list(lm.body._placement.rows)
        assert len(rows) == 9
        for row in rows:  # those that nobody asked about have their keys and values still
            longer = [*texts[row.key], 3]
            law = lm.forward([context(row.key, longer)]).logprobs_RV[0]
            torch.testing.assert_close(law, plain_logprobs(model, longer))


def test_a_shared_prefix_is_copied_not_computed_also_after_its_sequence_ended() -> None:
    model = tiny_llama(1)
    lm = CausalLM(model, num_slots=4)
    prefix = list(range(12))
    lm.forward([context(1, [*prefix, 3])])
    lm.release([1])
    both = [context(2, [*prefix, 5]), context(3, [*prefix, 7, 1])]
    laws = lm.forward(both).logprobs_RV
    assert lm.body.num_shared == 2 * 12
    for law, one in zip(laws, both, strict=True):
        torch.testing.assert_close(law, plain_logprobs(model, one.token_ids))


def test_sequences_that_arrive_together_share_their_beginning() -> None:
    model = tiny_llama(1)
    lm = CausalLM(model, num_slots=4)
    prompt = list(range(11))
    asked = [context(key, list(prompt)) for key in range(4)]
    for law in lm.forward(asked).logprobs_RV:
        torch.testing.assert_close(law, plain_logprobs(model, prompt))
    assert lm.body.num_shared == 3 * 10


def test_a_parent_is_where_the_prefix_comes_from() -> None:
    model = tiny_llama(1)
    lm = CausalLM(model, num_slots=4)
    lm.forward([context(1, [3, 1, 4])])
    children = [Context(key, Prompt([3]), [3, 1, 4, key], parent=1) for key in (5, 6)]
    for law, one in zip(lm.forward(children).logprobs_RV, children, strict=True):
        torch.testing.assert_close(law, plain_logprobs(model, one.token_ids))
    assert lm.body.num_shared == 2 * 3


def test_bounded_memory_leaves_room_for_fewer_long_sequences() -> None:
    model, rng = tiny_llama(1), random.Random(4)
    lm = CausalLM(model, num_slots=8, max_cache_tokens=4 * 64)
    assert (lm.body.rows_at(50), lm.body.rows_at(100), lm.body.rows_at(250)) == (4, 2, 1)
    texts = [ids(rng, length) for length in (10, 20, 70, 30, 130, 5)]
    for _ in range(3):
        asked = [context(key, text) for key, text in enumerate(texts)]
        for law, one in zip(lm.forward(asked).logprobs_RV, asked, strict=True):
            torch.testing.assert_close(law, plain_logprobs(model, one.token_ids))
        texts = [[*text, rng.randrange(16)] for text in texts]


def plain_reward(model: LlamaForSequenceClassification, one: Context, pooling: str) -> float:
    hidden = model.model(input_ids=torch.tensor([one.token_ids])).last_hidden_state[0]
    if pooling == "last":
        return model.score(hidden[-1]).item()
    return model.score(hidden[len(one.prompt.token_ids) :].sum(0) / 7).item()


@pytest.mark.parametrize("pooling", ["last", "pooled"])
@pytest.mark.parametrize("num_slots", [2, 3])
def test_rewards_of_texts_and_candidates_equal_those_of_fresh_forwards(pooling, num_slots) -> None:
    model, rng = tiny_reward_model(3), random.Random(5)
    pooled = RewardReading(pooling="pooled", pool_length=7)
    reading = pooled if pooling == "pooled" else RewardReading()
    rewards = RewardModel(model, reading, num_slots=num_slots, prefill_chunk=4)
    contexts = [Context(key, Prompt(p := ids(rng, 2 + key)), list(p)) for key in range(3)]
    for _ in range(8):
        picks = torch.tensor([rng.sample(range(16), 3) for _ in contexts])
        found = rewards.candidate_rewards(contexts, picks)
        for row, one in enumerate(contexts):
            for place, token in enumerate(picks[row].tolist()):
                longer = Context(99, one.prompt, [*one.token_ids, token])
                expected = plain_reward(model, longer, pooling)
                assert found[row, place].item() == pytest.approx(expected, abs=1e-9)
            one.token_ids.append(rng.choice([int(picks[row, 1]), rng.randrange(16)]))
        whole = rewards.rewards(contexts)
        expected = [plain_reward(model, one, pooling) for one in contexts]
        assert whole.tolist() == pytest.approx(expected, abs=1e-9)
