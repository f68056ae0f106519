"""Logits processors inside `generate`: the guided law of the formula, however rows are batched."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from pilotfish.errors import ConfigError
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.hf import GuideLogitsProcessor
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import plain_logprobs, tiny_llama
from tests.hf_cases import (
    CHAINS,
    EOS,
    GUIDE,
    HF,
    LENGTH,
    OPTIONS,
    OTHER,
    PAD,
    PROMPTS,
    batch,
    completions,
    greedy,
    guide_of,
    law_of,
)


def processors(chain: str, **rows: Any) -> list[GuideLogitsProcessor]:
    made: list[GuideLogitsProcessor] = []
    for link in chain.split():
        guide, weight = guide_of(link)
        given: dict[str, Any] = {"after": made[-1]} if made else rows
        made.append(GuideLogitsProcessor(guide, weight, **given))
    return made


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("rows", ["mask", "padding", "padding and ends"])
def test_greedy_batches_padded_on_the_left_write_what_the_formula_says(
    chain: str, rows: str
) -> None:
    inputs = batch(PROMPTS)
    given: dict[str, Any] = {
        "mask": {"attention_mask": inputs["attention_mask"]},
        "padding": {"pad_token_id": PAD},
        "padding and ends": {"pad_token_id": PAD, "eos_token_id": [EOS]},
    }[rows]
    out = HF.generate(**inputs, **OPTIONS, logits_processor=processors(chain, **given))
    expected = [greedy(prompt, chain) for prompt in PROMPTS]
    assert completions(out, inputs) == expected
    for without in ("", chain.replace("gated-", "") if "gated" in chain else "other"):
        assert expected != [greedy(prompt, without) for prompt in PROMPTS]


def test_without_after_a_chain_of_products_is_the_same() -> None:
    inputs = batch(PROMPTS)
    mask = inputs["attention_mask"]
    apart = [GuideLogitsProcessor(*guide_of(g), attention_mask=mask) for g in ("genarm", "other")]
    out = HF.generate(**inputs, **OPTIONS, logits_processor=apart)
    assert completions(out, inputs) == [greedy(prompt, "genarm other") for prompt in PROMPTS]


@pytest.mark.parametrize("chain", CHAINS)
def test_sampling_draws_from_the_guided_law_after_temperature(chain: str) -> None:
    inputs = batch(PROMPTS)
    options = OPTIONS | {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 0,
        "num_return_sequences": 2,
    }
    torch.manual_seed(0)
    made = processors(chain, attention_mask=inputs["attention_mask"], eos_token_id=EOS)
    out = HF.generate(
        **inputs,
        **options,
        logits_processor=made,
        return_dict_in_generate=True,
        output_scores=True,
    )
    width, checked = inputs["input_ids"].shape[1], 0
    for row, ids in enumerate(out.sequences.tolist()):
        prompt = PROMPTS[row // 2]
        written = ids[width:]
        for at in range(LENGTH):
            if EOS in written[:at] or at >= len(out.scores):
                break
            law = (law_of([*prompt, *written[:at]], chain) / 0.5).log_softmax(-1)
            found = out.scores[at][row].double().log_softmax(-1)
            torch.testing.assert_close(found, law, rtol=0, atol=1e-4)
            checked += 1
    assert checked > 30


class Fresh(LogitsProcessor):
    """GenARM from fresh forwards: the reference for searches that move rows about."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        laws = []
        for ids, row in zip(input_ids.tolist(), scores, strict=True):
            while ids[0] == self.pad:
                ids = ids[1:]
            law = row.log_softmax(-1) + 1.2 * plain_logprobs(GUIDE, ids).float()
            laws.append(law.log_softmax(-1))
        return torch.stack(laws)


def count_fed(lm: CausalLM) -> list[int]:
    fed: list[int] = []
    embedding: Any = lm.model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, given: fed.append(given[0].numel()))
    return fed


def test_beams_are_followed_when_they_are_reordered() -> None:
    inputs, lm = batch(PROMPTS), CausalLM(tiny_llama(2))
    options = OPTIONS | {"num_beams": 3, "length_penalty": 0.0}
    expected = HF.generate(**inputs, **options, logits_processor=[Fresh(PAD)])
    fed = count_fed(lm)
    made = GuideLogitsProcessor(GenARMGuide(lm), 1.2, attention_mask=inputs["attention_mask"])
    assert torch.equal(HF.generate(**inputs, **options, logits_processor=[made]), expected)
    # Caches go with their beams: nothing but new tokens is fed after the prompts.
    assert sum(fed) <= 9 * 7 + 9 * LENGTH


def test_an_assistant_that_is_rolled_back_changes_nothing() -> None:
    inputs = batch(PROMPTS[:1])
    made = processors("genarm other", attention_mask=inputs["attention_mask"])
    out = HF.generate(
        **inputs, **OPTIONS, logits_processor=made, assistant_model=OTHER, num_assistant_tokens=3
    )
    assert completions(out, inputs) == [greedy(PROMPTS[0], "genarm other")]


