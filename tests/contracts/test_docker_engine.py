"""What the engine `docker` promises. Docker itself is played by `docker_api.py`: it answers as the Engine API's
reference says, and runs the real guest in place of a container, so that cells run and the wire is the true one. What a
real Docker makes of the body that `test_the_wall` pins down is not proved here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from afterglow.contracts import CellEnd, CellOutput, CodeSession, EngineStatus, Logs, Picture
from afterglow.errors import SandboxBusy, SandboxOff, SessionLost
from afterglow.sandbox import docker as docker_engine
from afterglow.sandbox import session as sessions
from afterglow.sandbox.docker import COMMAND, DockerEngine, Owner, build_context, this_host
from afterglow.sandbox.docker_api import Unpacker
from afterglow.settings import Settings, load
from tests.contracts.docker_api import FakeDocker

PATIENCE_S = 20.0
PACKAGES = load().sandbox_env
PNG = b"\x89PNG\r\n\x1a\n and so on"
PICTURE = f"""
class Shown:
    def _repr_png_(self):
        return {PNG!r}
Shown()
"""
WILL_NOT_STOP = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("here", flush=True)
while True:
    pass
"""


@pytest.fixture
async def docker() -> AsyncGenerator[FakeDocker]:
    """A Docker that runs. Its folder has a short name, since the path of a socket must be short."""
    with tempfile.TemporaryDirectory(prefix="docker") as folder:
        async with FakeDocker(Path(folder)).running() as running:
            yield running


async def holds(session: CodeSession, processes: int, disk_mb: int) -> list[str]:
    """In place of the attacks, which nothing here would stop."""
    return []


def some_settings(**given: Any) -> Settings:
    return dataclasses.replace(load({"sandbox_pool": 0}, environ={}), **given)


@asynccontextmanager
async def session_in(docker: FakeDocker) -> AsyncGenerator[CodeSession]:
    """A session that runs cells."""
    async with engine_on(docker) as engine:
        docker.guest = "real"
        yield await engine.open()


@asynccontextmanager
async def engine_on(docker: FakeDocker, **given: Any) -> AsyncGenerator[DockerEngine]:
    engine = DockerEngine(some_settings(**given), [docker.path], holds)
    engine.start()
    try:
        assert (await engine.settled()).state == "on", engine.status
        yield engine
    finally:
        await engine.close()


async def off(*sockets: str, probe: docker_engine.Probe = holds) -> EngineStatus:
    """The status of an engine that does not start. It can then open nothing, and says the same."""
    engine = DockerEngine(some_settings(), sockets, probe)
    status = await engine.settled()
    with pytest.raises(SandboxOff) as refusal:
        await engine.open()
    assert str(refusal.value) == f"{status.reason} {status.remedy}"
    await engine.close()
    assert (status.state, status.engine) == ("off", "docker")
    return status


async def shown(session: CodeSession, code: str, timeout_s: float = PATIENCE_S) -> list[CellOutput]:
    return [part async for part in session.run(code, timeout_s)]


def text(parts: list[CellOutput]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Logs))


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


# --- sessions ----------------------------------------------------------------------------------------------------


