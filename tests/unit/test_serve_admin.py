"""Admin routes, and the page of metrics."""

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import pytest
import ray

from serve.api.metrics_page import addresses, merge, read_all
from serve.api.operations import surround
from serve.api.routes import build_routes
from serve.errors import APIError
from serve.guides import Guides
from tests.folders import save_guide
from tests.handles import LocalHandle, LocalReplicas
from tests.http_api import Server

USER, ADMIN = "sk-user", "sk-admin"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("models"))
    yield server
    server.close()


class Office:
    """An ingress in front of `Guides`, asked by an admin."""

    def __init__(self, server: Server, folder: Path, **ingress: Any) -> None:
        keys = folder / "keys"
        keys.write_text(f"{USER}\nadmin:{ADMIN}\n")
        replicas: dict[str, Any] = {"": server.model, "far": server.far, **server.revisers}
        self.guides = Guides(
            server.config, server.catalog, {name: _all(one) for name, one in replicas.items()}
        )
        pipeline = server.pipeline(api_keys_file=str(keys), **ingress)
        control = LocalHandle(_Elsewhere(self.guides))
        self.app = surround(
            build_routes(pipeline), pipeline._config, control, pipeline._metrics, replica="r"
        )

    def ask(self, method: str, path: str, *, key: str = ADMIN, **request: Any) -> httpx2.Response:
        async def run() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                headers = {"Authorization": f"Bearer {key}"}
                return await client.request(method, path, headers=headers, **request)

        return asyncio.run(run())


class _Elsewhere:
    """What comes back from another process has been pickled, errors too."""

    def __init__(self, guides: Guides) -> None:
        self._guides = guides

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._guides, name)

        async def call(*args: Any) -> Any:
            try:
                return pickle.loads(pickle.dumps(await method(*args)))
            except Exception as error:
                raise pickle.loads(pickle.dumps(error)) from None

        return call


def _all(replica: object) -> LocalReplicas:
    return LocalReplicas(lambda: [LocalHandle(replica)])


@pytest.fixture
def office(server: Server, tmp_path: Path) -> Office:
    return Office(server, tmp_path)


def test_guides_are_listed_with_versions_and_who_has_them(server: Server, office: Office) -> None:
    listed = office.ask("GET", "/admin/guides").json()
    assert (listed["object"], listed["revision"]) == ("list", 0)
    found = {guide["name"]: guide for guide in listed["data"]}
    assert list(found) == [entry.name for entry in server.catalog.guides]
    (version,) = found["far"]["versions"]
    assert (version["role"], version["replicas"]) == ("current", {"base": 1, "far": 1})
    assert found["aligner"]["versions"][0]["replicas"] == {"aligner": 1}
    assert (
        found["far"].items() >= {"placement": "remote", "enabled": True, "stage": "token"}.items()
    )


def test_a_guide_is_switched_off_and_on(office: Office) -> None:
    off = office.ask("POST", "/admin/guides/helpful", json={"enabled": False})
    assert (off.status_code, off.json()["enabled"]) == (200, False)
    assert asyncio.run(office.guides.catalog()).guides[0].enabled is False
    assert office.ask("POST", "/admin/guides/helpful", json={"enabled": True}).json()["enabled"]


def test_a_canary_is_begun_and_ended(office: Office, tmp_path: Path) -> None:
    path = str(save_guide(tmp_path / "next", seed=77))
    trial = {"path": path, "share": 0.1}
    begun = office.ask("POST", "/admin/guides/helpful", json={"canary": trial, "shadow": trial})
    roles = [(one["role"], one["share"]) for one in begun.json()["versions"]]
    assert roles == [("current", None), ("canary", 0.1), ("shadow", 0.1)]
    ended = office.ask("POST", "/admin/guides/helpful", json={"canary": None})
    assert [one["role"] for one in ended.json()["versions"]] == ["current", "shadow"]


