"""Rows of `threads` and `thread_metadata`, and the sequence that a thread gives to what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import Thread
from afterglow.rows.files import set_file_uses
from afterglow.rows.lists import Kept, ListPage, list_page
from afterglow.rows.message_words import FORGET_THREAD
from afterglow.rows.requests import delete_answers
from afterglow.rows.webhooks import forget_events

# Everything that hangs on a thread. Events and stored answers carry its text as well.
_OF_A_THREAD = (
    "DELETE FROM spend_tags WHERE project_id = $1 AND run_id IN"
    " (SELECT id FROM runs WHERE project_id = $1 AND thread_id = $2)",
    "DELETE FROM deleted_messages WHERE project_id = $1 AND thread_id = $2",
    *FORGET_THREAD,
    "DELETE FROM events WHERE project_id = $1 AND run_id IN"
    " (SELECT id FROM runs WHERE project_id = $1 AND thread_id = $2)",
    "DELETE FROM model_calls WHERE project_id = $1 AND thread_id = $2",
    "DELETE FROM steps WHERE project_id = $1 AND thread_id = $2",
    "DELETE FROM tool_deadlines WHERE project_id = $1 AND thread_id = $2",
    "DELETE FROM runs WHERE project_id = $1 AND thread_id = $2",
    "DELETE FROM messages WHERE project_id = $1 AND thread_id = $2",
    "DELETE FROM thread_metadata WHERE project_id = $1 AND thread_id = $2",
    "DELETE FROM file_uses WHERE project_id = $1 AND holder = 'threads' AND holder_id = $2",
    "DELETE FROM sandbox_files WHERE project_id = $1 AND thread_id = $2",
    "DELETE FROM sandbox_sessions WHERE project_id = $1 AND thread_id = $2",
    "DELETE FROM search_results WHERE project_id = $1 AND thread_id = $2",
)


async def get_thread_object(tx: Transaction, project: str, thread_id: str) -> str | None:
    rows = await tx.fetch("SELECT object FROM threads WHERE project_id = $1 AND id = $2", project, thread_id)
    return rows[0][0] if rows else None


async def get_thread(tx: Transaction, project: str, thread_id: str) -> Thread | None:
    text = await get_thread_object(tx, project, thread_id)
    return None if text is None else msgspec.json.decode(text, type=Thread)


async def list_threads(
    tx: Transaction,
    project: str,
    metadata: Mapping[str, str],
    *,
    limit: int,
    order: str,
    after: str | None,
    before: str | None,
    kept: Sequence[Kept] = (),
) -> ListPage:
    """metadata: only threads that have all these pairs."""
    where, values = "project_id = $1", [project]
    for key, value in metadata.items():
        where += (
            " AND EXISTS (SELECT 1 FROM thread_metadata m WHERE m.project_id = $1 AND m.thread_id = threads.id"
            f" AND m.key = ${len(values) + 1} AND m.value = ${len(values) + 2})"
        )
        values += [key, value]
    return await list_page(
        tx, "threads", where, tuple(values), limit=limit, order=order, after=after, before=before, kept=kept
    )


FEW_RUNS = 5_000  # whose threads are looked up one by one, instead of looking at all threads


async def of_assistant(tx: Transaction, project: str, assistant_id: str) -> list[Kept]:
    """Keeps the threads that a run of the assistant was on."""
    if await _are_few(tx, project, "assistant_id", assistant_id):
        return [("id IN (SELECT thread_id FROM runs WHERE project_id = $1 AND assistant_id = {})", (assistant_id,))]
    condition = (
        "EXISTS (SELECT 1 FROM runs r WHERE r.project_id = $1 AND r.thread_id = threads.id AND r.assistant_id = {})"
    )
    return [(condition, (assistant_id,))]


async def of_last_run(tx: Transaction, project: str, status: str) -> list[Kept]:
    """Keeps the threads whose last run has this status."""
    condition = (
        "(SELECT r.status FROM runs r WHERE r.project_id = $1 AND r.thread_id = threads.id"
        " ORDER BY r.created_at DESC, r.seq DESC LIMIT 1) = {}"
    )
    kept: list[Kept] = [(condition, (status,))]
    if await _are_few(tx, project, "status", status):
        kept.append(("id IN (SELECT thread_id FROM runs WHERE project_id = $1 AND status = {})", (status,)))
    return kept


async def _are_few(tx: Transaction, project: str, column: Literal["assistant_id", "status"], value: str) -> bool:
    rows = await tx.fetch(
        f"SELECT 1 FROM runs WHERE project_id = $1 AND {column} = $2 LIMIT 1 OFFSET {FEW_RUNS}", project, value
    )
    return not rows


async def insert_thread(tx: Transaction, project: str, thread: Thread, seq: int) -> None:
    await tx.execute(
        "INSERT INTO threads (project_id, id, seq, created_at, object) VALUES ($1, $2, $3, $4, $5)",
        project,
        thread.id,
        seq,
        thread.created_at,
        msgspec.json.encode(thread).decode(),
    )
    await _insert_metadata(tx, project, thread)
    if thread.tool_resources:
        await set_file_uses(tx, project, "threads", thread.id, thread.tool_resources)


async def update_thread(tx: Transaction, project: str, thread: Thread) -> None:
    await tx.execute(
        "UPDATE threads SET object = $3 WHERE project_id = $1 AND id = $2",
        project,
        thread.id,
        msgspec.json.encode(thread).decode(),
    )
    await tx.execute("DELETE FROM thread_metadata WHERE project_id = $1 AND thread_id = $2", project, thread.id)
    await _insert_metadata(tx, project, thread)
    await set_file_uses(tx, project, "threads", thread.id, thread.tool_resources)


async def _insert_metadata(tx: Transaction, project: str, thread: Thread) -> None:
    for key, value in thread.metadata.items():
        await tx.execute("INSERT INTO thread_metadata VALUES ($1, $2, $3, $4)", project, key, value, thread.id)


async def delete_thread(tx: Transaction, project: str, thread_id: str) -> bool:
    """Delete the thread and all that hangs on it."""
    found = await tx.execute("DELETE FROM threads WHERE project_id = $1 AND id = $2", project, thread_id)
    if not found:
        return False
    for statement in _OF_A_THREAD:
        await tx.execute(statement, project, thread_id)
    await forget_events(tx, project, thread_id)
    await delete_answers(tx, project, thread_id)
    return True


async def take_seq(tx: Transaction, project: str, thread_id: str, count: int = 1) -> int | None:
    """Draw `count` numbers of the thread's sequence; return the first, or None when there is no such thread."""
    rows = await tx.fetch(
        "UPDATE threads SET last_seq = last_seq + $3 WHERE project_id = $1 AND id = $2 RETURNING last_seq",
        project,
        thread_id,
        count,
    )
    return rows[0][0] - count + 1 if rows else None


