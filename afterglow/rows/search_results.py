"""Rows of `search_results`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import Json, RunStep
from afterglow.rows.lists import HELD


class FoundBy(NamedTuple):
    """Whose results they are."""

    thread_id: str
    run_id: str
    step_id: str
    call_id: str


class StoredResult(NamedTuple):
    step_id: str
    call_id: str
    file_id: str
    marker: str
    result: Json


async def insert_results(tx: Transaction, project: str, found_by: FoundBy, results: Sequence[Json]) -> None:
    """results: as `tools/file_search.py` makes them, in their order. Of a file that was deleted since, none is kept."""
    for position, result in enumerate(results):
        await tx.execute(
            "INSERT INTO search_results (project_id, thread_id, run_id, step_id, call_id, position, file_id, marker,"
            " object) SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9 FROM files"
            f" WHERE project_id = $1 AND id = $7 AND (expires_at IS NULL OR expires_at > 0) {HELD}",
            project,
            *found_by,
            position,
            result["file_id"],
            result["x-marker"],
            msgspec.json.encode(result).decode(),
        )


async def list_results(tx: Transaction, project: str, run_id: str) -> list[StoredResult]:
    """All that the searches of a run have found, and what is still there of it."""
    rows = await tx.fetch(
        "SELECT step_id, call_id, file_id, marker, object FROM search_results WHERE project_id = $1 AND run_id = $2"
        " ORDER BY step_id, call_id, position",
        project,
        run_id,
    )
    return [
        StoredResult(step_id, call_id, file_id, marker, msgspec.json.decode(text))
        for step_id, call_id, file_id, marker, text in rows
    ]


async def next_number(tx: Transaction, project: str, thread_id: str) -> int:
    """The number of the thread's next search, for its markers: the answers of earlier runs, which the model reads,
    name other passages by theirs. Not a count: of a deleted file nothing is left."""
    rows = await tx.fetch(
        "SELECT DISTINCT marker FROM search_results WHERE project_id = $1 AND thread_id = $2", project, thread_id
    )
    return max((int(marker[1:].partition(":")[0]) for (marker,) in rows), default=-1) + 1


async def forget_file(tx: Transaction, project: str, file_id: str) -> list[str]:
    """Delete what was quoted of a file; return the ids of the runs that it was quoted in."""
    rows = await tx.fetch(
        "DELETE FROM search_results WHERE project_id = $1 AND file_id = $2 RETURNING run_id", project, file_id
    )
    return sorted({row[0] for row in rows})


async def filled_in(tx: Transaction, project: str, step: str) -> str:
    """As `fill_in_content`, of a step's JSON text."""
    if '"file_search"' not in step:
        return step
    filled = await fill_in_content(tx, project, msgspec.json.decode(step, type=RunStep))
    return msgspec.json.encode(filled).decode()


async def fill_in_content(tx: Transaction, project: str, step: RunStep) -> RunStep:
    """A copy of a step whose file searches show what they have found in full."""
    calls = step.step_details.get("tool_calls", [])
    if not any(call["type"] == "file_search" for call in calls):
        return step
    by_call: dict[str, list[Any]] = {}
    rows = await tx.fetch(
        "SELECT call_id, object FROM search_results WHERE project_id = $1 AND step_id = $2 ORDER BY call_id, position",
        project,
        step.id,
    )
    for call_id, text in rows:
        by_call.setdefault(call_id, []).append(msgspec.json.decode(text))
    shown = [
        {**call, "file_search": {**call["file_search"], "results": by_call.get(call["id"], [])}}
        if call["type"] == "file_search" and call["file_search"].get("results")
        else call
        for call in calls
    ]
    return msgspec.structs.replace(step, step_details={**step.step_details, "tool_calls": shown})
