"""The byte-level tokenizer: lossless, deterministic, and kept whole by saving."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pilotfish.chat import render_prompt
from pilotfish.data.bpe import HH_TEMPLATE, train_byte_bpe
from pilotfish.errors import ConfigError
from pilotfish.models.vocab import fingerprint
from tests.chat_tokenizers import TEXTS, hh_tokenizer
from tests.real_data import REPO


@settings(deadline=None, max_examples=100)
@given(st.text().filter(lambda text: "<" not in text))
def test_any_text_comes_back_unchanged(text: str) -> None:
    tokenizer = hh_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_has_the_asked_size_and_fixed_special_ids() -> None:
    tokenizer = train_byte_bpe(TEXTS, 300, max_length=128)
    assert len(tokenizer) == 300
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.model_max_length == 128


def test_training_twice_gives_the_same_ids_whatever_the_hash_seed() -> None:
    program = (
        "from tests.chat_tokenizers import hh_tokenizer\n"
        "from pilotfish.models.vocab import fingerprint\n"
        "print(fingerprint(hh_tokenizer()))"
    )
    expected = fingerprint(hh_tokenizer())
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(REPO / "platform"), str(REPO)]),
        }
        command = [sys.executable, "-c", program]
        answer = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        assert answer.stdout.strip() == expected


def test_a_saved_tokenizer_renders_the_same_prompt(tmp_path: Path) -> None:
    tokenizer = hh_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = "Naïve café?\n\n  yes"
    assert loaded.encode(prompt) == tokenizer.encode(prompt)
    assert render_prompt(loaded, [{"role": "user", "content": prompt}]) == render_prompt(
        tokenizer, [{"role": "user", "content": prompt}]
    )
    assert loaded.chat_template == HH_TEMPLATE


def test_a_system_message_stands_before_the_dialogue() -> None:
    tokenizer = hh_tokenizer()
    ids = render_prompt(
        tokenizer,
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}],
    )
    assert tokenizer.decode(ids) == "Be brief.\n\nHuman: How?\n\nAssistant:"


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs at least 258"):
        train_byte_bpe(TEXTS, 200)
