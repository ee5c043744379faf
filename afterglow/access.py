"""Who may call, and what with which key; and which hosts and origins a request may name.

On a loopback address where no key was ever made, any non-empty key stands for the one local project. Everywhere else
a key must be known. Keys are stored as hashes; what was looked up, of a key and of its project, is believed for a
second: so long a revoked key may live, and so long an old limit may hold.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

from starlette.datastructures import Headers

from afterglow.contracts import Clock, Store, Transaction
from afterglow.errors import ConfigError, Forbidden, StoreError, Unauthorized
from afterglow.ids import new_id
from afterglow.limits import Holder, Limiter
from afterglow.objects import KeyScope, Limits
from afterglow.rows import keys as key_rows
from afterglow.rows.keys import SCOPES, USUAL_SCOPES, KeyRow
from afterglow.rows.projects import ensure_project, get_project
from afterglow.settings import Settings

T = TypeVar("T")
DEFAULT_PROJECT = "default"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})
ADMIN_PATHS = ("/v1/organization", "/openai/v1/organization", "/openai/organization")
PORT = re.compile(r":[0-9]*$")
BELIEVED_S = 1.0
USE_NOTED_EVERY_S = 60
CACHED_KEYS = 10_000
MAX_PROJECT_CHARS = 256  # no project has a longer id; what is looked up is kept for a while
NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank username) if you're accessing the "
    "API from your browser and are prompted for a username and password. You can obtain an API key from "
    "https://platform.openai.com/account/api-keys."
)
WRONG_KEY = (
    "Incorrect API key provided: {hint}. You can find your API key at https://platform.openai.com/account/api-keys."
)
MISSING_SCOPE = (
    "You have insufficient permissions for this operation. Missing scopes: {scope}. Check that you have the correct "
    "role in your organization (Reader, Writer, Owner) and project (Member, Owner), and if you're using a restricted "
    "API key, that it has the necessary scopes."
)
ARCHIVED = "The project you are requesting has been archived and is no longer accessible"
MISMATCHED = "OpenAI-Project header should match project for API key"


class Caller(NamedTuple):
    """project: what the caller may see. key_id: which key it came with. scopes: what that key may do."""

    project: str
    key_id: str
    scopes: frozenset[KeyScope] = USUAL_SCOPES


class _Found(NamedTuple):
    """What is believed of a key. caller: None when nobody has the key; archived: its project is."""

    caller: Caller | None
    archived: bool = False


ANYONE = Caller(DEFAULT_PROJECT, "key_any", frozenset(SCOPES))
NOBODY = _Found(None)


class Believed(Generic[T]):
    """What was looked up, by name, and is believed for a second. However many ask at once, it is looked up once."""

    def __init__(self, look_up: Callable[[str], Awaitable[T]], clock: Clock) -> None:
        self._look_up = look_up
        self._clock = clock
        self._known: dict[str, tuple[float, T]] = {}
        self._asking: dict[str, asyncio.Task[T]] = {}

    async def get(self, name: str) -> T:
        """Raises what looking up raises; that is not believed."""
        known = self._known.get(name)
        if known is not None and known[0] > self._clock.now():
            return known[1]
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.create_task(self._ask(name))
            asking.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits is told
        return await asyncio.shield(asking)

    async def _ask(self, name: str) -> T:
        until = self._clock.now() + BELIEVED_S
        try:
            found = await self._look_up(name)
        finally:
            del self._asking[name]
        self._known.pop(name, None)  # so that those looked up last are last
        if len(self._known) >= CACHED_KEYS:
            self._forget_some()
        self._known[name] = (until, found)
        return found

    def _forget_some(self) -> None:
        """The half that was looked up first: whoever tries many wrong keys must not have the right ones forgotten
        any sooner than they are looked up again."""
        for name in list(self._known)[: CACHED_KEYS // 2]:
            del self._known[name]


class Access:
    """Tells callers apart. One for the process."""

    def __init__(self, settings: Settings, store: Store, clock: Clock, limits: Limiter | None = None) -> None:
        """limits: is told what each caller may use. Raises ConfigError for keys of the settings that say too much."""
        self._store = store
        self._clock = clock
        self._limits = limits or Limiter()
        self._configured = dict(configured_key(entry) for entry in settings.api_keys)
        self._loopback = is_loopback(settings.host)
        self._origins = frozenset(settings.allowed_origins)
        self._keys = Believed(self._look_up_key, clock)
        self._projects = Believed(self._look_up_project, clock)
        self._used: dict[str, int] = {}
        self._hosts = frozenset(_host_name(name) for name in settings.allowed_hosts)
        self._served_names = self._hosts | LOOPBACK_NAMES | {_host_name(settings.host)}

    async def caller(self, headers: Headers) -> Caller:
        """Who sent these headers. Raises Unauthorized."""
        key = presented_key(headers)
        if not key:
            raise Unauthorized(NO_KEY)
        caller, archived = await self._keys.get(hash_key(key))
        if caller is None:
            raise Unauthorized(WRONG_KEY.format(hint=mask(key)), code="invalid_api_key")
        if archived:
            raise Unauthorized(ARCHIVED, code="not_authorized_invalid_project")
        asked = headers.get("openai-project")
        if asked and asked != caller.project and caller is not ANYONE and len(asked) <= MAX_PROJECT_CHARS:
            return await self._acting(caller, asked)
        return caller

    async def _acting(self, caller: Caller, project: str) -> Caller:
        """Apps that have moved here go on naming their old project, which is not here and so means nothing."""
        limits = await self._projects.get(project)
        if limits is None:
            return caller
        if "admin" not in caller.scopes:
            raise Unauthorized(MISMATCHED, code="mismatched_project")
        own = next((held for held in self._limits.holders(caller.project, caller.key_id) if held.key_id), None)
        holders = [Holder(project, "", limits)]
        if own is not None:
            holders.append(own._replace(project=project))
        self._limits.believe(project, caller.key_id, *holders)
        return caller._replace(project=project)

    async def _look_up_key(self, key_hash: str) -> _Found:
        async def work(tx: Transaction) -> tuple[_Found, KeyRow | None, Limits]:
            row = await key_rows.get_key_by_hash(tx, key_hash)
            caller = self._configured.get(key_hash) or await self._caller_of(tx, row)
            if caller is None:
                return NOBODY, None, key_rows.NO_LIMITS
            project = await get_project(tx, caller.project)
            archived = project is not None and project.archived_at is not None
            return _Found(caller, archived), row, project.settings.limits if project else key_rows.NO_LIMITS

        try:
            found, row, limits = await self._store.read(work)
        except StoreError:
            if key_hash in self._configured:  # which needs no database; its limits stay what they were
                return _Found(self._configured[key_hash])
            raise
        if found.caller is not None:
            project, key_id, _ = found.caller
            own = [Holder(project, key_id, row.limits)] if row and row.id == key_id else []
            self._limits.believe(project, key_id, Holder(project, "", limits), *own)
            if own and row:
                self._note_use(row)
        return found

    async def _caller_of(self, tx: Transaction, row: KeyRow | None) -> Caller | None:
        if row is not None:
            living = row.expires_at is None or row.expires_at > self._clock.now()
            return Caller(row.project_id, row.id, row.scopes) if living else None
        if not self._loopback or self._configured:
            return None
        # Keys that were revoked count: taking back the last one must not let everybody in, least of all its holder.
        return None if await key_rows.has_keys(tx) else ANYONE

    async def _look_up_project(self, project: str) -> Limits | None:
        async def work(tx: Transaction) -> Limits | None:
            row = await get_project(tx, project)
            return row.settings.limits if row else None

        return await self._store.read(work)

    def _note_use(self, row: KeyRow) -> None:
        now = int(self._clock.now())
        if row.last_used_at is None or now >= row.last_used_at + USE_NOTED_EVERY_S:
            self._used[row.id] = now

    async def write_uses(self) -> None:
        """Write when keys were last used, which is found out when they are looked up. Raises StoreError."""
        if not self._used:
            return
        used, self._used = self._used, {}
        await self._store.write(lambda tx: key_rows.note_uses(tx, used), rowwise=True)

    async def ensure_projects(self) -> None:
        """Have rows for the projects that are there without anybody having made them."""
        named = {DEFAULT_PROJECT, *(caller.project for caller in self._configured.values())}
        now = int(self._clock.now())

        async def work(tx: Transaction) -> None:
            for project in sorted(named):
                await ensure_project(tx, project, now)

        await self._store.write(work)

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


def check_scope(caller: Caller, method: str, path: str) -> None:
    """Refuse what the caller's key may not do. path: without the root path. Raises Forbidden."""
    usual: KeyScope = "read" if method in ("GET", "HEAD") else "write"
    needed: KeyScope = "admin" if path.startswith(ADMIN_PATHS) else usual
    if needed not in caller.scopes:
        raise Forbidden(MISSING_SCOPE.format(scope=needed), code="missing_scope")


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


