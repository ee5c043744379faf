"""`afterglow migrate`: all that a server holds is copied from a data folder to Postgres and an object store, or back.

1. The tables, as both databases list them, in batches by primary key. Each batch and how far it reached are written
   in one transaction, so that a move that was killed goes on from there. What was copied before is compared first:
   when the source was served in between, the table is copied anew. At its end a table has the same number of rows in
   both databases, and the same sum of their checksums.
2. The bytes of the files that the rows now name. Each is read back and its checksum compared.
3. The chunks and vectors of vector stores, file by file, by the indexes' own reading and writing. Nothing is embedded.

Ids stay what they are. Until it is done the target says so of itself (the table `moves`), and no server starts on it.
Of the source only the schema is brought up to date. Copies from like to like are the business of `afterglow backup`
and of pg_dump.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import msgspec

from afterglow import app
from afterglow.contracts import Blobs, SearchIndex, SqlRow, Store, Transaction
from afterglow.errors import BlobMissing, ConfigError, StoreUnavailable
from afterglow.rows import moves
from afterglow.rows.moves import Database, Key, Table
from afterglow.settings import Settings, without_password

Say = Callable[[str], None]
FIRST_ROWS = 64
BATCH_ROWS = 256
BATCH_BYTES = 4 * 1024 * 1024
BLOBS_AT_ONCE = 4
DELETED_AT_ONCE = 5_000
TELL_EVERY_S = 10.0
DRAW_EVERY_S = 0.1
BAR_WIDTH = 30
SUMS = 1 << 128


class Progress(Protocol):
    def __call__(self, what: str, done: int, total: int) -> None:
        """what: the noun that is counted, in plural. Called often."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """One end of a move. name, bytes_in: where rows and the bytes of files are, in words, without secrets."""

    name: str
    bytes_in: str
    database: Database
    store: Store
    blobs: Blobs
    index: SearchIndex


class _Reached(msgspec.Struct):
    """How much of a table has been copied. after: the last key, in the source's order."""

    after: list[Any]
    done: bool = False


def migrate(source: Settings, target: Settings, say: Say, progress: Progress, *, force: bool = False) -> None:
    """Move everything from one to the other: one is a data folder, the other has a `database_url`.

    force: although processes seem to be at work on the Postgres. Raises ConfigError when it cannot begin, StoreFull and
    StoreUnavailable when it breaks off; called again, it goes on.
    """
    asyncio.run(_migrate(source, target, say, progress, force))


async def _migrate(source: Settings, target: Settings, say: Say, progress: Progress, force: bool) -> None:
    if bool(source.database_url) == bool(target.database_url):
        raise ConfigError(
            "Of source and target one is a data folder and the other has a database_url. Copies of a data folder are"
            " made by `afterglow backup`, those of a Postgres database by pg_dump."
        )
    if not source.database_url and not app.database_path(source).is_file():
        raise ConfigError(f"The data folder {source.data} holds no database.")
    async with _opened(source) as old, _opened(target) as new:
        if not force:
            await _check_nobody_is_at_work(old, new)
        move = _Move(old, new, await _tables(old, new), say, progress)
        await move.begin()
        rows = await move.copy_tables()
        files = await move.copy_blobs()
        indexed = await move.copy_index()
        if not force:
            await _check_nobody_is_at_work(old, new)
        await move.end()
    say(f"{new.name} holds what {old.name} does: {rows:,} rows, {files:,} files, {indexed:,} files of vector stores.")


@contextlib.asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[_Place]:
    """A data folder is locked meanwhile, so that no server can be on it."""
    database: Database = "postgres" if settings.database_url else "sqlite"
    with contextlib.ExitStack() as locks:
        if database == "sqlite":
            locks.callback(app.DataFolder(Path(settings.data)).close)
        async with app.open_place(settings) as (store, blobs, index):
            yield _Place(_name(settings), _bytes_in(settings), database, store, blobs, index)


def _name(settings: Settings) -> str:
    return without_password(settings.database_url) if settings.database_url else str(Path(settings.data).resolve())


