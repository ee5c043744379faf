"""What an outside review found in the prototype, finding by finding: each test would fail on what was found there.

By its numbers: 1 wedges and links, 2 signals to the group, 3 names and the guard, 4 hidden memory, 5 memory of the
server, 6 a drip, 7 forged frames, 8 the mode without namespaces, 9 failing forks, 11 core dumps, 12 processors, 13 data
of others, 14 users, 15 accidents, 16 chance, 17 locks, 21 sparse files (`test_tenants.py`), 22 names, 23 descriptors,
24 groups. 10, 17 (flock), 17b, 18, 19 and 20 are attacks of `attack_cells.py`, and every call of the kernel is in
`test_wall_in_kernel.py`. What holds for an ordinary user, too, is tried as one in `test_attacks.py`.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sys
import textwrap
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from afterglow.contracts import CodeSession
from afterglow.errors import SandboxBusy, SandboxFull, SessionLost
from afterglow.sandbox import cgroups
from afterglow.sandbox import session as sessions
from afterglow.sandbox.guest import guard, launch
from afterglow.sandbox.local import NativeEngine
from tests.sandbox.conftest import StartEngine, run, running_engine
from tests.sandbox.endings import CRASHES, FRAME, SPIN, WEDGES, end_of, why_not_ended
from tests.sandbox.processes import census, children, descendants, fork_server_of, until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the native engine is for Linux"),
    pytest.mark.asyncio(loop_scope="module"),
]

MB = 1 << 20
SMALL_MB = 128
OURS = ("close everything", "half a frame", "leave a child in its place", "ignore interrupts")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(packages_folder: Path) -> AsyncGenerator[NativeEngine]:
    """No session but those that are asked for, and little memory for each."""
    async with running_engine(sandbox_pool=0, sandbox_sessions=8, sandbox_memory_mb=SMALL_MB) as running:
        assert running.status.state == "on", running.status
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is killed half a second after it was interrupted."""
    monkeypatch.setattr(sessions, "GRACE_S", 0.5)


def launcher_of(engine: NativeEngine) -> int:
    return engine._generations[-1].server.pid


def first_processes(engine: NativeEngine) -> list[int]:
    """The agents of all living sessions, by their pids out here."""
    return children(fork_server_of(launcher_of(engine)))


def worker_of(agent: int) -> int:
    [worker] = children(agent)
    return worker


# --- 1, 6: time and the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OURS else [pytest.mark.slow]) for name in WEDGES]
)
async def test_a_session_that_does_not_answer_is_ended(engine: NativeEngine, impatient: None, name: str) -> None:
    """Whatever a cell does to its agent, its time is obeyed, and after `close` no process of it is left."""
    assert await why_not_ended(engine, WEDGES[name]) == ""


@pytest.mark.parametrize("code", CRASHES)
async def test_a_session_that_crashes_says_why(session: CodeSession, code: str) -> None:
    """A worker that dies takes its session along, and the caller is told how it died."""
    end = await end_of(session, code, 10)
    assert (end.status, CRASHES[code] in end.why) == ("lost", True), end
    assert not session.alive


@pytest.mark.slow
async def test_a_drip_does_not_stretch_the_time(session: CodeSession) -> None:
    """A cell that prints all the time ends at its time all the same, and its variables are kept."""
    drip = "import time\nkept = 7\nwhile True:\n    print('x')\n    time.sleep(0.003)"
    assert (await end_of(session, drip, 0.5)).status == "timeout"
    assert (await run(session, "kept")).text == "7\n"


@pytest.mark.parametrize("target", ["/proc/self/fd/3", "/proc/self/fd/1", "/dev/zero", "/dev/random", "/proc/1/fd/10"])
async def test_no_link_is_read(session: CodeSession, target: str) -> None:
    """A link to a pipe, a device or the agent's own descriptors is no file: not listed, not read, and nothing waits."""
    await run(session, f"import os\nos.symlink({target!r}, 'link')\nos.symlink('/proc/self/fd', 'folder')")
    assert await session.list_files() == []
    for name in ("link", "folder/3", "folder/10"):
        with pytest.raises(FileNotFoundError):
            await get(session, name)
    assert (await run(session, "print(1)")).text == "1\n"


