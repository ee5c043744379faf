"""The load driver: one keep-alive HTTP connection per simulated client, on a bare asyncio protocol.

An SDK costs more CPU per streamed token than the server that is measured, and would share its cores; this does not.
Nothing is retried: whatever is not the answer expected is a BenchFailure.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from time import perf_counter
from typing import Any, NamedTuple, TypeVar, cast

import httptools
import msgspec

T = TypeVar("T")
DELTA = b"event: thread.message.delta"  # begins each piece of text in a run's stream
CHUNK = b'"content":'  # in each chat-completions chunk of the stub that carries text


class BenchFailure(Exception):
    """A measurement could not be made; the text says what came instead."""


class Answer(NamedTuple):
    """One HTTP answer, read to its end.

    sent, ended: when the request went out and when the answer was complete, in seconds of `perf_counter`.
    marks: when each occurrence of the request's `mark` had arrived.
    """

    status: int
    body: bytes
    sent: float
    ended: float
    marks: list[float]

    @property
    def took_ms(self) -> float:
        return (self.ended - self.sent) * 1000

    @property
    def first_ms(self) -> float:
        """From sending the request to the first mark."""
        return (self.marks[0] - self.sent) * 1000


class Connection(asyncio.Protocol):
    """One client. It connects when it is first asked something, and again after the server has hung up.

    marks: when each mark of the answer now being read had arrived. The parser calls the `on_…` methods.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.marks: list[float] = []
        self._address = (host, port)
        self._headers = (
            f"host: {host}:{port}\r\nauthorization: Bearer bench\r\nopenai-beta: assistants=v2\r\n"
            "content-type: application/json\r\n"
        )
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser
        self._answer: asyncio.Future[None] | None = None
        self._lost: asyncio.Event
        self._pieces: list[bytes] = []
        self._mark = self._carry = b""

    async def ask(self, method: str, path: str, body: object = None, *, mark: bytes = b"") -> Answer:
        """Send one request and read its answer. body: sent as JSON; bytes are sent as they are.

        mark: bytes whose arrivals are timed. Raises OSError, also when the server hangs up before it has answered.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            transport = await self._connect()
        self._pieces, self.marks, self._mark, self._carry = [], [], mark, b""
        self._answer = asyncio.get_running_loop().create_future()
        data = b"" if body is None else body if isinstance(body, bytes) else msgspec.json.encode(body)
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}content-length: {len(data)}\r\n\r\n"
        sent = perf_counter()
        transport.write(head.encode() + data)
        try:
            await self._answer
        except asyncio.CancelledError:
            self.close()  # the rest of this answer must not be taken for the next one
            raise
        return Answer(self._parser.get_status_code(), b"".join(self._pieces), sent, perf_counter(), self.marks)

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    async def _connect(self) -> asyncio.Transport:
        if self._transport:
            await self._lost.wait()
        await asyncio.get_running_loop().create_connection(lambda: self, *self._address)
        assert self._transport
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._lost = asyncio.Event()
        self._parser = httptools.HttpResponseParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost.set()
        self._fail(exc or ConnectionResetError("the server hung up before it had answered"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is no HTTP: {error}"))
            self.close()

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)
        if self._mark:
            seen = self._carry + piece  # a mark may be cut in two by the network
            self.marks += [perf_counter()] * seen.count(self._mark)
            self._carry = seen[1 - len(self._mark) :]

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._answer and not self._answer.done():
            self._answer.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)


def expect(answer: Answer, *parts: bytes) -> Answer:
    """Return the answer if its status is 200 and it has all these parts, else raise BenchFailure."""
    if answer.status != 200:
        raise BenchFailure(f"HTTP {answer.status}: {answer.body[:300].decode(errors='replace')}")
    for part in parts:
        if part not in answer.body:
            raise BenchFailure(f"no {part[:60]!r} in an answer that ends {answer.body[-300:]!r}")
    return answer


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once and return their results in order. The first failure stops the rest and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in tasks]


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Pace(NamedTuple):
    """What clients in a loop achieved. took_ms: of each call that began and ended in the time measured."""

    per_s: float
    took_ms: list[float]


async def loop_for(
    seconds: float, clients: Iterable[T], call: Callable[[T], Awaitable[object]], warm_up_s: float = 0.3
) -> Pace:
    """Let each client call again as soon as it is answered.

    Counted is what ends after the warm-up and before the end.
    """
    start = perf_counter() + warm_up_s
    end = start + seconds
    ended = 0
    took_ms: list[float] = []

    async def keep_calling(client: T) -> None:
        nonlocal ended
        while (began := perf_counter()) < end:
            await call(client)
            now = perf_counter()
            if start <= now < end:
                ended += 1
                if began >= start:
                    took_ms.append((now - began) * 1000)

    await together(keep_calling(client) for client in clients)
    return Pace(ended / seconds, took_ms)


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest-rank percentile: the smallest value that so many percent of the values do not exceed.

    Raises BenchFailure when there is none.
    """
    ordered = sorted(values)
    if not ordered:
        raise BenchFailure("nothing was measured")
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
