"""What Postgres alone must survive: others who were first, restarts, lost answers. What it shares with SQLite is in
`test_store.py`."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from afterglow.contracts import Transaction, Work
from afterglow.errors import ConfigError, StoreFull, StoreUnavailable
from afterglow.objects import Upload
from afterglow.rows import files as file_rows
from afterglow.rows import uploads as upload_rows
from afterglow.store import postgres
from afterglow.store.migrations import migrations
from afterglow.store.postgres import PostgresStore
from tests.postgres import Postgres, fresh_database, own_postgres


@pytest.fixture
async def url() -> AsyncGenerator[str, None]:
    async with fresh_database() as fresh:
        yield fresh


@asynccontextmanager
async def opened(url: str, *, connections: int = 5, pooled: bool = False) -> AsyncGenerator[PostgresStore, None]:
    store = await PostgresStore.open(url, connections=connections, pooled=pooled)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(url: str) -> AsyncGenerator[PostgresStore, None]:
    async with opened(url) as store:
        yield store


@pytest.fixture
async def other(url: str) -> AsyncGenerator[Any, None]:
    """A connection of somebody else's, to the same database."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def add(store: PostgresStore, name: str) -> None:
    await store.write(lambda tx: tx.execute("INSERT INTO projects (id, created_at) VALUES ($1, 0)", name))


async def names(store: PostgresStore) -> list[str]:
    return [row[0] for row in await store.read(lambda tx: tx.fetch("SELECT id FROM projects ORDER BY id"))]


