"""The server's side of a session: whatever comes, a cell ends, memory is bounded, and what breaks is killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afterglow.contracts import CellEnd, CellOutput, Logs, Picture, SandboxFile
from afterglow.errors import SandboxFull, SessionLost
from afterglow.sandbox import session as session_module
from afterglow.sandbox.guest.frames import BODY_BYTES, IMAGE_BYTES, PNG, Frames, pack, parse_header
from afterglow.sandbox.session import Session

HELLO, FIRST = 1, 2


class Wire:
    """The far end: keeps what the session is sent, and says what the test wants."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        self.reader.set_transport(self)  # type: ignore[arg-type]
        self.transport = self
        self.reading = True
        self.sent: list[tuple[dict[str, Any], bytes]] = []
        self.came = asyncio.Event()
        self.calls: list[str] = []
        self.found = ""
        self._frames = Frames(parse_header)
        self.session: Session | None = None

    # what a StreamWriter and its transport do

    def write(self, data: bytes) -> None:
        self.sent += self._frames.feed(data)
        self.came.set()

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def abort(self) -> None:
        self.reader.feed_eof()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    # what the test does

    def says(self, kind: str, body: bytes = b"", *, id: int = FIRST, **fields: Any) -> None:
        self.reader.feed_data(pack({"t": kind, "id": id, **fields}, body))

    async def hears(self, kind: str) -> dict[str, Any]:
        """Wait until the session has sent such a frame, and return its header."""
        while True:
            for header, _ in self.sent:
                if header["t"] == kind:
                    return header
            self.came.clear()
            await self.came.wait()

    async def gone(self) -> None:
        self.calls.append("gone")
        if self.found and self.session:
            self.session.lost(self.found)

    def call(self, name: str) -> Any:
        return lambda: self.calls.append(name)


async def open_session(**options: Any) -> tuple[Session, Wire]:
    wire = Wire()
    session = Session(
        wire.reader,
        wire,  # type: ignore[arg-type]
        kill=wire.call("kill"),
        gone=wire.gone,
        on_busy=wire.call("busy"),
        on_idle=wire.call("idle"),
        **options,
    )
    wire.session = session
    wire.says("ready", id=HELLO)
    await session.start(1 << 30, 32)
    return session, wire


async def run(session: Session, timeout_s: float = 60.0) -> list[CellOutput]:
    async with asyncio.timeout(20):
        return [output async for output in session.run("code", timeout_s)]


async def run_against(session: Session, wire: Wire, *data: bytes) -> list[CellOutput]:
    """Run a cell, and give it these bytes and then the end of the connection."""
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    for part in data:
        if not wire.reader.at_eof() and session.alive:
            wire.reader.feed_data(part)
        await asyncio.sleep(0)
    wire.reader.feed_eof()
    return await running


# --- cells


async def test_what_a_cell_shows() -> None:
    """Text, pictures and the end come as they were sent; the engine hears when the session is busy."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    wire.says("logs", b"a" + "€".encode()[:2])
    await asyncio.sleep(0.01)
    wire.says("logs", "€".encode()[2:] + b"\0\xff")
    wire.says("image", PNG, mime="image/png", last=False)
    wire.says("image", b"rest", mime="image/png", last=True)
    wire.says("done", status="ok")
    assert await running == [
        Logs("a"), Logs("€\ufffd\ufffd"), Picture(PNG + b"rest"), CellEnd("ok"),
    ]  # fmt: skip
    assert wire.calls == ["busy", "idle"]
    await session.close()
    assert wire.calls == ["busy", "idle", "kill", "gone"]


async def test_text_is_clipped_and_counted() -> None:
    """Text beyond the limit is dropped, but for that of an exception."""
    session, wire = await open_session(output_kb=1)
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    for _ in range(10):
        wire.says("logs", b"x" * 200)
    wire.says("logs", b"Error", error=True)
    wire.says("done", status="error")
    *shown, end = await running
    assert "".join(output.text for output in shown if isinstance(output, Logs)) == "x" * 1024 + "Error"
    assert end == CellEnd("error", clipped_bytes=976)
    assert not [header for header, _ in wire.sent if header["t"] == "interrupt"]
    await session.close()


async def test_a_flood_is_interrupted_and_then_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more text than is kept is interrupted, and when that does not help, the session is killed."""
    monkeypatch.setattr(session_module, "GRACE_S", 0.05)
    session, wire = await open_session(output_kb=1)
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    for _ in range(9):
        wire.says("logs", b"x" * 1024)
    await wire.hears("interrupt")
    *_, end = await running
    assert isinstance(end, CellEnd)
    assert (end.status, end.clipped_bytes, session.alive) == ("lost", 8 * 1024, False)
    assert "would not be interrupted" in end.why
    await session.close()


