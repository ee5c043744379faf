"""Callers who are slow, many, endless or insistent, against a real server: it goes on answering others, and what it
holds for them is bounded."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.processes import Served, environment, serving

pytestmark = pytest.mark.slow

MB = 1024 * 1024
STREAMS = 10_000
MAX_STREAM_KB = 60
AT_ONCE = 200
PATIENCE_S = 10  # of somebody who behaves; the machine may have other things to do
HEAD = b"POST /v1/threads HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"
HELLO = {"role": "user", "content": "hello"}


def memory(served: Served) -> int:
    """Bytes of the server's process that are in memory."""
    pages = Path(f"/proc/{served.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


@asynccontextmanager
async def neighbour(served: Served) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """Somebody who behaves; whatever is asked is answered within seconds."""
    headers = {"authorization": "Bearer k"}
    async with httpx2.AsyncClient(base_url=served.url, headers=headers, verify=False, timeout=PATIENCE_S) as client:
        assert (await client.get("/assistants")).status_code == 200
        yield client
        assert (await client.get("/assistants")).status_code == 200
        assert (await client.post("/threads", json={})).status_code == 200


class Caller:
    """A connection of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        with suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def status(self) -> int:
        """Of the answer; 0 when the server hung up without one."""
        with suppress(ConnectionError):
            line = await self.reader.readline()
            return int(line.split()[1]) if line else 0
        return 0

    async def ended(self) -> None:
        """Return when the server has hung up."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def leave(self) -> None:
        self.writer.transport.abort()


async def connected(served: Served) -> Caller:
    port = int(served.url.split(":")[2].partition("/")[0])
    return Caller(*await asyncio.open_connection("127.0.0.1", port, limit=4096))


@asynccontextmanager
async def many(served: Served, number: int) -> AsyncGenerator[list[Caller], None]:
    callers: list[Caller] = []
    try:
        for _ in range(0, number, AT_ONCE):
            count = min(AT_ONCE, number - len(callers))
            callers += await asyncio.gather(*(connected(served) for _ in range(count)))
        yield callers
    finally:
        for caller in callers:
            caller.leave()


async def all_of(works: list[Coroutine[Any, Any, Any]], within_s: float = 30) -> list[Any]:
    async with asyncio.timeout(within_s):
        return await asyncio.gather(*works)


@asynccontextmanager
async def silent_model() -> AsyncGenerator[str, None]:
    """A model server that takes requests and never answers."""

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def test_ten_thousand_idle_streams(tmp_path: Path, record_property: Any):
    """Each costs little memory, and others are answered as ever."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    number = min(STREAMS, limit[1] - 500, 25_000)
    async with AsyncExitStack() as opened:
        model = await opened.enter_async_context(silent_model())
        flags = ("--model-url", model, "--default-model", "m")
        served = await opened.enter_async_context(serving(tmp_path, *flags))
        client = await opened.enter_async_context(neighbour(served))
        assistant = (await client.post("/assistants", json={"model": "m"})).json()["id"]
        body = json.dumps({"assistant_id": assistant, "stream": True}).encode()
        ask = HEAD.replace(b"/threads", b"/threads/runs") + b"Idempotency-Key: one\r\nContent-Length: %d\r\n\r\n"
        before, callers = memory(served), []
        while len(callers) < number:
            some = await opened.enter_async_context(many(served, min(AT_ONCE, number - len(callers))))
            await all_of([join(caller, ask % len(body) + body) for caller in some])
            callers += some
        await all_of([caller.reader.readuntil(b"event: thread.run.in_progress") for caller in callers])
        each_kb = (memory(served) - before) / number / 1024
        record_property("kb_per_stream", round(each_kb, 1))
        print(f"{number} idle streams: {each_kb:.1f} KB each")
        assert each_kb < MAX_STREAM_KB
        assert len((await client.get("/threads")).json()["data"]) == 1


async def join(caller: Caller, request: bytes) -> None:
    """Ask until there is a stream: 409 says that the first of all is being carried out."""
    await caller.send(request)
    while await caller.status() == 409:
        await caller.reader.readuntil(b"}}")
        await caller.send(request)


async def test_floods_of_headers(tmp_path: Path):
    """Heads without end are cut off, and nothing of them is kept."""
    async with serving(tmp_path) as served, neighbour(served), many(served, AT_ONCE) as callers:
        before = memory(served)

        async def flood(caller: Caller, piece: bytes) -> None:
            await caller.send(HEAD)
            while not caller.writer.is_closing() and not caller.reader.at_eof():
                await caller.send(piece)
                await asyncio.sleep(0)

        pieces = (b"X-Flood: " + b"x" * 60_000, b"X: y\r\n" * 5000, b"x" * 60_000 + b": y\r\n")
        async with asyncio.timeout(60):
            await asyncio.gather(*(flood(caller, pieces[n % len(pieces)]) for n, caller in enumerate(callers)))
        assert memory(served) - before < 100 * MB


async def test_slow_heads_and_bodies(tmp_path: Path):
    """Whoever dawdles is told so, and gone within seconds."""
    env = environment(AFTERGLOW_HEAD_TIMEOUT_S="1", AFTERGLOW_BODY_TIMEOUT_S="1")
    parts = (HEAD, HEAD + b"Content-Length: 100\r\n\r\n{", b"P")
    async with serving(tmp_path, env=env) as served, neighbour(served), many(served, AT_ONCE) as callers:
        await all_of([caller.send(parts[number % len(parts)]) for number, caller in enumerate(callers)])
        assert Counter(await all_of([caller.status() for caller in callers])) == {408: AT_ONCE}
        await all_of([caller.ended() for caller in callers])


async def test_readers_who_do_not_read(tmp_path: Path):
    """They are hung up on, and only what a connection holds was held for them."""
    env = environment(AFTERGLOW_BODY_TIMEOUT_S="1")
    async with serving(tmp_path, env=env) as served, neighbour(served) as client:
        form = {"files": {"file": ("a.bin", b"x" * 32 * MB)}, "data": {"purpose": "user_data"}}
        file = (await client.post("/files", **form, timeout=60)).json()["id"]
        ask = f"GET /v1/files/{file}/content HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n\r\n".encode()
        before, files = memory(served), open_files(served)
        async with many(served, 50) as callers:
            await all_of([caller.send(ask) for caller in callers])
            await asyncio.sleep(1)
            assert memory(served) - before < 200 * MB  # of 1,600
            async with asyncio.timeout(30):
                while open_files(served) > files + 10:
                    await asyncio.sleep(0.1)


def open_files(served: Served) -> int:
    return len(list(Path(f"/proc/{served.process.pid}/fd").iterdir()))


async def test_storms_of_retries(tmp_path: Path):
    """Hundreds of the same request at once, with a key, make one object; those who must wait are told to."""
    async with serving(tmp_path) as served, neighbour(served) as client:
        thread = (await client.post("/threads", json={})).json()["id"]
        path = f"/threads/{thread}/messages"

        async def ask() -> tuple[int, str]:
            headers = {"idempotency-key": "storm", "x-stainless-retry-count": "1"}
            answer = await client.post(path, json=HELLO, headers=headers, timeout=30)
            return answer.status_code, answer.json().get("id", "")

        answers = Counter(await all_of([ask() for _ in range(AT_ONCE)]))
        made = {message for status, message in answers if status == 200}
        assert {status for status, _ in answers} <= {200, 409}
        assert len(made) == 1
        assert len((await client.get(path)).json()["data"]) == 1


async def test_floods_of_connections(tmp_path: Path):
    """More than may be are refused; those that say nothing are closed, and then there is room."""
    env = environment(AFTERGLOW_MAX_CONNECTIONS="100", AFTERGLOW_HEAD_TIMEOUT_S="2")
    async with serving(tmp_path, env=env) as served:
        async with neighbour(served), many(served, 500) as callers:
            statuses = Counter(await all_of([caller.status() for caller in callers]))
            assert statuses[503] >= 400
            assert statuses[408] <= 100
        async with neighbour(served):
            assert "Traceback" not in served.log