def _bytes_in(settings: Settings) -> str:
    return settings.blob_url.rstrip("/") or str(app.blobs_path(settings).resolve())


async def _check_nobody_is_at_work(*places: _Place) -> None:
    """A data folder is locked; of Postgres this is the best that can be known."""
    for place in places:
        if place.database == "sqlite":
            continue
        if count := await place.store.read(moves.count_processes):
            raise ConfigError(f"Afterglow is running on {place.name} ({count} processes). Stop it, or use --force.")
        if count := await place.store.read(lambda tx: moves.count_leases(tx, time.time())):
            raise ConfigError(
                f"Workers hold {count} runs or files of {place.name}. Stop them; what one that died has held is free"
                " after some seconds. Or use --force."
            )


async def _tables(old: _Place, new: _Place) -> list[Table]:
    """What is moved: all tables of the data folder's database. In Postgres there are those of the search index beside
    them, which go by another way."""
    lists: dict[Database, list[Table]] = {}
    for place in (old, new):
        lists[place.database] = await _list_tables(place)
    in_postgres = {table.name: table for table in lists["postgres"]}
    for table in lists["sqlite"]:
        if in_postgres.get(table.name) != table:
            raise ConfigError(f"The table {table.name} is not the same in {old.name} and {new.name}.")
    return lists["sqlite"]


async def _list_tables(place: _Place) -> list[Table]:
    return await place.store.read(lambda tx: moves.list_tables(tx, place.database))


class _Counter:
    """How much of one kind is done."""

    def __init__(self, tell: Callable[[int], None], total: int) -> None:
        self._tell = tell
        self.total = total
        self.done = 0
        tell(0)

    def add(self, count: int) -> None:
        self.done += count
        self._tell(self.done)


