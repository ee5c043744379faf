"""A backup is whole, whatever happens while it is made; and what is not whole is not restored."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import sqlite3
import stat
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow import backup
from afterglow.backup import CHECKSUMS, PARTIAL, back_up, restore
from afterglow.errors import AfterglowError, ConfigError, StoreFull, StoreUnavailable
from afterglow.settings import Settings, load
from tests.conftest import Server, running_server

Steps = Callable[[], Coroutine[Any, Any, Any]]


def content_of(name: str) -> bytes:
    """Every file says what only it can say."""
    return f"The word of {name} is {hashlib.sha256(name.encode()).hexdigest()}.\n".encode() * 3


def settings_of(folder: Path) -> Settings:
    return load({"data": str(folder)}, environ={})


async def upload(server: Server, name: str) -> str:
    return (await server.client.files.create(file=(name, content_of(name)), purpose="assistants")).id


async def attach(server: Server, store_id: str, name: str, **attributes: str) -> str:
    """Upload a file and have it indexed."""
    file_id = await upload(server, name)
    done = await server.client.vector_stores.files.create_and_poll(
        file_id, vector_store_id=store_id, attributes=attributes, poll_interval_ms=5
    )
    assert done.status == "completed"
    return file_id


async def found(server: Server, store_id: str, query: str, **options: Any) -> list[str]:
    """The names of the files that a search finds."""
    return [one.filename async for one in server.client.vector_stores.search(store_id, query=query, **options)]


async def settled(server: Server, store_id: str) -> None:
    async with asyncio.timeout(20):
        while (await server.client.vector_stores.retrieve(store_id)).status == "in_progress":
            await asyncio.sleep(0.005)
    assert (await server.client.vector_stores.retrieve(store_id)).file_counts.failed == 0


async def copied(folder: Path, target: Path) -> list[str]:
    """Make a backup beside whatever goes on here; return what it said."""
    said: list[str] = []
    await asyncio.to_thread(back_up, settings_of(folder), target, said.append)
    return said


@contextlib.asynccontextmanager
async def restored(backup_folder: Path, folder: Path) -> AsyncGenerator[Server, None]:
    await asyncio.to_thread(restore, settings_of(folder), backup_folder, print)
    async with running_server(folder) as server:
        yield server


async def check(server: Server) -> None:
    """Every file has its bytes; every file of every store is found by what it alone says."""
    names = {}
    async for file in server.client.files.list():
        names[file.id] = file.filename
        assert (await server.client.files.content(file.id)).content == content_of(file.filename)
    async for store in server.client.vector_stores.list():
        await settled(server, store.id)
        async for file in server.client.vector_stores.files.list(store.id):
            word = hashlib.sha256(names[file.id].encode()).hexdigest()
            assert await found(server, store.id, word, max_num_results=1) == [names[file.id]]


# --- made while much happens -----------------------------------------------------------------------------------


async def live(server: Server, store_id: str, number: int, story: list[str]) -> None:
    """Make and delete files, stores and threads until cancelled. story: the threads that were made."""
    client = server.client
    for turn in itertools.count():
        file_id = await upload(server, f"kept-{number}-{turn}.txt")
        gone = await attach(server, store_id, f"gone-{number}-{turn}.txt", turn=str(turn))
        await client.vector_stores.files.create(store_id, file_id=file_id)
        thread = await client.beta.threads.create(messages=[{"role": "user", "content": f"Turn {turn}"}])
        story.append(thread.id)
        other = await client.vector_stores.create(name=f"other-{turn}", file_ids=[file_id])
        await client.files.delete(gone)
        if turn % 2:
            await client.vector_stores.delete(other.id)


async def test_a_backup_while_serving(tmp_path: Path):
    """A backup that is made while files, stores and threads come and go has whatever was there before it, and
    everything that it names is there and can be read."""
    async with running_server(tmp_path / "data") as server:
        store = await server.client.vector_stores.create(name="library")
        before = [await attach(server, store.id, f"book-{number}.txt", shelf=str(number)) for number in range(5)]
        story: list[str] = []
        lives = [asyncio.create_task(live(server, store.id, number, story)) for number in range(3)]
        while len(story) < 6:
            assert not any(life.done() for life in lives), [life.exception() for life in lives if life.done()]
            await asyncio.sleep(0.01)
        told = list(story)
        await copied(tmp_path / "data", tmp_path / "copy")
        for life in lives:
            life.cancel()
        ends = await asyncio.gather(*lives, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
    async with restored(tmp_path / "copy", tmp_path / "new") as server:
        await check(server)
        assert {file.id async for file in server.client.files.list()} >= set(before)
        for thread_id in told:
            [message] = (await server.client.beta.threads.messages.list(thread_id)).data
            assert message.content[0].text.value.startswith("Turn ")


async def test_a_backup_holds_its_checksums(tmp_path: Path):
    """The list of checksums names every file of the backup, each with its own; all are the owner's alone."""
    async with running_server(tmp_path / "data") as server:
        store = await server.client.vector_stores.create()
        await attach(server, store.id, "book.txt")
        said = await copied(tmp_path / "data", tmp_path / "copy")
    assert "anew" not in " ".join(said)
    lines = (tmp_path / "copy" / CHECKSUMS).read_text().splitlines()
    listed = {line[66:]: line[:64] for line in lines}
    files = {path.relative_to(tmp_path / "copy").as_posix(): path for path in (tmp_path / "copy").rglob("*")}
    plain = {name: path for name, path in files.items() if path.is_file()}
    assert plain.keys() - {CHECKSUMS, "lock"} == listed.keys()
    assert len(listed) == 3
    assert all(hashlib.sha256(plain[name].read_bytes()).hexdigest() == checksum for name, checksum in listed.items())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "copy", *files.values()]}
    assert modes == {0o700, 0o600}
    assert said[-1].startswith(f"{tmp_path / 'copy'} holds a backup of 3 files")


