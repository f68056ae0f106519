"""One line of JSON per request, for whatever collects logs."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from serve.api.bodies import read_json
from serve.api.visit import Visit

logger = logging.getLogger("pilotfish.access")

_QUIET = ("/health", "/ready", "/version", "/ping", "/metrics")
"""Asked every few seconds; logged only when something is wrong."""


class AccessLog:
    """Writes visits to the logger `pilotfish.access`: no keys, and prompts only if told to."""

    def __init__(self, *, replica: str, prompts: bool) -> None:
        self._replica, self._prompts = replica, prompts
        # Not through the root logger, whose level and format belong to Ray.
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)

    def write(self, visit: Visit) -> None:
        if visit.path in _QUIET and visit.status < 400:
            return
        line = _line(visit)
        line["replica"] = self._replica
        if self._prompts:
            line["prompt"] = _prompt(visit.body)
        logger.info("%s", json.dumps(line))


def _line(visit: Visit) -> dict[str, Any]:
    return {
        "time": datetime.fromtimestamp(visit.began_at, UTC).isoformat(timespec="milliseconds"),
        "request_id": visit.request_id,
        "session_id": visit.session_id,
        "key": visit.client_id,
        "method": visit.method,
        "path": visit.path,
        "status": visit.status,
        "model": visit.model,
        "guides": [
            {field: guide[field] for field in ("name", "version", "weight")}
            for guide in visit.guides
        ],
        "prompt_tokens": visit.num_prompt_tokens,
        "completion_tokens": visit.num_new_tokens,
        "queue_s": _since(visit.began, visit.admitted),
        "ttft_s": _since(visit.began, visit.first),
        "seconds": _since(visit.began, visit.ended),
        "failovers": len(visit.failovers),
        "finish_reasons": visit.finish_reasons,
    }


def _since(began: float, moment: float | None) -> float | None:
    return None if moment is None else round(moment - began, 4)


def _prompt(body: bytes) -> Any:
    """Return what a body asks; None for one that asks nothing."""
    try:
        asked = read_json(body)
    except json.JSONDecodeError:
        return None
    if not isinstance(asked, dict):
        return None
    return asked.get("messages", asked.get("prompt"))
