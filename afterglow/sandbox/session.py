"""The server's side of one session: requests, answers, and deadlines that it cannot stretch.

The agent inside (`guest/agent.py`) is taken for hostile. Nothing it sends is kept before its size was checked, every
total has a bound (`answers.py`), and whatever does not fit the wire ends the session. Time is kept by timers that no
byte moves; at their end the engine kills from outside.
"""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress

from afterglow.contracts import CellEnd, CellOutput, SandboxFile
from afterglow.errors import SandboxFull, SessionLost
from afterglow.sandbox.answers import (
    FLOOD,
    Answer,
    Beat,
    Cell,
    Done,
    Download,
    Listing,
    Ok,
    Ready,
    Reply,
    Request,
    one_line,
    read_header,
)
from afterglow.sandbox.guest.frames import BODY_BYTES, BadFrame, Frames, is_clean_name, pack
from afterglow.telemetry import log

READ_BYTES = 65_536
PUT_BYTES = 262_144
GRACE_S = 2.0  # from an interrupt to the kill
CLOSE_GRACE_S = 0.5  # the same, when nobody waits for the cell any more
GONE_S = 1.0  # how long the end of a cell waits to hear why its session died
ANSWER_S = 30.0  # an agent that never waits has answered a file request long before
MISSED_BEATS = 3  # in a row; then nobody is there any more


