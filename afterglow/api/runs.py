"""/v1/threads/{thread_id}/runs, their steps, and /v1/threads/runs"""

from __future__ import annotations

import math
import re
from typing import Any, cast, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow.api import faults
from afterglow.api.answers import house_of, origin_of, project_of, reply, reply_list, reply_stored
from afterglow.api.bodies import parse
from afterglow.api.holding import Seen, held, read_wait
from afterglow.api.pages import query_choice, query_decimal, query_flag, query_integer, query_value, read_include
from afterglow.api.sse import EventStream
from afterglow.contracts import START, Position, Stop, Transaction
from afterglow.dry_run import dry_run, dry_thread_and_run
from afterglow.errors import NotFound
from afterglow.objects import TOOL_TIMEOUT_S, CreateRun, CreateThreadAndRun, ModifyRun, RunStatus, SubmitToolOutputs
from afterglow.rows import runs as run_rows
from afterglow.rows import steps as step_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.lists import ListPage
from afterglow.rows.search_results import filled_in
from afterglow.runs import lifecycle
from afterglow.runs.states import TERMINAL
from afterglow.threads import start_run, start_thread_and_run

RUN_STATUSES: tuple[str, ...] = get_args(RunStatus)
UNTIL = ("stop", "end")
MAX_TOKENS = 2**53
EVENT_ID = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})")


async def create_run(request: Request) -> Response:
    """POST /threads/{thread_id}/runs. With `stream`, answers with the run's event log as it grows. While another run
    is active on the thread, `if_busy` refuses this one, queues it behind the other, or cancels the other, too. With
    `dry_run`, nothing is done, and the answer tells what would be."""
    body = await parse(request, CreateRun)
    query = _read_query(request)
    if query_flag(request, "dry_run"):
        where = house_of(request), project_of(request), request.path_params["thread_id"]
        return reply(await dry_run(*where, body, query))
    happened = await start_run(
        house_of(request),
        project_of(request),
        request.path_params["thread_id"],
        body,
        query,
        await origin_of(request),
    )
    return _stream(request, happened) if body.stream else reply(happened.run)


async def create_thread_and_run(request: Request) -> Response:
    """POST /threads/runs. A stream begins with the thread."""
    body = await parse(request, CreateThreadAndRun)
    query = _read_query(request)
    if query_flag(request, "dry_run"):
        return reply(await dry_thread_and_run(house_of(request), project_of(request), body, query))
    thread, happened = await start_thread_and_run(
        house_of(request),
        project_of(request),
        body,
        query,
        await origin_of(request),
    )
    if not body.stream:
        return reply(happened.run)
    first = b"event: thread.created\ndata: " + msgspec.json.encode(thread) + b"\n\n"
    return _stream(request, happened, first)


def _stream(request: Request, happened: lifecycle.Happened, first: bytes = b"") -> EventStream:
    return EventStream(house_of(request), happened.project, happened.run.id, happened.since, first=first)


def _read_query(request: Request) -> lifecycle.RunQuery:
    """Raises InvalidRequest."""
    return lifecycle.RunQuery(
        read_include(request),
        request.state.key_id,
        query_decimal(request, "tool_timeout_s", *TOOL_TIMEOUT_S),
        query_integer(request, "max_total_tokens", 0, MAX_TOKENS),
        query_decimal(request, "max_cost"),
        cast(lifecycle.IfBusy, query_choice(request, "if_busy", get_args(lifecycle.IfBusy)) or "reject"),
    )


async def list_runs(request: Request) -> Response:
    """GET /threads/{thread_id}/runs"""
    thread_id, project = request.path_params["thread_id"], project_of(request)

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        if await thread_rows.get_thread_object(tx, project, thread_id) is None:
            raise NotFound.of("thread", thread_id)
        return await run_rows.list_runs(tx, project, thread_id, **cursor)

    return await reply_list(request, "run", page)


async def retrieve_run(request: Request) -> Response:
    """GET /threads/{thread_id}/runs/{run_id}. With `wait`, and for polls of SDK helpers, held until the run stops."""
    house, project = house_of(request), project_of(request)
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    wait = read_wait(request, RUN_STATUSES)

    async def read() -> Seen:
        run = await lifecycle.retrieve_run(house, project, thread_id, run_id)
        expires = run.status in ("queued", "requires_action")
        return Seen(run.text, run.status, run.deadline - house.clock.now() if expires else math.inf)

    return await held(request, wait, TERMINAL, house.events.watch("run", project, run_id), read)


async def follow_run_events(request: Request) -> Response:
    """GET /threads/{thread_id}/runs/{run_id}/events. The run's event log from its start, or from behind `after`, as it
    grows; up to the run's end, or with `until=stop` to its next stop."""
    house, project = house_of(request), project_of(request)
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    after = _place(request)
    ends: set[Stop] = {"action", "end"} if query_choice(request, "until", UNTIL) == "stop" else {"end"}
    if await lifecycle.has_nothing_behind(house, project, thread_id, run_id, after, ends):
        return Response(status_code=204)  # a browser's EventSource, which comes back after each end, gives up
    return EventStream(house, project, run_id, after, ends=ends)


def _place(request: Request) -> Position:
    """The place that a follower names. A browser that comes back repeats the query, and knows better by now."""
    name, text = "Last-Event-ID", request.headers.get("last-event-id")
    if not text:
        name, text = "after", query_value(request, "after")
    if text is None:
        return START
    if not (found := EVENT_ID.fullmatch(text)):
        raise faults.invalid(name, "expected the id of an event, such as '1.42'.", "invalid_value")
    return Position(int(found[1]), int(found[2]))


async def modify_run(request: Request) -> Response:
    """POST /threads/{thread_id}/runs/{run_id}"""
    body = await parse(request, ModifyRun)
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    return reply(await lifecycle.modify_run(house_of(request), project_of(request), thread_id, run_id, body))


async def cancel_run(request: Request) -> Response:
    """POST /threads/{thread_id}/runs/{run_id}/cancel; the body, if any, is not read."""
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    origin = await origin_of(request)
    return reply(await lifecycle.cancel_run(house_of(request), project_of(request), thread_id, run_id, origin))


async def submit_tool_outputs(request: Request) -> Response:
    """POST /threads/{thread_id}/runs/{run_id}/submit_tool_outputs. A stream goes on from here."""
    body = await parse(request, SubmitToolOutputs)
    thread_id, run_id = request.path_params["thread_id"], request.path_params["run_id"]
    origin = await origin_of(request)
    happened = await lifecycle.submit_tool_outputs(
        house_of(request), project_of(request), thread_id, run_id, body, origin
    )
    return _stream(request, happened) if body.stream else reply(happened.run)


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
