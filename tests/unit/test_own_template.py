"""Guides that read the conversation in their own template, beside a base that has another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pilotfish import Pilot, SamplingParams
from pilotfish.chat import Message, render_prompt
from pilotfish.config import Config
from pilotfish.context import Context, Prompt
from pilotfish.errors import ConfigError, PromptError, VocabMismatchError
from pilotfish.guides import GUIDES, check_guide, load_guide
from pilotfish.guides.base import Stage, Step
from pilotfish.guides.card import read_card, write_card
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.host import GuideHost
from pilotfish.guides.own_template import OwnTemplate
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen
from tests.chat_tokenizers import WORD_TEMPLATE, hh_tokenizer, word_tokenizer
from tests.fakes import plain_logprobs, tiny_llama
from tests.folders import save_base, save_guide

WORDS = word_tokenizer()
BASE, GUIDE = (tiny_llama(seed, vocab_size=len(WORDS)) for seed in (1, 2))
SOUP: list[Message] = [{"role": "user", "content": "how do i make soup ?"}]
LUCK: list[Message] = [{"role": "user", "content": "good luck"}]


def own_tokenizer() -> Any:
    """The same words in turns that are written another way."""
    copy = type(WORDS)(tokenizer_object=WORDS.backend_tokenizer, **WORDS.special_tokens_map)
    copy.chat_template = "<bot> . " + WORD_TEMPLATE.replace("<user> ", "i boil <user> ")
    return copy


OWN = own_tokenizer()


def asked(key: int, messages: list[Message], continuation: list[int]) -> Context:
    ids = render_prompt(WORDS, messages)
    return Context(key, Prompt(ids, tuple(messages)), [*ids, *continuation])


def expected(messages: list[Message], continuation: list[int], weight: float) -> torch.Tensor:
    base_ids = [*render_prompt(WORDS, messages), *continuation]
    own_ids = [*render_prompt(OWN, messages), *continuation]
    assert own_ids[: len(base_ids)] != base_ids
    law = plain_logprobs(BASE, base_ids) + weight * plain_logprobs(GUIDE, own_ids)
    return law.log_softmax(-1)


@torch.inference_mode()
def tilt(guide: OwnTemplate, contexts: list[Context]) -> torch.Tensor:
    base_RV = torch.stack([plain_logprobs(BASE, one.token_ids) for one in contexts])
    weights_R = torch.full((len(contexts),), 0.7, dtype=torch.float64)
    return guide.tilt(base_RV, Step(contexts, weights_R), guide.begin(contexts))


def test_the_guide_reads_its_own_prompt_and_the_same_continuation() -> None:
    """Two conversations while they grow, asked at several positions, in any order."""
    guide = OwnTemplate(GenARMGuide(CausalLM(GUIDE)), OWN)
    live = [asked(1, SOUP, []), asked(2, LUCK, [7])]
    for token in (9, 5, 14):
        nested = Context(1, live[0].prompt, list(live[0].prompt.token_ids))
        found_RV = tilt(guide, [live[1], nested, live[0]])
        texts = [(LUCK, live[1]), (SOUP, nested), (SOUP, live[0])]
        for law, (messages, one) in zip(found_RV, texts, strict=True):
            continuation = one.token_ids[len(one.prompt.token_ids) :]
            torch.testing.assert_close(law, expected(messages, continuation, 0.7))
        for one in live:
            one.token_ids.append(token)


def test_a_key_that_comes_back_with_another_conversation_is_rendered_again() -> None:
    guide = OwnTemplate(GenARMGuide(CausalLM(GUIDE)), OWN)
    for messages in (SOUP, LUCK, SOUP):
        [law] = tilt(guide, [asked(1, messages, [4])])
        torch.testing.assert_close(law, expected(messages, [4], 0.7))


def test_a_prompt_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    guide, counted = OwnTemplate(GenARMGuide(CausalLM(GUIDE)), OWN), []
    render = OWN.apply_chat_template
    monkeypatch.setattr(
        OWN, "apply_chat_template", lambda *a, **k: counted.append(1) or render(*a, **k)
    )
    one = asked(1, SOUP, [])
    for token in (3, 4, 5):
        tilt(guide, [one])
        one.token_ids.append(token)
    assert len(counted) == 1
    guide.release([1])
    tilt(guide, [one])
    assert len(counted) == 2


def save(folder: Path, **card: Any) -> Path:
    """A guide folder over the base's words, with a template of its own."""
    save_guide(folder, seed=2, tokenizer=OWN)
    write_card(folder, read_card(folder).model_copy(update=card))
    return folder


