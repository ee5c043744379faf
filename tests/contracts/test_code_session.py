"""What `contracts.CodeSession` promises, whatever code runs in it.

ENGINES gives sessions of each kind at hand. The unjailed one is the agent in a plain child process: it shows that
agent and session keep their word without a wall around them, and is never built by the product. The one that is
alone has a pid namespace to itself, as in the product, and no more. The remote one is the engine `remote` with the
program of a pod, and no pod around it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

import afterglow.sandbox
from afterglow.contracts import CellEnd, CodeSession, Logs, Picture
from afterglow.errors import SandboxFull, SessionLost
from afterglow.sandbox.remote import RemoteEngine
from afterglow.sandbox.session import Session
from afterglow.settings import load
from tests.contracts.pods import TOKEN, fake_pod

START = """
import os, sys
sys.path.insert(0, sys.argv[1])
from guest import agent
agent.run(int(sys.argv[2]), int(sys.argv[2]), sys.argv[3])
os._exit(0)
"""
PYTHON = Path(load().sandbox_env) / "bin/python" if load().sandbox_env else Path(sys.executable)
OUTPUT_KB = 16


def family(pid: int) -> set[int]:
    """A process and all that came from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(entry.name))
    found, waiting = {pid}, [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found.update(new)
        waiting += new
    return found


def end_family(pid: int) -> None:
    """Kill a process and all that came from it; without a pid namespace it takes more than one look."""
    for _ in range(3):
        for member in family(pid):
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGSTOP)
    for member in family(pid):
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


