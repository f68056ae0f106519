"""The benchmark scripts run, on models small enough for a test, and report what they promise."""

import json
from typing import Any

import pytest

from benchmarks import decode


def test_the_decode_benchmark_reports_every_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = decode.random_llama

    def small(**sizes: Any) -> Any:
        tiny = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 16}
        return real(**{**sizes, **tiny})

    monkeypatch.setattr(decode, "random_llama", small)
    decode.main(["--json", "--batches", "1", "3", "--tokens", "8", "--rounds", "1"])
    report = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        assert row["base_over_generate"] > 0
        assert row["guided_over_base"] > 0
        expected = row["base_tokens_per_second"] / row["generate_tokens_per_second"]
        assert row["base_over_generate"] == pytest.approx(expected)
