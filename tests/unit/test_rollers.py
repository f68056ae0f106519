"""Rollouts without a cluster: what is asked for, what it earns, and how shares come together."""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from jobs.rollers import _join, _split
from jobs.rollout_config import RolloutConfig
from jobs.rollouts import Roller, Rollout, Share
from jobs.standing import Standing, warn_of_collapse
from pilotfish import world
from pilotfish.chat import render_prompt
from pilotfish.data.records import PromptText
from pilotfish.decode.sequence import FinishReason, SamplingParams
from pilotfish.errors import ConfigError
from pilotfish.evaluation.rewards import Judgement
from pilotfish.train.experience import Episode
from pilotfish.train.rollout import Ask

SCENES = world.scenes(5, seed=1)
TOKENIZER = world.build_tokenizer()
KITCHEN: dict[str, Any] = {"kind": "kitchen"}


def answer(seed: int) -> str:
    """An answer that its seed decides."""
    return world.sample_answer(SCENES[seed % 5], random.Random(seed))


class AnswersBySeed:
    """A sampler that says what the seeds say, and remembers what it was asked."""

    def __init__(self) -> None:
        self.loaded: list[Mapping[str, Tensor]] = []
        self.asks: list[Ask] = []
        self.params: list[SamplingParams] = []

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self.loaded.append(weights)

    def collect(
        self, asks: Sequence[Ask], params: SamplingParams, *, guided: bool = True
    ) -> list[Episode]:
        self.asks += asks
        self.params.append(params)
        return [self._episode(ask, guided=guided) for ask in asks]

    def _episode(self, ask: Ask, *, guided: bool) -> Episode:
        ids: Any = TOKENIZER(answer(ask.seed), add_special_tokens=False).input_ids
        logprobs = np.full(len(ids), -1.5, dtype=np.float32)
        return Episode(
            prompt_ids=np.array(ask.prompt.token_ids, dtype=np.int32),
            completion_ids=np.array(ids, dtype=np.int32),
            finish_reason=FinishReason.STOP if ask.seed % 2 else FinishReason.LENGTH,
            positions_N=np.arange(len(ids), dtype=np.int32),
            logprobs_N=logprobs,
            base_logprobs_N=logprobs - 0.5 if guided else logprobs,
        )


def new_roller(**settings: Any) -> tuple[Roller, AnswersBySeed]:
    sampler = AnswersBySeed()
    given = {"rewards": [{"judge": KITCHEN}], "monitor": KITCHEN, **settings}
    config = RolloutConfig.model_validate(given)
    return Roller(sampler, TOKENIZER, config, seed=9, device="cpu"), sampler


def share(*places: int, iteration: int = 3) -> Share:
    prompts: list[PromptText] = [tuple(SCENES[place].messages) for place in places]
    return Share(iteration=iteration, places=places, prompts=prompts, num_samples=2)


def as_tuples(rollout: Rollout) -> list[tuple[Any, ...]]:
    """What a rollout holds, but for its times, which differ."""
    assert rollout.monitored is not None
    texts = [tuple(one.completion_ids.tolist()) for one in rollout.episodes]
    return list(zip(texts, rollout.rewards, rollout.monitored, strict=True))


def test_completions_are_seeded_by_iteration_prompt_and_sample_whoever_draws_them() -> None:
    roller, sampler = new_roller()
    whole = as_tuples(roller.roll(share(0, 1, 2, 3), {}))
    asked = sampler.asks.copy()
    assert len({ask.seed for ask in asked}) == 8
    for ask, scene in zip(asked[::2], SCENES, strict=False):
        assert list(ask.prompt.token_ids) == render_prompt(TOKENIZER, scene.messages)
    even, odd = (as_tuples(new_roller()[0].roll(share(*places), {})) for places in ((0, 2), (1, 3)))
    assert [*even[:2], *odd[:2], *even[2:], *odd[2:]] == whole
    later = as_tuples(roller.roll(share(0, 1, 2, 3, iteration=4), {}))
    assert not {ask.seed for ask in asked} & {ask.seed for ask in sampler.asks[8:]}
    assert later != whole


