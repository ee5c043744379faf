"""Rows of `events`: what was sent of a run, as bytes."""

from __future__ import annotations

from typing import NamedTuple

from afterglow.contracts import Position, Segment, Stop, Transaction


class Kept(NamedTuple):
    """What there is of a run's log: everything behind `start`, up to `end`. stop: of the last event, while it has its
    text."""

    start: Position
    end: Position
    stop: Stop


async def insert_segment(tx: Transaction, project: str, run_id: str, segment: Segment, now: int) -> None:
    """Write a segment, unless its run is gone or another attempt has taken over, or it is there already."""
    await tx.execute(
        "INSERT INTO events (project_id, run_id, attempt, first_seq, last_seq, stop, created_at, data)"
        " SELECT $1, $2, $3, $4, $5, $6, $7, $8"
        " WHERE EXISTS (SELECT 1 FROM runs WHERE project_id = $1 AND id = $2 AND attempt = $3)"
        " ON CONFLICT (project_id, run_id, attempt, first_seq) DO NOTHING",
        project,
        run_id,
        segment.attempt,
        segment.first,
        segment.last,
        segment.stop,
        now,
        segment.data,
    )


async def list_segments(tx: Transaction, project: str, run_id: str, after: Position) -> list[Segment]:
    """All segments that hold an event after `after`, in order; the first may begin before it."""
    rows = await tx.fetch(
        "SELECT attempt, first_seq, last_seq, data, stop FROM events"
        " WHERE project_id = $1 AND run_id = $2 AND (attempt, last_seq) > ($3, $4) AND LENGTH(data) > 0"
        " ORDER BY attempt, first_seq",
        project,
        run_id,
        after.attempt,
        after.sequence,
    )
    return [Segment(attempt, first, last, bytes(data), stop) for attempt, first, last, data, stop in rows]


async def get_last_position(tx: Transaction, project: str, run_id: str) -> Position:
    """The place after the newest stored event."""
    rows = await tx.fetch(
        "SELECT attempt, last_seq FROM events WHERE project_id = $1 AND run_id = $2"
        " ORDER BY attempt DESC, last_seq DESC LIMIT 1",
        project,
        run_id,
    )
    return Position(*rows[0]) if rows else Position(0, 0)


async def get_kept(tx: Transaction, project: str, run_id: str) -> Kept | None:
    """None when there is nothing."""
    oldest = await tx.fetch(
        "SELECT attempt, first_seq FROM events WHERE project_id = $1 AND run_id = $2"
        " ORDER BY attempt, first_seq LIMIT 1",
        project,
        run_id,
    )
    blank = await tx.fetch(
        "SELECT attempt, last_seq FROM events WHERE project_id = $1 AND run_id = $2 AND LENGTH(data) = 0"
        " ORDER BY attempt DESC, first_seq DESC LIMIT 1",
        project,
        run_id,
    )
    newest = await tx.fetch(
        "SELECT attempt, last_seq, CASE WHEN LENGTH(data) > 0 THEN stop ELSE '' END FROM events"
        " WHERE project_id = $1 AND run_id = $2 ORDER BY attempt DESC, first_seq DESC LIMIT 1",
        project,
        run_id,
    )
    if not oldest:
        return None
    [(attempt, first)], [(last_attempt, last, stop)] = oldest, newest
    start = Position(*blank[0]) if blank else Position(attempt, first - 1)
    return Kept(start, Position(last_attempt, last), stop)


async def next_project(tx: Transaction, after: str) -> str | None:
    """The next project, by its name, that has events."""
    rows = await tx.fetch("SELECT MIN(project_id) FROM events WHERE project_id > $1", after)
    return rows[0][0] if rows else None


async def delete_events_before(tx: Transaction, project: str, created_before: int, limit: int) -> int:
    """Delete old segments of runs that are over, or gone: text that was just being written when its thread was deleted
    may have been left. Return how many."""
    return await tx.execute(
        "DELETE FROM events WHERE (project_id, run_id, attempt, first_seq) IN (SELECT e.project_id, e.run_id,"
        " e.attempt, e.first_seq FROM events e LEFT JOIN runs r ON r.project_id = e.project_id AND r.id = e.run_id"
        " WHERE e.project_id = $1 AND e.created_at < $2 AND COALESCE(r.holds_thread, 0) = 0"
        f" AND COALESCE(r.status, '') <> 'queued' LIMIT {limit})",
        project,
        created_before,
    )


async def blank_run_events(tx: Transaction, project: str, run_id: str) -> None:
    """Take the text of a run's events away; their numbers stay taken, so that later ones go on after them.

    The run is written as it is, so that a transaction which adds events to it does so before, or sees what is gone.
    """
    await tx.execute("UPDATE runs SET attempt = attempt WHERE project_id = $1 AND id = $2", project, run_id)
    await tx.execute("UPDATE events SET data = $3 WHERE project_id = $1 AND run_id = $2", project, run_id, b"")