class _Move:
    """All of it, step by step; each can be done again."""

    def __init__(self, old: _Place, new: _Place, tables: list[Table], say: Say, progress: Progress) -> None:
        self._old = old
        self._new = new
        self._tables = {table.name: table for table in tables}
        self._say = say
        self._progress = progress

    async def begin(self) -> None:
        """Claim the target, or find that it was claimed for this move before. Raises ConfigError."""
        new, old = self._new.name, self._old.name

        async def work(tx: Transaction) -> str | None:
            before = await moves.unfinished_move(tx)
            if before is None:
                full = [table.name for table in self._tables.values() if not await moves.is_empty(tx, table)]
                if full:
                    raise ConfigError(f"{new} holds data already (in {', '.join(full)}); name an empty place.")
                await moves.note_source(tx, old)
            if before in (None, old):
                await moves.note_place_of_bytes(tx, self._new.bytes_in)
            return before

        before = await self._new.store.write(work)
        if before not in (None, old):
            raise ConfigError(f"{new} holds a part of what {before} does. Finish that move, or empty the place.")
        self._say(f"Moving {old} to {new}{', from where it broke off' if before else ''}.")

    async def end(self) -> None:
        """The target may be served."""
        await self._new.store.write(moves.delete_all_moves)

    def _counter(self, what: str, total: int) -> _Counter:
        return _Counter(lambda done: self._progress(what, done, total), total)

    # Tables.

    async def copy_tables(self) -> int:
        """Return how many rows there are."""
        totals = {table.name: await _count(self._old.store, table) for table in self._tables.values()}
        count = self._counter("rows", sum(totals.values()))
        for name, table in self._tables.items():
            before = count.done
            await self._copy_table(table, count)
            count.add(before + totals[name] - count.done)
        return count.total

    async def _copy_table(self, table: Table, count: _Counter) -> None:
        old, new = self._old.store, self._new.store
        reached = await self._compared(table, await _reached(new, table))
        if reached is not None and reached.done:
            return
        if reached is None:
            await _clear(new, table)
        after: Key | None = tuple(reached.after) if reached else None
        count.add(await _count(new, table))
        async for rows in _batches(old, table, after):
            reached = _Reached(list(table.key_of(rows[-1])))
            await _write(new, table, rows, reached)
            count.add(len(rows))
        if await _sum(old, table) != await _sum(new, table):
            raise StoreUnavailable(
                f"The table {table.name} is not the same in {self._old.name} and {self._new.name}: is one being used?"
            )
        await _write(new, table, [], _Reached([], done=True))

    async def _compared(self, table: Table, reached: _Reached | None) -> _Reached | None:
        """How far the table was copied, if that part is still what the source holds."""
        if reached is None:
            return None
        up_to = None if reached.done else tuple(reached.after)
        same = await _sum(self._old.store, table, up_to) == await _sum(self._new.store, table)
        return reached if same else None

    # Bytes of files.

    async def copy_blobs(self) -> int:
        """Copy the blobs that the rows name; return how many there are. Those that no file owns stay behind."""
        tables = [table for table in self._tables.values() if table.has("blob") and table.name != "loose_blobs"]
        count = self._counter("files", sum([await _count(self._new.store, table) for table in tables]))
        if self._old.bytes_in == self._new.bytes_in:
            self._say("The bytes of files stay where they are.")
            return count.total
        for table in tables:
            async for rows in _batches(self._new.store, table):
                await self._copy_some(table.values(rows, "blob"), count)
        # Moved before, and deleted in the source before the move went on.
        gone = await self._new.store.read(lambda tx: moves.list_blobs_of_no_row(tx, tables))
        await self._new.blobs.delete(gone)
        return count.total

    async def _copy_some(self, keys: list[str], count: _Counter) -> None:
        moved = await self._new.store.read(lambda tx: moves.list_moved(tx, "blob", keys))
        room = asyncio.Semaphore(BLOBS_AT_ONCE)

        async def copy(key: str) -> None:
            async with room:
                if key not in moved:
                    await self._copy_blob(key)
                count.add(1)

        try:
            async with asyncio.TaskGroup() as tasks:
                for key in keys:
                    tasks.create_task(copy(key))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _copy_blob(self, key: str) -> None:
        """Write it, read it back and compare."""
        read, written = hashlib.sha256(), hashlib.sha256()
        try:
            async with aclosing(self._old.blobs.get(key)) as pieces, aclosing(_hashed(pieces, read)) as hashed:
                await self._new.blobs.put(key, hashed)
        except BlobMissing:
            self._say(f"The bytes of {key} are not in {self._old.bytes_in}: its file can be downloaded from neither.")
            return
        async with aclosing(self._new.blobs.get(key)) as pieces:
            async for piece in pieces:
                written.update(piece)
        if written.digest() != read.digest():
            raise StoreUnavailable(f"{self._new.name} does not give back the bytes of {key} that were written.")
        await self._new.store.write(lambda tx: moves.note_move(tx, "blob", key, written.hexdigest()))

    # The search index.

    async def copy_index(self) -> int:
        """Copy what the index holds of each file of each vector store; return how many files there are."""
        count = self._counter(
            "files of vector stores", await _count(self._new.store, self._tables["vector_store_files"])
        )
        stores = self._tables["vector_stores"]
        left = await self._new.store.read(lambda tx: moves.list_moves(tx, "store"))
        async for rows in _batches(self._new.store, stores):
            for project, store_id in zip(stores.values(rows, "project_id"), stores.values(rows, "id"), strict=True):
                left.pop(store_id, None)
                await self._copy_store(project, store_id, count)
        for store_id, project in left.items():  # begun before, and deleted in the source before the move went on
            await self._new.index.delete_store(project, store_id)
        count.add(count.total - count.done)
        return count.total

    async def _copy_store(self, project: str, store_id: str, count: _Counter) -> None:
        file_ids = await self._new.store.read(lambda tx: moves.list_files_of_store(tx, project, store_id))
        await self._new.store.write(lambda tx: moves.note_move(tx, "store", store_id, project))
        size = 0
        for file_id in file_ids:
            size += await self._copy_file(project, store_id, file_id)
            count.add(1)
        if await self._new.index.usage_bytes(project, store_id) != size:  # it holds a file that there is no more
            await self._new.index.delete_store(project, store_id)
            for file_id in file_ids:
                await self._copy_file(project, store_id, file_id)

    async def _copy_file(self, project: str, store_id: str, file_id: str) -> int:
        """Copy it unless it is there; return its size in the index."""
        content = await self._old.index.read_file(project, store_id, file_id)
        if content is None:
            return 0
        if await self._new.index.read_file(project, store_id, file_id) != content:
            await self._new.index.put_file(project, store_id, file_id, *content)
            if await self._new.index.read_file(project, store_id, file_id) != content:
                raise StoreUnavailable(
                    f"The index of {self._new.name} does not give back what was written of {file_id}."
                )
        _, _, embeddings, text = content
        return len(text.encode()) + sum(map(len, embeddings or ()))


