"""The files of a session, as its agent reads, writes and lists them for the server.

The cells can change everything below the data folder at any moment, so nothing is opened by a path: one component is
opened after the other, never through a link. Without `..` and links no component leads out; openat2 would say the
same in one call, but gVisor and older kernels do not have it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice

from .frames import NAME_BYTES, NAME_PARTS, is_clean_name, pack

CHUNK_BYTES = 262_144
LIST_FILES = 10_000
LIST_SEEN = 50_000  # entries looked at, whatever they are
LIST_PIECE = 200
TEMPORARY = ".incoming-"

_REASONS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "full"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP), "missing"),
}


class FileRefused(Exception):
    """A request that cannot be carried out. reason: `full`, `name`, `missing`, `large` or `other`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Files:
    """What lies below the data folder. Answers are made as iterators of frames, a bounded piece of work each."""

    def __init__(self, folder: str) -> None:
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def put(self, name: str, size_bytes: int) -> Put:
        """Begin to write a file, and make the folders that it lies in. Raises FileRefused."""
        folders, last = _split(name)
        try:
            space = os.fstatvfs(self._root)
            if size_bytes > space.f_bavail * space.f_frsize:
                raise FileRefused("full")
            return Put(self._open_folder(folders, make=True), last, size_bytes)
        except OSError as error:
            raise _refused(error) from None

    def get(self, request: int, name: str, max_bytes: int) -> Iterator[bytes]:
        """The frames that answer `get`."""
        sent = 0
        try:
            with self._open_file(name) as file:
                if os.fstat(file.fileno()).st_size > max_bytes:
                    raise FileRefused("large")
                while data := file.read(min(CHUNK_BYTES, max_bytes - sent)):
                    sent += len(data)
                    yield pack({"t": "bytes", "id": request}, data)
            yield pack({"t": "end", "id": request, "size": sent})
        except OSError as error:
            yield pack({"t": "fail", "id": request, "reason": _refused(error).reason})
        except FileRefused as refused:
            yield pack({"t": "fail", "id": request, "reason": refused.reason})

    def list(self, request: int) -> Iterator[bytes]:
        """The frames that answer `list`; pieces without a file are empty. What vanishes meanwhile is left out."""
        folders, seen, listed = [""], 0, 0
        while folders and seen < LIST_SEEN:
            folder = folders.pop()
            for entries in self._entries(folder):
                seen += len(entries)
                if folder.count("/") < NAME_PARTS - 1 and len(folder) < NAME_BYTES:  # else no name below it may pass
                    folders += [f"{folder}{entry.name}/" for entry in entries if _is_folder(entry)]
                files = [row for entry in entries if (row := _row(folder, entry))][: LIST_FILES - listed]
                listed += len(files)
                yield pack({"t": "files", "id": request}, json.dumps(files).encode()) if files else b""
        yield pack({"t": "end", "id": request})

    def _entries(self, folder: str) -> Iterator[tuple[os.DirEntry[str], ...]]:
        try:
            fd = self._open_folder(folder.split("/")[:-1])
        except OSError:
            return
        try:
            with os.scandir(fd) as entries:
                while piece := tuple(islice(entries, LIST_PIECE)):
                    yield piece
        except OSError:
            return
        finally:
            os.close(fd)

    def _open_folder(self, parts: Iterable[str], *, make: bool = False) -> int:
        folder = os.dup(self._root)
        for part in parts:
            try:
                if make:
                    _make_folder(part, folder)
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            finally:
                os.close(folder)
            folder = inner
        return folder

    def _open_file(self, name: str) -> io.FileIO:
        folders, last = _split(name)
        folder = self._open_folder(folders)
        try:
            # Not blocking: opening a FIFO would wait for its writer.
            fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder)
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileRefused("missing")
        return io.FileIO(fd)


class Put:
    """A file on its way in: under a name of its own, which no list shows, until it is whole."""

    def __init__(self, folder: int, name: str, size_bytes: int) -> None:
        self._folder, self._name, self._missing = folder, name, size_bytes
        self._temporary = TEMPORARY + os.urandom(8).hex()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._file = io.FileIO(os.open(self._temporary, flags, 0o644, dir_fd=folder), "w")
        except OSError:
            os.close(folder)
            raise

    def write(self, data: bytes) -> None:
        """Raises FileRefused; then the put is over."""
        self._missing -= len(data)
        try:
            if self._missing < 0:
                raise FileRefused("other")
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.drop()
            raise _refused(error) from None
        except FileRefused:
            self.drop()
            raise

    def keep(self) -> None:
        """Give it its name, in the place of a file that has it. Raises FileRefused, as `write` does."""
        try:
            if self._missing:
                raise FileRefused("other")
            os.rename(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError:
            raise FileRefused("other") from None
        finally:
            self.drop()

    def drop(self) -> None:
        """Give it up, or let go of it."""
        self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._temporary, dir_fd=self._folder)
        os.close(self._folder)


def _split(name: str) -> tuple[list[str], str]:
    if not is_clean_name(name):
        raise FileRefused("name")
    *folders, last = name.split("/")
    return folders, last


def _refused(error: OSError) -> FileRefused:
    return FileRefused(_REASONS.get(error.errno or 0, "other"))


def _make_folder(name: str, folder: int) -> None:
    try:
        os.mkdir(name, dir_fd=folder)
    except FileExistsError:
        return


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _row(folder: str, entry: os.DirEntry[str]) -> tuple[str, int, int] | None:
    """Name, size and mtime of a regular file whose name may pass."""
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:
        return None
    name = folder + entry.name
    if not stat.S_ISREG(found.st_mode) or entry.name.startswith(TEMPORARY) or not is_clean_name(name):
        return None
    return name, found.st_size, found.st_mtime_ns
