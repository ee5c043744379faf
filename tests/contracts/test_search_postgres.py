"""What the search index in Postgres must survive, beyond what every index promises."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from afterglow.contracts import SearchIndex, Weights
from afterglow.errors import ConfigError, StoreFull, StoreUnavailable
from afterglow.objects import Gt
from afterglow.search import postgres as postgres_module
from afterglow.search import ranking
from afterglow.search.postgres import PostgresIndex
from afterglow.search.sessions import _translated
from afterglow.search.statements import TABLES
from tests.contracts.indexes import P, S, embedded_index, emptied_database, find, postgres_index, put, texts
from tests.postgres import fresh_database, own_postgres


@pytest.fixture
async def url() -> AsyncGenerator[str, None]:
    async with emptied_database() as url:
        yield url


@pytest.fixture
async def index(url: str) -> AsyncGenerator[PostgresIndex, None]:
    async with postgres_index(url) as opened:
        yield opened


async def ask(url: str, statement: str, *values: Any) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement, *values)]
    finally:
        await connection.close()


async def rows_left(url: str) -> dict[str, int]:
    """How many rows each table has that has any."""
    tables = ("search_stores", "search_deleted", *TABLES)
    counts = {table: (await ask(url, f"SELECT count(*) FROM {table}"))[0][0] for table in tables}
    return {table: count for table, count in counts.items() if count}


# --- the same as the embedded index ----------------------------------------------------------------------------


def pages(count: int, chance: random.Random) -> str:
    """Lines of made-up words, few of them frequent, with names and runs of Chinese between."""
    words = [f"w{number}" for number in range(300)] + ["max_num_results", "report-2024.pdf", "吾輩は猫", "CamelCase"]
    odds = [1 / (rank + 1) for rank in range(len(words))]
    return "\n".join(" ".join(chance.choices(words, odds, k=chance.randint(1, 60))) for _ in range(count))


async def test_it_finds_what_the_embedded_index_finds(index: PostgresIndex, tmp_path: Path):
    """The same hits in the same order, with the same scores by words and nearly the same by vectors."""
    chance = random.Random(7)

    def vector() -> list[float]:
        return [chance.gauss(0, 1) for _ in range(24)]

    async with embedded_index(tmp_path) as other:
        for number in range(9):
            text = pages(40, chance)
            vectors = [vector() for _ in range(40)] if number % 3 else None
            for one in (index, other):
                await put(one, text, f"file-{number}", f"vs_{number % 2}", vectors, year=2020 + number)
        await asyncio.gather(*(one.delete_file(P, "vs_1", "file-3") for one in (index, other)))
        names = ["the max_num_results of w9", "猫", "report-2024.pdf", "camel case w7 w7"]
        for query in ["w1 w2 w200", "w0 w1 w2 w3", *names, "-"]:
            for where in (None, Gt(key="year", value=2024)):
                words: dict[str, Any] = {"where": where, "limit": 500, "weights": Weights(embedding=0)}
                found, expected = [await find(one, query, "vs_0", "vs_1", **words) for one in (index, other)]
                assert {hit.chunk.text: hit.score for hit in found} == {hit.chunk.text: hit.score for hit in expected}
                asked: dict[str, Any] = {"where": where, "limit": 10, "embedding": vector()}
                found, expected = [await find(one, query, "vs_0", "vs_1", **asked) for one in (index, other)]
                assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-3)


# --- deleting --------------------------------------------------------------------------------------------------


async def test_what_is_deleted_leaves_no_row(index: PostgresIndex, url: str):
    """A file goes with all its rows, and so does a store; what others have stays."""
    await put(index, "cats\ndogs", vectors=[[1.0, 0.0], [0.0, 1.0]])
    before = await rows_left(url)
    await put(index, "birds and\nmore", "file-b", vectors=[[1.0, 0.0], [0.0, 1.0]])
    await put(index, "birds", "file-c", "vs_two", vectors=[[1.0]])
    await index.delete_file(P, S, "file-b")
    await index.delete_store(P, "vs_two")
    assert await rows_left(url) == before
    assert await ask(url, "SELECT chunks, words, vectors, dimensions FROM search_stores") == [(2, 2, 2, 2)]
    await index.delete_store(P, S)
    assert await rows_left(url) == {}


async def test_a_store_is_deleted_in_parts(url: str, monkeypatch: pytest.MonkeyPatch):
    """A store is gone at once and its rows go some at a time; what a crash leaves, the next start deletes."""
    monkeypatch.setattr(postgres_module, "DELETED_AT_ONCE", 7)
    async with postgres_index(url) as index:
        await put(index, "\n".join(f"line {number}" for number in range(50)), vectors=[[1.0, 0.0]] * 50)
        delete_some, calls = index._delete_some, 0

        async def crash(store: int) -> bool:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise StoreUnavailable("the machine stopped")
            return await delete_some(store)

        monkeypatch.setattr(index, "_delete_some", crash)
        with pytest.raises(StoreUnavailable, match="stopped"):
            await index.delete_store(P, S)
        assert await texts(index, "line") == []
        await put(index, "new line")
    assert (await rows_left(url))["search_deleted"] == 1
    async with postgres_index(url) as index:
        assert await texts(index, "line") == ["new line"]
        assert await rows_left(url) == {
            table: 2 if table == "search_words" else 1
            for table in ("search_stores", "search_words", "search_chunks", "search_files")
        }


# --- without pgvector ------------------------------------------------------------------------------------------


async def test_without_pgvector(caplog: pytest.LogCaptureFixture):
    """Where the extension cannot be had words alone are searched, as one line of the log says; vectors are kept, and
    found once it has been installed."""
    async with fresh_database(migrated=False) as url:
        await ask(url, "DROP ROLE IF EXISTS guest")
        await ask(url, "CREATE ROLE guest LOGIN")
        await ask(url, "GRANT CREATE ON SCHEMA public TO guest")
        with caplog.at_level(logging.WARNING):
            async with postgres_index(url.replace("postgres@", "guest@")) as index:
                assert not index.has_vectors
                assert await put(index, "cats\ndogs", vectors=[[1.0, 0.0], [0.0, 1.0]]) == 9 + 8
                await put(index, "more cats", "file-b", vectors=[[0.6, 0.8]])
                await put(index, "gone", "file-c", vectors=[[0.6, 0.8]])
                await index.delete_file(P, S, "file-c")
                hits = await find(index, "cats", embedding=[1.0, 0.0])
                assert {(hit.chunk.text, hit.vector_rank) for hit in hits} == {("cats", None), ("more cats", None)}
        (line,) = caplog.messages
        assert "pgvector" in line
        assert "CREATE EXTENSION vector" in line
        await ask(url, "CREATE EXTENSION vector")
        guest = url.replace("postgres@", "guest@")
        async with postgres_index(guest) as index, _before_pgvector(guest) as older:
            assert index.has_vectors
            await put(index, "gone", "file-c", vectors=[[0.6, 0.8]])
            await older.delete_file(P, S, "file-c")
            assert older.has_vectors
            hits = await find(index, "", embedding=[0.0, 1.0])
            assert [(hit.chunk.text, hit.vector_rank) for hit in hits] == [("dogs", 1), ("more cats", 2)]
            assert "search_packed_vectors" not in await rows_left(url)


@asynccontextmanager
async def _before_pgvector(url: str) -> AsyncGenerator[PostgresIndex, None]:
    """A process that was started before the extension was installed."""
    async with postgres_index(url) as index:
        index._tables = tuple(table for table in TABLES if table != "search_vectors")
        yield index


# --- the schema ------------------------------------------------------------------------------------------------


async def test_several_processes_start_at_once():
    """Whoever comes first makes the tables, and the others find them."""
    async with fresh_database(migrated=False) as url:
        indexes = await asyncio.gather(
            *(PostgresIndex.open(url, connections=1, pooled=bool(number % 2)) for number in range(6))
        )
        await put(indexes[0], "cats", vectors=[[1.0]])
        assert [await texts(one, "cats", embedding=[1.0]) for one in indexes] == [["cats"]] * 6
        await asyncio.gather(*(one.close() for one in indexes))


async def test_a_newer_schema_is_refused():
    """A database that a newer release has changed is left alone."""
    async with fresh_database(migrated=False) as url:
        async with postgres_index(url):
            await ask(url, "INSERT INTO search_migrations VALUES (9999, 0)")
        with pytest.raises(ConfigError, match="newer Afterglow"):
            await PostgresIndex.open(url, connections=1, pooled=False)


async def test_words_are_indexed_anew_by_a_newer_release(url: str, monkeypatch: pytest.MonkeyPatch):
    """The first write of a newer release brings a store up to date, file by file; an older one undoes nothing."""
    newest, searchable = ranking.FORMAT, ranking.searchable
    async with postgres_index(url) as index:
        monkeypatch.setattr(ranking, "FORMAT", "0 1.0")
        monkeypatch.setattr(ranking, "searchable", lambda text: "x" + text.replace(" ", " x more "))
        for number in range(3):
            await put(index, f"number{number} cats", f"file-{number}")
        monkeypatch.setattr(ranking, "FORMAT", newest)
        monkeypatch.setattr(ranking, "searchable", searchable)
        assert await texts(index, "number1") == []
        await put(index, "dogs", "file-b")
        assert await texts(index, "number1") == ["number1 cats"]
        assert await texts(index, "xnumber1 more") == []
        assert await ask(url, "SELECT chunks, words, format FROM search_stores") == [(4, 7, newest)]
        monkeypatch.setattr(ranking, "FORMAT", "0 1.0")
        await put(index, "old birds", "file-c")
        assert set(await ask(url, "SELECT id, format FROM search_files WHERE format <> $1", newest)) == {
            ("file-c", "0 1.0")
        }
        monkeypatch.setattr(ranking, "FORMAT", newest)
        await put(index, "dogs", "file-b")
        assert await ask(url, "SELECT DISTINCT format FROM search_files") == [(newest,)]


# --- many processes, and a Postgres that comes and goes --------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
async def test_many_writers_of_a_few_stores(url: str, pooled: bool):
    """Several processes write the same files of the same stores: all end whole, and the counts agree with the rows."""
    async with postgres_index(url, pooled=pooled) as one, postgres_index(url, pooled=pooled) as other:

        async def write(writer: int) -> None:
            index = one if writer % 2 else other
            for turn in range(4):
                store, file = f"vs_{(writer + turn) % 2}", f"file-{turn % 3}"
                text = "\n".join(f"writer {writer} turn {turn} line {line}" for line in range(turn + 1))
                await put(index, text, file, store, [[1.0, float(line)] for line in range(turn + 1)])
                if turn == 2:
                    await index.delete_file(P, store, file)

        await asyncio.gather(*(write(writer) for writer in range(8)))
        counted = await ask(
            url,
            "SELECT s.chunks = sum(f.chunks), s.words = sum(f.words), s.vectors = sum(f.vectors),"
            " s.chunks = (SELECT count(*) FROM search_chunks c WHERE c.store = s.number),"
            " s.vectors = (SELECT count(*) FROM search_vectors v WHERE v.store = s.number)"
            " FROM search_stores s JOIN search_files f ON f.store = s.number GROUP BY s.number",
        )
        assert counted == [(True,) * 5] * 2
        first, second = [
            await find(index, "writer line", "vs_0", "vs_1", embedding=[1.0, 0.5]) for index in (one, other)
        ]
        assert first == second


async def test_searches_outlive_their_connections(index: PostgresIndex, url: str):
    """When the server has cut all connections, the next search has its answer by a new one."""
    await put(index, "cats")
    for _ in range(3):
        await asyncio.gather(*(texts(index, "cats") for _ in range(4)))
        await ask(
            url,
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        assert await texts(index, "cats") == ["cats"]
    await put(index, "dogs", "file-b")
    assert await texts(index, "dogs") == ["dogs"]


async def test_a_write_that_fails_leaves_nothing(url: str):
    """When the database refuses one of its statements, nothing of a file is there."""
    async with postgres_index(url) as index:
        await put(index, "cats")
        await ask(url, "ALTER TABLE search_words ADD CONSTRAINT none CHECK (octet_length(term) < 0) NOT VALID")
        with pytest.raises(asyncpg.CheckViolationError):
            await put(index, "dogs", "file-b")
        await ask(url, "ALTER TABLE search_words DROP CONSTRAINT none")
        assert await texts(index, "cats dogs") == ["cats"]
        assert await index.usage_bytes(P, S) == 4


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (asyncpg.DiskFullError("No space left on device"), StoreFull),
        (asyncpg.TooManyConnectionsError("too many clients"), StoreUnavailable),
        (asyncpg.CannotConnectNowError("starting up"), StoreUnavailable),
        (asyncpg.DeadlockDetectedError("deadlock"), StoreUnavailable),
        (asyncpg.ReadOnlySQLTransactionError("read-only"), StoreUnavailable),
        (asyncpg.InterfaceError("connection is closed"), StoreUnavailable),
        (asyncpg.InterfaceError("another operation is in progress"), asyncpg.InterfaceError),
        (asyncpg.UndefinedTableError("no such table"), asyncpg.UndefinedTableError),
        (ConnectionRefusedError("refused"), StoreUnavailable),
        (TimeoutError(), StoreUnavailable),
    ],
)
def test_what_the_database_does_has_our_names(raised: Exception, told: type[Exception]):
    """A full disk, a lost connection and a busy server are told as such; our own mistakes stay what they are."""
    with pytest.raises(told), _translated():
        raise raised


async def test_a_closed_index_refuses(url: str):
    """After it is closed an index neither reads nor writes, and closing it again does nothing."""
    async with postgres_index(url) as index:
        await index.close()
        with pytest.raises(StoreUnavailable):
            await put(index, "cats")
        with pytest.raises(StoreUnavailable):
            await index.text(P, S, "file-a")


@pytest.mark.slow
async def test_postgres_goes_and_comes_back():
    """While Postgres is away everything says so; when it is back, everything works again and all is there."""
    with own_postgres() as postgres:
        async with postgres_index(postgres.url()) as index:
            await put(index, "cats", vectors=[[1.0, 0.0]])
            for how in (signal.SIGINT, signal.SIGQUIT):
                postgres.stop(how)
                with pytest.raises(StoreUnavailable):
                    await texts(index, "cats")
                with pytest.raises(StoreUnavailable):
                    await put(index, "dogs", "file-b")
                postgres.start()
                assert await texts(index, "cats", embedding=[1.0, 0.0]) == ["cats"]
                await put(index, "dogs", "file-b")
                assert await texts(index, "dogs") == ["dogs"]
        postgres.stop()
        with pytest.raises(StoreUnavailable):
            await PostgresIndex.open(postgres.url(), connections=1, pooled=False)


WRITER = """
import asyncio, sys
from afterglow.contracts import Chunk
from afterglow.search.postgres import PostgresIndex

