"""What the ingress sends for the playground, and how browsers are told to treat it."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve.playground import page

FOLDER = Path(page.__file__).parent


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page.playground_routes())
    return TestClient(app)


def test_each_file_comes_with_its_type_and_a_policy_that_allows_this_server_alone(
    client: TestClient,
) -> None:
    types = {"main.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
    for path, wanted in {"": "text/html", **types}.items():
        response = client.get(f"/playground/{path}".rstrip("/"))
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(wanted)
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"].split("; ")
        sources = {source for rule in policy for source in rule.split()[1:]}
        assert sources == {"'none'", "'self'"}
        assert "default-src 'none'" in policy


def test_a_browser_that_has_a_file_is_not_sent_it_again(client: TestClient) -> None:
    first = client.get("/playground/main.js")
    headers = {"If-None-Match": first.headers["etag"]}
    second = client.get("/playground/main.js", headers=headers)
    assert (second.status_code, second.content) == (304, b"")
    other = client.get("/playground/main.js", headers={"If-None-Match": '"older"'})
    assert other.content == first.content


def test_nothing_but_the_page_is_sent(client: TestClient) -> None:
    for name in ("page.py", "__init__.py", "screenshot.png", "..%2Froutes.py", "nothing.js"):
        assert client.get(f"/playground/{name}").status_code == 404


def test_every_address_in_the_page_is_relative_and_exists(client: TestClient) -> None:
    html = client.get("/playground").text
    named = re.findall(r'(?:src|href)="([^"]+)"', html)
    for path in FOLDER.glob("*.js"):
        named += [f"playground/{name}" for name in re.findall(r'from "\./(.+?)"', path.read_text())]
    assert len(named) > 10
    for name in named:
        assert client.get(f"/{name}").status_code == 200, name


def test_files_stay_small() -> None:
    for path in FOLDER.glob("*.*s*"):
        if path.suffix in (".js", ".css", ".html"):
            assert len(path.read_text().splitlines()) <= 350, path.name
