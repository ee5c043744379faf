"""SQLite: one writer thread that commits in groups, a few readers, WAL, `synchronous=FULL`.

Work that arrives while a commit is under way shares the next one, each piece under a savepoint of its own: many
callers then pay for one fsync. An acknowledged write has been synced; a failed piece takes nothing else with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from afterglow.contracts import SqlRow, SqlValue, Work
from afterglow.errors import ConfigError, StoreError, StoreFull, StoreUnavailable
from afterglow.objects import learn_structs
from afterglow.store.migrations import check_not_newer, migrations
from afterglow.store.run_memory import LocalRunMemory

T = TypeVar("T")
MINIMUM_VERSION = (3, 35, 0)  # RETURNING
READERS = 3
GROUP_SIZE = 256
BUSY_TIMEOUT_S = 5.0
# What a run's row says is changed by statements that name these columns, wherever they are written.
TELL_OF_RUNS = [
    "CREATE TEMP TRIGGER run_updated AFTER UPDATE OF object, status ON main.runs"
    " BEGIN SELECT changing(NEW.project_id, NEW.id); END",
    "CREATE TEMP TRIGGER run_deleted AFTER DELETE ON main.runs BEGIN SELECT changing(OLD.project_id, OLD.id); END",
]
LULL_S = 0.3  # less than between two looks of an idle server for work

log = logging.getLogger("afterglow.store")


class _SqliteTransaction:
    """Statements say `$1`, which SQLite takes for a name; as `?1` it is a number, and values can come as a tuple."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    async def fetch(self, sql: str, *values: SqlValue) -> list[SqlRow]:
        return self._connection.execute(_numbered(sql), values).fetchall()

    async def execute(self, sql: str, *values: SqlValue) -> int:
        return self._connection.execute(_numbered(sql), values).rowcount


@cache
def _numbered(sql: str) -> str:
    return sql.replace("$", "?")


class _Job:
    """A piece of work and the future of its result; `early` is resolved when it has run, `done` when committed."""

    __slots__ = ("done", "early", "error", "result", "work")

    def __init__(self, work: Work[Any], loop: asyncio.AbstractEventLoop, early: bool = False) -> None:
        self.work = work
        self.done: asyncio.Future[Any] = loop.create_future()
        self.early: asyncio.Future[Any] | None = loop.create_future() if early else None
        self.result: Any = None
        self.error: BaseException | None = None


class SqliteStore:
    """A `contracts.Store` over one SQLite file."""

    def __init__(self, path: Path, *, readers: int = READERS, run_memory: LocalRunMemory | None = None) -> None:
        """path: the database file; made if missing, with the schema brought up to date. run_memory: told of each run
        that is changed through this store.

        Raises ConfigError when SQLite is too old, the file system cannot hold a WAL, or the schema is newer than
        this release; StoreUnavailable when the file cannot be opened.
        """
        learn_structs()
        self._path = path
        self._closed = False
        self._run_memory = run_memory
        self._writes: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        try:
            writer, *others = _open_all(path, 1 + readers)
        except sqlite3.Error as error:
            raise _translated(error, path) from error
        if run_memory is not None:
            writer.create_function("changing", 2, run_memory.changing)
            for statement in TELL_OF_RUNS:
                writer.execute(statement)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = [threading.Thread(target=self._serve_writes, args=(writer,), name="sqlite-writer", daemon=True)]
        self._threads += [
            threading.Thread(target=self._serve_reads, args=(connection,), name="sqlite-reader", daemon=True)
            for connection in others
        ]
        for thread in self._threads:
            thread.start()

    async def read(self, work: Work[T]) -> T:
        job = self._job(work)
        self._reads.put(job)
        result: T = await job.done
        return result

    async def write(self, work: Work[T], *, rowwise: bool = False) -> T:
        job = self._job(work)
        self._writes.put(job)
        result: T = await job.done
        return result

    async def write_early(self, work: Work[T]) -> tuple[T, Awaitable[None]]:
        job = self._job(work, early=True)
        self._writes.put(job)
        assert job.early is not None
        try:
            return await job.early, job.done
        except BaseException:
            job.done.cancel()
            raise

    async def close(self) -> None:
        """Finish what was asked before, then close every connection; whoever asks later is refused.

        The writer goes last, alone: of two connections that close at once, neither empties the log."""
        self._closed = True
        writer, *readers = self._threads
        for _ in readers:
            self._reads.put(None)
        for thread in readers:
            await asyncio.to_thread(thread.join)
        self._writes.put(None)
        await asyncio.to_thread(writer.join)

    def _job(self, work: Work[Any], early: bool = False) -> _Job:
        if self._closed:
            raise StoreUnavailable(f"{self._path}: the database is closed")
        self._loop = asyncio.get_running_loop()
        return _Job(work, self._loop, early)

    # The writer's thread.

    def _serve_writes(self, connection: sqlite3.Connection) -> None:
        while (first := self._next_write(connection)) is not None:
            group = [first]
            stop = self._commit_group(connection, group)
            if self._run_memory is not None:
                self._run_memory.changed()
            self._resolve(group)
            if stop:
                break
        connection.close()

    def _next_write(self, connection: sqlite3.Connection) -> _Job | None:
        """What is written next. In a lull the log is emptied: until then, it has what was deleted from the tables."""
        while True:
            try:
                return self._writes.get(timeout=LULL_S)
            except queue.Empty:
                if _empty_log(connection):
                    return self._writes.get()

    def _commit_group(self, connection: sqlite3.Connection, group: list[_Job]) -> bool:
        """Run the first job and whatever else is waiting in one transaction; return whether the end was asked."""
        stop = False
        before = connection.total_changes
        try:
            connection.execute("BEGIN IMMEDIATE")
            self._run_in_savepoint(connection, group[0], before)
            while len(group) < GROUP_SIZE:
                try:
                    job = self._writes.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    stop = True
                    break
                group.append(job)
                self._run_in_savepoint(connection, job, before)
            connection.execute("COMMIT")
        except (sqlite3.Error, StoreError) as error:
            failure = error if isinstance(error, StoreError) else _translated(error, self._path)
            log.error("The database refused a transaction: %s", failure)
            _roll_back(connection)
            for job in group:
                job.error = job.error or failure
        return stop

    def _run_in_savepoint(self, connection: sqlite3.Connection, job: _Job, before: int) -> None:
        """before: how many changes there were when the group began."""
        # What others of the group have written cannot be read before the commit, and whoever acts on a result that
        # rests on it would read it: a run was claimed, and its prompt lacked the outputs that it was queued with.
        readable = connection.total_changes == before
        connection.execute("SAVEPOINT job")
        try:
            job.result = _drive(job.work, _SqliteTransaction(connection))
        except sqlite3.Error as error:
            job.error = _translated(error, self._path)
        except Exception as error:  # noqa: BLE001  the caller's own error, handed back to the caller
            job.error = error
        if job.error is not None:
            if not connection.in_transaction:  # a full disk rolls everything back by itself
                raise job.error if isinstance(job.error, StoreError) else StoreUnavailable(str(job.error))
            connection.execute("ROLLBACK TO job")
        connection.execute("RELEASE job")
        if job.early is not None and readable:
            self._call(_settle, job.early, job.result, job.error)

    # The readers' threads.

    def _serve_reads(self, connection: sqlite3.Connection) -> None:
        transaction = _SqliteTransaction(connection)
        while (job := self._reads.get()) is not None:
            try:
                connection.execute("BEGIN")
                job.result = _drive(job.work, transaction)
            except sqlite3.Error as error:
                job.error = _translated(error, self._path)
            except Exception as error:  # noqa: BLE001  the caller's own error, handed back to the caller
                job.error = error
            _roll_back(connection)
            self._resolve([job])
        connection.close()

    def _resolve(self, group: list[_Job]) -> None:
        self._call(_settle_all, group)

    def _call(self, function: Callable[..., None], *values: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:  # the loop is gone, and with it everyone who waited
            log.debug("A result came after the event loop had ended.")


def _drive(work: Work[T], transaction: _SqliteTransaction) -> T:
    """Run a coroutine that never truly waits to its end, in this thread."""
    coroutine: Any = work(transaction)
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("work in a transaction awaited something else")


def _settle_all(group: list[_Job]) -> None:
    for job in group:
        if job.early is not None and not job.early.done():
            _settle(job.early, job.result, job.error)
        _settle(job.done, job.result, job.error)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):  # whoever begins the next transaction is told
            connection.execute("ROLLBACK")


