"""The engine `native`: model-written Python in walled-in forks of one warm process, on this machine's kernel.

How it works. A launcher builds a jail out of the Python installation alone and starts a guard in it, and the guard a
fork server that has numpy, pandas and matplotlib imported. A session is a fork of that, in namespaces of its own, as a
user of its own, with no capabilities, a few writable folders in memory, and a short list of system calls. We hold a
descriptor of each session's first process; ending that process ends the session, whatever runs in it.

What the wall holds: files of the host and of other sessions, the network, other processes, the kernel's rarer calls. It
is a shared kernel: a fault in the calls that remain is not covered, nor are side channels of processor and caches. A
session can tell how busy the machine is (sysinfo, and the sizes of file systems by statvfs), and whether somebody else
has locked a file that all can read; it can lock none itself.

What the limits hold: a cgroup for each session bounds memory, processes and processors exactly. Where none can be had
the guard looks five times a second and may be outrun for a moment; then few sessions are opened, and `status` says so.
It knows of processes, files in memory and sockets; tables of pages it does not count. An ordinary user's sessions are
all that one user to the kernel: quotas that it keeps by user (pipes, descriptors on their way through a socket) are
shared, and one session may use them up for the others.
Nothing that a session says decides about its end: times, sizes and ends are kept from outside, by us and by the guard.

Crashes. When the fork server, the guard or the launcher dies, the kernel ends all sessions of it; they are reported
lost, and a new one is started. When we die, the sockets close and all of them end. A guard that gives no sign of life
is ended. A fork server is replaced by age, for its forks share one address layout and one hash seed; sessions of the
old one run to their end. While it works, a failure to replace it changes nothing.

Nothing runs before a first session was looked at from outside (`outside.py`), and the attacks of `attacks.py` from
within have all failed.
"""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import socket
import sys
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any

from afterglow.contracts import CellEnd, EngineStatus
from afterglow.errors import SandboxBusy, SandboxError, SandboxOff, SessionLost
from afterglow.sandbox import attacks, cgroups, outside, packages
from afterglow.sandbox.forkserver import LOOK_AT_LOG, CannotStart, ForkServer, Watched
from afterglow.sandbox.guest import guard, launch, wall
from afterglow.sandbox.session import Session
from afterglow.settings import Settings
from afterglow.telemetry import log

MB = 1 << 20
MACHINES = ("x86_64", "aarch64")
START_S = 60.0  # from `start` to a settled status
HELLO_S = 20.0
UNBOUNDED_SESSIONS = 4  # where memory is watched, not bounded
SPARE_PLACES = 16  # for sessions that have ended, but are not quite gone
TMP_MB = 64  # of /tmp and the like, each
ROOM_MB = 64  # to be had above the floor before a session is made
GENERATION_S = 3600.0
GENERATION_FORKS = 500
MOST_GENERATIONS = 3  # that have sessions: each holds a hundred megabytes
RENEW_AGAIN_S = 60.0  # after a failure, while the old one works
SILENCE_S = 10.0  # of a guard; then its sessions are watched by nobody
UNUSED_S = 900.0  # then the fork server is ended, until the next `open`
SWEEP_S = 5.0
FAILURES = 5  # within FAILURES_S; then the engine is off
FAILURES_S = 120.0
BACK_OFF_S = 0.25  # before the second try; doubled each time
STOPPING = EngineStatus("off", "native", reason="The server is stopping.")
OTHER_ENGINE = "Use the docker engine, or switch the code interpreter off."
GUARD_SAYS = {
    guard.TOO_MUCH_MEMORY: "out of memory: it held {} MB",
    guard.MACHINE_SHORT: "the machine ran out of memory, and this session held the most: {} MB",
    guard.IDLE_CPU: "it kept the processor busy for {} s while no cell ran",
}