async def somebody_waits(connection: Any) -> None:
    """Return when another connection waits for a lock."""
    async with asyncio.timeout(10):
        while not await connection.fetchval("SELECT 1 FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.005)


def counts(runs: list[int]) -> Work[int]:
    """Work that reads a number and writes it plus one; `runs` gets what it read each time."""

    async def work(tx: Transaction) -> int:
        [(found,)] = await tx.fetch("SELECT created_at FROM projects WHERE id = 'counter'")
        runs.append(found)
        await tx.execute("UPDATE projects SET created_at = $1 WHERE id = 'counter'", found + 1)
        return int(found)

    return work


# --- others who were first -------------------------------------------------------------------------------------


async def test_work_is_run_again_on_what_the_first_has_left(store: PostgresStore, other: Any):
    """Of two that change a row, the second starts again, and reads what the first has written."""
    await add(store, "counter")
    transaction = other.transaction()
    await transaction.start()
    await other.execute("UPDATE projects SET created_at = 41")
    runs: list[int] = []
    second = asyncio.create_task(store.write(counts(runs)))
    await somebody_waits(other)
    await transaction.commit()
    assert await second == 41
    assert runs == [0, 41]
    assert store.retries == 1


async def test_a_key_that_was_just_taken_is_seen_by_the_second_run(store: PostgresStore, other: Any):
    """Work that looks whether something is there, and writes it if not, finds what was committed meanwhile."""

    async def work(tx: Transaction) -> str:
        if await tx.fetch("SELECT 1 FROM projects WHERE id = 'a'"):
            return "there"
        await tx.execute("INSERT INTO projects (id, created_at) VALUES ('a', 0)")
        return "new"

    transaction = other.transaction()
    await transaction.start()
    await other.execute("INSERT INTO projects (id, created_at) VALUES ('a', 0)")
    second = asyncio.create_task(store.write(work))
    await somebody_waits(other)
    await transaction.commit()
    assert await second == "there"


async def test_two_that_wait_for_each_other_are_both_done(store: PostgresStore):
    """A deadlock costs a second try, and nothing else."""
    await add(store, "a")
    await add(store, "b")

    def both(*names: str) -> Work[None]:
        async def work(tx: Transaction) -> None:
            for name in names:
                await tx.execute("UPDATE projects SET created_at = created_at + 1 WHERE id = $1", name)
                await tx.fetch("SELECT pg_sleep(0.02)")

        return work

    await asyncio.gather(store.write(both("a", "b")), store.write(both("b", "a")))
    assert await store.read(lambda tx: tx.fetch("SELECT created_at FROM projects")) == [(2,), (2,)]


async def test_work_that_is_always_refused_is_given_up(
    store: PostgresStore, other: Any, monkeypatch: pytest.MonkeyPatch
):
    """After a while of being refused, the caller hears StoreUnavailable; the next write works."""
    monkeypatch.setattr(postgres, "AGAIN_S", 0.05)
    runs = 0

    async def work(tx: Transaction) -> None:
        nonlocal runs
        runs += 1
        await tx.execute("DO $$ BEGIN RAISE EXCEPTION 'not you' USING ERRCODE = '40001'; END $$")

    with pytest.raises(StoreUnavailable, match=r"refused a transaction .* not you"):
        await store.write(work)
    assert runs > 1
    await add(store, "a")


async def test_a_lock_that_is_never_given_back_is_said(url: str, other: Any, monkeypatch: pytest.MonkeyPatch):
    """When a lock does not come, the write raises StoreUnavailable, and the one after it works."""
    monkeypatch.setitem(postgres.LIMITS, "lock_timeout", "50ms")
    async with opened(url) as store:
        await add(store, "counter")
        transaction = other.transaction()
        await transaction.start()
        await other.execute("UPDATE projects SET created_at = 1")
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            await store.write(counts([]))
        await transaction.rollback()
        assert await store.write(counts([])) == 0


async def test_what_another_is_claiming_is_passed_over(store: PostgresStore, other: Any):
    """What Postgres alone knows stands in a comment, and is said to it: here, not to wait for a row that is taken."""
    await add(store, "a")
    await add(store, "b")
    transaction = other.transaction()
    await transaction.start()
    await other.execute("UPDATE projects SET created_at = 1 WHERE id = 'a'")
    claim = "SELECT id FROM projects ORDER BY id LIMIT 1 /* postgres: FOR UPDATE SKIP LOCKED */"
    assert await store.write(lambda tx: tx.fetch(claim)) == [("b",)]
    await transaction.rollback()


async def test_bytes_are_not_condemned_while_they_are_taken(store: PostgresStore, other: Any):
    """Whoever would delete bytes waits for one that may be giving them a file, and then leaves them."""
    loose = file_rows.LooseBlob("p", "bl/blob")
    await store.write(lambda tx: file_rows.insert_loose_blob(tx, loose, 1))
    transaction = other.transaction()
    await transaction.start()
    await other.execute("DELETE FROM loose_blobs")
    condemning = asyncio.create_task(store.write(lambda tx: file_rows.condemn_loose_blob(tx, loose)))
    await somebody_waits(other)
    await transaction.commit()
    assert not await condemning


async def test_a_part_is_not_added_while_its_upload_is_closed(store: PostgresStore, other: Any):
    """The work that adds a part runs again once the upload is closed, and sees it."""
    upload = Upload(id="u", bytes=1, created_at=1, filename="f", purpose="assistants", expires_at=9)
    await store.write(lambda tx: upload_rows.insert_upload(tx, "p", upload_rows.UploadRow(upload, None)))

    async def add_part(tx: Transaction) -> bool:
        row = await upload_rows.get_upload(tx, "p", "u")
        if row is None or row.upload.status != "pending":
            return False
        await upload_rows.insert_part(tx, "p", "u", upload_rows.Part("part", 1, "blob"))
        return True

    transaction = other.transaction()
    await transaction.start()
    await other.execute("UPDATE uploads SET object = replace(object, 'pending', 'cancelled')")
    adding = asyncio.create_task(store.write(add_part))
    await somebody_waits(other)
    await transaction.commit()
    assert not await adding


# --- what the database refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error"), [("53100", StoreFull), ("53200", StoreUnavailable), ("58030", StoreUnavailable)]
)
async def test_what_the_machine_lacks_is_said(store: PostgresStore, other: Any, code: str, error: type[Exception]):
    """A full disk is StoreFull, other troubles of the machine are StoreUnavailable; nothing is half written, and writes
    go on once it is over."""
    await other.execute(
        "CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'trouble' USING ERRCODE = '{code}'; END $$"
    )
    await other.execute("CREATE TRIGGER trouble BEFORE INSERT ON threads FOR EACH ROW EXECUTE FUNCTION trouble()")

    async def work(tx: Transaction) -> None:
        await tx.execute("INSERT INTO projects (id, created_at) VALUES ('a', 0)")
        await tx.execute("INSERT INTO threads (project_id, id, seq, created_at, object) VALUES ('a', 'b', 0, 0, '')")

    with pytest.raises(error, match="trouble"):
        await store.write(work)
    assert await names(store) == []
    await other.execute("DROP TRIGGER trouble ON threads")
    await store.write(work)


async def test_a_standby_says_that_it_only_reads(url: str, other: Any):
    """Where nothing can be written, a write is StoreUnavailable, and reads go on."""
    await other.execute(f"ALTER DATABASE {urlsplit(url).path[1:]} SET default_transaction_read_only = on")
    async with opened(url) as store:
        with pytest.raises(StoreUnavailable, match="read-only"):
            await add(store, "a")
        assert await names(store) == []


