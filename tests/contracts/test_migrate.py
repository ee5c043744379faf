"""What is moved to Postgres and an object store is all there, and so it is when it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from afterglow import app, migrate
from afterglow.contracts import Store, Transaction
from afterglow.errors import ConfigError, StoreUnavailable
from afterglow.rows import moves
from afterglow.settings import Settings, load
from afterglow.store.object_blobs import ObjectBlobs
from afterglow.store.postgres import PostgresStore
from afterglow.store.sqlite import migrate as make_tables
from afterglow.testing import ScriptedEmbedder
from tests.conftest import Server, running_server
from tests.objects import Bucket, fresh_bucket
from tests.postgres import fresh_database


def folder(path: Path) -> Settings:
    return load({"data": str(path)}, environ={})


@pytest.fixture
def bucket() -> Bucket:
    return fresh_bucket()


def in_cluster(url: str, *bucket: str) -> Settings:
    place = Bucket(*bucket)
    return load({"database_url": url, "blob_url": place.url, "blob_options": place.options}, environ={})


@pytest.fixture
async def cluster(bucket: Bucket) -> AsyncGenerator[Settings, None]:
    async with fresh_database() as url:
        yield in_cluster(url, *bucket)


async def moved(source: Settings, target: Settings, **options: Any) -> list[str]:
    """Move everything; return what was said."""
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    await asyncio.to_thread(migrate.migrate, source, target, said.append, progress, **options)
    return said


async def rows_of(settings: Settings) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, in an order of ours. The search index has tables of its own in Postgres."""
    async with app.open_place(settings) as (store, _, _):
        tables = await store.read(lambda tx: moves.list_tables(tx, "postgres" if settings.database_url else "sqlite"))
        return {
            table.name: sorted(await read_all(store, table), key=repr)
            for table in tables
            if not table.name.startswith("search_") or table.name == "search_results"
        }


async def read_all(store: Store, table: moves.Table) -> list[tuple[Any, ...]]:
    return await store.read(lambda tx: moves.read_rows(tx, table, None, None, 10_000))


# --- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_no_table_is_forgotten(cluster: Settings, tmp_path: Path):
    """Every table of the data folder's database arrives with all its rows, and comes back, but for those that speak of
    the database that they are in; a table that is added is moved without anyone's thinking of it."""
    fill(tmp_path / "data", rows=70)
    before = await rows_of(folder(tmp_path / "data"))
    with sqlite3.connect(tmp_path / "data" / "afterglow.db") as connection:
        known = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection.close()
    assert known == before.keys() | moves.HERE_ALONE
    assert all(len(rows) == 70 for rows in before.values())

    await moved(folder(tmp_path / "data"), cluster)
    assert await rows_of(cluster) == before
    await moved(cluster, folder(tmp_path / "back"))
    assert await rows_of(folder(tmp_path / "back")) == before


def fill(data: Path, rows: int) -> None:
    """A data folder with rows of every kind of value in every table."""
    data.mkdir()
    with sqlite3.connect(data / "afterglow.db") as connection:
        connection.isolation_level = None
        make_tables(connection)
        connection.execute("BEGIN")
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if name in moves.HERE_ALONE:
                continue
            columns = connection.execute("SELECT name, type FROM pragma_table_info(?)", (name,)).fetchall()
            places = ", ".join("?" * len(columns))
            values = ([value(column, type, row) for column, type in columns] for row in range(rows))
            connection.executemany(f"INSERT INTO {name} VALUES ({places})", values)
        connection.execute("COMMIT")
    connection.close()


def value(column: str, type: str, row: int) -> Any:
    match type:
        case "INTEGER":
            return row
        case "BIGINT":
            return 2**62 - row if row % 2 else row
        case "DOUBLE PRECISION":
            return row + 0.25
        case "BLOB":
            return bytes([row % 256]) * row
        case _ if column.endswith(("id", "blob")):
            return f"{column}-{'Aa_Zz'[row % 5]}{row}"
        case _:
            return f"{column} {row} ÄB 'x' \\ \U0001f600" + "-" * (row * row if column == "object" else 0)


