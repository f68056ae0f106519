"""What several modules use, and is slow to make."""

from collections.abc import Iterator

import pytest

from tests.guide_versions import Registry
from tests.http_api import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One replica of each deployment; a test that breaks something breaks it for all."""
    server = Server(tmp_path_factory.mktemp("models"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Versions of guides, which the tests of one module move about."""
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what tries again not wait for long."""
    monkeypatch.setattr("serve.guides._RETRY_S", 0.01)
    monkeypatch.setattr("serve.replicas.following._RETRY_S", 0.05)
