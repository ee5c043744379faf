"""The engine `docker`: a session is a container of our own image.

What holds it: no network, a root that cannot be written, no capabilities and no way to gain any, a user of its own,
system calls filtered by Docker and once more by the guest, bounds on memory, processes, processors and files; with
gVisor (`runsc`), where Docker knows it, a kernel of its own. Without gVisor it shares the machine's kernel. Nothing of
the machine is bound into it; files travel as frames over its stdin and stdout.

A container lives as long as the connection to its stdin: Docker closes the one with the other, and then the agent
ends. One that model-written code keeps from ending is killed from outside: by us, or by the next server, which knows
by its label whose it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import secrets
import socket
import tarfile
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from afterglow.contracts import CodeSession, EngineStatus
from afterglow.errors import SandboxBusy, SandboxOff, SessionLost
from afterglow.sandbox import attacks
from afterglow.sandbox.cgroups import AGENT_TASKS
from afterglow.sandbox.docker_api import OLDEST, Docker, DockerFault, Info, Version
from afterglow.sandbox.guest import contained, wall
from afterglow.sandbox.session import Session
from afterglow.sandbox.settling import Settling
from afterglow.settings import Settings
from afterglow.telemetry import log

T = TypeVar("T")
# Given a session, how many processes it may have, and MB of disk: which attacks succeeded, in words.
Probe = Callable[[CodeSession, int, int], Awaitable[list[str]]]

HERE = Path(__file__).parent
IMAGE = "afterglow-sandbox"
LOCK = "standard.txt"
LABEL = "afterglow.server"
USER = 64321  # nobody's on any machine, and among the 65,536 that a remapped Docker has
GVISOR = "runsc"
NOT_FOR_GVISOR = ("fill the disk",)  # its tmpfs does not say how many files it would hold
WITHOUT_MEMORY_LIMIT = 4  # sessions at most
TMP_MB = 64  # of /tmp, and as much again of /dev/shm
LOOK_S = 5.0  # between two looks for sessions that are too old, or have been idle for too long
START_S = 60.0  # for a container, until its packages are imported
LOOK_AT_LOG = "Docker's own log may say more."
MB = 1 << 20

COMMAND = [
    *("/usr/bin/env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin"),  # the image has variables of its own
    *(f"{name}={value}" for name, value in contained.VARIABLES.items()),
    *("/usr/local/bin/python", "-I", "-B", "-c"),
    "import sys; sys.path.insert(0, '/opt/afterglow'); from guest.contained import main; main()",
]


class Unusable(Exception):
    """Docker cannot be the wall here. reason, remedy: as in `EngineStatus`."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


class Container:
    """One container, and the session in it. taken_at: when it was given away, on the event loop's clock."""

    session: Session

    def __init__(self, name: str, remove: Callable[[Container], Coroutine[Any, Any, None]]) -> None:
        self.name = name
        self.taken_at: float | None = None
        self._remove = remove
        self._removal: asyncio.Task[None] | None = None

    def kill(self) -> None:
        self.removal()

    def removal(self) -> asyncio.Task[None]:
        """The task that kills and removes it, begun when first asked for."""
        if self._removal is None:
            self._removal = asyncio.create_task(self._remove(self))
        return self._removal

    async def gone(self) -> None:
        await asyncio.wait([self.removal()])


