"""Our loop inside `generate`: the engine's tokens, and no option that is silently ignored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pilotfish.chat import Message, render_prompt
from pilotfish.decode.engine import Engine
from pilotfish.errors import CheckpointError, ConfigError, PromptError
from pilotfish.guides.base import Step, TokenGuide
from pilotfish.guides.card import read_card, write_card
from pilotfish.hf import GuideLogitsProcessor, guided_generate, load_guides
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen
from tests.chat_tokenizers import word_tokenizer
from tests.fakes import request, tiny_llama
from tests.folders import save_base, save_guide
from tests.hf_cases import (
    BASE,
    CHAINS,
    EOS,
    HF,
    LENGTH,
    OPTIONS,
    PAD,
    PROMPTS,
    batch,
    completions,
    greedy,
    guide_of,
)

LM = CausalLM(BASE)


def chain_of(chain: str) -> list[tuple[TokenGuide, float]]:
    return [guide_of(link) for link in chain.split()]


def engine_tokens(chain: str, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    guides = chain_of(chain)
    named = {str(at): guide for at, (guide, _) in enumerate(guides)}
    engine = Engine(CausalLM(BASE), named, end_ids=frozenset({EOS}))
    weights = {str(at): weight for at, (_, weight) in enumerate(guides)}
    paths: list[list[int]] = [[] for _ in prompts]
    for key, prompt in enumerate(prompts):
        engine.submit(request(key, prompt, guides=weights, max_tokens=LENGTH, **params))
    while engine.busy:
        for event in engine.step():
            paths[event.key].append(event.token_id)
    return paths


@pytest.mark.parametrize("chain", [*CHAINS, ""])
def test_greedy_batches_are_the_engines_and_the_formulas(chain: str) -> None:
    inputs = batch(PROMPTS)
    out = HF.generate(**inputs, **OPTIONS, custom_generate=guided_generate(LM, chain_of(chain)))
    found = completions(out, inputs)
    assert found == [greedy(prompt, chain) for prompt in PROMPTS]
    assert found == engine_tokens(chain, PROMPTS, temperature=0)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    longest = max(map(len, found))
    assert out.shape[1] == inputs["input_ids"].shape[1] + longest
    for row, ids in zip(out.tolist(), found, strict=True):
        assert row[len(row) - longest + len(ids) :] == [PAD] * (longest - len(ids))


def test_without_guides_it_is_generate_itself() -> None:
    inputs = batch(PROMPTS)
    found = HF.generate(**inputs, **OPTIONS, custom_generate=guided_generate(LM, []))
    assert torch.equal(found, HF.generate(**inputs, **OPTIONS))


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"top_k": 0}, {}),
        ({}, {}),  # generate's own default is top_k=50, which is more than there are
        ({"temperature": 0.6, "top_k": 5, "top_p": 0.8}, None),
        ({"top_k": 3, "renormalize_logits": True}, {"top_k": 3}),
    ],
)
def test_sampling_draws_what_the_engine_draws_with_the_same_options(
    options: dict[str, Any], params: dict[str, Any] | None
) -> None:
    inputs = batch(PROMPTS)
    made = guided_generate(LM, chain_of("genarm other"), seed=5)
    out = HF.generate(**inputs, **(OPTIONS | {"do_sample": True} | options), custom_generate=made)
    params = options if params is None else params
    assert completions(out, inputs) == engine_tokens("genarm other", PROMPTS, seed=5, **params)


def test_copies_of_a_prompt_differ_and_torchs_seed_decides_where_none_is_given() -> None:
    inputs = batch(PROMPTS[:1])
    options = OPTIONS | {"do_sample": True, "num_return_sequences": 4}

    def draw(seed: int | None) -> Tensor:
        made = guided_generate(LM, chain_of("genarm"), seed=seed)
        return HF.generate(**inputs, **options, custom_generate=made)

    seeded = completions(draw(2**64 - 2), inputs)
    seeds = [2**64 - 2, 2**64 - 1, 0, 1]
    assert seeded == [engine_tokens("genarm", PROMPTS[:1], seed=seed)[0] for seed in seeds]
    assert len({tuple(ids) for ids in seeded}) > 1
    torch.manual_seed(1)
    one, other = draw(None), draw(None)
    assert one.shape != other.shape or not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(draw(None), one)


def test_a_structured_output_holds_the_sequences() -> None:
    inputs, made = batch(PROMPTS), guided_generate(LM, chain_of("genarm"))
    plain = HF.generate(**inputs, **OPTIONS, custom_generate=made)
    out = HF.generate(**inputs, **OPTIONS, custom_generate=made, return_dict_in_generate=True)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert torch.equal(out.sequences, plain)


class HiddenGuide:
    """Forbids the token that the first hidden unit points at."""

    needs_hidden = True

    def begin(self, contexts: Any) -> None: ...

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: None) -> Tensor:
        assert step.hidden_RD is not None
        banned = (step.hidden_RD[:, :1].abs() * 100).long() % 16
        return logprobs_RV.scatter(1, banned, -torch.inf).log_softmax(-1)

    def release(self, keys: Any) -> None: ...


def test_guides_that_read_hidden_states_work_here() -> None:
    inputs = batch(PROMPTS)
    made = guided_generate(LM, [(HiddenGuide(), 1.0)])
    found = completions(HF.generate(**inputs, **OPTIONS, custom_generate=made), inputs)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        for at, token in enumerate(ids):
            text = torch.tensor([[*prompt, *ids[:at]]])
            with torch.no_grad():
                hidden = BASE.model(input_ids=text).last_hidden_state[0, -1]
                logits = BASE.lm_head(hidden)
            logits[int(hidden[0].abs() * 100) % 16] = -torch.inf
            assert token == int(logits.argmax())


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"min_new_tokens": 3}, "MinNewTokensLengthLogitsProcessor"),
        ({"bad_words_ids": [[3]]}, "NoBadWordsLogitsProcessor"),
        ({"suppress_tokens": [3]}, "SuppressTokensLogitsProcessor"),
        ({"sequence_bias": {(3,): 1.0}}, "SequenceBiasLogitsProcessor"),
        ({"forced_eos_token_id": EOS}, "ForcedEOSTokenLogitsProcessor"),
        ({"exponential_decay_length_penalty": (2, 1.5)}, "ExponentialDecayLengthPenalty"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"prefix_allowed_tokens_fn": lambda *_: [3]}, "PrefixConstrainedLogitsProcessor"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper"),
        ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper"),
        ({"do_sample": True, "epsilon_cutoff": 0.1}, "EpsilonLogitsWarper"),
        ({"logits_processor": [Nothing()]}, "Nothing"),
        (
            {"do_sample": True, "top_k": 3, "logits_processor": [TopPLogitsWarper(0.5)]},
            "TopPLogitsWarper, TopKLogitsWarper",
        ),
        ({"logits_processor": [GuideLogitsProcessor(guide_of("genarm")[0])]}, "GuideLogitsProc"),
        ({"stopping_criteria": [Never()]}, "Never"),
        ({"max_time": 9.0}, "MaxTimeCriteria"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"position_ids": torch.tensor([[5, 6, 7]])}, "counts positions itself"),
    ],
)
def test_options_that_the_engine_does_not_have_are_errors(
    options: dict[str, Any], message: str
) -> None:
    made = guided_generate(LM, chain_of("genarm"))
    ids = torch.tensor([[3, 1, 4]])
    with pytest.raises(ConfigError, match=message):
        HF.generate(ids, **(OPTIONS | options), custom_generate=made)


def test_inputs_that_are_not_ids_are_errors() -> None:
    made = guided_generate(LM, chain_of("genarm"))
    embeds = BASE.get_input_embeddings()(torch.tensor([[3, 1, 4]]))
    with pytest.raises(ConfigError, match="reads input_ids alone"):
        HF.generate(inputs_embeds=embeds, **OPTIONS, custom_generate=made)
    past = BASE(input_ids=torch.tensor([[3, 1]]), use_cache=True).past_key_values
    ids = torch.tensor([[3, 1, 4]])
    with pytest.raises(ConfigError, match="Leave out past_key_values"):
        HF.generate(ids, past_key_values=past, **OPTIONS, custom_generate=made)
    right = {"input_ids": torch.tensor([[3, PAD]]), "attention_mask": torch.tensor([[1, 0]])}
    with pytest.raises(ConfigError, match="Pad on the left"):
        HF.generate(**right, **OPTIONS, custom_generate=made)


def test_another_model_and_too_long_a_prompt_are_errors() -> None:
    other: Any = tiny_llama(8)
    made = guided_generate(LM, chain_of("genarm"))
    with pytest.raises(ConfigError, match="made for another model"):
        other.generate(torch.tensor([[3]]), **OPTIONS, custom_generate=made)
    options = OPTIONS | {"max_new_tokens": 300}
    with pytest.raises(PromptError, match="more than the 256 positions"):
        HF.generate(torch.tensor([[3]]), **options, custom_generate=made)


class Fragile(HiddenGuide):
    needs_hidden = False

    def __init__(self) -> None:
        self.released: list[int] = []

    def tilt(self, logprobs_RV: Tensor, step: Step, evidence: None) -> Tensor:
        raise KeyboardInterrupt

    def release(self, keys: Any) -> None:
        self.released += keys


def test_an_interrupted_call_releases_its_rows() -> None:
    guide, inputs = Fragile(), batch(PROMPTS)
    made = guided_generate(LM, [(guide, 1.0)])
    with pytest.raises(KeyboardInterrupt):
        HF.generate(**inputs, **OPTIONS, custom_generate=made)
    assert len(set(guide.released)) == len(PROMPTS)


def test_guides_load_from_folders_for_a_model_of_transformers(tmp_path: Path) -> None:
    words = word_tokenizer()
    save_base(tmp_path / "base", tokenizer=words)
    folder = save_guide(tmp_path / "guide", tokenizer=words)
    write_card(folder, read_card(folder).model_copy(update={"template": "own"}))
    model: Any = load_frozen(tmp_path / "base")
    base, guides = load_guides(model, words, {"g": folder}, num_slots=3)
    assert base.num_slots == 3
    texts = ("how do i boil it", "good luck")
    messages: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    pad: Any = words.pad_token_id
    inputs = batch([render_prompt(words, one) for one in messages], pad=pad)
    options = OPTIONS | {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    chain = [(guides["g"], 1.5)]
    ours = guided_generate(base, chain, messages=messages)
    mask = inputs["attention_mask"]
    theirs = GuideLogitsProcessor(*chain[0], attention_mask=mask, messages=messages)
    one = model.generate(**inputs, **options, custom_generate=ours)
    assert torch.equal(one, model.generate(**inputs, **options, logits_processor=[theirs]))
    assert not torch.equal(one, model.generate(**inputs, **options))
    with pytest.raises(PromptError, match="Send messages"):
        model.generate(**inputs, **options, custom_generate=guided_generate(base, chain))
    with pytest.raises(ConfigError, match="2 conversations for 3 rows"):
        model.generate(torch.tensor([[3], [4], [5]]), **options, custom_generate=ours)
    with pytest.raises(CheckpointError, match="is not a guide folder"):
        load_guides(model, words, {"g": tmp_path / "base"})
