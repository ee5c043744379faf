"""The bytes of files in a folder, by obstore: its threads do the reading and writing, never the event loop's.

A blob appears under its key when it is whole, and has reached the disk by the time `put` returns. Until then it stands
beside that place under a name of obstore's (`KEY#1`); when a crash leaves it there, `delete` of the key removes it.

Object stores are in `object_blobs.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from afterglow.contracts import Store, Transaction
from afterglow.errors import BlobMissing, ConfigError, StoreFull, StoreUnavailable
from afterglow.rows.cluster import DataFolder, list_data_folders, note_data_folder

PIECE_BYTES = 1024 * 1024  # each call of obstore crosses threads twice: small pieces cost more than their bytes
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNFINISHED = "#1"
MARK = "id"  # a file beside the blobs' folder: what tells one data folder from another
FORGOTTEN_AFTER_S = 24 * 60 * 60


class LocalBlobs:
    """A `contracts.Blobs` over a folder of a local disk. Keys have one slash: `k3/file-…k3`."""

    def __init__(self, folder: Path) -> None:
        """folder: made if missing, for its owner alone. Raises ConfigError."""
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            os.chmod(folder, 0o700)
        except OSError as error:
            raise ConfigError(f"The folder {folder} cannot be used: {error.strerror}.") from None
        self._folder = folder.resolve()
        self._store = LocalStore(self._folder)

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        writer = obstore.open_writer_async(self._store, key, buffer_size=PIECE_BYTES, max_concurrency=1)
        size = 0
        try:
            async with contextlib.aclosing(gathered(chunks, PIECE_BYTES)) as pieces:
                async for piece in pieces:
                    with _translated(key):
                        await writer.write(piece)
                    size += len(piece)
            with _translated(key):
                await writer.close()
                await asyncio.to_thread(self._make_durable, key)
        finally:
            # Not closed, it removes what it has written when it is let go of; a traceback would hold on to it.
            del writer
        return size

    async def get(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        # By ranges: obstore's own stream reads a file in pieces of 8 KB, at a tenth of the speed.
        with _translated(key):
            size = (await obstore.head_async(self._store, key))["size"]
        end = size if end is None else min(end, size)
        while start < end:
            with _translated(key):
                piece = await obstore.get_range_async(self._store, key, start=start, end=min(start + PIECE_BYTES, end))
            start += len(piece)
            data = piece.to_bytes()
            del piece  # a slow reader holds one of them, not both
            yield data

    async def delete(self, keys: list[str]) -> None:
        for key in keys:
            with _translated(key):
                await asyncio.to_thread(self._remove, key)

    async def close(self) -> None:
        """Nothing is held open."""

    def _make_durable(self, key: str) -> None:
        """Write file and folders through to the disk, which obstore does not do."""
        path = self._folder / key
        os.chmod(path, 0o600)
        for part in (path, path.parent, self._folder):
            _sync(part)

    def _remove(self, key: str) -> None:
        folder = (self._folder / key).parent
        for name in (key, key + UNFINISHED):
            (self._folder / name).unlink(missing_ok=True)
        if folder.is_dir():
            _sync(folder)


async def check_data_folder(store: Store, folder: Path, now: float) -> None:
    """Note in the shared database that this process keeps the bytes of files in `folder`, the data folder.

    Called at the start, and every hour while it is in use. Raises ConfigError when another folder has been in use
    within the last day: what one process stores there, the others would not find.
    """
    mark, path = await asyncio.to_thread(_read_mark, folder)
    this = DataFolder(mark, socket.gethostname(), path, int(now))

    async def work(tx: Transaction) -> list[DataFolder]:
        others = await list_data_folders(tx, this.seen_at - FORGOTTEN_AFTER_S)
        # A folder that was emptied or replaced has a new mark in the old place.
        others = [one for one in others if one.id != mark and (one.host, one.path) != (this.host, this.path)]
        if not others:
            await note_data_folder(tx, this)
        return others

    if others := await store.write(work):
        places = ", ".join(f"{one.path} on {one.host}" for one in others)
        raise ConfigError(
            f"The bytes of files would be in {this.path} on {this.host}, but processes on the same database have them"
            f" in another folder: {places}. Set blob_url to an object store (`s3://…`), or put the data folder on a"
            " disk that all hosts share and set shared_data."
        )


def _read_mark(folder: Path) -> tuple[str, str]:
    """What is written in the folder to know it again, whichever host it is seen from, and its full path. It is written
    now if it is missing, and appears whole: several processes may be at it."""
    unfinished = folder / f"{MARK}.{secrets.token_hex(8)}"
    try:
        if not (folder / MARK).exists():
            unfinished.write_text(secrets.token_hex(16))
            with contextlib.suppress(FileExistsError):
                os.link(unfinished, folder / MARK)
            unfinished.unlink()
        return (folder / MARK).read_text(), str(folder.resolve())
    except OSError as error:
        raise ConfigError(f"The data folder {folder} cannot be used: {error.strerror}.") from None


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


async def gathered(chunks: AsyncIterator[bytes], size_bytes: int) -> AsyncGenerator[bytes, None]:
    """The same bytes in pieces of about this size; only the last is smaller."""
    waiting, size = [], 0
    async for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        if size >= size_bytes:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


@contextlib.contextmanager
def _translated(key: str) -> Iterator[None]:
    """What the disk says as a StoreError."""
    try:
        yield
    except FileNotFoundError:
        raise BlobMissing(f"the bytes of {key} are not there") from None
    except (BaseError, OSError) as error:
        reason = str(error).partition("\n")[0]
        if _error_number(error) in FULL:
            raise StoreFull(f"no space left for {key}: {reason}") from error
        raise StoreUnavailable(f"{key}: {reason}") from error


def _error_number(error: Exception) -> int | None:
    """obstore hands most of them on in words alone."""
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else getattr(error, "errno", None)
