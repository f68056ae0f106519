"""Selection: the exact laws of best-of-N, its soft form and decoding by blocks; nested seeds."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish import Completion, Pilot, SamplingParams
from pilotfish.answering import Answering, Task
from pilotfish.chain import Chain
from pilotfish.context import Prompt
from pilotfish.decode.driver import Driver
from pilotfish.decode.engine import Engine
from pilotfish.errors import ConfigError
from pilotfish.guides.base import Draft, Guide, Selector
from pilotfish.guides.best_of_n import BestOfN, BlockwiseCD
from pilotfish.guides.scoring import RewardScorer
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.reward import RewardModel
from pilotfish.noise import draft_seed
from tests.enumerable import PROMPT, Prefix, TabularReward, World, random_reward, random_world
from tests.fakes import plain_logprobs, plain_reward, tiny_llama, tiny_reward_model
from tests.folders import byte_tokenizer, save_base


class Table:
    """Scores drafts by a function of their ids, and remembers what it was asked."""

    def __init__(self, reward: Any) -> None:
        self._reward = reward
        self.asked: list[list[Prefix]] = []

    def score(self, prompt: Prompt, drafts: Sequence[Draft]) -> list[float]:
        self.asked.append([tuple(draft.token_ids) for draft in drafts])
        return [self._reward(tuple(draft.token_ids)) for draft in drafts]


def drafts_of(paths: Sequence[Prefix]) -> list[Draft]:
    return [Draft("", path) for path in paths]


def best_of_n_law(base: dict[Prefix, float], reward: Any, n: int) -> dict[Prefix, float]:
    """F(y)^N - F(y-)^N, where F(y) is the chance that one draft has at most the reward of y."""
    law, below = {}, 0.0
    for path in sorted(base, key=reward):
        up_to = below + base[path]
        law[path] = up_to**n - below**n
        below = up_to
    return law


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_law_is_exact_over_all_drafts_that_can_be_drawn(n: int) -> None:
    """27 answers, all of their pairs and triples: every call that can happen, with its chance."""
    world = random_world(7)
    base = world.law(world.base)
    selector = BestOfN(
        RewardScorer(TabularReward(world.reward, horizon=world.horizon)), num_drafts=n
    )
    law: Counter[Prefix] = Counter()
    for paths in itertools.product(base, repeat=n):
        chosen = paths[selector.choose(PROMPT, drafts_of(paths), 0.5)]
        law[chosen] += math.prod(base[path] for path in paths)  # pyright: ignore[reportArgumentType] - a float
    expected = best_of_n_law(base, world.reward, n)
    assert law == pytest.approx(expected, abs=1e-12)
    assert world.kl_of(dict(law)) <= math.log(n) - (n - 1) / n + 1e-12
    assert world.mean_reward(dict(law)) >= world.mean_reward(base) - 1e-12


def test_the_first_of_equals_is_chosen() -> None:
    scorer = Table({(0,): 1.0, (1,): 2.0, (2,): 2.0}.__getitem__)
    for selector in (BestOfN(scorer), BlockwiseCD(scorer)):
        assert selector.choose(PROMPT, drafts_of([(0,), (2,), (1,), (2,)]), 0.99) == 1


REWARDS = {(0,): -1.0, (1,): 0.5, (2,): 0.7, (3,): 30.0}
UNIFORMS = [(i + 0.5) / 4000 for i in range(4000)]


@pytest.mark.parametrize("b", [0.0, 0.1, 1.0])
def test_soft_best_of_n_draws_in_proportion_to_the_exponential(b: float) -> None:
    selector = BestOfN(Table(REWARDS.__getitem__), inverse_temperature=b)
    drafts = drafts_of(list(REWARDS))
    counts = Counter(selector.choose(PROMPT, drafts, uniform) for uniform in UNIFORMS)
    masses = [math.exp(b * reward) for reward in REWARDS.values()]
    for place, mass in enumerate(masses):
        assert counts[place] / 4000 == pytest.approx(mass / sum(masses), abs=1 / 4000)
    if b == 0:
        assert set(counts.values()) == {1000}


def test_soft_best_of_n_becomes_best_of_n() -> None:
    selector = BestOfN(Table(REWARDS.__getitem__), inverse_temperature=1e6)
    drafts = drafts_of(list(REWARDS))
    assert {selector.choose(PROMPT, drafts, uniform) for uniform in UNIFORMS[::100]} == {3}


BASE = tiny_llama(11, vocab_size=3)
START = [1, 2]
END = 0


def base_law(path: Prefix) -> torch.Tensor:
    return plain_logprobs(BASE, [*START, *path])


WORLD = World(3, 3, cache(base_law), random_reward(17), end_id=END)


def answer_all(selector: Selector | None, num_seeds: int) -> list[Completion]:
    """One answer per seed, by the real decode loop on the tiny base."""
    engine = Engine(CausalLM(BASE, num_slots=512), end_ids=frozenset({END}))
    guides: dict[str, Guide] = {} if selector is None else {"best": selector}
    answering = Answering(Driver(engine, byte_tokenizer()), guides)
    chain = Chain(selection="best" if guides else None)
    tasks = [Task(Prompt(START), SamplingParams(max_tokens=3, seed=i)) for i in range(num_seeds)]
    return answering.answer(tasks, chain)


def check_law(answers: Sequence[Completion], law: dict[Prefix, float]) -> float:
    """Chi-square against a law, in standard deviations above its mean."""
    counts = Counter(tuple(done.token_ids) for done in answers)
    assert set(counts) <= {path for path, chance in law.items() if chance > 0}
    # Rare answers count as one, so that every cell is expected often enough.
    rare = {path for path, chance in law.items() if chance * len(answers) < 5}
    cells = [(counts[path], law[path]) for path in law if path not in rare]
    cells.append((sum(counts[path] for path in rare), sum(law[path] for path in rare)))
    chi_square = sum(
        (seen - len(answers) * chance) ** 2 / (len(answers) * chance)
        for seen, chance in cells
        if chance > 0
    )
    return (chi_square - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


def test_selected_answers_follow_the_law_of_best_of_n() -> None:
    answers = answer_all(BestOfN(Table(WORLD.reward), num_drafts=4), 1500)
    base = WORLD.law(WORLD.base)
    assert check_law(answers, best_of_n_law(base, WORLD.reward, 4)) < 4
    assert check_law(answers, base) > 20  # the control: what the test would say of the base


def test_a_draft_picked_at_random_follows_the_base() -> None:
    """Which one is picked must have nothing to do with how any of them was drawn."""
    anyone = BestOfN(Table(WORLD.reward), num_drafts=3, inverse_temperature=0.0)
    answers = answer_all(anyone, 1500)
    assert check_law(answers, WORLD.law(WORLD.base)) < 4
    assert answers != answer_all(None, 1500)


def test_every_choice_has_a_uniform_of_its_own_that_the_seed_repeats() -> None:
    class Watching(BlockwiseCD):
        def choose_all(
            self,
            prompts: Sequence[Prompt],
            drafts: Sequence[Sequence[Draft]],
            uniforms: Sequence[float],
        ) -> list[int]:
            seen.extend(uniforms)
            return [0] * len(prompts)

    seen: list[float] = []
    selector = Watching(Table(WORLD.reward), num_drafts=2, block_tokens=1)
    answer_all(selector, 30)
    assert len(set(seen)) == len(seen) > 60
    assert all(0 <= uniform < 1 for uniform in seen)
    first = seen.copy()
    answer_all(selector, 30)
    assert sorted(seen[len(first) :]) == sorted(first)


def blockwise_law(k: int, m: int) -> dict[Prefix, float]:
    """Best of K over every M further tokens, block after block."""
    reached: dict[Prefix, float] = {(): 1.0}
    while not all(map(WORLD.complete, reached)):
        longer: Counter[Prefix] = Counter()
        for path, chance in reached.items():
            if WORLD.complete(path):
                longer[path] += chance  # pyright: ignore[reportArgumentType] - a float
                continue
            ends = World(3, min(3, len(path) + m), WORLD.base, WORLD.reward, END)
            block = best_of_n_law(ends.law(ends.base, path), WORLD.reward, k)
            for end, share in block.items():
                longer[end] += chance * share  # pyright: ignore[reportArgumentType] - a float
        reached = dict(longer)
    return reached


@pytest.mark.parametrize("m", [1, 2])
def test_blocks_follow_the_law_of_best_of_k_block_by_block(m: int) -> None:
    table = Table(WORLD.reward)
    answers = answer_all(BlockwiseCD(table, num_drafts=3, block_tokens=m), 1000)
    law = blockwise_law(3, m)
    assert sum(law.values()) == pytest.approx(1)
    assert check_law(answers, law) < 4
    assert check_law(answers, blockwise_law(3, 3)) > 20  # the control: one block
    for paths in table.asked:  # drafts of one block go on behind one beginning
        longest = max(map(len, paths))
        done = (longest - 1) // m * m
        assert len(paths) == 3
        assert len({path[:done] for path in paths}) == 1
        assert all(len(path) == longest or path[-1] == END for path in paths)


@pytest.mark.parametrize("m", [3, 100])
def test_one_block_is_best_of_n(m: int) -> None:
    blocks = answer_all(BlockwiseCD(Table(WORLD.reward), num_drafts=4, block_tokens=m), 200)
    whole = answer_all(BestOfN(Table(WORLD.reward), num_drafts=4), 200)
    assert blocks == whole
    assert blocks != answer_all(None, 200)


@pytest.mark.parametrize(
    "selector",
    [
        BestOfN(Table(WORLD.reward), num_drafts=1),
        BlockwiseCD(Table(WORLD.reward), num_drafts=1, block_tokens=1),
        BlockwiseCD(Table(WORLD.reward), num_drafts=1, block_tokens=2),
    ],
)
def test_one_draft_is_the_base(selector: Selector) -> None:
    plain, selected = answer_all(None, 200), answer_all(selector, 200)
    for one, other in zip(plain, selected, strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
        assert one.finish_reason is other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)


def test_more_drafts_only_add_to_fewer() -> None:
    """Draft i is the same whatever N, so the reward can only rise."""
    tables = {n: Table(WORLD.reward) for n in (2, 3, 8)}
    answers = {1: answer_all(None, 60)}
    for n, table in tables.items():
        answers[n] = answer_all(BestOfN(table, num_drafts=n), 60)
    # Prompts are decided as their drafts end, in an order of their own.
    few, some, many = (sorted(table.asked) for table in tables.values())
    assert [paths[:3] for paths in many] == some
    assert [paths[:2] for paths in some] == few
    rewards = [
        [WORLD.reward(tuple(done.token_ids)) for done in some]
        for _, some in sorted(answers.items())
    ]
    for fewer, more in itertools.pairwise(rewards):
        assert all(low <= high for low, high in zip(fewer, more, strict=True))
        assert fewer != more


def test_seeds_of_drafts_are_the_requests_own_and_then_all_different() -> None:
    seeds = [draft_seed(seed, number) for seed in (0, 1, 2**64 - 1) for number in range(50)]
    assert seeds[::50] == [0, 1, 2**64 - 1]
    assert len(set(seeds)) == 150
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_reward_model_reads_the_prompt_and_then_the_draft() -> None:
    model = tiny_reward_model(3)
    scorer = RewardScorer(RewardModel(model, num_slots=2))
    paths = [(4, 5), (6,), (4, 5, 6, 7), ()]
    for _ in range(2):  # what the first call left in the cache changes nothing
        scores = scorer.score(Prompt([1, 2, 3]), drafts_of(paths))
        expected = [plain_reward(model, [1, 2, 3, *path]) for path in paths]
        assert scores == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("scores", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_a_scorer_that_cannot_compare_is_refused(scores: list[float]) -> None:
    class Broken:
        def score(self, prompt: Prompt, drafts: Sequence[Draft]) -> list[float]:
            return scores

    with pytest.raises(ConfigError, match=r"Broken\.score gave .* for 2 drafts, wanted one finite"):
        BestOfN(Broken()).choose(PROMPT, drafts_of([(0,), (1,)]), 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda table: BestOfN(table, num_drafts=0), "num_drafts is 0, wanted an integer >= 1"),
        (lambda table: BlockwiseCD(table, block_tokens=0), "block_tokens is 0"),
        (lambda table: BestOfN(table, inverse_temperature=-1.0), "inverse_temperature is -1.0"),
        (lambda table: BestOfN(table, inverse_temperature=math.nan), "inverse_temperature is nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(Table(WORLD.reward))


def test_blocks_count_the_tokens_that_cannot_end_the_answer(tmp_path: Path) -> None:
    """One draft per block is the base, whose stop strings are plain text for so many tokens."""
    blocks = BlockwiseCD(Table(lambda _: 0.0), num_drafts=1, block_tokens=4)
    pilot = Pilot(save_base(tmp_path), guides={"blocks": blocks})
    free = SamplingParams(max_tokens=60, seed=5, ignore_eos=True)
    [whole] = pilot.generate(["the cat"], free, guides={})
    [(stop, _)] = Counter(filter(str.isalpha, whole.text)).most_common(1)
    lengths = []
    for min_tokens in (0, 6, 15, 40):
        params = replace(free, stop=(stop,), min_tokens=min_tokens)
        [plain] = pilot.generate(["the cat"], params, guides={})
        [answer] = pilot.generate(["the cat"], params, guides={"blocks": 1.0})
        assert (answer.text, answer.token_ids) == (plain.text, plain.token_ids)
        assert plain.token_ids == whole.token_ids[: len(plain.token_ids)]
        assert len(plain.token_ids) > min_tokens
        lengths.append(len(plain.token_ids))
    assert lengths[0] < lengths[2]
    assert stop in plain.text
