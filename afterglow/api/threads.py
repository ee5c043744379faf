"""/v1/threads and /v1/threads/{thread_id}/messages"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow import threads
from afterglow.api import faults
from afterglow.api.answers import house_of, origin_of, project_of, reply, reply_list, reply_stored
from afterglow.api.bodies import parse
from afterglow.api.finding import read_thread_filters
from afterglow.api.pages import query_choice, query_value
from afterglow.contracts import START, Transaction
from afterglow.errors import NotFound
from afterglow.objects import CreateMessage, CreateThread, Deleted, Message, ModifyMessage, ModifyThread
from afterglow.rows import messages as message_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.events import list_segments
from afterglow.rows.lists import ListPage
from afterglow.runs.closing import content_so_far

METADATA_FILTER = re.compile(r"metadata\[.+\]", re.DOTALL)
MAX_PAIRS = 16
IF_BUSY = ("reject", "allow")
WRITING = '"status":"in_progress"'


# --- threads ---------------------------------------------------------------------------------------------------


async def create_thread(request: Request) -> Response:
    """POST /threads; an empty body makes an empty thread."""
    body = await parse(request, CreateThread, empty_ok=True)
    return reply(await threads.create_thread(house_of(request), project_of(request), body, await origin_of(request)))


async def list_threads(request: Request) -> Response:
    """GET /threads: an extension. `metadata[KEY]=VALUE` keeps those that have the pair; several must all match. So must
    the other filters: by assistant, time, status of the last run, and words of the messages."""
    wanted, filters = _wanted_metadata(request), read_thread_filters(request)

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        kept = await filters.kept(tx, project_of(request))
        return await thread_rows.list_threads(tx, project_of(request), wanted, **cursor, kept=kept)

    return await reply_list(request, "thread", page)


def _wanted_metadata(request: Request) -> dict[str, str]:
    """The pairs asked for. Raises InvalidRequest, also for more of them than a thread can have."""
    names = [name for name in request.query_params if METADATA_FILTER.fullmatch(name)]
    for name in names:
        faults.check_text(name, "metadata")
    if len(names) > MAX_PAIRS:
        raise faults.too_many_properties("metadata", MAX_PAIRS, len(names))
    return {name[len("metadata[") : -1]: query_value(request, name) or "" for name in names}


async def retrieve_thread(request: Request) -> Response:
    """GET /threads/{thread_id}"""
    thread_id = request.path_params["thread_id"]

    async def work(tx: Transaction) -> str | None:
        return await thread_rows.get_thread_object(tx, project_of(request), thread_id)

    return await reply_stored(request, work, lambda: NotFound.of("thread", thread_id))


async def modify_thread(request: Request) -> Response:
    """POST /threads/{thread_id}"""
    body = await parse(request, ModifyThread)
    thread_id = request.path_params["thread_id"]
    return reply(await threads.modify_thread(house_of(request), project_of(request), thread_id, body))


async def delete_thread(request: Request) -> Response:
    """DELETE /threads/{thread_id}"""
    thread_id = request.path_params["thread_id"]
    await threads.delete_thread(house_of(request), project_of(request), thread_id)
    return reply(Deleted(id=thread_id, object="thread.deleted"))


# --- messages --------------------------------------------------------------------------------------------------


async def create_message(request: Request) -> Response:
    """POST /threads/{thread_id}/messages. While a run is active, `if_busy` refuses the message, or allows it."""
    house, project, thread_id = house_of(request), project_of(request), request.path_params["thread_id"]
    body = await parse(request, CreateMessage)
    if_busy = query_choice(request, "if_busy", IF_BUSY)
    allowed = house.settings.messages_while_active if if_busy is None else if_busy == "allow"
    origin = await origin_of(request)
    return reply(await threads.create_message(house, project, thread_id, body, origin, while_active=allowed))


async def list_messages(request: Request) -> Response:
    """GET /threads/{thread_id}/messages; `run_id` keeps those that one run wrote."""
    thread_id, project = request.path_params["thread_id"], project_of(request)
    run_id = query_value(request, "run_id")

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        if await thread_rows.get_thread_object(tx, project, thread_id) is None:
            raise NotFound.of("thread", thread_id)
        found = await message_rows.list_messages(tx, project, thread_id, run_id, **cursor)
        return found._replace(objects=[await _with_text_so_far(tx, project, text) for text in found.objects])

    return await reply_list(request, "message", page)


async def retrieve_message(request: Request) -> Response:
    """GET /threads/{thread_id}/messages/{message_id}"""
    thread_id, message_id = request.path_params["thread_id"], request.path_params["message_id"]
    project = project_of(request)

    async def work(tx: Transaction) -> str | None:
        text = await message_rows.get_message_object(tx, project, thread_id, message_id)
        if text is None and await thread_rows.get_thread_object(tx, project, thread_id) is None:
            raise NotFound.of("thread", thread_id)
        return None if text is None else await _with_text_so_far(tx, project, text)

    return await reply_stored(request, work, lambda: NotFound.of("message", message_id))


async def _with_text_so_far(tx: Transaction, project: str, text: str) -> str:
    """A message that is being written shows what its run's log holds of it; others are as stored."""
    if WRITING not in text[:400]:
        return text
    message = msgspec.json.decode(text, type=Message)
    if message.status != "in_progress" or message.run_id is None:
        return text
    message.content = content_so_far(await list_segments(tx, project, message.run_id, START), message.id)
    return msgspec.json.encode(message).decode()


async def modify_message(request: Request) -> Response:
    """POST /threads/{thread_id}/messages/{message_id}"""
    body = await parse(request, ModifyMessage)
    thread_id, message_id = request.path_params["thread_id"], request.path_params["message_id"]
    return reply(await threads.modify_message(house_of(request), project_of(request), thread_id, message_id, body))


async def delete_message(request: Request) -> Response:
    """DELETE /threads/{thread_id}/messages/{message_id}"""
    thread_id, message_id = request.path_params["thread_id"], request.path_params["message_id"]
    await threads.delete_message(house_of(request), project_of(request), thread_id, message_id)
    return reply(Deleted(id=message_id, object="thread.message.deleted"))
