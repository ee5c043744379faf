"""Rows of `vector_stores`, and of `index_chores`: what the index still has to be told.

A store that has expired stays, and says so: whoever reads says what time it is. Its files, batches and counts are in
`rows/vector_store_files.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from afterglow.contracts import SqlRow, Transaction
from afterglow.ids import new_id
from afterglow.ingest.states import store_status
from afterglow.objects import DAY_S, FileCounts, VectorStore
from afterglow.rows.lists import ListPage, list_page
from afterglow.rows.requests import delete_answers
from afterglow.rows.webhooks import forget_events

_COLUMNS = "object, last_active_at, expires_at, usage_bytes, in_progress, completed, failed, cancelled, swept"


async def get_store(tx: Transaction, project: str, store_id: str, now: float) -> VectorStore | None:
    rows = await tx.fetch(f"SELECT {_COLUMNS} FROM vector_stores WHERE project_id = $1 AND id = $2", project, store_id)
    return _store(rows[0], now) if rows else None


def _store(row: SqlRow, now: float) -> VectorStore:
    store = msgspec.json.decode(row[0], type=VectorStore)
    store.last_active_at, store.expires_at, store.usage_bytes = row[1:4]
    store.file_counts = FileCounts(row[4], row[5], row[6], row[7], sum(row[4:8]))
    # What was swept has expired, whatever the clock of this machine says.
    store.status = "expired" if row[8] else store_status(store.file_counts, store.expires_at, now)
    return store


async def list_stores(
    tx: Transaction, project: str, now: float, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    page = await list_page(
        tx, "vector_stores", "project_id = $1", (project,), limit=limit, order=order, after=after, before=before
    )
    stores = [await get_store(tx, project, store_id, now) for store_id in page.ids]
    return page._replace(objects=[msgspec.json.encode(store).decode() for store in stores])


async def insert_store(tx: Transaction, project: str, store: VectorStore, seq: int) -> None:
    """A store without files; they are counted as they come."""
    await tx.execute(
        "INSERT INTO vector_stores (project_id, id, seq, created_at, last_active_at, expires_at, object)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7)",
        project,
        store.id,
        seq,
        store.created_at,
        store.last_active_at,
        expiry_of(store),
        msgspec.json.encode(store).decode(),
    )


def expiry_of(store: VectorStore) -> int | None:
    """When it expires, if it is not used before."""
    if store.expires_after is None or store.last_active_at is None:
        return None
    return store.last_active_at + store.expires_after.days * DAY_S


async def update_store(tx: Transaction, project: str, store: VectorStore) -> None:
    """Write what callers say of it, and the times."""
    await tx.execute(
        "UPDATE vector_stores SET object = $3, last_active_at = $4, expires_at = $5 WHERE project_id = $1 AND id = $2",
        project,
        store.id,
        msgspec.json.encode(store).decode(),
        store.last_active_at,
        expiry_of(store),
    )


async def touch_store(tx: Transaction, project: str, store_id: str) -> None:
    """Write it as it is: others that do so, and whatever changes its files, come before or after the caller's work."""
    await tx.execute("UPDATE vector_stores SET swept = swept WHERE project_id = $1 AND id = $2", project, store_id)


async def delete_store(tx: Transaction, project: str, store_id: str) -> bool:
    """Delete the row with its files and batches; what the index holds is a chore."""
    if not await tx.execute("DELETE FROM vector_stores WHERE project_id = $1 AND id = $2", project, store_id):
        return False
    for table in ("vector_store_files", "file_batches", "batch_files"):
        await tx.execute(f"DELETE FROM {table} WHERE project_id = $1 AND store_id = $2", project, store_id)
    await forget_events(tx, project, store_id)
    await delete_answers(tx, project, store_id)
    return True


async def list_overdue(tx: Transaction, now: float, limit: int) -> list[tuple[str, str]]:
    """(project, id) of stores that have expired and that the index still has, in all projects."""
    rows = await tx.fetch(
        f"SELECT project_id, id FROM vector_stores WHERE expires_at <= $1 AND swept = 0 LIMIT {limit}", int(now)
    )
    return [(project, store_id) for project, store_id in rows]


async def list_all(tx: Transaction, now: float) -> list[tuple[str, str]]:
    """(project, id) of the stores of all projects that have not expired."""
    rows = await tx.fetch(
        "SELECT project_id, id FROM vector_stores WHERE expires_at IS NULL OR expires_at > $1 ORDER BY project_id, id",
        int(now),
    )
    return [(project, store_id) for project, store_id in rows]


async def mark_swept(tx: Transaction, project: str, store_id: str) -> None:
    await tx.execute(
        "UPDATE vector_stores SET swept = 1, usage_bytes = 0 WHERE project_id = $1 AND id = $2", project, store_id
    )


# --- what the index has to be told -----------------------------------------------------------------------------


class Chore(NamedTuple):
    """Let the index say what the rows say of a file, or of a whole store when `file_id` is empty."""

    id: str
    project: str
    store_id: str
    file_id: str


async def insert_chores(tx: Transaction, project: str, store_id: str, file_ids: Iterable[str] = ("",)) -> list[Chore]:
    chores = [Chore(new_id("chore"), project, store_id, file_id) for file_id in file_ids]
    for chore in chores:
        await tx.execute("INSERT INTO index_chores VALUES ($1, $2, $3, $4)", *chore)
    return chores


async def list_stores_with_chores(tx: Transaction) -> list[tuple[str, str]]:
    """(project, id) of the stores that there are chores for, in all projects."""
    rows = await tx.fetch("SELECT DISTINCT project_id, store_id FROM index_chores")
    return [(project, store_id) for project, store_id in rows]


async def list_chores(tx: Transaction, project: str, store_id: str, limit: int) -> list[Chore]:
    rows = await tx.fetch(
        f"SELECT * FROM index_chores WHERE project_id = $1 AND store_id = $2 LIMIT {limit}", project, store_id
    )
    return [Chore(*row) for row in rows]


async def delete_chores(tx: Transaction, chores: Sequence[Chore]) -> None:
    for chore in chores:
        await tx.execute("DELETE FROM index_chores WHERE id = $1", chore.id)


async def has_index(tx: Transaction, project: str, store_id: str, *, anew: bool) -> bool:
    """Whether the index has reason to hold anything of this store. anew: what it holds of files in progress is not
    wanted any more."""
    rows = await tx.fetch(
        "SELECT completed, in_progress FROM vector_stores WHERE project_id = $1 AND id = $2 AND swept = 0",
        project,
        store_id,
    )
    return any(completed or (in_progress and not anew) for completed, in_progress in rows)