async def test_cells_run(docker: FakeDocker):
    """Output, values, pictures and variables come through a container as through any session."""
    async with session_in(docker) as session:
        assert text(await shown(session, "x = 6\nprint('é' * 100_000)\nx * 7")) == "é" * 100_000 + "\n42\n"
        assert await shown(session, PICTURE) == [Picture(PNG), CellEnd("ok")]
        parts = await shown(session, "x / 0")
        assert "ZeroDivisionError" in text(parts)
        assert parts[-1] == CellEnd("error")


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGES, reason="AFTERGLOW_SANDBOX_ENV names no packages")
async def test_packages_are_imported_ahead(docker: FakeDocker):
    """A container has its packages imported before it is given away, and what they print does not disturb it."""
    docker.python = [f"{PACKAGES}/bin/python"]
    async with session_in(docker) as session:
        assert text(await shown(session, "import sys\n'pandas' in sys.modules")) == "True\n"
        pictures = await shown(session, "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
        assert [part.mime for part in pictures if isinstance(part, Picture)] == ["image/png"]


async def test_files_go_in_and_come_out(docker: FakeDocker):
    """Files are written, listed and read as frames; nothing of the machine is bound into the container."""
    async with session_in(docker) as session:
        await session.put("in.csv", 6, chunks(b"a,", b"b\n1,2"[:4]))
        assert text(await shown(session, "open('out.txt', 'w').write(open('in.csv').read() * 50_000)")) == "300000\n"
        assert [(file.name, file.size_bytes) for file in await session.list_files()] == [
            ("in.csv", 6),
            ("out.txt", 300_000),
        ]
        assert b"".join([part async for part in session.get("out.txt", 300_000)]) == b"a,b\n1," * 50_000
        with pytest.raises(FileNotFoundError):
            _ = [part async for part in session.get("none", 1)]


async def test_a_cell_that_takes_too_long(docker: FakeDocker):
    """A cell that runs out of time is interrupted, and its variables are kept."""
    async with session_in(docker) as session:
        end = (await shown(session, "x = 1\nwhile True: pass", 0.05))[-1]
        assert isinstance(end, CellEnd)
        assert end.status == "timeout"
        assert text(await shown(session, "x")) == "1\n"


async def test_a_cell_that_will_not_stop(docker: FakeDocker, monkeypatch: pytest.MonkeyPatch):
    """A cell that takes no interrupt loses its session: the container is killed, and its place is free again."""
    monkeypatch.setattr(sessions, "GRACE_S", 0.01)
    async with engine_on(docker, sandbox_sessions=1) as engine:
        docker.guest = "real"
        session = await engine.open()
        end = (await shown(session, WILL_NOT_STOP, 0.3))[-1]
        assert isinstance(end, CellEnd)
        assert end.status == "lost"
        await session.close()
        assert not docker.containers
        await engine.open()


async def test_the_container_dies(docker: FakeDocker):
    """When the container ends in the middle of a cell, the cell ends as lost and the session is over."""
    async with session_in(docker) as session:
        running = session.run("print('here', flush=True)\nimport time\ntime.sleep(60)", PATIENCE_S)
        assert await anext(running) == Logs("here\n")
        [container] = docker.containers.values()
        await docker.remove(container)
        assert [part.status async for part in running if isinstance(part, CellEnd)] == ["lost"]
        assert not session.alive
        with pytest.raises(SessionLost):
            await session.list_files()
        await until(lambda: not docker.containers)


async def test_out_of_memory(docker: FakeDocker):
    """When a cell ends because the container's memory was used up, that is said."""
    async with session_in(docker) as session:
        [container] = docker.containers.values()
        container.out_of_memory = True
        end = (await shown(session, "import os\nos.kill(os.getpid(), 9)"))[-1]
        assert end == CellEnd("lost", "out of memory: it may have 1024 MB")


async def test_docker_goes_away(docker: FakeDocker):
    """When Docker goes away, cells end as lost and new sessions are refused; when it is back, they are opened."""
    async with engine_on(docker) as engine:
        docker.guest = "real"
        session = await engine.open()
        running = session.run("print('here', flush=True)\nimport time\ntime.sleep(60)", PATIENCE_S)
        await anext(running)
        await docker.stop()
        assert [part.status async for part in running if isinstance(part, CellEnd)] == ["lost"]
        await session.close()
        with pytest.raises(SandboxOff, match="Docker does not answer"):
            await engine.open()
        async with docker.running():
            assert text(await shown(await engine.open(), "1 + 1")) == "2\n"
            await engine.close()


async def test_a_container_is_gone_after_close(docker: FakeDocker):
    """When `close` returns, Docker has no such container any more, and its first process has ended."""
    async with session_in(docker) as session:
        [container] = docker.containers.values()
        await session.close()
        assert not docker.containers
        assert container.process is not None
        assert container.process.returncode is not None


async def test_closing_the_engine(docker: FakeDocker):
    """Closing ends all sessions, those of the pool and those about to be; more are refused. It may be done twice."""
    async with engine_on(docker, sandbox_pool=1) as engine:
        session = await engine.open()
        opening = asyncio.create_task(engine.open())
        await asyncio.sleep(0)
        await engine.close()
        assert not session.alive
        assert not docker.containers
        with pytest.raises(SandboxOff, match="stopping"):
            await opening
        with pytest.raises(SandboxOff, match="stopping"):
            await engine.open()


async def test_closing_while_it_starts(docker: FakeDocker):
    """An engine can be closed before it is on; who waits for a session is told."""
    docker.guest = "silent"
    engine = DockerEngine(some_settings(), [docker.path], holds)
    opening = asyncio.create_task(engine.open())
    await until(lambda: docker.containers)
    await engine.close()
    with pytest.raises(SandboxOff, match="stopping"):
        await opening
    assert not docker.containers


# --- how many, and for how long ----------------------------------------------------------------------------------


async def test_the_pool(docker: FakeDocker):
    """Sessions are made ahead; one that has died meanwhile is not given away."""
    async with engine_on(docker, sandbox_pool=2) as engine:
        await until(lambda: len(docker.containers) == 2)
        ready = set(docker.containers)
        first = next(iter(docker.containers.values()))
        await docker.remove(first)
        await until(lambda: any(asked.startswith("DELETE") and first.name in asked for asked in docker.asked))
        assert (await engine.open()).alive
        await until(lambda: len(docker.containers) == 3)
        assert len(ready & set(docker.containers)) == 1


async def test_no_more_than_may_be(docker: FakeDocker):
    """At most `sandbox_sessions` are open; the next is refused until one is closed."""
    async with engine_on(docker, sandbox_sessions=1, sandbox_pool=1) as engine:
        session = await engine.open()
        with pytest.raises(SandboxBusy, match="1"):
            await engine.open()
        await session.close()
        await engine.open()


async def test_few_where_memory_is_not_bounded(docker: FakeDocker):
    """Where Docker cannot limit something the status says so, and without a limit on memory 4 sessions are the most."""
    docker.info |= {"MemoryLimit": False, "SwapLimit": False, "CpuCfsQuota": False, "PidsLimit": False}
    async with engine_on(docker) as engine:
        assert [limit.partition("limit ")[2] for limit in engine.status.unenforced] == [
            "the memory of a session.",
            "what of its memory is swapped out.",
            "its processes.",
            "its processor time.",
        ]
        assert "NanoCpus" not in docker.created[0]["HostConfig"]
        for _ in range(4):
            await engine.open()
        with pytest.raises(SandboxBusy, match="4"):
            await engine.open()


@pytest.mark.parametrize("limit", ["sandbox_ttl_s", "sandbox_idle_s"])
async def test_sessions_end(docker: FakeDocker, monkeypatch: pytest.MonkeyPatch, limit: str):
    """A session that is too old, or idle for too long, is ended."""
    monkeypatch.setattr(docker_engine, "LOOK_S", 0.01)
    async with engine_on(docker, **{limit: 0}) as engine:
        session = await engine.open()
        assert session.alive
        await until(lambda: not session.alive)
        await until(lambda: not docker.containers)


async def test_a_container_that_was_not_removed(docker: FakeDocker, monkeypatch: pytest.MonkeyPatch):
    """What Docker failed to remove is removed later."""
    monkeypatch.setattr(docker_engine, "LOOK_S", 0.01)
    async with engine_on(docker) as engine:
        session = await engine.open()
        docker.refuses = {"DELETE": (500, "driver failed to remove root filesystem")}
        await session.close()
        assert docker.containers
        docker.refuses.clear()
        await until(lambda: not docker.containers)


async def test_a_container_that_is_being_removed(docker: FakeDocker):
    """When a container ends by itself just as it is removed, that is waited for."""
    async with engine_on(docker) as engine:
        session = await engine.open()
        [container] = docker.containers.values()
        docker.refuses = {"DELETE": (409, "removal of container is already in progress")}
        closing = asyncio.create_task(session.close())
        await until(lambda: docker.asked[-1].endswith("/wait"))
        assert not closing.done()
        await docker.remove(container)
        await closing
        assert not docker.containers


async def test_docker_will_not_start_one(docker: FakeDocker):
    """What Docker says when it cannot start a container is passed on, and nothing is left."""
    async with engine_on(docker) as engine:
        docker.refuses = {"/start": (500, "no space left on device")}
        with pytest.raises(SandboxBusy, match=r"^Docker says: no space left on device$"):
            await engine.open()
        assert not docker.containers


async def test_docker_will_not_attach_us(docker: FakeDocker):
    """Without its stdin and stdout a container is of no use, and is removed before it was started."""
    async with engine_on(docker) as engine:
        docker.refuses = {"/attach": (403, "a plugin says no")}
        with pytest.raises(SandboxBusy, match="HTTP 403"):
            await engine.open()
        assert not docker.containers


# --- the wall ----------------------------------------------------------------------------------------------------


async def test_the_wall(docker: FakeDocker):
    """A container is created with exactly this, and nothing else."""
    async with engine_on(docker, sandbox_cpus=1.5):
        [body] = docker.created
    owner = body.pop("Labels")["afterglow.server"]
    assert owner.startswith(f"{this_host()}/{os.getpid()}/")
    image = body.pop("Image")
    assert docker.images == {image}
    place = "rw,nosuid,nodev,{},mode={},size={}m,nr_inodes={},uid=64321,gid=64321"
    assert body == {
        "Entrypoint": COMMAND,
        "WorkingDir": "/mnt/data",
        "User": "64321:64321",
        "Hostname": "sandbox",
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": False,
        "Tty": False,
        "StopSignal": "SIGKILL",
        "HostConfig": {
            "NetworkMode": "none",
            "Dns": ["127.0.0.1"],
            "DnsSearch": ["."],
            "IpcMode": "none",
            "ReadonlyRootfs": True,
            "Privileged": False,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Binds": [],
            "Init": False,
            "AutoRemove": True,
            "LogConfig": {"Type": "none"},
            "Memory": 1024 << 20,
            "MemorySwap": 1024 << 20,
            "PidsLimit": 36,
            "NanoCpus": 1_500_000_000,
            "OomScoreAdj": 1000,
            "Ulimits": [
                {"Name": "core", "Soft": 1, "Hard": 1},
                {"Name": "fsize", "Soft": 512 << 20, "Hard": 512 << 20},
                {"Name": "memlock", "Soft": 0, "Hard": 0},
                {"Name": "msgqueue", "Soft": 0, "Hard": 0},
                {"Name": "nofile", "Soft": 128, "Hard": 128},
                {"Name": "nproc", "Soft": 32 * 36 * 4, "Hard": 32 * 36 * 4},
            ],
            "Tmpfs": {
                "/mnt/data": place.format("exec", "0755", 512, 32_768),
                "/tmp": place.format("exec", "1777", 64, 8192),
                "/dev/shm": place.format("noexec", "1777", 64, 1024),
                "/home/sandbox": place.format("exec", "0755", 16, 4096),
            },
        },
    }


async def test_gvisor(docker: FakeDocker):
    """Where Docker knows gVisor, sessions run in it; what its files cannot be held to is said, and not tried."""
    docker.info["Runtimes"]["runsc"] = {"path": "/usr/local/bin/runsc"}

    async def probe(session: CodeSession, processes: int, disk_mb: int) -> list[str]:
        return ["fill the disk"]

    engine = DockerEngine(some_settings(), [docker.path], probe)
    status = await engine.settled()
    await engine.close()
    assert docker.created[0]["HostConfig"]["Runtime"] == "runsc"
    assert status.unenforced == ("Docker cannot limit the number of its files.",)


async def test_an_attack_that_succeeds(docker: FakeDocker):
    """If a single attack succeeds nothing will run, and the container of the attack is gone."""

    docker.guest = "real"

    async def probe(session: CodeSession, processes: int, disk_mb: int) -> list[str]:
        assert (processes, disk_mb) == (32, 512)
        assert text(await shown(session, "1 + 1")) == "2\n"
        return ["mount", "become another user"]

    status = await off(docker.path, probe=probe)
    assert status.reason == "Docker's wall does not hold here: mount; become another user."
    assert "gVisor" in status.remedy
    assert not docker.containers


async def test_a_fault_while_it_starts(docker: FakeDocker):
    """A fault of ours is raised to whoever waits, and not taken for "starting" without end."""

    async def probe(session: CodeSession, processes: int, disk_mb: int) -> list[str]:
        raise ZeroDivisionError

    engine = DockerEngine(some_settings(), [docker.path], probe)
    for wait in (engine.settled, engine.open):
        with pytest.raises(ZeroDivisionError):
            await wait()
    await engine.close()


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x01\x00\x00\x00\xff\xff\xff\xff",  # four gigabytes to come
        b"\x07\x00\x00\x00\x00\x00\x00\x01x",
        b"\x01\x00\x00\x01\x00\x00\x00\x01x",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x01\x00\x00\x00\x00\x00\x00\x04\xff\xff\xff\xff",  # well packed, and no frame of ours
    ],
)
async def test_a_hostile_stream(docker: FakeDocker, hostile: bytes):
    """Whatever comes in place of packed frames ends the session, and the container with it."""
    docker.guest = "silent"
    opening = asyncio.create_task(off(docker.path))
    await until(lambda: any(container.client for container in docker.containers.values()))
    [container] = docker.containers.values()
    assert container.client is not None
    container.client.write(hostile)
    assert "no session came of it" in (await opening).reason
    assert not docker.containers