@asynccontextmanager
async def unjailed(folder: Path, *launcher: str) -> AsyncGenerator[Session]:
    """A session that nothing holds back; its `/mnt/data` is `folder`. launcher: what starts its agent."""
    ours, theirs = socket.socketpair()
    guest = str(Path(afterglow.sandbox.__file__).parent)
    process = subprocess.Popen(  # noqa: ASYNC220  its pidfd-like `wait` is what `gone` needs, and it takes a millisecond
        [*launcher, str(PYTHON), "-I", "-B", "-c", START, guest, str(theirs.fileno()), str(folder)],
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()

    def kill() -> None:
        if process.poll() is None:
            end_family(process.pid)

    async def gone() -> None:
        await asyncio.to_thread(process.wait)

    session = Session(*await asyncio.open_connection(sock=ours), kill=kill, gone=gone, output_kb=OUTPUT_KB)
    try:
        await session.start(1 << 30, 64)
        yield session
    finally:
        await session.close()


def alone(folder: Path) -> AbstractAsyncContextManager[Session]:
    """A session whose agent is pid 1."""
    namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no pid namespace can be had here")
    return unjailed(folder, *namespace)


@asynccontextmanager
async def remote(folder: Path) -> AsyncGenerator[CodeSession]:
    """A session in a pod that is a process on this machine, filtered as in the product."""

    async def holds(_session: CodeSession, _processes: int, _disk_mb: int) -> list[str]:
        return []

    settings = load({"sandbox_token": TOKEN, "cell_output_kb": OUTPUT_KB}, environ={})
    async with fake_pod(folder, settings) as started:
        engine = RemoteEngine(dataclasses.replace(settings, sandbox_url=f"tcp://127.0.0.1:{started.port}"), holds)
        try:
            assert (await engine.settled()).state == "on", engine.status
            await started.free()
            yield await engine.open()
        finally:
            await engine.close()


ENGINES: dict[str, Callable[[Path], AbstractAsyncContextManager[CodeSession]]] = {
    "unjailed": unjailed,
    "alone": alone,
    "remote": remote,
}
SLOW = ("alone", "remote")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ENGINES])
async def session(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[CodeSession]:
    async with ENGINES[request.param](tmp_path) as opened:
        yield opened


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afterglow.sandbox.session.GRACE_S", 0.3)


class Ran(NamedTuple):
    """What a cell has shown, and how it ended."""

    text: str
    pictures: list[bytes]
    end: CellEnd


async def run(session: CodeSession, code: str, timeout_s: float = 30.0) -> Ran:
    outputs = [output async for output in session.run(code, timeout_s)]
    *shown, end = outputs
    assert isinstance(end, CellEnd)
    assert not any(isinstance(output, CellEnd) for output in shown)
    text = "".join(output.text for output in shown if isinstance(output, Logs))
    return Ran(text, [output.data for output in shown if isinstance(output, Picture)], end)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def names(session: CodeSession) -> set[str]:
    return {file.name for file in await session.list_files()}


async def read(session: CodeSession, name: str, max_bytes: int = 1 << 20) -> bytes:
    return b"".join([chunk async for chunk in session.get(name, max_bytes)])


# --- cells


async def test_variables_are_kept(session: CodeSession) -> None:
    """What one cell defines the next one has, and the last expression's value is shown."""
    assert await run(session, "x = 6") == Ran("", [], CellEnd("ok"))
    assert await run(session, "x * 7") == Ran("42\n", [], CellEnd("ok"))


async def test_output_comes_in_order(session: CodeSession) -> None:
    """stdout, stderr, child processes, pictures and the result come in the order in which they were made."""
    outputs = [
        output
        async for output in session.run(
            "import os, sys\n"
            "print('one')\n"
            "print('two', file=sys.stderr)\n"
            "os.system('echo three')\n"
            "class Dot:\n    def _repr_png_(self): return b'\\x89PNG\\r\\n\\x1a\\n' + bytes(300_000)\n"
            "display(Dot())\n"
            "print('four')\n"
            "5",
            30,
        )
    ]
    shown = "".join("<picture>" if isinstance(o, Picture) else o.text for o in outputs if not isinstance(o, CellEnd))
    assert shown == "one\ntwo\nthree\n<picture>four\n5\n"


async def test_output_comes_while_the_cell_runs(session: CodeSession) -> None:
    """What is printed is there before the cell has ended."""
    async with aclosing(session.run("import time\nprint('here')\ntime.sleep(100)", 100)) as outputs:
        assert await anext(outputs) == Logs("here\n")


async def test_an_exception_is_told_and_ends_only_the_cell(session: CodeSession) -> None:
    """A cell that raises shows a traceback with its own lines and none of ours, and the next one runs."""
    ran = await run(session, "def f(x):\n    return 1 / x\nf(0)")
    assert ran.end == CellEnd("error")
    assert 'File "<cell 1>", line 3, in <module>\n    f(0)\n' in ran.text
    assert ran.text.endswith("ZeroDivisionError: division by zero\n")
    assert "cells.py" not in ran.text
    assert (await run(session, "f(1)")).text == "1.0\n"


async def test_a_cell_has_its_time(session: CodeSession) -> None:
    """At the end of its time a cell is interrupted, says where it was, and its variables are kept."""
    ran = await run(session, "x = 1\nwhile True: x += 1", 0.3)
    assert ran.end.status == "timeout"
    assert "KeyboardInterrupt" in ran.text
    assert (await run(session, "x > 1")).text == "True\n"


@pytest.mark.slow
async def test_output_does_not_stretch_the_time(session: CodeSession) -> None:
    """A drip of output keeps nobody from noticing that the time is over."""
    ran = await run(session, "import time\nwhile True:\n    print('x'); time.sleep(0.003)", 0.5)
    assert ran.end.status == "timeout"
    assert session.alive


async def test_code_that_would_not_be_interrupted_loses_the_session(session: CodeSession) -> None:
    """Code that goes on after the interrupt is killed from outside, and why is told."""
    code = (
        "import time\nwhile True:\n    try:\n        while True: time.sleep(0.01)\n    except KeyboardInterrupt: pass"
    )
    ran = await run(session, code, 0.2)
    assert (ran.end.status, session.alive) == ("lost", False)
    assert "would not be interrupted" in ran.end.why


async def test_a_cell_may_be_abandoned(session: CodeSession) -> None:
    """Closing the generator interrupts the cell; the session and its variables stay."""
    async with aclosing(session.run("x = 1\nprint('here')\nwhile True: pass", 100)) as outputs:
        await anext(outputs)
    assert session.alive
    assert (await run(session, "x")).text == "1\n"


@pytest.mark.slow
async def test_an_abandoned_cell_that_resists_is_killed(session: CodeSession) -> None:
    """Closing the generator of code that would not be interrupted ends the session."""
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('here')\nwhile True: pass"
    async with aclosing(session.run(code, 100)) as outputs:
        await anext(outputs)
    assert not session.alive


async def test_a_cancelled_run_leaves_nothing_running(session: CodeSession) -> None:
    """The cell of a task that is cancelled is interrupted like one that is closed."""
    started = asyncio.Event()

    async def follow() -> None:
        async for _ in session.run("x = 1\nprint('here')\nwhile True: pass", 100):
            started.set()

    task = asyncio.create_task(follow())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await run(session, "x")).text == "1\n"


