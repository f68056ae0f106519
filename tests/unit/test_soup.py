"""Soups are means of whole weights: a model at the ends, a line between them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from jobs.export import main
from pilotfish import world
from pilotfish.errors import CheckpointError, ConfigError, VocabMismatchError
from pilotfish.guides.card import GuideCard, read_card, write_card
from pilotfish.train.export import read_record, save_model, write_record
from pilotfish.train.soup import soup, write_soup
from tests.fakes import tiny_config

OUT, IN, RANK = 5, 4, 2


def models(num: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "a": torch.randn(OUT, IN, generator=generator),
            "b": torch.randn(IN, generator=generator).bfloat16(),
        }
        for _ in range(num)
    ]


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_soup_of_one_model_alone_is_that_model(chosen: int) -> None:
    states = models(3)
    mixed = soup(states, [float(at == chosen) for at in range(3)])
    for name, tensor in states[chosen].items():
        assert mixed[name].dtype == tensor.dtype
        assert mixed[name].equal(tensor)


def test_a_soup_is_linear_in_its_weights() -> None:
    states = models(3)
    one, other = [0.2, 0.3, 0.5], [0.6, 0.6, -0.2]
    between = [0.25 * x + 0.75 * y for x, y in zip(one, other, strict=True)]
    want = 0.25 * soup(states, one)["a"] + 0.75 * soup(states, other)["a"]
    torch.testing.assert_close(soup(states, between)["a"], want)


def test_a_soup_averages_what_was_added_to_the_base_and_not_the_factors_of_adapters() -> None:
    torch.manual_seed(0)
    base_OI = torch.randn(OUT, IN)
    ups_OR, downs_RI = torch.randn(2, OUT, RANK), torch.randn(2, RANK, IN)
    weights = torch.tensor([0.3, 0.7])
    states = [{"w": base_OI + up @ down} for up, down in zip(ups_OR, downs_RI, strict=True)]
    want_OI = base_OI + 0.3 * ups_OR[0] @ downs_RI[0] + 0.7 * ups_OR[1] @ downs_RI[1]
    mixed_OI = soup(states, weights.tolist())["w"]
    torch.testing.assert_close(mixed_OI, want_OI)

    factors_OI = base_OI + torch.einsum("n,nor->or", weights, ups_OR) @ torch.einsum(
        "n,nri->ri", weights, downs_RI
    )
    assert (mixed_OI - factors_OI).norm() > 0.1 * (want_OI - base_OI).norm()
    with pytest.raises(CheckpointError, match="factor of an adapter"):
        soup([{"q.lora_A.default.weight": downs_RI[0]}], [1.0])


@pytest.mark.parametrize("weights", [[0.5, 0.4], [1.0, 1.0], [0.5, 0.5 + 1e-5]])
def test_weights_that_do_not_sum_to_1_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        soup(models(2), weights)


def test_models_of_other_shapes_are_refused() -> None:
    first, second = models(2)
    with pytest.raises(CheckpointError, match="3 tensors differ in name or shape"):
        soup([first, {"a": second["a"].T, "c": second["b"]}], [0.5, 0.5])


def write(folder: Path, seed: int, *, card: GuideCard | None = None, heads: int = 4) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(len(world.VOCABULARY), num_attention_heads=heads))
    save_model(folder, model, world.build_tokenizer(), state=model.state_dict())
    write_record(folder, {"config_hash": f"hash-{seed}"})
    if card is not None:
        write_card(folder, card)
    return folder


CARD = GuideCard(kind="genarm", base="base", vocab="v", beta_r=0.3, training={"run_id": "one"})


def test_the_command_writes_a_folder_that_plain_from_pretrained_loads(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", 1, card=CARD), write(tmp_path / "two", 2, card=CARD)
    assert main(["--soup", f"{one}=0.3", f"{two}=0.7", str(tmp_path / "out")]) == 0
    parts = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, two)]
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.3 * parts[0][name] + 0.7 * parts[1][name])
    card, record = read_card(tmp_path / "out"), read_record(tmp_path / "out")
    assert card.beta_r == 0.3
    assert record is not None
    assert card.training == record
    assert record["soup"] == {str(one): 0.3, str(two): 0.7}


def test_a_soup_has_the_identity_of_its_parts_and_weights(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", 1), write(tmp_path / "two", 2)
    soups = [{one: 0.3, two: 0.7}, {two: 0.7, one: 0.3}, {one: 0.7, two: 0.3}]
    hashes = []
    for number, parts in enumerate(soups):
        write_soup({str(key): value for key, value in parts.items()}, tmp_path / str(number))
        record = read_record(tmp_path / str(number))
        assert record is not None
        hashes.append(record["config_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_folders_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one = str(write(tmp_path / "one", 1, card=CARD))
    scaled = str(write(tmp_path / "scaled", 2, card=CARD.model_copy(update={"beta_r": 0.1})))
    with pytest.raises(ConfigError, match="differ in beta_r"):
        write_soup({one: 0.5, scaled: 0.5}, tmp_path / "out")
    plain = str(write(tmp_path / "plain", 3))
    with pytest.raises(CheckpointError, match=r"guide\.json"):
        write_soup({one: 0.5, plain: 0.5}, tmp_path / "out")
    headed = str(write(tmp_path / "headed", 4, heads=2))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        write_soup({plain: 0.5, headed: 0.5}, tmp_path / "out")
    other = write(tmp_path / "other", 5)
    tokenizer = world.build_tokenizer()
    tokenizer.add_tokens(["dessert"])
    tokenizer.save_pretrained(other)
    with pytest.raises(VocabMismatchError, match="vocabulary"):
        write_soup({plain: 0.5, str(other): 0.5}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--soup", "one=0.5", "two", "out"], "is not FOLDER=WEIGHT"),
        (["--soup", "one=0.5", "one=0.5", "out"], "twice"),
        (["one", "two", "out"], "wanted one"),
        (["one", "."], "exists"),
    ],
)
def test_commands_that_make_no_sense_exit_with_2(
    arguments: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments) == 2
    assert message in caplog.text