# --- everything ------------------------------------------------------------------------------------------------


def content_of(name: str) -> bytes:
    """Every file says what only it can say."""
    return f"The word of {name} is {hashlib.sha256(name.encode()).hexdigest()}.\n".encode() * 3


async def live(server: Server) -> None:
    """Something of every kind."""
    await server.run("Good morning")
    client = server.client
    store = await client.vector_stores.create(name="library")
    for name in ("one", "two", "three"):
        file = await client.files.create(file=(f"{name}.txt", content_of(name)), purpose="assistants")
        await client.vector_stores.files.create_and_poll(
            file.id, vector_store_id=store.id, attributes={"shelf": name, "row": 3}, poll_interval_ms=5
        )
    await client.files.create(file=("large.bin", bytes(9_000_000)), purpose="vision")
    upload = await client.uploads.create(bytes=10, filename="a.txt", mime_type="text/plain", purpose="assistants")
    await client.uploads.parts.create(upload.id, data=b"01234")


async def seen(server: Server) -> dict[str, Any]:
    """What a caller can see of everything."""
    client = server.client
    found: dict[str, Any] = {"files": {}, "stores": {}, "messages": {}}
    async for file in client.files.list():
        content = await client.files.content(file.id)
        found["files"][file.id] = (file, hashlib.sha256(content.content).hexdigest())
    async for store in client.vector_stores.list():
        files = [file async for file in client.vector_stores.files.list(store.id)]
        hits = [hit async for hit in client.vector_stores.search(store.id, query="the word of two")]
        found["stores"][store.id] = (store.name, store.usage_bytes, files, hits)
    for row in (await client.get("/threads", cast_to=dict[str, Any]))["data"]:
        found["messages"][row["id"]] = [message async for message in client.beta.threads.messages.list(row["id"])]
    return found


async def test_there_and_back_again(cluster: Settings, bucket: Bucket, tmp_path: Path):
    """After two moves a server says of everything what it said before: threads, files and their bytes, and searches
    with the same scores, without any text having been embedded again."""
    async with running_server(tmp_path / "data", embedder=ScriptedEmbedder()) as server:
        await live(server)
        before = await seen(server)
    said = await moved(folder(tmp_path / "data"), cluster)
    assert len(bucket.keys()) == 5
    assert "5 files, 3 files of vector stores." in said[-1]
    await moved(cluster, folder(tmp_path / "back"))
    embedder = ScriptedEmbedder()
    async with running_server(tmp_path / "back", embedder=embedder) as server:
        assert await seen(server) == before


async def test_bytes_may_stay_in_the_folder(cluster: Settings, tmp_path: Path):
    """Where both keep the bytes of files in the same folder they are left there."""
    async with running_server(tmp_path / "data") as server:
        await server.client.files.create(file=("one.txt", content_of("one")), purpose="assistants")
    target = dataclasses.replace(cluster, blob_url="", data=str(tmp_path / "data"))
    blobs = {path: path.stat() for path in (tmp_path / "data" / "blobs").rglob("*")}
    said = await moved(folder(tmp_path / "data"), target)
    assert "The bytes of files stay where they are." in said
    assert {path: path.stat() for path in (tmp_path / "data" / "blobs").rglob("*")} == blobs


async def test_bytes_that_are_lost(cluster: Settings, tmp_path: Path):
    """Bytes that the source itself has lost do not keep the rest from being moved, and are named."""
    async with running_server(tmp_path / "data") as server:
        lost = await server.client.files.create(file=("lost.txt", content_of("lost")), purpose="assistants")
        await server.client.files.create(file=("kept.txt", content_of("kept")), purpose="assistants")
    next((tmp_path / "data" / "blobs").rglob(lost.id)).unlink()
    said = await moved(folder(tmp_path / "data"), cluster)
    assert [line for line in said if lost.id in line]


