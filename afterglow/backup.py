"""`afterglow backup` and `afterglow restore`: a copy of a data folder that is whole, also of one that is being served.

Database, blobs (the bytes of files) and search files change each on their own, so they are copied in this order:

1. The blobs, while the server goes on. A blob never changes once it is there; it only comes and goes.
2. The database, as it is at one moment, which is held until every blob that the database names then has been copied.
   When one has been deleted too soon for that, a later moment is taken, for which less is left to copy.
3. The search files, each as it is at some moment after that of the database.
4. Files of vector stores that have changed since 2. may be otherwise in the search files than the copied database says.
   In the copy they become jobs and chores of the server that will start on it. So does what fails a check.

So the copy names no bytes that it lacks, and no chunks that it lacks but for those that it says are to be made. It is
made in a folder of its own, and counts from the moment when its list of checksums stands in the place asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from afterglow.app import DataFolder, blobs_path, build_index, database_path, open_store, search_path
from afterglow.contracts import Transaction
from afterglow.errors import ConfigError, StoreFull, StoreUnavailable
from afterglow.ingest.states import move_file
from afterglow.rows import vector_store_files as file_rows
from afterglow.rows import vector_stores as store_rows
from afterglow.settings import Settings
from afterglow.vector_stores import reindex

Say = Callable[[str], None]
CHECKSUMS = "SHA256SUMS"  # in the form of the program `sha256sum`
CHECKSUM = re.compile(r"([0-9a-f]{64})  (afterglow\.db|blobs/[\w-]+/[\w-]+|search/[\w-]+/[\w-]+\.db)", re.ASCII)
PARTIAL = ".afterglow-partial"
LEFT_BY_US = {PARTIAL, "lock"}
UNFINISHED = "#"  # in the name of a blob that is being written
PIECE_BYTES = 1024 * 1024
MOMENTS = 100
TRIES = 5
BUSY_TIMEOUT_S = 30.0
TELL_EVERY_S = 10.0

CHANGED = (  # in both, or in the copy alone
    "SELECT c.project_id, c.store_id, c.id FROM vector_store_files c LEFT JOIN live.vector_store_files l"
    " ON l.project_id = c.project_id AND l.store_id = c.store_id AND l.id = c.id"
    " WHERE l.id IS NULL OR l.seq <> c.seq OR l.attempt <> c.attempt OR l.object <> c.object"
)
ADDED = (
    "SELECT l.project_id, l.store_id, l.id FROM live.vector_store_files l LEFT JOIN vector_store_files c"
    " ON c.project_id = l.project_id AND c.store_id = l.store_id AND c.id = l.id WHERE c.id IS NULL"
)
AT_REST = (  # the stores of which the index holds exactly what the rows say
    "SELECT project_id, id, usage_bytes FROM vector_stores s WHERE in_progress = 0"
    " AND NOT EXISTS (SELECT 1 FROM index_chores c WHERE c.project_id = s.project_id AND c.store_id = s.id)"
)


class _Place(NamedTuple):
    """A file in a vector store."""

    project: str
    store_id: str
    file_id: str


# --- backup ----------------------------------------------------------------------------------------------------


def back_up(settings: Settings, target: Path, say: Say) -> None:
    """Copy the data folder of `settings` into `target`, a new or empty folder.

    Raises ConfigError, StoreFull and StoreUnavailable; then `target` holds no backup.
    """
    _check_shape(settings)
    if not database_path(settings).is_file():
        raise ConfigError(f"The data folder {settings.data} holds no database.")
    with _translated(), _filled(target, last=CHECKSUMS) as partial:
        copy = dataclasses.replace(settings, data=str(partial))
        say("Copying the bytes of files.")
        checksums = _copy_blobs_and_database(settings, copy, say)
        if _has_vector_stores(copy):
            say("Copying the index of vector stores.")
            asyncio.run(_copy_index(settings, copy))
            asyncio.run(_mend(settings, copy, say))
        say("Checking the copy.")
        _check_database(database_path(copy))
        for path in (database_path(copy), *_search_files(copy)):
            checksums[path] = _checksum(path)
        lines = (f"{checksum}  {path.relative_to(partial).as_posix()}\n" for path, checksum in checksums.items())
        with _private(partial / CHECKSUMS) as file:
            file.write("".join(lines).encode())
        size = sum(path.stat().st_size for path in checksums)
    say(f"{target} holds a backup of {len(checksums):,} files, {size / 1e6:,.1f} MB.")


def _check_shape(settings: Settings) -> None:
    if settings.database_url:
        raise ConfigError("This is for a data folder. Postgres is saved by pg_dump; docs/cluster.md says how.")


def _copy_blobs_and_database(settings: Settings, copy: Settings, say: Say) -> dict[Path, str]:
    """Return the checksums of the blobs."""
    copying = _Blobs(blobs_path(settings), blobs_path(copy), say)
    missing: set[str] = set()
    for _ in range(MOMENTS):
        copying.copy_all()
        with _moment(database_path(settings)) as connection:
            named = _named_blobs(connection)
            missing, missing_before = {key for key in named if not copying.copy(key)}, missing
            # A row and its blob go together: what is named at two moments and never there is lost, not deleted.
            if missing <= missing_before:
                say("Copying the database.")
                _copy_database(connection, database_path(copy))
                break
    else:
        raise StoreUnavailable("Files come and go too fast for a backup; try again later.")
    for key in missing:
        say(f"The bytes of {key} are not in the data folder. Its file cannot be downloaded there, nor from the backup.")
    return copying.keep(set(named))


class _Blobs:
    """Blobs that are copied from one folder into another, each once."""

    def __init__(self, source: Path, target: Path, say: Say) -> None:
        self._source = source
        self._target = target
        self._say = say
        self._told_at = time.monotonic()
        self._checksums: dict[str, str] = {}
        target.mkdir(mode=0o700)

    def copy_all(self) -> None:
        """Copy whatever is there now."""
        for path in self._source.glob("*/*"):
            if UNFINISHED not in path.name:
                self.copy(path.relative_to(self._source).as_posix())

    def copy(self, key: str) -> bool:
        """Copy one, if it has not been; whether it is in the copy."""
        if key not in self._checksums:
            try:
                self._checksums[key] = _copy_file(self._source / key, self._target / key)
            except FileNotFoundError:
                return False
            self._tell()
        return True

    def _tell(self) -> None:
        if time.monotonic() - self._told_at > TELL_EVERY_S:
            self._told_at = time.monotonic()
            self._say(f"Copied {len(self._checksums):,} blobs so far.")

    def keep(self, keys: set[str]) -> dict[Path, str]:
        """Delete all others; return the checksums of those that are there."""
        for key in self._checksums.keys() - keys:
            (self._target / key).unlink()
        return {self._target / key: self._checksums[key] for key in sorted(keys & self._checksums.keys())}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing in the schema. Raises sqlite3.Error when there is no such file."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S
    )
    with contextlib.closing(connection):
        yield connection


@contextlib.contextmanager
def _moment(path: Path) -> Iterator[sqlite3.Connection]:
    """The database as it is at one moment, whatever is written meanwhile."""
    with _opened(path) as connection:
        connection.execute("PRAGMA query_only = ON")
        connection.execute("BEGIN")  # the moment is that of the first statement
        yield connection


def _has(connection: sqlite3.Connection, table: str) -> bool:
    """An older release's database has fewer tables. It is copied as it is."""
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is not None


