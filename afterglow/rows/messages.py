"""Rows of `messages`."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import Json, Message
from afterglow.rows.lists import ListPage, list_page
from afterglow.rows.message_words import forget_message, note_unindexed
from afterglow.rows.requests import delete_answers

LISTED = "project_id = $1 AND thread_id = $2 AND left_behind < 2"
_SEEN = "project_id = $1 AND thread_id = $2 AND left_behind = 0 AND status <> 'in_progress'"


class SaidMessage(msgspec.Struct):
    """What a model may see of a message: decoding no more than that halves the cost of a long history."""

    id: str
    role: str
    content: list[Json]
    run_id: str | None


class PlacedMessage(NamedTuple):
    """A message with its place in the thread."""

    created_at: int
    seq: int
    message: SaidMessage


_said = msgspec.json.Decoder(SaidMessage).decode


async def get_message_object(tx: Transaction, project: str, thread_id: str, message_id: str) -> str | None:
    rows = await tx.fetch(
        "SELECT object FROM messages WHERE project_id = $1 AND id = $2 AND thread_id = $3",
        project,
        message_id,
        thread_id,
    )
    return rows[0][0] if rows else None


async def get_message(tx: Transaction, project: str, thread_id: str, message_id: str) -> Message | None:
    text = await get_message_object(tx, project, thread_id, message_id)
    return None if text is None else msgspec.json.decode(text, type=Message)


async def list_messages(
    tx: Transaction,
    project: str,
    thread_id: str,
    run_id: str | None,
    *,
    limit: int,
    order: str,
    after: str | None,
    before: str | None,
) -> ListPage:
    where = LISTED
    values: tuple[str, ...] = (project, thread_id)
    if run_id is not None:
        where, values = f"{LISTED} AND run_id = $3", (*values, run_id)
    return await list_page(tx, "messages", where, values, limit=limit, order=order, after=after, before=before)


async def list_messages_before(
    tx: Transaction, project: str, thread_id: str, cut_off: int, place: tuple[int, int], limit: int
) -> list[PlacedMessage]:
    """Up to `limit` messages that a model may see, newest first: before `place` (created_at, seq), seq ≤ cut_off."""
    rows = await tx.fetch(
        "SELECT created_at, seq, object FROM messages WHERE project_id = $1 AND thread_id = $2"
        " AND (created_at, seq) < ($4, $5) AND seq <= $3 AND left_behind = 0 AND status <> 'in_progress'"
        f" ORDER BY created_at DESC, seq DESC LIMIT {limit}",
        project,
        thread_id,
        cut_off,
        *place,
    )
    return [PlacedMessage(at, seq, _said(text)) for at, seq, text in rows]


async def insert_message(tx: Transaction, project: str, message: Message, seq: int) -> None:
    await tx.execute(
        "INSERT INTO messages (project_id, thread_id, id, seq, created_at, run_id, status, object)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        project,
        message.thread_id,
        message.id,
        seq,
        message.created_at,
        message.run_id,
        message.status,
        msgspec.json.encode(message).decode(),
    )
    if message.status != "in_progress":
        await note_unindexed(tx, project, message.id, message.created_at)


async def update_message(tx: Transaction, project: str, message: Message, *, left_behind: bool = False) -> None:
    await tx.execute(
        "UPDATE messages SET status = $3, left_behind = $4, object = $5 WHERE project_id = $1 AND id = $2",
        project,
        message.id,
        message.status,
        int(left_behind),
        msgspec.json.encode(message).decode(),
    )
    if message.status != "in_progress":
        await note_unindexed(tx, project, message.id, message.created_at)


async def update_message_object(tx: Transaction, project: str, message: Message) -> None:
    """Write what a caller may change; place, status and visibility stay."""
    await tx.execute(
        "UPDATE messages SET object = $3 WHERE project_id = $1 AND id = $2",
        project,
        message.id,
        msgspec.json.encode(message).decode(),
    )


async def hide_left_behind(tx: Transaction, project: str, run_id: str) -> None:
    """Take what dead attempts of this run left behind out of the lists: its replacement is there."""
    for table in ("messages", "steps"):
        await tx.execute(
            f"UPDATE {table} SET left_behind = 2 WHERE project_id = $1 AND run_id = $2 AND left_behind = 1",
            project,
            run_id,
        )


async def delete_message(tx: Transaction, project: str, thread_id: str, message_id: str) -> str | None:
    """Delete it, and return the id of the run that wrote it, or "" when a caller did; None when there is none. Where
    it was is noted, for those who ask what a model was given."""
    await forget_message(tx, project, message_id)
    rows = await tx.fetch(
        "DELETE FROM messages WHERE project_id = $1 AND id = $2 AND thread_id = $3"
        " RETURNING seq, created_at, run_id, left_behind, object",
        project,
        message_id,
        thread_id,
    )
    await delete_answers(tx, project, message_id)
    if not rows:
        return None
    seq, created_at, run_id, left_behind, text = rows[0]
    if not left_behind:
        await tx.execute(
            "INSERT INTO deleted_messages VALUES ($1, $2, $3, $4, $5, $6, $7)",
            project,
            thread_id,
            message_id,
            seq,
            created_at,
            run_id,
            _said(text).role,
        )
    return run_id or ""


class DeletedMessage(NamedTuple):
    id: str
    seq: int
    created_at: int
    run_id: str | None
    role: str


async def list_deleted(
    tx: Transaction, project: str, thread_id: str, from_seq: int, to_seq: int
) -> list[DeletedMessage]:
    """The messages of a thread that were deleted, of those from `from_seq` to `to_seq`."""
    rows = await tx.fetch(
        "SELECT id, seq, created_at, run_id, role FROM deleted_messages"
        " WHERE project_id = $1 AND thread_id = $2 AND seq >= $3 AND seq <= $4 ORDER BY seq",
        project,
        thread_id,
        from_seq,
        to_seq,
    )
    return [DeletedMessage(*row) for row in rows]


async def list_messages_between(
    tx: Transaction, project: str, thread_id: str, from_seq: int, to_seq: int
) -> list[PlacedMessage]:
    """The messages that a model may see, of those from `from_seq` to `to_seq`, oldest first."""
    rows = await tx.fetch(
        f"SELECT created_at, seq, object FROM messages WHERE {_SEEN} AND seq >= $3 AND seq <= $4"
        " ORDER BY created_at, seq",
        project,
        thread_id,
        from_seq,
        to_seq,
    )
    return [PlacedMessage(at, seq, _said(text)) for at, seq, text in rows]


async def count_before(tx: Transaction, project: str, thread_id: str, before_seq: int) -> int:
    """How many messages below a place a model could have seen, deleted ones included."""
    rows = await tx.fetch(
        f"SELECT (SELECT COUNT(*) FROM messages WHERE {_SEEN} AND seq < $3)"
        " + (SELECT COUNT(*) FROM deleted_messages WHERE project_id = $1 AND thread_id = $2 AND seq < $3)",
        project,
        thread_id,
        before_seq,
    )
    return int(rows[0][0])


async def list_ids_before(
    tx: Transaction, project: str, thread_id: str, before_seq: int, limit: int
) -> list[tuple[int, str, bool]]:
    """(seq, id, whether it was deleted) of up to `limit` such messages, newest first."""
    rows = await tx.fetch(
        f"SELECT seq, id, 0 FROM messages WHERE {_SEEN} AND seq < $3"
        " UNION ALL SELECT seq, id, 1 FROM deleted_messages WHERE project_id = $1 AND thread_id = $2 AND seq < $3"
        f" ORDER BY 1 DESC LIMIT {limit}",
        project,
        thread_id,
        before_seq,
    )
    return [(seq, message_id, bool(deleted)) for seq, message_id, deleted in rows]


async def get_seq(tx: Transaction, project: str, thread_id: str, message_id: str) -> int | None:
    """The place of a message in its thread, also of one that was deleted."""
    rows = await tx.fetch(
        "SELECT seq FROM messages WHERE project_id = $1 AND thread_id = $2 AND id = $3"
        " UNION ALL SELECT seq FROM deleted_messages WHERE project_id = $1 AND thread_id = $2 AND id = $3",
        project,
        thread_id,
        message_id,
    )
    return rows[0][0] if rows else None
