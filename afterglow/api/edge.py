"""The HTTP edge: every request comes in through here, and every error goes out.

In order: request id, root path, host and origin, route, key, its scope, limits, beta header, size of the body. What a
route raises becomes the API's error body here and nowhere else.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afterglow import telemetry
from afterglow.access import ADMIN_PATHS, Access, check_scope
from afterglow.api.attempts import Attempts
from afterglow.contracts import House
from afterglow.errors import (
    ApiError,
    BlobMissing,
    BodyTooLarge,
    InvalidRequest,
    ModelError,
    NotFound,
    StoreError,
    StoreFull,
    Unavailable,
)
from afterglow.metrics import Metrics
from afterglow.proxies import Proxies

log = logging.getLogger("afterglow.http")
API_VERSION = "2020-10-01"
ORGANIZATION = "afterglow"
API_PREFIXES = ("/v1/", "/openai/")
OPEN_PATHS = ("/healthz", "/readyz", "/openapi.json")
METRICS_PATH = "/metrics"
GONE = "afterglow.gone"  # in the scope: tells whether the caller has hung up
KEYLESS = "afterglow.keyless"  # in the scope of a request to the port of `metrics_port`
UPLOAD_PATHS = ("/v1/files", "/openai/v1/files", "/openai/files")
PART_PATH = re.compile(r"/(v1|openai/v1|openai)/uploads/[^/]+/parts")
MAX_PART_MB = 64
PIECE_BYTES = 128 * 1024  # of an answer that are given to the connection together
FORM_BYTES = 64 * 1024  # of an upload, besides the file
SORRY = "The server had an error while processing your request. Sorry about that!"
BETA_V1 = (
    "You must provide the 'OpenAI-Beta' header to access the Assistants API. Please try again by setting the header "
    "'OpenAI-Beta: assistants=v2'."
)


class Edge:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, house: House, access: Access, attempts: Attempts, root_path: str) -> None:
        self._app = app
        self._house = house
        self._access = access
        self._attempts = attempts
        self._proxies = Proxies(house.settings.trusted_proxies)
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        exchange = _Exchange(send, scope, self._house.metrics)
        telemetry.subject.set(exchange.request_id)
        try:
            await self._serve(scope, receive, exchange)
        except ClientDisconnect:
            log.debug("The client went away.")
        except Exception as error:
            answer = self._error(error, scope)
            if exchange.started:
                log.exception("An answer broke off.")
                raise
            await _respond(answer, scope, receive, exchange.send)

    async def _serve(self, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        headers = Headers(scope=scope)
        path = scope["path"] = self._own_path(scope["path"])
        needs_key = path not in OPEN_PATHS and KEYLESS not in scope
        if needs_key:  # probes come by address
            self._access.check_host(_only_host(scope, headers))
        self._access.check_origin(headers.get("origin"))
        if "\0" in path:
            raise InvalidRequest("Invalid URL: it contains a NUL character.", code="invalid_value")
        state: dict[str, Any] = {"house": self._house, "request_id": exchange.request_id}
        state |= {"attempts": self._attempts, "attempt": None}
        state["client_ip"] = self._proxies.caller_address(scope, headers)
        scope["state"] = state
        if self._house.traces is not None:
            telemetry.traceparent.set(headers.get("traceparent", ""))
        if needs_key:
            if not path.startswith(API_PREFIXES) and path != METRICS_PATH:
                raise self._no_such_path(scope["method"], path)
            caller = await self._access.caller(headers)
            check_scope(caller, scope["method"], path)
            if path.startswith(API_PREFIXES) and not path.startswith(ADMIN_PATHS):
                now = self._house.clock.now()
                exchange.told = self._house.limits.admit(caller.project, caller.key_id, scope["method"], path, now)
            _check_beta(headers)
            state["project"], state["key_id"] = caller.project, caller.key_id
        try:
            await self._app(scope, self._limited(receive, headers, path), exchange.send)
        finally:
            if attempt := state["attempt"]:
                attempt.end(_gone(scope))

    def _own_path(self, path: str) -> str:
        """Without the root path, whether the proxy has taken it off or not."""
        if self._root_path and (path + "/").startswith(self._root_path + "/"):
            return path[len(self._root_path) :] or "/"
        return path

    def _no_such_path(self, method: str, path: str) -> NotFound:
        log.info("%s %s is not served here; should the base URL end in /v1?", method, path[:200])
        return NotFound(f"Invalid URL ({method} {path})")

    def _limited(self, receive: Receive, headers: Headers, path: str) -> Receive:
        """Refuse bodies that are larger than allowed, before they are read whole."""
        settings = self._house.settings
        if path in UPLOAD_PATHS or PART_PATH.fullmatch(path):
            max_mb = settings.max_file_mb if path in UPLOAD_PATHS else MAX_PART_MB
            too_large = BodyTooLarge(f"The file is larger than {max_mb} MB.")
            max_bytes = max_mb * 1024 * 1024 + FORM_BYTES
        else:
            too_large = BodyTooLarge(f"The request body is larger than {settings.max_body_mb} MB.")
            max_bytes = settings.max_body_mb * 1024 * 1024
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > max_bytes:
            raise too_large
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > max_bytes:
                raise too_large
            return message

        return limited

    def _error(self, error: Exception, scope: Scope) -> ApiError:
        """What the caller is told; what is our fault is told to the log alone."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, HTTPException):  # the router's, for a path that is served under other methods
            return NotFound(f"Invalid URL ({scope['method']} {scope['path']})")
        if isinstance(error, StoreFull):
            return Unavailable("The server's disk is full; nothing of this request was stored.", retry_after_s=30)
        if isinstance(error, BlobMissing):
            log.error("A file cannot be read: %s", error)
            return Unavailable("The contents of this file are missing on the server.")
        if isinstance(error, StoreError):
            return Unavailable("The server's database cannot be used just now; nothing of this request was stored.")
        if isinstance(error, ModelError):
            return Unavailable(str(error))
        log.error("A request failed by a fault of ours.", exc_info=error)
        return ApiError(SORRY)


