"""What a connection may do: how large, how slow and how many; and which host, page and proxy it may speak of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from afterglow.api import idempotency
from afterglow.connection import MAX_HEADERS, MAX_PIPELINED, Connection
from afterglow.testing import says
from tests.api.streams import streaming
from tests.api.wire import Wire, until
from tests.conftest import Server, ServerFactory

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/threads HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"
NOW = 10_000_000.0  # later than any time of an event loop here


class Raw:
    """A connection of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, Any]:
        """The status and the body of one answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.lower().split(": ", 1) for line in head.strip().split("\r\n")[1:])
        body = await self.reader.readexactly(int(headers["content-length"]))
        assert headers["x-request-id"]
        return int(head.split(" ")[1]), json.loads(body)

    async def refused(self, status: int) -> str:
        """The message of an answer after which the connection is closed."""
        found, body = await self.answer()
        assert found == status
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert await self.reader.read() == b""
        return str(body["error"]["message"])


@asynccontextmanager
async def raw(server: Server) -> AsyncGenerator[Raw, None]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """Those that servers have made, as they are made."""
    made: list[Connection] = []
    before = Connection.connection_made

    def noted(self: Connection, transport: Any) -> None:
        made.append(self)
        before(self, transport)

    monkeypatch.setattr(Connection, "connection_made", noted)
    return made


# --- heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [b"X: " + b"x" * 70_000, b"x" * 70_000, b"X: y\r\n" * (MAX_HEADERS + 1) + b"\r\n", b"X: y\r\n" * 20_000],
)
async def test_a_head_has_its_limit(server: Server, more: bytes):
    """A header without end, too much of them, or too many: 431 in the API's form, and the connection is closed."""
    async with raw(server) as caller:
        await caller.send(HEAD + more)
        assert "head of the request" in await caller.refused(431)


async def test_a_request_line_has_its_limit(wire: Wire):
    """A path that is longer than a head may be is refused, too."""
    async with httpx2.AsyncClient(base_url=wire.client.base_url, verify=False) as client:
        response = await client.get("/v1/threads/" + "x" * 65_000, headers={"x": "y" * 2000})
    assert (response.status_code, response.json()["error"]["type"]) == (431, "invalid_request_error")


async def test_what_is_no_http_is_told_so_once(server: Server):
    """400 in the API's form."""
    async with raw(server) as caller:
        await caller.send(b"\x16\x03\x01nonsense\r\n\r\n")
        assert "Invalid HTTP request" in await caller.refused(400)


async def test_many_small_pieces_make_a_head(server: Server):
    """A head may come in any pieces, and the next on the same connection, too."""
    async with raw(server) as caller:
        for _ in range(2):
            for byte in HEAD + b"\r\n":
                await caller.send(bytes([byte]))
            assert (await caller.answer())[0] == 200


# --- time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (HEAD, "The head of the request did not arrive in time."),
        (POST + b"Content-Length: 9\r\n\r\n{", "The body of the request did not arrive in time."),
    ],
)
async def test_a_slow_caller_is_given_up(server: Server, connections: list[Connection], sent: bytes, said: str):
    """408 for a head, or a body, that stops in its middle."""
    async with raw(server) as caller:
        await caller.send(sent)
        await until(lambda: connections and connections[0]._head_bytes)
        connections[0].check(connections[0].loop.time())
        assert not connections[0].transport.is_closing()
        connections[0].check(NOW)
        assert await caller.refused(408) == said


async def test_a_silent_caller_is_hung_up_on(server: Server, connections: list[Connection]):
    """A connection that never asks for anything is not kept."""
    async with raw(server) as caller:
        await until(lambda: connections)
        connections[0].check(NOW)
        assert await caller.refused(408)


async def test_who_waits_for_an_answer_is_left_alone(server: Server, connections: list[Connection]):
    """Neither a stream nor a connection between two requests is slow."""
    go = asyncio.Event()
    server.model.will([go, *says("Hello.")])
    assistant = await server.assistant()
    async with raw(server) as caller, streaming(server, "/threads/runs", {"assistant_id": assistant.id}) as response:
        await caller.send(HEAD + b"\r\n")
        await caller.answer()
        for one in connections:
            one.check(NOW)
        go.set()
        assert b"thread.run.completed" in await response.aread()
        await caller.send(HEAD + b"\r\n")
        assert (await caller.answer())[0] == 200


async def test_who_does_not_read_is_hung_up_on(server: Server, connections: list[Connection]):
    """Nothing is held for a reader who takes nothing for body_timeout_s; one who takes some is left alone."""
    async with raw(server) as caller:
        await caller.send(HEAD + b"\r\n")
        await caller.answer()
        [one] = connections
        one.flow.pause_writing()
        sizes = iter([900, 800, 800, 800])
        one.transport = _Transport(one.transport, sizes)  # type: ignore[assignment]
        for now in (NOW, NOW + 50, NOW + 100):
            one.check(now)
        assert not one.transport.is_closing()
        one.check(NOW + 111)
        assert one.transport.is_closing()