async def test_stderr_is_dropped(docker: FakeDocker):
    """What a container writes to stderr is not taken for an answer."""
    async with session_in(docker) as session:
        [container] = docker.containers.values()
        container.say(b"\xff" * 100_000, stream=2)
        assert text(await shown(session, "1 + 1")) == "2\n"


def test_unpacking_does_not_depend_on_the_cuts():
    """However the packed stream is cut, the same comes out."""
    packed = b"\1\0\0\0\0\0\0\5hello\2\0\0\0\0\0\0\3err\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\1!"
    for size in range(1, len(packed) + 1):
        unpacker = Unpacker()
        pieces = [packed[start : start + size] for start in range(0, len(packed), size)]
        assert b"".join(unpacker.unpack(piece) for piece in pieces) == b"hello!"


# --- the image ---------------------------------------------------------------------------------------------------


async def test_the_image_is_built_once(docker: FakeDocker):
    """The image is built from Dockerfile, guest and lock file, and not again for as long as they stay the same."""
    for _ in range(2):
        async with engine_on(docker):
            pass
    [files] = docker.builds
    assert {"Dockerfile", "locks/standard.txt", "guest/agent.py", "guest/contained.py"} <= files.keys()
    assert all(name.startswith(("guest/", "locks/", "Dockerfile")) for name in files)
    assert build_context() == build_context()
    with tarfile.open(fileobj=io.BytesIO(build_context())) as archive:
        assert {(entry.mtime, entry.uid, entry.uname, entry.mode) for entry in archive} == {(0, 0, "", 0o644)}


