"""Webhooks: the endpoints that callers register, the events that are recorded for them, and the log of deliveries.

An event is recorded in the transaction that makes it true: one row for each endpoint that wants it. Who sends them is
`deliveries.py`. Events tell ids, statuses and codes, and never the text of a message.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, UnsetType

from afterglow.addresses import NotAllowed, target_of
from afterglow.audit import carry_out
from afterglow.contracts import House, Store, Transaction
from afterglow.errors import InvalidRequest, NotFound
from afterglow.ids import new_id
from afterglow.objects import (
    DAY_S,
    WEBHOOK_EVENT_TYPES,
    AuditLog,
    CreateWebhookEndpoint,
    FileCounts,
    FileStatus,
    Json,
    ModifyWebhookEndpoint,
    Run,
    VectorStoreFile,
    VectorStoreFileBatch,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEndpointWithSecret,
    WebhookEvent,
)
from afterglow.rows import vector_store_files as file_rows
from afterglow.rows import webhooks as rows
from afterglow.rows.audit import Actor, insert_act
from afterglow.rows.projects import touch_project
from afterglow.rows.requests import Origin, insert_request
from afterglow.rows.webhooks import EndpointRow
from afterglow.runs.states import TERMINAL
from afterglow.signing import SECRET_PREFIX, new_secret

MAX_ENDPOINTS = 32
OLD_SECRET_S = DAY_S
TIDY_LIMIT = 500


def no_endpoint(endpoint_id: str) -> NotFound:
    return NotFound.of("webhook endpoint", endpoint_id)


def no_delivery(delivery_id: str) -> NotFound:
    return NotFound.of("delivery", delivery_id)


# --- endpoints -------------------------------------------------------------------------------------------------


async def create_endpoint(
    house: House, actor: Actor, project: str, body: CreateWebhookEndpoint, origin: Origin
) -> WebhookEndpointWithSecret:
    """Raises InvalidRequest for a URL that may not be asked, and for event types that there are not."""
    _check(house, body.url, body.event_types)
    now, secret = house.clock.now(), new_secret()
    endpoint = WebhookEndpoint(
        id=new_id("whe"),
        created_at=int(now),
        updated_at=int(now),
        name=body.name,
        url=body.url,
        event_types=body.event_types,
        signing_secret_hint=_hint(secret),
        status=body.status,
        metadata=body.metadata or {},
    )

    async def work(tx: Transaction) -> tuple[None, AuditLog]:
        await touch_project(tx, project)
        if len(await rows.get_endpoints(tx, project)) >= MAX_ENDPOINTS:
            raise InvalidRequest(f"A project can have {MAX_ENDPOINTS} webhook endpoints.")
        await rows.insert_endpoint(tx, project, EndpointRow(endpoint, secret), round(now * 1_000_000))
        await insert_request(tx, project, origin, endpoint.id, int(now))
        return None, await _noted(tx, now, actor, "created", project, endpoint.id, {"data": _open_part(body)})

    await carry_out(house.store, actor, work)
    return _with_secret(endpoint, secret)


async def modify_endpoint(
    house: House, actor: Actor, project: str, endpoint_id: str, body: ModifyWebhookEndpoint
) -> WebhookEndpoint:
    """Change what `body` names. What is recorded already goes to the URL as it is when it is sent."""
    _check(house, body.url, body.event_types)
    now = house.clock.now()

    async def work(tx: Transaction) -> tuple[WebhookEndpoint, AuditLog | None]:
        row = await _endpoint(tx, project, endpoint_id)
        endpoint = row.endpoint
        before = msgspec.structs.replace(endpoint)
        for name in ("url", "event_types", "name", "status"):
            if (value := getattr(body, name)) is not UNSET:
                setattr(endpoint, name, value)
        if body.metadata is not UNSET:
            endpoint.metadata = body.metadata or {}
        if body.status is not UNSET:
            endpoint.disabled_reason = None
        if endpoint == before:
            return endpoint, None
        endpoint.updated_at = int(now)
        await rows.update_endpoint(tx, project, row)
        asked = _open_part(body)
        return endpoint, await _noted(tx, now, actor, "updated", project, endpoint_id, {"changes_requested": asked})

    return await carry_out(house.store, actor, work)


async def rotate_secret(
    house: House, actor: Actor, project: str, endpoint_id: str, keep_old_s: int, origin: Origin
) -> WebhookEndpointWithSecret:
    """keep_old_s: so long the secret until now signs beside the new one; 0: not at all."""
    now = house.clock.now()

    async def replace(tx: Transaction, row: EndpointRow, secret: str) -> EndpointRow:
        await insert_request(tx, project, origin, endpoint_id, int(now))
        kept = (row.secret, int(now) + keep_old_s) if keep_old_s else (None, None)
        return EndpointRow(row.endpoint, secret, *kept)

    return await _replace_secret(house, actor, project, endpoint_id, replace)


async def renew_secret(house: House, actor: Actor, project: str, endpoint_id: str) -> WebhookEndpointWithSecret:
    """In place of a secret that nobody has seen; the one before it signs as long as it would have."""

    async def replace(tx: Transaction, row: EndpointRow, secret: str) -> EndpointRow:
        return row._replace(secret=secret)

    return await _replace_secret(house, actor, project, endpoint_id, replace)


async def _replace_secret(
    house: House,
    actor: Actor,
    project: str,
    endpoint_id: str,
    replace: Callable[[Transaction, EndpointRow, str], Awaitable[EndpointRow]],
) -> WebhookEndpointWithSecret:
    now, secret = house.clock.now(), new_secret()

    async def work(tx: Transaction) -> tuple[WebhookEndpoint, AuditLog]:
        row = await replace(tx, await _endpoint(tx, project, endpoint_id), secret)
        row.endpoint.signing_secret_hint = _hint(secret)
        row.endpoint.updated_at = int(now)
        await rows.update_endpoint(tx, project, row)
        return row.endpoint, await _noted(tx, now, actor, "secret_rotated", project, endpoint_id, {})

    return _with_secret(await carry_out(house.store, actor, work), secret)


async def delete_endpoint(house: House, actor: Actor, project: str, endpoint_id: str) -> None:
    """With its log; what waits to be sent is not sent any more."""

    async def work(tx: Transaction) -> tuple[None, AuditLog]:
        if not await rows.delete_endpoint(tx, project, endpoint_id):
            raise no_endpoint(endpoint_id)
        return None, await _noted(tx, house.clock.now(), actor, "deleted", project, endpoint_id, {})

    await carry_out(house.store, actor, work)


async def _noted(
    tx: Transaction, now: float, actor: Actor, done: str, project: str, endpoint_id: str, details: Json
) -> AuditLog:
    details = {"id": endpoint_id, **details}
    return await insert_act(tx, now, actor, f"webhook_endpoint.{done}", project, details, endpoint_id)


async def _endpoint(tx: Transaction, project: str, endpoint_id: str) -> EndpointRow:
    row = await rows.get_endpoint(tx, project, endpoint_id)
    if row is None:
        raise no_endpoint(endpoint_id)
    return row


def _open_part(body: CreateWebhookEndpoint | ModifyWebhookEndpoint) -> Json:
    """What of a body the audit log may keep: of the URL the host alone, for paths and queries hold secrets."""
    given: Json = {name: getattr(body, name) for name in ("name", "event_types", "status")}
    if body.url is not UNSET:
        given["host"] = urlsplit(body.url).hostname
    return {name: value for name, value in given.items() if value is not UNSET}


def _with_secret(endpoint: WebhookEndpoint, secret: str) -> WebhookEndpointWithSecret:
    fields: dict[str, Any] = {name: getattr(endpoint, name) for name in endpoint.__struct_fields__}
    return WebhookEndpointWithSecret(**fields, signing_secret=secret)


def _hint(secret: str) -> str:
    return f"{SECRET_PREFIX}...{secret[-4:]}"


def _check(house: House, url: str | UnsetType, event_types: Sequence[str] | UnsetType) -> None:
    if url is not UNSET:
        private = house.settings.private_webhooks
        try:
            target_of(url, schemes=("http", "https") if private else ("https",), allow_private=private)
        except NotAllowed as why:
            said = "" if private else " The setting private_webhooks allows private addresses and plain http."
            raise InvalidRequest(f"Invalid 'url': {why}.{said}", param="url", code="invalid_value") from None
    for index, pattern in enumerate(event_types or ()):
        if not any(wants([pattern], type) for type in WEBHOOK_EVENT_TYPES):
            raise InvalidRequest(
                f"Invalid value: '{pattern[:100]}'. Supported values are: '*', beginnings such as 'thread.run.*', and"
                f" {', '.join(repr(type) for type in WEBHOOK_EVENT_TYPES)}.",
                param=f"event_types[{index}]",
                code="invalid_value",
            )


def wants(patterns: Sequence[str], event_type: str) -> bool:
    """Whether an endpoint with these `event_types` is told of an event. `thread.*` stands for all that begin so."""
    return any(
        event_type.startswith(pattern[:-1]) if pattern == "*" or pattern.endswith(".*") else event_type == pattern
        for pattern in patterns
    )


# --- events ----------------------------------------------------------------------------------------------------


async def record_run(tx: Transaction, project: str, run: Run, now: float) -> bool:
    """In the transaction that gives a run its status: record it, if it is one that is told. Return whether anybody is
    to be told; then, after the commit, wake `House.webhook_queue`."""
    if run.status != "requires_action" and run.status not in TERMINAL:
        return False
    data: Json = {
        "id": run.id,
        "thread_id": run.thread_id,
        "assistant_id": run.assistant_id,
        "status": run.status,
        "last_error_code": run.last_error.code if run.last_error else None,
        "incomplete_reason": run.incomplete_details.reason if run.incomplete_details else None,
    }
    return await _record(tx, project, f"thread.run.{run.status}", run.thread_id, data, now)


async def record_file(tx: Transaction, project: str, file: VectorStoreFile, now: float) -> list[str]:
    """In the transaction that ends a file of a vector store: record that, and tell the batches that wait for it. Return
    the ids of those that are over with it."""
    data: Json = {
        "id": file.id,
        "vector_store_id": file.vector_store_id,
        "status": file.status,
        "last_error_code": file.last_error.code if file.last_error else None,
    }
    await _record(tx, project, f"vector_store.file.{file.status}", file.vector_store_id, data, now)
    return await end_in_batches(tx, project, file.vector_store_id, file.id, file.status, now)


async def end_in_batches(
    tx: Transaction, project: str, store_id: str, file_id: str, status: FileStatus, now: float
) -> list[str]:
    """Tell the batches that wait for a file what became of it, and record the end of those that wait for no other.
    Return the ids of these."""
    over = await file_rows.end_in_batches(tx, project, store_id, file_id, status)
    if over and await rows.get_endpoints(tx, project):
        for batch_id in over:
            batch = await file_rows.get_batch(tx, project, store_id, batch_id)
            assert batch is not None
            await record_batch(tx, project, batch, now)
    return over


async def record_batch(tx: Transaction, project: str, batch: VectorStoreFileBatch, now: float) -> None:
    """As `record_run`, for a file batch, if it is over."""
    if batch.status == "in_progress":
        return
    data: Json = {
        "id": batch.id,
        "vector_store_id": batch.vector_store_id,
        "status": batch.status,
        "file_counts": {name: getattr(batch.file_counts, name) for name in batch.file_counts.__struct_fields__},
    }
    await _record(tx, project, f"vector_store.file_batch.{batch.status}", batch.vector_store_id, data, now)


def sample_data(event_type: str) -> Json:
    """The data of an event that tells of nothing: a receiver finds every key there that the real ones have."""
    _, kind, status = event_type.split(".")
    of_store: Json = {"vector_store_id": "vs_test", "status": status, "test": True}
    if kind == "file_batch":
        return {"id": "vsfb_test", "file_counts": dict.fromkeys(FileCounts.__struct_fields__, 0)} | of_store
    if kind == "file":
        return {"id": "file_test", "last_error_code": None} | of_store
    return {
        "id": "run_test",
        "thread_id": "thread_test",
        "assistant_id": "asst_test",
        "status": status,
        "last_error_code": None,
        "incomplete_reason": None,
        "test": True,
    }


async def _record(tx: Transaction, project: str, event_type: str, owner_id: str, data: Json, now: float) -> bool:
    endpoints = [
        endpoint
        for endpoint in await rows.get_endpoints(tx, project)
        if endpoint.status == "enabled" and wants(endpoint.event_types, event_type)
    ]
    if not endpoints:
        return False
    event = WebhookEvent(id=new_id("evt"), created_at=int(now), type=event_type, data=data)
    for endpoint in endpoints:
        delivery = new_delivery(endpoint.id, event, now)
        await rows.insert_delivery(tx, project, delivery, owner_id, round(now * 1_000_000), now)
    return True


def new_delivery(endpoint_id: str, event: WebhookEvent, now: float) -> WebhookDelivery:
    return WebhookDelivery(
        id=new_id("whd"),
        created_at=int(now),
        webhook_endpoint_id=endpoint_id,
        event_id=event.id,
        event_type=event.type,
        event=event,
        next_try_at=int(now),
    )


# --- the log ---------------------------------------------------------------------------------------------------


async def check_endpoint(tx: Transaction, project: str, endpoint_id: str) -> None:
    """Raise NotFound unless the project has it."""
    await _endpoint(tx, project, endpoint_id)


async def list_newest(
    tx: Transaction, project: str, endpoint_id: str, status: str | None, limit: int = 50
) -> list[WebhookDelivery]:
    """The log as the command shows it. Raises NotFound."""
    await check_endpoint(tx, project, endpoint_id)
    page = await rows.list_deliveries(
        tx, project, endpoint_id, status, limit=limit, order="desc", after=None, before=None
    )
    return [msgspec.json.decode(text, type=WebhookDelivery) for text in page.objects]


async def resend(
    store: Store,
    now: float,
    actor: Actor,
    project: str,
    endpoint_id: str,
    delivery_id: str,
    origin: Origin | None = None,
) -> WebhookDelivery:
    """Make an event due once more, with its own id; should that fail, the waits begin anew. Whoever sends it is to be
    woken. Raises NotFound, and InvalidRequest when the endpoint is disabled or what the event told of was deleted."""

    async def work(tx: Transaction) -> tuple[WebhookDelivery, AuditLog]:
        delivery = await _put_in_line(tx, project, endpoint_id, delivery_id, now)
        if origin is not None:
            await insert_request(tx, project, origin, delivery_id, int(now))
        details: Json = {"id": delivery_id, "data": {"webhook_endpoint_id": endpoint_id}}
        return delivery, await insert_act(tx, now, actor, "webhook_delivery.resent", project, details, delivery_id)

    return await carry_out(store, actor, work)


async def _put_in_line(
    tx: Transaction, project: str, endpoint_id: str, delivery_id: str, now: float
) -> WebhookDelivery:
    row = await _endpoint(tx, project, endpoint_id)
    delivery = await rows.get_delivery(tx, project, endpoint_id, delivery_id)
    if delivery is None:
        raise no_delivery(delivery_id)
    if delivery.event is None:
        raise InvalidRequest("What this event told of was deleted, and the event with it.")
    if row.endpoint.status == "disabled":
        raise InvalidRequest(f"The webhook endpoint '{endpoint_id}' is disabled. Enable it first.")
    delivery.status, delivery.next_try_at = "pending", int(now)
    await rows.update_delivery(tx, project, delivery, now)
    return delivery


async def tidy_deliveries(house: House) -> None:
    """Delete what has been in the log for long enough, and secrets that sign no more."""
    now = house.clock.now()
    before = int(now) - house.settings.webhook_retention_d * DAY_S

    async def work(tx: Transaction) -> int:
        await rows.delete_old_secrets(tx, now)
        return await rows.delete_deliveries_before(tx, before, TIDY_LIMIT)

    while await house.store.write(work, rowwise=True) >= TIDY_LIMIT:
        pass
