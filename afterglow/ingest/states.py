"""Which status may follow which, for files of vector stores; and what follows from them for stores and batches.

Only files move: a store and a batch say no more than their files do, and whether their time is over. A file that is
attached again is read again, whatever became of it before. `cancelled` comes from the cancel of a batch alone. No I/O,
no clock.
Source: the public API reference; recorded answers, in which a batch of failed files is completed and its counts tell.
"""

from __future__ import annotations

from typing import Literal

from afterglow.objects import BatchStatus, FileCounts, FileError, FileStatus, StoreStatus, VectorStoreFile
from afterglow.runs.states import IllegalMove

FileEvent = Literal["attached", "indexed", "broke", "cancel_asked"]

FILE_MOVES: dict[FileStatus, dict[FileEvent, FileStatus]] = {
    "in_progress": {
        "attached": "in_progress",
        "indexed": "completed",
        "broke": "failed",
        "cancel_asked": "cancelled",
    },
    "completed": {"attached": "in_progress"},
    "failed": {"attached": "in_progress"},
    "cancelled": {"attached": "in_progress"},
}


def move_file(file: VectorStoreFile, event: FileEvent, *, usage_bytes: int = 0, error: FileError | None = None) -> None:
    """Give `file` the status after `event`, and what goes with it. Raises IllegalMove and leaves it as it was.

    usage_bytes: what it takes in the index, once it is there. error: why it broke.
    """
    try:
        file.status = FILE_MOVES[file.status][event]
    except KeyError:
        raise IllegalMove(f"{event!r} while {file.status!r}") from None
    file.usage_bytes = usage_bytes
    file.last_error = error


def store_status(counts: FileCounts, expires_at: int | None, now: float) -> StoreStatus:
    if expires_at is not None and expires_at <= now:
        return "expired"
    return "in_progress" if counts.in_progress else "completed"


def batch_status(counts: FileCounts, cancelled: bool) -> BatchStatus:
    """cancelled: whether its cancel was asked while any of its files was in progress."""
    if counts.in_progress:
        return "in_progress"
    return "cancelled" if cancelled else "completed"