def _named_blobs(connection: sqlite3.Connection) -> list[str]:
    tables = [table for table in ("files", "upload_parts") if _has(connection, table)]
    return [key for table in tables for (key,) in connection.execute(f"SELECT blob FROM {table}")]  # noqa: S608


def _copy_database(connection: sqlite3.Connection, path: Path) -> None:
    _private(path).close()
    with _opened(path) as target:
        connection.backup(target)


def _has_vector_stores(copy: Settings) -> bool:
    with _opened(database_path(copy)) as connection:
        return _has(connection, "vector_store_files")


# --- the search files ------------------------------------------------------------------------------------------


async def _copy_index(settings: Settings, copy: Settings) -> None:
    """A store that is deleted just now can get in the way of one try."""
    target = search_path(copy)
    index = build_index(settings)
    try:
        for left in reversed(range(TRIES)):
            target.mkdir(mode=0o700)
            try:
                return await index.backup(target)
            except StoreUnavailable:
                if not left:
                    raise
                shutil.rmtree(target)
    finally:
        await index.close()


async def _mend(settings: Settings, copy: Settings, say: Say) -> None:
    """Let the copy's server do what its index needs to become what its rows say."""
    changed, added = _compared(settings, copy)
    async with open_store(copy) as store:
        await store.write(lambda tx: _note_changes(tx, changed, added))
        store_ids = {row[0] for row in await store.read(lambda tx: tx.fetch("SELECT id FROM vector_stores"))}
        for path in _search_files(copy):
            if path.stem not in store_ids:
                path.unlink()
        at_rest = await store.read(lambda tx: tx.fetch(AT_REST))
        unsound = {path.stem for path in _search_files(copy) if not _is_sound(path)}
        for path in [path for path in _search_files(copy) if path.stem in unsound]:
            path.unlink()
        index = build_index(copy)
        try:
            differing = {id for project, id, size in at_rest if await index.usage_bytes(project, id) != size}
        finally:
            await index.close()
        for store_id in sorted(differing | unsound):
            if count := await reindex(store, time.time(), store_id):
                say(f"The index of {store_id} is not whole; {count:,} files will be indexed anew after a restore.")


