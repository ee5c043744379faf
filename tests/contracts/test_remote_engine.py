"""What the engine `remote` promises, with pods that are processes on loopback (`pods.py`): the true program and wire,
but no pod around it. What a cluster makes of the manifest is not proved here; it is only read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from afterglow.contracts import CellEnd, CellOutput, CodeSession, Logs, Picture
from afterglow.errors import ConfigError, SandboxBusy, SandboxOff, SessionLost
from afterglow.sandbox import attacks, pod, remote
from afterglow.sandbox import session as sessions
from afterglow.sandbox.guest import door, frames
from afterglow.sandbox.remote import RemoteEngine
from afterglow.settings import Settings, load
from tests.contracts import pods
from tests.contracts.pods import BARE, TOKEN, FakePod, descendants, fake_pod

pytestmark = pytest.mark.slow

PATIENCE_S = 20.0
PACKAGES = load().sandbox_env
ROOT = Path(__file__).parents[2]
SYSTEM = "/usr/bin/python3"
ALONE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
ORDINARY = (
    *ALONE,
    *("setpriv", "--reuid=64321", "--regid=64321", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"),
)


async def holds(session: CodeSession, processes: int, disk_mb: int) -> list[str]:
    """In place of the attacks, which nothing here would stop."""
    return []


def some_settings(url: str = "tcp://127.0.0.1:1", **given: Any) -> Settings:
    return dataclasses.replace(
        load({}, environ={}), code_interpreter="remote", sandbox_url=url, sandbox_token=TOKEN, **given
    )


@asynccontextmanager
async def engine_at(*ports: int, probe: remote.Probe = holds, **given: Any) -> AsyncGenerator[RemoteEngine]:
    """An engine that knows these pods, whether they are there or not."""
    url = ", ".join(f"tcp://127.0.0.1:{port}" for port in ports)
    engine = RemoteEngine(some_settings(url, **given), probe)
    try:
        await engine.settled()
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def one_pod(tmp_path: Path) -> AsyncGenerator[FakePod]:
    async with fake_pod(tmp_path / "data", some_settings()) as started:
        yield started


@pytest.fixture
async def two_pods(tmp_path: Path) -> AsyncGenerator[list[FakePod]]:
    async with fake_pod(tmp_path / "a", some_settings()) as one, fake_pod(tmp_path / "b", some_settings()) as other:
        yield [one, other]


@asynccontextmanager
async def session_in(one_pod: FakePod, **given: Any) -> AsyncGenerator[CodeSession]:
    async with engine_at(one_pod.port, **given) as engine:
        assert engine.status.state == "on", engine.status
        await one_pod.free()
        yield await engine.open()


async def shown(session: CodeSession, code: str, timeout_s: float = PATIENCE_S) -> list[CellOutput]:
    return [part async for part in session.run(code, timeout_s)]


def text(parts: list[CellOutput]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Logs))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# --- sessions ----------------------------------------------------------------------------------------------------


async def test_a_session_and_its_end(one_pod: FakePod):
    """Cells run, files go in and out, and when `close` returns the pod's program has ended, which ends the pod."""
    async with session_in(one_pod) as session:
        assert text(await shown(session, "x = 6\nprint('é' * 100_000)\nx * 7")) == "é" * 100_000 + "\n42\n"
        await session.put("in.csv", 6, chunks(b"a,", b"b\n1,"))
        await shown(session, "open('out.txt', 'w').write(open('in.csv').read() * 50_000)")
        listed = [(file.name, file.size_bytes) for file in await session.list_files()]
        assert listed == [("in.csv", 6), ("out.txt", 300_000)]
        assert b"".join([part async for part in session.get("out.txt", 300_000)]) == b"a,b\n1," * 50_000
        await session.close()
        assert await one_pod.ended() == 0


async def test_a_cell_may_be_given_up(one_pod: FakePod):
    """A cell whose generator is closed is interrupted, and the session goes on."""
    async with session_in(one_pod) as session:
        async with asyncio.timeout(PATIENCE_S), aclosing(session.run("x = 1\nprint(x)\nwhile True: pass", 60)) as cell:
            await anext(cell)
        assert text(await shown(session, "x")) == "1\n"


