"""The vLLM plugin at its seam: whatever vLLM does to its batch, the law is the formula's."""

import json
import random
import subprocess
import sys
from enum import Enum, auto
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotfish import vllm_plugin
from pilotfish.errors import ConfigError, PromptError, VocabMismatchError
from pilotfish.guides.card import read_card, write_card
from pilotfish.guides.gate import Gated
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.vllm_plugin import (
    SETTINGS,
    GuidedBatch,
    PluginSettings,
    load_batch,
    read_settings,
    read_weights,
)
from tests.chat_tokenizers import hh_tokenizer
from tests.fakes import plain_logprobs, tiny_llama
from tests.folders import MAX_LENGTH, byte_tokenizer, save_base, save_guide

MODELS = {"a": tiny_llama(2, vocab_size=20), "b": tiny_llama(3)}
VOCAB, PADDED = 16, 24  # vLLM's columns are more than the tokenizer's, and so are those of guide a
GATE = 2.3  # of guide b, in nats; random logits lie on both sides of it
CPU = torch.device("cpu")


class Direction(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


class Request:
    def __init__(self, rng: random.Random) -> None:
        self.prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
        self.out: list[int] = []
        chains: list[dict[str, float]] = [{}, {"a": 0.7}, {"b": -0.5}, {"a": 0.4, "b": 1.5}]
        self.chain = rng.choice([*chains, {"b": 1.5, "a": 0.4}, {"a": 0.0, "b": 2.0}])
        self.extra_args = rng.choice([{"guides": self.chain}, {"guides": json.dumps(self.chain)}])

    def law(self, logits: Tensor) -> Tensor:
        ids = [*self.prompt, *self.out]
        ids = [token for token in ids if token >= 0]
        law = base = logits[:VOCAB].log_softmax(-1)
        for name, weight in self.chain.items():
            if name == "b" and -(base.exp() * base).sum() <= GATE:
                continue
            law = law + weight * plain_logprobs(MODELS[name], ids)[:VOCAB].log_softmax(-1)
        return law.log_softmax(-1)


class Batch:
    """vLLM's persistent batch: rows without holes, and a note of every change."""

    def __init__(self) -> None:
        self.rows: list[Request | None] = []
        self.removed: list[int] = []
        self.added: list[Any] = []
        self.moved: list[Any] = []

    def remove(self, index: int) -> None:
        self.rows[index] = None
        self.removed.append(index)

    def add(self, request: Request) -> None:
        if self.removed:  # the lowest hole is filled first, and then counts as no removal
            index = min(self.removed)
            self.removed.remove(index)
            self.rows[index] = request
        else:
            index = len(self.rows)
            self.rows.append(request)
        params = SimpleNamespace(extra_args=request.extra_args if request.chain else None)
        self.added.append((index, params, request.prompt, request.out))

    def swap(self, one: int, other: int) -> None:
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
        self.moved.append((one, other, Direction.SWAP))

    def condense(self) -> None:
        """The last row fills the first hole, until there is none."""
        while None in self.rows:
            if self.rows[-1] is None:
                self.rows.pop()
                continue
            hole = self.rows.index(None)
            self.moved.append((len(self.rows) - 1, hole, Direction.UNIDIRECTIONAL))
            self.rows[hole] = self.rows.pop()

    def update(self) -> Any:
        if not (self.removed or self.added or self.moved):
            return None
        removed = sorted(self.removed, reverse=True)
        update = SimpleNamespace(removed=removed, added=self.added, moved=self.moved)
        self.removed, self.added, self.moved = [], [], []
        return update


def new_guides(num_slots: int) -> tuple[dict[str, CausalLM], GuidedBatch]:
    lms = {
        name: CausalLM(model, vocab_size=VOCAB, num_slots=num_slots, prefill_chunk=5)
        for name, model in MODELS.items()
    }
    guides = {"a": GenARMGuide(lms["a"]), "b": Gated(GenARMGuide(lms["b"]), GATE)}
    return lms, GuidedBatch(guides, VOCAB)


@pytest.mark.parametrize("num_slots", [6, 2])
@pytest.mark.parametrize("placeholders", [False, True])
def test_any_history_of_joins_leaves_and_moves_gives_the_law_of_the_formula(
    num_slots: int, placeholders: bool
) -> None:
    """Preempted requests come back with what they wrote; some steps write nothing (chunked
    prefill); with asynchronous scheduling the newest id reads -1 until it is known, which for a
    row whose token will be thrown away may be later."""
    rng, generator = random.Random(7), torch.Generator().manual_seed(7)
    _, guided = new_guides(num_slots)
    batch, preempted = Batch(), []
    for _ in range(70):
        for index in range(len(batch.rows)):
            request = batch.rows[index]
            if rng.random() < 0.12 and request is not None:
                batch.remove(index)
                if rng.random() < 0.5:
                    preempted.append(request)
        while preempted and len(batch.rows) < 6 and rng.random() < 0.5:
            request = preempted.pop()
            request.out = list(request.out)
            batch.add(request)
        for _ in range(2):
            if sum(row is not None for row in batch.rows) < 6 and rng.random() < 0.4:
                batch.add(Request(rng))
        batch.condense()
        if len(batch.rows) > 1 and rng.random() < 0.3:
            batch.swap(*rng.sample(range(len(batch.rows)), 2))
        rows = [row for row in batch.rows if row is not None]
        drawn = [rng.randrange(VOCAB) if rng.random() < 0.8 else None for _ in rows]
        for row, token in zip(rows, drawn, strict=True):
            if placeholders and token is not None:
                row.out.append(-1)
        guided.update(batch.update())
        late = [placeholders and rng.random() < 0.1 for _ in rows]
        for row, token, waits in zip(rows, drawn, late, strict=True):
            if token is not None and not waits:
                row.out[len(row.out) - placeholders :] = [token]
        logits = torch.randn(len(rows), PADDED, dtype=torch.float64, generator=generator)
        before = logits.clone()
        found = guided.apply(logits)
        for row, one, old in zip(rows, found, before, strict=True):
            if not any(row.chain.values()):
                assert torch.equal(one, old)
                continue
            torch.testing.assert_close(one[:VOCAB], row.law(old), rtol=0, atol=1e-9)
            assert one[VOCAB:].eq(-torch.inf).all()
        for row, token, waits in zip(rows, drawn, late, strict=True):
            if token is not None and waits:
                row.out[-1] = token


def join(guided: GuidedBatch, rows: list[tuple[list[int], list[int], dict[str, float]]]) -> None:
    batch = Batch()
    for prompt, out, chain in rows:
        request = Request(random.Random(0))
        request.prompt, request.out, request.chain = prompt, out, chain
        request.extra_args = {"guides": chain}
        batch.add(request)
    guided.update(batch.update())


def test_each_token_is_fed_to_a_guide_once_however_rows_move() -> None:
    lms, guided = new_guides(4)
    outs: list[list[int]] = [[], [], []]
    join(guided, [([3, 1, 4, 1, 5], out, {"a": 1.0}) for out in outs])
    fed: list[int] = []
    embedding: Any = lms["a"].model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, given: fed.append(given[0].numel()))
    for step in range(6):
        moved = [(0, 2, Direction.SWAP)] if step % 2 else []
        guided.update(SimpleNamespace(removed=[], added=[], moved=moved) if moved else None)
        guided.apply(torch.zeros(3, PADDED))
        for out in outs:
            out.append(step)
    hook.remove()
    assert sum(fed) == 3 * (5 + 5)


