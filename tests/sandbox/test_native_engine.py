"""The native engine as a whole: what sessions can do, what they cannot, and what is left when something dies."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from afterglow.contracts import CodeSession
from afterglow.errors import SandboxBusy, SandboxOff, SessionLost
from afterglow.sandbox import attacks, cgroups, local, packages
from afterglow.sandbox.guest import launch
from afterglow.sandbox.local import NativeEngine
from tests.sandbox import as_user
from tests.sandbox.conftest import StartEngine, run, settings
from tests.sandbox.processes import Process, census, cgroups_of, children, descendants, fork_server_of, living, until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the native engine is for Linux"),
    pytest.mark.asyncio(loop_scope="module"),
]

WEDGE = "import os\nos.closerange(3, 64)\nwhile True: pass"
FILL = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        held = bytearray(b"x" * (60 << 20))
        time.sleep(60)
time.sleep(60)
"""
SOCKETS = """
import os, socket, time
def fill():
    held = []
    while True:
        held.append(socket.socketpair())
        for end in held[-1]:
            end.setblocking(False)
            try:
                while True:
                    end.send(bytes(4096))
            except BlockingIOError:
                pass
for _ in range(24):
    if os.fork() == 0:
        try:
            fill()
        except OSError:
            time.sleep(60)
time.sleep(60)
"""
SPINNERS = """
import os, subprocess
sleeping = subprocess.Popen(["sleep", "600"])
for _ in range(10):
    if os.fork() == 0:
        os.setsid()
        while True: pass
"""
BOMB = """
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError as error:
    print(made, error.errno == 11)
"""
RELAY = """
import subprocess, threading
RUNNER = '''
import os, time
end = time.time() + 60
while time.time() < end:
    began = time.process_time()
    while time.process_time() - began < 0.006: pass
    if os.fork(): os._exit(0)
'''
def later():
    for _ in range(3): subprocess.Popen(["python3", "-I", "-S", "-c", RUNNER])
threading.Timer(0.3, later).start()
"""
SERVER = """
import asyncio, sys
from afterglow.sandbox.local import NativeEngine
from afterglow.settings import load

async def main():
    engine = NativeEngine(load({"sandbox_env": sys.argv[1]}, environ={}))
    status = await engine.settled()
    if status.state != "on":
        raise SystemExit(f"off: {status.reason} {status.remedy}")
    session = await engine.open()
    async for part in session.run("import numpy\\nprint(numpy.arange(4).sum())", 20):
        print(part, flush=True)
    print(status.unenforced, flush=True)
    if len(sys.argv) > 2:
        async for part in session.run("import os\\nos.fork()\\nwhile True: pass", 600):
            pass
    await engine.close()

asyncio.run(main())
"""


