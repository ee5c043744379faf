"""A web server for tests that answers what it is told, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec


class Asked(NamedTuple):
    """A request. headers: by lower-case names."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Answer(NamedTuple):
    body: bytes = b""
    status: int = 200
    waits: asyncio.Event | None = None


class Endpoint:
    """answers: the next ones, in order; the last one stays. asked: requests so far, as they arrived. left: how many
    callers did not wait for their answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[Answer] = []
        self.asked: list[Asked] = []
        self.left = 0

    def will(self, *answers: Answer) -> None:
        self.answers += answers

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.asked) < times:
                await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.asked.append(Asked(head[0].split()[1], headers, body))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if answer.waits is not None:
                gone = asyncio.ensure_future(reader.read())
                waits = asyncio.ensure_future(answer.waits.wait())
                await asyncio.wait([gone, waits], return_when=asyncio.FIRST_COMPLETED)
                self.left += gone.done()
                gone.cancel()
                waits.cancel()
            writer.write(
                b"HTTP/1.1 %d Said\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
                % (answer.status, len(answer.body), answer.body)
            )
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def endpoint() -> AsyncGenerator[Endpoint, None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await made._serve(reader, writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        made = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield made