async def test_the_pod_is_killed(one_pod: FakePod):
    """When the pod is killed in the middle of a cell, the cell ends as lost and the session is over."""
    async with session_in(one_pod) as session:
        running = session.run("print('here', flush=True)\nimport time\ntime.sleep(60)", PATIENCE_S)
        assert await anext(running) == Logs("here\n")
        pods.kill(descendants(one_pod.process.pid))
        assert [part.status async for part in running if isinstance(part, CellEnd)] == ["lost"]
        with pytest.raises(SessionLost):
            await session.list_files()


async def test_the_pod_falls_silent(one_pod: FakePod, monkeypatch: pytest.MonkeyPatch):
    """A pod that is there, but gives no sign of life, is given up, with the reason."""
    monkeypatch.setattr(remote, "BEAT_S", 0.05)
    monkeypatch.setattr(remote, "END_S", 0.1)
    async with session_in(one_pod) as session:
        pods.kill(descendants(one_pod.process.pid), signal.SIGSTOP)
        end = (await shown(session, "1"))[-1]
        assert end == CellEnd("lost", "its host gives no sign of life")


async def test_beats_are_no_work(one_pod: FakePod, monkeypatch: pytest.MonkeyPatch):
    """Signs of life come and go beside cells and files, also while nobody takes a file; none of them is work."""
    monkeypatch.setattr(remote, "BEAT_S", 0.02)
    monkeypatch.setattr(sessions, "MISSED_BEATS", 500)
    async with session_in(one_pod) as session:
        assert isinstance(session, sessions.Session)
        await shown(session, "open('large', 'w').truncate(5_000_000)")
        async with aclosing(session.get("large", 5_000_000)) as parts:
            await anext(parts)
            await until(lambda: session._waits_for_room)
            with monkeypatch.context() as strict:
                strict.setattr(sessions, "MISSED_BEATS", 1)
                await until(lambda: session._beats_due > 3)
            assert len(b"".join([part async for part in parts])) > 4_000_000
        assert text(await shown(session, "1 + 1")) == "2\n"
        idle_since = session.idle_since
        await until(lambda: session._beats_due == 1)
        await until(lambda: session._beats_due == 0)
        assert session.idle_since == idle_since


async def test_the_server_falls_silent(tmp_path: Path):
    """A pod whose server says nothing for too long ends by itself."""
    quick = "import sys; sys.path.insert(0, {!r}); from guest import door; door.SILENCE_S = 0.2; door.main()"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pod, "START", quick)
        async with fake_pod(tmp_path / "data", some_settings()) as started:
            reader, writer = await greet(started.port, door.OPEN)
            assert await reader.readexactly(door.WELCOME.size)
            assert await reader.read() == b""
            assert await started.ended() == 0
            writer.close()


async def test_a_session_has_its_time(tmp_path: Path):
    """The pod itself ends a session that has lasted too long, whatever its server says."""
    async with fake_pod(tmp_path / "data", some_settings(), most_s=0.3) as started, engine_at(started.port) as engine:
        await started.free()
        session = await engine.open()
        assert (await shown(session, "while True: pass"))[-1].status == "lost"  # type: ignore[union-attr]
        assert await started.ended() == 0


@pytest.mark.slow
async def test_what_a_cell_has_started_ends_with_it(tmp_path: Path, pid_namespace: None):
    """Where the program is the first process, not even what runs on from one process to the next outlives its cell."""
    runs_on = "import os\nif os.fork():\n    os.wait()\nelse:\n    while True:\n        if os.fork(): os._exit(0)"
    python = (*ALONE, *BARE)
    async with fake_pod(tmp_path / "data", some_settings(), python=python) as started, session_in(started) as session:
        for _ in range(3):
            assert (await shown(session, runs_on))[-1] == CellEnd("ok")
            await until(lambda: len(descendants(started.process.pid)) == len(["unshare", "door", "agent", "worker"]))
        assert session.alive