def test_guides_are_looked_at_again(office: Office) -> None:
    every = office.ask("POST", "/admin/guides/reload", json={}).json()["data"]
    assert {said["status"] for said in every} == {"unchanged"}
    (one,) = office.ask("POST", "/admin/guides/reload", json={"name": "far"}).json()["data"]
    assert one["name"] == "far"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("helpful", {}, 400, "enabled"),
        ("helpful", {"enable": True}, 400, "enable"),
        ("helpful", {"enabled": "no"}, 400, "enabled"),
        ("helpful", {"enabled": None}, 400, "enabled"),
        ("helpful", {"canary": {"path": "x"}}, 400, "canary"),
        ("helpful", {"canary": {"path": "x", "share": 0}}, 400, "canary"),
        ("helpful", {"shadow": {"path": "x", "share": 1.5}}, 400, "shadow"),
        ("helpful", {"canary": {"path": "no/such", "share": 1}}, 409, "canary"),
        ("aligner", {"shadow": {"path": "no/such", "share": 1}}, 409, "shadow"),
        ("unheard", {"enabled": False}, 404, "name"),
        ("reload", {"name": "unheard"}, 404, "name"),
        ("reload", {"names": []}, 400, "names"),
        ("reload", [], 400, None),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_where(
    office: Office, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = office.ask("POST", f"/admin/guides/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert asyncio.run(office.guides.catalog()).guides[0].enabled


def test_only_admins_may(office: Office) -> None:
    for method, path in (
        ("GET", "/admin/guides"),
        ("POST", "/admin/guides/reload"),
        ("POST", "/admin/guides/helpful"),
        ("GET", "/metrics"),
    ):
        for key, status in ((USER, 403), ("unknown", 401)):
            answer = office.ask(method, path, key=key, json={"enabled": False})
            assert answer.status_code == status
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert asyncio.run(office.guides.catalog()).guides[0].enabled


def test_admin_routes_are_not_in_the_public_document(office: Office) -> None:
    paths = office.ask("GET", "/openapi.json", key=USER).json()["paths"]
    assert "/v1/models" in paths
    assert not [path for path in paths if "admin" in path or "metrics" in path]


@pytest.mark.parametrize(
    "error",
    [
        APIError(404, "gone", param="name", code="guide_not_found", headers={"Retry-After": "1"}),
        APIError(500, "broken"),
    ],
)
def test_an_answer_with_an_error_survives_the_way_between_processes(error: APIError) -> None:
    same = pickle.loads(pickle.dumps(error))
    assert (same.status, same.body(), same.headers) == (error.status, error.body(), error.headers)
    assert str(same) == error.message


PAGES = [
    """# HELP ray_pilotfish_prompt_tokens_total Tokens of prompts.
# TYPE ray_pilotfish_prompt_tokens_total counter
ray_pilotfish_prompt_tokens_total{replica="a"} 3.0
# HELP ray_node_cpu CPU.
# TYPE ray_node_cpu gauge
ray_node_cpu 1.0
# TYPE ray_pilotfish_ttft histogram
ray_pilotfish_ttft_bucket{le="1"} 1
ray_pilotfish_ttft_count 1
""",
    "",
    """# HELP ray_pilotfish_prompt_tokens_total Tokens of prompts.
# TYPE ray_pilotfish_prompt_tokens_total counter
ray_pilotfish_prompt_tokens_total{replica="b"} 5.0
""",
]


def test_pages_are_merged_to_one_of_our_own_metrics() -> None:
    assert merge(PAGES) == (
        """# HELP ray_pilotfish_prompt_tokens_total Tokens of prompts.
# TYPE ray_pilotfish_prompt_tokens_total counter
ray_pilotfish_prompt_tokens_total{replica="a"} 3.0
ray_pilotfish_prompt_tokens_total{replica="b"} 5.0
# TYPE ray_pilotfish_ttft histogram
ray_pilotfish_ttft_bucket{le="1"} 1
ray_pilotfish_ttft_count 1
"""
    )


def test_a_node_that_does_not_answer_is_left_out() -> None:
    pages = dict(zip("abc", PAGES, strict=True))

    async def fetch(url: str) -> str:
        if url == "b":
            raise aiohttp.ClientConnectionError("gone")
        if url == "c":
            raise TimeoutError
        return pages[url]

    assert asyncio.run(read_all("abc", fetch)) == [PAGES[0], "", ""]


def test_nodes_that_died_are_not_asked() -> None:
    node = {"NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 8080, "Alive": True}
    nodes = [node, {**node, "Alive": False}, {**node, "MetricsExportPort": 0}]
    assert addresses(nodes) == ["http://10.0.0.1:8080/metrics"]


def test_the_page_is_plain_text_and_open_only_if_wanted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", list)
    page = Office(server, tmp_path).ask("GET", "/metrics")
    assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert (page.status_code, page.text) == (200, "")
    opened = Office(server, tmp_path, open_metrics=True)
    assert opened.ask("GET", "/metrics", key="none").status_code == 200
    assert opened.ask("GET", "/admin/guides", key="none").status_code == 401