async def test_a_wrong_statement_is_a_bug(store: PostgresStore):
    """What is wrong with a statement is raised as the driver raises it, at once, and its connection goes on."""
    for _ in range(10):
        with pytest.raises(asyncpg.UndefinedTableError):
            await store.write(lambda tx: tx.execute("DELETE FROM nothing"))
        with pytest.raises(asyncpg.DataError):
            await store.read(lambda tx: tx.fetch("SELECT id FROM projects WHERE created_at = $1", "no number"))
    assert store.retries == 0


# --- the schema, and the session -------------------------------------------------------------------------------


async def test_several_that_start_at_once_make_one_schema():
    """The schema is made once, however many processes find the database empty."""
    async with fresh_database(migrated=False) as url, contextlib.AsyncExitStack() as stack:
        stores = await asyncio.gather(*(stack.enter_async_context(opened(url)) for _ in range(4)))
        found = await stores[3].read(lambda tx: tx.fetch("SELECT version FROM migrations ORDER BY version"))
        assert [version for (version,) in found] == sorted(migrations())


async def test_a_newer_schema_is_refused(url: str, other: Any):
    """A database that a later release has changed is not opened, and not touched."""
    await other.execute("INSERT INTO migrations VALUES (9999, 0)")
    with pytest.raises(ConfigError, match=r"database was written by a newer Afterglow \(schema 9999;"):
        await PostgresStore.open(url, connections=1, pooled=False)


async def test_a_url_that_cannot_be_right_is_refused(url: str):
    """No such database, or no such port, is ConfigError, without the password."""
    for wrong in (url.replace("postgres@/", "postgres:secret@/no_"), "postgresql://me:secret@host:port/x"):
        with pytest.raises(ConfigError, match=r"^database_url: ") as refused:
            await PostgresStore.open(wrong, connections=1, pooled=False)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("pooled", [False, True])
async def test_a_session_has_limits_and_keeps_nothing_for_poolers(url: str, pooled: bool):
    """Statements and locks have limits either way; behind a pooler nothing is left in a session."""
    async with opened(url, connections=1, pooled=pooled) as store:
        await add(store, "a")
        limits = {
            name: (await store.write(lambda tx, name=name: tx.fetch(f"SHOW {name}")))[0][0] for name in postgres.LIMITS
        }
        assert limits == postgres.LIMITS
        [(prepared,)] = await store.read(lambda tx: tx.fetch("SELECT COUNT(*) FROM pg_prepared_statements"))
        assert (prepared == 0) == pooled


# --- connections that break ------------------------------------------------------------------------------------


