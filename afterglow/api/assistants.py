"""/v1/assistants"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterglow import assistants
from afterglow.api.answers import house_of, origin_of, project_of, reply, reply_list, reply_stored
from afterglow.api.bodies import parse
from afterglow.contracts import Transaction
from afterglow.errors import NotFound
from afterglow.objects import CreateAssistant, Deleted, ModifyAssistant
from afterglow.rows import assistants as assistant_rows
from afterglow.rows.lists import ListPage


async def create_assistant(request: Request) -> Response:
    """POST /assistants"""
    body = await parse(request, CreateAssistant)
    origin = await origin_of(request)
    return reply(await assistants.create_assistant(house_of(request), project_of(request), body, origin))


async def list_assistants(request: Request) -> Response:
    """GET /assistants"""

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        return await assistant_rows.list_assistants(tx, project_of(request), **cursor)

    return await reply_list(request, "assistant", page)


async def retrieve_assistant(request: Request) -> Response:
    """GET /assistants/{assistant_id}"""
    assistant_id = request.path_params["assistant_id"]

    async def work(tx: Transaction) -> str | None:
        return await assistant_rows.get_assistant_object(tx, project_of(request), assistant_id)

    return await reply_stored(request, work, lambda: NotFound.of("assistant", assistant_id))


async def modify_assistant(request: Request) -> Response:
    """POST /assistants/{assistant_id}"""
    body = await parse(request, ModifyAssistant)
    assistant_id = request.path_params["assistant_id"]
    return reply(await assistants.modify_assistant(house_of(request), project_of(request), assistant_id, body))


async def delete_assistant(request: Request) -> Response:
    """DELETE /assistants/{assistant_id}"""
    assistant_id = request.path_params["assistant_id"]
    await assistants.delete_assistant(house_of(request), project_of(request), assistant_id)
    return reply(Deleted(id=assistant_id, object="assistant.deleted"))
