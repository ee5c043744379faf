"""Rows of `webhook_endpoints` and `webhook_deliveries`. A delivery that is pending is a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from afterglow.contracts import SqlValue, Transaction
from afterglow.objects import WebhookDelivery, WebhookEndpoint
from afterglow.rows.lists import PASSING_OVER, ListPage, list_page
from afterglow.rows.requests import delete_answers


class EndpointRow(NamedTuple):
    """old_secret signs beside `secret` until `old_secret_until`, Unix seconds."""

    endpoint: WebhookEndpoint
    secret: str
    old_secret: str | None = None
    old_secret_until: int | None = None


class Claim(NamedTuple):
    """A delivery that is somebody's now. number: which claim of it this is, from 1. failures: tries that went wrong
    since it was recorded, or last resent."""

    project: str
    number: int
    failures: int
    delivery: WebhookDelivery


# --- endpoints -------------------------------------------------------------------------------------------------


async def get_endpoint_object(tx: Transaction, project: str, endpoint_id: str) -> str | None:
    rows = await tx.fetch(
        "SELECT object FROM webhook_endpoints WHERE project_id = $1 AND id = $2", project, endpoint_id
    )
    return rows[0][0] if rows else None


async def get_endpoint(tx: Transaction, project: str, endpoint_id: str) -> EndpointRow | None:
    rows = await tx.fetch(
        "SELECT object, secret, old_secret, old_secret_until FROM webhook_endpoints WHERE project_id = $1 AND id = $2",
        project,
        endpoint_id,
    )
    return EndpointRow(msgspec.json.decode(rows[0][0], type=WebhookEndpoint), *rows[0][1:]) if rows else None


async def list_endpoints(
    tx: Transaction, project: str, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    return await list_page(
        tx, "webhook_endpoints", "project_id = $1", (project,), limit=limit, order=order, after=after, before=before
    )


async def get_endpoints(tx: Transaction, project: str) -> list[WebhookEndpoint]:
    """All of a project's: as a rule none, and the whole cost of whatever could have been told."""
    rows = await tx.fetch("SELECT object FROM webhook_endpoints WHERE project_id = $1", project)
    return [msgspec.json.decode(text, type=WebhookEndpoint) for (text,) in rows]


async def insert_endpoint(tx: Transaction, project: str, row: EndpointRow, seq: int) -> None:
    await tx.execute(
        "INSERT INTO webhook_endpoints (project_id, id, seq, created_at, secret, object)"
        " VALUES ($1, $2, $3, $4, $5, $6)",
        project,
        row.endpoint.id,
        seq,
        row.endpoint.created_at,
        row.secret,
        msgspec.json.encode(row.endpoint).decode(),
    )


async def update_endpoint(tx: Transaction, project: str, row: EndpointRow) -> None:
    await tx.execute(
        "UPDATE webhook_endpoints SET secret = $3, old_secret = $4, old_secret_until = $5, object = $6"
        " WHERE project_id = $1 AND id = $2",
        project,
        row.endpoint.id,
        *row[1:],
        msgspec.json.encode(row.endpoint).decode(),
    )


async def delete_endpoint(tx: Transaction, project: str, endpoint_id: str) -> bool:
    """With its log. A delivery that is recorded in the same moment is swept later."""
    await tx.execute("DELETE FROM webhook_deliveries WHERE project_id = $1 AND endpoint_id = $2", project, endpoint_id)
    await delete_answers(tx, project, endpoint_id)
    return await tx.execute("DELETE FROM webhook_endpoints WHERE project_id = $1 AND id = $2", project, endpoint_id) > 0


async def delete_old_secrets(tx: Transaction, now: float) -> int:
    return await tx.execute(
        "UPDATE webhook_endpoints SET old_secret = NULL, old_secret_until = NULL WHERE old_secret_until <= $1", now
    )


# --- deliveries ------------------------------------------------------------------------------------------------


async def get_delivery(tx: Transaction, project: str, endpoint_id: str, delivery_id: str) -> WebhookDelivery | None:
    text = await get_delivery_object(tx, project, endpoint_id, delivery_id)
    return None if text is None else msgspec.json.decode(text, type=WebhookDelivery)


async def get_delivery_object(tx: Transaction, project: str, endpoint_id: str, delivery_id: str) -> str | None:
    rows = await tx.fetch(
        "SELECT object FROM webhook_deliveries WHERE project_id = $1 AND endpoint_id = $2 AND id = $3",
        project,
        endpoint_id,
        delivery_id,
    )
    return rows[0][0] if rows else None


async def list_deliveries(
    tx: Transaction,
    project: str,
    endpoint_id: str,
    status: str | None,
    *,
    limit: int,
    order: str,
    after: str | None,
    before: str | None,
) -> ListPage:
    where = "project_id = $1 AND endpoint_id = $2"
    values: tuple[SqlValue, ...] = (project, endpoint_id)
    return await list_page(
        tx, "webhook_deliveries", where, values, limit=limit, order=order, after=after, before=before, status=status
    )


async def insert_delivery(
    tx: Transaction, project: str, delivery: WebhookDelivery, owner_id: str, seq: int, due_at: float
) -> None:
    await tx.execute(
        "INSERT INTO webhook_deliveries"
        " (project_id, endpoint_id, id, seq, created_at, owner_id, status, claims, due_at, object)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, 0, $8, $9)",
        project,
        delivery.webhook_endpoint_id,
        delivery.id,
        seq,
        delivery.created_at,
        owner_id,
        delivery.status,
        due_at,
        msgspec.json.encode(delivery).decode(),
    )