async def test_a_build_that_fails(docker: FakeDocker):
    """When the image cannot be built, the last that the build said is passed on, cut and made printable."""
    docker.build_says = [
        *({"stream": f"Step {number}\n"} for number in range(100)),
        {"status": "Downloading", "progressDetail": {}},
        {"stream": "\x1b[31mERROR: no \r\n route" + "!" * 10_000},
        {"errorDetail": {"code": 1, "message": "x"}, "error": "The command returned a non-zero code: 1"},
    ]
    status = await off(docker.path)
    assert "Step 98 / Step 99 / ?[31mERROR: no route!!" in status.reason
    assert status.reason.endswith("!! / The command returned a non-zero code: 1.")
    assert len(status.reason) < 600
    assert "package index" in status.remedy


async def test_a_build_that_is_refused(docker: FakeDocker):
    """When Docker does not even begin to build, what it says is passed on."""
    docker.refuses = {"/build": (500, "no builder")}
    assert (await off(docker.path)).reason.endswith("Docker says: no builder.")


# --- finding Docker ----------------------------------------------------------------------------------------------


async def test_no_docker(tmp_path: Path):
    """Where there is no socket, the remedy is to install and start Docker."""
    status = await off(str(tmp_path / "docker.sock"))
    assert status.reason == "No socket of Docker's was found."
    assert "Install Docker" in status.remedy