@pytest.mark.slow
async def test_a_slow_listener_misses_nothing(session: CodeSession) -> None:
    """Output that comes while nobody takes it, and the end with it, is there later."""
    shown = ""
    async for output in session.run("for i in range(50): print(i, flush=True)", 30):
        await asyncio.sleep(0.05)
        shown += output.text if isinstance(output, Logs) else ""
    assert shown == "".join(f"{i}\n" for i in range(50))


async def test_what_cannot_be_decoded_is_marked(session: CodeSession) -> None:
    """Bytes that are no UTF-8, NUL and lone surrogates become U+FFFD; a character may come in two pieces."""
    code = (
        "import os, sys, time\n"
        "os.write(1, b'a\\xff\\x00b')\n"
        "os.write(1, '€'.encode()[:1]); time.sleep(0.1); os.write(1, '€'.encode()[1:])\n"
        "print('\\ud800')"
    )
    assert (await run(session, code)).text == "a\ufffd\ufffdb€\ufffd\n"


async def test_too_much_text_is_clipped(session: CodeSession) -> None:
    """Of a cell's text only so much is kept, the rest is counted; the text of an exception is kept in any case."""
    ran = await run(session, "print('x' * 40_000)\n1 / 0")
    kept, _, error = ran.text.partition("Traceback")
    assert set(kept) == {"x"}
    assert len(kept) + ran.end.clipped_bytes == 40_001
    assert ran.end.clipped_bytes > 0
    assert "ZeroDivisionError" in error


@pytest.mark.slow
async def test_a_flood_of_text_is_interrupted(session: CodeSession) -> None:
    """A cell that prints without end is interrupted long before its time is over."""
    ran = await run(session, "x = 1\nwhile True: print('x' * 1000)", 100)
    assert ran.end.status == "timeout"
    assert ran.end.clipped_bytes > 0
    assert (await run(session, "x")).text == "1\n"


@pytest.mark.slow
async def test_a_flood_of_pictures_is_clipped(session: CodeSession) -> None:
    """Of too many pictures, or too large ones, only so many are kept."""
    code = (
        "class Picture:\n"
        "    def __init__(self, size): self.size = size\n"
        "    def _repr_png_(self): return b'\\x89PNG\\r\\n\\x1a\\n' + bytes(self.size)\n"
        "display(*[Picture(10)] * 50)\n"
        "display(Picture(9 << 20))"
    )
    ran = await run(session, code)
    assert len(ran.pictures) == 20
    assert ran.end == CellEnd("ok", clipped_bytes=30 * 18)
    assert "too large" in ran.text


async def test_a_result_that_is_too_long_is_cut(session: CodeSession) -> None:
    """Of a long repr the beginning and the end are shown."""
    ran = await run(session, "list(range(100_000))")
    assert ran.text.startswith("[0, 1, 2")
    assert ran.end.status == "ok"