def _empty_log(connection: sqlite3.Connection) -> bool:
    """Move everything from the write-ahead log into the database's file; return whether nobody stood in the way."""
    try:
        connection.execute("PRAGMA busy_timeout = 0")
        [(busy, _, _)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return not busy
    except sqlite3.Error:  # such as a full disk, which the next write is told of
        return False
    finally:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000:.0f}")


def _open_all(path: Path, count: int) -> list[sqlite3.Connection]:
    """Connections to the migrated database; all but the first can only read. When one fails, none stays open."""
    if sqlite3.sqlite_version_info < MINIMUM_VERSION:
        raise ConfigError(f"SQLite {sqlite3.sqlite_version} is too old; 3.35 or newer is needed.")
    with contextlib.ExitStack() as opened:
        connections = [opened.enter_context(contextlib.closing(_connect(path))) for _ in range(count)]
        for connection in connections:
            _prepare(connection, path)
        migrate(connections[0])
        for connection in connections[1:]:
            connection.execute("PRAGMA query_only = ON")
        opened.pop_all()
    return connections


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=512
    )


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if _switch_to_wal(connection) != "wal":
        raise ConfigError(
            f"{path.parent} is on a file system that cannot hold SQLite's write-ahead log; use a local disk."
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA cache_size = -16384")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA secure_delete = ON")  # some builds of SQLite do so unasked, others leave deleted text
    os.chmod(path, 0o600)


def _switch_to_wal(connection: sqlite3.Connection) -> str:
    """The journal mode that the file is in now. Two that open a new file at once can get in each other's way here,
    and this is the one lock that SQLite does not wait for by itself."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema up to date, one numbered file after another, under the database's own write lock.

    Raises ConfigError when the schema is newer than this release.
    """
    scripts = migrations()
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at BIGINT NOT NULL)"
        )
        current = connection.execute("SELECT COALESCE(MAX(version), 0) FROM migrations").fetchone()[0]
        check_not_newer(current, "data folder")
        for version in range(current + 1, max(scripts) + 1):
            for statement in _statements(scripts[version]):
                connection.execute(statement)
            connection.execute("INSERT INTO migrations VALUES (?, ?)", (version, int(time.time())))
        connection.execute("COMMIT")
    except BaseException:
        _roll_back(connection)
        raise


def _statements(script: str) -> list[str]:
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current.strip())
            current = ""
    return [*statements, current.strip()] if current.strip() else statements


def _translated(error: sqlite3.Error, path: Path) -> Exception:
    """What the database did as a StoreError; a statement that is wrong stays what it is, a bug of ours."""
    if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return error
    text = str(error)
    if "full" in text:
        return StoreFull(f"no space left for {path}")
    return StoreUnavailable(f"{path}: {text}")