async def test_frames_without_end_are_a_flood() -> None:
    """A frame for every byte is interrupted, too, and takes little memory while nobody looks."""
    session, wire = await open_session(output_kb=1024)
    async with aclosing(session.run("code", 60)) as outputs:
        first = asyncio.create_task(anext(outputs))
        await wire.hears("exec")
        frame = pack({"t": "logs", "id": FIRST}, b"x")
        for _ in range(101):
            wire.reader.feed_data(frame * 1000)
            await asyncio.sleep(0)
        await wire.hears("interrupt")
        wire.says("done", status="interrupted")
        await first
        rest = [output async for output in outputs]
        assert rest[-1] == CellEnd("timeout", "it showed more than 8 times what is kept")
    await session.close()


async def test_pictures_are_bounded() -> None:
    """Too large a picture is dropped and counted, and so are too many."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    for _ in range(9):
        wire.says("image", PNG + bytes(BODY_BYTES - 8), mime="image/png", last=False)
        await asyncio.sleep(0.01)
    wire.says("image", b"x", mime="image/png", last=True)
    for _ in range(30):
        wire.says("image", PNG, mime="image/png", last=True)
    wire.says("image", PNG, mime="image/png", last=False)
    wire.says("done", status="ok")
    *pictures, end = await running
    assert pictures == [Picture(PNG)] * 19
    assert isinstance(end, CellEnd)
    assert end.clipped_bytes > IMAGE_BYTES
    await session.close()


async def test_the_time_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end the cell is interrupted, whatever it still shows; when it ends then, the session lives on."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session, timeout_s=0.05))
    await wire.hears("exec")
    while not any(header["t"] == "interrupt" for header, _ in wire.sent):
        wire.says("logs", b"x")
        await asyncio.sleep(0.003)
    wire.says("done", status="interrupted")
    assert (await running)[-1] == CellEnd("timeout", "it ran for more than 0.05 seconds")
    assert session.alive
    await session.close()


async def test_a_cell_that_interrupts_itself_is_an_error() -> None:
    """Without an interrupt of ours a KeyboardInterrupt is the cell's own."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    wire.says("done", status="interrupted")
    assert await running == [CellEnd("error")]
    await session.close()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"exit": 3}, "its code ended the process (exit code 3)"),
        ({"exit": -11}, "its process crashed (SIGSEGV)"),
        ({"exit": -60}, "its process crashed (60)"),
        ({"exit": -9}, "its process was killed"),
        ({"exit": -31}, "its code used a system call that is not allowed"),
        ({"exit": -9, "broke": True}, "it has broken its connection"),
    ],
)
async def test_a_death_in_words(fields: dict[str, Any], why: str) -> None:
    """How a worker has died is said in words."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    wire.says("done", status="died", **fields)
    assert await running == [CellEnd("lost", why)]
    await session.close()


async def test_the_engine_knows_better() -> None:
    """A reason that the engine finds, before or while the session's end is waited for, is the one that is told."""
    session, wire = await open_session()
    wire.found = "out of memory"
    assert await run_against(session, wire) == [CellEnd("lost", "out of memory")]
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    session.lost("it used the processor between cells")
    assert await running == [CellEnd("lost", "it used the processor between cells")]
    assert await run(session) == [CellEnd("lost", "it used the processor between cells")]


