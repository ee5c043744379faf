"""Rows of `runs`: the object, what its caller asked for, and who holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from afterglow.contracts import SqlValue, Transaction
from afterglow.objects import ACTIVE_RUNS, HELD_RUNS, Json, Run, Usage
from afterglow.rows.lists import LOCKED, PASSING_OVER, Kept, ListPage, list_page


class RunAsked(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What caller or assistant set, which the object shows only mixed with defaults.

    include: the request's `include[]`. tool_choice and parallel_tool_calls as given; None means unset.
    tool_timeout_s: how long each call waits for its output; None for as long as the run does. max_total_tokens,
    max_cost: what the run may take of the model, prompts and answers together. additional_messages: bodies of messages
    that come into the thread when the run gets it; none after that.
    """

    temperature: float | None = None
    top_p: float | None = None
    reasoning_effort: str | None = None
    response_format: object = None
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    include: list[str] = []
    tool_timeout_s: float | None = None
    max_total_tokens: int | None = None
    max_cost: float | None = None
    additional_messages: list[Json] = []


class RunRow(msgspec.Struct, kw_only=True):
    """One run. spent: tokens used so far. deadline: Unix seconds. seq: its place among the thread's runs.

    key_id: of the key that created it. waits: it is queued behind the run that holds the thread. urgent: ahead of
    others that wait.
    """

    project: str
    run: Run
    asked: RunAsked
    spent: Usage
    attempt: int
    deadline: int
    seq: int = 0
    key_id: str = ""
    waits: bool = False
    urgent: bool = False


_COLUMNS = "project_id, object, asked, spent, attempt, deadline, seq, key_id, holds_thread, urgent"
_WAITING = "status = 'queued' AND holds_thread = 0"


def _row(columns: tuple[str, str, str, str, int, int, int, str, int, int]) -> RunRow:
    project, text, asked, spent, attempt, deadline, seq, key_id, holds, urgent = columns
    run = msgspec.json.decode(text, type=Run)
    return RunRow(
        project=project,
        run=run,
        asked=msgspec.json.decode(asked, type=RunAsked),
        spent=msgspec.json.decode(spent, type=Usage),
        attempt=attempt,
        deadline=deadline,
        seq=seq,
        key_id=key_id,
        waits=run.status == "queued" and not holds,
        urgent=bool(urgent),
    )


async def get_run(tx: Transaction, project: str, thread_id: str, run_id: str, *, locked: bool = False) -> RunRow | None:
    """locked: it is going to be changed. Whoever changes what hangs on a run locks the run first: two that did so in
    another order would stop each other."""
    rows = await tx.fetch(
        f"SELECT {_COLUMNS} FROM runs WHERE project_id = $1 AND id = $2 AND thread_id = $3"
        + (f" {LOCKED}" if locked else ""),
        project,
        run_id,
        thread_id,
    )
    return _row(rows[0]) if rows else None


async def get_run_object(tx: Transaction, project: str, thread_id: str, run_id: str) -> tuple[str, str, int] | None:
    """The object's text, the status and the deadline."""
    rows = await tx.fetch(
        "SELECT object, status, deadline FROM runs WHERE project_id = $1 AND id = $2 AND thread_id = $3",
        project,
        run_id,
        thread_id,
    )
    return (rows[0][0], rows[0][1], rows[0][2]) if rows else None


async def get_thread_of_run(tx: Transaction, project: str, run_id: str) -> str | None:
    """The id of the thread that a run is on."""
    rows = await tx.fetch("SELECT thread_id FROM runs WHERE project_id = $1 AND id = $2", project, run_id)
    return rows[0][0] if rows else None


async def get_active_run(tx: Transaction, project: str, thread_id: str) -> RunRow | None:
    """The run that holds the thread, if any."""
    rows = await tx.fetch(
        f"SELECT {_COLUMNS} FROM runs WHERE project_id = $1 AND thread_id = $2 AND holds_thread = 1",
        project,
        thread_id,
    )
    return _row(rows[0]) if rows else None


async def get_held_run(tx: Transaction, project: str, run_id: str, attempt: int) -> RunRow | None:
    """The run, if `attempt` still is the one that may write to it."""
    rows = await tx.fetch(
        f"SELECT {_COLUMNS} FROM runs"
        f" WHERE project_id = $1 AND id = $2 AND attempt = $3 AND holds_thread = 1 AND worker IS NOT NULL {LOCKED}",
        project,
        run_id,
        attempt,
    )
    return _row(rows[0]) if rows else None


async def touch_held_run(tx: Transaction, project: str, run_id: str, attempt: int) -> bool:
    """Whether `attempt` still is the one that may write to the run. It is written as it is: who claims or deletes it
    does so before or after the caller's work."""
    return (
        await tx.execute(
            "UPDATE runs SET attempt = attempt"
            " WHERE project_id = $1 AND id = $2 AND attempt = $3 AND holds_thread = 1 AND worker IS NOT NULL",
            project,
            run_id,
            attempt,
        )
        > 0
    )