def new_key(
    project: str,
    name: str,
    now: int,
    scopes: frozenset[KeyScope] = USUAL_SCOPES,
    expires_at: int | None = None,
    limits: Limits = key_rows.NO_LIMITS,
) -> tuple[str, KeyRow, str]:
    """Make a key: the secret to show once, its row, and its hash."""
    secret = "sk-ag-" + secrets.token_urlsafe(24)
    row = KeyRow(new_id("key"), project, name, mask(secret), now, None, scopes, expires_at, None, limits)
    return secret, row, hash_key(secret)


def configured_key(entry: str) -> tuple[str, Caller]:
    """A key of the settings: `key`, `key:project` or `key:project:scope+scope`. Raises ConfigError."""
    key, _, rest = entry.partition(":")
    project, _, scopes = rest.partition(":")
    held = read_scopes(scopes, "+") if scopes else USUAL_SCOPES
    return hash_key(key), Caller(project or DEFAULT_PROJECT, f"key_env_{hash_key(key)[:12]}", held)


def read_scopes(text: str, sign: str) -> frozenset[KeyScope]:
    """Scopes with `sign` between them. Raises ConfigError."""
    names = [name.strip() for name in text.split(sign)]
    for name in names:
        if name not in SCOPES:
            raise ConfigError(f"There is no scope {name[:40]!r}. A key may have {', '.join(SCOPES)}.")
    return frozenset(scope for scope in SCOPES if scope in names)


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
