"""What `contracts.Store` promises, kept by every store; then what SQLite alone must survive. What Postgres must is in
`test_postgres_store.py`."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest

from afterglow.contracts import Store, Transaction, Work
from afterglow.errors import ConfigError, StoreError, StoreFull, StoreUnavailable
from afterglow.store import sqlite
from afterglow.store.migrations import migrations
from afterglow.store.postgres import PostgresStore
from afterglow.store.sqlite import SqliteStore, _connect, _statements
from tests.conftest import ServerFactory
from tests.postgres import fresh_database

OpenStore = Callable[[], AbstractAsyncContextManager[Store]]
LARGE = "x" * 200_000
FOLDERS = {dump.stem: dump.read_text() for dump in sorted((Path(__file__).parent / "folders").glob("*.sql"))}


@asynccontextmanager
async def sqlite_store(path: Path) -> AsyncGenerator[SqliteStore, None]:
    store = SqliteStore(path)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "afterglow.db"


@asynccontextmanager
async def postgres_store(url: str, *, pooled: bool) -> AsyncGenerator[PostgresStore, None]:
    store = await PostgresStore.open(url, connections=10, pooled=pooled)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture(params=["sqlite", "postgres", "pooled postgres"])
async def open_store(request: pytest.FixtureRequest, path: Path) -> AsyncGenerator[OpenStore, None]:
    """Opens the same store each time it is called. A new kind of store is another `params`."""
    if request.param == "sqlite":
        yield lambda: sqlite_store(path)
        return
    async with fresh_database() as url:
        yield lambda: postgres_store(url, pooled=request.param == "pooled postgres")


@pytest.fixture
async def store(open_store: OpenStore) -> AsyncGenerator[Store, None]:
    async with open_store() as opened:
        yield opened


def adds(*names: str, then: Exception | None = None) -> Work[str]:
    """Work that writes rows, returns the last one's name, and may fail after that."""

    async def work(tx: Transaction) -> str:
        for name in names:
            await tx.execute("INSERT INTO projects (id, created_at) VALUES ($1, $2)", name, 0)
        if then is not None:
            raise then
        return names[-1]

    return work


async def names(tx: Transaction) -> list[str]:
    return [row[0] for row in await tx.fetch("SELECT id FROM projects ORDER BY id")]


class Unlucky(Exception):
    pass


# --- every store -----------------------------------------------------------------------------------------------


async def test_a_write_is_read_by_whoever_comes_next(store: Store):
    """What a write returned for, the next read and the next write see."""
    assert await store.write(adds("a")) == "a"
    assert await store.read(names) == ["a"]
    assert await store.write(names) == ["a"]


async def test_a_write_survives_a_restart(open_store: OpenStore):
    """An acknowledged write is there when the store is opened again."""
    async with open_store() as store:
        await store.write(adds("a"))
    async with open_store() as store:
        assert await store.read(names) == ["a"]


async def test_statements_say_what_they_changed(store: Store):
    """`fetch` gives rows, also those of RETURNING; `execute` counts; a value may be used twice, in any order."""

    async def work(tx: Transaction) -> None:
        assert await tx.execute("INSERT INTO projects (id, created_at) VALUES ($2, $1)", 7, "a") == 1
        assert await tx.fetch("SELECT $1, id, $1 FROM projects WHERE created_at = $2", "v", 7) == [("v", "a", "v")]
        assert await tx.fetch("UPDATE projects SET created_at = 8 RETURNING id") == [("a",)]
        assert await tx.execute("DELETE FROM projects WHERE id = $1", "b") == 0

    await store.write(work)


async def test_ten_values_are_ten_values(store: Store):
    """`$10` is not `$1` with a nought after it."""
    numbers = list(range(1, 13))

    async def work(tx: Transaction) -> list[tuple[int, ...]]:
        columns = [f"CAST(${number} AS INTEGER)" for number in reversed(numbers)]
        return await tx.fetch("SELECT " + ", ".join(columns), *numbers)

    assert await store.read(work) == [tuple(reversed(numbers))]