def plain_model(folder: Path) -> LlamaForCausalLM:
    model = load_frozen(folder, dtype="float64")
    assert isinstance(model, LlamaForCausalLM)
    return model


def test_a_card_that_says_so_is_prompted_by_its_own_template(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tokenizer=WORDS)
    guide = save(tmp_path / "guide", template="own")
    pilot = Pilot(base, guides={"g": guide}, dtype="float64")
    params = SamplingParams(max_tokens=5, seed=2, ignore_eos=True)
    [done] = pilot.generate([SOUP], params, guides={"g": 1.5})
    models = plain_model(base), plain_model(guide)
    for at, token in enumerate(done.token_ids):
        laws = [
            plain_logprobs(model, [*render_prompt(tokenizer, SOUP), *done.token_ids[:at]])
            for model, tokenizer in zip(models, (WORDS, OWN), strict=True)
        ]
        law = (laws[0] + 1.5 * laws[1]).log_softmax(-1)
        assert done.logprobs[at] == pytest.approx(law[token].item(), abs=1e-9)


@pytest.mark.parametrize("gate", [None, 0.5])
def test_text_without_messages_is_refused_before_anything_is_decoded(
    tmp_path: Path, gate: float | None
) -> None:
    base = save_base(tmp_path / "base", tokenizer=WORDS)
    pilot = Pilot(base, guides={"g": save(tmp_path / "guide", template="own", gate=gate)})
    params = SamplingParams(max_tokens=2)
    with pytest.raises(PromptError, match="Send messages"):
        pilot.generate([SOUP, "how do i"], params)
    assert not pilot.engine.busy
    assert pilot.generate(["how do i"], params, guides={"g": 0.0})


def new_host() -> GuideHost:
    return GuideHost(base=CausalLM(BASE), tokenizer=WORDS)


def test_the_gate_is_outermost_and_off_unless_the_card_has_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "guide", template="own", gate=0.7)
    card, host = read_card(folder), new_host()
    guide = load_guide(folder, card, host)
    assert isinstance(guide, Gated)
    assert isinstance(guide.guide, OwnTemplate)
    dense = load_guide(folder, card.model_copy(update={"gate": None}), host)
    assert isinstance(dense, OwnTemplate)
    plain = load_guide(folder, card.model_copy(update={"gate": None, "template": "base"}), host)
    assert isinstance(plain, GenARMGuide)


def test_the_guides_own_tokenizer_shares_the_base_vocabulary(tmp_path: Path) -> None:
    folder = save(tmp_path / "guide", template="own")
    hh_tokenizer().save_pretrained(folder)
    host = GuideHost(base=CausalLM(BASE), tokenizer=WORDS, remote=CausalLM(GUIDE))
    with pytest.raises(VocabMismatchError):
        load_guide(folder, read_card(folder), host)


def test_a_guide_without_a_template_or_with_the_bases_eyes_is_refused() -> None:
    guide: Any = GenARMGuide(CausalLM(GUIDE))
    bare = type(WORDS)(tokenizer_object=WORDS.backend_tokenizer)
    with pytest.raises(ConfigError, match="needs a chat template"):
        OwnTemplate(guide, bare)
    for attribute in ("needs_hidden", "reads_base"):
        guide = GenARMGuide(CausalLM(GUIDE))
        setattr(guide, attribute, True)
        with pytest.raises(ConfigError, match="prompted as the base is"):
            OwnTemplate(guide, OWN)


class Chooser:
    """A selector, as far as loading goes."""

    stage, takes_weight, Settings = Stage.SELECTION, False, Config

    @classmethod
    def load(cls, folder: Any, card: Any, settings: Any, host: Any) -> Any:
        return cls()


@pytest.mark.parametrize("card", [{"gate": 0.5}, {"template": "own"}])
def test_guides_that_tilt_no_tokens_have_neither_gate_nor_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: dict[str, Any]
) -> None:
    monkeypatch.setitem(GUIDES, "chooser", Chooser)
    folder = save(tmp_path / "guide", kind="chooser", **card)
    with pytest.raises(ConfigError, match=f"{next(iter(card))} is .*tilts no tokens"):
        check_guide(folder, base="b", base_vocab="v")
    with pytest.raises(ConfigError, match="tilts no tokens"):
        load_guide(folder, read_card(folder), new_host())
