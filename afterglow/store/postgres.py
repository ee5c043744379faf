"""Postgres: a few connections, each transaction on one snapshot, and run again when another one was first.

Writes run at REPEATABLE READ. Two that change the same row exclude one another: the second is refused (SQLSTATE 40001,
40P01), nothing of it is there, and its work is run again from the start on what the first has left. Two that change no
row in common do not see each other. So what must not happen side by side changes a row in common, though it be by an
UPDATE that leaves it as it is: of the thread, the run, the vector store, the upload. (SERIALIZABLE would need none of
this. It locks index pages, our ids are ordered by time, and so everybody works on the same pages: of 32 clients'
transactions two in three were refused, and throughput fell to a quarter.)

A connection that breaks before COMMIT was sent has written nothing, and the work is run again on another. When COMMIT
was sent and its answer lost, the transaction is there if the mark that it made in `commits` is. (Its own number and
pg_xact_status would save the mark; but after a crash the numbers of what was lost are given out again.)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import asyncpg

from afterglow.contracts import SqlRow, SqlValue, Transaction, Work
from afterglow.errors import ConfigError, StoreFull, StoreUnavailable
from afterglow.ids import new_id
from afterglow.objects import learn_structs
from afterglow.store.migrations import check_not_newer, migrations
from afterglow.store.pool import open_pool

if TYPE_CHECKING:
    Session = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]

T = TypeVar("T")

READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
WRITE = "BEGIN ISOLATION LEVEL REPEATABLE READ"
WRITE_ROWWISE = "BEGIN ISOLATION LEVEL READ COMMITTED"
# One round trip for both. What is filled in is ours.
SET_MARK_AND_COMMIT = (
    "INSERT INTO commits (place, number, committed_at) VALUES ('{place}', {number}, {at}) ON CONFLICT (place)"
    " DO UPDATE SET number = excluded.number, committed_at = excluded.committed_at; COMMIT"
)
# Waits for a transaction that is still in this place.
GET_MARK = (
    "INSERT INTO commits (place, number, committed_at) VALUES ($1, 0, 0)"
    " ON CONFLICT (place) DO UPDATE SET number = commits.number RETURNING number"
)
MARKS_KEPT_S = 7 * 24 * 3600

AGAIN_S = 15.0  # for so long, work that was refused is run again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.2
ACQUIRE_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 40.0  # for a network that swallows everything; the server's own limit comes first
FATE_TIMEOUT_S = 30.0
FATE_POLL_S = 0.1
LIMITS = {"statement_timeout": "30s", "lock_timeout": "10s"}
PLANS = {
    # Plans are kept, and one that was made while the tables were empty would read all of them once they are not.
    "enable_seqscan": "off",
    "jit": "off",  # compiling takes longer than any statement of ours
}
SILENCE_S = 5.0
MIGRATION_LOCK = 0x6166746572676C6F  # the advisory lock of schema changes: "afterglo"

# Whatever a call of the driver can raise.
_TROUBLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

log = logging.getLogger("afterglow.store")


class _Statement:
    """What work asks of whoever drives it."""

    __slots__ = ("sql", "values", "wants_rows")

    def __init__(self, sql: str, values: tuple[SqlValue, ...], *, wants_rows: bool) -> None:
        self.sql = _for_postgres(sql)
        self.values = values
        self.wants_rows = wants_rows

    def __await__(self) -> Generator[_Statement, Any, Any]:
        return (yield self)


@cache
def _for_postgres(sql: str) -> str:
    """What Postgres alone knows stands in statements as a comment: `/* postgres: FOR UPDATE SKIP LOCKED */`."""
    return re.sub(r"/\* postgres: (.*?) \*/", r"\1", sql)


class _PostgresTransaction:
    """Hands each statement to `_drive`, so that nothing else can be awaited while a transaction is open."""

    async def fetch(self, sql: str, *values: SqlValue) -> list[SqlRow]:
        rows: list[SqlRow] = await _Statement(sql, values, wants_rows=True)
        return rows

    async def execute(self, sql: str, *values: SqlValue) -> int:
        changed: int = await _Statement(sql, values, wants_rows=False)
        return changed


class _Mark(NamedTuple):
    """What a transaction leaves in `commits`. place: no other one is in it at the same time."""

    place: str
    number: int


class _Again(Exception):
    """Nothing was written, and the work is worth another try. args: why, in the database's words."""