async def main():
    index = await PostgresIndex.open(sys.argv[1], connections=2, pooled=False)
    for turn in range(int(sys.argv[2]), 10_000):
        text = f"turn{turn} " * 3_000
        starts = enumerate(range(0, len(text), 300))
        chunks = [Chunk(n, text[at : at + 600], at, len(text[: at + 600]), 1, 100) for n, at in starts]
        await index.put_file("default", "vs_one", f"file-{turn % 3}", {"turn": turn}, chunks, None, text)
        print(turn, flush=True)

asyncio.run(main())
"""


def write_until_killed(url: str, first: int, lines: int, wait_s: float) -> int:
    """Start a writer, kill it at some moment after so many files, and return the last that it acknowledged."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, url, str(first)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        last = first - 1
        for _ in range(lines):
            last = int(process.stdout.readline())
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    return int(rest[-1]) if rest else last


@pytest.mark.slow
async def test_a_writer_is_killed(url: str):
    """Whenever a process is killed, each file is whole, and all that was acknowledged is there."""
    first = 0
    for number, wait_s in enumerate((0.0, 0.02, 0.05)):
        last = await asyncio.to_thread(write_until_killed, url, first, 3 + number, wait_s)
        async with postgres_index(url) as index:
            newest = max([await _whole_turn(index, file) for file in range(3)])
        assert last <= newest <= last + 1
        first = newest + 1


async def _whole_turn(index: SearchIndex, file: int) -> int:
    text = await index.text(P, S, f"file-{file}")
    turn = int(text.split()[0].removeprefix("turn"))
    assert text == f"turn{turn} " * 3_000
    chunks = await index.list_chunks(P, S, f"file-{file}", -1, 9_999)
    assert all(text[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    assert {hit.file_id for hit in await find(index, f"turn{turn}")} == {f"file-{file}"}
    return turn
