"""Proxy-RLHF as a guide: its law, against the paper's process on plain forwards, and its costs."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish import Pilot, SamplingParams
from pilotfish.config import parse
from pilotfish.context import Context
from pilotfish.decode.engine import Engine
from pilotfish.errors import ConfigError
from pilotfish.guides import check_guide
from pilotfish.guides.base import Step
from pilotfish.guides.card import read_card, write_card
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.guides.proxy_features import ProxySettings
from pilotfish.guides.proxy_rlhf import ProxyGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.vocab import fingerprint
from tests.acceptance_cases import by_recursion
from tests.fakes import context, plain_logprobs, random_head, request, tiny_llama
from tests.folders import byte_tokenizer, save_base, save_proxy

BASE, GUIDE = tiny_llama(1).requires_grad_(False), tiny_llama(2)
SMALL: Any = {"head": {"hidden": [24], "activation": "tanh"}}

VARIANTS: list[dict[str, Any]] = [
    {},
    {"features": "pre_token", "fallback": "top1", "head": {"hidden": [16, 8]}},
    {"p_t_rule": "cumulative", "p_t": 0.7},
    {"p_t_rule": "literal", "p_t": 0.1},
    {"candidate_order": "sample_no_repeat", "p_t": 0.9, "top_k": 8, "temperature": 0.7},
    {
        "candidate_order": "sample_no_repeat",
        "p_t_rule": "cumulative",
        "p_t": 0.5,
        "top_k": 6,
        "temperature": 1.3,
        "fallback": "top1",
    },
    {"candidate_order": "iid", "p_t_rule": "min_prob", "p_t": 0.05, "features": "pre_token"},
    {"candidate_order": "iid", "p_t_rule": "cumulative", "p_t": 0.2, "max_tries": 3},
]


def proxy_settings(**variant: Any) -> ProxySettings:
    return ProxySettings(**{**SMALL, **variant})


def new_proxy(base: CausalLM, **variant: Any) -> ProxyGuide:
    settings = proxy_settings(**variant)
    return ProxyGuide(base, random_head(3, settings), settings)


def constant_proxy(base: CausalLM, accept: float, **variant: Any) -> ProxyGuide:
    guide = new_proxy(base, **variant)
    last = guide.head.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, math.log(accept / (1 - accept)) if accept < 1 else 60.0)
    return guide


@torch.no_grad()
def hidden_state(token_ids: list[int]) -> Tensor:
    return BASE.model(input_ids=torch.tensor([token_ids]), use_cache=False).last_hidden_state[0, -1]


@torch.no_grad()
def accept_chance(
    guide: ProxyGuide, token_ids: list[int], token: int, logprob: float, rank: int
) -> float:
    """What the proxy says of one candidate, by forwards of its own."""
    if guide.settings.features == "post_token":
        state, extra = [hidden_state([*token_ids, token])], [logprob]
    else:
        embedded = BASE.get_input_embeddings()(torch.tensor(token))
        state, extra = [hidden_state(token_ids), embedded], [logprob, math.log(1 + rank)]
    features = torch.cat([*state, torch.tensor(extra, dtype=torch.float64)])
    return guide.head(features).sigmoid().item()


def reference(guide: ProxyGuide, incoming: Tensor, token_ids: list[int]) -> tuple[Tensor, float]:
    """The law and the expected rejections at one context, from the process itself."""
    s = guide.settings
    ranked = incoming.argsort(descending=True)[: s.top_k].tolist()
    mass = incoming[ranked].softmax(0).tolist()
    kept = len(mass)
    if s.p_t_rule == "nucleus":
        kept = next((n for n in range(1, kept) if sum(mass[:n]) >= s.p_t), kept)
    elif s.p_t_rule == "min_prob":
        kept = max(1, sum(one >= s.p_t for one in mass))
    probs = [one ** (1 / s.temperature) for one in mass[:kept]]
    probs = [one / sum(probs) for one in probs]
    accept = [
        accept_chance(guide, token_ids, token, math.log(probs[rank]), rank)
        for rank, token in enumerate(ranked[:kept])
    ]
    if kept == 1:
        law, rejects = [1.0], 0.0
    elif s.candidate_order == "sample_no_repeat":
        limit = s.p_t if s.p_t_rule == "cumulative" else math.inf
        law, rejects = by_recursion(probs, accept, fallback=s.fallback, limit=limit, mass=mass)
    elif s.candidate_order == "ordered":
        law, rejects = in_order(accept, mass, s)
    else:
        forced = s.p_t_rule == "cumulative"
        accept = [1 if forced and m > s.p_t else a for m, a in zip(mass, accept, strict=False)]
        mean = sum(p * a for p, a in zip(probs, accept, strict=True))
        misses = [(1 - mean) ** n for n in range((s.max_tries or 20_000) - 1)]
        left = (1 - mean) ** len(misses)
        law = [p * (a * sum(misses) + left) for p, a in zip(probs, accept, strict=True)]
        rejects = (1 - mean) * sum(misses)
    full = torch.zeros_like(incoming)
    full[ranked[:kept]] = torch.tensor(law, dtype=incoming.dtype)
    return full, rejects


def in_order(accept: list[float], mass: list[float], s: ProxySettings) -> tuple[list[float], float]:
    law, reach, rejects = [0.0] * len(accept), 1.0, -1.0
    for rank, one in enumerate(accept):
        must = s.p_t_rule == "cumulative" and sum(mass[: rank + 1]) > s.p_t
        must = must or (s.p_t_rule == "literal" and mass[rank] < s.p_t)
        rejects += reach
        law[rank] += reach * (1 if must else one)
        reach *= 0 if must else 1 - one
    law[-1 if s.fallback == "last" else 0] += reach
    return law, rejects


def ask(guide: ProxyGuide, base: CausalLM, contexts: list[Context]) -> tuple[Tensor, Step]:
    found = base.forward(contexts)
    step = Step(contexts, torch.ones(len(contexts), dtype=torch.float64), found.hidden_RD)
    return found.logprobs_RV, step


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_follows_the_law_of_the_process_also_where_rows_share_a_sequence(
    variant: dict[str, Any],
) -> None:
    base = CausalLM(BASE, num_slots=4)
    guide = new_proxy(base, **variant)
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    contexts = [context(1, [7, 7, 2])]
    contexts += [Context(2, context(2, text[:3]).prompt, text[:n]) for n in (3, 8, 5)]
    incoming_RV, step = ask(guide, base, contexts)
    before_RV = incoming_RV.clone()
    guided_RV = guide.tilt(incoming_RV, step, guide.begin(contexts))
    assert torch.equal(incoming_RV, before_RV)
    for row, one in enumerate(contexts):
        law, rejects = reference(guide, plain_logprobs(BASE, one.token_ids), one.token_ids)
        torch.testing.assert_close(guided_RV[row].exp(), law, rtol=0, atol=1e-9)
        assert (guided_RV[row].isneginf() == (law == 0)).all()
        assert step.notes["expected_rejects"][row].item() == pytest.approx(rejects, abs=1e-8)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_event_reports_the_law_of_the_process_beside_other_guides(
    variant: dict[str, Any], temperature: float
) -> None:
    base = CausalLM(BASE, num_slots=6)
    proxy = new_proxy(base, **variant)
    guides = {"p": proxy, "g": GenARMGuide(CausalLM(GUIDE, num_slots=6))}
    engine = Engine(base, guides)
    chains = [{}, {"p": 1.0}, {"g": 0.5}, {"g": 0.5, "p": 1.0}, {"p": 1.0, "g": 0.5}, {"p": 1.0}]
    prompts = [[(5 * i) % 16, 2, i + 1] for i in range(len(chains))]
    for key, chain in enumerate(chains):
        engine.submit(
            request(key, list(prompts[key]), guides=chain, temperature=temperature, max_tokens=6)
        )
    while engine.busy:
        for event in engine.step():
            ids = prompts[event.key]
            law = plain_logprobs(BASE, ids)
            for name in chains[event.key]:
                if name == "p":
                    law = reference(proxy, law, ids)[0].log()
                else:
                    law = (law + 0.5 * plain_logprobs(GUIDE, ids)).log_softmax(-1)
            assert event.logprob == pytest.approx(law[event.token_id].item(), abs=1e-9)
            if temperature == 0:
                assert event.token_id == int(law.argmax())
            ids.append(event.token_id)
    assert all(len(ids) == 9 for ids in prompts)


def test_a_proxy_that_accepts_everything_leaves_the_greedy_base() -> None:
    base = CausalLM(BASE)
    engine = Engine(base, {"p": constant_proxy(base, 1.0)})
    engine.submit(request(1, [4, 2], guides={"p": 1.0}, temperature=0))
    engine.submit(request(2, [4, 2], temperature=0))
    engine.submit(request(3, [4, 2], guides={"p": 1.0}, seed=5))
    paths: dict[int, list[int]] = {1: [], 2: [], 3: []}
    while engine.busy:
        for event in engine.step():
            paths[event.key].append(event.token_id)
    assert paths[1] == paths[2] == paths[3]


@pytest.mark.parametrize("order", ["sample_no_repeat", "iid"])
@pytest.mark.parametrize("accept", ["everything", "whatever"])
def test_sampled_candidates_are_the_base_where_nothing_is_rejected(order: str, accept: str) -> None:
    """Because the proxy accepts everything, or because p_t=0 lets it reject nothing."""
    base = CausalLM(BASE)
    variant: dict[str, Any] = {"candidate_order": order, "temperature": 0.6, "top_k": 7}
    if accept == "everything":
        guide = constant_proxy(base, 1.0, **variant, p_t=1.0)
    else:
        guide = new_proxy(base, **variant, p_t_rule="cumulative", p_t=0.0)
    contexts = [context(1, [1, 2, 3]), context(2, [9])]
    incoming_RV, step = ask(guide, base, contexts)
    guided_RV = guide.tilt(incoming_RV, step, None)
    for row in range(2):
        floor = incoming_RV[row].topk(7).values[-1]
        expected = (incoming_RV[row] / 0.6).masked_fill(incoming_RV[row] < floor, -torch.inf)
        torch.testing.assert_close(guided_RV[row].exp(), expected.softmax(-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "variant",
    [
        {"p_t": 0.0},
        {"p_t_rule": "cumulative", "p_t": 0.0},
        {"p_t_rule": "min_prob", "p_t": 1.0},
        {"p_t": 0.0, "candidate_order": "sample_no_repeat"},
    ],
)
def test_a_proxy_without_room_leaves_the_most_probable_token(variant: dict[str, Any]) -> None:
    base = CausalLM(BASE)
    guide = new_proxy(base, **variant)
    incoming_RV, step = ask(guide, base, [context(1, [1, 2, 3]), context(2, [9])])
    guided_RV = guide.tilt(incoming_RV, step, None)
    assert torch.equal(guided_RV.exp().argmax(-1), incoming_RV.argmax(-1))
    assert torch.equal(guided_RV.exp().sum(-1), guided_RV.exp().amax(-1))


@pytest.mark.parametrize("features", ["post_token", "pre_token"])
def test_only_rows_with_a_choice_cost_anything(features: Any) -> None:
    base = CausalLM(BASE)
    guide = new_proxy(base, features=features)
    contexts = [context(1, [1, 2]), context(2, [3]), context(3, [4, 4, 4])]
    _, step = ask(guide, base, contexts)
    forwards = base.num_forwards
    certain = torch.tensor([0.97, *[0.03 / 15] * 15], dtype=torch.float64).log()
    three = torch.tensor([0.4, 0.3, 0.28, *[0.02 / 13] * 13], dtype=torch.float64).log()
    two = torch.tensor([0.5, 0.48, *[0.02 / 14] * 14], dtype=torch.float64).log()
    guide.tilt(torch.stack([certain, certain, certain]), step, None)
    assert (guide.num_calls, base.num_forwards) == (0, forwards)
    assert step.notes["expected_rejects"].tolist() == [0, 0, 0]
    guided_RV = guide.tilt(torch.stack([three, certain, two]), step, None)
    assert guide.num_calls == 5
    widest = 2 * 3  # two rows, as wide as the widest of them
    assert base.num_forwards == forwards + (widest if features == "post_token" else 0)
    assert guided_RV.isfinite().sum(-1).tolist() == [3, 1, 2]


def test_the_token_that_is_emitted_was_computed_with_its_siblings() -> None:
    base = CausalLM(BASE)
    guide = new_proxy(base)
    growing = context(1, [3, 1, 4])
    for _ in range(5):
        before = base.num_forwards
        incoming_RV, step = ask(guide, base, [growing])
        assert base.num_forwards - before <= (len(growing.token_ids) == 3)
        torch.testing.assert_close(incoming_RV[0], plain_logprobs(BASE, growing.token_ids))
        guided_RV = guide.tilt(incoming_RV, step, None)
        assert guided_RV.isfinite().sum() > 1, "a choice, so that candidates are computed"
        growing.token_ids.append(int(guided_RV[0].argmax()))


@pytest.mark.parametrize("features", ["post_token", "pre_token"])
def test_a_trainer_gets_gradients_of_the_head_alone_and_can_ask_it_again(features: Any) -> None:
    base = CausalLM(BASE)
    guide = new_proxy(base, features=features)
    contexts = [context(1, [1, 2]), context(2, [3])]
    incoming_RV, step = ask(guide, base, contexts)
    judgement = guide.judge(incoming_RV, step)
    law_RK = guide.law(judgement).law_RK
    (law_RK * judgement.candidates.logprobs_RK.exp()).sum().backward()
    gradients = [parameter.grad for parameter in guide.head.parameters()]
    assert all(one is not None and one.isfinite().all() and one.any() for one in gradients)
    assert all(parameter.grad is None for parameter in BASE.parameters())
    assert not judgement.features_NKF.requires_grad
    again = guide.head(judgement.features_NKF)
    torch.testing.assert_close(again, judgement.logits_NK)
    with torch.inference_mode():
        guided_RV = guide.tilt(incoming_RV, step, None)
    ids_RK = judgement.candidates.ids_RK
    torch.testing.assert_close(guided_RV.gather(1, ids_RK).exp(), law_RK.detach())


@pytest.mark.parametrize("features", ["post_token", "pre_token"])
def test_a_pilot_decodes_with_a_proxy_folder(tmp_path: Path, features: str) -> None:
    base = save_base(tmp_path / "base")
    proxy = save_proxy(tmp_path / "proxy", features=features, p_t=0.6)
    pilot = Pilot(base, guides={"p": proxy}, device="cpu", num_slots=3)
    prompts = ["the cat", "on", "the dog sat", "mat"]
    params = SamplingParams(max_tokens=8, seed=2, ignore_eos=True)
    together = pilot.generate(prompts, params)
    assert [pilot.generate([one], params)[0].token_ids for one in prompts] == [
        done.token_ids for done in together
    ]
    assert all(min(done.kl) >= 0 and max(done.kl) > 0 for done in together)
    plain = pilot.generate(prompts, params, guides={})
    assert [done.token_ids for done in plain] != [done.token_ids for done in together]


def test_a_proxy_is_prompted_as_the_base_whose_states_it_reads(tmp_path: Path) -> None:
    base, proxy = save_base(tmp_path / "base"), save_proxy(tmp_path / "proxy")
    write_card(proxy, read_card(proxy).model_copy(update={"template": "own"}))
    with pytest.raises(ConfigError, match="Set template to 'base'"):
        Pilot(base, guides={"p": proxy}, device="cpu")


def test_settings_that_cannot_be_honoured_are_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    sampled = {"candidate_order": "sample_no_repeat", "p_t_rule": "cumulative"}
    with pytest.raises(ConfigError, match=r"top_k is 40.*at most 12.*Lower top_k"):
        parse(ProxySettings, sampled, source="here")
    parse(ProxySettings, {**sampled, "top_k": 12}, source="here")
    with pytest.raises(ConfigError, match="temperature"):
        parse(ProxySettings, {"temperature": 0}, source="here")
    folder = save_proxy(tmp_path / "proxy")
    text = (folder / "guide.json").read_text()
    (folder / "guide.json").write_text(text.replace('"p_t"', '"p_c"'))
    with pytest.raises(ConfigError, match="did you mean 'p_t'"):
        check_guide(folder, base="base", base_vocab=fingerprint(byte_tokenizer()))


def test_the_literal_rule_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        new_proxy(CausalLM(BASE))
        assert not caplog.records
        new_proxy(CausalLM(BASE), p_t_rule="literal", p_t=0.05)
    assert "can leave the language" in caplog.text