async def _hashed(pieces: AsyncIterator[bytes], into: hashlib._Hash) -> AsyncGenerator[bytes, None]:
    async for piece in pieces:
        into.update(piece)
        yield piece


# --- a table ---------------------------------------------------------------------------------------------------


async def _count(store: Store, table: Table) -> int:
    return await store.read(lambda tx: moves.count_rows(tx, table))


async def _batches(
    store: Store, table: Table, after: Key | None = None, up_to: Key | None = None
) -> AsyncGenerator[list[SqlRow], None]:
    """The rows of a table, as many at a time as come to some megabytes."""
    limit = FIRST_ROWS
    while rows := await _read(store, table, after, up_to, limit):
        yield rows
        after = table.key_of(rows[-1])
        average = sum(map(_size, rows)) // len(rows) + 1
        limit = max(1, min(BATCH_ROWS, limit * 2, BATCH_BYTES // average))


async def _read(store: Store, table: Table, after: Key | None, up_to: Key | None, limit: int) -> list[SqlRow]:
    return await store.read(lambda tx: moves.read_rows(tx, table, after, up_to, limit))


def _size(row: SqlRow) -> int:
    return sum(len(value) for value in row if isinstance(value, str | bytes))


async def _write(store: Store, table: Table, rows: list[SqlRow], reached: _Reached) -> None:
    async def work(tx: Transaction) -> None:
        if rows:
            await moves.write_rows(tx, table, rows)
        await moves.note_move(tx, "table", table.name, msgspec.json.encode(reached).decode())

    await store.write(work)


async def _reached(store: Store, table: Table) -> _Reached | None:
    detail = (await store.read(lambda tx: moves.list_moves(tx, "table"))).get(table.name)
    return msgspec.json.decode(detail, type=_Reached) if detail else None


async def _clear(store: Store, table: Table) -> None:
    await store.write(lambda tx: moves.delete_move(tx, "table", table.name))
    while await store.write(lambda tx: moves.delete_rows(tx, table, DELETED_AT_ONCE)):
        pass


async def _sum(store: Store, table: Table, up_to: Key | None = None) -> tuple[int, int]:
    """How many rows, and the sum of their checksums: the two databases do not order texts alike."""
    count = total = 0
    async for rows in _batches(store, table, up_to=up_to):
        count += len(rows)
        for row in rows:
            checksum = hashlib.blake2b(msgspec.msgpack.encode(row), digest_size=16)
            total += int.from_bytes(checksum.digest(), "big")
    return count, total % SUMS


# --- what is shown ---------------------------------------------------------------------------------------------


def shown_on(stream: TextIO) -> Progress:
    """A bar on a terminal; elsewhere a line now and then."""
    terminal = stream.isatty()
    told_at, told = 0.0, ("", -1)

    def show(what: str, done: int, total: int) -> None:
        nonlocal told_at, told
        pause_s = DRAW_EVERY_S if terminal else TELL_EVERY_S
        if told == (what, done) or (done < total and time.monotonic() - told_at < pause_s):
            return
        told_at, told = time.monotonic(), (what, done)
        line = f"{done:,} of {total:,} {what}"
        if terminal:
            filled = BAR_WIDTH * done // max(total, 1)
            line = f"\r{'█' * filled}{'░' * (BAR_WIDTH - filled)} {line}"
        stream.write(line if terminal and done < total else f"{line}\n")
        stream.flush()

    return show