async def get(session: CodeSession, name: str, max_bytes: int = 1 << 20) -> bytes:
    return b"".join([chunk async for chunk in session.get(name, max_bytes)])


# --- 2, 24: signals and groups ----------------------------------------------------------------------------------


@pytest.fixture
def pretended_abi(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of a kernel whose Landlock is an older one."""
    copy = shutil.copytree(Path(launch.__file__).parent, tmp_path / "afterglow-guest" / "guest")
    with (copy / "wall.py").open("a") as wall:
        wall.write(f"\n\ndef landlock_abi() -> int:\n    return {request.param}\n")
    command = launch.command

    def changed(python: str) -> list[str]:
        return [part.replace(str(Path(launch.__file__).parent.parent), str(copy.parent)) for part in command(python)]

    monkeypatch.setattr(launch, "command", changed)


@pytest.mark.slow
@pytest.mark.parametrize("pretended_abi", [1, 2, 5], indirect=True)
async def test_signals_end_at_the_session(pretended_abi: None, start_engine: StartEngine) -> None:
    """Where Landlock cannot hold signals back, a signal to everybody reaches nobody outside."""
    sibling = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        async with start_engine(sandbox_pool=0) as engine:
            assert engine.status.state == "on", engine.status
            nice = os.getpriority(os.PRIO_PROCESS, 0)
            for code in ("os.kill(0, 15)", "os.kill(-1, 9)\nos.kill(0, 9)", "os.setpriority(os.PRIO_PGRP, 0, 15)"):
                session = await engine.open()
                assert (await run(session, f"import os\n{code}")).status in ("lost", "error")
                await session.close()
            assert os.getpriority(os.PRIO_PROCESS, 0) == nice
            assert sibling.returncode is None
            assert (await run(await engine.open(), "print(1)")).text == "1\n"
    finally:
        sibling.kill()
        await sibling.wait()


async def test_a_session_belongs_to_no_group_but_its_own(session: CodeSession) -> None:
    """Of the server's groups none is left, where the server may let go of them."""
    if os.geteuid() != 0:
        pytest.skip("an ordinary user cannot")
    assert (await run(session, "import os\nprint({*os.getgroups()} <= {1000}, os.getgid())")).text == "True 1000\n"


# --- 3, 4: memory -----------------------------------------------------------------------------------------------

NAMES = (b"\xff\xfe", b"a\nb", b") R 1 1 1", b"((((", b"")
CALL_ITSELF = "import ctypes\nctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)\n"
FORKED_HOG = """
import os, time
for _ in range(30):
    if os.fork() == 0:
        held = bytearray(b"x" * (12 << 20))
        time.sleep(60)
time.sleep(60)
"""
HOGS = {
    "connections that nobody accepts": """
import socket
listening = socket.socket(socket.AF_UNIX)
listening.bind("/tmp/listening")
listening.listen(4096)
while hidden():
    with socket.socket(socket.AF_UNIX) as one:
        one.connect("/tmp/listening")
        one.setblocking(False)
        try:
            while True: add(one.send(bytes(65536)))
        except BlockingIOError: pass
""",
    "files in memory": """
number = 0
for folder in ("/mnt/data", "/tmp", "/dev/shm", "/home/sandbox"):
    try:
        with open(f"{folder}/big", "wb") as file:
            while hidden(): add(file.write(bytes(1 << 20)))
    except OSError: pass
hold = bytearray(b"x" * (90 << 20))
""",
    "pages that were let go": """
import mmap
file = open("/mnt/data/pages", "w+b")
while hidden():
    file.truncate(60 << 20)
    pages = mmap.mmap(file.fileno(), 60 << 20)
    for at in range(0, 60 << 20, 4096): pages[at] = 1
    pages.madvise(mmap.MADV_DONTNEED)
    add(60 << 20)
    file = open(f"/{['tmp', 'dev/shm'][amount > 100 << 20]}/pages", "w+b")
""",
    "tables of pages": """
import mmap
for _ in range(28):
    if os.fork() == 0: break
pages = mmap.mmap(-1, 4 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=mmap.PROT_READ)
for at in range(0, 4 << 30, 1 << 21): pages[at]
time.sleep(60)
""",
}
HIDE = """
import os, time
amount, most = 0, 384 << 20
def add(size):
    global amount
    amount += size
def hidden():
    return amount < most
"""


@pytest.fixture
def no_cgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the guard is alone."""
    monkeypatch.setattr(cgroups, "find", lambda limits: None)
    monkeypatch.setattr(cgroups, "scope_command", lambda unit: [])


@pytest.mark.slow
async def test_no_name_blinds_the_guard(no_cgroups: None, start_engine: StartEngine) -> None:
    """Whatever one session calls its processes, another one that takes too much memory is seen and ended."""
    async with start_engine(sandbox_pool=0, sandbox_memory_mb=SMALL_MB) as engine:
        named = await engine.open()
        for name in NAMES:
            assert (await run(named, f"{CALL_ITSELF.format(name=name)}kept = 1")).status == "ok"
            hog = await engine.open()
            cell = await run(hog, FORKED_HOG, timeout_s=20)
            assert (cell.status, "out of memory" in cell.end.why) == ("lost", True), cell.end
            await hog.close()
        assert (await run(named, "kept")).text == "1\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", HOGS)
async def test_hidden_memory_is_bounded(engine: NativeEngine, session: CodeSession, name: str) -> None:
    """Memory that is in no process's size counts where a cgroup bounds the session: it ends there, or stays small."""
    if engine.status.unenforced:
        pytest.skip("no cgroup can be made here")
    cell = await run(session, f"{HIDE}{HOGS[name]}\nprint('held')", timeout_s=15)
    assert (cell.status, "out of memory" in cell.end.why) == ("lost", True), (cell.end, cell.text)


LOCKS = """
import fcntl, os, struct, time
for _ in range(7):
    if os.fork() == 0: break
locks = [struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, at, 1, 0) for at in range(0, 1000, 2)]
for number in range(100):
    file = os.open(f"/tmp/{os.getpid()}-{number}", os.O_RDWR | os.O_CREAT)
    for lock in locks: fcntl.fcntl(file, fcntl.F_SETLK, lock)
time.sleep(2)
"""


@pytest.mark.slow
async def test_locks_take_no_memory(session: CodeSession) -> None:
    """Hundreds of thousands of locks on a session's own files, which no cgroup counts, do not grow the kernel."""
    before = most = unreclaimable_bytes()

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, unreclaimable_bytes())
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    assert (await run(session, LOCKS, timeout_s=20)).status in ("ok", "lost", "error")
    watching.cancel()
    assert most - before < 24 * MB, f"the kernel grew by {(most - before) // MB} MB"