async def test_a_cell_that_nobody_waits_for_any_more() -> None:
    """Cancelled, it is waited for; cancelled once more, its session is lost, and no cell goes on unseen."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    running.cancel()
    await wire.hears("interrupt")
    assert session.alive
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "kill" in wire.calls
    assert await run(session) == [CellEnd("lost", "nobody waited for its cell to end")]
    await session.close()


async def test_code_that_is_too_long_is_not_sent() -> None:
    """More code than a frame holds is an error of the cell."""
    session, _ = await open_session()
    outputs = [output async for output in session.run("x" * (BODY_BYTES + 1), 60)]
    assert [output.status for output in outputs if isinstance(output, CellEnd)] == ["error"]
    assert session.alive
    await session.close()


# --- what is hostile

ANSWERS: dict[str, dict[str, Any]] = {
    "ready": {},
    "logs": {},
    "image": {"mime": "image/png", "last": True},
    "done": {"status": "ok"},
    "ok": {},
    "fail": {"reason": "full"},
    "bytes": {},
    "files": {},
    "end": {},
}
IDS = st.sampled_from([FIRST, FIRST, FIRST, HELLO, 0, 3, -1, 1 << 70])
ODD = st.sampled_from([None, -1, 1 << 70, "ok", "image/png", True, [], {}, 1.5, "\ud800"])
HEADERS = st.builds(
    lambda kind, number, odd: {"t": kind, **ANSWERS[kind], **odd, "id": number},
    st.sampled_from(list(ANSWERS)),
    IDS,
    st.dictionaries(
        st.sampled_from(["t", "id", "status", "mime", "last", "n", "error", "reason", "x"]), ODD, max_size=1
    ),
)
BODIES = st.sampled_from([b"", b"x", PNG, b"[]", b'[["a",1,2]]', b"[" * 10_000, b"\xff"])
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@MANY
@given(st.lists(st.binary(max_size=60), max_size=6))
async def test_any_bytes_end_a_cell(parts: list[bytes]) -> None:
    """Arbitrary bytes raise nothing: the cell ends, lost."""
    session, wire = await open_session()
    assert isinstance((await run_against(session, wire, *parts))[-1], CellEnd)
    assert not session.alive
    assert "kill" in wire.calls
    await session.close()


@MANY
@given(st.lists(st.tuples(HEADERS, BODIES), max_size=8))
async def test_any_frames_end_a_cell(frames: list[tuple[dict[str, Any], bytes]]) -> None:
    """Frames of any type with any ids and fields raise nothing: the cell ends, and comes once to its end."""
    session, wire = await open_session()
    shown = await run_against(session, wire, *(pack(header, body) for header, body in frames))
    assert [isinstance(output, CellEnd) for output in shown] == [False] * (len(shown) - 1) + [True]
    await session.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        (70_000).to_bytes(4, "big"),
        pack({"t": "logs", "id": FIRST, "n": BODY_BYTES + 1}),
        pack({"t": "logs", "id": FIRST}),
        pack({"t": "logs", "id": FIRST, "more": 1}, b"x"),
        pack({"t": "logs", "id": 77}, b"x"),
        pack({"t": "done", "id": HELLO, "status": "ok"}),
        pack({"t": "done", "id": FIRST, "status": "ok"}, b"x"),
        pack({"t": "done", "id": FIRST, "status": "great"}),
        pack({"t": "image", "id": FIRST, "mime": "image/svg+xml", "last": True}, b"<svg>"),
        pack({"t": "image", "id": FIRST, "mime": "image/png", "last": True}, b"<svg>"),
        pack({"t": "image", "id": FIRST, "mime": "image/png", "last": False}, PNG)
        + pack({"t": "image", "id": FIRST, "mime": "image/jpeg", "last": True}, PNG),
        pack({"t": "files", "id": FIRST}, b"[]"),
        pack({"t": "ok", "id": FIRST}),
    ],
)
async def test_what_does_not_fit_the_wire_ends_the_session(data: bytes) -> None:
    """A frame that is too long, unknown, of another request or of no sense is the last."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    wire.reader.feed_data(data)
    assert await running == [CellEnd("lost", "it has broken its connection")]
    assert "kill" in wire.calls
    await session.close()