class PostgresStore:
    """A `contracts.Store` over a pool of connections. Made by `open`.

    retries: how often work was run again, for whatever reason.
    """

    def __init__(self, pool: Pool, limits: str) -> None:
        """limits: what follows BEGIN."""
        self._pool = pool
        self._limits = limits
        self._asked: set[asyncio.Task[Any]] = set()
        self._places: list[str] = []  # that no transaction is in
        self._numbers = itertools.count(1)
        self._closed = False
        self.retries = 0

    @classmethod
    async def open(cls, url: str, *, connections: int, pooled: bool, silence_s: float = SILENCE_S) -> PostgresStore:
        """Connect, and bring the schema up to date.

        connections: so many are opened at most. pooled: something between, such as PgBouncer, gives each transaction
        another session, so that nothing can be kept in one. silence_s: a process that was stopped in the middle of a
        transaction loses it after so long; less than what is left of a lease then, or it could write too late.
        Raises ConfigError when the URL or the database refuses us, or the schema is newer than this release;
        StoreUnavailable when nobody answers.
        """
        learn_structs()  # others decode in threads of their own
        limits = {**LIMITS, **PLANS, "idle_in_transaction_session_timeout": f"{silence_s * 1000:.0f}ms"}
        pool, after_begin = await open_pool(
            url, connections=connections, pooled=pooled, settings=limits, command_timeout_s=COMMAND_TIMEOUT_S
        )
        try:
            await _migrate(pool)
        except BaseException:
            pool.terminate()
            raise
        store = cls(pool, after_begin)
        with contextlib.suppress(StoreUnavailable):  # where nothing can be written, nothing needs to be tidied
            await store.write(_forget_marks)
        return store

    async def read(self, work: Work[T]) -> T:
        return await self._ask(self._run(READ, work))

    async def write(self, work: Work[T], *, rowwise: bool = False) -> T:
        return await self._ask(self._run(WRITE_ROWWISE if rowwise else WRITE, work))

    async def write_early(self, work: Work[T]) -> tuple[T, Awaitable[None]]:
        """Nothing is early here: until it is committed, work may have to be run again, with another result."""
        result = await self.write(work)
        committed = asyncio.get_running_loop().create_future()
        committed.set_result(None)
        return result, committed

    async def close(self) -> None:
        """Finish what was asked before, then close every connection; whoever asks later is refused."""
        self._closed = True
        while self._asked:
            await asyncio.wait(self._asked)
        with contextlib.suppress(TimeoutError):  # of a server that answers nothing any more
            await asyncio.wait_for(self._pool.close(), CLOSE_TIMEOUT_S)

    async def _ask(self, running: Coroutine[Any, Any, T]) -> T:
        """Let it run to its end even when the caller is cancelled: a statement that is torn off costs its connection,
        and a COMMIT may have been done or not."""
        if self._closed:
            running.close()
            raise StoreUnavailable("The database is closed.")
        task = asyncio.create_task(running)
        self._asked.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._asked.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be there to hear of it any more

    # --- one piece of work -------------------------------------------------------------------------------------

    async def _run(self, begin: str, work: Work[T]) -> T:
        deadline = time.monotonic() + AGAIN_S
        pause_s, taken = FIRST_PAUSE_S, False
        while True:
            try:
                return await self._transact(begin + self._limits, work)
            except _Again as error:
                if time.monotonic() > deadline:
                    raise StoreUnavailable(f"The database refused a transaction for {AGAIN_S:.0f} s: {error}") from None
            except asyncpg.UniqueViolationError:
                if taken:
                    raise
                taken = True  # by one that was committed after our snapshot: now the work can see it
            self.retries += 1
            await asyncio.sleep(random.uniform(0, pause_s))  # noqa: S311  so that two that met do not meet again
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _transact(self, begin: str, work: Work[T]) -> T:
        async with _session(self._pool) as session:
            await _execute(session, begin)
            # Before the first statement, which takes the snapshot: nothing may be committed in this place after it.
            mark = _Mark(self._places.pop() if self._places else new_id("commit"), next(self._numbers))
            try:
                result, wrote = await _drive(session, work)
            except BaseException:
                await _roll_back(session)
                self._places.append(mark.place)
                raise
            committed = False
            with contextlib.suppress(_Again, StoreUnavailable):
                await _commit(session, mark if wrote else None)
                committed = True
        if not committed and not (wrote and await self._is_committed(mark)):
            raise _Again("the connection broke during its commit")
        self._places.append(mark.place)
        return result

    async def _is_committed(self, mark: _Mark) -> bool:
        """What became of a transaction whose COMMIT was not answered. Raises StoreUnavailable when nobody could say for
        a long time; then it may be there or not."""
        deadline = time.monotonic() + FATE_TIMEOUT_S
        while True:
            try:
                async with _session(self._pool) as session:
                    return bool(await session.fetchval(GET_MARK, mark.place) == mark.number)
            except (StoreUnavailable, *_TROUBLE) as error:
                if time.monotonic() > deadline:
                    raise StoreUnavailable(
                        "The connection broke during a commit, and what became of it cannot be learned."
                    ) from error
            await asyncio.sleep(FATE_POLL_S)


async def _forget_marks(tx: Transaction) -> None:
    """Delete those of processes that are long gone; one that is not makes its own again."""
    await tx.execute("DELETE FROM commits WHERE committed_at < $1", int(time.time()) - MARKS_KEPT_S)


@contextlib.asynccontextmanager
async def _session(pool: Pool) -> AsyncGenerator[Session, None]:
    """A connection of the pool's. Raises StoreUnavailable when none can be had."""
    try:
        session = await pool.acquire(timeout=ACQUIRE_TIMEOUT_S)
    except _TROUBLE as error:
        raise StoreUnavailable(f"The database cannot be reached: {_words(error)}") from error
    try:
        yield session
    finally:
        await pool.release(session)


