"""What several modules use, and is slow to make."""

from collections.abc import Iterator

import pytest

from tests.http_api import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One replica of each deployment; a test that breaks something breaks it for all."""
    server = Server(tmp_path_factory.mktemp("models"))
    yield server
    server.close()
