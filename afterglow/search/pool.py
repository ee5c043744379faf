"""Connections to the files of vector stores: a few kept open for the next use, and none where a file is deleted."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

from afterglow.errors import StoreError, StoreFull, StoreUnavailable

KEPT_OPEN = 64
BUSY_TIMEOUT_MS = 30_000
CACHE_KB = 2048


class Pool:
    """A connection serves one thread at a time. Called from any thread."""

    def __init__(self, kept_open: int = KEPT_OPEN) -> None:
        self._kept_open = kept_open
        self._changed = threading.Condition()
        self._idle: OrderedDict[sqlite3.Connection, Path] = OrderedDict()
        self._in_use: Counter[Path] = Counter()
        self._going: set[Path] = set()

    @contextlib.contextmanager
    def use(self, path: Path, *, create: bool = False) -> Iterator[sqlite3.Connection | None]:
        """A connection to this file, or None when there is none and it shall not be made.

        What is not committed is rolled back. Raises StoreFull or StoreUnavailable for what SQLite raises.
        """
        connection = self._take(path)
        try:
            with _translated(path):
                connection = connection or _open(path, create)
                yield connection
                if connection is not None and connection.in_transaction:
                    connection.execute("ROLLBACK")
        except BaseException:
            if connection is not None:
                connection.close()
                connection = None
            raise
        finally:
            self._give_back(path, connection)

    def remove(self, path: Path) -> None:
        """Unlink the file, once nobody uses it. Whoever comes meanwhile waits, and finds none."""
        # SQLite removes the log of a file by name when its last connection closes: one that was still open then
        # could take the log of a later file of the same name with it.
        with self._changed:
            self._going.add(path)
            self._changed.wait_for(lambda: not self._in_use[path])
            idle = [connection for connection, owner in self._idle.items() if owner == path]
            for connection in idle:
                del self._idle[connection]
        try:
            with _translated(path):
                for connection in idle:
                    connection.close()
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{path}{suffix}").unlink(missing_ok=True)
        finally:
            with self._changed:
                self._going.discard(path)
                self._changed.notify_all()

    def close(self) -> None:
        """Close what nobody uses, and from now on whatever is given back."""
        self._kept_open = 0
        self._close_surplus()

    def _take(self, path: Path) -> sqlite3.Connection | None:
        with self._changed:
            self._changed.wait_for(lambda: path not in self._going)
            self._in_use[path] += 1
            found = next((connection for connection, owner in reversed(self._idle.items()) if owner == path), None)
            if found is not None:
                del self._idle[found]
            return found

    def _give_back(self, path: Path, connection: sqlite3.Connection | None) -> None:
        with self._changed:
            if connection is not None:
                self._idle[connection] = path
            self._leave(path)
        self._close_surplus()

    def _close_surplus(self) -> None:
        while True:
            with self._changed:
                if len(self._idle) <= self._kept_open:
                    return
                connection, path = self._idle.popitem(last=False)
                self._in_use[path] += 1  # until it is closed: `remove` must wait for it
            connection.close()
            with self._changed:
                self._leave(path)

    def _leave(self, path: Path) -> None:
        self._in_use[path] -= 1
        if not self._in_use[path]:
            del self._in_use[path]
            self._changed.notify_all()


def _open(path: Path, create: bool) -> sqlite3.Connection | None:
    """None also for an empty file: it is being made just now, or was when the power went."""
    if create:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    elif not path.exists() or not path.stat().st_size:
        return None
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=BUSY_TIMEOUT_MS / 1000,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        _prepare(connection, create)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, create: bool) -> None:
    if create:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # counts before the first table is made
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute(f"PRAGMA cache_size = -{CACHE_KB}")


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """What the file or its disk did as a StoreError; a statement that is wrong stays what it is, a bug of ours."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise
    except (sqlite3.Error, OSError) as error:
        failure: type[StoreError] = StoreFull if "full" in str(error) or "No space" in str(error) else StoreUnavailable
        raise failure(f"{path}: {error}") from error