def test_what_was_forbidden_before_stays_forbidden_and_ids_behind_the_vocabulary_too() -> None:
    _, guided = new_guides(2)
    join(guided, [([3, 1], [], {"a": 1.0, "b": 0.5})])
    logits = torch.zeros(1, PADDED)
    logits[0, [2, 7]] = -torch.inf
    law = guided.apply(logits)[0]
    assert law.isneginf().nonzero()[:, 0].tolist() == [2, 7, *range(VOCAB, PADDED)]
    assert law.exp().sum().item() == pytest.approx(1)


def test_a_batch_without_guided_rows_is_left_alone() -> None:
    lms, guided = new_guides(2)
    join(guided, [([3], [], {}), ([4], [], {"a": 0.0})])
    logits = torch.randn(2, PADDED)
    before = logits.clone()
    assert guided.apply(logits) is logits
    assert torch.equal(logits, before)
    assert lms["a"].num_forwards == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"c": 1.0}, "no guide named 'c' is loaded; loaded: a, b"),
        ({"a": "1"}, "weight of guide 'a' is '1'"),
        ({"a": True}, "weight of guide 'a' is True"),
        ({"a": float("nan")}, "weight of guide 'a' is nan"),
        ({"a": float("inf")}, "weight of guide 'a' is inf"),
        (["a", 1.0], "wanted weights by name"),
        ("{a}", "not JSON"),
        ("[1]", "wanted weights by name"),
        (0.7, "wanted weights by name"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_refused(asked: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_weights({"guides": asked}, MODELS)


def test_requests_keep_the_order_of_their_guides_and_drop_zeros() -> None:
    assert list(read_weights({"guides": {"b": 2, "a": 0.5}}, MODELS).items()) == [
        ("b", 2),
        ("a", 0.5),
    ]
    assert read_weights({"guides": '{"a": 0, "b": 1}'}, MODELS) == {"b": 1}
    assert read_weights(None, MODELS) == read_weights({"other": 1}, MODELS) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not set"),
        ("guides", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "guides"),
        ('{"guides": {}}', "guides"),
        ('{"guides": {"a": "x"}, "dtpye": "auto"}', "did you mean 'dtype'"),
    ],
)
def test_settings_come_from_the_environment_and_are_checked(
    monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    monkeypatch.delenv(SETTINGS, raising=False)
    if text is not None:
        monkeypatch.setenv(SETTINGS, text)
    with pytest.raises(ConfigError, match=message):
        read_settings()


def engine_config(base: Path, **changes: Any) -> Any:
    model = {"tokenizer": str(base), "model": str(base), "max_model_len": 64}
    model |= {"enable_prompt_embeds": False}
    engine = {"speculative_config": None, "use_v2_model_runner": False}
    engine |= {name: value for name, value in changes.items() if name in engine}
    model |= {name: value for name, value in changes.items() if name in model}
    scheduler = SimpleNamespace(max_num_seqs=2)
    return SimpleNamespace(
        model_config=SimpleNamespace(**model), scheduler_config=scheduler, **engine
    )


def test_guides_are_loaded_by_their_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, guide = save_base(tmp_path / "base"), save_guide(tmp_path / "guide")
    monkeypatch.setenv(SETTINGS, json.dumps({"guides": {"g": str(guide)}, "dtype": "float64"}))
    guided = load_batch(read_settings(), engine_config(base), CPU)
    join(guided, [([3, 1], [], {"g": 1.5})])
    size = len(byte_tokenizer())
    logits = torch.randn(1, size + 44, dtype=torch.float64)
    expected = logits[0, :size].log_softmax(-1)
    model: Any = guided._guides["g"].source.model  # type: ignore[attr-defined]
    expected = (expected + 1.5 * plain_logprobs(model, [3, 1])).log_softmax(-1)
    torch.testing.assert_close(guided.apply(logits)[0, :size], expected)


def test_a_gate_on_the_card_is_kept(tmp_path: Path) -> None:
    base, folder = save_base(tmp_path / "base"), save_guide(tmp_path / "guide")
    write_card(folder, read_card(folder).model_copy(update={"gate": 1.0}))
    guided = load_batch(PluginSettings(guides={"g": str(folder)}), engine_config(base), CPU)
    join(guided, [([3, 1], [], {"g": 1.5}), ([3, 1], [], {"g": 1.5})])
    logits = torch.zeros(2, len(byte_tokenizer()))
    logits[0, 5] = 30.0
    certain = logits[0].log_softmax(-1)
    law = guided.apply(logits)
    torch.testing.assert_close(law[0], certain)
    assert law[1].std() > 0.01


@pytest.mark.parametrize(
    ("changes", "card", "message"),
    [
        ({"speculative_config": object()}, {}, "speculative decoding"),
        ({"use_v2_model_runner": True}, {}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"enable_prompt_embeds": True}, {}, "enable_prompt_embeds"),
        ({"max_model_len": MAX_LENGTH + 1}, {}, "Lower max_model_len"),
        ({}, {"template": "own"}, "read the base's prompt"),
        ({}, {"kind": "args"}, "of kind 'genarm'"),
    ],
)
def test_engines_and_guides_that_do_not_go_together_are_refused(
    tmp_path: Path, changes: dict[str, Any], card: dict[str, Any], message: str
) -> None:
    base, folder = save_base(tmp_path / "base"), save_guide(tmp_path / "guide")
    write_card(folder, read_card(folder).model_copy(update=card))
    settings = PluginSettings(guides={"g": str(folder)})
    with pytest.raises(ConfigError, match=message):
        load_batch(settings, engine_config(base, **changes), CPU)


def test_a_guide_for_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_guide(tmp_path / "guide", tokenizer=hh_tokenizer())
    with pytest.raises(VocabMismatchError):
        load_batch(PluginSettings(guides={"g": str(folder)}), engine_config(base), CPU)


def test_without_vllm_the_module_imports_and_its_processor_says_what_is_missing() -> None:
    script = (
        "import sys; sys.modules['vllm'] = None\n"
        "from pilotfish import vllm_plugin\n"
        "try: vllm_plugin.GenARMLogitsProcessor\n"
        "except vllm_plugin.ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": "platform"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install 'vllm==0.29.*'" in done.stdout
    with pytest.raises(AttributeError, match="Unknown"):
        _ = vllm_plugin.Unknown