class DockerEngine(Settling):
    """A `contracts.CodeEngine`. sockets: where Docker may listen, the preferred place first; None: `docker_host`, else
    the usual places."""

    def __init__(self, settings: Settings, sockets: Sequence[str] | None = None, probe: Probe = attacks.probe) -> None:
        super().__init__("docker")
        self._settings = settings
        configured = [settings.docker_host] if settings.docker_host else usual_sockets()
        self._sockets = configured if sockets is None else sockets
        self._probe = probe
        self._owner = Owner(this_host(), os.getpid(), secrets.token_hex(4))
        self._docker: Docker | None = None
        self._body: Mapping[str, Any] = {}
        self._most = settings.sandbox_sessions
        self._filling = False
        self._opening = 0
        self._containers: set[Container] = set()
        self._pool: deque[Container] = deque()
        self._left: set[str] = set()  # containers that Docker did not remove when it was asked

    async def open(self) -> CodeSession:
        status = await self.settled()
        if status.state != "on":
            raise SandboxOff(f"{status.reason} {status.remedy}".rstrip())
        if self._free_places() < 1:
            raise SandboxBusy(f"As many sessions are open as may be: {self._most}.")
        self._opening += 1
        try:
            container = await self._take()
        except DockerFault as fault:
            raise (SandboxBusy if fault.status else SandboxOff)(str(fault)) from None
        except SessionLost as lost:
            raise SandboxBusy(f"The session did not start: {lost}") from None
        finally:
            self._opening -= 1
        container.taken_at = asyncio.get_running_loop().time()
        self._fill_pool()
        return container.session

    async def close(self) -> None:
        await self._end_tasks()
        await asyncio.gather(*(container.session.close() for container in self._containers))
        await self._disconnect()

    # --- starting

    async def _settle(self) -> None:
        try:
            limits = await self._build_wall()
        except Unusable as no:
            await self._give_up(no)
        except DockerFault as fault:
            await self._give_up(Unusable(str(fault), LOOK_AT_LOG))
        except (SessionLost, OSError) as error:
            await self._give_up(Unusable(f"A container was started, but no session came of it. {error}", LOOK_AT_LOG))
        else:
            self._status = EngineStatus("on", "docker", unenforced=limits)
            log.info("code interpreter: docker at %s", self._docker.path if self._docker else "")
            for limit in limits:
                log.warning("code interpreter: %s", limit)
            self._spawn(self._look_after())
            self._fill_pool()

    async def _give_up(self, no: Unusable) -> None:
        self._status = EngineStatus("off", "docker", no.reason, no.remedy)
        log.warning("code interpreter: docker engine is off: %s %s", no.reason, no.remedy)
        await self._disconnect()

    async def _build_wall(self) -> tuple[str, ...]:
        """Everything up to the first session that withstood the attacks. Returns what cannot be enforced."""
        docker = await self._connect()
        info = await docker.info()
        await self._reap(docker)
        if not info.limits_memory:
            self._most = min(self._most, WITHOUT_MEMORY_LIMIT)
        self._body = container_body(self._settings, await self._have_image(docker), info, self._owner)
        await self._try_the_wall(NOT_FOR_GVISOR if GVISOR in info.runtimes else ())
        return unenforced(info)

    async def _try_the_wall(self, excused: Sequence[str]) -> None:
        session = (await self._make()).session
        try:
            succeeded = await self._probe(session, self._settings.sandbox_processes, self._settings.sandbox_disk_mb)
        finally:
            await session.close()
        if holes := [attack for attack in succeeded if attack not in excused]:
            raise Unusable(
                f"Docker's wall does not hold here: {'; '.join(holes)}.",
                "Update Docker and the kernel, or register gVisor (runsc) with Docker.",
            )

    async def _connect(self) -> Docker:
        troubles = []
        for path in filter(os.path.exists, self._sockets):
            if not os.access(path, os.R_OK | os.W_OK):
                troubles.append(
                    Unusable(
                        f"This user may not speak to Docker at {path}: permission denied.",
                        "Add the user to the group `docker` and sign in again, or run Docker rootless.",
                    )
                )
                continue
            docker = self._docker = Docker(path)
            try:
                _check(await docker.version())
            except DockerFault as fault:
                troubles.append(Unusable(str(fault), "Start Docker."))
            except Unusable as no:
                troubles.append(no)
            else:
                return docker
            await self._disconnect()
        raise next(iter(troubles), Unusable("No socket of Docker's was found.", "Install Docker and start it."))

    async def _disconnect(self) -> None:
        if self._docker is not None:
            await self._docker.close()
            self._docker = None

    async def _have_image(self, docker: Docker) -> str:
        """The tag of our image, built now unless it is there. The tag is a hash of what it is built from."""
        context = build_context()
        tag = f"{IMAGE}:{hashlib.sha256(context).hexdigest()[:16]}"
        if not await docker.has_image(tag):
            log.info("code interpreter: building the image %s, which takes some minutes", tag)
            try:
                await docker.build(tag, context)
            except DockerFault as fault:
                raise Unusable(
                    f"The code interpreter's image could not be built: {str(fault).rstrip('.')}.",
                    "It is built once, and for that Docker must reach its registry and the Python package index."
                    " Restart the server to try again.",
                ) from None
        return tag

    async def _reap(self, docker: Docker) -> None:
        """Remove what a server that is dead has left."""
        for found in await docker.containers(LABEL):
            if self._owner.outlived(found.labels.get(LABEL, "")):
                log.info("code interpreter: removing container %s, which a dead server has left", found.id[:12])
                with suppress(DockerFault):
                    await docker.remove(found.id)

    # --- containers

    async def _make(self) -> Container:
        """A container with a session that is ready. Raises DockerFault, SessionLost, or SandboxOff when closing."""
        docker = self._docker
        assert docker is not None
        container = Container(f"afterglow-{secrets.token_hex(8)}", self._remove)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(container.gone)
            await docker.create(container.name, self._body)
            self._containers.add(container)
            reader, writer = await docker.attach(container.name)
            container.session = Session(
                reader, writer, kill=container.kill, gone=container.gone, output_kb=self._settings.cell_output_kb
            )
            undo.push_async_callback(container.session.close)
            await docker.start(container.name)
            await container.session.start(
                self._settings.sandbox_memory_mb * MB, self._settings.sandbox_processes, START_S
            )
            undo.pop_all()
        return container

    async def _remove(self, container: Container) -> None:
        assert self._docker is not None
        with suppress(DockerFault):  # a container that has ended is gone, and nobody knows why any more
            if await self._docker.ran_out_of_memory(container.name):
                container.session.lost(f"out of memory: it may have {self._settings.sandbox_memory_mb} MB")
        try:
            await self._docker.remove(container.name)
        except DockerFault as fault:
            log.warning("code interpreter: container %s was not removed: %s", container.name, fault)
            self._left.add(container.name)
        self._containers.discard(container)
        if container in self._pool:
            self._pool.remove(container)

    def _free_places(self) -> int:
        taken = sum(container.taken_at is not None for container in self._containers)
        return self._most - taken - self._opening

    async def _take(self) -> Container:
        while self._pool:
            container = self._pool.popleft()
            if container.session.alive:
                return container
        return await self._await(self._spawn(self._make()))

    def _fill_pool(self) -> None:
        if self._status.state == "on" and not self._filling:
            self._filling = True
            self._spawn(self._fill())

    async def _fill(self) -> None:
        try:
            while len(self._pool) < min(self._settings.sandbox_pool, self._free_places()):
                self._pool.append(await self._make())
        except (DockerFault, SessionLost) as trouble:
            log.info("code interpreter: no session is made ahead: %s", trouble)
        finally:
            self._filling = False

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._end_old()
            await self._remove_left()

    def _end_old(self) -> None:
        for container in list(self._containers):
            if container.taken_at is not None:
                container.session.end_if_old(
                    container.taken_at, self._settings.sandbox_ttl_s, self._settings.sandbox_idle_s
                )

    async def _remove_left(self) -> None:
        assert self._docker is not None
        for name in list(self._left):
            with suppress(DockerFault):
                await self._docker.remove(name)
                self._left.discard(name)


