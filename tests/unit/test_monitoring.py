"""The dashboard and the alerts ask for metrics that there are."""

import json
import re
from pathlib import Path

import pytest
import yaml

from serve.metrics import EngineMetrics, GuideMetrics, RequestMetrics
from tests.metric_book import Book

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "monitoring"
SUFFIX = re.compile(r"_(total|bucket|sum|count)$")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    book = Book(monkeypatch)
    for kind in (RequestMetrics, EngineMetrics, GuideMetrics):
        kind("base")
    return book.names


def asked(text: str) -> set[str]:
    return {SUFFIX.sub("", name) for name in re.findall(r"ray_(pilotfish_\w+)", text)}


def test_the_dashboard_shows_every_metric_and_no_other(names: set[str]) -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    shown = {
        name for panel in panels for target in panel["targets"] for name in asked(target["expr"])
    }
    assert shown == names
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_alerts_watch_metrics_that_there_are(names: set[str]) -> None:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        watched = asked(rule["expr"])
        assert watched <= names, rule["alert"]
        assert watched
        assert rule["annotations"]["summary"]
