"""Parses documents in child processes that can be killed. A document can break its child, and nothing else.

A child is a Python of its own, with an empty set of variables, a lower priority, limits on memory and processor time,
and two pipes: the file goes in, its text and chunks come out. It is kept for the next file and ends when there has
been none for a while, so a server that reads no documents pays nothing. The child's side is `child.py`. What holds it
is not the sandbox of the code interpreter: it shields the server from crashes and endless work, not the machine from
a parser that was taken over.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from afterglow.contracts import Chunk
from afterglow.errors import Unreadable, UnreadableCode
from afterglow.ingest.extract import Extracted, too_large

MAX_FILE_BYTES = 512 * 1024 * 1024
_MAX_ANSWER_BYTES = 400_000_000
_FILES_PER_CHILD = 200  # what leaks in a library is given back
_PATIENCE = 4  # times the limit on processor time may pass: the machine may be busy
_START = "import sys; sys.path.insert(0, sys.argv[1]); from afterglow.ingest.child import main; main()"
# One thread needs one arena of memory and no more; a pool of threads would count against the limit.
_VARIABLES = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


class Job(msgspec.Struct, array_like=True):
    """What the child is told before the file's bytes. Sizes of chunks in tokens."""

    name: str
    max_tokens: int
    overlap_tokens: int


class Span(msgspec.Struct, array_like=True):
    """A chunk without its text, which the parent has."""

    start: int
    end: int
    page: int | None
    tokens: int


class Success(msgspec.Struct, tag="text", array_like=True):
    extracted: Extracted
    spans: list[Span]


class Failure(msgspec.Struct, tag="failure", array_like=True):
    code: UnreadableCode
    message: str


class Parsed(msgspec.Struct, frozen=True):
    """What became of a file."""

    extracted: Extracted
    chunks: list[Chunk]


_ANSWERS = msgspec.msgpack.Decoder(Success | Failure)


class Parsers:
    """A few children, each with one file at a time; further files wait their turn.

    timeout_s: processor time for one file. memory_mb: address space of a child, of which it needs about 100 MB itself.
    idle_s: how long a child is kept with nothing to do. folder: where a file lies while it is read; it has no name
    there and is gone with its child.
    """

    def __init__(
        self,
        processes: int = 2,
        timeout_s: float = 60.0,
        memory_mb: int = 1024,
        idle_s: float = 60.0,
        folder: str | None = None,
    ) -> None:
        self._turns = asyncio.Semaphore(processes)
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._idle_s = idle_s
        self._folder = folder or ""
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()

    async def parse(
        self, name: str, data: AsyncIterator[bytes], max_tokens: int = 800, overlap_tokens: int = 400
    ) -> Parsed:
        """Read a file and cut its text. Raises Unreadable, and what `data` raises."""
        async with self._turns:
            child, answer = await self._take(), None
            self._busy.add(child)
            try:
                answer = await child.ask(Job(name, max_tokens, overlap_tokens), data)
            finally:
                self._busy.discard(child)
                await self._give_back(child, sound=answer is not None)
        if isinstance(answer, Failure):
            raise Unreadable(answer.code, answer.message)
        return Parsed(answer.extracted, list(_chunks(answer)))

    async def close(self) -> None:
        """End every child. A file that is being read fails."""
        children, self._idle = [*self._idle, *self._busy], []
        for child in children:
            await child.kill()

    async def _take(self) -> _Child:
        while self._idle:
            child = self._idle.pop()
            if child.rest():
                return child
            await child.kill()
        return await _Child.start(self._timeout_s, self._memory_mb, self._folder)

    async def _give_back(self, child: _Child, sound: bool) -> None:
        if sound and child.files < _FILES_PER_CHILD:
            self._idle.append(child)
            child.retire_later(self._idle, self._idle_s)
        else:
            await child.kill()


def _chunks(answer: Success) -> list[Chunk]:
    text = answer.extracted.text
    return [
        Chunk(index, text[span.start : span.end], span.start, span.end, span.page, span.tokens)
        for index, span in enumerate(answer.spans)
    ]


class _Child:
    """One process, from the parent's side."""

    def __init__(self, process: asyncio.subprocess.Process, timeout_s: float, memory_mb: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._in = process.stdin
        self._out = process.stdout
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._retirement: asyncio.TimerHandle | None = None
        self.files = 0

    @classmethod
    async def start(cls, timeout_s: float, memory_mb: int, folder: str) -> _Child:
        package = Path(__file__).parents[2]
        limits = [str(timeout_s), str(memory_mb), str(MAX_FILE_BYTES), folder]
        try:
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-I", "-c", _START, str(package), *limits],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_VARIABLES,
                limit=1 << 20,
                start_new_session=True,  # Ctrl-C is for the server, which ends its children itself
            )
        except OSError as error:
            raise _server_error(f"no parser could be started: {error.strerror}") from None
        return cls(process, timeout_s, memory_mb)

    async def ask(self, job: Job, data: AsyncIterator[bytes]) -> Success | Failure:
        """Hand over a file and wait for the answer. After an exception the child is of no more use."""
        self.files += 1
        try:
            await self._send(job, data)
            async with asyncio.timeout(_PATIENCE * self._timeout_s):
                size = int.from_bytes(await self._out.readexactly(8), "big")
                if size > _MAX_ANSWER_BYTES:
                    raise too_large()
                answer: Success | Failure = _ANSWERS.decode(await self._out.readexactly(size))
                return answer
        except TimeoutError:
            raise self._took_too_long() from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._why_it_ended() from None
        except msgspec.DecodeError:
            raise _server_error("its parser gave no proper answer") from None

    async def _send(self, job: Job, data: AsyncIterator[bytes]) -> None:
        await self._write(msgspec.msgpack.encode(job))
        size = 0
        async for piece in data:
            size += len(piece)
            if size > MAX_FILE_BYTES:
                raise too_large()
            if piece:
                await self._write(piece)
        await self._write(b"")

    async def _write(self, piece: bytes) -> None:
        self._in.write(len(piece).to_bytes(4, "big"))
        self._in.write(piece)
        async with asyncio.timeout(_PATIENCE * self._timeout_s):
            await self._in.drain()

    async def _why_it_ended(self) -> Unreadable:
        code = await self._process.wait()
        if code == -signal.SIGXCPU:
            return self._took_too_long()
        if code == -signal.SIGKILL:
            return _server_error("its parser was ended from outside, perhaps because the machine ran out of memory")
        if code < 0:
            return Unreadable(
                "invalid_file",
                f"The file could not be parsed because it breaks the parser, or needs more than {self._memory_mb} MB.",
            )
        return _server_error("its parser failed; the server's log says where")

    def _took_too_long(self) -> Unreadable:
        return Unreadable(
            "invalid_file", f"The file could not be parsed because it takes longer than {self._timeout_s:g} seconds."
        )

    def retire_later(self, idle: list[_Child], idle_s: float) -> None:
        """End this child unless it gets a file soon."""

        def retire() -> None:
            if self in idle:
                idle.remove(self)
                self._in.close()  # it ends by itself when no more can come

        self._retirement = asyncio.get_running_loop().call_later(idle_s, retire)

    def rest(self) -> bool:
        """Stop waiting for retirement. Whether the child still lives."""
        if self._retirement is not None:
            self._retirement.cancel()
        return self._process.returncode is None

    async def kill(self) -> None:
        """When this returns the process is gone."""
        self.rest()
        if self._process.returncode is None:
            self._process.kill()
        self._in.close()
        await self._process.wait()


def _server_error(why: str) -> Unreadable:
    return Unreadable("server_error", f"The file could not be parsed because {why}.")