def _compared(settings: Settings, copy: Settings) -> tuple[list[_Place], list[_Place]]:
    """Files of vector stores that have changed, and those that were added, since the database was copied."""
    with _opened(database_path(copy)) as connection:
        connection.execute("ATTACH ? AS live", (f"{database_path(settings).absolute().as_uri()}?mode=rw",))
        return [_Place(*row) for row in connection.execute(CHANGED)], [
            _Place(*row) for row in connection.execute(ADDED)
        ]


async def _note_changes(tx: Transaction, changed: list[_Place], added: list[_Place]) -> None:
    for project, store_id, file_id in changed:
        file = await file_rows.get_file(tx, project, store_id, file_id)
        if file is None or file.status == "in_progress":
            continue  # it is a job anyway
        if file.status == "completed":
            move_file(file, "attached")
            await file_rows.set_embedding_model(tx, project, file, None)
            await file_rows.queue_file(tx, project, file)
        else:
            await store_rows.insert_chores(tx, project, store_id, [file_id])
    for project, store_id, file_id in added:
        await store_rows.insert_chores(tx, project, store_id, [file_id])


def _search_files(copy: Settings) -> list[Path]:
    return sorted(search_path(copy).glob("*/*.db"))


# --- restore ---------------------------------------------------------------------------------------------------


def restore(settings: Settings, source: Path, say: Say) -> None:
    """Make a data folder of the backup in `source`, where none is or an empty folder.

    Every byte is held against its checksum. Raises ConfigError, StoreFull and StoreUnavailable; then there is no data
    folder.
    """
    _check_shape(settings)
    checksums = _read_checksums(source)
    target = Path(settings.data)
    with _translated(), _filled(target, last=database_path(settings).name) as partial:
        blobs_path(dataclasses.replace(settings, data=str(partial))).mkdir(mode=0o700)
        search_path(dataclasses.replace(settings, data=str(partial))).mkdir(mode=0o700)
        say(f"Copying {len(checksums):,} files.")
        for name, checksum in checksums.items():
            try:
                found = _copy_file(source / name, partial / name)
            except FileNotFoundError:
                raise StoreUnavailable(f"{source / name} is missing: this backup is not whole.") from None
            if found != checksum:
                raise StoreUnavailable(f"{source / name} is not as it was written: this backup is damaged.")
        _check_database(partial / database_path(settings).name)
    say(f"{target} is ready to be served.")


def _read_checksums(source: Path) -> dict[str, str]:
    """Checksum by path in the backup. Raises ConfigError when there is no whole backup."""
    try:
        lines = (source / CHECKSUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{source} holds no whole backup: {CHECKSUMS} cannot be read.") from None
    found = [CHECKSUM.fullmatch(line) for line in lines]
    checksums = {line[2]: line[1] for line in found if line}
    if not all(found) or "afterglow.db" not in checksums:
        raise ConfigError(f"{source} holds no backup of Afterglow's: {CHECKSUMS} does not look like it.")
    return checksums


# --- files and folders -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _filled(target: Path, last: str) -> Iterator[Path]:
    """A folder inside of `target`, whose contents take their places in `target` at the end of the block; `last` does
    so after everything else. Raises ConfigError when `target` is in use, or not empty."""
    _check_empty(target)
    lock = DataFolder(target)
    partial = target / PARTIAL
    try:
        _check_empty(target)
        if partial.exists():
            shutil.rmtree(partial)  # of one that was killed
        partial.mkdir(mode=0o700)
        yield partial
        os.sync()
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            path.rename(target / path.name)
        os.sync()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.close()


def _check_empty(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is not a folder.")
    if target.exists() and {path.name for path in target.iterdir()} - LEFT_BY_US:
        raise ConfigError(f"The folder {target} is not empty. Name a new one.")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What a disk or a database says as a StoreError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        full = "full" in str(error) or "No space" in str(error)
        raise (StoreFull if full else StoreUnavailable)(f"It could not be done: {error}") from error


def _copy_file(source: Path, target: Path) -> str:
    """Copy a file for its owner alone; return its checksum. Raises FileNotFoundError when there is none."""
    hashed = hashlib.sha256()
    with source.open("rb") as pieces:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with _private(target) as copy:
            while piece := pieces.read(PIECE_BYTES):
                hashed.update(piece)
                copy.write(piece)
    return hashed.hexdigest()


def _private(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_sound(path: Path) -> bool:
    try:
        with _opened(path) as connection:
            return [row[0] for row in connection.execute("PRAGMA integrity_check")] == ["ok"]
    except sqlite3.DatabaseError:
        return False


def _check_database(path: Path) -> None:
    if not _is_sound(path):
        raise StoreUnavailable(f"{path.name} is damaged: SQLite finds faults in the copy.")
