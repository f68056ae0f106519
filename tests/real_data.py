"""Real rows, for tests that skip where they are not at hand."""

import os
from pathlib import Path
from typing import Any

import pytest

from pilotfish.data.sources import DataSource

REPO = Path(__file__).resolve().parents[1]


def hh_source(**settings: Any) -> DataSource:
    """Return the harmless-base test rows of HH-RLHF, or skip the test."""
    root = Path(os.environ.get("PILOTFISH_DATA", REPO.parent / "shared" / "data"))
    file = root / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"needs HH-RLHF rows at {file} (set PILOTFISH_DATA to the folder of hh-rlhf)")
    return DataSource(path=str(file), **settings)
