"""What has not been used for long: old threads and files of a project, and whether anything still uses them."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import ProjectSettings, Retention
from afterglow.rows.message_words import Wanted, find_threads, is_all_indexed
from afterglow.search.words import word_of_file


class Place(NamedTuple):
    """A place in the order of creation."""

    created_at: int
    seq: int
    id: str


START = Place(-1, 0, "")


class Found(NamedTuple):
    """ids: of what is not used. reached: how far was looked; START when that was to the end."""

    ids: list[str]
    reached: Place


async def list_retentions(tx: Transaction) -> list[tuple[str, Retention]]:
    """Of the projects that have said anything."""
    rows = await tx.fetch("SELECT id, settings FROM projects WHERE settings <> '{}' ORDER BY id")
    return [(project, msgspec.json.decode(settings, type=ProjectSettings).retention) for project, settings in rows]


# --- threads ---------------------------------------------------------------------------------------------------

# $2: the time before which all of it must have been.
_IDLE = (
    "created_at < $2 AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.project_id = $1 AND m.thread_id = threads.id"
    " AND m.created_at >= $2) AND NOT EXISTS (SELECT 1 FROM runs r WHERE r.project_id = $1"
    " AND r.thread_id = threads.id AND (r.created_at >= $2 OR r.holds_thread = 1))"
)


async def list_old_threads(tx: Transaction, project: str, before: int, reached: Place, limit: int) -> Found:
    """Threads that have had no message and no run since `before`, and are older themselves."""
    return await _look(tx, "threads", _IDLE, project, before, reached, limit)


async def is_idle(tx: Transaction, project: str, thread_id: str, before: int) -> bool:
    return bool(
        await tx.fetch(
            f"SELECT 1 FROM threads WHERE project_id = $1 AND {_IDLE} AND id = $3", project, before, thread_id
        )
    )


# --- files -----------------------------------------------------------------------------------------------------

_UNUSED = (
    "created_at < $2 AND (expires_at IS NULL OR expires_at > 0)"
    " AND NOT EXISTS (SELECT 1 FROM file_uses u WHERE u.project_id = $1 AND u.file_id = files.id)"
    " AND NOT EXISTS (SELECT 1 FROM vector_store_files v WHERE v.project_id = $1 AND v.id = files.id)"
    " AND NOT EXISTS (SELECT 1 FROM sandbox_files s WHERE s.project_id = $1 AND s.file_id = files.id)"
    " AND NOT EXISTS (SELECT 1 FROM sandbox_files s WHERE s.project_id = $1 AND s.input_id = files.id)"
)


async def list_old_files(tx: Transaction, project: str, before: int, reached: Place, limit: int) -> Found:
    """Files older than `before` that no assistant, thread or vector store has; messages may still show them."""
    return await _look(tx, "files", _UNUSED, project, before, reached, limit)


async def is_unused(tx: Transaction, project: str, file_id: str, before: int) -> bool:
    """As above, and no message and no run that has not begun names it. While messages wait to be indexed, that cannot
    be known."""
    unused = await tx.fetch(
        f"SELECT 1 FROM files WHERE project_id = $1 AND {_UNUSED} AND id = $3", project, before, file_id
    )
    if not unused or not await is_all_indexed(tx, project):
        return False
    if await find_threads(tx, project, Wanted([word_of_file(file_id)]), 1):
        return False
    return not await tx.fetch(
        "SELECT 1 FROM runs WHERE project_id = $1 AND status = 'queued' AND (asked LIKE $2 OR object LIKE $2) LIMIT 1",
        project,
        f"%{file_id}%",
    )


async def _look(
    tx: Transaction, table: str, condition: str, project: str, before: int, reached: Place, limit: int
) -> Found:
    rows = await tx.fetch(
        f"SELECT created_at, seq, id, CASE WHEN {condition} THEN 1 ELSE 0 END FROM {table}"
        f" WHERE project_id = $1 AND created_at < $2 AND (created_at, seq, id) > ($3, $4, $5)"
        f" ORDER BY created_at, seq, id LIMIT {limit}",
        project,
        before,
        *reached,
    )
    ids = [object_id for _, _, object_id, unused in rows if unused]
    return Found(ids, Place(*rows[-1][:3]) if len(rows) == limit else START)