async def test_frames_after_the_end_of_a_cell_end_the_session() -> None:
    """A cell that has ended has nothing more to say."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    wire.says("done", status="ok")
    wire.says("done", status="ok")
    assert await running == [CellEnd("ok")]
    assert await run(session) == [CellEnd("lost", "it has broken its connection")]
    await session.close()


async def test_a_fault_of_ours_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """When reading breaks for a reason that nobody foresaw, the session is over, and who waits is told."""
    session, wire = await open_session()
    running = asyncio.create_task(run(session))
    await wire.hears("exec")
    monkeypatch.setattr(session_module.Cell, "take", None)
    wire.says("done", status="ok")
    assert await running == [CellEnd("lost", "it could not be read")]
    assert "kill" in wire.calls
    with pytest.raises(TypeError):
        await session._reading
    await session.close()


async def test_what_is_logged_of_a_hostile_frame(caplog: pytest.LogCaptureFixture) -> None:
    """Of what does not fit the wire one short line is logged, without what a terminal would obey."""
    session, wire = await open_session()
    await run_against(session, wire, pack({"t": "done", "id": FIRST, "\x1b[2J\n" + "x" * 60_000: 1}))
    [message] = [record.getMessage() for record in caplog.records]
    assert "its header is none" in message
    assert message.isprintable()
    assert len(message) < 300
    await session.close()


# --- files


async def listing(body: bytes) -> list[SandboxFile]:
    session, wire = await open_session()
    asking = asyncio.create_task(session.list_files())
    await wire.hears("list")
    wire.says("files", body)
    wire.says("end")
    try:
        return await asking
    finally:
        await session.close()


async def test_unclean_names_are_left_out() -> None:
    """Only files whose names may pass are listed."""
    body = '[["a", 1, 2], ["../x", 1, 2], ["/x", 1, 2], ["a\\nb", 1, 2], ["\u202ex", 1, 2], ["b/c", 0, -5]]'
    assert await listing(body.encode()) == [SandboxFile("a", 1, 2), SandboxFile("b/c", 0, -5)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'[["a", -5, 2]]',
        b'[["a", 1, "x"]]',
        b'[["a", 1]]',
        b'[["\\ud800", 1, 2]]',
        b'[["\xff", 1, 2]]',
        b'[["a", 1, 1e400]]',
        b"[" * 100_000,
        b"[" + b",".join([b'["a",1,2]'] * 10_001) + b"]",
    ],
)
async def test_a_list_of_no_sense_ends_the_session(body: bytes) -> None:
    """A list that is malformed or too long is SessionLost."""
    with pytest.raises(SessionLost):
        await listing(body)


async def parts_of(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_refused_put_stops_sending() -> None:
    """When the disk is full in the middle, the rest is not sent."""
    session, wire = await open_session()
    given_up = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given_up
        while True:
            given_up += 1
            yield b"x" * 1000
            if given_up == 3:
                wire.says("fail", reason="full")
            await asyncio.sleep(0)

    with pytest.raises(SandboxFull):
        await session.put("a", 1 << 40, endless())
    assert given_up < 10
    assert session.alive
    with pytest.raises(ValueError, match="cannot be the name"):
        await session.put("../a", 1, parts_of(b"x"))
    await session.close()


async def test_an_agent_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """File requests do not wait for ever."""
    monkeypatch.setattr(session_module, "ANSWER_S", 0.05)
    for ask in (
        lambda session: session.list_files(),
        lambda session: session.put("a", 1, parts_of(b"x")),
        lambda session: anext(session.get("a", 1)),
    ):
        session, wire = await open_session()
        with pytest.raises(SessionLost):
            await ask(session)
        assert "kill" in wire.calls
        await session.close()


async def test_a_download_is_not_read_far_ahead() -> None:
    """What nobody has taken yet stays with the session, not in the server's memory."""
    session, wire = await open_session()
    async with aclosing(session.get("a", 100 << 20)) as chunks:
        first = asyncio.create_task(anext(chunks))
        await wire.hears("get")
        fed = 0
        while wire.reading:
            wire.says("bytes", bytes(BODY_BYTES))
            fed += 1
            await asyncio.sleep(0.001)
            assert fed < 10
        assert await first == bytes(BODY_BYTES)
    await session.close()


@pytest.mark.parametrize("sizes", [[11], [5, 6], [0]])
async def test_more_of_a_file_than_asked_for_ends_the_session(sizes: list[int]) -> None:
    """The agent does not say how much is read."""
    session, wire = await open_session()
    reading = asyncio.create_task(_read_all(session))
    await wire.hears("get")
    for size in sizes:
        wire.says("bytes", bytes(size))
    with pytest.raises(SessionLost):
        await reading
    await session.close()


async def _read_all(session: Session) -> bytes:
    return b"".join([chunk async for chunk in session.get("a", 10)])


async def test_a_session_that_does_not_start_is_lost() -> None:
    """Without a worker there is no session; and one that has ended before it was greeted is not waited for."""
    wire = Wire()
    session = Session(wire.reader, wire, kill=wire.call("kill"), gone=wire.gone)  # type: ignore[arg-type]
    wire.says("fail", id=HELLO, reason="other")
    with pytest.raises(SessionLost):
        await session.start(0, 1)
    await session.close()
    with pytest.raises(SessionLost):
        async with asyncio.timeout(5):
            await session.start(0, 1)