async def spawn_server(*arguments: str, before: tuple[str, ...] = (sys.executable,)) -> asyncio.subprocess.Process:
    """Another process with an engine of its own; with a second argument its session computes until it is killed."""
    return await asyncio.create_subprocess_exec(
        *before, "-c", SERVER, *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


# --- what sessions can do --------------------------------------------------------------------------------------


async def test_cells_share_their_variables(session: CodeSession) -> None:
    """A session prints, shows a table, and draws, and what one cell defines the next one has."""
    assert (await run(session, "print(6 * 7)")).text == "42\n"
    shown = await run(session, "import pandas as pd\ntable = pd.DataFrame({'a': [1, 2]})\ntable")
    assert "a\n0  1\n1  2" in shown.text
    drawn = await run(session, "import matplotlib.pyplot as plt\nplt.plot(table.a)\nplt.show()")
    assert [picture[:4] for picture in drawn.pictures] == [b"\x89PNG"]


async def test_files_go_in_and_out(session: CodeSession) -> None:
    """What is put is there, and what a cell writes can be listed and read."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"a,b\n"
        yield b"1,2\n"

    await session.put("in.csv", 8, chunks())
    assert (await run(session, "open('out.txt', 'w').write(open('/mnt/data/in.csv').read() * 2)")).status == "ok"
    sizes = {file.name: file.size_bytes for file in await session.list_files()}
    assert sizes == {"in.csv": 8, "out.txt": 16}
    assert b"".join([chunk async for chunk in session.get("out.txt", 100)]) == b"a,b\n1,2\n" * 2


async def test_sessions_see_nothing_of_each_other(engine: NativeEngine, session: CodeSession) -> None:
    """Files and variables of one session are not another's, nor is its chance."""
    other = await engine.open()
    drawn = "import random, numpy\nprint(random.random(), numpy.random.rand(), hash('a') * 0)"
    try:
        await run(session, "open('/mnt/data/a', 'w').write('secret')\nopen('/tmp/a', 'w').write('secret')\na = 1")
        seen = await run(other, "import os\nprint(os.listdir('/mnt/data'), os.path.exists('/tmp/a'), 'a' in globals())")
        assert seen.text == "[] False False\n"
        assert (await run(session, drawn)).text != (await run(other, drawn)).text
    finally:
        await other.close()


# --- what ends what --------------------------------------------------------------------------------------------


async def test_a_late_cell_is_interrupted_and_its_variables_are_kept(session: CodeSession) -> None:
    """A cell that runs too long ends as `timeout`, and the session goes on."""
    await run(session, "kept = 7")
    assert (await run(session, "while True: pass", timeout_s=0.3)).status == "timeout"
    assert (await run(session, "kept")).text == "7\n"


async def test_a_session_that_takes_too_much_memory_says_so(engine: NativeEngine, session: CodeSession) -> None:
    """One array too large is a MemoryError; too much in all ends the session, with the reason."""
    assert "MemoryError" in (await run(session, "bytearray(10**10)")).text
    cell = await run(session, FILL)
    assert cell.status == "lost"
    assert "out of memory" in cell.end.why
    assert not session.alive


async def test_what_a_cell_has_started_ends_with_it(engine: NativeEngine, session: CodeSession) -> None:
    """When a cell has ended nothing runs on but the worker: no child of it, and no child that has let go of it."""
    assert (await run(session, SPINNERS)).status == "ok"
    assert await until(lambda: len(family_of(engine, session)) == 2, 2)
    assert (await run(session, "print(sleeping.poll())")).text == "-9\n"


def family_of(engine: NativeEngine, session: CodeSession) -> set[Process]:
    """All living processes of a session."""
    [life] = [life for life in engine.living if life.session is session]
    assert life._process is not None
    init = life._process.host_pid()
    [server] = [launcher for launcher in engine_launchers(engine) if init in children(fork_server_of(launcher))]
    me = {process for process in descendants(fork_server_of(server)) if process.pid == init}
    return me | descendants(init)


async def test_a_fork_bomb_stays_small(session: CodeSession) -> None:
    """Processes run out in the session, and nowhere else; it survives that."""
    cell = await run(session, BOMB)
    made, refused = cell.text.split()
    assert int(made) < settings().sandbox_processes
    assert refused == "True"
    assert (await run(session, "print(1)")).text == "1\n"


async def test_there_are_no_more_sessions_than_may_be(engine: NativeEngine) -> None:
    """Beyond `sandbox_sessions` the engine is busy; when one ends there is room again."""
    opened = [await engine.open() for _ in range(engine.settings.sandbox_sessions)]
    with pytest.raises(SandboxBusy):
        await engine.open()
    await opened.pop().close()
    opened.append(await engine.open())
    await asyncio.gather(*(session.close() for session in opened))


async def test_what_ends_leaves_nothing(engine: NativeEngine) -> None:
    """After a session is closed there is no process, descriptor, mount or cgroup more than before."""
    await (await engine.open()).close()
    assert await until(lambda: len(descendants(os.getpid())) == 3 + 2)  # the engine's own, and one session made ahead
    before = census()
    session = await engine.open()
    later = "lambda: os.fork() or time.sleep(600)"
    await run(session, f"import os, threading, time\nthreading.Timer(0.05, {later}).start()")
    assert await until(lambda: len(family_of(engine, session)) == 3)
    mine = family_of(engine, session)
    await session.close()
    assert living(mine) == set()
    assert await until(lambda: census() == before), (census(), before)


async def test_an_attack_that_succeeds_keeps_the_engine_off(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the wall does not stop one attack the engine is off, says which, and everything has ended."""
    before = descendants(os.getpid())
    monkeypatch.setitem(attacks.ATTACKS, "write to /mnt/data", "return opens('/mnt/data/a', 'wb')")
    async with start_engine() as engine:
        assert engine.status.state == "off"
        assert "write to /mnt/data" in engine.status.reason
        with pytest.raises(SandboxOff):
            await engine.open()
        assert descendants(os.getpid()) == before


async def test_without_packages_the_engine_is_off(tmp_path: Path) -> None:
    """No environment, no engine, and the remedy is the command that makes one."""
    engine = NativeEngine(settings(sandbox_env=str(tmp_path)))
    status = await engine.settled()
    assert status.state == "off"
    assert "afterglow sandbox setup" in status.remedy
    await engine.close()


async def test_without_room_for_one_session_the_engine_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server's user may not start as many processes as one session may have, nothing is begun."""
    monkeypatch.setattr(local, "process_room", lambda: 20)
    engine = NativeEngine(settings())
    status = await engine.settled()
    assert status.state == "off"
    assert "20 more processes" in status.reason
    await engine.close()


async def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor whose system calls are not known the engine is off, and another one is named."""
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    engine = NativeEngine(settings())
    status = await engine.settled()
    assert (status.state, "docker" in status.remedy) == ("off", True)
    await engine.close()


@pytest.mark.slow
async def test_a_wedged_session_is_killed(session: CodeSession) -> None:
    """A cell that has cut all its connections and computes on is ended with all its processes."""
    before = descendants(os.getpid())
    cell = await run(session, WEDGE, timeout_s=0.5)
    assert cell.status == "lost"
    assert not session.alive
    await session.close()
    assert len(living(before)) <= len(before) - 2


@pytest.mark.slow
async def test_memory_that_no_process_shows_is_bounded(engine: NativeEngine, session: CodeSession) -> None:
    """Socket buffers, which are in no process's size, count where a cgroup bounds the session."""
    if engine.status.unenforced:
        pytest.skip("no cgroup can be made here")
    cell = await run(session, SOCKETS, timeout_s=20)
    assert cell.status == "lost"
    assert "out of memory" in cell.end.why


@pytest.mark.slow
async def test_without_cgroups_the_guard_keeps_watch(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no cgroup can be made the guard ends what takes too much, files included; and that is said beforehand."""
    monkeypatch.setattr(cgroups, "find", lambda limits: None)
    monkeypatch.setattr(cgroups, "scope_command", lambda unit: [])
    async with start_engine() as engine:
        assert "watched" in engine.status.unenforced[0]
        hog, writer = await engine.open(), await engine.open()
        cell = await run(hog, FILL)
        assert (cell.status, "out of memory" in cell.end.why) == ("lost", True)
        await run(writer, "held = b'x' * (180 << 20)")
        cell = await run(
            writer, "more = b'x' * (60 << 20)\nopen('/mnt/data/a', 'wb').write(more)\nwhile True: pass", 10
        )
        assert (cell.status, "out of memory" in cell.end.why) == ("lost", True)
        sessions = [await engine.open() for _ in range(4)]
        with pytest.raises(SandboxBusy):
            await engine.open()
        await asyncio.gather(*(session.close() for session in sessions))


@pytest.mark.slow
async def test_one_that_computes_between_cells_is_ended(session: CodeSession) -> None:
    """A thread left running after its cell ends its session, when it burns the processor."""
    burn = "import threading\ndef burn():\n    while True: pass\nthreading.Thread(target=burn, daemon=True).start()"
    assert (await run(session, burn)).status == "ok"
    assert await until(lambda: not session.alive, 30)
    assert "no cell ran" in (await run(session, "print(1)")).end.why


@pytest.mark.slow
async def test_short_processes_between_cells_are_counted(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay of processes that live for milliseconds ends its session as well; its cgroup counts exactly."""
    monkeypatch.setattr(local, "SWEEP_S", 0.5)
    async with start_engine(sandbox_pool=0) as engine:
        session = await engine.open()
        assert (await run(session, RELAY)).status == "ok"
        assert await until(lambda: not session.alive, 20)
        assert "no cell ran" in (await run(session, "print(1)")).end.why


@pytest.mark.slow
async def test_without_cgroups_who_hides_memory_goes_first(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full sockets, which are in nobody's size, end the session that has them, and not the one beside it."""
    monkeypatch.setattr(cgroups, "find", lambda limits: None)
    monkeypatch.setattr(cgroups, "scope_command", lambda unit: [])
    async with start_engine(sandbox_pool=0) as engine:
        honest = await engine.open()
        await run(honest, "held = b'x' * (150 << 20)")
        cell = await run(await engine.open(), SOCKETS, timeout_s=20)
        assert (cell.status, "out of memory" in cell.end.why) == ("lost", True)
        assert (await run(honest, "print(len(held) >> 20)")).text == "150\n"


@pytest.mark.slow
async def test_forty_sessions_leave_nothing(engine: NativeEngine) -> None:
    """Sessions opened and closed by the dozen leave no process, descriptor, mount or cgroup."""
    await (await engine.open()).close()
    assert await until(lambda: len(descendants(os.getpid())) == 3 + 2)
    before = census()
    for _ in range(10):
        opened = await asyncio.gather(*(engine.open() for _ in range(4)))
        await run(opened[0], "print(1)")
        await asyncio.gather(*(session.close() for session in opened))
    assert await until(lambda: census() == before), (census(), before)


# --- what dies -------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_killed_fork_server_is_replaced(start_engine: StartEngine) -> None:
    """When the fork server is killed its sessions are lost, and the next `open` gets one from a new one."""
    async with start_engine(sandbox_pool=0) as engine:
        session = await engine.open()
        [launcher] = set(children(os.getpid())) & engine_launchers(engine)
        running = asyncio.create_task(run(session, "while True: pass"))
        await asyncio.sleep(0.05)
        os.kill(fork_server_of(launcher), signal.SIGKILL)
        cell = await running
        assert cell.status == "lost"
        assert not session.alive
        with pytest.raises(SessionLost):
            await session.list_files()
        again = await engine.open()
        assert (await run(again, "print(1)")).text == "1\n"


async def test_a_removed_cgroup_is_made_anew(engine: NativeEngine) -> None:
    """Somebody who removes our empty cgroups does not keep sessions from being opened."""
    if engine._groups is None:
        pytest.skip("no cgroup can be made here")
    assert await until(lambda: all(life in engine._pool for life in engine.living))
    for life in list(engine.living):
        await life.session.close()
    for folder in engine._groups._folders.values():
        assert cgroups._remove_folder(folder)
    session = await engine.open()
    assert (await run(session, "print(1)")).text == "1\n"
    await session.close()


@pytest.mark.slow
async def test_a_frozen_guard_is_replaced(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A guard that gives no sign of life watches nobody: its sessions are ended, and there is a new one."""
    monkeypatch.setattr(local, "SWEEP_S", 0.05)
    async with start_engine(sandbox_pool=0) as engine:
        session = await engine.open()
        [launcher] = engine_launchers(engine)
        [frozen] = children(launcher)
        family = descendants(launcher)
        os.kill(frozen, signal.SIGSTOP)
        for busy in range(3000):  # more than its socket takes
            engine._generations[0].server.tell(1, bool(busy % 2))
        assert engine._generations[0].server._telling is not None
        monkeypatch.setattr(local, "SILENCE_S", 0.3)
        assert await until(lambda: not session.alive)
        monkeypatch.setattr(local, "SILENCE_S", 10.0)
        assert await until(lambda: not living(family))
        assert "is silent" in caplog.text
        assert "again and again" not in caplog.text
        assert (await run(await engine.open(), "print(1)")).text == "1\n"


@pytest.mark.slow
async def test_last_words_are_kept(start_engine: StartEngine, caplog: pytest.LogCaptureFixture) -> None:
    """What the guard or the fork server says as it breaks is in the log."""
    if os.geteuid() != 0:
        pytest.skip("only root may write there")
    async with start_engine(sandbox_pool=0) as engine:
        [launcher] = engine_launchers(engine)
        [pid] = children(launcher)
        Path(f"/proc/{pid}/fd/2").write_text("MemoryError: in the guard\n")
        os.kill(pid, signal.SIGKILL)
        assert await until(lambda: not engine._generations)
        assert "MemoryError: in the guard" in caplog.text


@pytest.mark.slow
async def test_a_fork_server_that_cannot_be_replaced_is_kept(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the old one works, failures to start a new one end nothing; later it is tried again."""
    monkeypatch.setattr(local, "SWEEP_S", 0.02)
    monkeypatch.setattr(local, "RENEW_AGAIN_S", 0.1)
    async with start_engine(sandbox_pool=0) as engine:
        session = await engine.open()
        [first] = engine_launchers(engine)
        with monkeypatch.context() as broken:
            broken.setattr(launch, "command", lambda python: ["/nowhere"])
            broken.setattr(local, "GENERATION_FORKS", 1)
            assert await until(lambda: caplog.text.count("an old fork server is kept") > local.FAILURES)
            assert engine.status.state == "on"
            assert (await run(session, "print(1)")).text == "1\n"
            assert (await run(await engine.open(), "print(1)")).text == "1\n"
            broken.setattr(local, "Generation", without_descriptors)
            assert await until(lambda: "Too many open files" in caplog.text)
        monkeypatch.setattr(local, "GENERATION_FORKS", 1)
        assert await until(lambda: engine_launchers(engine) - {first} != set())


@pytest.mark.slow
async def test_fork_servers_are_replaced_only_so_often(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions that stay, one in each fork server, do not pile those up: each is as large as its packages."""
    monkeypatch.setattr(local, "SWEEP_S", 0.02)
    monkeypatch.setattr(local, "GENERATION_FORKS", 1)
    async with start_engine(sandbox_pool=0) as engine:

        def renewed() -> bool:
            current = engine._current()
            return len(engine._generations) == local.MOST_GENERATIONS or (current is not None and not current.is_old)

        kept = []
        for _ in range(local.MOST_GENERATIONS + 2):
            kept.append(await engine.open())
            assert await until(renewed)
        assert len(engine._generations) == local.MOST_GENERATIONS
        assert all(session.alive for session in kept)


def without_descriptors(_engine: NativeEngine) -> None:
    raise OSError(24, "Too many open files")


@pytest.mark.slow
async def test_whoever_waits_for_an_engine_that_closes_is_refused(start_engine: StartEngine) -> None:
    """An `open` that waits for a fork server is told that it does not come, and is not cancelled."""
    async with start_engine(sandbox_pool=0) as engine:
        [launcher] = engine_launchers(engine)
        os.kill(launcher, signal.SIGKILL)
        assert await until(lambda: not engine._generations)
        opening = asyncio.create_task(engine.open())
        assert await until(lambda: bool(engine._generations))
        await engine.close()
        with pytest.raises(SandboxOff):
            await opening


def engine_launchers(engine: NativeEngine) -> set[int]:
    return {generation.server.pid for generation in engine._generations}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC])
async def test_a_fork_server_that_cannot_fork_says_so(start_engine: StartEngine, limit: int) -> None:
    """Out of descriptors or processes the fork server is busy; sessions and itself go on, and later it can again."""
    if os.geteuid() != 0:
        pytest.skip("only root may set the limits of others")
    async with start_engine(sandbox_pool=0) as engine:
        session = await engine.open()
        [launcher] = engine_launchers(engine)
        fork_server = fork_server_of(launcher)
        soft, hard = resource.prlimit(fork_server, limit)
        enough = len(os.listdir(f"/proc/{fork_server}/fd")) if limit == resource.RLIMIT_NOFILE else 1
        resource.prlimit(fork_server, limit, (enough, hard))
        with pytest.raises(SandboxBusy):
            await engine.open()
        assert (await run(session, "print(1)")).text == "1\n"
        resource.prlimit(fork_server, limit, (soft, hard))
        assert (await run(await engine.open(), "print(1)")).text == "1\n"
        assert engine_launchers(engine) == {launcher}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["guard", "launcher"])
async def test_all_ends_with_its_keepers(start_engine: StartEngine, victim: str) -> None:
    """When the guard or the launcher dies the kernel ends every session, and the engine starts anew."""
    async with start_engine(sandbox_pool=1) as engine:
        session = await engine.open()
        [launcher] = engine_launchers(engine)
        family = descendants(launcher)
        os.kill(launcher if victim == "launcher" else children(launcher)[0], signal.SIGKILL)
        assert await until(lambda: not living(family))
        assert await until(lambda: not session.alive)
        assert (await run(await engine.open(), "print(1)")).text == "1\n"


@pytest.mark.slow
async def test_a_fork_server_that_dies_again_and_again_is_given_up(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After several failures in short time the engine is off, with the reason."""
    monkeypatch.setattr(local, "FAILURES", 2)
    async with start_engine(sandbox_pool=0) as engine:
        engine._failed_at = type(engine._failed_at)(maxlen=2)
        for _ in range(2):
            await engine.open()
            [launcher] = engine_launchers(engine)
            os.kill(launcher, signal.SIGKILL)
            assert await until(lambda: not engine._generations)
        assert await until(lambda: engine.status.state == "off")
        with pytest.raises(SandboxOff):
            await engine.open()


@pytest.mark.slow
async def test_an_old_fork_server_is_replaced_and_its_sessions_go_on(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By age a new one takes over; sessions of the old one live on, and with the last of them it ends."""
    monkeypatch.setattr(local, "SWEEP_S", 0.05)
    async with start_engine(sandbox_pool=1) as engine:
        session = await engine.open()
        [first] = engine_launchers(engine)
        monkeypatch.setattr(local, "GENERATION_FORKS", 1)
        assert await until(lambda: engine_launchers(engine) - {first} != set())
        monkeypatch.setattr(local, "GENERATION_FORKS", 500)
        assert (await run(session, "print(1)")).text == "1\n"
        await session.close()
        assert await until(lambda: first not in engine_launchers(engine))
        assert (await run(await engine.open(), "print(1)")).text == "1\n"


@pytest.mark.slow
async def test_an_unused_fork_server_ends_until_it_is_needed(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without sessions for long enough nothing runs; the next `open` starts it again."""
    monkeypatch.setattr(local, "SWEEP_S", 0.05)
    monkeypatch.setattr(local, "UNUSED_S", 0.3)
    async with start_engine(sandbox_pool=1) as engine:
        [launcher] = engine_launchers(engine)
        family = descendants(launcher)
        assert await until(lambda: not living(family))
        assert engine.status.state == "on"
        assert (await run(await engine.open(), "print(1)")).text == "1\n"


@pytest.mark.slow
async def test_sessions_end_by_age_and_idleness(start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that runs nothing, and one that is too old, are ended; the next cell is told why."""
    monkeypatch.setattr(local, "SWEEP_S", 0.05)
    async with start_engine(sandbox_idle_s=1) as engine:
        idle = await engine.open()
        assert await until(lambda: not idle.alive)
        assert "nothing" in (await run(idle, "print(1)")).end.why
    async with start_engine(sandbox_ttl_s=1) as engine:
        old = await engine.open()
        cell = await run(old, "while True: pass", timeout_s=20)
        assert (cell.status, "old" in cell.end.why) == ("lost", True)


@pytest.mark.slow
async def test_nothing_survives_a_server_that_is_killed(packages_folder: Path, start_engine: StartEngine) -> None:
    """After kill -9 of the server no process of its engine is left, and the next one removes its cgroups."""
    server = await spawn_server(str(packages_folder), "go on")
    assert server.stdout is not None
    said = await server.stdout.readline()
    assert b"6" in said, said + await server.stdout.read()
    assert await until(lambda: len(descendants(server.pid)) >= 6)
    family = descendants(server.pid)
    server.kill()
    await server.communicate()
    assert await until(lambda: not living(family)), living(family)
    async with start_engine(sandbox_pool=0):
        assert cgroups_of(server.pid) == []


@pytest.mark.slow
async def test_an_ordinary_user_can_have_it(packages_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without any power of root the wall can be built, too; what cannot be bounded then is said."""
    if os.geteuid() != 0:
        pytest.skip("the other tests show it")
    environment = environment_for_others(packages_folder, tmp_path_factory)
    paths = [str(Path(attacks.__file__).parents[2]), *(path for path in sys.path if "site-packages" in path)]
    become = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "/usr/bin/python3")
    program = (*become, "-I", "-B", "-c", f"import sys; sys.path += {paths!r}\n{SERVER}", str(environment))
    server = await asyncio.create_subprocess_exec(*program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/")
    said, _ = await server.communicate()
    assert "text='6\\n'" in said.decode(), said.decode()
    assert "no cgroup" in said.decode()


def environment_for_others(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with a Python that everybody may run: the system's, if it is of the same version."""
    found = packages.describe(folder)
    system = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=False).stdout.split()
    minor = ".".join(found.version.split(".")[:2])
    if not system or not system[1].startswith(f"{minor}.") or shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, and a system Python of the packages' version")
    made = tmp_path_factory.mktemp("environment")
    as_user.environment_for_others(folder, made)
    return made