class Session:
    """A `contracts.CodeSession` over a connected pair of streams.

    kill: ends every process of the session from outside, at once (pidfd, `docker kill`); may be called more than
    once, and never raises. gone: waits until nothing of it is left; it may call `lost` with what it found (an
    out-of-memory kill in the cgroup, say) before it returns. output_kb: text of a cell that is kept.
    on_busy, on_idle: told when a cell begins and when it has ended, so that the engine can watch for work in between.
    beat_s: seconds between two signs of life that it is asked for; 0 where its end is sure to close the streams.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        kill: Callable[[], None],
        gone: Callable[[], Awaitable[None]],
        output_kb: int = 256,
        on_busy: Callable[[], None] = lambda: None,
        on_idle: Callable[[], None] = lambda: None,
        beat_s: float = 0,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._kill, self._gone = kill, gone
        self._text_bytes = output_kb * 1024
        self._on_busy, self._on_idle = on_busy, on_idle
        self._loop = asyncio.get_running_loop()
        self._requests: dict[int, Request] = {}
        self._last_id = 0
        self._cell: Cell | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why = ""
        self._engine_says = ""
        self._used_at = self._loop.time()
        self._beat_s = beat_s
        self._beats_due = 0
        self._missed_beats = 0
        self._waits_for_room = False
        self._beating = self._loop.call_later(beat_s, self._beat) if beat_s else None
        self._reading = asyncio.create_task(self._read())

    async def start(self, memory_bytes: int, processes: int, timeout_s: float = ANSWER_S) -> None:
        """Say hello, which starts the worker, and wait until it is there. Called once, first. Raises SessionLost."""
        self._check()
        reply = Reply(Ready)
        self._ask("hello", reply, memory_bytes=memory_bytes, processes=processes, output_bytes=self._text_bytes)
        await self._answered(reply, timeout_s)
        if reply.failed:
            self._lose("it could not start its worker")
        self._check()

    @property
    def alive(self) -> bool:
        """Whether it can run another cell."""
        return not self._why

    @property
    def idle_since(self) -> float:
        """When the last cell or file request ended, on the event loop's clock; infinity while one is going on."""
        return math.inf if self._requests else self._used_at

    def lost(self, reason: str) -> None:
        """The engine knows that the session is over, and why (words, for CellEnd.why): kill it and end its cell."""
        self._engine_says = self._engine_says or reason
        self._lose(reason)

    def end_if_old(self, taken_at: float, ttl_s: float, idle_s: float) -> None:
        """End it when it was given away `ttl_s` seconds ago, or has run nothing for `idle_s`. taken_at: on the event
        loop's clock."""
        now = self._loop.time()
        if now - taken_at >= ttl_s:
            self.lost("it was as old as a session may become")
        elif now - self.idle_since >= idle_s:
            self.lost("it ran nothing for too long")

    async def close(self) -> None:
        """Kill everything in it, and wait for `gone`."""
        self._lose("it was closed")
        self._reading.cancel()
        await asyncio.wait([self._reading])
        await self._gone()

    # --- cells

    async def run(self, code: str, timeout_s: float) -> AsyncGenerator[CellOutput, None]:
        """See `contracts.CodeSession`."""
        told = code.encode("utf-8", "replace")
        if not self.alive:
            yield CellEnd("lost", self._reason())
            return
        if len(told) > BODY_BYTES:
            yield CellEnd("error", "the code is longer than 1 MB")
            return
        cell, interrupt = self._begin(told, timeout_s)
        try:
            over = False
            while not over:
                await cell.news()
                over = cell.over
                for output in cell.shown():
                    yield output
            yield await self._end_of(cell)
        finally:
            interrupt("nobody waits for it any more", CLOSE_GRACE_S)
            try:
                while not cell.over:
                    await cell.news()
            finally:
                if not cell.over:  # cancelled once more, while it was waited for
                    self._lose("nobody waited for its cell to end")

    def _begin(self, code: bytes, timeout_s: float) -> tuple[Cell, Callable[[str, float], None]]:
        """Send a cell. Returns it with the function that interrupts it, given the cause in words and the grace."""
        assert self._cell is None, "one cell at a time"

        def interrupt(cause: str, grace_s: float = GRACE_S) -> None:
            kill_at = self._loop.time() + grace_s
            if cell.over or kill_at >= cell.kill_at:
                return
            if not cell.cause:
                cell.cause = cause
                self._send("interrupt", request)
            cell.kill_at = kill_at
            self._set_timer(grace_s, lambda: self._lose(f"{cause}, and would not be interrupted"))

        cell = Cell(self._text_bytes, lambda: interrupt(f"it showed more than {FLOOD} times what is kept"))
        self._cell = cell
        self._on_busy()
        request = self._ask("exec", cell, code)
        self._set_timer(timeout_s, lambda: interrupt(f"it ran for more than {timeout_s:g} seconds"))
        return cell, interrupt

    def _set_timer(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, then)

    async def _end_of(self, cell: Cell) -> CellEnd:
        if cell.done is None or cell.done.status == "died":
            await self._hear_why()
            return CellEnd("lost", self._reason(), cell.clipped_bytes)
        if cell.done.status == "ok":
            return CellEnd("ok", clipped_bytes=cell.clipped_bytes)
        # Without an interrupt of ours the cell has raised it itself.
        return CellEnd("timeout" if cell.cause else "error", cell.cause, cell.clipped_bytes)

    async def _hear_why(self) -> None:
        if not self._engine_says:
            with suppress(TimeoutError):
                async with asyncio.timeout(GONE_S):
                    await self._gone()

    # --- files

    async def put(self, name: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        """See `contracts.CodeSession`. Raises ValueError for a name that is not clean (`frames.is_clean_name`)."""
        self._check()
        if not is_clean_name(name):
            raise ValueError(f"{name!r} cannot be the name of a file in a session")
        reply = Reply(Ok)
        request = self._ask("put", reply, name=name, size=size_bytes)
        last = "drop"
        try:
            async for chunk in chunks:
                await self._send_chunk(request, chunk)
                if reply.over:
                    break
            last = "end"
        finally:
            self._send(last, request)
        await self._answered(reply, ANSWER_S)
        if reply.failed == "full":
            raise SandboxFull(f"{name} does not fit: the session's disk is full.")
        if reply.failed:
            raise SandboxFull(f"{name} cannot be put there: something else is in its place.")

    async def _send_chunk(self, request: int, chunk: bytes) -> None:
        for start in range(0, len(chunk), PUT_BYTES):
            self._send("bytes", request, chunk[start : start + PUT_BYTES])
            try:
                async with asyncio.timeout(ANSWER_S):
                    await self._writer.drain()
            except (TimeoutError, OSError):
                self._lose("it takes no file")
            self._check()

    async def list_files(self) -> list[SandboxFile]:
        """See `contracts.CodeSession`."""
        self._check()
        listing = Listing()
        self._ask("list", listing)
        await self._answered(listing, ANSWER_S)
        return listing.files

    async def get(self, name: str, max_bytes: int) -> AsyncGenerator[bytes, None]:
        """See `contracts.CodeSession`. A file larger than `max_bytes` is FileNotFoundError, too: it has grown since."""
        self._check()
        if not is_clean_name(name):
            raise FileNotFoundError(name)
        download = Download(max_bytes)
        self._ask("get", download, name=name, max=max_bytes)
        try:
            over = False
            while not over:
                await self._news_of(download)
                over = download.over
                while chunk := download.next_chunk():
                    yield chunk
        finally:
            download.drop()
        self._check()
        if download.failed:
            raise FileNotFoundError(name)

    # --- the wire

    def _ask(self, kind: str, request: Request, body: bytes = b"", **fields: str | int) -> int:
        self._last_id += 1
        self._requests[self._last_id] = request
        self._send(kind, self._last_id, body, **fields)
        return self._last_id

    def _send(self, kind: str, request: int, body: bytes = b"", **fields: str | int) -> None:
        if self.alive:
            self._writer.write(pack({"t": kind, "id": request, **fields}, body))

    async def _answered(self, request: Request, timeout_s: float) -> None:
        """Wait until a request is over. Raises SessionLost."""
        try:
            async with asyncio.timeout(timeout_s):
                while not request.over:
                    await request.news()
        except TimeoutError:
            self._lose("it does not answer")
        self._check()

    async def _news_of(self, request: Request) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                await request.news()
        except TimeoutError:
            self._lose("it does not answer")

    async def _read(self) -> None:
        """Take what the session sends until it ends, or is ended for what it sends."""
        frames = Frames(read_header)
        why = "it could not be read"
        try:
            while self.alive and (data := await self._reader.read(READ_BYTES)):
                self._missed_beats = 0
                for answer, body in frames.feed(data):
                    await self._take(answer, body)
            why = "it has ended"
        except BadFrame as fault:
            log.warning("a session of the code interpreter was ended: %s", one_line(str(fault)))
            why = "it has broken its connection"
        except OSError:
            why = "it has ended"
        finally:  # whatever it was: what nobody reads must not go on
            self._lose(why)

    async def _take(self, answer: Answer, body: bytes) -> None:
        if isinstance(answer, Beat):
            self._take_beat(body)
            return
        request = self._requests.get(answer.id)
        if request is None:
            raise BadFrame("it answers what was not asked")
        request.take(answer, body)
        if isinstance(answer, Done) and answer.status == "died":
            self._lose(_death(answer))
        self._waits_for_room = True
        await request.room()
        self._waits_for_room = False
        if request.over:
            self._settle(answer.id)

    def _beat(self) -> None:
        """Ask for a sign of life, and count those that did not come. What we do not read cannot be missed."""
        self._missed_beats += bool(self._beats_due) and not self._waits_for_room
        if self._missed_beats >= MISSED_BEATS:
            self._lose("its host gives no sign of life")
            return
        self._send("beat", 0)
        self._beats_due += 1
        self._beating = self._loop.call_later(self._beat_s, self._beat)

    def _take_beat(self, body: bytes) -> None:
        if not self._beats_due or body:
            raise BadFrame("it gives a sign of life that nobody has asked for")
        self._beats_due -= 1

    def _settle(self, number: int) -> None:
        """A request is over."""
        request = self._requests.pop(number, None)
        self._used_at = self._loop.time()
        if request is self._cell is not None:
            self._cell = None
            if self._timer:
                self._timer.cancel()
            self._on_idle()

    def _lose(self, why: str) -> None:
        """The session is over: kill it, and tell all who wait. The first reason stands, but for the engine's."""
        if not self.alive:
            return
        self._why = why
        if self._beating:
            self._beating.cancel()
        self._kill()
        self._writer.transport.abort()
        for number, request in list(self._requests.items()):
            request.finish()
            self._settle(number)

    def _check(self) -> None:
        if not self.alive:
            raise SessionLost(f"The session is over: {self._reason()}.")

    def _reason(self) -> str:
        return self._engine_says or self._why


def _death(done: Done) -> str:
    """How a worker has died, in words."""
    if done.broke:
        return "it has broken its connection"
    if done.exit >= 0:
        return f"its code ended the process (exit code {done.exit})"
    if done.exit == -signal.SIGSYS:
        return "its code used a system call that is not allowed"
    if done.exit == -signal.SIGKILL:
        return "its process was killed"
    return f"its process crashed ({_SIGNALS.get(-done.exit, -done.exit)})"


_SIGNALS = {number.value: number.name for number in signal.Signals}
