"""A chat-completions server on loopback that does what its script says: any status, header and byte, in pieces, late,
never, or with the connection cut. It keeps what it was asked, and notices when the asker goes away.

    async with ScriptedServer() as server:
        server.says(text("Hello"))                        # the next answer to POST /chat/completions
        server.on("GET /v1/models", reply(data=[…]))      # every answer to another route
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Self


class Drop:
    """Cut the connection here."""


class Hang:
    """Say nothing more until the asker goes away."""


DROP = Drop()
HANG = Hang()
Step = bytes | asyncio.Event | Drop | Hang


@dataclass
class Answer:
    """steps: sent one by one, each as one HTTP chunk; an Event is waited for. sized: one body with its length;
    until_close: a body without a length, which ends with the connection. hints: a 103 goes first."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    sized: bool = False
    until_close: bool = False
    hints: bool = False


NO_ANSWER = Answer(status=0)  # the connection is closed without a byte


@dataclass
class Received:
    """One request. gone: set when its sender closed the connection before the answer was whole."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


# --- answers ---------------------------------------------------------------------------------------------------


def event(payload: Any) -> bytes:
    """One SSE event; bytes are taken as they are."""
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


DONE = event(b"[DONE]")


def chunk(delta: Any = None, finish: str | None = None, **more: Any) -> bytes:
    """An event with one choice."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish}
    return event({"id": "c1", "object": "chat.completion.chunk", "model": "stub-1", "choices": [choice], **more})


def usage(prompt: int = 7, completion: int = 3, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **more}


def stream(*steps: Step, status: int = 200, **headers: str) -> Answer:
    """A streamed answer of these steps, nothing added."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"content-type": "text/event-stream", **named}, list(steps))


def says(*deltas: Any, finish: str | None = "stop", reported: Any = None) -> Answer:
    """A well-formed stream of these deltas (text, or delta objects), with usage and `[DONE]`."""
    parts = [chunk({"content": delta} if isinstance(delta, str) else delta) for delta in deltas]
    last = event({"model": "stub-1", "choices": [], "usage": reported or usage()})
    return stream(*parts, chunk(finish=finish), last, DONE)


def reply(body: Any = None, status: int = 200, content_type: str = "application/json", **headers: str) -> Answer:
    """A whole answer with its length; anything but bytes becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"content-type": content_type, **named}, [data], sized=True)


def refusal(status: int, message: str, **error: Any) -> Answer:
    """An error in OpenAI's envelope."""
    return reply({"error": {"message": message, "type": "invalid_request_error", **error}}, status)


# --- the server ------------------------------------------------------------------------------------------------


class ScriptedServer:
    """requests: what was asked, in order. connections: how many were opened."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self._script: deque[Answer] = deque()
        self._routes: dict[str, Answer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def says(self, *answers: Answer) -> None:
        """Answer the next chat completions with these, one each."""
        self._script.extend(answers)

    def on(self, route: str, answer: Answer) -> None:
        """Answer a route, e.g. `GET /v1/models`, always with this. Routes not named are 404."""
        self._routes[route] = answer

    @property
    def chats(self) -> list[Received]:
        return [request for request in self.requests if request.path.endswith("/chat/completions")]

    async def asked(self, times: int = 1) -> Received:
        """Wait until so many chat completions were asked for, and return the last of them."""
        while len(self.chats) < times:
            self._arrived.clear()
            await self._arrived.wait()
        return self.chats[times - 1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await _read_request(reader):
                self.requests.append(request)
                self._arrived.set()
                answer = self._answer_to(request)
                if not await _Sender(reader, writer, request).send(answer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _answer_to(self, request: Received) -> Answer:
        path = request.path.partition("?")[0]
        if answer := self._routes.get(f"{request.method} {path}"):
            return answer
        if path.endswith("/chat/completions") and self._script:
            return self._script.popleft()
        return refusal(404, f"nothing is scripted for {request.method} {path}")


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, path, headers, body)


class _Sender:
    """Sends one answer, and listens meanwhile whether the asker goes away."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Received) -> None:
        self._reader = reader
        self._writer = writer
        self._request = request

    async def send(self, answer: Answer) -> bool:
        """Return whether the connection can go on."""
        if answer is NO_ANSWER:
            return False
        body = b""
        length = {"transfer-encoding": "chunked"}
        if answer.sized or answer.until_close:
            body = b"".join(step for step in answer.steps if isinstance(step, bytes))
            length = {"content-length": str(len(body))} if answer.sized else {"connection": "close"}
        if answer.hints:
            self._writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </>\r\n\r\n")
        lines = [f"HTTP/1.1 {answer.status} Scripted"]
        lines += [f"{name}: {value}" for name, value in {**answer.headers, **length}.items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        if answer.sized or answer.until_close:
            await self._writer.drain()
            return answer.sized
        for step in answer.steps:
            if not await self._take(step):
                return False
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
        return True

    async def _take(self, step: Step) -> bool:
        if isinstance(step, bytes):
            self._writer.write(b"%x\r\n%b\r\n" % (len(step), step))
            await self._writer.drain()
            return True
        if isinstance(step, asyncio.Event):
            return await self._wait_for(step.wait())
        if isinstance(step, Hang):
            return await self._wait_for(asyncio.Event().wait())
        self._writer.transport.abort()
        return False

    async def _wait_for(self, awaited: Any) -> bool:
        """Wait, unless the asker closes the connection first."""
        waiting = asyncio.ensure_future(awaited)
        leaving = asyncio.ensure_future(self._reader.read(1))
        try:
            await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                self._request.gone.set()
            return waiting.done()
        finally:
            waiting.cancel()
            leaving.cancel()
            await asyncio.gather(waiting, leaving, return_exceptions=True)
