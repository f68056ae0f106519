"""A base that is spread over processes does what it does in one: exactly, or up to rounding."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.sharding_rules import FrozenBaseConfig
from tests.distributed import uses
from tests.distributed.world import run_world

NONE, ZERO3 = FrozenBaseConfig(), FrozenBaseConfig(sharding="zero3")
TENSOR = FrozenBaseConfig(sharding="tensor", tensor_size=2)
WORLDS = {
    2: ({"none": NONE, "tensor": TENSOR, "zero3": ZERO3}, (0, 1, 2, 3)),
    4: ({"tensor": TENSOR, "zero3": ZERO3}, (1,)),
}
CASES = [(size, sharding) for size, (configs, _) in WORLDS.items() for sharding in configs]

# Sums over shards add in another order than sums over the whole; numbers here are below 20.
CLOSE: Any = {"rtol": 1e-5, "atol": 2e-5}

Found = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    uses.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def whole(models: Path) -> Found:
    return uses.reference(models)


@pytest.fixture(scope="module")
def worlds(models: Path) -> Callable[[int], list[dict[str, Found]]]:
    return cache(lambda size: run_world(size, uses.use_all, models, *WORLDS[size]))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[1]}-{case[0]}")
def spread(request: pytest.FixtureRequest, worlds: Any) -> tuple[str, list[Found]]:
    """What each rank found, under one sharding in one world."""
    size, sharding = request.param
    return sharding, [found[sharding] for found in worlds(size)]


def test_logits_and_all_hidden_states_are_those_of_one_process(spread: Any, whole: Found) -> None:
    sharding, ranks = spread
    for found in ranks:
        for name in ("logits", "hidden"):
            if sharding == "zero3":
                assert torch.equal(found[name], whole[name]), "gathered weights are the weights"
            torch.testing.assert_close(found[name], whole[name], **CLOSE)


def test_each_share_of_the_data_belongs_to_one_worker_or_one_tensor_group(spread: Any) -> None:
    sharding, ranks = spread
    group = 2 if sharding == "tensor" else 1
    num_shares = len(ranks) // group
    shares = [found["share"] for found in ranks]
    assert shares == [(rank // group, num_shares) for rank in range(len(ranks))]


def test_the_engine_decodes_the_same_texts_with_the_same_probabilities(
    spread: Any, whole: Found
) -> None:
    """Greedy, sampled and guided, prompts of all lengths, unequal numbers of answers per rank."""
    _, ranks = spread
    told: dict[int, Any] = {}
    for found in ranks:
        told |= found["answers"]
        for key, answer in found["answers"].items():
            tokens, logprobs = zip(*answer, strict=True)
            wanted_tokens, wanted_logprobs = zip(*whole["answers"][key], strict=True)
            assert tokens == wanted_tokens
            assert logprobs == pytest.approx(wanted_logprobs, abs=2e-5)
    assert told.keys() == whole["answers"].keys()


def test_one_share_can_be_decoded_while_the_others_have_nothing_to_do(spread: Any) -> None:
    _, ranks = spread
    for found in ranks:
        again = found["answers while others wait"]
        if found["share"][0] != 0:
            assert again is None
        else:
            assert words(again) == words(found["answers"])


def test_workers_of_a_tensor_group_decode_the_same_tokens_to_the_last_bit(spread: Any) -> None:
    _, ranks = spread
    for found in ranks:
        peers = [other for other in ranks if other["share"] == found["share"]]
        assert all(peer["answers"] == found["answers"] for peer in peers)


def test_gradients_come_through_the_base_to_what_stands_before_it(
    spread: Any, whole: Found
) -> None:
    """After decoding, which must leave nothing behind."""
    for found in spread[1]:
        torch.testing.assert_close(found["gradient"], whole["gradient"], **CLOSE)


def test_a_worker_holds_its_share_of_the_weights(spread: Any, whole: Found) -> None:
    sharding, ranks = spread
    shards = {"none": 1, "tensor": 2, "zero3": len(ranks)}[sharding]
    for found in ranks:
        assert found["resident"] == pytest.approx(whole["num"] / shards, rel=0.01)


def test_the_hash_is_that_of_the_whole_and_no_use_changes_it(spread: Any, whole: Found) -> None:
    for found in spread[1]:
        assert found["hash"] == found["hash after"] == whole["hash"]


def test_a_guide_of_any_zero_stage_learns_as_beside_a_whole_base(spread: Any, whole: Found) -> None:
    for found in spread[1]:
        for losses in found["losses"].values():
            assert losses == pytest.approx(whole["losses"], abs=2e-5)
    assert whole["losses"][-1] < whole["losses"][0] - 1


@pytest.mark.parametrize("kind", ["tied", "bfloat16"])
def test_tied_embeddings_and_another_dtype_are_shared_as_well(
    spread: Any, whole: Found, kind: str
) -> None:
    sharding, ranks = spread
    wanted_logits, wanted_hash = whole[kind]
    assert wanted_hash != whole["hash"]
    for found in ranks:
        logits, digest = found[kind]
        assert digest == wanted_hash
        if sharding != "tensor":
            assert torch.equal(logits, wanted_logits)
        elif kind == "tied":
            torch.testing.assert_close(logits, wanted_logits, **CLOSE)
        else:  # sums over shards are rounded to eight bits
            torch.testing.assert_close(logits, wanted_logits, rtol=0.02, atol=0.1)


def test_weights_on_the_cpu_are_the_same_weights(spread: Any, whole: Found) -> None:
    for found in spread[1]:
        if found["offloaded"] is not None:
            logits, digest = found["offloaded"]
            assert torch.equal(logits, whole["logits"])
            assert digest == whole["hash"]


def words(answers: dict[int, list[tuple[int, float]]]) -> dict[int, list[int]]:
    return {key: [token for token, _ in answer] for key, answer in answers.items()}