@pytest.mark.parametrize(
    "code", ["import os; os._exit(3)", "import os; os.kill(os.getpid(), 11)", "import os; os.abort()"]
)
async def test_a_death_is_told(session: CodeSession, code: str) -> None:
    """A worker that dies ends its cell as lost, with what it had printed; the session is over and says so."""
    ran = await run(session, f"print('here', flush=True)\n{code}")
    assert (ran.text, ran.end.status, session.alive) == ("here\n", "lost", False)
    assert ran.end.why
    assert (await run(session, "1")).end.status == "lost"
    with pytest.raises(SessionLost):
        await session.list_files()
    with pytest.raises(SessionLost):
        await session.put("a", 1, chunks(b"a"))
    with pytest.raises(SessionLost):
        await read(session, "a")


@pytest.mark.slow
async def test_a_death_between_cells_is_told(session: CodeSession) -> None:
    """When a thread ends the process between two cells, the second hears that the variables are gone."""
    await run(session, "import os, threading\nthreading.Timer(0.1, os._exit, (0,)).start()")
    await asyncio.sleep(0.5)
    assert (await run(session, "1")).end.status == "lost"


async def test_more_memory_than_there_is(session: CodeSession) -> None:
    """An array that does not fit is a MemoryError of the cell, and its variables are kept."""
    ran = await run(session, "x = 1\nbytearray(1 << 36)")
    assert ran.end == CellEnd("error")
    assert ran.text.endswith("MemoryError\n")
    assert (await run(session, "x")).text == "1\n"


async def test_what_a_cell_leaves_behind_is_ended(session: CodeSession) -> None:
    """Processes that a cell has started do not outlive it, whatever they made of themselves."""
    started = await run(
        session,
        "import subprocess, sys\n"
        "first = subprocess.Popen(['sleep', '1000'])\n"
        "second = subprocess.Popen(['sh', '-c', 'setsid sleep 1000 & sleep 1000'])\n"
        "[first.poll(), second.poll()]",
    )
    assert started.text == "[None, None]\n"
    assert (await run(session, "[first.wait(20), second.wait(20)]")).text == "[-9, -9]\n"


@pytest.mark.slow
async def test_output_between_cells_comes_with_the_next(session: CodeSession) -> None:
    """A thread that prints after its cell has ended disturbs no file request, and is heard in the next cell."""
    await run(session, "import threading\nthreading.Timer(0.2, print, ('late',)).start()")
    await asyncio.sleep(0.4)
    assert await names(session) == set()
    assert (await run(session, "2")).text == "late\n2\n"


@pytest.mark.slow
async def test_a_thread_that_prints_for_ever_is_no_harm(session: CodeSession) -> None:
    """Beside a thread that never stops printing, cells end, and files can be listed."""
    endless = "import threading\ndef go():\n    while True: print('x' * 100)\nthreading.Thread(target=go).start()"
    assert (await run(session, endless)).end.status in ("ok", "timeout")
    assert await names(session) == set()
    assert (await run(session, "1", 2)).end.status in ("ok", "timeout")


async def test_closing_ends_everything(session: CodeSession) -> None:
    """After close the session is over; closing again, and closing beside a running cell, does no harm."""
    async with aclosing(session.run("print('here')\nwhile True: pass", 100)) as outputs:
        await anext(outputs)
        await session.close()
        assert [output.status for output in [output async for output in outputs] if isinstance(output, CellEnd)] == [
            "lost"
        ]
    await session.close()
    assert not session.alive


# --- what attacks the agent

