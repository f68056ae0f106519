"""`jobs.progress`: what the bar of a run shows in the end."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import progress


def test_a_board_that_no_longer_answers_does_not_hold_back_the_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_refresh", lambda bar, board: None)
    over = threading.Event()
    over.set()
    finished: Any = SimpleNamespace(board=None, finished=7)
    progress._show(finished, "guide", over)
    assert "guide: 100%" in (shown := capsys.readouterr().err)
    assert "7/7" in shown

    failed: Any = SimpleNamespace(board=None, finished=None)
    progress._show(failed, "guide", over)
    assert "100%" not in capsys.readouterr().err