@pytest.mark.parametrize("num_actors", [1, 2, 3, 7])
def test_a_share_is_the_same_over_any_number_of_actors(num_actors: int) -> None:
    roller, _ = new_roller()
    mine = share(4, 1, 0, 2)
    parts = [part for part in _split(mine, num_actors) if part.places]
    assert max(len(part.places) for part in parts) == -(-4 // num_actors)
    together = _join([roller.roll(part, {}) for part in parts])
    assert as_tuples(together) == as_tuples(roller.roll(mine, {}))


def test_each_rollout_loads_the_weights_it_is_given() -> None:
    roller, sampler = new_roller()
    for weights in ({"a": "first"}, {"a": "second"}):
        roller.roll(share(0), weights)  # pyright: ignore[reportArgumentType]
    assert sampler.loaded == [{"a": "first"}, {"a": "second"}]


def test_a_reward_is_the_weighted_sum_of_its_judges_and_of_parts_of_them() -> None:
    terms = [
        {"judge": KITCHEN, "weight": 2.0, "part": "helpful"},
        {"judge": KITCHEN, "weight": -0.5, "part": "harmless"},
        {"judge": KITCHEN},
    ]
    roller, sampler = new_roller(rewards=terms)
    rollout = roller.roll(share(0, 3), {})
    true = [
        world.score(SCENES[place], answer(ask.seed))
        for place, ask in zip((0, 0, 3, 3), sampler.asks, strict=True)
    ]
    expected = [2 * one.helpful - 0.5 * one.harmless + one.total for one in true]
    assert rollout.rewards == pytest.approx(expected)
    assert len(set(expected)) > 1
    assert rollout.monitored is not None
    assert [one.reward for one in rollout.monitored] == [one.total for one in true]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"judge": {"kind": "none"}}, "'none' gives no reward"),
        (
            {"judge": KITCHEN, "part": "tasty"},
            r"gives no part 'tasty' \(its parts: helpful, harmless\)",
        ),
    ],
)
def test_a_judge_without_the_reward_is_an_error(term: dict[str, Any], message: str) -> None:
    roller, _ = new_roller(rewards=[term])
    with pytest.raises(ConfigError, match=message):
        roller.roll(share(0), {})


def test_what_is_judged_ends_before_a_stop_string_as_what_is_served_does() -> None:
    stop = answer(0).split()[3]
    roller, sampler = new_roller(stop=[stop])
    judged: list[str] = []
    roller._monitor = Listener(judged)
    roller.roll(share(0, 1, 2), {})
    assert all(params.stop == (stop,) for params in sampler.params)
    whole = [answer(ask.seed) for ask in sampler.asks]
    assert [text.strip() for text in judged] == [text.split(stop)[0].strip() for text in whole]
    assert any(stop in text for text in whole)


class Listener:
    """A judge that keeps what it read."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def judge(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[Judgement]:
        self._texts += answers
        return [Judgement() for _ in answers]


def test_where_a_policy_stands_is_the_mean_over_its_completions() -> None:
    roller, sampler = new_roller()
    rollout = roller.roll(share(0, 1, 2, 3), {})
    report = Standing.of(rollout).report("eval")
    rewards = np.array(rollout.rewards)
    lengths = [len(one.completion_ids) for one in rollout.episodes]
    assert report["eval/reward"] == pytest.approx(rewards.mean())
    assert report["eval/true_reward_error"] == pytest.approx(rewards.std(ddof=1) / 8**0.5)
    assert report["eval/length"] == np.mean(lengths)
    assert report["eval/kl"] == pytest.approx(0.5 * np.mean(lengths))
    assert report["eval/cut_share"] == np.mean([ask.seed % 2 == 0 for ask in sampler.asks])
    bad = [bool(judged.bad) for judged in rollout.monitored or []]
    assert report["eval/bad_share"] == np.mean(bad)
    unguided = Standing.of(roller.roll(share(0), {}, guided=False)).report("base")
    assert unguided["base/kl"] == 0


def test_what_the_monitor_does_not_say_is_not_reported() -> None:
    roller, _ = new_roller(monitor={"kind": "none"})
    report = Standing.of(roller.roll(share(0, 1), {})).report("eval")
    assert "eval/reward" in report
    assert not {"eval/true_reward", "eval/true_reward_error", "eval/bad_share"} & report.keys()


def standing(reward: float, true_reward: float | None, num_bad: int) -> Standing:
    """A hundred completions whose rewards spread by 1 around their means."""
    spread = [1.0 if number % 2 else -1.0 for number in range(100)]
    monitored = [
        Judgement(reward=true_reward + one, bad=number < num_bad)
        for number, one in enumerate(spread)
        if true_reward is not None
    ]
    [episode] = new_roller()[0].roll(share(0), {}).episodes[:1]
    rollout = Rollout(
        episodes=[episode] * 100,
        rewards=[reward + one for one in spread],
        monitored=None if true_reward is None else monitored,
        decode_seconds=0.0,
        reward_seconds=0.0,
    )
    return Standing.of(rollout)


@pytest.mark.parametrize(
    ("now", "warning"),
    [
        ((1.0, 1.0, 50), None),
        ((1.0, 1.0, 51), "COLLAPSE: 51% of the held-out answers"),
        ((1.0, -1.0, 0), "REWARD HACKING.*from 0.00 to 1.00.*from 0.00 to -1.00"),
        ((1.0, -0.25, 0), None),  # as far as chance may go: the error of the difference is 0.14
        ((-1.0, -1.0, 0), None),
        ((1.0, None, 0), None),
    ],
)
def test_a_collapse_is_warned_of_and_nothing_else(
    now: tuple[float, float | None, int], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_collapse(standing(*now), standing(0.0, 0.0, 0))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (warning is not None)
    assert warning is None or re.search(warning, caplog.text)
