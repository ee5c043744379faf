"""Rows of `requests`: every creating POST, written with what it created; and of `answers`, what was said to those with
an idempotency key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from afterglow.contracts import START, Position, Transaction
from afterglow.errors import Conflict

KEYS_KEPT_S = 24 * 3600


class Origin(NamedTuple):
    """Where a creating POST came from. id: our request id; route: name of what answers it; body_hash: hex, of the path,
    the query and the body; retry_count: as its SDK counts; key: its idempotency key, whose row is there already."""

    id: str
    key_id: str
    route: str
    body_hash: str
    retry_count: int = 0
    key: str | None = None


class Asked(NamedTuple):
    """A request that makes something outside the project that it is in."""

    project: str
    origin: Origin


class Result(NamedTuple):
    """What a request came to. object_id: empty while that is not known. since: where its stream begins."""

    request_id: str
    object_id: str
    since: Position
    created_at: int


class Claim(NamedTuple):
    """The row of an idempotency key, and the answer that was given, if it is still kept."""

    route: str
    body_hash: str
    result: Result
    answer: tuple[int, str] | None


async def insert_request(
    tx: Transaction, project: str, origin: Origin, object_id: str, now: int, since: Position = START
) -> None:
    """Raises Conflict when the idempotency key was given to another request meanwhile."""
    if origin.key is None:
        await _insert(tx, project, origin, object_id, now, since)
        return
    found = await tx.execute(
        "UPDATE requests SET object_id = $3, since = $4 WHERE project_id = $1 AND id = $2",
        project,
        origin.id,
        object_id,
        _written(since),
    )
    if not found:
        raise Conflict("Another request with this idempotency key has taken its place.", code="idempotency_key_in_use")


async def _insert(
    tx: Transaction, project: str, origin: Origin, object_id: str, now: int, since: Position = START
) -> bool:
    return bool(
        await tx.execute(
            "INSERT INTO requests (project_id, id, key_id, route, body_hash, retry_count, idempotency_key, object_id,"
            " created_at, since) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING",
            project,
            *origin,
            object_id,
            now,
            _written(since),
        )
    )


async def mark_answered(tx: Transaction, project: str, request_id: str, answered: bool) -> None:
    await tx.execute(
        "UPDATE requests SET answered = $3 WHERE project_id = $1 AND id = $2", project, request_id, int(answered)
    )


async def delete_requests_before(tx: Transaction, created_before: int, limit: int) -> int:
    deleted = 0
    for table, key in (("answers", "request_id"), ("requests", "id")):
        deleted += await tx.execute(
            f"DELETE FROM {table} WHERE (project_id, {key}) IN"
            f" (SELECT project_id, {key} FROM {table} WHERE created_at < $1 LIMIT {limit})",
            created_before,
        )
    return deleted


# --- retries without a key ---------------------------------------------------------------------------------------


async def list_unanswered(tx: Transaction, project: str, origin: Origin, created_after: int) -> list[Result]:
    """What the request before this retry may have come to, oldest first."""
    rows = await tx.fetch(
        "SELECT id, object_id, since, created_at FROM requests"
        " WHERE project_id = $1 AND key_id = $2 AND route = $3 AND body_hash = $4 AND retry_count = $5"
        " AND created_at >= $6 AND matched = 0 AND answered = 0 AND idempotency_key IS NULL ORDER BY created_at, id",
        project,
        origin.key_id,
        origin.route,
        origin.body_hash,
        origin.retry_count - 1,
        created_after,
    )
    return [_result(*row) for row in rows]


async def match_retry(tx: Transaction, project: str, origin: Origin, first: Result, now: int) -> bool:
    """Give this retry what the request before it came to, unless that was answered or given away meanwhile."""
    found = await tx.execute(
        "UPDATE requests SET matched = 1 WHERE project_id = $1 AND id = $2 AND matched = 0 AND answered = 0",
        project,
        first.request_id,
    )
    return bool(found) and await _insert(tx, project, origin, first.object_id, now, first.since)


def _written(since: Position) -> str:
    return f"{since.attempt}.{since.sequence}"


def _result(request_id: str, object_id: str, since: str, created_at: int) -> Result:
    attempt, _, sequence = since.partition(".")
    return Result(request_id, object_id, Position(int(attempt or 0), int(sequence or 0)), created_at)


# --- idempotency keys --------------------------------------------------------------------------------------------


async def claim_key(tx: Transaction, project: str, origin: Origin, now: int) -> Claim | None:
    """Take an idempotency key for this request, and return None; or, if it is taken, whose it is."""
    await tx.execute(
        "DELETE FROM requests WHERE project_id = $1 AND key_id = $2 AND idempotency_key = $3 AND created_at <= $4",
        project,
        origin.key_id,
        origin.key,
        now - KEYS_KEPT_S,
    )
    if await _insert(tx, project, origin, "", now):
        return None
    rows = await tx.fetch(
        "SELECT route, body_hash, id, requests.object_id, since, requests.created_at, status, body FROM requests"
        " LEFT JOIN answers ON answers.project_id = requests.project_id AND request_id = id"
        " WHERE requests.project_id = $1 AND key_id = $2 AND idempotency_key = $3",
        project,
        origin.key_id,
        origin.key,
    )
    route, body_hash, *result, status, body = rows[0]
    return Claim(route, body_hash, _result(*result), None if status is None else (status, body))


async def release_key(tx: Transaction, project: str, request_id: str) -> None:
    """Nothing came of the request that holds a key: the next may have it."""
    await tx.execute("DELETE FROM requests WHERE project_id = $1 AND id = $2 AND object_id = ''", project, request_id)


async def insert_answer(
    tx: Transaction, project: str, origin: Origin, quoted: Sequence[str], status: int, body: str, now: int
) -> None:
    """quoted: ids of the object that is answered, and of the one that it is in."""
    await tx.execute(
        "INSERT INTO answers (project_id, request_id, object_id, owner_id, created_at, status, body)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7)",
        project,
        origin.id,
        *quoted,
        now,
        status,
        body,
    )


async def give_answers(tx: Transaction, project: str, object_id: str, owner_id: str) -> None:
    """What quotes an object is deleted with `owner_id`, too, from now on."""
    await tx.execute(
        "UPDATE answers SET owner_id = $3 WHERE project_id = $1 AND object_id = $2", project, object_id, owner_id
    )


async def delete_answers_in(tx: Transaction, project: str, object_id: str, owner_id: str) -> None:
    """As `delete_answers`, of an object that is taken out of its owner, and stays elsewhere."""
    await tx.execute(
        "DELETE FROM answers WHERE project_id = $1 AND object_id = $2 AND owner_id = $3", project, object_id, owner_id
    )


async def delete_answers(tx: Transaction, project: str, object_id: str) -> None:
    """What quotes an object must not outlive it."""
    for column in ("object_id", "owner_id"):
        await tx.execute(f"DELETE FROM answers WHERE project_id = $1 AND {column} = $2", project, object_id)