def unreclaimable_bytes() -> int:
    """The kernel's own objects that it cannot give up."""
    [size] = [
        line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("SUnreclaim")
    ]
    return int(size) * 1024


@pytest.mark.slow
async def test_the_machine_keeps_memory_free(
    no_cgroups: None, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing bounds a session, one that hides its memory is ended when the machine runs short, and told so."""
    free = guard.available_bytes()
    assert free is not None
    async with start_engine(sandbox_pool=0, sandbox_memory_mb=SMALL_MB, sandbox_free_mb=free // MB - 500) as engine:
        assert engine.status.state == "on", engine.status
        hog = f"{HIDE.replace('384', '900')}{HOGS['connections that nobody accepts']}"
        session = await engine.open()
        await run(session, hog, timeout_s=30)
        assert await until(lambda: not session.alive)
        assert "out of memory" in (await run(session, "print(1)")).end.why


# --- 5: the server's memory -------------------------------------------------------------------------------------

FLOODS = {
    "stdout": "while True: print('x' * 100_000)",
    "stderr": "import sys\nwhile True: sys.stderr.write('x' * 100_000)",
    "bytes that are no text": "import os\nwhile True: os.write(1, b'\\xff' * 60_000)",
    "lines of nothing": "while True: print()",
    "a result": "'x' * (150 << 20 >> 2)",
    "what a class says of itself": "class A:\n    def __repr__(self): return 'x' * (30 << 20)\nA()",
    "an error": "raise ValueError('x' * (30 << 20))",
    "an error of errors": """
error = None
for number in range(2000):
    later = ValueError('x' * 1000)
    later.__cause__ = error
    error = later
raise error
""",
    "pictures": """
class Picture:
    def _repr_png_(self): return b"\\x89PNG\\r\\n\\x1a\\n" + bytes(7 << 20)
for _ in range(60): display(Picture())
""",
    "small pictures": """
class Picture:
    def _repr_png_(self): return b"\\x89PNG\\r\\n\\x1a\\n" + bytes(8)
while True: display(Picture())
""",
    "frames with large headers": f"""{FRAME}
for _ in range(500): say(b'x', t='picture', id=cell(), mime='image/png', x='y' * 60_000)
""",
    "frames by the thousand": f"{FRAME}\nwhile True: say(b'x', t='picture', id=cell(), mime='image/png')",
    "errors by the thousand": f"{FRAME}\nwhile True: say(b'x' * 1000, t='error', id=cell())",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_takes_little_of_the_servers_memory(session: CodeSession, impatient: None, name: str) -> None:
    """However much a cell shows, and in whatever way, the server holds its bounds of it, and the cell ends."""
    before = resident_bytes()
    shown = most = 0
    async with asyncio.timeout(60):
        async for part in session.run(FLOODS[name], 3):
            shown += len(getattr(part, "text", "")) + len(getattr(part, "data", b""))
            most = max(most, resident_bytes() - before)
    assert shown <= (256 + 64 + 1) * 1024 + 32 * MB
    assert most <= 32 * MB + 32 * MB, f"the server grew by {most // MB} MB"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- 7: forged frames -------------------------------------------------------------------------------------------

FORGED = {
    "done, and on it goes": f"say(t='done', id=cell(), status='ok'){SPIN}",
    "done twice": "number = cell()\nfor _ in range(2): say(t='done', id=number, status='ok')",
    "done of another cell": "say(t='done', id=cell() + 1, status='ok')",
    "done with a body": "say(b'x' * 1000, t='done', id=cell(), status='ok')",
    "a death": "say(t='done', id=cell(), status='died', exit=0)",
    "a status that is none": "say(t='done', id=cell(), status=['ok'])",
    "ready": "say(t='ready', id=1)",
    "a list": "say(b'[[\"../../etc/ssh/authorized_keys\", -5, \"x\"]]', t='files', id=cell())",
    "a file": "say(b'x', t='bytes', id=cell())\nsay(t='end', id=cell(), size=-1)",
    "ok and fail": "say(t='ok', id=cell())\nsay(t='fail', id=cell(), reason='full')",
    "text in the agent's words": "say(b'forged', t='logs', id=cell())",
    "a picture that is none": "say(b'<svg onload=alert(1)>', t='picture', id=cell(), mime='image/svg+xml', last=True)",
    "a picture of another kind": "say(b'GIF89a', t='picture', id=cell(), mime='image/png', last=True)",
    "numbers too large": "say(t='done', id=10 ** 400, status='ok')",
    "no number": "say(t='done', id=float('nan'), status='ok')",
    "types that are none": "say(t={'a': []}, id=cell())",
    "no object": "os.write(3, b'\\0\\0\\0\\x02[]')",
}
LATER = """
def later():
    global number
    time.sleep({after_s})
    {code}
threading.Thread(target=later, daemon=True).start()
number = cell()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FORGED)
async def test_forged_frames_deceive_nobody(session: CodeSession, impatient: None, name: str) -> None:
    """What a worker says for its agent ends its cell or its session, and never raises anything else in the server."""
    await run(session, "open('true.txt', 'w').write('x')")
    cell = await run(session, FRAME + FORGED[name], timeout_s=1)
    assert cell.text.count("forged") == 0
    assert cell.end.status in ("ok", "lost", "error", "timeout")
    await expect_truth(session)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORGED if name != "done, and on it goes"])