class Place(NamedTuple):
    """Where something new comes in a thread: after all that is there, by time and then by number."""

    created_at: int
    seq: int


async def take_place(tx: Transaction, project: str, thread_id: str, now: int, count: int = 1) -> Place | None:
    """As `take_seq`, for what is created at `now`: not before the newest that the thread has, which a machine whose
    clock is ahead may have written."""
    rows = await tx.fetch(
        "UPDATE threads SET last_seq = last_seq + $3 WHERE project_id = $1 AND id = $2 RETURNING last_seq,"
        " (SELECT MAX(created_at) FROM messages WHERE project_id = $1 AND thread_id = $2),"
        " (SELECT MAX(created_at) FROM runs WHERE project_id = $1 AND thread_id = $2),"
        " (SELECT MAX(created_at) FROM steps WHERE project_id = $1 AND thread_id = $2 AND type = 'tool_calls')",
        project,
        thread_id,
        count,
    )
    return Place(max(now, *(at or 0 for at in rows[0][1:])), rows[0][0] - count + 1) if rows else None


async def get_last_seq(tx: Transaction, project: str, thread_id: str) -> int:
    rows = await tx.fetch("SELECT last_seq FROM threads WHERE project_id = $1 AND id = $2", project, thread_id)
    return rows[0][0] if rows else 0


async def insert_made_up_thread(tx: Transaction, project: str, thread: Thread) -> None:
    """Write a thread of which only the messages are known. A negative seq tells so, until the thread itself comes."""
    rows = await tx.fetch(
        "SELECT MIN(seq) FROM threads WHERE project_id = $1 AND created_at = $2", project, thread.created_at
    )
    await insert_thread(tx, project, thread, min(int(rows[0][0] or 0), 0) - 1)


async def replace_made_up_thread(tx: Transaction, project: str, thread: Thread, seq: int) -> None:
    """Put the thread itself, with its own place, where a made-up one was; what hangs on it stays."""
    await tx.execute(
        "UPDATE threads SET created_at = $3, seq = $4 WHERE project_id = $1 AND id = $2",
        project,
        thread.id,
        thread.created_at,
        seq,
    )
    await update_thread(tx, project, thread)