async def test_docker_is_not_running(docker: FakeDocker):
    """Where nobody listens at the socket, the remedy is to start Docker."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{docker.path}2")
    status = await off(f"{docker.path}2")
    assert status.reason == f"Docker does not answer at {docker.path}2."
    assert status.remedy == "Start Docker."


async def test_permission_denied(docker: FakeDocker, monkeypatch: pytest.MonkeyPatch):
    """Where the socket is not for this user, the remedy says how it can be."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    status = await off(docker.path)
    assert "permission denied" in status.reason
    assert "group `docker`" in status.remedy


async def test_the_first_that_works_is_taken(docker: FakeDocker, tmp_path: Path):
    """Of several sockets the first is used behind which a Docker works."""
    (tmp_path / "plain").touch()
    engine = DockerEngine(some_settings(), [str(tmp_path / "none"), str(tmp_path / "plain"), docker.path], holds)
    assert (await engine.settled()).state == "on"
    await engine.close()


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ({"ApiVersion": "1.40", "Os": "linux"}, "version 1.40 of its API"),
        ({"Os": "linux"}, "version none of its API"),
        ({"ApiVersion": "1.47", "Os": "windows"}, "no Linux containers"),
        (["no", "object"], "cannot be understood"),
    ],
)
async def test_a_docker_that_will_not_do(docker: FakeDocker, version: Any, reason: str):
    """A Docker that is too old, runs Windows, or is none at all is not used."""
    docker.version = version
    assert reason in (await off(docker.path)).reason


