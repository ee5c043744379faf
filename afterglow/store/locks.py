"""Locks by name: those of one process, and those that all processes on one Postgres share."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import asyncpg

from afterglow.errors import StoreUnavailable

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

CONNECTIONS = 8  # as many locks can be held at once by one process; whoever wants one more waits
CONNECT_TIMEOUT_S = 10.0
SETTINGS = {
    "lock_timeout": "30s",  # a process that was stopped keeps its lock: whoever waits must not be stopped with it
    # A machine that is gone for good says nothing; its locks are free in so many seconds, and not after hours.
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
FAULTS = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)


class LocalLocks:
    """A `contracts.Locks` for the shape in which one process does everything."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def hold(self, name: str) -> AbstractAsyncContextManager[None]:
        return self._locks.setdefault(name, asyncio.Lock())

    async def close(self) -> None:
        """Nothing is held open."""


class PostgresLocks:
    """A `contracts.Locks` of advisory locks. Each that is held has a connection of its own, and ends with it: a process
    that dies holds nothing."""

    def __init__(self, url: str) -> None:
        """url: a direct connection; a pooler between would hand the locks of one caller to the next."""
        self._url = url
        self._here = LocalLocks()
        self._closed = False
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._idle: list[Connection] = []

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncGenerator[None, None]:
        # Whoever waits here for another task of this process needs no connection for that.
        async with self._here.hold(name), self._free:
            connection = await self._connection()
            number = lock_number(name)
            try:
                with _translated():
                    await connection.execute("SELECT pg_advisory_lock($1)", number)
                yield
            finally:
                await self._let_go(connection, number)

    async def _let_go(self, connection: Connection, number: int) -> None:
        kept = False
        try:
            with contextlib.suppress(*FAULTS):
                await connection.execute("SELECT pg_advisory_unlock($1)", number)
                kept = not self._closed
        finally:
            if kept:
                self._idle.append(connection)
            else:
                connection.terminate()

    async def close(self) -> None:
        self._closed = True
        for connection in self._idle:
            connection.terminate()
        self._idle.clear()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        with _translated():
            return await asyncpg.connect(self._url, timeout=CONNECT_TIMEOUT_S, server_settings=SETTINGS)


def lock_number(name: str) -> int:
    """The number of a name among Postgres' advisory locks: 64 bits with a sign."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        raise StoreUnavailable(f"the database cannot be asked for a lock: {error}") from error