async def update_delivery(tx: Transaction, project: str, delivery: WebhookDelivery, due_at: float | None) -> None:
    """Write it; whoever has it in hand loses it."""
    await tx.execute(
        "UPDATE webhook_deliveries SET status = $3, due_at = $4, object = $5, worker = NULL, failures = 0,"
        " claims = claims + 1 WHERE project_id = $1 AND id = $2",
        project,
        delivery.id,
        delivery.status,
        due_at,
        msgspec.json.encode(delivery).decode(),
    )


async def forget_events(tx: Transaction, project: str, owner_id: str) -> None:
    """A thread or a vector store is deleted: nothing more is told of it, and the log does not say what was."""
    rows = await tx.fetch(
        "SELECT object FROM webhook_deliveries WHERE project_id = $1 AND owner_id = $2", project, owner_id
    )
    for (text,) in rows:
        delivery = msgspec.json.decode(text, type=WebhookDelivery)
        delivery.event = None
        if delivery.status == "pending":
            delivery.status, delivery.next_try_at = "cancelled", None
        await update_delivery(tx, project, delivery, None)


async def delete_deliveries_before(tx: Transaction, created_before: int, limit: int) -> int:
    """Those that are over, and those of endpoints that are gone."""
    return await tx.execute(
        "DELETE FROM webhook_deliveries WHERE (project_id, id) IN (SELECT project_id, id FROM webhook_deliveries d"
        " WHERE created_at < $1 AND (status <> 'pending' OR NOT EXISTS"
        " (SELECT 1 FROM webhook_endpoints e WHERE e.project_id = d.project_id AND e.id = d.endpoint_id))"
        f" LIMIT {limit})",
        created_before,
    )


# --- jobs ------------------------------------------------------------------------------------------------------


async def claim_deliveries(
    tx: Transaction, worker: str, now: float, until: float, limit: int, in_hand: Mapping[str, int], most_of_one: int
) -> list[Claim]:
    """Deliveries that are due, of all projects, the oldest first; they are `worker`'s until then.

    in_hand: how many of an endpoint's the worker has; `most_of_one` at most.
    """
    busy = [endpoint_id for endpoint_id, count in in_hand.items() if count >= most_of_one]
    numbers = ", ".join(f"${number + 2}" for number in range(len(busy)))
    rows = await tx.fetch(
        "SELECT project_id, claims, failures, object FROM webhook_deliveries WHERE status = 'pending' AND due_at <= $1"
        + (f" AND endpoint_id NOT IN ({numbers})" if busy else "")
        + f" ORDER BY due_at LIMIT {limit} {PASSING_OVER}",
        now,
        *busy,
    )
    claims: list[Claim] = []
    counts = dict(in_hand)
    for project, claimed, failures, text in rows:
        delivery = msgspec.json.decode(text, type=WebhookDelivery)
        endpoint_id = delivery.webhook_endpoint_id
        counts[endpoint_id] = counts.get(endpoint_id, 0) + 1
        if counts[endpoint_id] <= most_of_one:
            claims.append(Claim(project, claimed + 1, failures, delivery))
    for claim in claims:
        await take_delivery(tx, claim, worker, until)
    return claims


async def take_delivery(tx: Transaction, claim: Claim, worker: str, until: float) -> None:
    """Give it to `worker` until then."""
    await tx.execute(
        "UPDATE webhook_deliveries SET claims = $3, worker = $4, due_at = $5 WHERE project_id = $1 AND id = $2",
        claim.project,
        claim.delivery.id,
        claim.number,
        worker,
        until,
    )


async def close_claim(tx: Transaction, claim: Claim, delivery: WebhookDelivery, due_at: float | None) -> bool:
    """Write the delivery as the claim's try has left it, unless the claim has been lost meanwhile. due_at: None when
    there is no other try."""
    written = await tx.execute(
        "UPDATE webhook_deliveries SET status = $4, due_at = $5, failures = $6, object = $7, worker = NULL"
        " WHERE project_id = $1 AND id = $2 AND claims = $3",
        claim.project,
        claim.delivery.id,
        claim.number,
        delivery.status,
        due_at,
        claim.failures + 1,
        msgspec.json.encode(delivery).decode(),
    )
    return written > 0


async def delete_delivery(tx: Transaction, claim: Claim) -> None:
    await tx.execute(
        "DELETE FROM webhook_deliveries WHERE project_id = $1 AND id = $2", claim.project, claim.delivery.id
    )


async def put_back(tx: Transaction, claims: Iterable[Claim], now: float) -> None:
    """Give them up untried."""
    for claim in claims:
        await tx.execute(
            "UPDATE webhook_deliveries SET due_at = $4, worker = NULL"
            " WHERE project_id = $1 AND id = $2 AND claims = $3 AND status = 'pending'",
            claim.project,
            claim.delivery.id,
            claim.number,
            now,
        )


async def release_deliveries(tx: Transaction) -> int:
    """Free all that somebody had, for a start when no other process can be at work; return how many."""
    return await tx.execute(
        "UPDATE webhook_deliveries SET due_at = 0, worker = NULL WHERE worker IS NOT NULL AND status = 'pending'"
    )
