"""Drafted decoding: the guided law whatever is drafted, and one text whatever the pace."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from pilotfish.decode import pace
from pilotfish.decode.coupling import couple
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Drafting
from pilotfish.errors import PromptError
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from tests.fakes import drain, plain_logprobs, request, tiny_llama

VOCAB, LENGTH, RUNS = 4, 3, 4000
MODELS = {
    name: tiny_llama(seed, vocab_size=VOCAB) for seed, name in enumerate(["base", "a", "b", "x"])
}


RESHAPED = {
    "logit_bias": {0: 1.5, 2: -2.0},
    "min_tokens": 2,
    "stop_token_ids": (3,),
    "min_p": 0.1,
}


def new_engine(num_slots: int = 500) -> Engine:
    lms = {name: CausalLM(model, num_slots=num_slots) for name, model in MODELS.items()}
    guides = {"a": GenARMGuide(lms["a"]), "b": GenARMGuide(lms["b"])}
    return Engine(lms["base"], guides, drafters={"a": lms["a"], "x": lms["x"]})


def law_of_paths(
    weights: Mapping[str, float], temperature: float, reshaped: Mapping[str, Any]
) -> dict[tuple, float]:
    """GenARM equation (6), biases, early ends, temperature and min-p, path by path."""

    def law(ids: list[int]) -> list[float]:
        mixed = plain_logprobs(MODELS["base"], ids)
        for name, weight in weights.items():
            mixed = mixed + weight * plain_logprobs(MODELS[name], ids)
        for token, bias in reshaped.get("logit_bias", {}).items():
            mixed[token] += bias
        if len(ids) - 2 < reshaped.get("min_tokens", 0):
            mixed[list(reshaped["stop_token_ids"])] = -torch.inf
        probs = (mixed.log_softmax(-1) / temperature).softmax(-1)
        probs[probs < reshaped.get("min_p", 0.0) * probs.max()] = 0
        return (probs / probs.sum()).tolist()

    return {
        path: math.prod(law([1, 2, *path[:at]])[path[at]] for at in range(LENGTH))
        for path in itertools.product(range(VOCAB), repeat=LENGTH)
    }


def chi_square(counts: Mapping[tuple, int], chances: Mapping[tuple, float]) -> float:
    """In standard deviations above its mean; cells with less than five expected are joined."""
    rare = [path for path, chance in chances.items() if chance * RUNS < 5]
    cells = [(counts.get(p, 0), chances[p] * RUNS) for p in chances if p not in set(rare)]
    cells.append((sum(counts.get(p, 0) for p in rare), sum(chances[p] for p in rare) * RUNS))
    total = sum((seen - expected) ** 2 / expected for seen, expected in cells if expected > 0)
    freedom = len(cells) - 1
    return (total - freedom) / math.sqrt(2 * freedom)


def sample(
    weights: dict[str, float], temperature: float, draft: Drafting | None, **reshaped: Any
) -> dict[tuple, int]:
    engine = new_engine()
    for seed in range(RUNS):
        engine.submit(
            request(
                seed,
                [1, 2],
                seed=seed,
                guides=weights,
                temperature=temperature,
                max_tokens=LENGTH,
                draft=draft,
                **reshaped,
            )
        )
    counts: dict[tuple, int] = {}
    for path in drain(engine).values():
        ids = tuple(event.token_id for event in path)
        counts[ids] = counts.get(ids, 0) + 1
    return counts


@pytest.mark.parametrize(
    ("weights", "temperature", "drafter", "num_tokens", "reshaped"),
    [
        ({"a": 1.0}, 1.0, "a", 1, {}),
        ({"a": 1.0}, 1.0, "a", 4, {}),
        ({"a": 0.5, "b": 1.5}, 0.7, "a", 2, {}),
        ({"b": 2.0}, 1.0, "x", 2, {}),
        ({}, 1.3, "x", 3, {}),
        ({"a": 1.0}, 1.2, "a", 2, RESHAPED),
    ],
)
def test_drafted_sequences_follow_the_guided_law(
    weights: dict[str, float],
    temperature: float,
    drafter: str,
    num_tokens: int,
    reshaped: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always_draft(monkeypatch)
    draft = Drafting(**{"model" if drafter == "x" else "guide": drafter}, num_tokens=num_tokens)
    counts = sample(weights, temperature, draft, **reshaped)
    chances = law_of_paths(weights, temperature, reshaped)
    assert all(chances[path] > 0 for path in counts)
    assert chi_square(counts, chances) < 4


def test_without_the_residual_law_the_same_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_every_draft(target_RV, draft_RV, drafted_R, accept_R, residual_R):
        return drafted_R

    always_draft(monkeypatch)
    monkeypatch.setattr("pilotfish.decode.drafting.couple", keep_every_draft)
    counts = sample({"a": 1.0}, 1.0, Drafting(guide="a", num_tokens=3))
    assert chi_square(counts, law_of_paths({"a": 1.0}, 1.0, {})) > 20


def always_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as many tokens as were asked for, whatever the clock and the texts say."""
    monkeypatch.setattr(pace, "_HOPELESS", 0.0)
    monkeypatch.setattr(pace.Pace, "_plan", lambda self, bucket, options, drafting: options[0])