# --- moves that break off --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@contextlib.contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, write: int) -> Iterator[None]:
    """What is written to Postgres from that write on does not come about."""
    left = write
    really = PostgresStore.write

    async def write_or_die(store: PostgresStore, work: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return await really(store, work, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PostgresStore, "write", write_or_die)
        yield


@pytest.mark.slow
async def test_a_move_goes_on_where_it_was_killed(cluster: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However often it is killed, and between which two writes it may be: each time it goes further, and in the end
    everything is there. Until then the database says of itself that it is not to be served."""
    async with running_server(tmp_path / "data", embedder=ScriptedEmbedder()) as server:
        await live(server)
    source, kills = folder(tmp_path / "data"), 0
    before = await rows_of(source)
    while True:
        try:
            with killed_at(monkeypatch, 11):
                said = await moved(source, cluster)
            break
        except Killed:
            kills += 1
        async with app.open_place(cluster) as (store, _, _):
            assert await store.read(moves.unfinished_move) == str(tmp_path / "data")
    assert kills > 5
    assert "goes on" not in said[0]
    assert "from where it broke off" in said[0]
    assert await rows_of(cluster) == before
    async with app.open_place(cluster) as (store, _, _):
        assert await store.read(moves.unfinished_move) is None


MOVE = """
import sys
from afterglow import migrate
from tests.contracts import test_migrate as ours

source, target = ours.folder(ours.Path(sys.argv[1])), ours.in_cluster(*sys.argv[2:])
migrate.migrate(source, target, print, lambda *counts: print(*counts, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "times"), [("rows", 10), ("rows", 45), ("files", 70), ("files of vector stores", 1)])
async def test_a_process_that_is_killed(cluster: Settings, bucket: Bucket, tmp_path: Path, what: str, times: int):
    """kill -9 among rows, among bytes, or before the index: the next move finds all locks free, and ends well."""
    fill(tmp_path / "data", rows=70)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MOVE, str(tmp_path / "data"), cluster.database_url, *bucket),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    async for line in process.stdout:
        times -= line.decode().rstrip("0123456789 \n") == what
        if not times:
            break
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    said = await moved(folder(tmp_path / "data"), cluster, force=True)
    assert "from where it broke off" in said[0]
    assert await rows_of(cluster) == await rows_of(folder(tmp_path / "data"))


@pytest.mark.slow
async def test_what_was_changed_in_between_is_moved_as_it_is_now(
    cluster: Settings, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The source was served between two attempts: what was deleted there is nowhere here, and what came is here."""
    async with running_server(tmp_path / "data", embedder=ScriptedEmbedder()) as server:
        await live(server)
        gone = await server.client.files.create(file=("gone.txt", content_of("gone")), purpose="assistants")
        other = await server.client.vector_stores.create(name="other", file_ids=[gone.id])
    with monkeypatch.context() as patch:
        patch.setattr(moves, "delete_all_moves", killed)
        with pytest.raises(Killed):
            await moved(folder(tmp_path / "data"), cluster)
    async with running_server(tmp_path / "data", embedder=ScriptedEmbedder()) as server:
        await server.client.files.delete(gone.id)
        await server.client.vector_stores.delete(other.id)
        await server.run("Good evening")
    assert gone.id in " ".join(bucket.keys())
    await moved(folder(tmp_path / "data"), cluster)
    assert await rows_of(cluster) == await rows_of(folder(tmp_path / "data"))
    assert gone.id not in " ".join(bucket.keys())
    async with app.open_place(cluster) as (_, _, index):
        assert await index.usage_bytes("default", other.id) == 0


@pytest.mark.slow
async def test_a_move_that_goes_on_to_another_bucket(
    cluster: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What was moved to the first bucket does not count: everything is in the second."""
    async with running_server(tmp_path / "data") as server:
        await live(server)
    with monkeypatch.context() as patch:
        patch.setattr(moves, "delete_all_moves", killed)
        with pytest.raises(Killed):
            await moved(folder(tmp_path / "data"), cluster)
    other = fresh_bucket()
    await moved(folder(tmp_path / "data"), in_cluster(cluster.database_url, *other))
    assert len(other.keys()) == 5


async def killed(tx: Transaction) -> None:
    raise Killed


async def test_bytes_that_arrive_otherwise_are_noticed(
    cluster: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the object store gives back is held against what was read, and a difference ends the move."""
    async with running_server(tmp_path / "data") as server:
        await server.client.files.create(file=("one.txt", content_of("one")), purpose="assistants")
    really = ObjectBlobs.put

    async def put_otherwise(blobs: ObjectBlobs, key: str, chunks: AsyncIterator[bytes]) -> int:
        async def otherwise() -> AsyncIterator[bytes]:
            async for chunk in chunks:
                yield chunk.replace(b"word", b"lie")

        return await really(blobs, key, otherwise())

    monkeypatch.setattr(ObjectBlobs, "put", put_otherwise)
    with pytest.raises(StoreUnavailable, match="does not give back the bytes"):
        await moved(folder(tmp_path / "data"), cluster)


# --- what is refused -------------------------------------------------------------------------------------------


async def test_only_between_the_two_shapes(cluster: Settings, tmp_path: Path):
    """Copies from like to like are others' business, and they are named."""
    for one in (folder(tmp_path / "data"), cluster):
        with pytest.raises(ConfigError, match=r"`afterglow backup`.*pg_dump"):
            await moved(one, one)
    with pytest.raises(ConfigError, match="holds no database"):
        await moved(folder(tmp_path / "data"), cluster)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
async def test_only_into_an_empty_place(cluster: Settings, tmp_path: Path):
    """Nothing is mixed: a database that holds anything is left as it is, and so is one that another move has begun."""
    fill(tmp_path / "data", rows=1)
    fill(tmp_path / "full", rows=1)
    await moved(folder(tmp_path / "data"), cluster)
    with pytest.raises(ConfigError, match=r"holds data already .in projects, api_keys, "):
        await moved(folder(tmp_path / "data"), cluster)
    with pytest.raises(ConfigError, match="holds data already"):
        await moved(cluster, folder(tmp_path / "full"))
    async with app.open_place(folder(tmp_path / "begun")) as (store, _, _):
        await store.write(lambda tx: moves.note_source(tx, "elsewhere"))
    with pytest.raises(ConfigError, match="holds a part of what elsewhere does"):
        await moved(cluster, folder(tmp_path / "begun"))


async def test_nobody_may_be_at_work(cluster: Settings, tmp_path: Path):
    """A served data folder is refused, and so is a Postgres with our processes or leases, unless it is insisted on."""
    fill(tmp_path / "data", rows=1)
    locked = app.DataFolder(tmp_path / "data")
    with pytest.raises(ConfigError, match="already serving"):
        await moved(folder(tmp_path / "data"), cluster)
    locked.close()
    listening = await asyncpg.connect(cluster.database_url, server_settings={"application_name": "afterglow"})
    with pytest.raises(ConfigError, match=r"Afterglow is running on .* .1 processes.. Stop it, or use --force"):
        await moved(folder(tmp_path / "data"), cluster)
    await listening.execute("INSERT INTO data_folders VALUES ('x', 'host', '/path', 0)")
    await moved(folder(tmp_path / "data"), cluster, force=True)
    await listening.execute("UPDATE runs SET lease_until = 1e12")
    await listening.close()
    with pytest.raises(ConfigError, match="Workers hold 1 runs or files"):
        await moved(cluster, folder(tmp_path / "back"))


def test_places_are_named_without_secrets():
    """What is said and stored of a place holds neither user nor password."""
    settings = load({"database_url": "postgresql://me:hush@db:5432/ours?sslpassword=hush"}, environ={})
    assert migrate._name(settings) == "postgresql://db:5432/ours"


# --- what is shown ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "shown"),
    [
        (io.StringIO(), "0 of 4 rows\n4 of 4 rows\n0 of 0 files\n"),
        (
            Terminal(),
            f"\r{'░' * 30} 0 of 4 rows\r{'█' * 30} 4 of 4 rows\n\r{'░' * 30} 0 of 0 files\n",
        ),
    ],
)
def test_a_bar_on_a_terminal_and_lines_elsewhere(stream: io.StringIO, shown: str):
    """Drawn now and then, and always at the end, which is said once."""
    show = migrate.shown_on(stream)
    for done in (0, 1, 2, 4, 4):
        show("rows", done, 4)
    show("files", 0, 0)
    assert stream.getvalue() == shown
