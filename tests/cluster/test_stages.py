"""Stages on a real cluster, in processes that outlive them."""

from pathlib import Path

import pytest

from jobs.stages import Failed, Stage, run_stages

pytestmark = pytest.mark.cluster

NEEDS = {"b": ("a",), "c": ("a",), "d": ("b", "c")}


def run(root: Path, *, num_lanes: int = 2, **behaviour: str) -> tuple[dict[str, float], list[str]]:
    """Run stages a to d; return their seconds, and their names in the order of their starts."""
    order = root / "order"
    stages = {
        name: Stage(
            "tests.cluster.scripted_stage",
            (name, "{root}/order", behaviour.get(name, "")),
            NEEDS.get(name, ()),
        )
        for name in "abcd"
    }
    seconds = run_stages(stages, root, logs=root / "logs", num_lanes=num_lanes, label="test")
    return seconds, order.read_text().split()


def test_stages_run_behind_their_needs_and_their_seconds_are_told(
    ray_cluster: str, tmp_path: Path
) -> None:
    seconds, order = run(tmp_path)
    assert order[0] == "a"
    assert order[-1] == "d"
    assert set(seconds) == set(order) == set("abcd")


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("fail", r"exit code 3(.|\n)*out of eggs"), ("raise", r"exit code 1(.|\n)*out of milk")],
)
def test_a_stage_that_fails_ends_the_run_with_the_end_of_its_log(
    behaviour: str, said: str, ray_cluster: str, tmp_path: Path
) -> None:
    with pytest.raises(Failed, match=f"stage b ended with {said}"):
        run(tmp_path, num_lanes=1, b=behaviour)
    assert "d" not in (tmp_path / "order").read_text().split()


def test_a_stage_whose_process_was_killed_is_begun_again(ray_cluster: str, tmp_path: Path) -> None:
    seconds, order = run(tmp_path, b="die once")
    assert sorted(order) == ["a", "b", "b", "c", "d"]
    assert order[-1] == "d"
    assert set(seconds) == set("abcd")