def during(monkeypatch: pytest.MonkeyPatch, name: str, steps: Steps, *, first: bool) -> None:
    """Let `steps` happen, once, just before or just after that step of a backup."""
    loop = asyncio.get_running_loop()
    waiting = [steps]
    original = getattr(backup, name)

    def happen() -> None:
        if waiting:
            asyncio.run_coroutine_threadsafe(waiting.pop()(), loop).result(20)

    def wrapped(*arguments: Any) -> Any:
        if first:
            happen()
        result = original(*arguments)
        if not first:
            happen()
        return result

    monkeypatch.setattr(backup, name, wrapped)


async def test_a_file_that_came_and_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that the copied moment names, and that is deleted before its bytes are copied, is not in the backup."""
    async with running_server(tmp_path / "data") as server:
        kept = await upload(server, "kept.txt")
        gone: list[str] = []

        async def come() -> None:
            gone.append(await upload(server, "gone.txt"))

        async def go() -> None:
            await server.client.files.delete(gone[0])

        during(monkeypatch, "_moment", come, first=True)
        during(monkeypatch, "_named_blobs", go, first=False)
        said = await copied(tmp_path / "data", tmp_path / "copy")
    assert "not in the data folder" not in " ".join(said)
    async with restored(tmp_path / "copy", tmp_path / "new") as server:
        await check(server)
        assert [file.id async for file in server.client.files.list()] == [kept]


async def test_a_file_that_is_deleted_after_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that was there at the moment of the backup is in it, though it was deleted while that was made."""
    async with running_server(tmp_path / "data") as server:
        kept = await upload(server, "kept.txt")

        async def go() -> None:
            await server.client.files.delete(kept)

        during(monkeypatch, "_named_blobs", go, first=False)
        await copied(tmp_path / "data", tmp_path / "copy")
    async with restored(tmp_path / "copy", tmp_path / "new") as server:
        await check(server)
        assert [file.id async for file in server.client.files.list()] == [kept]


