"""API keys: who a request comes from, and whether the server may be open without them."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pilotfish.errors import ConfigError
from serve.errors import APIError
from serve.ingress_config import IngressConfig


class Role(StrEnum):
    USER = "user"
    ADMIN = "admin"
    """May change guides, and read the metrics."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: the beginning of a hash of the key, empty where there are no keys."""

    id: str
    role: Role


class Keys:
    """API keys, of which only hashes are kept."""

    def __init__(self, lines: Iterable[str], *, source: str) -> None:
        """Read keys, one per line: `key`, or a role, a colon and the key; `#` begins a comment.

        Raises `ConfigError`, which tells lines by their number, if there is none, or an odd one.
        """
        self._roles: dict[bytes, Role] = {}
        for number, line in enumerate(lines, start=1):
            if not (entry := line.partition("#")[0].strip()):
                continue
            role, colon, key = entry.rpartition(":")
            if not key or (colon and role not in tuple(Role)) or len(key.split()) != 1:
                raise ConfigError(
                    f"line {number} of {source} is no API key: wanted a key without spaces, "
                    "colons and '#', or user:key, or admin:key."
                )
            self._roles[_hash(key.encode())] = Role(role or Role.USER)
        if not self._roles:
            raise ConfigError(f"{source} holds no API key. Write one per line.")

    def client(self, key: bytes) -> Client | None:
        """Return whose key this is, in a time that does not depend on it."""
        digest = _hash(key)
        found = None
        for known, role in self._roles.items():
            if hmac.compare_digest(known, digest):  # and on to the last one
                found = Client(digest.hex()[:8], role)
        return found


class Doorman:
    """Says who a request comes from, or turns it away."""

    def __init__(
        self, keys: Keys | None, *, allow_unauthenticated: bool, sees_peers: bool = True
    ) -> None:
        """`sees_peers` says whether a connection's other end is the client, and no proxy's."""
        self._keys, self._open, self._sees_peers = keys, allow_unauthenticated, sees_peers

    def client(self, authorization: bytes, peer: str | None) -> Client:
        """Return who asks, by the `Authorization` header and the address at the other end.

        Raises `APIError` 401. Without keys this machine may do everything, and others nothing,
        or what users may.
        """
        if self._keys is None:
            if self._sees_peers and is_loopback(peer):
                return Client("", Role.ADMIN)
            if self._open:
                return Client("", Role.USER)
            message = "This server has no API keys, and so answers its own machine alone."
            raise _unauthorized(message)
        scheme, _, key = authorization.partition(b" ")
        client = self._keys.client(key.strip()) if scheme.lower() == b"bearer" else None
        if client is None:
            raise _unauthorized(
                "Missing or incorrect API key. Send it in the header: Authorization: Bearer KEY."
            )
        return client


def load_keys(config: IngressConfig) -> Keys | None:
    """Return the keys that a config points to, None without. Raises `ConfigError`."""
    if (name := config.api_keys_env) is not None:
        if name not in os.environ:
            raise ConfigError(
                f"ingress.api_keys_env is {name!r}, which is no environment variable of this "
                "process. Set it on the nodes, before `ray start`."
            )
        lines = os.environ[name].replace(",", "\n").splitlines()
        return Keys(lines, source=f"environment variable {name}")
    if (path := config.api_keys_file) is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"cannot read ingress.api_keys_file {path!r}: {reason}.") from None
    return Keys(lines, source=path)


def check_exposure(config: IngressConfig, host: str | None) -> None:
    """Raise `ConfigError` if others could reach a server without keys; `host` is where it listens.

    None is a server without HTTP.
    """
    if config.has_keys or config.allow_unauthenticated or host is None or is_loopback(host):
        return
    raise ConfigError(
        f"the server listens on {host}, where others reach it, and has no API keys. Set "
        "ingress.api_keys_file or ingress.api_keys_env; or http_options.host to 127.0.0.1; or, "
        "where something in front of it decides who may ask, ingress.allow_unauthenticated."
    )


def is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(message: str) -> APIError:
    headers = {"WWW-Authenticate": "Bearer"}
    return APIError(401, message, code="invalid_api_key", headers=headers)
