"""/v1/threads/{thread_id}/runs, their steps, and /v1/threads/runs"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow.api.answers import house_of, origin_of, project_of, reply, reply_list, reply_stored
from afterglow.api.bills import is_dry_run, read_limits
from afterglow.api.bodies import parse
from afterglow.api.pages import read_include
from afterglow.api.sse import EventStream
from afterglow.contracts import Transaction
from afterglow.dry_run import dry_run, dry_thread_and_run
from afterglow.errors import NotFound
from afterglow.objects import CreateRun, CreateThreadAndRun, ModifyRun, SubmitToolOutputs
from afterglow.rows import runs as run_rows
from afterglow.rows import steps as step_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.lists import ListPage
from afterglow.rows.search_results import filled_in
from afterglow.runs import lifecycle
from afterglow.threads import start_run, start_thread_and_run


async def create_run(request: Request) -> Response:
    """POST /threads/{thread_id}/runs. With `stream`, answers with the run's event log as it grows. With `dry_run`,
    nothing is done, and the answer tells what would be."""
    body = await parse(request, CreateRun)
    include = read_include(request)
    limits = read_limits(request)
    if is_dry_run(request):
        where = house_of(request), project_of(request), request.path_params["thread_id"]
        return reply(await dry_run(*where, body, include, limits))
    happened = await start_run(
        house_of(request),
        project_of(request),
        request.path_params["thread_id"],
        body,
        include,
        await origin_of(request),
        limits=limits,
    )
    return EventStream(house_of(request), happened) if body.stream else reply(happened.run)


async def create_thread_and_run(request: Request) -> Response:
    """POST /threads/runs. A stream begins with the thread."""
    body = await parse(request, CreateThreadAndRun)
    include = read_include(request)
    limits = read_limits(request)
    if is_dry_run(request):
        return reply(await dry_thread_and_run(house_of(request), project_of(request), body, include, limits))
    thread, happened = await start_thread_and_run(
        house_of(request), project_of(request), body, include, await origin_of(request), limits=limits
    )
    if not body.stream:
        return reply(happened.run)
    first = b"event: thread.created\ndata: " + msgspec.json.encode(thread) + b"\n\n"
    return EventStream(house_of(request), happened, first)


async def list_runs(request: Request) -> Response:
    """GET /threads/{thread_id}/runs"""
    thread_id, project = request.path_params["thread_id"], project_of(request)

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        if await thread_rows.get_thread_object(tx, project, thread_id) is None:
            raise NotFound.of("thread", thread_id)
        return await run_rows.list_runs(tx, project, thread_id, **cursor)

    return await reply_list(request, "run", page)


async def retrieve_run(request: Request) -> Response:
    """GET /threads/{thread_id}/runs/{run_id}. `openai-poll-after-ms` tells SDK helpers how long to wait."""
    house, project = house_of(request), project_of(request)
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    text = await lifecycle.retrieve_run(house, project, thread_id, run_id)
    return reply(text, {"openai-poll-after-ms": str(house.settings.poll_after_ms)})


async def modify_run(request: Request) -> Response:
    """POST /threads/{thread_id}/runs/{run_id}"""
    body = await parse(request, ModifyRun)
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    return reply(await lifecycle.modify_run(house_of(request), project_of(request), thread_id, run_id, body))


async def cancel_run(request: Request) -> Response:
    """POST /threads/{thread_id}/runs/{run_id}/cancel; the body, if any, is not read."""
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    return reply(await lifecycle.cancel_run(house_of(request), project_of(request), thread_id, run_id))


async def submit_tool_outputs(request: Request) -> Response:
    """POST /threads/{thread_id}/runs/{run_id}/submit_tool_outputs. A stream goes on from here."""
    body = await parse(request, SubmitToolOutputs)
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    happened = await lifecycle.submit_tool_outputs(house_of(request), project_of(request), thread_id, run_id, body)
    return EventStream(house_of(request), happened) if body.stream else reply(happened.run)


async def list_run_steps(request: Request) -> Response:
    """GET /threads/{thread_id}/runs/{run_id}/steps"""
    thread_id, run_id, project = request.path_params["thread_id"], request.path_params["run_id"], project_of(request)
    with_content = bool(read_include(request))

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        if await run_rows.get_run_object(tx, project, thread_id, run_id) is None:
            raise await lifecycle.missing_run(tx, project, thread_id, run_id)
        found = await step_rows.list_steps(tx, project, run_id, **cursor)
        if with_content and found is not None:
            found = found._replace(objects=[await filled_in(tx, project, text) for text in found.objects])
        return found

    return await reply_list(request, "run step", page)


async def retrieve_run_step(request: Request) -> Response:
    """GET /threads/{thread_id}/runs/{run_id}/steps/{step_id}"""
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    step_id, project = request.path_params["step_id"], project_of(request)
    with_content = bool(read_include(request))

    async def work(tx: Transaction) -> str | None:
        text = await step_rows.get_step_object(tx, project, thread_id, run_id, step_id)
        if text is None and await run_rows.get_run_object(tx, project, thread_id, run_id) is None:
            raise await lifecycle.missing_run(tx, project, thread_id, run_id)
        return await filled_in(tx, project, text) if text is not None and with_content else text

    return await reply_stored(request, work, lambda: NotFound.of("run step", step_id))