async def test_forged_frames_between_cells_deceive_nobody(session: CodeSession, impatient: None, name: str) -> None:
    """The same from a thread, between cells and while files are asked for."""
    code = textwrap.indent(FORGED[name].replace("cell()", "number"), "    ").strip()
    await run(session, f"open('true.txt', 'w').write('x')\n{FRAME}{LATER.format(after_s=0.05, code=code)}")
    for _ in range(10):
        await expect_truth(session)
        await asyncio.sleep(0.01)


async def expect_truth(session: CodeSession) -> None:
    """Its files are listed as they are and its next cell is its own, or it is lost."""
    try:
        assert {file.name for file in await session.list_files()} <= {"true.txt"}
        assert await get(session, "true.txt") == b"x"
        await session.put("true.txt", 1, once(b"x"))
    except SessionLost:
        pass
    cell = await run(session, "print(2)", timeout_s=1)
    assert cell.status in ("lost", "timeout") or cell.text == "2\n", cell.text


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.slow
async def test_what_goes_on_after_a_forged_end_is_ended(session: CodeSession) -> None:
    """`done` is a claim: code that goes on burning after it is ended with its session."""
    assert (await run(session, FRAME + FORGED["done, and on it goes"])).status == "ok"
    assert await until(lambda: not session.alive, 30)