class Wire:
    """Between a store and its server. cuts: for each of the next commits, whether the server gets it before the
    connection breaks; None lets it pass. on: whether new connections are taken."""

    def __init__(self, url: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wire-"))
        self.url = f"{url.partition('?')[0]}?host={self.folder}"
        self.cuts: list[bool | None] = []
        self.commits = 0
        self.on = True
        self._server = f"{parse_qs(urlsplit(url).query)['host'][0]}/.s.PGSQL.5432"
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def between(self) -> AsyncGenerator[None, None]:
        listening = await asyncio.start_unix_server(self._connected, f"{self.folder}/.s.PGSQL.5432")
        try:
            yield
        finally:
            listening.close()
            await self.drop()
            shutil.rmtree(self.folder)

    async def drop(self) -> None:
        """Break all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not self.on:
            writer.close()
            return
        from_server, to_server = await asyncio.open_unix_connection(self._server)
        back = asyncio.create_task(self._pass(from_server, writer))
        try:
            while data := await reader.read(65536):
                cut = self._cut(data)
                if cut is not False:
                    to_server.write(data)
                if cut is not None:
                    back.cancel()
                    await asyncio.wait([back])
                    if cut:
                        await from_server.read(65536)  # the answer, which nobody gets
                    return
        finally:
            back.cancel()
            to_server.close()
            writer.close()

    def _cut(self, data: bytes) -> bool | None:
        if b"COMMIT\0" not in data:
            return None
        self.commits += 1
        return self.cuts.pop(0) if self.cuts else None

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()


@pytest.fixture
async def wire(url: str) -> AsyncGenerator[Wire, None]:
    wire = Wire(url)
    async with wire.between():
        yield wire


async def test_a_commit_whose_answer_was_lost_is_done_once(wire: Wire):
    """The server is asked what became of it: the caller gets the result, and the work is not run again."""
    async with opened(wire.url) as store:
        await add(store, "counter")
        runs: list[int] = []
        wire.cuts = [True]
        assert await store.write(counts(runs)) == 0
        assert runs == [0]
        assert await store.write(counts(runs)) == 1


async def test_a_commit_that_never_arrived_is_done_again(wire: Wire):
    """What the server has not got is written by a second run."""
    async with opened(wire.url) as store:
        await add(store, "counter")
        runs: list[int] = []
        wire.cuts = [False, False]
        assert await store.write(counts(runs)) == 0
        assert runs == [0, 0, 0]
        assert await store.write(counts(runs)) == 1


async def test_a_commit_of_nothing_is_not_asked_about(wire: Wire):
    """A write that has changed nothing is simply run again when its end was lost."""

    async def work(tx: Transaction) -> int:
        return await tx.execute("DELETE FROM projects")

    async with opened(wire.url) as store:
        wire.cuts = [True, False]
        assert await store.write(work) == 0
        assert await names(store) == []


async def test_many_commits_whose_answers_were_lost_are_done_once(wire: Wire):
    """Whatever of twenty writes at once arrives or not, each is done once, and each caller hears so."""
    async with opened(wire.url) as store:
        await add(store, "counter")
        wire.cuts = [number % 3 == 0 if number % 3 < 2 else None for number in range(40)]
        runs: list[int] = []
        assert sorted(await asyncio.gather(*(store.write(counts(runs)) for _ in range(20)))) == list(range(20))


async def test_a_fate_that_cannot_be_learned_is_said(wire: Wire, monkeypatch: pytest.MonkeyPatch):
    """When the server stays away after a lost answer, the caller hears that it may be written or not."""
    monkeypatch.setattr(postgres, "FATE_TIMEOUT_S", 0.1)
    async with opened(wire.url, connections=1) as store:
        await add(store, "counter")
        wire.cuts = [True]
        wire.on = False
        with pytest.raises(StoreUnavailable, match="cannot be learned"):
            await store.write(counts([]))
        wire.on = True
        assert await store.write(counts([])) == 1


async def test_a_server_that_is_away_is_said_at_once(wire: Wire):
    """Without a server, reads and writes raise StoreUnavailable; when it is back, the next ones work."""
    async with opened(wire.url, connections=1) as store:
        await add(store, "a")
        wire.on = False
        await wire.drop()
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="cannot be reached"):
                await add(store, "b")
            with pytest.raises(StoreUnavailable):
                await names(store)
        wire.on = True
        await add(store, "c")
        assert await names(store) == ["a", "c"]


async def test_connections_that_an_operator_ends_are_replaced(store: PostgresStore, other: Any):
    """Idle connections that the server has closed cost nobody anything; nor do those in the middle of a write."""
    await asyncio.gather(*(add(store, f"n{number}") for number in range(10)))
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> $1"
    await other.fetch(end, other.get_server_pid())
    await add(store, "counter")
    transaction = other.transaction()
    await transaction.start()
    await other.execute("UPDATE projects SET created_at = 7 WHERE id = 'counter'")
    second = asyncio.create_task(store.write(counts([])))
    await somebody_waits(other)
    await other.fetch(end, other.get_server_pid())
    await transaction.commit()
    assert await second == 7


# --- restarts --------------------------------------------------------------------------------------------------


@pytest.fixture
def own() -> Generator[Postgres, None, None]:
    with own_postgres() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGQUIT, signal.SIGINT])
async def test_a_restart_loses_nothing(own: Postgres, how: signal.Signals):
    """While the server is ended and started again, in the middle of writes: what was acknowledged is there, once; what
    was refused is not; and the store goes on by itself."""
    async with opened(own.url(), connections=8) as store:
        await add(store, "counter")
        counted: list[int] = []
        refused = 0
        stop = asyncio.Event()

        async def count() -> None:
            nonlocal refused
            while not stop.is_set():
                try:
                    counted.append(await store.write(counts([])))
                except StoreUnavailable:
                    refused += 1
                    await asyncio.sleep(0.01)

        async def fill(name: str) -> list[str]:
            done: list[str] = []
            while not stop.is_set():
                try:
                    await add(store, f"{name}-{len(done)}")
                    done.append(f"{name}-{len(done)}")
                except StoreUnavailable:
                    await asyncio.sleep(0.01)
            return done

        tasks = [asyncio.create_task(fill(f"n{number}")) for number in range(6)]
        counting = [asyncio.create_task(count()) for _ in range(2)]
        for _ in range(2):
            before = len(counted)
            async with asyncio.timeout(30):
                while len(counted) < before + 30:
                    await asyncio.sleep(0.01)
            own.stop(how)
            own.start()
        after = len(counted)
        async with asyncio.timeout(30):
            while len(counted) < after + 30:
                await asyncio.sleep(0.01)
        stop.set()
        filled = await asyncio.gather(*tasks)
        await asyncio.gather(*counting)
        assert sorted(counted) == list(range(len(counted)))
        assert await names(store) == sorted(["counter", *(name for done in filled for name in done)])
