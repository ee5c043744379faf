"""How much work waits, for `/metrics`: counted on the partial indexes that the queues have anyway."""

from __future__ import annotations

from typing import NamedTuple

from afterglow.contracts import Transaction


class Backlog(NamedTuple):
    """runs: queued, without those that wait for their thread. oldest_at: when the oldest of them was created, Unix
    seconds. files: that are not indexed yet."""

    runs: int
    oldest_at: int | None
    files: int


async def count_backlog(tx: Transaction) -> Backlog:
    [(runs, oldest_at, files)] = await tx.fetch(
        "SELECT (SELECT COUNT(*) FROM runs WHERE status = 'queued' AND holds_thread = 1),"
        " (SELECT MIN(created_at) FROM runs WHERE status = 'queued' AND holds_thread = 1),"
        " (SELECT COUNT(*) FROM vector_store_files WHERE status = 'in_progress')"
    )
    return Backlog(runs, oldest_at, files)
