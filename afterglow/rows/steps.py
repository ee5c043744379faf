"""Rows of `steps`."""

from __future__ import annotations

from itertools import takewhile

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import RunStep, Usage
from afterglow.rows.lists import ListPage, list_page


class PlacedStep(msgspec.Struct):
    """A step with its place in the thread. usage: of its model call, when that is over and the step is not."""

    created_at: int
    seq: int
    step: RunStep
    usage: Usage | None


_PLACED = "created_at, seq, object, usage"


def _placed(columns: tuple[int, int, str, str | None]) -> PlacedStep:
    at, seq, text, usage = columns
    step = msgspec.json.decode(text, type=RunStep)
    return PlacedStep(at, seq, step, None if usage is None else msgspec.json.decode(usage, type=Usage))


async def get_step_object(tx: Transaction, project: str, thread_id: str, run_id: str, step_id: str) -> str | None:
    rows = await tx.fetch(
        "SELECT object FROM steps WHERE project_id = $1 AND id = $2 AND run_id = $3 AND thread_id = $4",
        project,
        step_id,
        run_id,
        thread_id,
    )
    return rows[0][0] if rows else None


async def list_steps(
    tx: Transaction, project: str, run_id: str, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    return await list_page(
        tx,
        "steps",
        "project_id = $1 AND run_id = $2 AND left_behind < 2",
        (project, run_id),
        limit=limit,
        order=order,
        after=after,
        before=before,
    )


async def list_open_steps(tx: Transaction, project: str, run_id: str) -> list[PlacedStep]:
    """The steps of a run that are in progress; one at most, unless an attempt died."""
    rows = await tx.fetch(
        f"SELECT {_PLACED} FROM steps WHERE project_id = $1 AND run_id = $2 AND status = 'in_progress'"
        " ORDER BY created_at, seq",
        project,
        run_id,
    )
    return [_placed(row) for row in rows]


async def list_newest_calls(tx: Transaction, project: str, run_id: str, limit: int) -> list[PlacedStep]:
    """The newest tool-call steps of a run, open or closed, newest first."""
    rows = await tx.fetch(
        f"SELECT {_PLACED} FROM steps WHERE project_id = $1 AND run_id = $2 AND type = 'tool_calls'"
        f" AND left_behind = 0 ORDER BY created_at DESC, seq DESC LIMIT {limit}",
        project,
        run_id,
    )
    return [_placed(row) for row in rows]


async def leave_behind_text_before(tx: Transaction, project: str, calls: PlacedStep) -> None:
    """Leave behind the text that the model said in the same turn, just before calls that it did not finish.

    A message that is finished while its run goes on is such a text: any other one ends its run.
    """
    rows = await tx.fetch(
        "SELECT id, type, object FROM steps WHERE project_id = $1 AND run_id = $2 AND seq < $3 AND left_behind = 0"
        " AND attempt = (SELECT attempt FROM steps WHERE project_id = $1 AND id = $4) ORDER BY seq DESC LIMIT 1",
        project,
        calls.step.run_id,
        calls.seq,
        calls.step.id,
    )
    if not rows or rows[0][1] != "message_creation":
        return
    step = msgspec.json.decode(rows[0][2], type=RunStep)
    for table, row_id in (("steps", step.id), ("messages", step.step_details["message_creation"]["message_id"])):
        await tx.execute(f"UPDATE {table} SET left_behind = 1 WHERE project_id = $1 AND id = $2", project, row_id)


async def list_calls_before(
    tx: Transaction,
    project: str,
    thread_id: str,
    cut_off: int,
    place: tuple[int, int],
    down_to: tuple[int, int],
    limit: int,
) -> list[PlacedStep]:
    """Up to `limit` closed tool-call steps of a thread, newest first: before `place`, not before `down_to`,
    seq ≤ cut_off."""
    rows = await tx.fetch(
        f"SELECT {_PLACED} FROM steps WHERE project_id = $1 AND thread_id = $2 AND type = 'tool_calls'"
        " AND (created_at, seq) < ($4, $5) AND (created_at, seq) >= ($6, $7) AND seq <= $3 AND left_behind = 0"
        " AND status IN ('completed', 'failed')"
        f" ORDER BY created_at DESC, seq DESC LIMIT {limit}",
        project,
        thread_id,
        cut_off,
        *place,
        *down_to,
    )
    return [_placed(row) for row in rows]


async def list_calls_between(
    tx: Transaction, project: str, thread_id: str, from_seq: int, to_seq: int
) -> list[PlacedStep]:
    """The closed tool-call steps of a thread from `from_seq` to `to_seq`, oldest first."""
    rows = await tx.fetch(
        f"SELECT {_PLACED} FROM steps WHERE project_id = $1 AND thread_id = $2 AND type = 'tool_calls'"
        " AND seq >= $3 AND seq <= $4 AND left_behind = 0 AND status IN ('completed', 'failed')"
        " ORDER BY created_at, seq",
        project,
        thread_id,
        from_seq,
        to_seq,
    )
    return [_placed(row) for row in rows]


async def list_pictures_to_show(tx: Transaction, project: str, run_id: str) -> list[str]:
    """File ids of the images that the run's code has shown since its last message."""
    rows = await tx.fetch(
        "SELECT type, object FROM steps WHERE project_id = $1 AND run_id = $2 AND left_behind = 0"
        " AND status IN ('completed', 'failed') ORDER BY created_at DESC, seq DESC",
        project,
        run_id,
    )
    since = takewhile(lambda row: row[0] == "tool_calls", rows)
    steps = [msgspec.json.decode(text, type=RunStep) for _, text in since][::-1]
    return [
        output["image"]["file_id"]
        for step in steps
        for call in step.step_details["tool_calls"]
        if call["type"] == "code_interpreter"
        for output in call["code_interpreter"]["outputs"]
        if output["type"] == "image"
    ]


async def insert_step(tx: Transaction, project: str, step: RunStep, seq: int, attempt: int) -> None:
    await tx.execute(
        "INSERT INTO steps (project_id, thread_id, run_id, id, seq, created_at, attempt, type, status, object)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        project,
        step.thread_id,
        step.run_id,
        step.id,
        seq,
        step.created_at,
        attempt,
        step.type,
        step.status,
        msgspec.json.encode(step).decode(),
    )


async def update_step(
    tx: Transaction, project: str, step: RunStep, *, usage: Usage | None = None, left_behind: bool = False
) -> None:
    """usage: what the step will show once it is closed, while it still waits."""
    await tx.execute(
        "UPDATE steps SET status = $3, left_behind = $4, usage = $5, object = $6 WHERE project_id = $1 AND id = $2",
        project,
        step.id,
        step.status,
        int(left_behind),
        None if usage is None else msgspec.json.encode(usage).decode(),
        msgspec.json.encode(step).decode(),
    )
