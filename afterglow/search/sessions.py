"""Sessions of the Postgres that holds the search index: transactions in them, what can go wrong, and its schema."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

import asyncpg

from afterglow.errors import ConfigError, StoreFull, StoreUnavailable
from afterglow.search.statements import READ, WRITE
from afterglow.store.pool import open_pool

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Session = PoolConnectionProxy[asyncpg.Record]

T = TypeVar("T")
log = logging.getLogger("afterglow.search")

ACQUIRE_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 120.0  # for a network that swallows everything; the server's own limit comes first
CLOSE_TIMEOUT_S = 30.0
ROLLBACK_TIMEOUT_S = 5.0
LIMITS = {
    "statement_timeout": "100s",
    "lock_timeout": "30s",
    # A process that was stopped in the middle must not hold a store for ever.
    "idle_in_transaction_session_timeout": "60s",
    "jit": "off",  # compiling takes longer than any search
}
MIGRATION_LOCK = 0x6167_7365_6172_6368  # the advisory lock of schema changes: "agsearch"
WITHOUT_VECTORS = (
    "Searches go by words alone: pgvector 0.7 or newer cannot be had in this database (%s). Vectors are kept;"
    " install it, run `CREATE EXTENSION vector` there, and start the servers anew."
)


class Sessions:
    """A pool of connections, at most so many at once."""

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record], settings: str) -> None:
        self._pool = pool
        self._settings = settings

    @classmethod
    async def open(cls, url: str, *, connections: int, pooled: bool) -> Sessions:
        """As `PostgresIndex.open`. Nothing is connected yet."""
        with _translated():
            pool, after_begin = await open_pool(
                url, connections=connections, pooled=pooled, settings=LIMITS, command_timeout_s=COMMAND_TIMEOUT_S
            )
        return cls(pool, after_begin)

    async def close(self) -> None:
        """Let whoever is at it finish, for a while; whoever asks later is refused."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._pool.close()
        self._pool.terminate()

    async def read(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Run `work` on a snapshot, on a new connection when the first turns out to be broken."""
        try:
            async with self.transaction(READ) as session:
                return await work(session)
        except _Broken:
            await self._pool.expire_connections()  # those that are idle broke at the same time
        async with self.transaction(READ) as session:
            return await work(session)

    @contextlib.asynccontextmanager
    async def transaction(self, begin: str) -> AsyncIterator[Session]:
        """Committed at its end. Raises StoreFull or StoreUnavailable for what the database does."""
        with _translated():
            async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as session:
                try:
                    await session.execute(begin + self._settings)
                    yield session
                    await session.execute("COMMIT")
                except BaseException:
                    await _roll_back(session)
                    raise

    async def bring_up_to_date(self) -> bool:
        """Apply the migrations; whether there is pgvector, which is made if it can be. Raises ConfigError."""
        async with self.transaction(WRITE) as session:
            await session.execute("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0")
            await session.execute(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
            missing = await _find_pgvector(session)
            await _migrate(session, with_vectors=not missing)
        if missing:
            log.warning(WITHOUT_VECTORS, missing)
        return not missing


async def _roll_back(session: Session) -> None:
    """A connection of which it is not known where it stands is closed."""
    if session.is_closed():
        return
    try:
        await session.execute("ROLLBACK", timeout=ROLLBACK_TIMEOUT_S)
    except BaseException:
        session.terminate()
        raise


# --- the schema ------------------------------------------------------------------------------------------------


async def _find_pgvector(session: Session) -> str:
    """Make the extension, unless it is there; return why that cannot be, or nothing."""
    known = "SELECT to_regtype('halfvec') IS NOT NULL"
    if await session.fetchval(known):
        return ""
    try:
        await session.execute("SAVEPOINT extension; CREATE EXTENSION IF NOT EXISTS vector")
    except (asyncpg.FeatureNotSupportedError, asyncpg.UndefinedFileError, asyncpg.InsufficientPrivilegeError) as error:
        await session.execute("ROLLBACK TO extension")
        return str(error)
    return "" if await session.fetchval(known) else "the one that is there is older, or in a schema off the search path"


async def _migrate(session: Session, with_vectors: bool) -> None:
    """Apply the numbered scripts that have not been; those that use `halfvec` only where there is such a type."""
    folder = resources.files("afterglow.search") / "sql"
    scripts = {int(file.name[:4]): file.read_text() for file in folder.iterdir() if file.name.endswith(".sql")}
    await session.execute(
        "CREATE TABLE IF NOT EXISTS search_migrations (version INTEGER PRIMARY KEY, applied_at BIGINT NOT NULL)"
    )
    applied = {row[0] for row in await session.fetch("SELECT version FROM search_migrations")}
    if newer := applied - scripts.keys():
        raise ConfigError(
            "The database was written by a newer Afterglow"
            f" (search schema {max(newer)}; this one knows {max(scripts)})."
        )
    for version in sorted(scripts.keys() - applied):
        if with_vectors or "halfvec" not in scripts[version]:
            await session.execute(scripts[version])
            await session.execute("INSERT INTO search_migrations VALUES ($1, $2)", version, int(time.time()))


# --- errors ----------------------------------------------------------------------------------------------------


class _Broken(StoreUnavailable):
    """The connection is gone; another one may be had."""


BROKEN = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InternalClientError,  # the server has said goodbye, and the driver has not seen the end yet
    ConnectionError,
)
UNAVAILABLE = (
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InvalidCachedStatementError,
    asyncpg.PostgresSystemError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    OSError,
    TimeoutError,
)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What the database did as a StoreError; a statement that is wrong stays what it is, a bug of ours."""
    try:
        yield
    except asyncpg.InterfaceError as error:
        if "clos" not in str(error):  # of a connection, or of the pool; else we used the driver wrongly
            raise
        raise _Broken(f"Postgres: {error}") from error
    except asyncpg.DiskFullError as error:
        raise StoreFull(f"Postgres: {error}") from error
    except BROKEN as error:
        raise _Broken(f"Postgres: {error}") from error
    except UNAVAILABLE as error:
        raise StoreUnavailable(f"Postgres: {error}") from error
