"""Rows of `assistants`."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import Assistant
from afterglow.rows.files import set_file_uses
from afterglow.rows.lists import ListPage, list_page
from afterglow.rows.requests import delete_answers


class Asked(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Sampling values that were set; None means unset, and unset values are not sent to the model."""

    temperature: float | None = None
    top_p: float | None = None
    response_format: object = None
    reasoning_effort: str | None = None


class AssistantRow(NamedTuple):
    assistant: Assistant
    asked: Asked
    declared: bool


async def get_assistant_object(tx: Transaction, project: str, assistant_id: str) -> str | None:
    rows = await tx.fetch("SELECT object FROM assistants WHERE project_id = $1 AND id = $2", project, assistant_id)
    return rows[0][0] if rows else None


async def get_assistant(tx: Transaction, project: str, assistant_id: str) -> AssistantRow | None:
    rows = await tx.fetch(
        "SELECT object, asked, declared FROM assistants WHERE project_id = $1 AND id = $2", project, assistant_id
    )
    if not rows:
        return None
    text, asked, declared = rows[0]
    return AssistantRow(
        msgspec.json.decode(text, type=Assistant), msgspec.json.decode(asked, type=Asked), bool(declared)
    )


async def list_assistants(
    tx: Transaction, project: str, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    return await list_page(
        tx, "assistants", "project_id = $1", (project,), limit=limit, order=order, after=after, before=before
    )


async def put_assistant(tx: Transaction, project: str, row: AssistantRow, seq: int) -> None:
    """Insert at `seq`, or replace the one with this id, which keeps its place in lists."""
    await tx.execute(
        "INSERT INTO assistants (project_id, id, seq, created_at, declared, asked, object)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (project_id, id) DO UPDATE SET"
        " declared = excluded.declared, asked = excluded.asked, object = excluded.object,"
        " created_at = excluded.created_at",
        project,
        row.assistant.id,
        seq,
        row.assistant.created_at,
        int(row.declared),
        msgspec.json.encode(row.asked).decode(),
        msgspec.json.encode(row.assistant).decode(),
    )
    await set_file_uses(tx, project, "assistants", row.assistant.id, row.assistant.tool_resources)


async def update_assistant(tx: Transaction, project: str, row: AssistantRow) -> None:
    """Replace one that is there. Not `put_assistant`: that would bring back one that is being deleted."""
    await tx.execute(
        "UPDATE assistants SET declared = $3, asked = $4, object = $5 WHERE project_id = $1 AND id = $2",
        project,
        row.assistant.id,
        int(row.declared),
        msgspec.json.encode(row.asked).decode(),
        msgspec.json.encode(row.assistant).decode(),
    )
    await set_file_uses(tx, project, "assistants", row.assistant.id, row.assistant.tool_resources)


async def delete_assistant(tx: Transaction, project: str, assistant_id: str) -> bool:
    await set_file_uses(tx, project, "assistants", assistant_id, {})
    await delete_answers(tx, project, assistant_id)
    return await tx.execute("DELETE FROM assistants WHERE project_id = $1 AND id = $2", project, assistant_id) > 0


async def list_declared(tx: Transaction) -> list[tuple[str, str]]:
    """(project, id) of every assistant that the operator's file declared, in all projects."""
    rows = await tx.fetch("SELECT project_id, id FROM assistants WHERE declared = 1 ORDER BY project_id, id")
    return [(project, assistant_id) for project, assistant_id in rows]
