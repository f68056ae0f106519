"""Traces of requests in MLflow."""

import queue
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from serve.api.traces import Traces
from serve.api.visit import Stage, Visit
from serve.ingress_config import TraceConfig

# MLflow's own, when it is imported for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")


def visit(**fields: Any) -> Visit:
    one = Visit(path="/v1/completions", request_id="abc", status=200, finish_reasons=["stop"])
    began = one.began
    one.admitted, one.first, one.ended = began + 0.1, began + 0.8, began + 1.0
    one.stages = {
        "decode": Stage(began + 0.1, began + 0.3, began + 0.7),
        "response guide": Stage(began + 0.7, began + 0.8, began + 1.0),
    }
    one.guides = [{"name": "helpful", "version": "1", "weight": 0.5, "mean_kl": 0.2}]
    for name, value in fields.items():
        setattr(one, name, value)
    return one


@pytest.fixture
def store(tmp_path: Path) -> Any:
    before = mlflow.get_tracking_uri()
    yield f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow.set_tracking_uri(before)


def test_a_trace_has_a_span_for_each_part_of_a_request(store: str) -> None:
    traces = Traces(TraceConfig(uri=store, experiment="ours", sample=1))
    began = time.perf_counter()
    for one in (visit(), visit(status=500), visit(finish_reasons=[])):
        traces.write(one)
    assert time.perf_counter() - began < 0.1  # nobody waits for MLflow
    found = _read(store, 2)
    assert sorted(trace.info.state for trace in found) == ["ERROR", "OK"]
    root, *spans = sorted(found[0].data.spans, key=lambda span: span.start_time_ns)
    assert (root.name, root.attributes["request_id"]) == ("/v1/completions", "abc")

    def seconds(span: Any) -> tuple[float, float]:
        times = span.start_time_ns, span.end_time_ns
        return tuple(round((each - root.start_time_ns) / 1e9, 2) for each in times)  # type: ignore[return-value]

    assert seconds(root) == (0, 1)
    assert {span.name: seconds(span) for span in spans} == {
        "queue": (0, 0.1),
        "prefill": (0.1, 0.3),
        "decode": (0.3, 0.7),
        "guide helpful": (0.3, 0.7),
        "response guide": (0.7, 1),
    }
    guide = next(span for span in spans if span.name == "guide helpful")
    decode = next(span for span in spans if span.name == "decode")
    assert guide.parent_id == decode.span_id
    assert guide.attributes.items() >= {"version": "1", "mean_kl": 0.2}.items()


def test_only_a_share_is_written_and_never_more_than_can_wait() -> None:
    few = Traces(TraceConfig(uri="sqlite://", sample=0.1))
    few._random.seed(3)
    few._visits = queue.Queue(5)  # that nobody reads
    before = few._visits
    for _ in range(20):
        few.write(visit())
    assert 0 < before.qsize() <= 5
    for _ in range(300):
        few.write(visit())
    assert before.qsize() == 5


def _read(store: str, num: int) -> list[Any]:
    experiment = None
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if mlflow.get_tracking_uri() != store:
            continue
        experiment = mlflow.get_experiment_by_name("ours")
        if experiment is None:
            continue
        mlflow.flush_trace_async_logging()
        found: Any = mlflow.search_traces(locations=[experiment.experiment_id], return_type="list")
        if len(found) == num and all(len(trace.data.spans) == 6 for trace in found):
            return found
    raise AssertionError("the traces were not written")
