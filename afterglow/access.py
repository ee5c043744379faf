"""Who may call: keys and projects, and which hosts and origins a request may name.

On a loopback address where no key was ever made, any non-empty key stands for the one local project. Everywhere else
a key must be known. Keys are stored as hashes; what was looked up is believed for a second, so that a revoked key is
dead within one.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import secrets
from typing import NamedTuple

from starlette.datastructures import Headers

from afterglow.contracts import Clock, Store, Transaction
from afterglow.errors import ConfigError, Forbidden, Unauthorized
from afterglow.ids import new_id
from afterglow.rows import keys as key_rows
from afterglow.rows.keys import KeyRow
from afterglow.settings import Settings

DEFAULT_PROJECT = "default"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})
PORT = re.compile(r":[0-9]*$")
BELIEVED_S = 1.0
CACHED_KEYS = 10_000
NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank username) if you're accessing the "
    "API from your browser and are prompted for a username and password. You can obtain an API key from "
    "https://platform.openai.com/account/api-keys."
)
WRONG_KEY = (
    "Incorrect API key provided: {hint}. You can find your API key at https://platform.openai.com/account/api-keys."
)


class Caller(NamedTuple):
    """project: what the caller may see. key_id: which key it came with."""

    project: str
    key_id: str


ANYONE = Caller(DEFAULT_PROJECT, "key_any")


class Access:
    """Tells callers apart. One for the process."""

    def __init__(self, settings: Settings, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._configured = dict(_configured_key(entry) for entry in settings.api_keys)
        self._loopback = is_loopback(settings.host)
        self._origins = frozenset(settings.allowed_origins)
        self._hosts = frozenset(_host_name(name) for name in settings.allowed_hosts)
        self._served_names = self._hosts | LOOPBACK_NAMES | {_host_name(settings.host)}
        self._known: dict[str, tuple[float, Caller | None]] = {}

    async def caller(self, headers: Headers) -> Caller:
        """Who sent these headers. Raises Unauthorized."""
        key = presented_key(headers)
        if not key:
            raise Unauthorized(NO_KEY)
        key_hash = hash_key(key)
        if configured := self._configured.get(key_hash):
            return configured
        now = self._clock.now()
        known = self._known.get(key_hash)
        if known is None or known[0] <= now:
            known = (now + BELIEVED_S, await self._look_up(key_hash))
            if len(self._known) >= CACHED_KEYS:
                self._known.clear()
            self._known[key_hash] = known
        if known[1] is None:
            raise Unauthorized(WRONG_KEY.format(hint=mask(key)), code="invalid_api_key")
        return known[1]

    async def _look_up(self, key_hash: str) -> Caller | None:
        async def work(tx: Transaction) -> KeyRow | None:
            return await key_rows.get_key_by_hash(tx, key_hash)

        row = await self._store.read(work)
        if row is not None:
            return Caller(row.project_id, row.id)
        if not self._loopback or self._configured:
            return None
        # Keys that were revoked count: taking back the last one must not let everybody in, least of all its holder.
        return None if await self._store.read(key_rows.list_keys) else ANYONE

    def check_host(self, host: str) -> None:
        """Refuse a Host header that is not ours: a web page's name made to point here. Raises Forbidden."""
        name = PORT.sub("", host)
        if not name or "*" in self._hosts or _host_name(name) in self._served_names:
            return
        if self._loopback or self._hosts:
            raise Forbidden(f"The host '{name[:100]}' is not served here. Add it to AFTERGLOW_ALLOWED_HOSTS.")

    def check_origin(self, origin: str | None) -> None:
        """Refuse requests from web pages, unless their origin is allowed. Raises Forbidden."""
        if origin is not None and origin not in self._origins and "*" not in self._origins:
            raise Forbidden(f"Web pages of {origin[:100]} may not call here. Add it to AFTERGLOW_ALLOWED_ORIGINS.")


def _host_name(name: str) -> str:
    """As names are compared: in small letters, without the root's dot and the brackets of IPv6."""
    return name.lower().removesuffix(".").strip("[]")


def presented_key(headers: Headers) -> str:
    """The key of a request: Bearer, Basic with the key as its password, or Azure's `api-key`. "" when there is none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, or none of text
            return ""
    return headers.get("api-key", "").strip()


def mask(key: str) -> str:
    """A key as it may be shown: its first and last characters, if it is long."""
    if len(key) < 12:
        return "*" * len(key)
    return f"{key[:5]}{'*' * min(len(key) - 9, 20)}{key[-4:]}"


def hash_key(key: str) -> str:
    """sha-256 in hex. Keys of ours have 190 random bits, so a slow hash would protect nothing more."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(project: str, name: str, now: int) -> tuple[str, KeyRow, str]:
    """Make a key: the secret to show once, its row, and its hash."""
    secret = "sk-ag-" + secrets.token_urlsafe(24)
    return secret, KeyRow(new_id("key"), project, name, mask(secret), now, None), hash_key(secret)


def _configured_key(entry: str) -> tuple[str, Caller]:
    key, _, project = entry.partition(":")
    return hash_key(key), Caller(project or DEFAULT_PROJECT, f"key_env_{hash_key(key)[:12]}")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine alone."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


async def check_exposure(settings: Settings, store: Store) -> None:
    """Refuse to listen beyond loopback while anybody would be let in. Raises ConfigError with the way out."""
    if is_loopback(settings.host) or settings.api_keys or await store.read(key_rows.has_keys):
        return
    raise ConfigError(
        f"Listening on {settings.host} needs keys, and there are none. Make one with\n"
        f"    afterglow keys create --data {settings.data}\n"
        "or set AFTERGLOW_API_KEYS, or listen on 127.0.0.1."
    )