class Generation:
    """One fork server and the living sessions made of it, by the pid that the guard knows their first process by.

    groups: where they get their cgroups, if they get any.
    """

    def __init__(self, engine: NativeEngine) -> None:
        self.server = ForkServer(self._report, lambda: engine.generation_ended(self))
        self.groups: cgroups.Groups | None = None
        self.born_at = time.monotonic()
        self.living: dict[int, Life] = {}
        self.renew_at = 0.0
        self.was_silent = False

    @property
    def is_old(self) -> bool:
        return self.server.forks >= GENERATION_FORKS or time.monotonic() - self.born_at >= GENERATION_S

    def _report(self, pid: int, why: int, amount: int) -> None:
        if pid in self.living:
            self.living[pid].session.lost(GUARD_SAYS[why].format(amount))


class Life:
    """A session's life as the engine holds it: its first process and its cgroup.

    opened_at: on the monotonic clock; None while it waits in the pool.
    """

    def __init__(
        self, engine: NativeEngine, generation: Generation, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._engine = engine
        self.generation = generation
        self.opened_at: float | None = None
        self._pid = 0
        self._process: Watched | None = None
        self._group: cgroups.Group | None = None
        self._idle_from_s: float | None = None  # its processor time when its last cell ended; None while one runs
        self.session = Session(
            reader,
            writer,
            kill=self.kill,
            gone=self.gone,
            output_kb=engine.settings.cell_output_kb,
            on_busy=lambda: self._is_busy(True),
            on_idle=lambda: self._is_busy(False),
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def gone(self) -> None:
        if self._process is not None:
            await self._process.gone()

    async def begin(self, theirs: socket.socket) -> None:
        """Be forked, put into a cgroup, and only then given a worker. Raises SandboxBusy, SessionLost, OSError."""
        settings, generation = self._engine.settings, self.generation
        request = (settings.sandbox_memory_mb, settings.sandbox_disk_mb, TMP_MB, settings.sandbox_processes)
        self._pid, pidfd = await generation.server.fork(request, theirs)
        generation.living[self._pid] = self
        self._engine.living.add(self)
        self._process = Watched(pidfd, self._ended)
        theirs.close()  # so that its end is seen as the end of the connection
        if generation.groups is not None:
            self._group = generation.groups.make()
            if self._group.alarm is not None:
                asyncio.get_running_loop().add_reader(self._group.alarm, self._out_of_memory)
            await asyncio.to_thread(self._group.add, self._process.host_pid())
        # No limit of the agent's on memory: the wall has set one, above what a session is born with.
        await self.session.start(0, settings.sandbox_processes, HELLO_S)

    def _is_busy(self, busy: bool) -> None:
        self.generation.server.tell(self._pid, busy)
        self._idle_from_s = None if busy or self._group is None else self._group.cpu_s()

    def end_if_burning(self) -> None:
        """End it when it computes between cells. The guard, which looks at processes, may miss short ones."""
        if self._group is not None and self._idle_from_s is not None:
            burnt_s = self._group.cpu_s() - self._idle_from_s
            if burnt_s > guard.IDLE_CPU_S:
                self.session.lost(GUARD_SAYS[guard.IDLE_CPU].format(int(burnt_s)))

    def faults(self, other: Life) -> list[str]:
        """What is wrong with its wall, as seen from outside beside another session."""
        settings = self._engine.settings
        assert self._process is not None
        assert other._process is not None
        init = self._process.host_pid()
        bounds = outside.Bounds(
            settings.sandbox_memory_mb * MB, settings.sandbox_disk_mb * MB, settings.sandbox_processes
        )
        try:
            found = outside.faults(init, other._process.host_pid(), bounds)
        except (OSError, ValueError, KeyError) as error:
            return [f"what its wall is cannot be seen from outside ({error})"]
        if self._group is not None and not self._group.holds([init, outside.worker_of(init)]):
            found.append("it is not in its cgroup")
        return found

    def _ended(self) -> None:
        self.generation.server.hear_guard()  # it may have said why
        if self.generation.living.get(self._pid) is self:
            del self.generation.living[self._pid]
        if self._group is not None and self.generation.groups is not None:
            if self._group.ran_out_of_memory():
                self._out_of_memory()
            if self._group.alarm is not None:
                asyncio.get_running_loop().remove_reader(self._group.alarm)
            self.generation.groups.release(self._group)
        self._engine.session_ended(self)

    def _out_of_memory(self) -> None:
        if self._group is not None and self._group.alarm is not None:
            asyncio.get_running_loop().remove_reader(self._group.alarm)  # it has rung, and may not be let ring on
        self.session.lost(f"out of memory: it may have {self._engine.settings.sandbox_memory_mb} MB")


class NativeEngine:
    """A `contracts.CodeEngine`. living: every session that has a process, also those of a fork server that is gone."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._status = EngineStatus("starting", "native")
        self._starting: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._filling: asyncio.Task[None] | None = None
        self._booting = asyncio.Lock()
        self._generations: list[Generation] = []
        self._groups: cgroups.Groups | None = None
        self._limits = cgroups.Limits(
            settings.sandbox_memory_mb * MB, settings.sandbox_processes, settings.sandbox_cpus
        )
        self.living: set[Life] = set()
        self._pool: deque[Life] = deque()
        self._open: set[Life] = set()
        self._opening = 0
        self._most = settings.sandbox_sessions
        self._places = self._most + settings.sandbox_pool
        self._used_at = time.monotonic()
        self._failed_at: deque[float] = deque(maxlen=FAILURES)
        self._ask_systemd = True

    @property
    def status(self) -> EngineStatus:
        return self._status

    def start(self) -> None:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())

    async def settled(self) -> EngineStatus:
        self.start()
        assert self._starting is not None
        await asyncio.wait([self._starting])
        if not self._starting.cancelled():
            self._starting.result()  # a fault of ours is raised, not taken for "starting"
        return self._status

    async def open(self) -> Session:
        status = await self.settled()
        if status.state != "on":
            raise SandboxOff(f"{status.reason} {status.remedy}".strip())
        self._used_at = time.monotonic()
        if len(self._open) + self._opening >= self._most:
            await asyncio.gather(*(life.gone() for life in self._open if not life.session.alive))
        if len(self._open) + self._opening >= self._most:
            raise SandboxBusy(f"As many sessions are open as may be: {self._most}.")
        self._opening += 1
        try:
            life = self._take_ready() or await self._make()
        finally:
            self._opening -= 1
        life.opened_at = time.monotonic()
        self._open.add(life)
        self._fill_pool()
        return life.session

    async def close(self) -> None:
        self._status = STOPPING
        tasks = [task for task in (self._starting, *self._background) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._end_everything()

    # --- starting ------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(START_S):
                self._check_machine()
                room = self._room()
                self._groups = cgroups.find(self._limits)
                await self._generation()
                self._count_places(room)
                await self._try_the_wall()
        except CannotStart as error:
            await self._give_up(error)
        except (SandboxError, OSError) as error:
            await self._give_up(CannotStart(f"A first session cannot be had: {error}", OTHER_ENGINE))
        except TimeoutError:
            await self._give_up(CannotStart(f"Nothing was ready after {START_S:.0f} s.", OTHER_ENGINE))
        else:
            self._status = EngineStatus("on", "native", unenforced=self._unenforced())
            log.info("code interpreter: native, on after %.1f s", time.monotonic() - began)
            for limit in self._status.unenforced:
                log.warning("code interpreter: %s", limit)
            self._in_background(self._sweep())
            self._fill_pool()

    def _check_machine(self) -> None:
        if sys.platform != "linux" or platform.machine() not in MACHINES:
            raise CannotStart("The native engine needs Linux on x86-64 or ARM64.", OTHER_ENGINE)
        if (reason := wall.check_kernel()) is not None:
            raise CannotStart(reason, OTHER_ENGINE)

    def _room(self) -> int:
        """How many sessions may have all their processes at once. Raises CannotStart when not even one may."""
        each = self.settings.sandbox_processes + cgroups.AGENT_TASKS
        room = min(process_room(), cgroups.process_room())
        if room < each:
            raise CannotStart(
                f"This server's user may start {max(room, 0)} more processes, and one session needs {each}.",
                "Raise the limit (`ulimit -u`, TasksMax), or lower sandbox_processes.",
            )
        return room // each

    def _count_places(self, room: int) -> None:
        allowed = UNBOUNDED_SESSIONS if self._groups_here() is None else self.settings.sandbox_sessions
        self._most = min(self.settings.sandbox_sessions, allowed, room)
        self._places = min(self._most + self.settings.sandbox_pool, room)

    def _unenforced(self) -> tuple[str, ...]:
        groups = self._groups_here()
        if groups is None:
            return (
                "Memory is watched, not bounded, and processors are shared by priority alone: no cgroup can be made"
                f" here. At most {self._most} sessions are opened at once.",
            )
        said = []
        if cgroups.CPU not in groups.bounded:
            said.append("Processors are shared by priority alone: no cgroup can bound them here.")
        if cgroups.SWAP not in groups.bounded and guard.meminfo(b"SwapTotal:"):
            said.append("Of memory only what is not swapped out is bounded: no cgroup can bound swap here.")
        return tuple(said)

    async def _try_the_wall(self) -> None:
        one, other = await self._make(), await self._make()
        found = await attacks.shared_namespaces(one.session, other.session)
        found += one.faults(other)  # after a cell: by then the worker is walled in
        found += await attacks.probe(
            one.session,
            self.settings.sandbox_processes,
            self.settings.sandbox_disk_mb,
            more=attacks.NATIVE,
            hidden=[*own_files(self.settings.data), __file__],
        )
        if not one.session.alive:
            ends = [part.why async for part in one.session.run("", 1.0) if isinstance(part, CellEnd)]
            raise CannotStart(f"The first session has ended while it was tried: {ends[0]}.", OTHER_ENGINE)
        if found:
            raise CannotStart(f"The wall does not hold here: {'; '.join(found)}.", OTHER_ENGINE)
        await asyncio.gather(one.session.close(), other.session.close())

    async def _give_up(self, error: CannotStart) -> None:
        self._status = EngineStatus("off", "native", reason=error.reason, remedy=error.remedy)
        log.warning("code interpreter: native engine is off: %s %s", error.reason, error.remedy)
        if error.detail:
            log.warning("code interpreter: the fork server said: %s", error.detail)
        await self._end_everything()

    async def _end_everything(self) -> None:
        for life in self.living:
            life.kill()
        await asyncio.gather(*(life.session.close() for life in self.living))
        await asyncio.gather(*(generation.server.close() for generation in self._generations))
        for generation in self._generations:
            self._close_groups(generation)
        if self._groups is not None:
            self._groups.close()
        self._generations.clear()
        self._pool.clear()
        self._open.clear()
        self._groups = None

    # --- sessions ------------------------------------------------------------------------------------------------

    def _take_ready(self) -> Life | None:
        while self._pool:
            life = self._pool.popleft()
            if life.session.alive and life.generation.server.usable:
                return life
            life.kill()
        return None

    async def _make(self) -> Life:
        """A new session. Raises SandboxBusy; SandboxOff when the fork server does not come up any more."""
        for _attempt in range(2):
            generation = await self._generation()
            if self._status.state == "on":
                self._check_memory()
            try:
                return await self._make_of(generation)
            except (SandboxBusy, SessionLost, OSError) as error:
                failure = generation.server.shut_out or str(error)
                if generation.server.usable:
                    break
        raise SandboxBusy(f"No session can be made just now: {failure}")

    def _check_memory(self) -> None:
        try:
            free = guard.available_bytes()
        except OSError as error:
            raise SandboxBusy(f"What memory the machine has left cannot be told: {error}") from None
        if free is not None and free < (self.settings.sandbox_free_mb + ROOM_MB) * MB:
            raise SandboxBusy(f"The machine has too little memory for another session: {free // MB} MB.")

    async def _make_of(self, generation: Generation) -> Life:
        ours, theirs = socket.socketpair()
        async with AsyncExitStack() as undo:
            undo.enter_context(ours)
            undo.enter_context(theirs)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            life = Life(self, generation, reader, writer)
            undo.push_async_callback(life.session.close)
            await life.begin(theirs)
            undo.pop_all()
        return life

    def _fill_pool(self) -> None:
        if self._status.state == "on" and (self._filling is None or self._filling.done()):
            self._filling = self._in_background(self._fill())

    async def _fill(self) -> None:
        while len(self._pool) < min(self.settings.sandbox_pool, self._places - len(self._open) - self._opening):
            try:
                self._pool.append(await self._make())
            except SandboxError as error:
                log.info("code interpreter: no session is made ahead: %s", error)
                return

    def session_ended(self, life: Life) -> None:
        """Its last process is gone."""
        self._used_at = time.monotonic()
        self.living.discard(life)
        self._open.discard(life)
        if life in self._pool:
            self._pool.remove(life)

    # --- fork servers --------------------------------------------------------------------------------------------

    def _current(self) -> Generation | None:
        """The newest that takes requests."""
        return next((one for one in reversed(self._generations) if one.server.usable), None)

    def _groups_here(self) -> cgroups.Groups | None:
        current = self._current()
        return current.groups if current else None

    async def _generation(self) -> Generation:
        """The one to fork from, started if there is none. Raises SandboxOff when it cannot be."""
        while (current := self._current()) is None:
            async with self._booting:
                if self._current() is None:
                    await self._boot_again()
        return current

    async def _boot_again(self) -> None:
        if self._status.state == "off":
            raise SandboxOff(f"{self._status.reason} {self._status.remedy}".strip())
        await asyncio.sleep(self._back_off_s())
        try:
            await self._boot()
        except CannotStart as error:
            if self._status.state != "on":
                raise
            log.warning("code interpreter: %s %s", error, error.detail)
            await self._note_failure(error)

    async def _boot(self) -> None:
        """Start a fork server. Raises CannotStart."""
        found = packages.describe(packages.environment(self.settings))
        if not found.usable:
            raise CannotStart(found.reason, found.remedy)
        try:
            generation = Generation(self)
        except OSError as error:
            raise CannotStart(f"The interpreter's fork server cannot be started: {error}", LOOK_AT_LOG) from None
        unit = f"afterglow-{os.getpid()}-{time.monotonic_ns()}"
        scope = cgroups.scope_command(unit) if self._groups is None and self._ask_systemd else []
        config = {
            "packages": str(found.site_packages),
            "fonts": str(found.path / "matplotlib"),
            "guard": {
                "memory_bytes": self._limits.memory_bytes,
                "free_bytes": self.settings.sandbox_free_mb * MB,
            },
        }
        began = time.monotonic()
        self._generations.append(generation)  # now, so that `close` finds it
        try:
            command = [*scope, *launch.command(str(found.python))]
            await generation.server.start(command, config, self._places + SPARE_PLACES)
        except CannotStart:
            self._forget(generation)
            if not scope or self._status.state == "off":
                raise
            self._ask_systemd = False
            await self._boot()
            return
        generation.groups = self._groups
        if scope:
            generation.groups = cgroups.in_scope(unit, generation.server.pid, self._limits)
            self._ask_systemd = generation.groups is not None
        log.info("code interpreter: fork server %d ready after %.1f s", generation.server.pid, time.monotonic() - began)

    def generation_ended(self, generation: Generation) -> None:
        """It ended by itself, or was killed: by the kernel for want of memory, say."""
        self._forget(generation)
        for life in list(generation.living.values()):
            life.session.lost("the interpreter's fork server ended")
        self._close_groups(generation)
        log.warning("code interpreter: fork server %d ended, with all its sessions", generation.server.pid)
        self._in_background(self._recover())

    async def _recover(self) -> None:
        await self._note_failure(CannotStart("The interpreter's fork server ends again and again.", LOOK_AT_LOG))
        self._fill_pool()

    async def _note_failure(self, error: CannotStart) -> None:
        """Remember it; when there were too many with no other fork server left, the engine is off."""
        if self._current() is not None:
            return
        self._failed_at.append(time.monotonic())
        if len(self._failed_at) == FAILURES and self._recent_failures() == FAILURES:
            await self._give_up(error)

    def _recent_failures(self) -> int:
        return sum(time.monotonic() - at < FAILURES_S for at in self._failed_at)

    def _back_off_s(self) -> float:
        return BACK_OFF_S * float(2 ** max(self._recent_failures() - 1, 0) - 1)

    # --- upkeep --------------------------------------------------------------------------------------------------

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._end_old_sessions()
            for life in list(self.living):
                life.end_if_burning()
            self._end_unwatched()
            await self._renew()

    def _end_unwatched(self) -> None:
        """Silent at two looks: after a pause of the whole machine the guard may be late at one."""
        for generation in self._generations:
            silent = generation.server.usable and generation.server.silent_s > SILENCE_S
            if silent and generation.was_silent:
                log.warning("code interpreter: the guard of fork server %d is silent", generation.server.pid)
                generation.server.kill()
            generation.was_silent = silent

    def _end_old_sessions(self) -> None:
        now = time.monotonic()
        for life in list(self._open):
            if life.opened_at is not None and now - life.opened_at >= self.settings.sandbox_ttl_s:
                life.session.lost("it was as old as a session may become")
            elif asyncio.get_running_loop().time() - life.session.idle_since >= self.settings.sandbox_idle_s:
                life.session.lost("it ran nothing for too long")

    async def _renew(self) -> None:
        """Replace a fork server that is old, and end those that nobody needs."""
        current = self._current()
        if current is None:
            return
        if not self._open and not self._opening and time.monotonic() - self._used_at >= UNUSED_S:
            await self._retire(self._generations)
        elif current.is_old and time.monotonic() >= current.renew_at and len(self._generations) < MOST_GENERATIONS:
            await self._replace(current)
        unneeded = [one for one in self._generations if one is not self._current() and not one.living]
        await self._retire(unneeded)

    async def _replace(self, old: Generation) -> None:
        try:
            async with self._booting:
                await self._boot()
        except CannotStart as error:
            old.renew_at = time.monotonic() + RENEW_AGAIN_S
            log.warning("code interpreter: an old fork server is kept: %s %s", error, error.detail)
            return
        for life in list(self._pool):
            life.kill()
        self._pool.clear()
        self._fill_pool()

    async def _retire(self, generations: list[Generation]) -> None:
        for generation in list(generations):
            self._forget(generation)
            for life in list(generation.living.values()):
                await life.session.close()
            await generation.server.close()
            self._close_groups(generation)

    def _forget(self, generation: Generation) -> None:
        if generation in self._generations:
            self._generations.remove(generation)

    def _close_groups(self, generation: Generation) -> None:
        """Those of a scope of its own end with it."""
        if generation.groups is not None and generation.groups is not self._groups:
            generation.groups.close()


def own_files(folder: str) -> list[str]:
    """Some of what is in the server's data folder."""
    with suppress(OSError):
        return [os.path.join(os.path.abspath(folder), name) for name in os.listdir(folder)[:10]]
    return []


def process_room() -> int:
    """How many more processes and threads this server's user may start."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    mine = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                mine += len(os.listdir(f"/proc/{pid}/task"))
    return limit - mine
