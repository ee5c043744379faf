"""Rows of `tool_deadlines` and `tool_secrets`: until when calls are to be answered, and what this server's own are
signed with."""

from __future__ import annotations

from typing import NamedTuple

from afterglow.contracts import Transaction


class Deadline(NamedTuple):
    """Of one call that waits for its output. due: Unix seconds."""

    project: str
    thread_id: str
    run_id: str
    step_id: str
    call_id: str
    timeout_s: float
    due: float


async def insert_deadline(tx: Transaction, deadline: Deadline) -> None:
    await tx.execute(
        "INSERT INTO tool_deadlines (project_id, thread_id, run_id, step_id, call_id, timeout_s, due)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7)",
        *deadline,
    )


async def list_due(tx: Transaction, now: float, limit: int) -> list[Deadline]:
    """Deadlines of all projects that are over, the oldest first."""
    rows = await tx.fetch(
        "SELECT project_id, thread_id, run_id, step_id, call_id, timeout_s, due FROM tool_deadlines WHERE due <= $1"
        f" ORDER BY due LIMIT {limit}",
        now,
    )
    return [Deadline(*row) for row in rows]


async def take_due(tx: Transaction, project: str, run_id: str, now: float) -> list[Deadline]:
    """The deadlines of a run that are over; they are deleted."""
    rows = await tx.fetch(
        "DELETE FROM tool_deadlines WHERE project_id = $1 AND run_id = $2 AND due <= $3"
        " RETURNING project_id, thread_id, run_id, step_id, call_id, timeout_s, due",
        project,
        run_id,
        now,
    )
    return [Deadline(*row) for row in rows]


async def delete_deadlines(tx: Transaction, project: str, run_id: str) -> None:
    await tx.execute("DELETE FROM tool_deadlines WHERE project_id = $1 AND run_id = $2", project, run_id)


async def get_tool_secret(tx: Transaction, project: str) -> str | None:
    rows = await tx.fetch("SELECT secret FROM tool_secrets WHERE project_id = $1", project)
    return rows[0][0] if rows else None


async def take_tool_secret(tx: Transaction, project: str, new: str, now: int) -> str:
    """The project's secret; `new` becomes it when there is none yet."""
    await tx.execute(
        "INSERT INTO tool_secrets (project_id, secret, created_at) VALUES ($1, $2, $3)"
        " ON CONFLICT (project_id) DO NOTHING",
        project,
        new,
        now,
    )
    return await get_tool_secret(tx, project) or new


async def replace_tool_secret(tx: Transaction, project: str, new: str, now: int) -> None:
    await tx.execute(
        "INSERT INTO tool_secrets (project_id, secret, created_at) VALUES ($1, $2, $3)"
        " ON CONFLICT (project_id) DO UPDATE SET secret = $2, created_at = $3",
        project,
        new,
        now,
    )