class _Exchange:
    """One request's answer: its id, when it began, and what was sent of it."""

    __slots__ = ("_began", "_metrics", "_scope", "_send", "request_id", "started", "status", "told")

    def __init__(self, send: Send, scope: Scope, metrics: Metrics) -> None:
        self._send = send
        self._scope = scope
        self._metrics = metrics
        self._began = time.monotonic()
        self.request_id = new_request_id()
        self.started = False
        self.status = 0
        self.told: dict[str, str] = {}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            took_s = time.monotonic() - self._began
            took_ms = round(took_s * 1000)
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self.request_id.encode()),
                (b"openai-processing-ms", b"%d" % took_ms),
                (b"openai-version", API_VERSION.encode()),
                (b"openai-organization", ORGANIZATION.encode()),
                *((name.encode(), value.encode()) for name, value in self.told.items()),
            ]
            log.debug("%d in %d ms", self.status, took_ms)
            route = getattr(self._scope.get("route"), "path", None)
            self._metrics.request_answered(self._scope["method"], route, self.status, took_s)
            if attempt := self._scope.get("state", {}).get("attempt"):
                attempt.begin_answer(self.status, _gone(self._scope))
        elif len(body := message.get("body", b"")) > PIECE_BYTES:  # or a connection would hold all of it at once
            last = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES
            for start in range(0, last, PIECE_BYTES):
                await self._send({**message, "body": body[start : start + PIECE_BYTES], "more_body": True})
            message["body"] = body[last:]
        await self._send(message)


def _only_host(scope: Scope, headers: Headers) -> str:
    """With two of them, a proxy may have looked at the other one."""
    hosts = headers.getlist("host")
    if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1"):
        raise InvalidRequest(f"A request names one host, and this one has {len(hosts)} Host headers.")
    return hosts[0] if hosts else ""


def new_request_id() -> str:
    return "req_" + secrets.token_hex(16)


def _gone(scope: Scope) -> bool:
    """Whether the caller hung up, as far as the connection knows; what is sent then is sent to nobody."""
    return GONE in scope and scope[GONE]()


def _check_beta(headers: Headers) -> None:
    """The header may be missing; but who asks for v1 is told that this is v2."""
    beta = headers.get("openai-beta")
    if beta and "assistants=v1" in beta.lower():
        raise InvalidRequest(BETA_V1, code="invalid_beta")


async def _respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = Response(error.body(), error.status, media_type="application/json")
    MutableHeaders(raw=response.raw_headers).update(error.headers)
    await response(scope, receive, send)
