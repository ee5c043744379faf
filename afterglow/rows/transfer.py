"""What import and export ask of all nouns alike: an object by its id alone, a free place, a thread's order."""

from __future__ import annotations

from typing import Literal, NamedTuple

from afterglow.contracts import Transaction

Table = Literal["assistants", "threads", "messages", "runs", "steps"]


class Place(NamedTuple):
    """Where something stands in its thread. over: nothing writes to it any more."""

    created_at: int
    seq: int
    table: Table
    id: str
    over: bool


async def find_object(tx: Transaction, project: str, table: Table, object_id: str) -> tuple[str, int] | None:
    """The object's JSON and its seq, whatever thread or run it belongs to."""
    rows = await tx.fetch(
        f"SELECT object, seq FROM {table} WHERE project_id = $1 AND id = $2",
        project,
        object_id,
    )
    return (rows[0][0], rows[0][1]) if rows else None


async def next_seq(tx: Transaction, project: str, table: Literal["assistants", "threads"], created_at: int) -> int:
    """The seq that puts a row behind all others of its second."""
    rows = await tx.fetch(
        f"SELECT MAX(seq) FROM {table} WHERE project_id = $1 AND created_at = $2",
        project,
        created_at,
    )
    return max(int(rows[0][0] or 0) + 1, created_at * 1_000_000)


async def list_places(tx: Transaction, project: str, thread_id: str) -> list[Place]:
    """Messages, runs and steps of a thread as they followed one another; what a dead attempt left is not there."""
    rows = await tx.fetch(
        "SELECT created_at, seq, 'messages', id, status <> 'in_progress' FROM messages"
        " WHERE project_id = $1 AND thread_id = $2 AND left_behind < 2"
        " UNION ALL SELECT created_at, seq, 'runs', id, holds_thread = 0 AND status <> 'queued' FROM runs"
        " WHERE project_id = $1 AND thread_id = $2"
        " UNION ALL SELECT s.created_at, s.seq, 'steps', s.id, r.holds_thread = 0 AND s.status <> 'in_progress'"
        " FROM runs r JOIN steps s ON s.project_id = r.project_id AND s.run_id = r.id"
        " WHERE r.project_id = $1 AND r.thread_id = $2 AND s.left_behind < 2"
        " ORDER BY 1, 2",
        project,
        thread_id,
    )
    return [Place(at, seq, table, object_id, bool(over)) for at, seq, table, object_id, over in rows]