async def _drive(session: Session, work: Work[T]) -> tuple[T, bool]:
    """Run work to its end; return its result, and whether it may have changed anything."""
    coroutine: Any = work(_PostgresTransaction())
    wrote = False
    try:
        asked = coroutine.send(None)
        while True:
            if not isinstance(asked, _Statement):
                coroutine.close()
                raise RuntimeError("work in a transaction awaited something else")
            wrote = wrote or not (asked.wants_rows and asked.sql.lstrip().startswith("SELECT"))
            try:
                answer = await _answer(session, asked)
            except Exception as error:  # noqa: BLE001  raised where the work waits for its statement
                asked = coroutine.throw(error)
            else:
                asked = coroutine.send(answer)
    except StopIteration as end:
        result: T = end.value
    return result, wrote


async def _answer(session: Session, asked: _Statement) -> list[SqlRow] | int:
    try:
        if asked.wants_rows:
            return [tuple(row) for row in await session.fetch(asked.sql, *asked.values)]
        return int((await session.execute(asked.sql, *asked.values)).rpartition(" ")[2])
    except _TROUBLE as error:
        raise _translated(error, session) from error


async def _commit(session: Session, mark: _Mark | None) -> None:
    set_mark = SET_MARK_AND_COMMIT.format(**mark._asdict(), at=int(time.time())) if mark else None
    try:
        await _execute(session, set_mark or "COMMIT")
    except BaseException:
        await _roll_back(session)  # it was the mark that failed
        raise


async def _execute(session: Session, sql: str) -> None:
    try:
        await session.execute(sql)
    except _TROUBLE as error:
        raise _translated(error, session) from error


async def _roll_back(session: Session) -> None:
    if _is_over(session):
        return
    try:
        await session.execute("ROLLBACK")
    except _TROUBLE:
        _end(session)  # it rolls back by itself then


def _is_over(session: Session) -> bool:
    try:
        return session.is_closed()
    except asyncpg.InterfaceError:  # the pool has noticed, and taken it back
        return True


def _end(session: Session) -> None:
    with contextlib.suppress(asyncpg.InterfaceError):
        session.terminate()


# --- errors ----------------------------------------------------------------------------------------------------

_REFUSED = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.InvalidCachedStatementError,  # a newer schema has outdated a prepared statement
)
_BROKEN = (
    OSError,  # timeouts, too
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InternalClientError,  # an answer came that nobody had asked for: that the session is being ended
)
_OURS_TO_MEND = (
    asyncpg.ClientConfigurationError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
# Classes of SQLSTATE: connection, resources, locks, operators, the system's errors, damaged data; read-only.
_UNAVAILABLE = ("08", "53", "55", "57", "58", "XX", "25006")


def _translated(error: Exception, session: Session) -> Exception:
    """What the database did, as `_Again` or a StoreError; a statement that is wrong stays what it is, a bug of ours."""
    if isinstance(error, _REFUSED):
        return _Again(_words(error))
    if isinstance(error, _BROKEN) or _is_over(session):
        _end(session)
        return _Again(_words(error))
    if isinstance(error, asyncpg.DiskFullError):
        return StoreFull(f"no space left for the database: {_words(error)}")
    if isinstance(error, asyncpg.PostgresError) and str(error.sqlstate).startswith(_UNAVAILABLE):
        return StoreUnavailable(f"The database refused: {_words(error)}")
    return error


def _words(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


# --- the schema ------------------------------------------------------------------------------------------------


async def _migrate(pool: Pool) -> None:
    """Bring the schema up to date, one numbered file after another. Of several that start at once, one does it."""
    scripts = migrations()
    try:
        async with _session(pool) as session, session.transaction():
            if await _schema(session) < max(scripts):
                await session.execute("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0")
                await session.execute(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
                await session.execute(
                    "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at BIGINT NOT NULL)"
                )
                for version in range(await _schema(session) + 1, max(scripts) + 1):
                    await session.execute(re.sub(r"\bBLOB\b", "BYTEA", scripts[version]))
                    await session.execute("INSERT INTO migrations VALUES ($1, $2)", version, int(time.time()))
            check_not_newer(await _schema(session), "database")
    except (asyncpg.InsufficientPrivilegeError, ValueError) as error:  # the driver's word for a URL that is none
        raise ConfigError(f"database_url: {_words(error)}.") from None
    except StoreUnavailable as error:
        if isinstance(error.__cause__, _OURS_TO_MEND):
            raise ConfigError(f"database_url: {_words(error.__cause__)}.") from None
        raise
    except _TROUBLE as error:
        raise StoreUnavailable(f"The database refused: {_words(error)}") from error


async def _schema(session: Session) -> int:
    if await session.fetchval("SELECT to_regclass('migrations')::text") is None:
        return 0
    version: int = await session.fetchval("SELECT COALESCE(MAX(version), 0) FROM migrations")
    return version