class _Transport:
    """A transport with so much unread."""

    def __init__(self, real: Any, sizes: Any) -> None:
        self._real = real
        self._sizes = sizes

    def get_write_buffer_size(self) -> int:
        return int(next(self._sizes))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


# --- numbers ---------------------------------------------------------------------------------------------------


async def test_connections_are_counted(start_server: ServerFactory, tmp_path: Path):
    """One too many is told to come again: 503 with Retry-After; when another has gone, there is room."""
    async with start_server(tmp_path, max_connections=2) as server:
        async with raw(server) as one, raw(server) as two:
            for caller in (one, two):
                await caller.send(HEAD + b"\r\n")
                assert (await caller.answer())[0] == 200
            async with raw(server) as three:
                assert "Too many connections" in await three.refused(503)
        async with asyncio.timeout(10):  # until the server has heard that they left
            while await status(server) == 503:
                await asyncio.sleep(0.001)
        assert await status(server) == 200


async def status(server: Server) -> int:
    async with raw(server) as caller:
        await caller.send(HEAD + b"\r\n")
        return (await caller.answer())[0]


async def test_requests_in_a_row_are_bounded(server: Server):
    """Some may be sent without waiting for answers, and are answered in order; not thousands."""
    async with raw(server) as caller:
        await caller.send((HEAD + b"\r\n") * MAX_PIPELINED)
        for _ in range(MAX_PIPELINED):
            assert (await caller.answer())[0] == 200
        await caller.send((HEAD + b"\r\n") * 2000)
        with suppress(ConnectionResetError):
            assert len(await caller.reader.read()) < 20_000


# --- hosts and proxies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost.", "LOCALHOST.:80", "localhost:", "[::1]", "[::1]:1"])
async def test_a_host_can_be_written_in_several_ways(wire: Wire, host: str):
    """With the root's dot, in capitals, with an empty port, in brackets."""
    assert (await wire.get("/assistants", headers={"host": host})).status == 200


async def test_a_request_names_one_host(server: Server):
    """None, or two, are refused: what stands before us may have looked at another one."""
    for hosts in (b"", b"Host: localhost\r\nHost: localhost\r\n"):
        async with raw(server) as caller:
            await caller.send(b"GET /v1/assistants HTTP/1.1\r\nAuthorization: Bearer k\r\n" + hosts + b"\r\n")
            assert (await caller.answer())[0] == 400


# --- web pages -------------------------------------------------------------------------------------------------

PAGE = "https://app.example.com"
SENT_BY_SDKS = (
    "authorization,content-type,idempotency-key,openai-beta,openai-organization,openai-project,x-stainless-arch,"
    "x-stainless-lang,x-stainless-os,x-stainless-package-version,x-stainless-poll-helper,x-stainless-retry-count,"
    "x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
)
READ_BY_SDKS = (
    *("x-request-id", "openai-poll-after-ms", "retry-after", "retry-after-ms", "x-should-retry", "idempotent-replayed"),
    *("openai-processing-ms", "openai-version", "openai-organization", "preference-applied", "content-disposition"),
    *("x-ratelimit-limit-requests", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests"),
)


async def test_a_preflight_allows_what_sdks_send(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Each header that a browser's SDK sends is named, as are its methods and a private network."""
    async with start_server(tmp_path, allowed_origins=(PAGE,)) as server:
        wire = connect(server, key="")
        for method in ("GET", "POST", "DELETE"):
            asked = {
                "origin": PAGE,
                "access-control-request-method": method,
                "access-control-request-headers": SENT_BY_SDKS,
                "access-control-request-private-network": "true",
            }
            answer = await wire.client.options("/v1/threads", headers=asked)
            assert answer.status_code == 200
            assert method in answer.headers["access-control-allow-methods"]
            allowed = answer.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
            assert set(SENT_BY_SDKS.split(",")) <= set(allowed)
            assert answer.headers["access-control-allow-private-network"] == "true"
        other = await wire.client.options("/v1/threads", headers={**asked, "origin": "https://evil.example.com"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


async def test_a_page_can_read_every_answer(
    start_server: ServerFactory, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Answers, streams and errors alike say which page may read them, and which headers."""

    async def broken(*_: Any) -> None:
        raise ZeroDivisionError

    async with start_server(tmp_path, allowed_origins=(PAGE,), max_body_mb=1) as server:
        wire, keyless = connect(server), connect(server, key="")
        headers = {"origin": PAGE}
        found = [
            await wire.get("/assistants", headers=headers),
            await keyless.get("/assistants", headers=headers),
            await wire.get("/assistants", headers={**headers, "host": "evil.example.com"}),
            await wire.get("/assistants/asst_x", headers=headers),
            await wire.get("/nowhere", headers=headers),
            await wire.post("/threads", b"x" * 2_000_000, headers=headers),
        ]
        monkeypatch.setattr(idempotency.threads.threads, "create_thread", broken)
        found.append(await wire.post("/threads", {}, headers=headers))
        assert [answer.status for answer in found] == [200, 401, 403, 404, 404, 413, 500]
        for answer in found:
            assert answer.headers["access-control-allow-origin"] == PAGE
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert set(READ_BY_SDKS) <= set(exposed)