# --- what it is made of ----------------------------------------------------------------------------------------


class Owner(NamedTuple):
    """The server that a container belongs to; as a label, the three with slashes between them. host: where `pid` is no
    other's, as `this_host` has it."""

    host: str
    pid: int
    run: str

    @property
    def label(self) -> str:
        return f"{self.host}/{self.pid}/{self.run}"

    def outlived(self, label: str) -> bool:
        """Whether the server that wrote `label` was on this host, and is dead. One with our pid was before us."""
        host, pid, run = [*label.split("/"), "", ""][:3]
        if host != self.host or not pid.isdecimal():
            return False
        if int(pid) == self.pid:
            return run != self.run
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return False


def this_host() -> str:
    """Names what a process id is one process's in: this machine since its start, and of that our pid namespace.

    Servers in two containers may have the same host name and the same pid, and may speak to the same Docker.
    """
    name = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{name}:{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux, and no such namespaces
        return name


def usual_sockets() -> list[str]:
    """Where Docker listens: as a service, rootless, and in the programs that bring it to desktops."""
    in_home = (".docker/run", ".docker/desktop", ".orbstack/run", ".colima/default", ".colima/docker", ".rd")
    folders = ["/var/run", f"/run/user/{os.getuid()}", *(os.path.expanduser(f"~/{folder}") for folder in in_home)]
    return [f"{folder}/docker.sock" for folder in folders]


def _check(version: Version) -> None:
    if version.os != "linux":
        raise Unusable("Docker runs no Linux containers here.", "Switch it to Linux containers.")
    if version.numbers < OLDEST:
        raise Unusable(
            f"Docker is too old: it speaks version {version.api or 'none'} of its API, and 1.41 is needed.",
            "Update Docker to 20.10 or later.",
        )


def build_context() -> bytes:
    """The tar archive that the image is built from: the same bytes for the same content, whenever it is made."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in [HERE / "Dockerfile", HERE / "locks" / LOCK, *sorted((HERE / "guest").glob("*.py"))]:
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(HERE).as_posix())
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def container_body(settings: Settings, image: str, info: Info, owner: Owner) -> dict[str, Any]:
    """The body of POST /containers/create; with the two functions below, everything that makes the wall."""
    return {
        "Image": image,
        "Entrypoint": COMMAND,
        "WorkingDir": wall.WORK,
        "User": f"{USER}:{USER}",
        "Hostname": "sandbox",
        "OpenStdin": True,
        "StdinOnce": True,  # so that it closes when we are gone
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": False,
        "Tty": False,
        "StopSignal": "SIGKILL",
        "Labels": {LABEL: owner.label},
        "HostConfig": {
            "NetworkMode": "none",
            "Dns": ["127.0.0.1"],  # or it would show the machine's
            "DnsSearch": ["."],
            "IpcMode": "none",
            "ReadonlyRootfs": True,
            "Privileged": False,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Binds": [],
            "Tmpfs": _folders(settings),
            "Init": False,
            "AutoRemove": True,
            "LogConfig": {"Type": "none"},  # or all that is said would be written to the machine's disk
            **_limits(settings, info),
            **({"Runtime": GVISOR} if GVISOR in info.runtimes else {}),
        },
    }


def _limits(settings: Settings, info: Info) -> dict[str, Any]:
    memory = settings.sandbox_memory_mb * MB
    tasks = settings.sandbox_processes + AGENT_TASKS
    limits: dict[str, Any] = {
        "Memory": memory,
        "MemorySwap": memory,  # together with it: no swap
        "PidsLimit": tasks,
        "OomScoreAdj": 1000,
        "Ulimits": [
            _ulimit("core", 1),  # 0 would not keep the machine's crash handler from being started
            _ulimit("fsize", settings.sandbox_disk_mb * MB),
            _ulimit("memlock", 0),
            _ulimit("msgqueue", 0),
            _ulimit("nofile", wall.OPEN_FILES),
            _ulimit("nproc", settings.sandbox_sessions * tasks * 4),  # of all containers: they share a user
        ],
    }
    if info.limits_cpus:  # Docker refuses to try where it cannot, and to give more than there are
        limits["NanoCpus"] = int(min(settings.sandbox_cpus, info.cpus) * 1e9)
    return limits


def _folders(settings: Settings) -> dict[str, str]:
    """Where it may write, all of it in memory."""
    return {
        wall.WORK: _tmpfs(settings.sandbox_disk_mb, wall.INODES, "exec,mode=0755"),
        "/tmp": _tmpfs(TMP_MB, 8192, "exec,mode=1777"),  # noqa: S108
        "/dev/shm": _tmpfs(TMP_MB, 1024, "noexec,mode=1777"),  # noqa: S108
        wall.HOME: _tmpfs(wall.HOME_BYTES // MB, 4096, "exec,mode=0755"),
    }


def _ulimit(name: str, most: int) -> dict[str, Any]:
    return {"Name": name, "Soft": most, "Hard": most}


def _tmpfs(size_mb: int, files: int, options: str) -> str:
    return f"rw,nosuid,nodev,{options},size={size_mb}m,nr_inodes={files},uid={USER},gid={USER}"


def unenforced(info: Info) -> tuple[str, ...]:
    """What Docker cannot limit here, in words."""
    limits = {
        "the memory of a session": info.limits_memory,
        "what of its memory is swapped out": info.limits_swap,
        "its processes": info.limits_pids,
        "its processor time": info.limits_cpus,
        "the number of its files": GVISOR not in info.runtimes,  # gVisor's tmpfs takes a size alone
    }
    return tuple(f"Docker cannot limit {what}." for what, held in limits.items() if not held)