class Recording:
    """A GenARM guide that writes down the sequences it was asked about, and those that ended."""

    needs_hidden = False

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []
        self.released: list[int] = []
        self._guide = GenARMGuide(CausalLM(GUIDE))

    def begin(self, contexts: Any) -> Any:
        self.asked.append([list(one.token_ids) for one in contexts])
        return self._guide.begin(contexts)

    def tilt(self, logprobs_RV: Tensor, step: Any, evidence: Any) -> Tensor:
        return self._guide.tilt(logprobs_RV, step, evidence)

    def release(self, keys: Sequence[int]) -> None:
        self.released += keys
        self._guide.release(keys)


def test_rows_that_ended_cost_the_guide_nothing_and_free_its_caches() -> None:
    inputs, first, second = batch(PROMPTS), Recording(), Recording()
    made = [GuideLogitsProcessor(first, 1.2, pad_token_id=PAD, eos_token_id=EOS)]
    made.append(GuideLogitsProcessor(second, 0.0001, after=made[0]))
    written = completions(HF.generate(**inputs, **OPTIONS, logits_processor=made), inputs)
    ended = [ids for ids in written if ids[-1] == EOS and len(ids) < LENGTH]
    assert ended
    for recording in (first, second):
        asked = [ids for step in recording.asked for ids in step]
        starts = [
            [*p, *ids[:at]]
            for p, ids in zip(PROMPTS, written, strict=True)
            for at in range(len(ids))
        ]
        assert sorted(asked) == sorted(starts)
        # Nobody asks after the row that ended last.
        assert len(recording.released) == len(set(recording.released)) == len(ended) - 1


def test_a_processor_without_a_mask_serves_call_after_call() -> None:
    [made] = processors("genarm", pad_token_id=PAD, eos_token_id=EOS)
    for prompts in (PROMPTS, PROMPTS, PROMPTS[::-1], PROMPTS[:2], [[2, 2, 2]]):
        inputs = batch(prompts)
        out = HF.generate(**inputs, **OPTIONS, logits_processor=[made])
        assert completions(out, inputs) == [greedy(prompt, "genarm") for prompt in prompts]
    # A next turn begins with the whole of the last one, end token included, and has not ended.
    turn = [2, 2, 2, *greedy([2, 2, 2], "genarm"), EOS, 4, 9]
    out = HF.generate(torch.tensor([turn]), **OPTIONS, logits_processor=[made])
    assert completions(out, batch([turn])) == [greedy(turn, "genarm")]


def test_one_with_a_mask_refuses_the_next_call() -> None:
    inputs = batch(PROMPTS)
    made = processors("genarm", attention_mask=inputs["attention_mask"])
    HF.generate(**inputs, **OPTIONS, logits_processor=made)
    with pytest.raises(ConfigError, match="Make a new one for each call"):
        HF.generate(**batch([[1], [2], [3]]), **OPTIONS, logits_processor=made)


def test_columns_that_pad_the_vocabulary_are_never_drawn() -> None:
    """Base and guide have 20 columns, of which the tokenizer knows 16."""
    base, guide = tiny_llama(4, vocab_size=20), tiny_llama(5, vocab_size=20)
    hf: Any = base
    lm = CausalLM(guide, vocab_size=16)
    made = GuideLogitsProcessor(GenARMGuide(lm), 1.0, vocab_size=16)
    options = {"max_new_tokens": 8, "pad_token_id": PAD, "eos_token_id": None}
    out = hf.generate(torch.tensor([[3]]), logits_processor=[made], **options)
    ids = [3]
    for _ in range(8):
        laws = [plain_logprobs(model, ids)[:16].log_softmax(-1) for model in (base, guide)]
        ids.append(int((laws[0] + laws[1]).argmax()))
    assert out[0].tolist() == ids


def test_weight_zero_leaves_the_scores_alone() -> None:
    scores = torch.randn(2, 16)
    made = GuideLogitsProcessor(guide_of("genarm")[0], 0.0, pad_token_id=PAD)
    assert made(torch.tensor([[1, 2], [PAD, 3]]), scores) is scores


def refuse(message: str, call: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_what_a_processor_cannot_know_is_refused() -> None:
    guide = guide_of("genarm")[0]
    ids, scores = torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 16)
    refuse("may be padded", lambda: GuideLogitsProcessor(guide)(ids, scores))
    right = torch.tensor([[1, 1], [1, 0]])
    refuse("Pad on the left", lambda: GuideLogitsProcessor(guide, attention_mask=right))
    narrow = GuideLogitsProcessor(guide, attention_mask=torch.ones(2, 3))
    refuse("3 columns, but the prompts have 2", lambda: narrow(ids, scores))
    three = GuideLogitsProcessor(guide, attention_mask=torch.ones(3, 2))
    refuse("3 rows, but `generate` decodes 2", lambda: three(ids, scores))
    first = GuideLogitsProcessor(guide, pad_token_id=PAD)
    refuse("Describe them there", lambda: GuideLogitsProcessor(guide, pad_token_id=1, after=first))


@pytest.mark.parametrize("wrap", [lambda guide: guide, lambda guide: Gated(guide, 0.5)])
@pytest.mark.parametrize("attribute", ["needs_hidden", "reads_base"])
def test_a_guide_that_asks_the_base_is_sent_to_custom_generate(wrap: Any, attribute: str) -> None:
    guide: Any = Recording()
    setattr(guide, attribute, True)
    refuse("custom_generate=guided_generate", lambda: GuideLogitsProcessor(wrap(guide)))