@pytest.mark.slow
async def test_nothing_outlives_a_session_in_its_pod(tmp_path: Path, pid_namespace: None):
    """Where the program is the first process, whatever a cell has left behind ends with the session."""
    async with fake_pod(tmp_path / "data", some_settings(), python=(*ALONE, *BARE)) as started:
        async with session_in(started) as session:
            code = "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\nos.getpid()"
            async with aclosing(session.run(f"{code}\nwhile True: pass", 60)):
                family = descendants(started.process.pid)
                await session.close()
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGES, reason="AFTERGLOW_SANDBOX_ENV names no packages")
async def test_packages_are_imported_ahead(tmp_path: Path):
    """A pod that is free has its packages imported."""
    python = (f"{PACKAGES}/bin/python",)
    async with fake_pod(tmp_path / "data", some_settings(), python=python) as started, session_in(started) as session:
        assert text(await shown(session, "import sys\n'pandas' in sys.modules")) == "True\n"
        parts = await shown(session, "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
        assert [part.mime for part in parts if isinstance(part, Picture)] == ["image/png"]


def test_under_the_servers_loop(tmp_path: Path):
    """The same holds on the event loop that the server runs on."""
    uvloop = pytest.importorskip("uvloop")

    async def there() -> None:
        async with fake_pod(tmp_path / "data", some_settings()) as started, session_in(started) as session:
            assert text(await shown(session, "1 + 1")) == "2\n"
            await session.close()
            assert await started.ended() == 0

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(there())


@asynccontextmanager
async def within_tls(port: int, certificate: Path) -> AsyncGenerator[int]:
    """A proxy before a pod that ends TLS, as that of a service mesh would."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    tasks = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait(tasks)


async def test_within_tls(one_pod: FakePod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With https:// the same goes on within TLS; a certificate that is not trusted is no host."""
    certificate = tmp_path / "certificate.pem"
    make = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost")
    files = ("-addext", "subjectAltName=DNS:localhost", "-keyout", str(certificate), "-out", str(tmp_path / "public"))
    if not shutil.which("openssl"):
        pytest.skip("no openssl")
    await (await asyncio.create_subprocess_exec(*make, *files, stderr=subprocess.DEVNULL)).wait()
    public = (tmp_path / "public").read_text()
    certificate.write_text(certificate.read_text() + public)
    async with within_tls(one_pod.port, certificate) as port:
        engine = RemoteEngine(some_settings(f"https://localhost:{port}"), holds)
        assert (await engine.settled()).state == "off"
        await engine.close()
        trusting = ssl.create_default_context(cadata=public)
        monkeypatch.setattr(remote.ssl, "create_default_context", lambda: trusting)
        engine = RemoteEngine(some_settings(f"https://localhost:{port}"), holds)
        assert (await engine.settled()).state == "on", engine.status
        await one_pod.free()
        session = await engine.open()
        assert text(await shown(session, "print('é' * 100_000)")) == "é" * 100_000 + "\n"
        await engine.close()
        assert await one_pod.ended() == 0


# --- which pod ---------------------------------------------------------------------------------------------------


async def test_a_busy_pod_refuses_and_the_next_is_tried(two_pods: list[FakePod]):
    """Each session has a pod of its own; when all have one, another session is refused as busy."""
    one, other = two_pods
    async with engine_at(one.port, other.port) as engine, engine_at(other.port, one.port) as another:
        first = await engine.open()
        second = await another.open()
        await shown(first, "open('first', 'w').close()")
        await shown(second, "open('second', 'w').close()")
        assert sorted(os.listdir(one.folder) + os.listdir(other.folder)) == ["first", "second"]
        with pytest.raises(SandboxBusy, match="No sandbox host is free"):
            await engine.open()


async def test_no_more_than_may_be(two_pods: list[FakePod]):
    """At most `sandbox_sessions` are open; the place of one that was closed is free."""
    async with engine_at(*(each.port for each in two_pods), sandbox_sessions=1) as engine:
        session = await engine.open()
        with pytest.raises(SandboxBusy, match="1"):
            await engine.open()
        await session.close()
        assert text(await shown(await engine.open(), "1")) == "1\n"


async def test_a_name_may_be_many_pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All addresses that a name resolves to are tried."""
    port = free_port()
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def resolved(_host: str, port: int, **given: Any) -> list[Any]:
        return [entry for last in (2, 3) for entry in await resolve(f"127.0.0.{last}", port, **given)]

    monkeypatch.setattr(loop, "getaddrinfo", resolved)
    async with (
        fake_pod(tmp_path / "a", some_settings(), host="127.0.0.2", port=port),
        fake_pod(tmp_path / "b", some_settings(), host="127.0.0.3", port=port),
        engine_at(port) as engine,
    ):
        assert {text(await shown(await engine.open(), "1")) for _ in range(2)} == {"1\n"}


async def test_a_pod_that_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An engine that finds no pod is off, says so, and is on when there is one."""
    monkeypatch.setattr(remote, "LOOK_S", 0.02)
    port = free_port()
    async with engine_at(port) as engine:
        assert (engine.status.state, engine.status.engine) == ("off", "remote")
        with pytest.raises(SandboxOff, match="No sandbox host is free, or none is there"):
            await engine.open()
        async with fake_pod(tmp_path / "data", some_settings(), port=port):
            await until(lambda: engine.status.state == "on")


@pytest.mark.parametrize("limit", ["sandbox_ttl_s", "sandbox_idle_s"])
async def test_sessions_end(one_pod: FakePod, monkeypatch: pytest.MonkeyPatch, limit: str):
    """A session that is too old, or idle for too long, is ended, and its pod with it."""
    monkeypatch.setattr(remote, "LOOK_S", 0.02)
    async with session_in(one_pod, **{limit: 0}) as session:
        await until(lambda: not session.alive)
        assert await one_pod.ended() == 0


async def test_closing_the_engine(one_pod: FakePod):
    """Closing ends all sessions and those about to be; more are refused. It may be done twice."""
    async with engine_at(one_pod.port) as engine:
        await one_pod.free()
        opening = asyncio.create_task(engine.open())
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(SandboxOff, match="stopping"):
            await opening
        with pytest.raises(SandboxOff, match="stopping"):
            await engine.open()
        await engine.close()


# --- who may come in ---------------------------------------------------------------------------------------------


async def greet(port: int, asks: int, token: str = TOKEN, wire: int = door.WIRE) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(door.GREETING.pack(door.MAGIC, wire, asks, door.key_of(token)))
    return reader, writer


async def test_the_wrong_token(one_pod: FakePod):
    """Whoever has another token is sent away without a word, and the engine says what is wrong; the pod stays free."""
    reader, writer = await greet(one_pod.port, door.OPEN, TOKEN + "?")
    assert await reader.read() == b""
    writer.close()
    engine = RemoteEngine(dataclasses.replace(some_settings(f"tcp://127.0.0.1:{one_pod.port}"), sandbox_token="x" * 40))
    status = await engine.settled()
    await engine.close()
    assert (status.state, status.reason) == ("off", "A sandbox host did not accept sandbox_token.")
    async with session_in(one_pod) as session:
        assert text(await shown(session, "1")) == "1\n"


async def test_strangers_do_not_keep_others_out(one_pod: FakePod):
    """Those who say nothing, too little, nonsense, or come and go as a readiness probe does, hold nobody up."""
    strangers = [await asyncio.open_connection("127.0.0.1", one_pod.port) for _ in range(5)]
    strangers[0][1].write(b"GET / HTTP/1.1\r\nHost: sandbox\r\nUser-Agent: a stranger of some length\r\n\r\n")
    strangers[1][1].write(b"afterglow")
    strangers[2][1].close()
    strangers[3][1].transport.abort()
    async with session_in(one_pod) as session:
        assert text(await shown(session, "1")) == "1\n"
        with pytest.raises(ConnectionResetError):  # and not b"", which is for the wrong token
            await strangers[4][0].read()
    for _, writer in strangers:
        writer.close()


async def test_another_release(one_pod: FakePod):
    """A server that speaks another version is told ours, and takes no pod away."""
    reader, writer = await greet(one_pod.port, door.OPEN, wire=door.WIRE + 1)
    magic, wire, _ = door.WELCOME.unpack(await reader.read())
    assert (magic, wire) == (door.MAGIC, door.WIRE)
    writer.close()
    async with session_in(one_pod) as session:
        assert session.alive


async def test_the_token_is_not_in_a_session(one_pod: FakePod):
    """Neither the token nor the key is in the memory of a session, or in the variables of a process that it can see."""
    key = door.key_of(TOKEN)
    code = f"""
import glob
first, rest = {key[:16]!r}, bytes(byte ^ 255 for byte in {bytes(byte ^ 255 for byte in key[16:])!r})
found = 0
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps:
        start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
        if line.split()[1].startswith("rw"):
            memory.seek(start)
            data = memory.read(end - start)
            at = data.find(first)
            while at >= 0:
                found += data[at + 16 : at + 32] == rest
                at = data.find(first, at + 1)
            found += data.count({TOKEN[:10]!r}.encode() + {TOKEN[10:]!r}.encode()[:20])
print(found)
"""
    async with session_in(one_pod) as session:
        assert text(await shown(session, code)) == "0\n"


async def test_a_pod_is_empty(tmp_path: Path):
    """What an earlier session has left in the folders is gone before the next, however it made it."""
    folder = tmp_path / "data"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/file").write_text("secret")
    (folder / "link").symlink_to(tmp_path)
    (tmp_path / "kept").write_text("")
    os.mkfifo(folder / "fifo")
    here = os.open(folder, os.O_DIRECTORY)
    for _ in range(20):  # a path that is too long
        os.mkdir("deep" * 60, dir_fd=here)
        below = os.open("deep" * 60, os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (folder / "a/b").chmod(0)
    (folder / "a").chmod(0)
    async with fake_pod(folder, some_settings()) as started, session_in(started) as session:
        assert text(await shown(session, "import os\nos.listdir()")) == "[]\n"
        assert (tmp_path / "kept").exists()


async def test_a_try_leaves_nothing(one_pod: FakePod):
    """The session that attacks are tried in is followed by another, which finds nothing of it."""

    async def litter(session: CodeSession, processes: int, disk_mb: int) -> list[str]:
        await shown(session, "open('left', 'w').close()")
        return []

    async with session_in(one_pod, probe=litter) as session:
        assert await session.list_files() == []


# --- what is hostile ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def hostile(*said: bytes, welcome: bytes = door.WELCOME.pack(door.MAGIC, door.WIRE, 0)) -> AsyncGenerator[int]:
    """Something at a port that welcomes everybody, and after the hello goes on with this."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(door.GREETING.size)
            writer.write(welcome)
            await reader.read(65_536)
            for part in said:
                writer.write(part)
                await writer.drain()
            while await reader.read(65_536):
                pass
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xff\xff\xff",
        struct.pack("!I", 18) + b'{"t":"logs","n":-1}',
        struct.pack("!I", 40) + b'{"t":"logs","id":1,"n":1099511627776   }',
        frames.pack({"t": "ready", "id": 7}),
        frames.pack({"t": "beat", "id": 0}),
        frames.pack({"t": "files", "id": 1}, b"[]"),
        b"",
    ],
)
async def test_a_host_that_speaks_no_sense(said: bytes, monkeypatch: pytest.MonkeyPatch):
    """What does not fit the wire ends the session before anything of its size is kept."""
    monkeypatch.setattr(remote, "START_S", 0.2)
    monkeypatch.setattr(remote, "END_S", 0.1)
    async with hostile(said) as port, engine_at(port) as engine:
        assert engine.status.state == "off"


@pytest.mark.parametrize("welcome", [b"HTTP/1.1 400 Bad Request\r\n", b"x", door.WELCOME.pack(door.MAGIC, 99, 0)])
async def test_no_sandbox_host(welcome: bytes):
    """What answers something else, or is of another release, is named as such."""
    async with hostile(welcome=welcome) as port:
        engine = RemoteEngine(some_settings(f"tcp://127.0.0.1:{port}"), holds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote, "WELCOME_S", 0.2)
            status = await engine.settled()
        await engine.close()
        assert status.state == "off"
        assert "release" in status.reason or welcome == b"x"


# --- the wall ----------------------------------------------------------------------------------------------------


def outcome(*succeeded: str) -> Callable[[CodeSession, int, int], Awaitable[list[str]]]:
    async def probe(_session: CodeSession, _processes: int, _disk_mb: int) -> list[str]:
        return list(succeeded)

    return probe


async def test_holes_and_limits(one_pod: FakePod, monkeypatch: pytest.MonkeyPatch):
    """An attack that gets through switches the engine off for good; a limit that is missing is named."""
    monkeypatch.setattr(remote, "LOOK_S", 0.01)
    async with engine_at(one_pod.port, probe=outcome("fill the disk", "mount")) as engine:
        assert engine.status.reason == "The wall of the pods does not hold: mount."
        await asyncio.sleep(0.05)
        assert engine.status.state == "off"
    await one_pod.free()
    async with engine_at(one_pod.port, probe=outcome("fill the disk")) as engine:
        assert engine.status.state == "on"
        assert engine.status.unenforced[-1].startswith("The pods do not bound the size and number of files")


def test_what_can_be_seen_of_limits(tmp_path: Path):
    """The limits on memory and processors are found where either kind of cgroup shows them."""
    assert door.bounds(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert door.bounds(tmp_path) == door.CPUS
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert door.bounds(tmp_path) == door.CPUS | door.MEMORY
    (tmp_path / "old/memory").mkdir(parents=True)
    (tmp_path / "old/memory/memory.limit_in_bytes").write_text("1073741824\n")
    assert door.bounds(tmp_path / "old") == door.MEMORY


@pytest.mark.slow
async def test_the_attacks(ordinary_pod: Path, monkeypatch: pytest.MonkeyPatch):
    """In namespaces such as a pod has, as a user that is not root, no attack gets further than what has no limit."""
    code = shutil.copytree(Path(pod.__file__).parent / "guest", ordinary_pod / "code" / "guest").parent
    monkeypatch.setattr(pods, "SANDBOX", str(code))
    python = (*ORDINARY, SYSTEM, "-S")
    async with (
        fake_pod(ordinary_pod / "data", some_settings(), python=python) as started,
        engine_at(started.port, probe=only_holes) as engine,
    ):
        assert engine.status.state == "on", engine.status


def skip_unless_works(*command: str) -> None:
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no such namespaces can be had here")


@pytest.fixture
def pid_namespace() -> None:
    skip_unless_works(*ALONE, "true")


@pytest.fixture
def ordinary_pod() -> Iterator[Path]:
    """A folder that the user of ORDINARY may reach, with `data`, which is its own."""
    skip_unless_works(*ORDINARY, SYSTEM, "-c", "")
    with tempfile.TemporaryDirectory(prefix="pod") as folder:
        Path(folder).chmod(0o755)
        Path(folder, "data").mkdir()
        os.chown(f"{folder}/data", 64321, 64321)
        yield Path(folder)


async def only_holes(session: CodeSession, processes: int, disk_mb: int) -> list[str]:
    here = ("connect to the machine",)  # by its abstract sockets: a pod has a network namespace
    return [hole for hole in await attacks.probe(session, processes, disk_mb) if hole not in here]


# --- the manifest ------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest() -> dict[str, Any]:
    """The objects of deploy/kubernetes/sandbox.yaml, by kind."""
    yaml = pytest.importorskip("yaml")
    objects = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/sandbox.yaml").read_text("utf-8")))
    assert {each["metadata"]["namespace"] for each in objects} == {"afterglow"}
    return {each["kind"]: each["spec"] for each in objects}


def test_the_manifest_is_the_wall(manifest: dict[str, Any]):
    """Its pods have a kernel of their own, no rights, only bounded folders to write to, and no secret but one."""
    of_pod = manifest["Deployment"]["template"]["spec"]
    [container] = of_pod["containers"]
    assert of_pod["runtimeClassName"] == "gvisor"
    assert (of_pod["automountServiceAccountToken"], of_pod["enableServiceLinks"]) == (False, False)
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(of_pod)
    assert of_pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} == set(container["resources"]["limits"])
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    sizes = {places[each["name"]]: each["emptyDir"]["sizeLimit"] for each in of_pod["volumes"]}
    assert set(sizes) == set(pod.FOLDERS)
    assert sizes[pod.FOLDERS[0]] == f"{load({}, environ={}).sandbox_disk_mb}Mi"
    assert all(each["emptyDir"]["medium"] == "Memory" for each in of_pod["volumes"])
    assert [each["name"] for each in container["env"]] == ["AFTERGLOW_SANDBOX_TOKEN"]


def test_the_manifest_lets_only_workers_in(manifest: dict[str, Any]):
    """Its pods can be reached by those that run code, at the one port, and reach nobody; busy ones are not ready."""
    labels = manifest["Deployment"]["template"]["metadata"]["labels"]
    assert manifest["Deployment"]["selector"]["matchLabels"] == manifest["Service"]["selector"] == labels
    assert manifest["NetworkPolicy"] == {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [{"podSelector": {"matchLabels": {"sandbox-client": "true"}}}],
                "ports": [{"protocol": "TCP", "port": 8200}],
            }
        ],
        "egress": [],
    }
    [container] = manifest["Deployment"]["template"]["spec"]["containers"]
    assert container["args"] == ["sandbox", "serve", "--host", "0.0.0.0", "--port", "8200"]
    assert container["readinessProbe"]["tcpSocket"] == {"port": "sessions"}
    assert "livenessProbe" not in container
    assert (manifest["Service"]["clusterIP"], manifest["Service"]["ports"][0]["port"]) == ("None", 8200)


# --- settings and commands ---------------------------------------------------------------------------------------


def test_addresses():
    """Several addresses may be given; what is none is refused, by name."""
    assert remote.places("tcp://a:1, http://b:2,https://[::1]:3") == [
        ("a", 1, False),
        ("b", 2, False),
        ("::1", 3, True),
    ]
    for wrong in ("", "a:1", "tcp://a", "tcp://a:x", "tcp://:1", "ftp://a:1", "tcp://a:1,"):
        with pytest.raises(ConfigError, match="sandbox_url"):
            remote.places(wrong)


def test_a_token_that_is_too_short():
    """A token that could be guessed is refused on both sides."""
    short = dataclasses.replace(some_settings(), sandbox_token="secret")
    with pytest.raises(ConfigError, match="openssl rand"):
        RemoteEngine(short)
    with pytest.raises(ConfigError, match="openssl rand"):
        pod.serve(short, "127.0.0.1", 0)


def test_only_a_pod_serves():
    """Where it is not the first process, `serve` refuses: it would empty /tmp, and hold nothing back."""
    with pytest.raises(ConfigError, match="in a pod of its own"):
        pod.serve(some_settings(), "127.0.0.1", 0)


SERVE = """
import sys
sys.path[:] = {path!r}
from afterglow.sandbox import pod
from afterglow.settings import load
pod.FOLDERS = ({folder!r},)
settings = load({{"sandbox_env": {packages!r}}}, environ={{"AFTERGLOW_SANDBOX_TOKEN": {token!r}}})
pod.serve(settings, "127.0.0.1", 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGES, reason="AFTERGLOW_SANDBOX_ENV names no packages")
async def test_the_command(tmp_path: Path, pid_namespace: None):
    """`serve` becomes the pod's program; what /proc tells of it holds neither the token nor anything of the server."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "left").write_text("secret")
    code = SERVE.format(path=sys.path, folder=str(data), packages=PACKAGES, token=TOKEN).replace(
        "pod.serve(", "pod.os.getuid = lambda: 1\npod.serve("
    )
    process = await asyncio.create_subprocess_exec(
        *(*ALONE, sys.executable, "-c", code),
        stdout=subprocess.PIPE,
        env={"AFTERGLOW_SANDBOX_TOKEN": TOKEN},
        start_new_session=True,
    )
    started = FakePod(process, data)
    try:
        await started.free()
        [first] = descendants(process.pid) - {process.pid}
        told = b"".join(Path(f"/proc/{first}/{name}").read_bytes() for name in ("environ", "cmdline"))
        assert TOKEN.encode() not in told
        assert b"AFTERGLOW" not in told
        async with session_in(started) as session:
            assert (
                text(await shown(session, "import os, sys\n[os.listdir(), 'pandas' in sys.modules]")) == "[[], True]\n"
            )
    finally:
        await pods.end(process)