async def test_failing_work_writes_nothing(store: Store):
    """The work's own error comes back as it was raised, and all it wrote is gone."""
    error = Unlucky("after two rows")
    with pytest.raises(Unlucky) as raised:
        await store.write(adds("a", "b", then=error))
    assert raised.value is error
    assert await store.read(names) == []


async def test_a_statement_that_fails_fails_its_work_alone(store: Store):
    """A key that is taken is an error of the work that wanted it, and no failure of the database, which would be
    tried again; what runs beside it is committed."""
    await store.write(adds("taken"))
    results = await asyncio.gather(
        store.write(adds("a")), store.write(adds("b", "taken")), store.write(adds("c")), return_exceptions=True
    )
    assert results[0] == "a"
    assert isinstance(results[1], Exception)
    assert not isinstance(results[1], StoreError)
    assert results[2] == "c"
    assert await store.read(names) == ["a", "c", "taken"]


async def test_failures_among_many_take_nothing_with_them(store: Store):
    """Of 200 writes at once, each third failing, exactly the others are stored, and each caller hears its own."""

    async def one(number: int) -> str:
        return await store.write(adds(f"n{number:03}", then=Unlucky(str(number)) if number % 3 == 0 else None))

    results = await asyncio.gather(*(one(number) for number in range(200)), return_exceptions=True)
    for number, result in enumerate(results):
        assert str(result) == (str(number) if number % 3 == 0 else f"n{number:03}")
    assert await store.read(names) == [f"n{number:03}" for number in range(200) if number % 3]


async def test_writes_run_one_after_another(store: Store):
    """200 tasks that each read a number and write it plus one lose none of them."""
    await store.write(adds("counter"))

    async def count(tx: Transaction) -> int:
        (found,) = (await tx.fetch("SELECT created_at FROM projects WHERE id = 'counter'"))[0]
        await tx.execute("UPDATE projects SET created_at = $1 WHERE id = 'counter'", found + 1)
        return int(found)

    async def read(tx: Transaction) -> int:
        return int((await tx.fetch("SELECT created_at FROM projects WHERE id = 'counter'"))[0][0])

    async def one() -> int:
        before = await store.write(count)
        assert await store.read(read) > before
        return before

    assert sorted(await asyncio.gather(*(one() for _ in range(200)))) == list(range(200))


async def test_a_read_sees_one_moment(store: Store):
    """However many rows a write adds, a read beside it sees all of them or none."""

    async def pairs(tx: Transaction) -> tuple[int, int]:
        return len(await names(tx)), len(await names(tx))

    async def look() -> None:
        for _ in range(20):
            first, second = await store.read(pairs)
            assert first == second
            assert first % 10 == 0

    async def fill() -> None:
        for number in range(20):
            await store.write(adds(*(f"{number}-{part}" for part in range(10))))

    await asyncio.gather(fill(), look(), look())


async def test_a_read_writes_nothing(store: Store):
    """Work that writes where it should only read is refused."""
    with pytest.raises(StoreError):
        await store.read(adds("a"))
    assert await store.read(names) == []


async def test_a_failing_read_raises_its_own_error(store: Store):
    """A read's error reaches its caller, and the next read works."""

    async def work(tx: Transaction) -> None:
        raise Unlucky

    for _ in range(10):
        with pytest.raises(Unlucky):
            await store.read(work)
    assert await store.read(names) == []


async def test_work_that_awaits_something_else_is_refused(store: Store):
    """Work may wait for its transaction only; what it wrote before it went astray is gone."""

    async def astray(tx: Transaction) -> None:
        await adds("a")(tx)
        await asyncio.sleep(0)

    for ask in (store.write, store.write_early):
        with pytest.raises(RuntimeError, match="awaited something else"):
            await ask(astray)
    with pytest.raises(RuntimeError, match="awaited something else"):
        await store.read(lambda tx: asyncio.sleep(0))
    assert await store.write(names) == []


