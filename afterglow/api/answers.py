"""Answers in the API's shape, and what every route asks of its request."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow.api.pages import list_body, read_page
from afterglow.contracts import House, Transaction, Work
from afterglow.errors import NotFound
from afterglow.rows.lists import ListPage, UnknownCursor
from afterglow.rows.requests import Origin

JSON = "application/json"


def house_of(request: Request) -> House:
    house: House = request.state.house
    return house


def project_of(request: Request) -> str:
    project: str = request.state.project
    return project


def reply(answer: Any, headers: dict[str, str] | None = None) -> Response:
    """200 with a wire object: a struct, or its JSON text as it is stored."""
    content = answer if isinstance(answer, str | bytes) else msgspec.json.encode(answer)
    return Response(content, media_type=JSON, headers=headers)


async def origin_of(request: Request, body_hash: str | None = None) -> Origin:
    """What is written beside the object that this POST creates. body_hash: of a body that was not kept."""
    state = request.state
    state.creates = True
    if body_hash is None:
        body_hash = hashlib.sha256(await request.body()).hexdigest()
    return Origin(state.request_id, state.key_id, request.scope["endpoint"].__name__, body_hash)


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
