"""The invisible cache: whatever was asked before, the answer is that of a fresh forward."""

import random

import pytest
import torch

from pilotfish.errors import ConfigError, PromptError
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import context, plain_logprobs, tiny_llama


def random_ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(16) for _ in range(length)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batched_cached_forwards_equal_a_fresh_forward(attention: str) -> None:
    model = tiny_llama(1)
    model.config._attn_implementation = attention
    lm = CausalLM(model, num_slots=4, prefill_chunk=5)
    rng = random.Random(0)
    contexts = [context(key, random_ids(rng, length)) for key, length in enumerate((1, 7, 23))]
    for _ in range(6):
        laws = lm.forward(contexts).logprobs_RV
        for law, asked in zip(laws, contexts, strict=True):
            # transformers' eager attention computes its softmax in float32, whatever the model.
            tolerance = 1e-5 if attention == "eager" else 1e-9
            fresh = plain_logprobs(model, asked.token_ids)
            torch.testing.assert_close(law, fresh, rtol=tolerance, atol=tolerance)
            asked.token_ids.append(rng.randrange(16))


def test_any_history_of_calls_gives_the_answers_of_a_fresh_model() -> None:
    """Joins, leaves, rewinds, changed prefixes, evictions, subsets and reorderings."""
    model = tiny_llama(2)
    lm = CausalLM(model, num_slots=3, prefill_chunk=4)
    rng = random.Random(3)
    texts = {key: random_ids(rng, rng.randrange(1, 9)) for key in range(6)}
    for _ in range(60):
        for key in rng.sample(range(6), 2):
            change = rng.choice(["grow", "rewind", "replace", "release"])
            if change == "grow":
                texts[key] = texts[key] + random_ids(rng, rng.randrange(1, 7))
            elif change == "rewind":
                texts[key] = texts[key][: rng.randrange(1, len(texts[key]) + 1)]
            elif change == "replace":
                at = rng.randrange(len(texts[key]))
                texts[key] = [*texts[key][:at], rng.randrange(16), *texts[key][at + 1 :]]
            else:
                lm.release([key])
        asked = [context(key, texts[key]) for key in rng.sample(range(6), rng.randrange(1, 4))]
        laws = lm.forward(asked).logprobs_RV
        for law, one in zip(laws, asked, strict=True):
            torch.testing.assert_close(law, plain_logprobs(model, one.token_ids))


def test_a_growing_context_feeds_each_token_once() -> None:
    model = tiny_llama(1)
    fed = 0

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal fed
        fed += inputs[0].numel()

    lm = CausalLM(model)
    model.get_input_embeddings().register_forward_pre_hook(count)
    growing = context(1, [1, 2, 3, 4, 5])
    for token in (6, 7, 8):
        lm.forward([growing])
        growing.token_ids.append(token)
    assert fed == 5 + 2


def test_prefill_within_a_budget_leaves_one_token_to_the_forward() -> None:
    model = tiny_llama(1)
    lm = CausalLM(model, prefill_chunk=4)
    asked = context(1, list(range(11)))
    assert [lm.prefill(asked, 6), lm.prefill(asked, 6), lm.prefill(asked, 6)] == [6, 4, 0]
    torch.testing.assert_close(
        lm.forward([asked]).logprobs_RV[0], plain_logprobs(model, asked.token_ids)
    )


def test_padded_vocabulary_is_cut_and_renormalised() -> None:
    model = tiny_llama(1)
    law = CausalLM(model, vocab_size=10).forward([context(1, [3, 1])]).logprobs_RV[0]
    expected = plain_logprobs(model, [3, 1])[:10].log_softmax(-1)
    torch.testing.assert_close(law, expected)


def test_hidden_state_is_what_the_output_embedding_reads() -> None:
    model = tiny_llama(1)
    out = CausalLM(model).forward([context(1, [3, 1]), context(2, [5, 5, 5])])
    expected = out.hidden_RD @ model.lm_head.weight.detach().T
    torch.testing.assert_close(out.logprobs_RV, expected.log_softmax(-1))


def test_a_context_longer_than_the_model_is_refused_with_both_numbers() -> None:
    lm = CausalLM(tiny_llama(1, max_position_embeddings=8))
    with pytest.raises(PromptError, match=r"9 tokens.*at most 8"):
        lm.forward([context(1, [1] * 9)])


def test_more_contexts_than_slots_are_answered_in_parts() -> None:
    model = tiny_llama(1)
    lm = CausalLM(model, num_slots=2)
    asked = [context(key, [key, *range(key)]) for key in range(5)]
    for law, one in zip(lm.forward(asked).logprobs_RV, asked, strict=True):
        torch.testing.assert_close(law, plain_logprobs(model, one.token_ids))


def test_sliding_window_models_are_refused() -> None:
    model = tiny_llama(1)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="sliding_attention"):
        CausalLM(model)