async def test_an_early_write_is_announced_only_when_it_is_durable(store: Store):
    """`write_early` gives the result, and something to await; after that everyone can read it."""
    result, committed = await store.write_early(adds("a"))
    assert result == "a"
    await committed
    assert await store.read(names) == ["a"]


async def test_a_work_minds_rows_one_by_one_when_it_says_so(store: Store):
    """Of many writes at once to the same rows, none that goes row by row is lost, or has to be run twice."""
    await store.write(adds("a", "b", "c"))
    runs = 0

    async def renew(tx: Transaction) -> int:
        nonlocal runs
        runs += 1
        return await tx.execute("UPDATE projects SET created_at = created_at + 1")

    assert await asyncio.gather(*(store.write(renew, rowwise=True) for _ in range(30))) == [3] * 30
    assert runs == 30
    assert await store.read(lambda tx: tx.fetch("SELECT DISTINCT created_at FROM projects")) == [(30,)]


async def test_an_early_write_that_fails_says_so_at_once(store: Store):
    """The work's error is raised by `write_early` itself; there is nothing to wait for."""
    with pytest.raises(Unlucky):
        await store.write_early(adds("a", then=Unlucky()))
    assert await store.read(names) == []


async def test_a_caller_that_gave_up_disturbs_nobody(store: Store):
    """Cancelling those who wait leaves the others, and the store, as they were."""

    async def one(number: int) -> str:
        if number % 4 == 0:
            await store.write_early(adds(f"n{number:02}"))
        elif number % 4 == 1:
            await store.read(names)
        return await store.write(adds(f"m{number:02}"))

    tasks = [asyncio.create_task(one(number)) for number in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[1::2] == [f"m{number:02}" for number in range(1, 40, 2)]
    assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
    assert set(results[1::2]) <= set(await store.read(names))


async def test_closing_finishes_what_was_asked(open_store: OpenStore):
    """`close` beside 100 writes and reads: those asked before are answered, and stored."""
    async with open_store() as store:
        writes = [asyncio.create_task(store.write(adds(f"n{number:02}"))) for number in range(100)]
        reads = [asyncio.create_task(store.read(names)) for _ in range(20)]
        await asyncio.sleep(0)
        await store.close()
        assert await asyncio.gather(*writes) == [f"n{number:02}" for number in range(100)]
        await asyncio.gather(*reads)
    async with open_store() as store:
        assert len(await store.read(names)) == 100


async def test_a_closed_database_has_no_log_beside_it(path: Path):
    """However its connections close: what was deleted would still stand there."""
    for number in range(60):
        store = SqliteStore(path)
        await store.write(adds(f"n{number}"))
        await asyncio.gather(*(store.read(names) for _ in range(6)))
        await store.close()
        assert not path.with_name(path.name + "-wal").exists()


async def test_a_closed_store_says_so(open_store: OpenStore):
    """Whoever comes after `close` is refused, and does not wait for ever; closing again does nothing."""
    async with open_store() as store:
        await store.close()
        for ask in (store.read, store.write, store.write_early):
            with pytest.raises(StoreUnavailable, match="closed"):
                await ask(names)


# --- SQLite: groups --------------------------------------------------------------------------------------------


async def test_early_writes_keep_their_order(path: Path):
    """Early and plain writes run in the order in which they were asked for."""
    order: list[str] = []
    async with sqlite_store(path) as store:

        def noting(name: str) -> Work[None]:
            async def work(tx: Transaction) -> None:
                order.append(name)

            return work

        early = [asyncio.ensure_future(store.write_early(noting(f"early {number}"))) for number in range(5)]
        plain = asyncio.ensure_future(store.write(noting("plain")))
        late = asyncio.ensure_future(store.write_early(noting("late")))
        for _, committed in [*(await asyncio.gather(*early)), await late]:
            await committed
        await plain
        assert order == [*(f"early {number}" for number in range(5)), "plain", "late"]


class HeldWriter:
    """Keeps the writer busy, so that everything asked for meanwhile makes one group with it."""

    def __init__(self, store: SqliteStore) -> None:
        self.free = threading.Event()
        self._busy = threading.Event()
        self._holding = asyncio.ensure_future(store.write(self.hold))

    async def hold(self, tx: Transaction) -> None:
        self._busy.set()
        self.free.wait()

    async def __aenter__(self) -> HeldWriter:
        await asyncio.to_thread(self._busy.wait)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.free.set()


async def asked(*calls: object) -> list[asyncio.Future[object]]:
    """Ask for all of these now, in this order, without waiting for any."""
    tasks = [asyncio.ensure_future(call) for call in calls]  # type: ignore[call-overload]
    await asyncio.sleep(0)
    return tasks


async def test_nobody_is_answered_before_the_group_is_committed(path: Path):
    """Another connection can read each write by the time that its caller is told of it."""
    reader = sqlite3.connect(path)
    async with sqlite_store(path) as store:

        async def one(number: int) -> None:
            name = await store.write(adds(f"n{number}"))
            assert reader.execute("SELECT 1 FROM projects WHERE id = ?", (name,)).fetchall() == [(1,)]

        await asyncio.gather(*(one(number) for number in range(50)))
    reader.close()


async def test_an_early_result_comes_before_its_commit(path: Path):
    """An early caller goes on while the group it is in is still open, and nobody else can read it yet."""
    reader = sqlite3.connect(path)
    async with sqlite_store(path) as store:
        async with HeldWriter(store):
            early = asyncio.ensure_future(store.write_early(adds("a")))
            last = HeldWriter(store)
            await asyncio.sleep(0)
        name, committed = await early
        assert name == "a"
        async with last:
            assert reader.execute("SELECT id FROM projects").fetchall() == []
        await committed
        assert reader.execute("SELECT id FROM projects").fetchall() == [("a",)]
    reader.close()


async def test_an_early_result_rests_on_nothing_that_cannot_be_read(path: Path):
    """Early work that has seen what others of its group have written gives its result when everybody can read that."""
    async with sqlite_store(path) as store:
        async with HeldWriter(store):
            plain, early = await asked(store.write(adds("a")), store.write_early(names))
            last = HeldWriter(store)
            await asyncio.sleep(0)
        async with last:
            assert not early.done()
        seen, _ = await early
        assert seen == await store.read(names) == ["a"]
        await plain


async def test_a_large_group_is_committed_whole(path: Path):
    """More writes than one group takes, asked for at once, are all stored."""
    async with sqlite_store(path) as store:
        async with HeldWriter(store):
            tasks = await asked(*(store.write(adds(f"n{number}")) for number in range(600)))
        await asyncio.gather(*tasks)
        assert len(await store.read(names)) == 600


# --- SQLite: a disk that is full, and one that fails -----------------------------------------------------------


async def fill(store: SqliteStore) -> None:
    """Let the database grow no more."""

    async def work(tx: Transaction) -> None:
        (pages,) = (await tx.fetch("PRAGMA page_count"))[0]
        await tx.fetch(f"PRAGMA max_page_count = {pages}")

    await store.write(work)


async def make_room(store: SqliteStore) -> None:
    async def work(tx: Transaction) -> None:
        await tx.fetch("PRAGMA max_page_count = 1000000")

    await store.write(work)


async def test_a_full_disk_is_said_and_nothing_is_half_written(path: Path):
    """With no space left a write raises StoreFull, also after rows that still fitted, and reads go on."""
    async with sqlite_store(path) as store:
        await store.write(adds("before"))
        await fill(store)
        with pytest.raises(StoreFull, match=r"no space left"):
            await store.write(adds("small", LARGE))
        assert await store.read(names) == ["before"]
        with pytest.raises(StoreFull):
            await store.write_early(adds("small", LARGE))
        assert await store.read(names) == ["before"]


async def test_writes_go_on_when_there_is_space_again(path: Path):
    """The very next write after space came back is stored, without a restart."""
    async with sqlite_store(path) as store:
        await fill(store)
        for _ in range(3):
            with pytest.raises(StoreFull):
                await store.write(adds(LARGE))
        await make_room(store)
        await store.write(adds(LARGE))
        assert await store.read(names) == [LARGE]


async def test_a_full_disk_fails_a_group_with_one_voice(path: Path):
    """Each caller of a group is either stored, or told StoreFull; nothing in between."""
    async with sqlite_store(path) as store:
        await fill(store)
        async with HeldWriter(store):
            tasks = await asked(
                store.write(adds("a")), store.write(adds("b", LARGE)), store.write(adds("c")), store.write(adds(LARGE))
            )
        results = await asyncio.gather(*tasks, return_exceptions=True)
        stored = await store.read(names)
        for name, result in zip(("a", LARGE, "c", LARGE), results, strict=True):
            assert (name in stored) if result == name else (type(result) is StoreFull), type(result)
        assert isinstance(results[1], StoreFull)
        assert isinstance(results[3], StoreFull)


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """A disk that fails: writes beyond this size are refused by the system (Python ignores its signal)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_commit_that_fails_fails_everyone_in_it(path: Path):
    """When the disk refuses the commit itself, all who were in it hear StoreUnavailable, nothing of it is there, and
    what comes after is stored."""
    async with sqlite_store(path) as store:
        await store.write(adds("before"))
        log_size = (path.parent / f"{path.name}-wal").stat().st_size
        async with HeldWriter(store):
            tasks = await asked(
                store.write(adds("a" + LARGE)), store.write_early(adds("b")), store.write(adds("c", then=Unlucky()))
            )
            limit = files_no_larger_than(log_size + 8192)
            limit.__enter__()
        try:
            first, early, unlucky = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            limit.__exit__(None, None, None)
        assert isinstance(first, StoreUnavailable)
        assert isinstance(early, StoreUnavailable)
        assert isinstance(unlucky, Unlucky)
        assert await store.read(names) == ["before"]
        await store.write(adds("after"))
        assert await store.read(names) == ["after", "before"]


# --- SQLite: files that cannot be used -------------------------------------------------------------------------


def test_a_file_that_is_no_database_is_refused(path: Path):
    """Garbage where the database should be is StoreUnavailable, which names the file."""
    path.write_bytes(b"This is no database. " * 1000)
    with pytest.raises(StoreUnavailable, match=r"afterglow\.db: file is not a database"):
        SqliteStore(path)


def test_a_place_that_cannot_hold_a_file_is_refused(tmp_path: Path):
    """A folder that is missing is StoreUnavailable, which names the file."""
    with pytest.raises(StoreUnavailable, match=r"nowhere/afterglow\.db: unable to open"):
        SqliteStore(tmp_path / "nowhere" / "afterglow.db")


async def test_a_database_that_became_read_only_says_so(path: Path):
    """Writes are refused clearly, reads go on."""
    async with sqlite_store(path) as store:
        await store.write(adds("a"))

        async def forbid(tx: Transaction) -> None:
            await tx.fetch("PRAGMA query_only = ON")

        await store.write(forbid)
        with pytest.raises(StoreUnavailable, match="readonly"):
            await store.write(adds("b"))
        assert await store.read(names) == ["a"]


async def test_a_damaged_page_hurts_who_reads_it_alone(path: Path):
    """A read that meets a damaged page raises StoreUnavailable, again and again; other reads are answered."""
    async with sqlite_store(path) as store:
        await store.write(adds(*(f"{number:04}{'x' * 3000}" for number in range(50))))
    with sqlite3.connect(path) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'projects'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    async with sqlite_store(path) as store:
        for ask in (store.read, store.write, store.read, store.write):
            with pytest.raises(StoreUnavailable, match=r"afterglow\.db: .*(malformed|corrupt)"):
                await ask(lambda tx: tx.fetch("SELECT created_at FROM projects"))
        assert await store.read(lambda tx: tx.fetch("SELECT id FROM threads")) == []


async def test_the_database_is_its_owners_alone(path: Path):
    """Neither the file nor the log beside it can be read by others."""
    before = os.umask(0)
    try:
        async with sqlite_store(path) as store:
            await store.write(adds("a"))
            for file in path.parent.iterdir():
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    finally:
        os.umask(before)


# --- SQLite: the schema ----------------------------------------------------------------------------------------


async def test_a_newer_schema_is_refused(path: Path):
    """A database that a later release has changed is not opened, and not touched."""
    async with sqlite_store(path):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO migrations VALUES (9999, 0)")
    connection.close()
    with pytest.raises(ConfigError, match=r"written by a newer Afterglow \(schema 9999;"):
        SqliteStore(path)


@pytest.mark.parametrize("release", FOLDERS)
async def test_an_old_folder_opens(path: Path, release: str, start_server: ServerFactory):
    """What a release has written, every later one opens, with all its rows, reads and works on; each dump in
    `folders/` is of a folder that its release wrote."""
    with sqlite3.connect(path) as connection:
        connection.executescript(FOLDERS[release])
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        before = {table: connection.execute(f"SELECT COUNT(*) FROM {table}").fetchall() for table in tables}
    connection.close()
    async with sqlite_store(path) as store:
        for table, count in before.items():
            if table != "migrations":
                assert await store.read(lambda tx, table=table: tx.fetch(f"SELECT COUNT(*) FROM {table}")) == count
        newest = await store.read(lambda tx: tx.fetch("SELECT MAX(version) FROM migrations"))
        assert newest == [(max(migrations()),)]
        threads = await store.read(lambda tx: tx.fetch("SELECT id FROM threads WHERE project_id = 'default'"))
        assistant_id = (await store.read(lambda tx: tx.fetch("SELECT id FROM assistants")))[0][0]
    async with start_server(path.parent, api_keys="test-key") as server:
        beta = server.client.beta
        assert (await beta.assistants.retrieve(assistant_id)).id == assistant_id
        assert threads
        for (thread_id,) in threads:
            for run in (await beta.threads.runs.list(thread_id)).data:
                assert (await beta.threads.runs.steps.list(run.id, thread_id=thread_id)).data
                if (await beta.threads.runs.retrieve(run.id, thread_id=thread_id)).status == "requires_action":
                    await beta.threads.runs.cancel(run.id, thread_id=thread_id)
            said = len((await beta.threads.messages.list(thread_id)).data)
            assert (await server.run("And now?", thread_id=thread_id, assistant_id=assistant_id)).status == "completed"
            assert len((await beta.threads.messages.list(thread_id)).data) == said + 2


async def test_two_that_open_a_new_folder_at_once_share_it(path: Path):
    """The schema is made once, under the database's own lock."""
    stores = await asyncio.gather(*(asyncio.to_thread(SqliteStore, path) for _ in range(3)))
    try:
        for number, store in enumerate(stores):
            await store.write(adds(f"n{number}"))
        assert await stores[0].read(names) == ["n0", "n1", "n2"]
    finally:
        for store in stores:
            await store.close()


def test_a_script_is_cut_into_its_statements():
    """Semicolons end statements, except within texts, comments and triggers."""
    script = """
        -- A comment; with a semicolon.
        CREATE TABLE a (x TEXT DEFAULT ';');   -- another; one
        INSERT INTO a VALUES ('two;
        lines');
        CREATE TRIGGER t AFTER INSERT ON a BEGIN
            DELETE FROM a WHERE x = '';
            INSERT INTO a VALUES ('-- no comment');
        END;
        -- The end.
    """
    statements = _statements(script)
    assert len(statements) == 4  # three, and the comment at the end, which does nothing
    connection = sqlite3.connect(":memory:")
    for statement in statements:
        connection.execute(statement)
    connection.execute("INSERT INTO a VALUES ('x')")
    assert connection.execute("SELECT x FROM a ORDER BY rowid").fetchall() == [
        ("two;\n        lines",),
        ("x",),
        ("-- no comment",),
    ]
    connection.close()


def test_a_last_statement_needs_no_semicolon():
    """What comes after the last semicolon is not dropped."""
    assert _statements("CREATE TABLE a (x);\nCREATE TABLE b (x)\n") == ["CREATE TABLE a (x);", "CREATE TABLE b (x)"]


def test_the_migrations_are_numbered_without_a_gap():
    """Every number from 1 on has its script."""
    assert sorted(migrations()) == list(range(1, len(migrations()) + 1))


# --- SQLite: several processes ---------------------------------------------------------------------------------


async def test_other_processes_write_beside_the_server(path: Path):
    """While a server reads and writes, a command makes a key; both see what the other has written."""
    command = [sys.executable, "-m", "afterglow.cli", "keys"]
    async with sqlite_store(path) as store:
        process = await asyncio.create_subprocess_exec(
            *command,
            "create",
            "--data",
            str(path.parent),
            "--project",
            "other",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        number = 0
        while process.returncode is None:
            await store.write(adds(f"n{number}"))
            number += 1
            await asyncio.sleep(0.005)
        _, errors = await process.communicate()
        assert process.returncode == 0, errors
        found = await store.read(names)
        assert len(found) == number + 1
        assert "other" in found


async def test_a_writer_waits_for_one_of_another_process(path: Path):
    """While another connection holds the write lock for a moment, a write waits; it does not fail."""
    async with sqlite_store(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(store.write(adds("mine")))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert await store.read(names) == []
        other.execute("INSERT INTO projects (id, created_at) VALUES ('theirs', 0)")
        other.execute("COMMIT")
        await waiting
        assert await store.read(names) == ["mine", "theirs"]
        other.close()


async def test_a_lock_that_is_never_given_back_is_said(path: Path, monkeypatch: pytest.MonkeyPatch):
    """When the lock does not come, the write raises StoreUnavailable, and the one after it works."""
    monkeypatch.setattr("afterglow.store.sqlite.BUSY_TIMEOUT_S", 0.05)
    async with sqlite_store(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.write(adds("a"))
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.write_early(adds("a"))
        other.execute("ROLLBACK")
        other.close()
        await store.write(adds("b"))
        assert await store.read(names) == ["b"]


async def test_deleted_text_leaves_the_file_whatever_the_build_of_sqlite(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some builds leave deleted rows in the file until their place is used again; a store's are overwritten."""

    def connect_as_such_a_build(path: Path) -> sqlite3.Connection:
        connection = _connect(path)
        connection.execute("PRAGMA secure_delete = OFF")
        return connection

    monkeypatch.setattr("afterglow.store.sqlite._connect", connect_as_such_a_build)

    async def forget(tx: Transaction) -> None:
        await tx.execute("DELETE FROM projects WHERE id = $1", "a secret")

    async with sqlite_store(path) as store:
        await store.write(adds("a secret"))
        await store.write(forget)
    assert b"a secret" not in path.read_bytes()


async def test_deleted_text_leaves_the_log_in_a_lull(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Soon after the last write nothing that was deleted is on the disk, also while the store stays open; a reader that
    stands in the way for a while only delays it."""
    monkeypatch.setattr(sqlite, "LULL_S", 0.01)
    async with sqlite_store(path) as store:
        await store.write(adds("a secret"))
        with closing(sqlite3.connect(path)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT id FROM projects").fetchall() == [("a secret",)]
            await store.write(lambda tx: tx.execute("DELETE FROM projects"))
            await asyncio.sleep(0.05)
            assert any(b"a secret" in file.read_bytes() for file in path.parent.iterdir())
        async with asyncio.timeout(10):
            while any(b"a secret" in file.read_bytes() for file in path.parent.iterdir()):
                await asyncio.sleep(0.01)
        await store.write(adds("and on"))