FRAME = """
import json, os, struct, threading, time
def frame(header, body=b""):
    told = json.dumps(dict(header, n=len(body))).encode()
    return struct.pack("!I", len(told)) + told + body
def forge(*frames):
    for data in frames:
        os.write(3, data)
"""
FORGED = {
    "a file": 'forge(frame({"t": "files", "id": 2}, b"[]"))',
    "readiness": 'forge(frame({"t": "ready", "id": 2}))',
    "another cell's end": 'forge(frame({"t": "done", "id": 9, "status": "ok"}))',
    "a status of its own": 'forge(frame({"t": "done", "id": 2, "status": "great"}))',
    "an end with a body": 'forge(frame({"t": "done", "id": 2, "status": "ok"}, b"x"))',
    "no type": 'forge(frame({"id": 2}))',
    "no id": 'forge(frame({"t": "done", "status": "ok"}))',
    "odd values": 'forge(frame({"t": ["done"], "id": {}, "status": None}))',
    "a kind of picture": 'forge(frame({"t": "picture", "id": 2, "mime": "text/html", "last": True}, b"x"))',
    "an empty picture": 'forge(frame({"t": "picture", "id": 2, "mime": "image/png", "last": True}))',
    "a picture that is none": 'forge(frame({"t": "picture", "id": 2, "mime": "image/png", "last": True}, b"GIF"))',
    "a list": 'forge(struct.pack("!I", 2) + b"[]")',
    "no JSON": 'forge(struct.pack("!I", 4) + b"\\xff\\xff\\xff\\xff")',
    "deep JSON": 'forge(struct.pack("!I", 60_000) + b"[" * 60_000)',
    "a large number": 'forge(struct.pack("!I", 10_006) + b\'{"n":1\' + b"0" * 9_999 + b"}")',
    "a long header": 'forge(b"\\xff\\xff\\xff\\xff")',
    "a long body": 'forge(struct.pack("!I", 16) + b\'{"n":1073741824}\')',
    "a negative body": 'forge(struct.pack("!I", 8) + b\'{"n":-1}\')',
    "half a frame": 'forge(b"\\x00\\x00\\xff\\xff{")',
    "closed files": "os.closerange(3, 30)",
    "a child that stays": "if os.fork(): os._exit(0)",
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", FORGED)
async def test_a_worker_that_speaks_no_sense_loses_the_session(session: CodeSession, attack: str) -> None:
    """Whatever a cell writes to the agent, the cell ends, as lost, and everything is over."""
    ran = await run(session, f"{FRAME}\n{FORGED[attack]}\nwhile True: time.sleep(1)", 1.0)
    assert (ran.end.status, session.alive) == ("lost", False)


@pytest.mark.slow
async def test_a_forged_end_deceives_only_its_own_session(session: CodeSession) -> None:
    """A cell may claim to have ended; it never answers for the next one."""
    ran = await run(session, f'{FRAME}\nforge(frame({{"t": "done", "id": 2, "status": "ok"}}))\nwhile True: pass', 1.0)
    assert ran.end.status == "ok"
    assert (await run(session, "1", 0.3)).end.status == "lost"


@pytest.mark.slow
async def test_forged_frames_between_cells_are_no_answers(session: CodeSession) -> None:
    """What a thread writes to the agent while files are listed does not come as the list."""
    await run(session, f"{FRAME}\nthreading.Timer(0.2, forge, (frame({{'t': 'files', 'id': 3}}, b'[]'),)).start()")
    await session.put("a", 1, chunks(b"a"))
    for _ in range(100):
        assert await names(session) == {"a"}
        await asyncio.sleep(0.005)
    assert (await run(session, "1")).end.status == "lost"


# --- files


async def test_files_go_in_and_out(session: CodeSession) -> None:
    """What is put is there for the cells, what they write can be listed and read."""
    data = bytes(range(256)) * 4000
    await session.put("in.bin", len(data), chunks(data[:10], data[10:]))
    await run(session, "open('out.bin', 'wb').write(open('in.bin', 'rb').read()[::-1])")
    listed = {file.name: file for file in await session.list_files()}
    assert {name: file.size_bytes for name, file in listed.items()} == {"in.bin": len(data), "out.bin": len(data)}
    assert listed["out.bin"].mtime_ns > 0
    assert await read(session, "out.bin", len(data)) == data[::-1]


async def test_a_file_takes_the_place_of_another(session: CodeSession) -> None:
    """A put replaces a file of that name, and makes the folders that are missing."""
    await session.put("some/where/a.txt", 3, chunks(b"one"))
    await session.put("some/where/a.txt", 5, chunks(b"other"))
    assert await read(session, "some/where/a.txt") == b"other"


async def test_an_empty_file(session: CodeSession) -> None:
    """A file may have no bytes."""
    await session.put("empty", 0, chunks())
    assert await read(session, "empty") == b""


async def test_a_file_that_does_not_fit(session: CodeSession) -> None:
    """A put that is larger than the disk, or that a folder is in the way of, is refused; the session goes on."""
    with pytest.raises(SandboxFull):
        await session.put("large", 1 << 60, chunks(b"x"))
    await run(session, "import os; os.mkdir('folder'); os.mkdir('folder/inner')")
    with pytest.raises(SandboxFull):
        await session.put("folder", 1, chunks(b"x"))
    await session.put("file", 1, chunks(b"x"))
    with pytest.raises(SandboxFull):
        await session.put("file/below", 1, chunks(b"x"))
    assert await names(session) == {"file"}


async def test_a_put_whose_bytes_fail_keeps_nothing(session: CodeSession) -> None:
    """What the chunks raise is raised, and no file appears."""

    async def failing() -> AsyncIterator[bytes]:
        yield b"x" * 10
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await session.put("a", 20, failing())
    assert await names(session) == set()
    assert (await run(session, "import os; os.listdir()")).text == "[]\n"


async def test_a_file_is_there_when_it_is_whole(session: CodeSession) -> None:
    """While a file is on its way no list shows it, nor what takes its place."""
    seen: list[set[str]] = []

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(3):
            seen.append(await names(session))
            yield b"x"

    await session.put("a", 3, slowly())
    assert seen == [set()] * 3
    assert await names(session) == {"a"}


async def test_files_are_served_while_a_cell_runs(session: CodeSession) -> None:
    """A cell that loops holds up no file request."""
    async with aclosing(session.run("print('here')\nwhile True: pass", 100)) as outputs:
        await anext(outputs)
        await session.put("a", 1, chunks(b"a"))
        assert await names(session) == {"a"}
        assert await read(session, "a") == b"a"


@pytest.mark.parametrize(
    "name", ["nothing", "no/folder", "link", "folder", "fifo", "linked/file", "a\nb", "../x", "/etc/passwd"]
)
async def test_only_files_can_be_read(session: CodeSession, name: str) -> None:
    """What is missing, no regular file, behind a link or outside is not found, and nothing waits for it."""
    await run(
        session,
        "import os\n"
        "os.mkdir('folder'); open('folder/file', 'w').close(); os.symlink('folder', 'linked')\n"
        "os.symlink('/proc/self/fd/3', 'link')\n"
        "try: os.mkfifo('fifo')\n"
        "except PermissionError: pass",
    )
    with pytest.raises(FileNotFoundError):
        await read(session, name)
    assert await names(session) == {"folder/file"}


async def test_a_file_larger_than_asked_for_is_not_sent(session: CodeSession) -> None:
    """Not even a hole of a terabyte is read beyond what was asked for."""
    await run(session, "open('large', 'w').truncate(5_000_000)")
    with pytest.raises(FileNotFoundError):
        await read(session, "large", 4_999_999)


async def test_a_download_may_be_given_up(session: CodeSession) -> None:
    """Closing a download in the middle disturbs nothing that comes after it."""
    await run(session, "open('large', 'w').truncate(20_000_000)")
    async with aclosing(session.get("large", 1 << 30)) as parts:
        assert await anext(parts)
    assert (await run(session, "1")).text == "1\n"
    assert await names(session) == {"large"}


async def test_unclean_names_are_left_out(session: CodeSession) -> None:
    """Files with names that no caller should ever see are not listed, the others are."""
    await run(
        session,
        "for name in [b'new\\nline', b'\\xff', '\u202etxt.exe'.encode(), b'C:\\\\x', b'\\x1b[31m', 'grün'.encode()]:\n"
        "    open(name, 'w').close()\n"
        "import os\n"
        "for depth in range(60):\n    os.mkdir('deep'); os.chdir('deep'); open('file', 'w').close()\n",
    )
    found = await names(session)
    assert {name for name in found if not name.startswith("deep/")} == {"grün"}
    assert len(found) == 32


@pytest.mark.slow
async def test_a_tree_without_end_is_listed_to_a_point(session: CodeSession, tmp_path: Path) -> None:
    """Folders within folders, and more files than anyone asked for, cost no more than a bounded list."""
    try:
        await run(
            session,
            "import os\nhere = os.getcwd()\n"
            "for i in range(1200): os.mkdir('a'); os.chdir('a')\n"
            "os.chdir(here)\nfor i in range(10_100): os.close(os.open(f'{i}', os.O_CREAT))",
        )
        assert len(await session.list_files()) == 10_000
        assert (await run(session, "1")).text == "1\n"
    finally:
        await session.close()
        empty(tmp_path)


def empty(folder: Path) -> None:
    """Delete what is in it, at any depth: what a folder holds is moved up before it goes, so no path becomes long."""
    top = os.open(folder, os.O_DIRECTORY)
    numbers = count()
    while names := os.listdir(top):
        for name in names:
            try:
                os.unlink(name, dir_fd=top)
            except IsADirectoryError:
                inner = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                for below in os.listdir(inner):
                    os.rename(below, f"moved up {next(numbers)}", src_dir_fd=inner, dst_dir_fd=top)
                os.close(inner)
                os.rmdir(name, dir_fd=top)
    os.close(top)


@pytest.mark.slow
async def test_a_list_while_files_come_and_go(session: CodeSession) -> None:
    """Files and folders that vanish while they are looked at are left out, and nothing else happens."""
    churn = (
        "import os, shutil\nprint('here')\n"
        "while True:\n"
        "    for i in range(50): os.makedirs(f'{i}/{i}', exist_ok=True); open(f'{i}/{i}/file', 'w').close()\n"
        "    for i in range(50): shutil.rmtree(f'{i}')\n"
    )
    async with aclosing(session.run(churn, 100)) as outputs:
        await anext(outputs)
        for _ in range(30):
            await session.list_files()
    assert (await run(session, "1")).text == "1\n"


# --- libraries


@pytest.fixture
async def figures(session: CodeSession) -> CodeSession:
    """A session with matplotlib."""
    if (await run(session, "import numpy, pandas, matplotlib.pyplot as plt")).end.status != "ok":
        pytest.skip("no matplotlib in `sandbox_env`")
    return session


@pytest.mark.slow
async def test_figures_are_shown(figures: CodeSession) -> None:
    """Figures are shown where the cell says so, and at its end those that are open, each once."""
    ran = await run(figures, "plt.plot([1]); plt.show()\nplt.plot([2])\nplt.figure().gca().plot([3]);")
    assert [picture[:4] for picture in ran.pictures] == [b"\x89PNG"] * 3
    assert (await run(figures, "plt.get_fignums()")).text == "[]\n"
    assert len((await run(figures, "figure, axes = plt.subplots()\nfigure")).pictures) == 1
    assert len((await run(figures, "plt.plot([1])\n1 / 0")).pictures) == 1


@pytest.mark.slow
async def test_saving_a_figure_can_be_interrupted(figures: CodeSession) -> None:
    """A figure that takes for ever is interrupted as anything else, and gone when the next cell runs."""
    slow = "x = 1\nimport time\nplt.gca().draw = lambda *_: time.sleep(100)"
    assert (await run(figures, slow, 1.0)).end.status == "timeout"
    assert await run(figures, "x") == Ran("1\n", [], CellEnd("ok"))


@pytest.mark.slow
async def test_wide_tables_are_not_cut(figures: CodeSession) -> None:
    """A table of many columns is shown with all of them."""
    ran = await run(figures, "pandas.DataFrame({f'column{i}': [i] for i in range(14)})")
    assert ran.text.count("\n") == 2
    assert "..." not in ran.text


@pytest.mark.slow
async def test_interrupts_are_many(session: CodeSession) -> None:
    """However often cells are interrupted, at whatever moment, the session and its variables stay."""
    await run(session, "x = 1")
    for wait in range(12):
        ran = await run(session, "while True: print('x' * 10); display(1)", 0.02 + wait / 500)
        assert ran.end.status == "timeout"
        assert await run(session, "x") == Ran("1\n", [], CellEnd("ok"))
