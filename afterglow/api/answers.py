"""Answers in the API's shape, and what every route asks of its request."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow.api.attempts import Attempt
from afterglow.api.pages import list_body, read_page
from afterglow.contracts import House, Transaction, Work
from afterglow.errors import NotFound
from afterglow.rows.audit import Actor
from afterglow.rows.lists import ListPage, UnknownCursor
from afterglow.rows.requests import Origin

JSON = "application/json"


def house_of(request: Request) -> House:
    house: House = request.state.house
    return house


def project_of(request: Request) -> str:
    project: str = request.state.project
    return project


def actor_of(request: Request) -> Actor:
    """Who acts, for the audit log."""
    return Actor("api_key", request.state.key_id, request.state.client_ip, request.headers.get("user-agent", ""))


def reply(answer: Any, headers: dict[str, str] | None = None) -> Response:
    """200 with a wire object: a struct, or its JSON text as it is stored."""
    content = answer if isinstance(answer, str | bytes) else msgspec.json.encode(answer)
    return Response(content, media_type=JSON, headers=headers)


async def origin_of(request: Request, body_hash: str | None = None) -> Origin:
    """What is written beside the object that this POST creates. body_hash: of a body that was not kept.

    Raises Repeated when the request was carried out before, and nothing is to be done; KeyReused, or Conflict."""
    state = request.state
    if state.attempt is None:
        hashed = hashlib.sha256(repr((request.path_params, request.scope["query_string"])).encode())
        hashed.update(await request.body() if body_hash is None else body_hash.encode())
        origin = Origin(
            state.request_id,
            state.key_id,
            request.scope["endpoint"].__name__,
            hashed.hexdigest(),
            *retry_headers(request),
        )
        state.attempt = state.attempts.open(state.project, origin)
        await state.attempts.admit(state.house, state.attempt)
    opened: Attempt = state.attempt
    return opened.origin


def retry_headers(request: Request) -> tuple[int, str | None]:
    """The SDK's count of retries, 0 when it does not say, and the idempotency key."""
    count, key = 0, None
    for name, value in request.scope["headers"]:
        if name == b"x-stainless-retry-count":
            count = int(value) if value.isdigit() and len(value) < 5 else 0
        elif name == b"idempotency-key":
            key = value.decode("latin-1")
    return count, key


async def reply_stored(request: Request, read: Work[str | None], missing: Callable[[], NotFound]) -> Response:
    """200 with the stored text that `read` finds, else 404."""
    text = await house_of(request).store.read(read)
    if text is None:
        raise missing()
    return reply(text)


async def reply_list(request: Request, noun: str, list_rows: Callable[..., Awaitable[ListPage]]) -> Response:
    """200 with a page of a list. list_rows: called with a transaction and `limit`, `order`, `after`, `before`."""
    page = msgspec.structs.asdict(read_page(request))

    async def work(tx: Transaction) -> ListPage:
        return await list_rows(tx, **page)

    try:
        found = await house_of(request).store.read(work)
    except UnknownCursor as unknown:
        name, value = unknown.args
        raise NotFound.of(noun, value, param=name) from None
    return reply(list_body(found.objects, found.ids, found.has_more))