@pytest.mark.slow
async def test_a_thread_that_prints_for_ever_disturbs_no_file(session: CodeSession) -> None:
    """Honest output between cells does not get between the answers to other requests."""
    await run(
        session,
        "import threading, time\ndef chatter():\n    while True: print('x' * 100, flush=True); time.sleep(0.001)\n"
        "threading.Thread(target=chatter, daemon=True).start()\nopen('true.txt', 'w').write('x')",
    )
    for _ in range(20):
        await session.put("other.txt", 1, once(b"y"))
        assert {file.name for file in await session.list_files()} == {"true.txt", "other.txt"}
        assert await get(session, "true.txt") == b"x"
        assert "7\n" in (await run(session, "7")).text


# --- 8, 9: the engine -------------------------------------------------------------------------------------------


async def test_there_is_no_wall_of_half_its_layers(engine: NativeEngine) -> None:
    """No mode exists in which a session shares namespaces with the server."""
    before = first_processes(engine)
    session = await engine.open()
    [agent] = set(first_processes(engine)) - set(before)
    for name in ("mnt", "net", "pid", "ipc", "uts", "user"):
        assert os.readlink(f"/proc/{agent}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
    assert not [part for part in ("landlock", "none", "process") if part in engine.settings.code_interpreter]
    await session.close()


@contextmanager
def limited(pid: int, kind: int, most: int) -> Iterator[None]:
    """Another process with a lower limit, for a time."""
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_DATA"])
async def test_a_fork_server_that_cannot_fork_is_busy(start_engine: StartEngine, kind: str) -> None:
    """Without a process, descriptor or memory to be had an `open` is refused as busy, sessions live on, and when there
    is one again the next `open` works."""
    async with start_engine(sandbox_pool=0) as engine:
        session = await engine.open()
        await run(session, "kept = 1")
        server = fork_server_of(launcher_of(engine))
        most = len(os.listdir(f"/proc/{server}/fd")) if kind == "RLIMIT_NOFILE" else 1
        with limited(server, getattr(resource, kind), most):
            if kind == "RLIMIT_DATA":
                assert (await run(await engine.open(), "print(1)")).status in ("ok", "lost", "error")
            else:
                with pytest.raises(SandboxBusy):
                    await engine.open()
        assert (await run(session, "kept")).text == "1\n"
        assert (await run(await engine.open(), "print(1)")).text == "1\n"
        assert fork_server_of(launcher_of(engine)) == server


@pytest.mark.slow
async def test_a_server_without_descriptors_is_busy(
    start_engine: StartEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """However few descriptors the server has left, an `open` is refused as busy, and none is lost."""
    async with start_engine(sandbox_pool=0) as engine:
        await (await engine.open()).close()
        before = census()
        for free in range(4):
            open_now = len(os.listdir("/proc/self/fd")) - 1
            with limited(0, resource.RLIMIT_NOFILE, open_now + free), suppress(SandboxBusy):
                await (await engine.open()).close()
        assert await until(lambda: census() == before), (census(), before)
        assert (await run(await engine.open(), "print(1)")).text == "1\n"
        assert "Exception in callback" not in caplog.text


# --- 11, 12: what a session does to the machine -----------------------------------------------------------------


async def test_a_crash_starts_nothing_on_the_host(engine: NativeEngine, session: CodeSession) -> None:
    """The core limit of every process of a session is 1, the only value that keeps the host's handler asleep; and a
    crash leaves no file."""
    agent = first_processes(engine)[-1]
    for pid in (agent, worker_of(agent)):
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (1, 1)
    code = "import os, ctypes\nif (pid := os.fork()) == 0: ctypes.string_at(0)\nprint(os.waitpid(pid, 0)[1] & 0xff)"
    assert (await run(session, code)).text == "11\n"  # and not 139, as if a core had been dumped
    assert await session.list_files() == []


SPINNERS = """
import os
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        while True: pass
"""
RELAY = """
import subprocess, threading, time
RUNNER = '''
import os, time
end = time.time() + 60
while time.time() < end:
    began = time.process_time()
    while time.process_time() - began < 0.006: pass
    if os.fork(): os._exit(0)
'''
def later():
    time.sleep(0.3)
    for _ in range(4): subprocess.Popen(["python3", "-I", "-S", "-c", RUNNER])
threading.Thread(target=later, daemon=True).start()
"""


@pytest.mark.slow
async def test_what_a_cell_has_started_ends_with_it(engine: NativeEngine, session: CodeSession) -> None:
    """Processes that a cell leaves running are gone when its end is told."""
    agent = first_processes(engine)[-1]
    assert (await run(session, SPINNERS)).status == "ok"
    assert await until(lambda: len(descendants(agent)) == 1, 2), descendants(agent)


@pytest.mark.slow
async def test_a_relay_of_short_processes_is_seen_burning(session: CodeSession) -> None:
    """Processes that each live for milliseconds, one starting the next, add up: between cells they end the session."""
    assert (await run(session, RELAY)).status == "ok"
    assert await until(lambda: not session.alive, 20)


# --- 13, 14, 16: sessions among each other ----------------------------------------------------------------------


@pytest.mark.slow
async def test_data_of_one_session_is_in_no_other_process(engine: NativeEngine, session: CodeSession) -> None:
    """Code, output, file names and contents of a session are not in the fork server's memory, nor in a later one's."""
    if os.geteuid() != 0:
        pytest.skip("only root may look")
    marker = os.urandom(12).hex()
    await session.put(f"{marker}.txt", 24, once(marker.encode()))
    assert marker in (await run(session, f"kept = {marker!r}\nprint(kept)")).text
    later = await engine.open()
    await run(later, "print(1)")
    mine, others = first_processes(engine)
    assert marker.encode() in memory_of(worker_of(mine))
    for pid in (others, worker_of(others), fork_server_of(launcher_of(engine)), launcher_of(engine)):
        assert marker.encode() not in memory_of(pid)
    await later.close()


def memory_of(pid: int) -> bytes:
    """All that a process could write to, and so hold."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            area, rights, *_ = line.split()
            if rights.startswith("rw"):
                start, end = (int(part, 16) for part in area.split("-"))
                memory.seek(start)
                found.append(memory.read(end - start))
    return b"".join(found)


@pytest.mark.slow
async def test_users_are_used_again(start_engine: StartEngine) -> None:
    """However many sessions there were, users come from the same few, no two living sessions share one, and a session
    finds nothing that the last one of its user has left."""
    if os.geteuid() != 0:
        pytest.skip("an ordinary user has but itself")
    seen: set[int] = set()
    async with start_engine(sandbox_pool=0, sandbox_sessions=2) as engine:
        for _ in range(12):
            pair = [await engine.open() for _ in range(2)]
            users = {os.stat(f"/proc/{worker_of(agent)}").st_uid for agent in first_processes(engine)}
            assert len(users) == 2
            seen.update(users)
            for session in pair:
                assert (
                    await run(session, "import os\nprint(sum(map(len, map(os.listdir, ('/tmp', '/dev/shm')))))")
                ).text == "0\n"
                await run(session, "open('/tmp/left', 'w')\nopen('/dev/shm/left', 'w')")
                await session.close()
    assert len(seen) < 24
    assert min(seen) >= launch.FIRST_USER


@pytest.mark.slow
async def test_hundreds_of_sessions_leave_nothing(start_engine: StartEngine) -> None:
    """After 120 sessions there is no process, descriptor, mount or cgroup more, and no memory to speak of."""
    async with start_engine(sandbox_pool=0, sandbox_sessions=4) as engine:
        await (await engine.open()).close()
        server = fork_server_of(launcher_of(engine))
        before, resident, open_there = census(), resident_bytes(), len(os.listdir(f"/proc/{server}/fd"))
        for _ in range(30):
            opened = await asyncio.gather(*(engine.open() for _ in range(4)))
            await asyncio.gather(*(session.close() for session in opened))
        assert await until(lambda: census() == before), (census(), before)
        assert len(os.listdir(f"/proc/{server}/fd")) == open_there
        assert resident_bytes() - resident < 16 * MB


async def test_chance_differs(engine: NativeEngine) -> None:
    """Two sessions draw different numbers, from the global generators too, and so do the forks of one."""
    draw = "import random, numpy, os, uuid, secrets\nprint(*numpy.random.rand(3), random.random(), uuid.uuid4())"
    opened = [await engine.open() for _ in range(2)]
    drawn = [(await run(session, draw)).text.split() for session in opened]
    assert not set(drawn[0]) & set(drawn[1])
    for session in opened:
        await session.close()


# --- 15, 22: accidents ------------------------------------------------------------------------------------------


ACCIDENTS = {
    "nested folders": """
import os
for _ in range(1200):
    os.mkdir("d")
    os.chdir("d")
open("deep", "w")
os.chdir("/mnt/data")
""",
    "signals to the agent": "import os, signal\nfor number in (2, 1, 15, 10, 12, 14, 17, 28): os.kill(1, number)",
    "a folder that cannot be entered": "import os\nos.mkdir('closed')\nopen('closed/a', 'w')\nos.chmod('closed', 0)",
    "a closed data folder": "import os\nos.chmod('/mnt/data', 0)",
    "files that come and go": """
import os, threading
def churn():
    while True:
        for number in range(50): open(f"f{number}", "w").close()
        for number in range(50): os.unlink(f"f{number}")
threading.Thread(target=churn, daemon=True).start()
""",
    "a folder that turns into a link": """
import os, threading
os.mkdir("folder"); open("folder/a", "w").write("x"); os.symlink("/etc", "link")
def turn():
    while True:
        for one, other in (("folder", "kept"), ("link", "folder"), ("folder", "link"), ("kept", "folder")):
            os.rename(one, other)
threading.Thread(target=turn, daemon=True).start()
""",
    "nothing left to write to": "try:\n    open('big', 'wb').write(bytes(80 << 20))\nexcept OSError: pass",
    "no descriptors": "import os\nheld = []\ntry:\n    while True: held.append(os.dup(0))\nexcept OSError: pass",
    "closed output": "import os\nos.close(1)\nos.close(2)",
    "other output": "import sys\nsys.stdout = sys.stderr = None",
    "other streams": "import sys\nsys.stdout.close()\nsys.stderr.detach()",
    "deep JSON": "import json\ntry:\n    json.loads('[' * 100_000)\nexcept RecursionError: pass",
    "recursion": "import sys\nsys.setrecursionlimit(2000)\ndef f(): f()\ntry:\n    f()\nexcept RecursionError: pass",
    "exit": "exit(3)",
    "a limit of its own": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
    "no working folder": "import os\nos.mkdir('gone')\nos.chdir('gone')\nos.rmdir('/mnt/data/gone')",
    "collected": "import gc\ngc.disable()\ngc.set_threshold(0)",
    "traced": "import sys\nsys.settrace(lambda *_: 1 / 0)\nsys.setprofile(None)",
    "without builtins": "__builtins__ = {}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCIDENTS)
async def test_accidents_end_no_session(session: CodeSession, name: str) -> None:
    """A session in which something odd has happened goes on, with its variables, and its files can be asked for."""
    await run(session, "kept = 7")
    await run(session, ACCIDENTS[name])
    files = await session.list_files()
    assert all(len(file.name) < 1024 for file in files)
    for file in files[:3]:
        with suppress(FileNotFoundError):
            await get(session, file.name, 80 << 20)
    assert session.alive
    cell = await run(session, "kept")
    assert cell.text == "7\n" or name in ("a limit of its own", "traced", "without builtins"), (cell.text, cell.end)
    assert cell.status != "lost"


async def test_what_cannot_be_put_is_refused(session: CodeSession) -> None:
    """A folder in a file's place and a full disk are refusals, and end nothing."""
    await run(session, "import os\nos.mkdir('folder')\nkept = 7\nopen('file', 'w')\nos.symlink('/tmp', 'link')")
    for name in ("folder", "file/below", "link/below"):
        with pytest.raises(SandboxFull):
            await session.put(name, 1, once(b"x"))
    with pytest.raises(SandboxFull):
        await session.put("big", 70 << 20, once(b"x"))
    assert (await run(session, "import os\nprint(kept, sorted(os.listdir()), os.listdir('/tmp'))")).text.startswith(
        "7 ['file', 'folder', 'link'] []"
    )


HOSTILE = """
import os
names = [b"a\\nb", b"\\xff\\xfe", "\\u202eexe.txt", "\\u2066x", "a\\u2028b", "\\x1b[2J", "C:\\\\..\\\\x", "\\x7f",
         "tab\\t", b"\\xed\\xa0\\x80", "\\u200f", "..."]
for name in names:
    open(name, "w").write("x")
for name in ("fine.txt", "\\u00fc".encode(), "\\u540d.csv", "<b>.html", " space ", "-rf", ".hidden", "n" * 255, "'\\""):
    open(name, "w").write("x")
os.makedirs("/".join(["d" * 200] * 6)); open("/".join(["d" * 200] * 6) + "/deep", "w")
"""


async def test_only_clean_names_are_listed(session: CodeSession) -> None:
    """Names that break lines, turn text around, or are no text are left out; all others come as they are."""
    assert (await run(session, HOSTILE)).status == "ok"
    listed = {file.name for file in await session.list_files()}
    fine = {"fine.txt", "\u00fc", "\u540d.csv", "<b>.html", " space ", "-rf", ".hidden", "n" * 255, "'\"", "..."}
    assert listed == fine
    for name in ("../../etc/passwd", "/etc/passwd", "a/../../etc/passwd", "a\nb", "\udcff", "a\0b", ".", ""):
        with pytest.raises(FileNotFoundError):
            await get(session, name)
        with pytest.raises(ValueError, match="cannot be the name"):
            await session.put(name, 1, once(b"x"))


# --- 17, 23: what is shared -------------------------------------------------------------------------------------


async def test_locks_of_one_session_are_not_seen_by_another(engine: NativeEngine, session: CodeSession) -> None:
    """No session learns from a file that all can read what another one has locked in it."""
    path = "/usr/lib/os-release"
    lock = f"import fcntl\nshared = open({path!r})\nfcntl.lockf(shared, fcntl.LOCK_SH, 5, 3)"
    look = f"""
import fcntl, struct
shared = open({path!r})
asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
print(fcntl.fcntl(shared, fcntl.F_GETLK, asked)[:2] == struct.pack("h", fcntl.F_UNLCK))
"""
    await run(session, lock)
    other = await engine.open()
    told = await run(other, look)
    await other.close()
    assert told.text == "True\n" or "Permission" in told.text or "Errno" in told.text, told.text


SHARED = ("/dev/null", "socket:", "pipe:", "anon_inode:", "pid:", "/mnt/data", "/opt/packages/", "/proc")


async def test_no_process_has_the_servers_descriptors(engine: NativeEngine, session: CodeSession) -> None:
    """Nothing of ours is open in a process of the engine but /dev/null, the sockets to it, and one pipe that nobody
    reads any more."""
    if os.geteuid() != 0:
        pytest.skip("only root may look")
    mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)} - {"/dev/null"}
    agent = first_processes(engine)[-1]
    assert [os.readlink(f"/proc/{agent}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3
    for process in descendants(launcher_of(engine)):
        opened = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")}
        assert not opened & mine
        assert all(name.startswith(SHARED) for name in opened), opened
