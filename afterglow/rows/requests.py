"""Rows of `requests`: every creating POST, written with what it created."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from afterglow.contracts import Transaction


class Origin(NamedTuple):
    """Where a creating POST came from. id: our request id; route: method and path pattern; body_hash: hex."""

    id: str
    key_id: str
    route: str
    body_hash: str


async def insert_request(tx: Transaction, project: str, origin: Origin, object_id: str, now: int) -> None:
    await tx.execute(
        "INSERT INTO requests (project_id, id, key_id, route, body_hash, object_id, created_at)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7)",
        project,
        *origin,
        object_id,
        now,
    )


async def mark_answered(tx: Transaction, project_and_ids: Sequence[tuple[str, str]]) -> None:
    for project, request_id in project_and_ids:
        await tx.execute("UPDATE requests SET answered = 1 WHERE project_id = $1 AND id = $2", project, request_id)


async def delete_requests_before(tx: Transaction, created_before: int, limit: int) -> int:
    return await tx.execute(
        "DELETE FROM requests WHERE (project_id, id) IN"
        f" (SELECT project_id, id FROM requests WHERE created_at < $1 LIMIT {limit})",
        created_before,
    )
