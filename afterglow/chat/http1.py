"""HTTP/1.1 to model servers: an httpx2 transport in which one read of the socket is one piece of the answer.

httpx2's own transport walks its whole pool at the start and the end of every request, and h11 takes a streamed
answer apart chunk by chunk in Python. With 1,000 streams open that measured 10 ms of CPU per call. Here each
connection is an asyncio protocol in front of httptools, and idle connections wait in a list per origin.
Not here: proxies, HTTP/2, redirects, cookies, decompression.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from typing import NamedTuple, cast

import httptools
import httpx2

PAUSE_AT_BYTES = 256 * 1024
HEADER_BYTES = 128 * 1024


class Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class Connection(asyncio.Protocol):
    """One connection, carrying one request at a time. Errors are kept and raised to whoever reads next."""

    def __init__(self, origin: Origin) -> None:
        self._loop = asyncio.get_running_loop()
        self.origin = origin
        self.idle_since = 0.0
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._reader: asyncio.Future[None] | None = None
        self._forget()

    def _forget(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.answered = False
        self.complete = False
        self._sent = False
        self._head_only = False
        self._framed = False
        self._keep = False
        self._header_bytes = 0
        self._parts: list[bytes] = []
        self._held_bytes = 0
        self._error: httpx2.TransportError | None = None

    # What callers do

    def start(self, request: httpx2.Request) -> None:
        """Write the request's head, and its body when that is at hand."""
        self._forget()
        self._parser = httptools.HttpResponseParser(self)
        self._head_only = request.method == "HEAD"
        self._sent = isinstance(request.stream, httpx2.ByteStream)
        head = _head(request)
        self._write(head + request.content if self._sent else head)

    async def upload(self, request: httpx2.Request) -> None:
        """Write a body that comes in pieces, as fast as the server takes them; stop when it answers early."""
        if self._sent:
            return
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        chunked = "transfer-encoding" in request.headers
        async for part in request.stream:
            if self.answered or self._error:
                return
            if part:
                self._write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                await self._writable.wait()
        if chunked:
            self._write(b"0\r\n\r\n")
        self._sent = True

    async def head(self) -> None:
        """Return when the status and the headers are there."""
        while not self.answered:
            if self._error:
                raise self._error
            await self._arrival()

    async def read(self) -> bytes:
        """What arrived since the last call, b"" at the end of the message."""
        while not self._parts:
            if self.complete:
                return b""
            if self._error:
                raise self._error
            await self._arrival()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        if self._held_bytes > PAUSE_AT_BYTES and self._transport and not self.closed:
            self._transport.resume_reading()
        self._held_bytes = 0
        return data

    def reusable(self) -> bool:
        return self._sent and self.complete and self._keep and not self.closed and not self._parts

    def rest(self, now: float) -> None:
        """Keep the connection for a later request."""
        self._parser = None
        self.idle_since = now

    def abort(self) -> None:
        self.closed = True
        if self._transport:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport and not self.closed:
            self._transport.write(data)

    async def _arrival(self) -> None:
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    def _fail(self, error: httpx2.TransportError) -> None:
        self._error = self._error or error
        self._wake()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        if self._parser is None:  # nothing was asked, so nothing that comes can be trusted
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort()
            self._fail(httpx2.RemoteProtocolError(f"not understood as HTTP: {error}"))
        if self._held_bytes > PAUSE_AT_BYTES and self._transport and not self.closed:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._transport = None
        self._writable.set()
        if self.answered and not self._framed and exc is None:
            self.complete = True
        if not self.complete:
            where = "in the middle of its answer" if self.answered else "without an answer"
            self._fail(httpx2.ReadError(f"the server closed the connection {where}"))
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > HEADER_BYTES:
            raise ValueError("headers too large")
        if not self.answered:  # what comes after the body is trailers
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        if self.status < 200:
            return
        self.answered = True
        names = {name.lower() for name, _ in self.headers}
        self._framed = bool(names & {b"content-length", b"transfer-encoding"})
        if self._head_only:  # the parser cannot know that no body follows, so the connection is not used again
            self.complete = True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._held_bytes += len(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if not self.answered:  # an informational response; the real one follows
            self.headers = []
            return
        self._keep = not self._head_only and self._parser.should_keep_alive()
        self.complete = True


class Http1Transport(httpx2.AsyncBaseTransport):
    """Keep-alive connections without a limit on their number.

    Of a request's timeouts only `connect` (TLS included) is honoured; waiting for an answer is the caller's to bound.
    idle_s: how long an unused connection is kept.
    """

    def __init__(self, idle_s: float = 30.0) -> None:
        self._idle_s = idle_s
        self._idle: dict[Origin, list[Connection]] = {}
        self._open: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._ssl: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        origin = Origin(url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80))
        used = self._take_idle(origin)
        if used:
            try:
                return await self._exchange(used, request)
            except httpx2.ReadError:
                # The server closed an idle connection while we were writing to it. It has not read the request.
                if used.answered or not isinstance(request.stream, httpx2.ByteStream):
                    raise
        connection = await self._connect(origin, request.extensions.get("timeout", {}).get("connect"))
        return await self._exchange(connection, request)

    async def aclose(self) -> None:
        if self._sweeper:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()
        self._open.clear()

    async def _exchange(self, connection: Connection, request: httpx2.Request) -> httpx2.Response:
        try:
            connection.start(request)
            await connection.upload(request)
            await connection.head()
        except BaseException:
            self.give_back(connection)
            raise
        return httpx2.Response(connection.status, headers=connection.headers, stream=_Body(self, connection))

    def _take_idle(self, origin: Origin) -> Connection | None:
        waiting = self._idle.get(origin, [])
        while waiting:
            connection = waiting.pop()
            if not connection.closed:
                return connection
            self._open.discard(connection)
        return None

    async def _connect(self, origin: Origin, timeout_s: float | None) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(origin), origin.host, origin.port, ssl=self._tls(origin)
                )
        except TimeoutError:
            raise httpx2.ConnectTimeout(f"no connection within {timeout_s:g} s" if timeout_s else "timed out") from None
        except OSError as error:
            raise httpx2.ConnectError(error.strerror or str(error)) from error
        self._open.add(connection)
        return connection

    def _tls(self, origin: Origin) -> ssl.SSLContext | None:
        if origin.scheme != "https":
            return None
        if self._ssl is None:
            self._ssl = httpx2.create_ssl_context()
        return self._ssl

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end; close any other, which aborts the call."""
        if not connection.reusable():
            connection.abort()
            self._open.discard(connection)
            return
        loop = asyncio.get_running_loop()
        connection.rest(loop.time())
        self._idle.setdefault(connection.origin, []).append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._idle_s, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._idle_s
        for connection in [c for waiting in self._idle.values() for c in waiting]:
            if connection.closed or connection.idle_since <= oldest:
                self._idle[connection.origin].remove(connection)
                connection.abort()
                self._open.discard(connection)
        waits = any(self._idle.values())
        self._sweeper = loop.call_later(self._idle_s, self._sweep) if waits else None


class _Body(httpx2.AsyncByteStream):
    """The rest of an answer. Closing it before its end aborts the call."""

    def __init__(self, transport: Http1Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection: Connection | None = connection

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        data = await self._connection.read() if self._connection else b""
        if not data:
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            self._transport.give_back(connection)


def _head(request: httpx2.Request) -> bytes:
    lines = [request.method.encode("ascii") + b" " + request.url.raw_path + b" HTTP/1.1\r\n"]
    lines += [name + b": " + value + b"\r\n" for name, value in request.headers.raw]
    head = b"".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
        raise httpx2.LocalProtocolError("a line break in a header")
    return head + b"\r\n"
