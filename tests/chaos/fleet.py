"""The processes of a trial, and who torments them."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import asyncpg

from tests.e2e.processes import AFTERGLOW, PIPE, ROOT
from tests.postgres import Postgres

Role = Literal["api", "worker", "all"]
COMMANDS: dict[Role, list[str]] = {
    "api": ["serve", "--no-worker", "--port", "0"],
    "worker": ["worker"],
    "all": ["serve", "--port", "0"],
}
LEASE_S = 1.5
START_S = 60.0
GREETS_S = 30.0
DRAIN_S = 2.0
STOP_S = 20.0  # far more than draining takes


class Member:
    """One place in the fleet: a process of this role, and after its end the next one. url: of the API, while there is
    one. up: it has said that it works. paused: stands still just now."""

    def __init__(self, role: Role, number: int, folder: Path, env: Mapping[str, str]) -> None:
        self.name = f"{role}{number}"
        self.role = role
        self.url = ""
        self.up = False
        self.paused = False
        self.log = folder / f"{self.name}.log"
        self._env = env
        self._process: asyncio.subprocess.Process | None = None
        self.faults: list[str] = []

    @property
    def lives(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """As a supervisor does it: again and again, while there is no database."""
        deadline = time.monotonic() + START_S
        while not await self._starts():
            assert time.monotonic() < deadline, f"{self.name} does not start: {self.log}"
            await asyncio.sleep(0.3)

    async def _starts(self) -> bool:
        self.url, self.up = "", False
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *AFTERGLOW,
                *COMMANDS[self.role],
                env=self._env,
                cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=PIPE,
                stderr=log,
            )
        try:
            return await asyncio.wait_for(self._greets(self._process), GREETS_S)
        except TimeoutError:
            self.faults.append(f"{self.name} was started, and had not said a word after {GREETS_S:.0f} s: {self.log}")
            await self.kill()
            return False

    async def _greets(self, process: asyncio.subprocess.Process) -> bool:
        """Returns whether it works now, or has ended."""
        assert process.stdout is not None
        while line := (await process.stdout.readline()).decode():
            if line.startswith("Base URL"):
                self.url = line.split()[-1]
            if "Stop" in line:
                self.up = True
                return True
        await process.wait()
        return False

    async def kill(self) -> None:
        self.url, self.up = "", False
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self.paused = False

    async def terminate(self) -> None:
        """Ask it to stop, and see that it does."""
        assert self._process is not None
        self.up = False
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            self.faults.append(f"{self.name} was asked to stop and had not after {STOP_S:.0f} s")
            await self.kill()
            return
        self.url = ""
        if self._process.returncode not in (0, -signal.SIGKILL):  # it may have been killed meanwhile
            self.faults.append(f"{self.name} was asked to stop and ended with {self._process.returncode}")

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        self.paused = True

    def go_on(self) -> None:
        if self.paused and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
        self.paused = False

    def check_alive(self) -> None:
        """What was up, and nobody has ended, lives."""
        if self.up and not self.lives:
            self.url, self.up = "", False
            code = self._process.returncode if self._process else None
            self.faults.append(f"{self.name} ended by itself with {code}: {self.log}")


class Database:
    """A Postgres in a thread of its own, since it ends with the thread that starts it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "postgres")
        self._postgres: Postgres

    async def _do(self, act: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    async def start(self) -> str:
        """Return its URL."""
        self._postgres = await self._do(Postgres)
        await self._do(self._postgres.start)
        return self._postgres.url()

    async def restart(self, down_s: float) -> None:
        """At once, as `pg_ctl -m immediate`: every connection breaks, and it recovers from its log."""
        await self._do(lambda: self._postgres.stop(signal.SIGQUIT))
        await asyncio.sleep(down_s)
        await self._do(self._postgres.start)

    async def break_connections(self, share: float) -> None:
        """End some of them, whatever they are at."""
        connection = await asyncpg.connect(self._postgres.url())
        try:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < $1",
                share,
            )
        finally:
            await connection.close()

    async def close(self) -> None:
        await self._do(self._postgres.close)
        self._thread.shutdown()


class Monkey:
    """Does by the seed what operators fear. done: how often what. pauses: of workers, (from, to) by the monotonic
    clock."""

    def __init__(self, rng: random.Random, members: list[Member], database: Database | None) -> None:
        self._rng = rng
        self._members = members
        self._database = database
        self._tasks: set[asyncio.Task[None]] = set()
        self._recovering = asyncio.Lock()
        self.done: Counter[str] = Counter()
        self.pauses: list[tuple[float, float]] = []

    async def play(self, for_s: float) -> None:
        """Returns when everything that was begun is over, and everybody is alive again."""
        end = time.monotonic() + for_s
        acts: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (5, self._kill),
            (4, self._pause),
            (2, self._terminate),
            (3 if self._database else 0, self._restart_database),
            (4 if self._database else 0, self._break_connections),
        ]
        weights = [weight for weight, _ in acts]
        while time.monotonic() < end:
            await asyncio.sleep(self._rng.uniform(0.1, 1.5))
            _, act = self._rng.choices(acts, weights)[0]
            task = asyncio.ensure_future(act())
            self._tasks.add(task)
            await asyncio.wait([task], timeout=self._rng.uniform(0, 1))
            for member in self._members:
                member.check_alive()
        await asyncio.gather(*self._tasks)
        for member in self._members:
            member.check_alive()
            await self._start(member)

    def _choose(self) -> Member | None:
        """One that works just now."""
        free = [member for member in self._members if member.up and member.lives and not member.paused]
        return self._rng.choice(free) if free else None

    async def _kill(self) -> None:
        """Also one that stands still; and perhaps it is away for longer than a lease."""
        alive = [member for member in self._members if member.lives]
        if not alive:
            return
        member = self._rng.choice(alive)
        away_s = self._rng.choice([0, 0.5, 2 * LEASE_S])
        self.done[f"kill -9 {member.role}"] += 1
        await member.kill()
        await asyncio.sleep(away_s)
        await self._start(member)

    async def _start(self, member: Member) -> None:
        async with self._recovering:  # one at a time: starting takes a processor
            if not member.lives:
                await member.start()

    async def _pause(self) -> None:
        member = self._choose()
        if member is None:
            return
        for_s = self._rng.choice([0.3, 1.2 * LEASE_S, 2 * LEASE_S, 3 * LEASE_S])
        self.done[f"stop {member.role}"] += 1
        start = time.monotonic()
        member.pause()
        await asyncio.sleep(for_s)
        member.go_on()
        if member.role != "api":
            self.pauses.append((start, time.monotonic()))

    async def _terminate(self) -> None:
        member = self._choose()
        if member is None:
            return
        self.done[f"term {member.role}"] += 1
        await member.terminate()
        await self._start(member)

    async def _restart_database(self) -> None:
        assert self._database is not None
        if self._recovering.locked():
            return
        async with self._recovering:
            self.done["database"] += 1
            await self._database.restart(self._rng.choice([0, 0.3, 1.5]))

    async def _break_connections(self) -> None:
        assert self._database is not None
        if self._recovering.locked():
            return
        async with self._recovering:
            self.done["connections"] += 1
            await self._database.break_connections(self._rng.choice([0.1, 0.5, 1]))
