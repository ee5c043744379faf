"""One caller's connection: HTTP/1.1 within bounds, whoever is at its other end.

A head has a size and must arrive in time, a body may not fall silent, an answer must be read, and only so many
connections are open at once. What is refused here is told in the API's own form, then the connection is closed. The
sizes of bodies are the edge's business (`api/edge.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from afterglow.api.edge import API_VERSION, GONE, ORGANIZATION, new_request_id
from afterglow.errors import ApiError, HeadTooLarge, InvalidRequest, TooSlow, Unavailable
from afterglow.settings import Settings

MAX_HEADERS = 200
MAX_PIPELINED = 32  # requests that wait for the answers to those before them
LINE_BYTES = 4  # of a header, beside name and value


class Connection(HttpToolsProtocol):
    """What uvicorn makes for each connection. `check` is called about once a second."""

    def __init__(self, config: Config, server_state: ServerState, *rest: Any, settings: Settings, **named: Any) -> None:
        super().__init__(config, server_state, *rest, **named)
        self._settings = settings
        self._max_head_bytes = settings.max_header_kb * 1024
        self._refusal: ApiError | None = None
        self._in_head = True
        self._head_bytes = 0  # of a head that is not complete
        self._head_began = self._heard = 0.0
        self._unread_bytes = 0
        self._unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_began = self._heard = self.loop.time()
        if len(self.connections) > self._settings.max_connections:
            self._refuse(Unavailable("Too many connections are open at once."))

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._heard = self.loop.time()
        if self._in_head:
            if not self._head_bytes and self.cycle is not None:
                self._head_began = self._heard
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._max_head_bytes:
            self._refuse(self._head_too_large())

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum([len(name) + len(value) + LINE_BYTES for name, value in self.headers])
        if size > self._max_head_bytes or len(self.headers) > MAX_HEADERS:
            self._refuse(self._head_too_large())
            raise _Stopped
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(InvalidRequest("Too many requests were sent without waiting for answers."))
            raise _Stopped
        self._in_head = False
        super().on_headers_complete()
        gone: Callable[[], bool] = partial(_gone, self.cycle)
        self.scope[GONE] = gone  # type: ignore[literal-required]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def send_400_response(self, msg: str) -> None:
        if self._refusal is None:
            self._refuse(InvalidRequest(msg))

    def check(self, now: float) -> None:
        """Give up on a caller who is too slow. now: the event loop's time."""
        if self._refusal is not None or self.transport.is_closing():
            return
        if self.flow.write_paused:
            self._check_reader(now)
            return
        self._unread_bytes = 0
        if self.flow.read_paused:
            self._heard = now  # it is we who do not listen
        elif self.cycle is None or self.cycle.response_complete:
            if (self._head_bytes or self.cycle is None) and now - self._head_began > self._settings.head_timeout_s:
                self._refuse(TooSlow("The head of the request did not arrive in time."))
        elif self.cycle.more_body and now - self._heard > self._settings.body_timeout_s:
            self._refuse(TooSlow("The body of the request did not arrive in time."))

    def _check_reader(self, now: float) -> None:
        """Hang up on a caller who takes nothing of what was sent for `body_timeout_s`."""
        unread = self.transport.get_write_buffer_size()
        if unread != self._unread_bytes:
            self._unread_bytes, self._unread_since = unread, now
        elif now - self._unread_since > self._settings.body_timeout_s:
            self.transport.abort()

    def _head_too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"The head of the request is larger than {self._settings.max_header_kb} KB or has more than {MAX_HEADERS} "
            "headers."
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless another answer has begun, and close."""
        self._refusal = error
        open_cycle = self.cycle is not None and not self.cycle.response_complete
        if not (open_cycle and self.cycle.response_started):
            self.transport.write(_answer(error))
        if open_cycle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._unset_keepalive_if_required()
        self.transport.close()


class _Stopped(Exception):
    """Stops the parser, which makes it a 400; but the answer was given."""


def _gone(cycle: RequestResponseCycle) -> bool:
    return cycle.disconnected or (cycle.transport.is_closing() and not cycle.response_complete)


def _answer(error: ApiError) -> bytes:
    body = error.body()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": new_request_id(),
        "openai-processing-ms": "0",
        "openai-version": API_VERSION,
        "openai-organization": ORGANIZATION,
        **error.headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n{head}\r\n".encode() + body


def connections(settings: Settings) -> Any:
    """What uvicorn takes for its protocol."""
    return partial(Connection, settings=settings)
