"""Statements for what is limited: rows of `rates` and `sandbox_use`, and counts of what a project or a key has.

key_id is empty where the whole project is meant.
"""

from __future__ import annotations

import msgspec

from afterglow.contracts import SqlValue, Transaction
from afterglow.objects import File


async def get_rate(tx: Transaction, project: str, key_id: str, kind: str) -> tuple[float, float] | None:
    """(level, at) of a bucket."""
    rows = await tx.fetch(
        "SELECT level, at FROM rates WHERE project_id = $1 AND key_id = $2 AND kind = $3", project, key_id, kind
    )
    return (rows[0][0], rows[0][1]) if rows else None


async def set_rate(tx: Transaction, project: str, key_id: str, kind: str, level: float, at: float) -> None:
    await tx.execute(
        "INSERT INTO rates (project_id, key_id, kind, level, at) VALUES ($1, $2, $3, $4, $5)"
        " ON CONFLICT (project_id, key_id, kind) DO UPDATE SET level = excluded.level, at = excluded.at",
        project,
        key_id,
        kind,
        level,
        at,
    )


async def count_active_runs(tx: Transaction, project: str, key_id: str) -> int:
    where, values = _whose(project, key_id)
    rows = await tx.fetch(f"SELECT COUNT(*) FROM runs WHERE {where} AND holds_thread = 1", *values)
    return int(rows[0][0])


async def sum_file_bytes(tx: Transaction, project: str, key_id: str = "") -> int:
    """Of files; for the whole project also of the parts of uploads. Files without a size count nothing."""
    where, values = _whose(project, key_id)
    rows = await tx.fetch(f"SELECT COALESCE(SUM(size_bytes), 0) FROM files WHERE {where}", *values)
    parts = 0
    if not key_id:
        [(parts,)] = await tx.fetch(
            "SELECT COALESCE(SUM(size_bytes), 0) FROM upload_parts WHERE project_id = $1", project
        )
    return int(rows[0][0]) + int(parts)


async def fill_in_sizes(tx: Transaction, project: str) -> None:
    """Of files that were stored before the column was there."""
    rows = await tx.fetch("SELECT id, object FROM files WHERE project_id = $1 AND size_bytes IS NULL", project)
    for file_id, text in rows:
        await tx.execute(
            "UPDATE files SET size_bytes = $3 WHERE project_id = $1 AND id = $2",
            project,
            file_id,
            msgspec.json.decode(text, type=File).bytes,
        )


async def get_sandbox_seconds(tx: Transaction, project: str, key_id: str, day: int) -> float:
    rows = await tx.fetch(
        "SELECT seconds FROM sandbox_use WHERE project_id = $1 AND key_id = $2 AND day = $3", project, key_id, day
    )
    return float(rows[0][0]) if rows else 0.0


async def add_sandbox_seconds(tx: Transaction, project: str, key_id: str, day: int, seconds: float) -> None:
    """Add to the day's, and forget the days before."""
    await tx.execute("DELETE FROM sandbox_use WHERE project_id = $1 AND key_id = $2 AND day < $3", project, key_id, day)
    await tx.execute(
        "INSERT INTO sandbox_use (project_id, key_id, day, seconds) VALUES ($1, $2, $3, $4)"
        " ON CONFLICT (project_id, key_id, day) DO UPDATE SET seconds = sandbox_use.seconds + excluded.seconds",
        project,
        key_id,
        day,
        seconds,
    )


async def forget_key(tx: Transaction, key_id: str) -> None:
    """Delete what is kept of a key's use, wherever it was used."""
    await tx.execute("DELETE FROM rates WHERE key_id = $1", key_id)
    await tx.execute("DELETE FROM sandbox_use WHERE key_id = $1", key_id)


def _whose(project: str, key_id: str) -> tuple[str, tuple[SqlValue, ...]]:
    return ("project_id = $1 AND key_id = $2", (project, key_id)) if key_id else ("project_id = $1", (project,))
