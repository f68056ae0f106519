"""The OpenAPI document of the HTTP API, and what it leads a fuzzer to send."""

from contextlib import suppress
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.api.routes import build_routes
from tests.http_api import Server

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    app = build_routes(server.pipeline(max_in_flight=8))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


OPERATIONS = [
    (path, method)
    for path, methods in build_routes(cast(Any, None)).openapi()["paths"].items()
    for method in methods
]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_whatever_the_document_allows_or_forbids_is_answered_as_it_says(
    document: Any, path: str, method: str, mode: GenerationMode
) -> None:
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            _make_it_likely_to_work(case.body)
        case.call_and_validate(checks=CHECKS)

    with suppress(Unsatisfiable):  # a path without anything to get wrong
        send()


def _make_it_likely_to_work(body: dict[str, Any]) -> None:
    """A random model exists as seldom as a random answer is short."""
    if isinstance(body.get("model"), str):
        body["model"] = "base"
    for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("n", 3)):
        if type(body.get(name)) is int:
            body[name] = min(body[name], most)


def test_the_document_declares_errors_and_streams(server: Server) -> None:
    paths = build_routes(server.pipeline()).openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/score", "/tokenize"} <= paths.keys()
    for path, methods in paths.items():
        for about in methods.values():
            assert "422" not in about["responses"], path
    for path in ("/v1/chat/completions", "/v1/completions"):
        answered = paths[path]["post"]["responses"]
        assert answered.keys() == {"200", "4XX", "5XX"}
        assert answered["200"]["content"].keys() == {"application/json", "text/event-stream"}
