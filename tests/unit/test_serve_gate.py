"""The gate: API keys and their roles, exposure, sizes of bodies, slow clients."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request
from starlette.types import Message

from pilotfish.errors import ConfigError
from serve.api.access_log import logger as access_logger
from serve.api.gate import Gate
from serve.api.keys import Doorman, Keys, Role, check_exposure, load_keys
from serve.api.visit import Visit, current_visit
from serve.ingress_config import IngressConfig, LimitsConfig

USER, ADMIN = "sk-user-1234567890", "sk-admin-1234567890"
FILE = f"""
# keys of the team
{USER}      # the evaluation job
admin:{ADMIN}
user:sk-third
"""


class House:
    """Routes behind a gate that say who came and how much they brought."""

    def __init__(
        self, keys: Keys | None, *, allow: bool = False, sees_peers: bool = True, **limits: Any
    ) -> None:
        self.visits: list[Visit] = []
        http = FastAPI()

        @http.get("/health")
        @http.get("/v1/models")
        async def show() -> Any:
            client = current_visit().client
            return None if client is None else {"id": client.id, "role": client.role}

        @http.post("/v1/echo")
        async def echo(request: Request) -> int:
            return len(await request.body())

        self.app = Gate(
            http,
            doorman=Doorman(keys, allow_unauthenticated=allow, sees_peers=sees_peers),
            limits=LimitsConfig(**limits),
            over=self.visits.append,
        )

    def get(self, path: str, *, peer: str = "127.0.0.1", **headers: str) -> httpx2.Response:
        return self.call("GET", path, peer=peer, headers=headers)

    def call(
        self, method: str, path: str, *, peer: str = "127.0.0.1", **request: Any
    ) -> httpx2.Response:
        async def run() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app, client=(peer, 4711))
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **request)

        return asyncio.run(run())

    def post(self, messages: list[Any], **headers: str) -> list[Message]:
        """Return what is sent when a body comes like this; a number is a pause of seconds."""
        sent: list[Message] = []

        async def receive() -> Message:
            while messages:
                message = messages.pop(0)
                if isinstance(message, float):
                    await asyncio.sleep(message)
                else:
                    return message
            await asyncio.sleep(30)
            raise AssertionError("nothing more comes")

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/echo",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 4711),
        }
        asyncio.run(self.app(scope, receive, send))
        return sent


@pytest.fixture
def house() -> House:
    return House(Keys(FILE.splitlines(), source="keys"), body_bytes=100, body_timeout_s=0.2)


def test_the_key_says_who_comes_and_its_beginning_does_not(house: House) -> None:
    answers = [house.get("/v1/models", Authorization=f"Bearer {key}") for key in (USER, ADMIN)]
    (user, admin) = [answer.json() for answer in answers]
    assert (user["role"], admin["role"]) == (Role.USER, Role.ADMIN)
    assert user["id"] != admin["id"]
    assert len(user["id"]) == 8
    assert user["id"] not in USER


@pytest.mark.parametrize(
    "authorization",
    [
        *("", "Bearer", "Bearer ", "Bearer \x00", USER, f"Basic {USER}"),
        *(f"Bearer {USER}x", f"Bearer {USER[:-1]}", f"Bearer admin:{ADMIN}"),
    ],
)
def test_without_a_key_that_is_known_the_answer_is_401(house: House, authorization: str) -> None:
    answer = house.get("/v1/models", Authorization=authorization)
    assert answer.status_code == 401
    assert (
        answer.json()["error"].items()
        >= {
            "type": "invalid_request_error",
            "code": "invalid_api_key",
        }.items()
    )
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert USER not in answer.text


def test_the_scheme_may_be_written_any_way(house: House) -> None:
    assert house.get("/v1/models", Authorization=f"bEARER  {USER}").status_code == 200


def test_health_needs_no_key(house: House) -> None:
    assert house.get("/health").status_code == 200
    assert house.get("/health/../v1/models").status_code == 401


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(FILE.splitlines(), source="keys")
    compared: list[bytes] = []
    monkeypatch.setattr(
        "hmac.compare_digest", lambda a, b: compared.append(a) or a == b, raising=True
    )
    for key in (USER, ADMIN, "wrong"):
        compared.clear()
        keys.client(key.encode())
        assert len(compared) == 3


@pytest.mark.parametrize(
    ("lines", "number"),
    [("good\nboss:secret", 2), ("one two", 1), ("admin:", 1), ("user:a:b", 1)],
)
def test_an_odd_line_is_named_by_its_number_and_not_shown(lines: str, number: int) -> None:
    with pytest.raises(ConfigError, match=f"line {number} of keys is no API key") as caught:
        Keys(lines.splitlines(), source="keys")
    assert not any(word in str(caught.value) for word in ("secret", "one two", "a:b"))


def test_keys_come_from_a_file_or_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    path.write_text(FILE)
    monkeypatch.setenv("OUR_KEYS", f"{USER},admin:{ADMIN}")
    sources: list[dict[str, Any]] = [{"api_keys_file": str(path)}, {"api_keys_env": "OUR_KEYS"}]
    for settings in sources:
        keys = load_keys(IngressConfig(**settings))
        assert keys is not None
        client = keys.client(ADMIN.encode())
        assert client is not None
        assert client.role is Role.ADMIN
        assert ADMIN not in f"{keys!r} {vars(keys)}"
    assert load_keys(IngressConfig()) is None


def test_keys_that_cannot_be_read_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUR_KEYS", raising=False)
    (tmp_path / "empty").write_text("# none yet\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no environment variable"):
        load_keys(IngressConfig(api_keys_env="OUR_KEYS"))
    for name, message in (
        ("missing", "No such file"),
        ("empty", "no API key"),
        ("binary", "not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_keys(IngressConfig(api_keys_file=str(tmp_path / name)))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost", None])
def test_a_server_without_keys_may_listen_on_its_own_machine(host: str | None) -> None:
    check_exposure(IngressConfig(), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "serve.example.com", ""])
def test_a_server_without_keys_does_not_start_where_others_reach_it(host: str) -> None:
    with pytest.raises(ConfigError, match=r"has no API keys\. Set ingress\.api_keys_file"):
        check_exposure(IngressConfig(), host)
    check_exposure(IngressConfig(allow_unauthenticated=True), host)
    check_exposure(IngressConfig(api_keys_env="OUR_KEYS"), host)


@pytest.mark.parametrize(
    ("peer", "closed", "opened"),
    [
        ("127.0.0.1", Role.ADMIN, Role.ADMIN),
        ("::1", Role.ADMIN, Role.ADMIN),
        ("::ffff:127.0.0.1", Role.ADMIN, Role.ADMIN),
        ("10.1.2.3", None, Role.USER),
        ("::ffff:10.1.2.3", None, Role.USER),
        ("", None, Role.USER),
    ],
)
def test_without_keys_this_machine_may_do_everything_and_others_what_is_allowed(
    peer: str, closed: Role | None, opened: Role
) -> None:
    for allow, role in ((False, closed), (True, opened)):
        answer = House(None, allow=allow).get("/v1/models", peer=peer)
        if role is None:
            assert answer.status_code == 401
        else:
            assert answer.json() == {"id": "", "role": role}
    assert House(None).get("/health", peer=peer).status_code == 200


def test_behind_a_proxy_that_others_reach_nobody_passes_for_this_machine() -> None:
    answer = House(None, allow=True, sees_peers=False).get("/v1/models")
    assert answer.json() == {"id": "", "role": Role.USER}
    assert House(None, sees_peers=False).get("/v1/models").status_code == 401


def body(text: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": text, "more_body": more}


AUTHORIZED = {"authorization": f"Bearer {USER}"}


def said(sent: list[Message]) -> tuple[int, Any]:
    start, *rest = sent
    return start["status"], json.loads(b"".join(message.get("body", b"") for message in rest))


def test_a_body_arrives_whole_however_it_was_cut(house: House) -> None:
    pieces: list[Any] = [body(b"x" * 40, more=True), 0.01, body(b"", more=True)]
    assert said(house.post([*pieces, body(b"y" * 60)], **AUTHORIZED)) == (200, 100)


def test_a_body_that_is_too_large_is_refused_at_the_byte_that_is_too_many(house: House) -> None:
    pieces: list[Any] = [body(b"x" * 60, more=True) for _ in range(1000)]
    status, answer = said(house.post(pieces, **AUTHORIZED))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert len(pieces) == 998  # what was not read is not kept either
    announced = {"content-length": "101", **AUTHORIZED}
    assert said(house.post([], **announced))[0] == 413


def test_a_body_that_does_not_come_is_408(house: House) -> None:
    status, answer = said(house.post([body(b"x", more=True)], **AUTHORIZED))
    assert (status, answer["error"]["type"]) == (408, "invalid_request_error")


def test_a_client_that_leaves_before_the_end_of_its_body_costs_nothing(house: House) -> None:
    gone: Message = {"type": "http.disconnect"}
    assert house.post([body(b"x", more=True), gone], **AUTHORIZED) == []
    assert house.visits[-1].status == 499


def test_nobody_reads_a_body_for_whom_has_no_key(house: House) -> None:
    pieces: list[Any] = [body(b"x", more=True)]
    assert said(house.post(pieces))[0] == 401
    assert len(pieces) == 1


def test_keys_are_in_no_visit_and_no_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, access_logger.name):
        for key in (USER, USER + "x"):
            house.get("/v1/models", Authorization=f"Bearer {key}")
    assert len(house.visits) == 2
    assert USER not in f"{house.visits!r} {caplog.text}"