async def test_files_of_stores_that_change_after_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What has changed in vector stores between the copies of database and index is, after a restore, as the database
    says: detached files are found again, new ones are not, and attributes are those of that moment."""
    async with running_server(tmp_path / "data") as server:
        stores = server.client.vector_stores
        [one, two] = [(await stores.create(name=name)).id for name in ("one", "two")]
        detached, changed = (
            await attach(server, one, "detached.txt"),
            await attach(server, one, "changed.txt", at="now"),
        )
        await attach(server, one, "stays.txt")
        await attach(server, two, "lost.txt")

        async def live_on() -> None:
            await stores.files.delete(detached, vector_store_id=one)
            await stores.files.update(changed, vector_store_id=one, attributes={"at": "later"})
            await attach(server, one, "new.txt")
            await stores.delete(two)
            await attach(server, (await stores.create(name="three")).id, "three.txt")

        during(monkeypatch, "_has_vector_stores", live_on, first=False)
        await copied(tmp_path / "data", tmp_path / "copy")
    assert len(list((tmp_path / "copy" / "search").rglob("*.db"))) == 1
    async with restored(tmp_path / "copy", tmp_path / "new") as server:
        await check(server)
        assert {file.filename async for file in server.client.files.list()} == {
            "detached.txt",
            "changed.txt",
            "stays.txt",
            "lost.txt",
        }
        assert set(await found(server, one, "word")) == {"detached.txt", "changed.txt", "stays.txt"}
        now = {"type": "eq", "key": "at", "value": "now"}
        assert set(await found(server, one, "word", filters=now)) == {"changed.txt"}
        assert set(await found(server, two, "word")) == {"lost.txt"}


@pytest.mark.slow
async def test_search_files_that_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A search file that cannot be read, and one that lacks what the rows say, are made anew after a restore."""
    async with running_server(tmp_path / "data") as server:
        stores = [(await server.client.vector_stores.create()).id for _ in range(3)]
        for store_id in stores:
            await attach(server, store_id, f"{store_id}.txt")

        async def damage() -> None:
            damaged, lost, _ = [next((tmp_path / "copy" / PARTIAL).rglob(f"{store_id}.db")) for store_id in stores]
            damaged.write_bytes(b"x" * 10_000)
            lost.unlink()

        during(monkeypatch, "_compared", damage, first=True)
        said = await copied(tmp_path / "data", tmp_path / "copy")
    assert sum("indexed anew" in line for line in said) == 2
    assert stores[2] not in " ".join(said)
    async with restored(tmp_path / "copy", tmp_path / "new") as server:
        await check(server)


async def test_bytes_that_are_lost(tmp_path: Path):
    """Bytes that the data folder itself has lost do not keep the rest from being copied, and are named."""
    async with running_server(tmp_path / "data") as server:
        lost, kept = await upload(server, "lost.txt"), await upload(server, "kept.txt")
        next((tmp_path / "data" / "blobs").rglob(lost)).unlink()
        said = await copied(tmp_path / "data", tmp_path / "copy")
    assert [line for line in said if lost in line]
    async with restored(tmp_path / "copy", tmp_path / "new") as server:
        assert (await server.client.files.content(kept)).content == content_of("kept.txt")
        with pytest.raises(openai.InternalServerError):
            await server.client.files.content(lost)


async def test_parts_of_uploads(tmp_path: Path):
    """An upload that waits for its parts can be completed after a restore."""
    async with running_server(tmp_path / "data") as server:
        data = content_of("parts.txt")
        upload = await server.client.uploads.create(
            bytes=len(data), filename="parts.txt", mime_type="text/plain", purpose="assistants"
        )
        first = await server.client.uploads.parts.create(upload.id, data=data[:100])
        await copied(tmp_path / "data", tmp_path / "copy")
    async with restored(tmp_path / "copy", tmp_path / "new") as server:
        second = await server.client.uploads.parts.create(upload.id, data=data[100:])
        done = await server.client.uploads.complete(upload.id, part_ids=[first.id, second.id])
        assert done.status == "completed"
        await check(server)


# --- what is refused -------------------------------------------------------------------------------------------


