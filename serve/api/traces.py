"""Traces in MLflow of a share of the requests, written by a thread of their own afterwards."""

import logging
import queue
import random
import threading
from typing import Any

from serve.api.visit import Visit
from serve.ingress_config import TraceConfig

logger = logging.getLogger(__name__)

_MOST = 1000
"""Visits that wait to be written; beyond it they are left out."""


class Traces:
    """Writes visits as traces with the spans queue, prefill, decode, guide and response guide."""

    def __init__(self, config: TraceConfig) -> None:
        self._config = config
        self._visits: queue.Queue[Visit] = queue.Queue(_MOST)
        self._random = random.Random()
        threading.Thread(target=self._run, name="traces", daemon=True).start()

    def write(self, visit: Visit) -> None:
        """Take a visit, if it is one of the share. Never waits."""
        if visit.finish_reasons and self._random.random() < self._config.sample:
            try:
                self._visits.put_nowait(visit)
            except queue.Full:
                logger.warning("MLflow is slow: a trace is left out")

    def _run(self) -> None:
        experiment = None
        while True:
            visit = self._visits.get()
            try:
                experiment = experiment or self._experiment()
                export(visit, experiment)
            except Exception:
                logger.exception("cannot write the trace of %s", visit.request_id)

    def _experiment(self) -> str:
        import mlflow

        mlflow.set_tracking_uri(self._config.uri)
        return mlflow.set_experiment(self._config.experiment).experiment_id


def export(visit: Visit, experiment: str) -> None:
    """Write one trace, to the tracking server that is set."""
    from mlflow import start_span_no_context

    def at(moment: float) -> int:
        """Return a moment in nanoseconds since 1970."""
        return round((visit.began_at + moment - visit.began) * 1e9)

    def span(
        name: str, began: float, ended: float, parent: Any, attributes: dict[str, Any] | None = None
    ) -> Any:
        made = start_span_no_context(
            name,
            parent_span=parent,
            attributes=attributes,
            experiment_id=experiment if parent is None else None,
            start_time_ns=at(began),
        )
        if parent is not None:
            made.end(end_time_ns=at(ended))
        return made

    assert visit.ended is not None, "it is over"
    about = {
        "request_id": visit.request_id,
        "model": visit.model,
        "prompt_tokens": visit.num_prompt_tokens,
        "completion_tokens": visit.num_new_tokens,
        "finish_reasons": visit.finish_reasons,
        "failovers": len(visit.failovers),
    }
    root = span(visit.path, visit.began, visit.ended, None, about)
    for name, began, ended in _stages(visit):
        made = span(name, began, ended, root)
        if name == "decode":
            for guide in visit.guides:
                # It acts at every step, and how long that took only its replica knows.
                span(f"guide {guide['name']}", began, ended, made, dict(guide))
    root.end(status="OK" if visit.status < 400 else "ERROR", end_time_ns=at(visit.ended))


def _stages(visit: Visit) -> list[tuple[str, float, float]]:
    """Return what a request went through, with its first and last moment."""
    found = []
    if visit.admitted is not None:
        found.append(("queue", visit.began, visit.admitted))
    if (stage := visit.stages.get("decode")) is not None:
        found.append(("prefill", stage.began, stage.first))
        found.append(("decode", stage.first, stage.ended))
    if (stage := visit.stages.get("response guide")) is not None:
        found.append(("response guide", stage.began, stage.ended))
    return found
