"""Stand-ins for tests, ours and those of apps: a model that says what it is told, a code interpreter that does what it
is told, a parser and an embedder without processes and servers, and a clock that can be set."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from afterglow.contracts import (
    CellEnd,
    CellOutput,
    ChatRequest,
    Chunk,
    Delta,
    EngineStatus,
    Forwarded,
    ModelEnd,
    ModelInfo,
    SandboxFile,
    TextDelta,
    ToolCallDelta,
)
from afterglow.errors import ModelError, NotFound, SandboxError, SessionLost, Unreadable
from afterglow.ingest.extract import EMPTY, Extracted
from afterglow.ingest.parse import Parsed
from afterglow.objects import Usage

Saying = list[Delta | ModelError | asyncio.Event]
_numbers = itertools.count(1)


def says(text: str, *, usage: Usage | None = None) -> Saying:
    """An answer in words, one delta a word."""
    words = [TextDelta(word if first else f" {word}") for first, word in _with_first(text.split(" "))]
    return [*words, ended("stop", usage)]


def calls(*functions: tuple[str, dict[str, Any]], usage: Usage | None = None) -> Saying:
    """Calls of functions, in parallel when there are several: `calls(("get_weather", {"city": "Oslo"}))`."""
    deltas: Saying = []
    for index, (name, arguments) in enumerate(functions):
        text = msgspec.json.encode(arguments).decode()
        deltas.append(ToolCallDelta(index, f"call_{next(_numbers):024d}", name))
        deltas += [ToolCallDelta(index, arguments=text[at : at + 5]) for at in range(0, len(text), 5)]
    return [*deltas, ended("tool_calls", usage)]


def ended(reason: Any, usage: Usage | None = None) -> ModelEnd:
    """The end of an answer; 10 tokens in and 5 out unless told otherwise."""
    usage = usage or Usage(prompt_tokens=10, completion_tokens=5, total_tokens=15)
    return ModelEnd(finish_reason=reason, usage=usage, raw_usage=msgspec.to_builtins(usage), model="scripted")


def _with_first(words: list[str]) -> list[tuple[bool, str]]:
    return [(number == 0, word) for number, word in enumerate(words)]


class ScriptedModels:
    """A `contracts.ChatModels` that answers each call with the next script.

    A script is a list of deltas, errors to raise, and asyncio events to wait for, in order. requests: what was asked.
    closed: how many calls were ended by the caller before their end.
    """

    def __init__(self) -> None:
        self.scripts: list[Saying] = []
        self.requests: list[ChatRequest] = []
        self.closed = 0
        self.inline_images = False
        self.info_of_all = ModelInfo(window_tokens=8192, learned="configuration")

    def will(self, *scripts: Saying) -> None:
        """Answer the next calls with these."""
        self.scripts += scripts

    async def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        self.requests.append(request)
        script = self.scripts.pop(0) if self.scripts else says("No script was left.")
        finished = False
        try:
            for item in script:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, ModelError):
                    raise item
                else:
                    await asyncio.sleep(0)
                    finished = isinstance(item, ModelEnd)
                    yield [item]
        finally:
            self.closed += not finished

    async def info(self, model: str) -> ModelInfo:
        return self.info_of_all

    def names(self, model: str) -> list[str]:
        return [model]

    def learn_window(self, model: str, window_tokens: int) -> None:
        self.info_of_all = ModelInfo(window_tokens=window_tokens, learned="server")

    def wants_inline_images(self, model: str) -> bool:
        return self.inline_images

    async def list_models(self) -> list[dict[str, Any]]:
        return [{"id": "scripted", "object": "model", "created": 0, "owned_by": "afterglow"}]

    async def forward(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> Forwarded:
        raise NotFound(f"Invalid URL ({method} {path})")

    async def close(self) -> None:
        """Nothing to let go of."""


class Write(NamedTuple):
    """What a scripted cell does to /mnt/data: write `data` under `name`, or remove it (None)."""

    name: str
    data: bytes | None


Cell = list[CellOutput | Write | asyncio.Event]


class ScriptedSession:
    """A `contracts.CodeSession` that runs nothing: each cell is the engine's next script."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.alive = True
        self.files: dict[str, tuple[bytes, int]] = {}
        self._engine = engine

    async def run(self, code: str, timeout_s: float) -> AsyncGenerator[CellOutput, None]:
        self._engine.ran.append(code)
        finished = False
        try:
            for item in self._engine.cells.pop(0) if self._engine.cells else []:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Write):
                    self._write(item)
                else:
                    finished = isinstance(item, CellEnd)
                    self.alive = self.alive and getattr(item, "status", "") != "lost"
                    yield item
            if not finished:
                finished = True
                yield CellEnd("ok")
        finally:
            self._engine.stopped += not finished

    def _write(self, item: Write) -> None:
        if item.data is None:
            self.files.pop(item.name, None)
        else:
            self.files[item.name] = (item.data, next(_numbers))

    async def put(self, name: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        self._write(Write(name, b"".join([chunk async for chunk in chunks])))

    async def list_files(self) -> list[SandboxFile]:
        if not self.alive:
            raise SessionLost("It was closed.")
        return [SandboxFile(name, len(data), mtime) for name, (data, mtime) in self.files.items()]

    async def get(self, name: str, max_bytes: int) -> AsyncGenerator[bytes, None]:
        yield self.files[name][0][:max_bytes]

    async def close(self) -> None:
        self.alive = False


class ScriptedEngine:
    """A `contracts.CodeEngine` whose cells do what they are told: outputs, writes, and events to wait for.

    ran: the code of each cell. sessions: all that were opened. stopped: cells that were ended before their end.
    refuses: raised instead of opening a session.
    """

    def __init__(self) -> None:
        self.status = EngineStatus("on", engine="scripted")
        self.cells: list[Cell] = []
        self.ran: list[str] = []
        self.sessions: list[ScriptedSession] = []
        self.stopped = 0
        self.refuses: SandboxError | None = None

    def will(self, *cells: Cell) -> None:
        """Let the next cells do these."""
        self.cells += cells

    def start(self) -> None:
        """Nothing to start."""

    async def settled(self) -> EngineStatus:
        return self.status

    async def open(self) -> ScriptedSession:
        if self.refuses is not None:
            raise self.refuses
        self.sessions.append(ScriptedSession(self))
        return self.sessions[-1]

    async def close(self) -> None:
        for session in self.sessions:
            await session.close()


class ScriptedParser:
    """A parser for the pipeline of vector stores that reads UTF-8 text and makes each paragraph a chunk.

    parsed: names of the files that were read, with the sizes asked for. fails: what is raised, by file name. holds:
    files that wait for an event, by name.
    """

    def __init__(self) -> None:
        self.parsed: list[tuple[str, int, int]] = []
        self.fails: dict[str, Exception] = {}
        self.holds: dict[str, asyncio.Event] = {}

    async def parse(self, name: str, data: AsyncIterator[bytes], max_tokens: int, overlap_tokens: int) -> Parsed:
        text = b"".join([piece async for piece in data]).decode()
        self.parsed.append((name, max_tokens, overlap_tokens))
        if name in self.holds:
            await self.holds[name].wait()
        if name in self.fails:
            raise self.fails[name]
        if not text:
            raise Unreadable("invalid_file", EMPTY)
        places = [found.span() for found in re.finditer(r"[^\n]+", text)]
        chunks = [
            Chunk(index, text[start:end], start, end, None, len(text[start:end].split()))
            for index, (start, end) in enumerate(places)
        ]
        return Parsed(Extracted(text), chunks)

    async def close(self) -> None:
        """Nothing to let go of."""


class ScriptedEmbedder:
    """A `contracts.Embedder` whose vectors count letters. asked: the texts of each request. errors: raised by the next
    requests, in order; None lets one pass."""

    def __init__(self, model: str = "letters") -> None:
        self.model = model
        self.asked: list[list[str]] = []
        self.errors: list[ModelError | None] = []

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        self.asked.append(list(texts))
        if self.errors and (error := self.errors.pop(0)):
            raise error
        return [[1.0 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]

    async def close(self) -> None:
        """Nothing to let go of."""


class SetClock:
    """A `contracts.Clock` that stands still until it is set: `clock.time += 600`."""

    def __init__(self, time: float = 1_700_000_000.0) -> None:
        self.time = time

    def now(self) -> float:
        return self.time