def older_folder(folder: Path) -> Path:
    """A data folder of a release that knew neither files nor vector stores."""
    folder.mkdir()
    with contextlib.closing(sqlite3.connect(folder / "afterglow.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE threads (id TEXT)")
        connection.execute("INSERT INTO threads VALUES ('thread_1')")
        connection.commit()
    return folder


def test_a_folder_of_an_older_release(tmp_path: Path):
    """A database with fewer tables is copied as it is: a backup comes before an upgrade."""
    back_up(settings_of(older_folder(tmp_path / "data")), tmp_path / "copy", print)
    with contextlib.closing(sqlite3.connect(tmp_path / "copy" / "afterglow.db")) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("threads",)]
        assert connection.execute("SELECT * FROM threads").fetchall() == [("thread_1",)]


def test_where_nothing_is(tmp_path: Path):
    """Where there is no database there is nothing to back up, and no folder is made."""
    with pytest.raises(ConfigError, match="holds no database"):
        back_up(settings_of(tmp_path / "data"), tmp_path / "copy", print)
    assert list(tmp_path.iterdir()) == []


def test_only_into_an_empty_folder(tmp_path: Path):
    """A folder that holds anything, and what is no folder, are left as they are."""
    source = settings_of(older_folder(tmp_path / "data"))
    back_up(source, tmp_path / "copy", print)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("Dear diary")
    for name in ("full", "full/diary.txt"):
        with pytest.raises(ConfigError, match="is not"):
            back_up(source, tmp_path / name, print)
        with pytest.raises(ConfigError, match="is not"):
            restore(settings_of(tmp_path / name), tmp_path / "copy", print)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["diary.txt"]
    assert (tmp_path / "full" / "diary.txt").read_text() == "Dear diary"


async def test_a_folder_in_use_is_not_restored_into(tmp_path: Path):
    """While a server holds the folder, even an empty one, nothing is restored into it."""
    back_up(settings_of(older_folder(tmp_path / "old")), tmp_path / "copy", print)
    async with running_server(tmp_path / "data"):
        for path in (tmp_path / "data").iterdir():
            if path.name.startswith("afterglow.db") or path.is_dir():
                path.rename(tmp_path / path.name)
        with pytest.raises(ConfigError, match="already serving"):
            restore(settings_of(tmp_path / "data"), tmp_path / "copy", print)
        for path in tmp_path.glob("*"):
            if path.name.startswith("afterglow.db") or path.name == "blobs":
                path.rename(tmp_path / "data" / path.name)


def test_a_backup_that_is_not_whole(tmp_path: Path):
    """What has no list of checksums, lacks a file, or holds one with other bytes, is not restored."""
    back_up(settings_of(older_folder(tmp_path / "data")), tmp_path / "copy", print)
    new = settings_of(tmp_path / "new")

    def refused(error: type[AfterglowError], match: str) -> None:
        with pytest.raises(error, match=match):
            restore(new, tmp_path / "copy", print)
        assert not tmp_path.joinpath("new", "afterglow.db").exists()

    database, checksums = tmp_path / "copy" / "afterglow.db", tmp_path / "copy" / CHECKSUMS
    whole, listed = database.read_bytes(), checksums.read_text()
    database.write_bytes(whole[:-1] + b"x")
    refused(StoreUnavailable, "is damaged")
    database.unlink()
    refused(StoreUnavailable, "is missing")
    checksums.write_text(listed + f"{'0' * 64}  blobs/../../passwd\n")
    refused(ConfigError, "no backup of Afterglow's")
    checksums.unlink()
    refused(ConfigError, "no whole backup")
    database.write_bytes(whole)
    checksums.write_text(listed)
    restore(new, tmp_path / "copy", print)
    assert (tmp_path / "new" / "afterglow.db").read_bytes() == whole


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A backup that fails leaves an empty folder, into which the next one goes; a fault of SQLite's is told."""

    def full(*arguments: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    source = settings_of(older_folder(tmp_path / "data"))
    with monkeypatch.context() as patch:
        patch.setattr(backup, "_copy_database", full)
        with pytest.raises(StoreFull, match="disk is full"):
            back_up(source, tmp_path / "copy", print)
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["lock"]
    back_up(source, tmp_path / "copy", print)
    assert (tmp_path / "copy" / CHECKSUMS).exists()