def test_no_coupling_keeps_a_draft_more_often() -> None:
    """P(token == draft) is 1 minus the total variation distance; the token's law is the target."""
    target, draft = torch.tensor([0.5, 0.3, 0.0, 0.2]), torch.tensor([0.2, 0.3, 0.4, 0.1])
    runs = 200_000
    numbers = torch.rand(3, runs, generator=torch.Generator().manual_seed(0)).double()
    drafted = torch.searchsorted(draft.double().cumsum(0), numbers[0])
    tokens = couple(
        target.double().expand(runs, -1), draft.double().expand(runs, -1), drafted, *numbers[1:]
    )
    kept = (tokens == drafted).double().mean().item()
    assert kept == pytest.approx(torch.minimum(target, draft).sum().item(), abs=0.005)
    law = torch.bincount(tokens, minlength=4) / runs
    torch.testing.assert_close(law, target, rtol=0, atol=0.005)
    assert law[2] == 0


MIXED: list[dict[str, Any]] = [
    {"guides": {"a": 1.0}, "draft": Drafting(guide="a", num_tokens=4)},
    {"guides": {"a": 0.5, "b": 1.0}, "draft": Drafting(guide="a", num_tokens=2)},
    {"guides": {"b": 1.0}, "draft": Drafting(model="x", num_tokens=3)},
    {"guides": {"a": 1.0}},
    {},
    {"draft": Drafting(model="x", num_tokens=1), "temperature": 0.0},
    {"guides": {"a": 1.0}, "draft": Drafting(guide="a"), "top_p": 0.9, "temperature": 0.8},
    {
        "guides": {"a": 1.0},
        "draft": Drafting(guide="a"),
        "logit_bias": {1: 1.0},
        "min_tokens": 9,
        "stop_token_ids": (0,),
        "min_p": 0.05,
        "top_logprobs": 2,
    },
]


def mixed_texts(plan: Any, num_slots: int, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    monkeypatch.setattr(pace.Pace, "_plan", plan)
    engine = new_engine(num_slots)
    for key, settings in enumerate(MIXED):
        engine.submit(request(key, [1, 2, key % VOCAB], seed=key, max_tokens=20, **settings))
    return {key: [e.token_id for e in path] for key, path in drain(engine).items()}


def test_a_seed_and_a_drafter_fix_the_text_whatever_the_pace_and_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pick = itertools.count()
    paces = [
        lambda self, bucket, options, drafting: options[0],
        lambda self, bucket, options, drafting: 0,
        lambda self, bucket, options, drafting: options[next(pick) % len(options)],
    ]
    texts = [
        mixed_texts(plan, num_slots, monkeypatch) for plan in paces for num_slots in (32, 3, 1)
    ]
    assert all(text == texts[0] for text in texts)


def test_greedy_drafted_text_is_the_greedy_text() -> None:
    def text(draft: Drafting | None) -> list[int]:
        engine = new_engine()
        engine.submit(request(1, [1, 2], guides={"a": 1.0}, temperature=0.0, draft=draft))
        return [event.token_id for event in drain(engine)[1]]

    assert text(Drafting(guide="a")) == text(None)


@pytest.mark.parametrize("reshaped", [{}, {**RESHAPED, "min_tokens": 20}])
def test_a_drafter_that_says_what_the_base_would_is_always_kept(reshaped: dict[str, Any]) -> None:
    base = MODELS["base"]
    engine = Engine(CausalLM(base), drafters={"same": CausalLM(base)})
    draft = Drafting(model="same", num_tokens=4)
    engine.submit(request(1, [1, 2], max_tokens=20, draft=draft, **reshaped))
    events = drain(engine)[1]
    assert engine.draft_stats.num_accepted == engine.draft_stats.num_drafted
    assert sum(event.drafted for event in events) == engine.draft_stats.num_accepted > 0


def test_the_guide_that_drafts_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    always_draft(monkeypatch)
    engine = new_engine()
    draft = Drafting(guide="a", num_tokens=3)
    engine.submit(request(1, [1, 2], guides={"a": 1.0}, max_tokens=12, draft=draft))
    drain(engine)
    stats = engine.draft_stats
    assert engine.drafters["a"].num_forwards == stats.num_drafted + stats.num_rounds
    assert engine.base.num_forwards == stats.num_drafted + stats.num_rounds


def test_an_unknown_drafter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PromptError, match="nothing named 'b' can draft here; drafters: a, x"):
        new_engine().submit(request(1, [1], draft=Drafting(guide="b")))


@pytest.mark.parametrize("drafters", [{}, {"guide": "a", "model": "x"}])
def test_a_draft_names_one_drafter(drafters: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="wanted one of them"):
        Drafting(**drafters)


def test_drafts_of_zero_tokens_are_refused() -> None:
    with pytest.raises(PromptError, match=r"num_tokens is 0, wanted an integer in 1\.\.16"):
        Drafting(guide="a", num_tokens=0)
