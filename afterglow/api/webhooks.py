"""/v1/webhook_endpoints, as the SDKs manage them, and the log of deliveries beside."""

from __future__ import annotations

from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import Response

from afterglow import deliveries, webhooks
from afterglow.api.answers import actor_of, house_of, origin_of, project_of, reply, reply_list, reply_stored
from afterglow.api.bodies import parse
from afterglow.api.pages import query_choice
from afterglow.contracts import House, Transaction
from afterglow.objects import (
    WEBHOOK_EVENT_TYPES,
    CreateWebhookEndpoint,
    Deleted,
    DeliveryStatus,
    ModifyWebhookEndpoint,
    RotateWebhookSecret,
    SendTestEvent,
    WebhookEventTypes,
)
from afterglow.rows import webhooks as rows
from afterglow.rows.audit import Actor
from afterglow.rows.lists import ListPage
from afterglow.webhooks import OLD_SECRET_S, check_endpoint, no_delivery, no_endpoint

DELIVERY_STATUSES: tuple[DeliveryStatus, ...] = get_args(DeliveryStatus)


def _of(request: Request) -> tuple[House, Actor, str]:
    return house_of(request), actor_of(request), project_of(request)


async def create_webhook_endpoint(request: Request) -> Response:
    """POST /webhook_endpoints. The answer shows the secret, this once."""
    body = await parse(request, CreateWebhookEndpoint)
    origin = await origin_of(request)
    return reply(await webhooks.create_endpoint(*_of(request), body, origin))


async def list_webhook_endpoints(request: Request) -> Response:
    """GET /webhook_endpoints"""

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        return await rows.list_endpoints(tx, project_of(request), **cursor)

    return await reply_list(request, "webhook endpoint", page)


async def retrieve_webhook_endpoint(request: Request) -> Response:
    """GET /webhook_endpoints/{endpoint_id}"""
    endpoint_id = request.path_params["endpoint_id"]

    async def work(tx: Transaction) -> str | None:
        return await rows.get_endpoint_object(tx, project_of(request), endpoint_id)

    return await reply_stored(request, work, lambda: no_endpoint(endpoint_id))


async def modify_webhook_endpoint(request: Request) -> Response:
    """POST /webhook_endpoints/{endpoint_id}"""
    body = await parse(request, ModifyWebhookEndpoint)
    endpoint_id = request.path_params["endpoint_id"]
    return reply(await webhooks.modify_endpoint(*_of(request), endpoint_id, body))


async def delete_webhook_endpoint(request: Request) -> Response:
    """DELETE /webhook_endpoints/{endpoint_id}. With its log."""
    endpoint_id = request.path_params["endpoint_id"]
    await webhooks.delete_endpoint(*_of(request), endpoint_id)
    return reply(Deleted(id=endpoint_id, object="webhook_endpoint.deleted"))


async def rotate_webhook_secret(request: Request) -> Response:
    """POST /webhook_endpoints/{endpoint_id}/rotate_secret. The answer shows the new secret, this once."""
    body = await parse(request, RotateWebhookSecret, empty_ok=True)
    keep_old_s = OLD_SECRET_S if body.keep_old_secret_active_for_24_hours else 0
    endpoint_id, origin = request.path_params["endpoint_id"], await origin_of(request)
    return reply(await webhooks.rotate_secret(*_of(request), endpoint_id, keep_old_s, origin))


async def renew_webhook_secret(request: Request) -> Response:
    """What a retry is told of a secret that was made, and whose answer nobody heard: another one takes its place."""
    return reply(await webhooks.renew_secret(*_of(request), request.path_params["endpoint_id"]))


async def test_webhook_endpoint(request: Request) -> Response:
    """POST /webhook_endpoints/{endpoint_id}/test. Sends an event that tells of nothing, and waits for the answer."""
    body = await parse(request, SendTestEvent, empty_ok=True)
    endpoint_id = request.path_params["endpoint_id"]
    return reply(await deliveries.send_test(house_of(request), project_of(request), endpoint_id, body.event_type))


async def list_webhook_deliveries(request: Request) -> Response:
    """GET /webhook_endpoints/{endpoint_id}/deliveries"""
    endpoint_id = request.path_params["endpoint_id"]
    status = query_choice(request, "status", DELIVERY_STATUSES)

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        await check_endpoint(tx, project_of(request), endpoint_id)
        return await rows.list_deliveries(tx, project_of(request), endpoint_id, status, **cursor)

    return await reply_list(request, "delivery", page)


async def retrieve_webhook_delivery(request: Request) -> Response:
    """GET /webhook_endpoints/{endpoint_id}/deliveries/{delivery_id}"""
    endpoint_id, delivery_id = request.path_params["endpoint_id"], request.path_params["delivery_id"]

    async def work(tx: Transaction) -> str | None:
        await check_endpoint(tx, project_of(request), endpoint_id)
        return await rows.get_delivery_object(tx, project_of(request), endpoint_id, delivery_id)

    return await reply_stored(request, work, lambda: no_delivery(delivery_id))


async def resend_webhook_delivery(request: Request) -> Response:
    """POST /webhook_endpoints/{endpoint_id}/deliveries/{delivery_id}/resend. Sends the event once more, as it was."""
    endpoint_id, delivery_id = request.path_params["endpoint_id"], request.path_params["delivery_id"]
    house, project, origin = house_of(request), project_of(request), await origin_of(request)
    delivery = await webhooks.resend(
        house.store, house.clock.now(), actor_of(request), project, endpoint_id, delivery_id, origin
    )
    house.webhook_queue.wake()
    return reply(delivery)


async def list_webhook_event_types(request: Request) -> Response:
    """GET /webhook_event_types. Names of all events that there are."""
    return reply(WebhookEventTypes(data=list(WEBHOOK_EVENT_TYPES)))