@pytest.mark.parametrize(("newest", "spoken"), [("1.41", "/v1.41/"), ("1.99", "/v1.51/")])
async def test_the_version_spoken(docker: FakeDocker, newest: str, spoken: str):
    """The newest version of the API is spoken that both sides know."""
    docker.version["ApiVersion"] = newest
    async with engine_on(docker):
        assert all(spoken in asked for asked in docker.asked[1:])


# --- what dead servers leave -------------------------------------------------------------------------------------


async def test_what_a_dead_server_left_is_removed(docker: FakeDocker):
    """At the start, containers are removed whose server was on this host and is dead; no others."""
    here = this_host()
    ended = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", "")
    await ended.wait()
    dead = docker.add({"afterglow.server": f"{here}/{ended.pid}/0"})
    before_us = docker.add({"afterglow.server": f"{here}/{os.getpid()}/0"})
    kept = [
        docker.add({"afterglow.server": f"{here}/{os.getppid()}/0"}),
        docker.add({"afterglow.server": f"elsewhere/{ended.pid}/0"}),
        docker.add({"afterglow.server": f"{socket.gethostname()}/{ended.pid}/0"}),  # in some container of that name
        docker.add({"afterglow.server": "hm"}),
        docker.add({"else": f"{here}/{ended.pid}/0"}),
    ]
    async with engine_on(docker):
        assert [container for container in docker.containers.values() if not container.guest] == kept
        assert dead.gone.is_set()
        assert before_us.gone.is_set()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has them")
def test_a_pid_namespace_is_a_host_of_its_own():
    """Servers in two containers with one host name do not take each other for dead."""
    unshared = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*unshared, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no pid namespace can be had here")
    code = f"import sys; sys.path[:] = {sys.path!r}; from afterglow.sandbox.docker import this_host; print(this_host())"
    there = subprocess.check_output([*unshared, sys.executable, "-c", code], text=True).strip()
    name, boot, namespace = this_host().split(":")
    assert there.startswith(f"{name}:{boot}:")
    assert not there.endswith(f":{namespace}")


@pytest.mark.parametrize("label", ["", "here", "here/", "here/x/1", "here/7/mine", "here/1/0", f"here/{10**30}/0"])
def test_labels_that_say_nothing(label: str):
    """What cannot be read as a dead server's label is left alone, as is what a living one wrote."""
    assert not Owner("here", 7, "mine").outlived(label)