async def list_runs(
    tx: Transaction, project: str, thread_id: str, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    return await list_page(
        tx,
        "runs",
        "project_id = $1 AND thread_id = $2",
        (project, thread_id),
        limit=limit,
        order=order,
        after=after,
        before=before,
    )


async def list_project_runs(
    tx: Transaction,
    project: str,
    kept: Sequence[Kept],
    *,
    limit: int,
    order: str,
    after: str | None,
    before: str | None,
) -> ListPage:
    """Runs of all threads."""
    return await list_page(
        tx, "runs", "project_id = $1", (project,), limit=limit, order=order, after=after, before=before, kept=kept
    )


async def insert_run(tx: Transaction, row: RunRow) -> None:
    run = row.run
    await tx.execute(
        "INSERT INTO runs (project_id, thread_id, id, seq, created_at, assistant_id, status, deadline,"
        " asked, spent, object, key_id, model, holds_thread, urgent)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
        row.project,
        run.thread_id,
        run.id,
        row.seq,
        run.created_at,
        run.assistant_id,
        run.status,
        row.deadline,
        msgspec.json.encode(row.asked).decode(),
        msgspec.json.encode(row.spent).decode(),
        msgspec.json.encode(run).decode(),
        row.key_id,
        run.model,
        int(not row.waits),
        int(row.urgent),
    )


async def update_run(tx: Transaction, row: RunRow) -> str | None:
    """Write object, status and spent tokens. The thread is free, and the worker has let go, as the status says.

    Return the id of the run that is to have the thread now: the first that waits, when no run holds it any more.
    """
    active, held = row.run.status in ACTIVE_RUNS, row.run.status in HELD_RUNS
    rows = await tx.fetch(
        "UPDATE runs SET status = $3, holds_thread = $4, spent = $5, object = $6"
        + ("" if held else ", worker = NULL, lease_until = NULL")
        + " WHERE project_id = $1 AND id = $2"
        + (f" RETURNING {_NEXT}" if not active else " RETURNING NULL"),
        row.project,
        row.run.id,
        row.run.status,
        int(active and not row.waits),
        msgspec.json.encode(row.spent).decode(),
        msgspec.json.encode(row.run).decode(),
    )
    return rows[0][0] if rows else None


# --- waiting for a thread --------------------------------------------------------------------------------------

# Postgres shows the row that is being written as it was, SQLite as it is.
_NEXT = (
    "(SELECT w.id FROM runs w WHERE w.project_id = runs.project_id AND w.thread_id = runs.thread_id"
    f" AND w.{_WAITING.replace(' AND ', ' AND w.')} AND w.id <> $2 AND NOT EXISTS (SELECT 1 FROM runs h"
    " WHERE h.project_id = runs.project_id AND h.thread_id = runs.thread_id AND h.holds_thread = 1 AND h.id <> $2)"
    " ORDER BY w.urgent DESC, w.seq LIMIT 1)"
)


class Queue(NamedTuple):
    """Who waits for a thread. deadline: the last of all of them, 0 when there is none."""

    runs: int
    deadline: int


async def get_queue(tx: Transaction, project: str, thread_id: str) -> Queue:
    rows = await tx.fetch(
        "SELECT COUNT(*), COALESCE(MAX(deadline), 0) FROM runs"
        f" WHERE project_id = $1 AND thread_id = $2 AND {_WAITING}",
        project,
        thread_id,
    )
    return Queue(*rows[0])


async def touch_active_run(tx: Transaction, row: RunRow) -> None:
    """Write the run that holds a thread as it is: who ends it does so before, or sees who waits behind it."""
    await tx.execute("UPDATE runs SET attempt = attempt WHERE project_id = $1 AND id = $2", row.project, row.run.id)


async def give_thread(tx: Transaction, row: RunRow) -> None:
    """Let a run that waited hold its thread; write its deadline, and what was asked, too."""
    await tx.execute(
        "UPDATE runs SET holds_thread = 1, deadline = $3, asked = $4, object = $5 WHERE project_id = $1 AND id = $2",
        row.project,
        row.run.id,
        row.deadline,
        msgspec.json.encode(row.asked).decode(),
        msgspec.json.encode(row.run).decode(),
    )


async def list_stranded(tx: Transaction, limit: int) -> list[tuple[str, str, str]]:
    """(project, thread, run) of runs that wait though no run holds their thread: there should be none."""
    rows = await tx.fetch(
        f"SELECT w.project_id, w.thread_id, w.id FROM runs w WHERE w.{_WAITING.replace(' AND ', ' AND w.')}"
        " AND NOT EXISTS (SELECT 1 FROM runs h WHERE h.project_id = w.project_id AND h.thread_id = w.thread_id"
        f" AND h.holds_thread = 1) ORDER BY w.urgent DESC, w.seq LIMIT {limit}"
    )
    return [(project, thread_id, run_id) for project, thread_id, run_id in rows]


async def list_unfinished(tx: Transaction, project: str, thread_id: str) -> list[str]:
    """The ids of the thread's active run and of those that wait behind it."""
    rows = await tx.fetch(
        "SELECT id FROM runs WHERE project_id = $1 AND thread_id = $2 AND holds_thread = 1"
        f" UNION ALL SELECT id FROM runs WHERE project_id = $1 AND thread_id = $2 AND {_WAITING}",
        project,
        thread_id,
    )
    return [run_id for (run_id,) in rows]


# --- the queue -------------------------------------------------------------------------------------------------


async def list_queued(tx: Transaction, limit: int) -> list[RunRow]:
    """Queued runs of all projects that hold their thread, oldest first."""
    rows = await tx.fetch(
        f"SELECT {_COLUMNS} FROM runs WHERE status = 'queued' AND holds_thread = 1"
        f" ORDER BY created_at, seq LIMIT {limit} {PASSING_OVER}"
    )
    return [_row(row) for row in rows]


async def list_abandoned(tx: Transaction, now: float, limit: int) -> list[RunRow]:
    """Runs whose worker fell silent: in progress, or being cancelled, with no lease beyond `now`."""
    rows = await tx.fetch(
        f"SELECT {_COLUMNS} FROM runs WHERE status IN ('in_progress', 'cancelling') AND holds_thread = 1"
        f" AND (lease_until IS NULL OR lease_until < $1) ORDER BY created_at, seq LIMIT {limit} {PASSING_OVER}",
        now,
    )
    return [_row(row) for row in rows]


async def list_overdue(tx: Transaction, now: float, limit: int) -> list[RunRow]:
    """Active runs past their deadline that no living worker holds; first those that wait for their thread."""
    rows = await tx.fetch(
        f"SELECT {_COLUMNS} FROM runs WHERE {_WAITING} AND deadline <= $1 LIMIT {limit} {PASSING_OVER}", int(now)
    )
    rows += await tx.fetch(
        f"SELECT {_COLUMNS} FROM runs WHERE status IN ('queued', 'in_progress', 'requires_action', 'cancelling')"
        f" AND holds_thread = 1 AND deadline <= $1 AND (lease_until IS NULL OR lease_until < $2) LIMIT {limit}"
        f" {PASSING_OVER}",
        int(now),
        now,
    )
    return [_row(row) for row in rows]


async def set_holder(tx: Transaction, row: RunRow, worker: str, lease_until: float) -> None:
    """Make `worker` the one that may write to the run, as attempt `row.attempt`; writes object and status too."""
    await tx.execute(
        "UPDATE runs SET attempt = $3, worker = $4, lease_until = $5, status = $6, object = $7"
        " WHERE project_id = $1 AND id = $2",
        row.project,
        row.run.id,
        row.attempt,
        worker,
        lease_until,
        row.run.status,
        msgspec.json.encode(row.run).decode(),
    )


async def renew_leases(tx: Transaction, worker: str, lease_until: float) -> set[str]:
    """Renew what `worker` holds; return the run ids."""
    rows = await tx.fetch(
        "UPDATE runs SET lease_until = $2 WHERE worker = $1 AND holds_thread = 1"
        " AND status IN ('in_progress', 'cancelling') RETURNING id",
        worker,
        lease_until,
    )
    return {row[0] for row in rows}


async def list_cancelling(tx: Transaction, worker: str) -> list[str]:
    """The ids of runs that `worker` holds and is to stop."""
    rows = await tx.fetch(
        "SELECT id FROM runs WHERE holds_thread = 1 AND status = 'cancelling' AND worker = $1",
        worker,
    )
    return [run_id for (run_id,) in rows]


async def release_leases(tx: Transaction, worker: str | None = None) -> int:
    """End the leases of one worker, or of all: for a start when no other process can be at work."""
    values: tuple[SqlValue, ...] = () if worker is None else (worker,)
    return await tx.execute(
        "UPDATE runs SET lease_until = NULL WHERE holds_thread = 1 AND status IN ('in_progress', 'cancelling')"
        + ("" if worker is None else " AND worker = $1"),
        *values,
    )


async def release_run(tx: Transaction, project: str, run_id: str, attempt: int) -> int:
    """End the lease of one run, if `attempt` still has it."""
    return await tx.execute(
        "UPDATE runs SET lease_until = NULL WHERE project_id = $1 AND id = $2 AND attempt = $3 AND worker IS NOT NULL",
        project,
        run_id,
        attempt,
    )


# --- import ----------------------------------------------------------------------------------------------------


async def insert_finished_run(tx: Transaction, project: str, run: Run, seq: int) -> None:
    """Write a run that was over elsewhere: it holds no thread, and nobody will execute it."""
    await tx.execute(
        "INSERT INTO runs (project_id, thread_id, id, seq, created_at, assistant_id, status, holds_thread, deadline,"
        " asked, spent, object, model) VALUES ($1, $2, $3, $4, $5, $6, $7, 0, $5, $8, $9, $10, $11)",
        project,
        run.thread_id,
        run.id,
        seq,
        run.created_at,
        run.assistant_id,
        run.status,
        msgspec.json.encode(RunAsked()).decode(),
        msgspec.json.encode(run.usage or Usage()).decode(),
        msgspec.json.encode(run).decode(),
        run.model,
    )
