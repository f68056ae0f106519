"""The quickstart on a cluster, with a few steps instead of many: every part of it really runs."""

from pathlib import Path

import pytest
import yaml

from jobs import quickstart

pytestmark = pytest.mark.cluster

SHORT = {
    "base.yaml": {
        "data": {"num": 400, "num_heldout": 20},
        "train": {"steps": 12, "eval_every": 0, "checkpoint_every": 0},
    },
    "genarm.yaml": {
        "data": {"num": 200, "num_heldout": 20},
        "train": {"steps": 4, "eval_every": 0, "checkpoint_every": 0},
    },
    "evaluate.yaml": {
        "prompts": {"num": 6},
        "settings": [{"name": "GenARM w=1", "guides": {"helpful": 1.0}}],
        "decoding": {"max_tokens": 20, "num_actors": 1},
    },
}


@pytest.fixture
def short_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped configs, with less of everything."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, changes in SHORT.items():
        tree = yaml.safe_load((quickstart.CONFIGS / name).read_text())
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
        (folder / name).write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(quickstart, "CONFIGS", folder)
    return folder


@pytest.mark.usefixtures("ray_cluster", "short_configs")
def test_the_quickstart_trains_measures_serves_and_then_reuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    assert quickstart.main(["--root", str(root)]) == 0
    first = capfd.readouterr().out
    for part in ("base greedy", "base T=0.5", "GenARM w=1", "question", "guided", "mlflow ui"):
        assert part in first
    weights = root / "kitchen" / "genarm" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert (root / "kitchen" / "evaluation" / "report.html").is_file()

    assert quickstart.main(["--root", str(root)]) == 0
    assert "Done in" in capfd.readouterr().out
    assert weights.stat().st_mtime_ns == written
