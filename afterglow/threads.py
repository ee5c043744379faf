"""What happens to threads and their messages when a caller asks.

Runs are in `runs/lifecycle.py`; it also decides what a busy thread refuses.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from afterglow.contracts import House, Segment, Transaction
from afterglow.errors import NotFound, ThreadBusy
from afterglow.files import check_files
from afterglow.ids import new_id
from afterglow.messages import attach_for_search, check_named_files, insert_messages
from afterglow.objects import (
    CreateFileSearchResources,
    CreateMessage,
    CreateRun,
    CreateThread,
    CreateThreadAndRun,
    CreateToolResources,
    Json,
    Message,
    ModifyMessage,
    ModifyThread,
    Thread,
    ToolResources,
)
from afterglow.quotas import check_active_runs
from afterglow.rows import events as event_rows
from afterglow.rows import messages as message_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.requests import Origin, insert_request
from afterglow.rows.retention import is_idle
from afterglow.rows.runs import RunRow
from afterglow.runs.lifecycle import (
    Happened,
    RunQuery,
    expire_if_due,
    insert_run,
    insert_waiting_run,
    interrupt_active_run,
    make_room,
    tell,
)
from afterglow.runs.transcript import error_event
from afterglow.vector_stores import check_stores, insert_store_of

# --- threads ---------------------------------------------------------------------------------------------------


async def create_thread(house: House, project: str, body: CreateThread, origin: Origin) -> str:
    """Make a thread with its messages; return its JSON."""

    async def work(tx: Transaction) -> Thread:
        thread = await insert_thread(tx, house, project, body)
        await insert_request(tx, project, origin, thread.id, thread.created_at)
        return thread

    thread = await house.store.write(work)
    wake_for_files(house, thread.tool_resources)
    return msgspec.json.encode(thread).decode()


def wake_for_files(house: House, tool_resources: Json) -> None:
    """After the commit: there may be files to be indexed."""
    if tool_resources.get("file_search"):
        house.ingest_queue.wake()


async def insert_thread(tx: Transaction, house: House, project: str, body: CreateThread) -> Thread:
    now = house.clock.now()
    thread = Thread(
        id=new_id("thread"),
        created_at=int(now),
        metadata=body.metadata or {},
        tool_resources=await checked_resources(
            tx, house, project, body.tool_resources, house.settings.thread_store_days
        ),
    )
    await thread_rows.insert_thread(tx, project, thread, round(now * 1_000_000))
    if not body.messages:
        return thread
    await insert_messages(tx, house, project, thread.id, body.messages, int(now))
    with_attachments = await thread_rows.get_thread(tx, project, thread.id)
    assert with_attachments is not None
    return with_attachments


async def modify_thread(house: House, project: str, thread_id: str, body: ModifyThread) -> Thread:
    async def work(tx: Transaction) -> Thread:
        thread = await thread_rows.get_thread(tx, project, thread_id)
        if thread is None:
            raise NotFound.of("thread", thread_id)
        if body.metadata is not UNSET:
            thread.metadata = body.metadata or {}
        if body.tool_resources is not UNSET:
            thread.tool_resources = await checked_resources(tx, house, project, body.tool_resources)
        await thread_rows.update_thread(tx, project, thread)
        return thread

    return await house.store.write(work)


async def delete_thread(house: House, project: str, thread_id: str) -> None:
    """Delete it and all that hangs on it; runs that are active or wait on it are stopped, and their followers told."""

    async def work(tx: Transaction) -> list[str]:
        if active := await run_rows.get_active_run(tx, project, thread_id):
            await run_rows.touch_active_run(tx, active)  # first, as whoever writes to it does
        unfinished = await run_rows.list_unfinished(tx, project, thread_id)
        if not await thread_rows.delete_thread(tx, project, thread_id):
            raise NotFound.of("thread", thread_id)
        return unfinished

    _tell_gone(house, project, await house.store.write(work))


async def delete_idle_thread(house: House, project: str, thread_id: str, before: int) -> bool:
    """As `delete_thread`, if nothing has happened on it since `before`; return whether so."""

    async def work(tx: Transaction) -> bool:
        if not await is_idle(tx, project, thread_id, before):
            return False
        return await thread_rows.delete_thread(tx, project, thread_id)

    return await house.store.write(work)


def _tell_gone(house: House, project: str, run_ids: list[str]) -> None:
    for run_id in run_ids:
        house.queue.cancel(run_id)
        house.events.forget(run_id)
        house.events.announce(project, run_id, Segment(2**31, 1, 1, gone_event(), "end"))


def gone_event() -> bytes:
    """What followers of a run are told when its thread was deleted."""
    return error_event("The thread of this run was deleted.")


# --- runs on a thread ------------------------------------------------------------------------------------------


async def start_run(
    house: House, project: str, thread_id: str, body: CreateRun, query: RunQuery, origin: Origin
) -> Happened:
    """Put a run on a thread, after the additional messages. One transaction over row, messages and events.

    While another run is active, `if_busy` refuses this one; or `queue` lets it wait for the thread, and its messages
    with it; `interrupt` cancels the other one, too. Raises NotFound, or ThreadBusy.
    """
    now = int(house.clock.now())
    messages = body.additional_messages or []

    async def work(tx: Transaction) -> tuple[Happened, RunRow | None, list[Happened | None]]:
        active, expired = await make_room(tx, house, project, thread_id, query.if_busy)
        stopped = interrupted = None
        if active is None:
            created = happened = await insert_run_on_thread(tx, house, project, thread_id, body, query)
        else:
            await check_named_files(tx, project, messages, now)
            urgent = query.if_busy == "interrupt"
            created = happened = await insert_waiting_run(tx, house, active, body, query, urgent=urgent)
            if urgent:
                happened, stopped = await interrupt_active_run(tx, house, active, created)
                interrupted = active if stopped is None else None
        await insert_request(tx, project, origin, happened.run.id, now)
        return happened, interrupted, [expired, created, stopped]

    happened, interrupted, told = await house.store.write(work)
    if attach_for_search(messages):
        house.ingest_queue.wake()
    for one in told:
        tell(house, one)
    if interrupted is not None:
        house.events.note(project, interrupted.run.id, interrupted.run.status)
        house.queue.cancel(interrupted.run.id)
    return happened


async def insert_run_on_thread(
    tx: Transaction, house: House, project: str, thread_id: str, body: CreateRun, query: RunQuery
) -> Happened:
    """What is written of a run on a thread that is known to be free."""
    await check_active_runs(tx, house, project, query.key_id)
    if body.additional_messages:
        await insert_messages(tx, house, project, thread_id, body.additional_messages, int(house.clock.now()))
    return await insert_run(tx, house, project, thread_id, body, query)


async def insert_thread_and_run(
    tx: Transaction, house: House, project: str, body: CreateThreadAndRun, query: RunQuery
) -> tuple[Thread, Happened]:
    await check_active_runs(tx, house, project, query.key_id)
    thread = await insert_thread(tx, house, project, body.thread or CreateThread())
    resources = await checked_resources(tx, house, project, body.tool_resources)
    return thread, await insert_run(tx, house, project, thread.id, body, query, resources)


async def start_thread_and_run(
    house: House, project: str, body: CreateThreadAndRun, query: RunQuery, origin: Origin
) -> tuple[Thread, Happened]:
    """Make a thread and put a run on it, in one transaction."""

    async def work(tx: Transaction) -> tuple[Thread, Happened]:
        thread, happened = await insert_thread_and_run(tx, house, project, body, query)
        await insert_request(tx, project, origin, happened.run.id, happened.run.created_at)
        return thread, happened

    thread, happened = await house.store.write(work)
    wake_for_files(house, thread.tool_resources)
    tell(house, happened)
    return thread, happened


# --- messages --------------------------------------------------------------------------------------------------


async def create_message(
    house: House, project: str, thread_id: str, body: CreateMessage, origin: Origin, *, while_active: bool = False
) -> Message:
    """Append a message. Raises ThreadBusy while a run is active on the thread, unless `while_active`."""
    now = int(house.clock.now())

    async def work(tx: Transaction) -> tuple[Message, Happened | None]:
        active = None if while_active else await run_rows.get_active_run(tx, project, thread_id)
        expired = await expire_if_due(tx, house, active) if active else None
        if expired:  # the thread may be another's now
            active = await run_rows.get_active_run(tx, project, thread_id)
        if active:
            raise ThreadBusy.for_message(thread_id, active.run.id)
        [message] = await insert_messages(tx, house, project, thread_id, [body], now)
        await insert_request(tx, project, origin, message.id, now)
        return message, expired

    message, expired = await house.store.write(work)
    if attach_for_search([body]):
        house.ingest_queue.wake()
    tell(house, expired)
    return message


async def modify_message(house: House, project: str, thread_id: str, message_id: str, body: ModifyMessage) -> Message:
    async def work(tx: Transaction) -> Message:
        message = await message_rows.get_message(tx, project, thread_id, message_id)
        if message is None:
            raise await _missing(tx, project, thread_id, NotFound.of("message", message_id))
        if body.metadata is not UNSET:
            message.metadata = body.metadata or {}
        await message_rows.update_message_object(tx, project, message)
        return message

    return await house.store.write(work)


async def delete_message(house: House, project: str, thread_id: str, message_id: str) -> None:
    """Delete a message, and the events that carried its text."""

    async def work(tx: Transaction) -> None:
        run_id = await message_rows.delete_message(tx, project, thread_id, message_id)
        if run_id is None:
            raise await _missing(tx, project, thread_id, NotFound.of("message", message_id))
        if run_id:
            await event_rows.blank_run_events(tx, project, run_id)

    await house.store.write(work)


async def _missing(tx: Transaction, project: str, thread_id: str, otherwise: NotFound) -> NotFound:
    """Which of the two is missing: the thread, or what was looked for in it."""
    found = await thread_rows.get_thread_object(tx, project, thread_id)
    return NotFound.of("thread", thread_id) if found is None else otherwise


# --- files and vector stores -----------------------------------------------------------------------------------


async def checked_resources(
    tx: Transaction,
    house: House,
    project: str,
    resources: CreateToolResources | ToolResources | UnsetType | None,
    store_days: int | None = None,
) -> Json:
    """Tool resources as they are stored; vector stores are made on the way, and expire so many days after their use.

    Raises NotFound for what does not exist: no dangling id is kept.
    """
    stored: Json = {}
    if not resources:
        return stored
    if resources.code_interpreter:
        file_ids = list(dict.fromkeys(resources.code_interpreter.file_ids or []))
        await check_files(tx, project, file_ids, house.clock.now())
        stored["code_interpreter"] = {"file_ids": file_ids}
    if search := resources.file_search:
        store_ids = list(search.vector_store_ids or [])
        await check_stores(tx, project, store_ids, house.clock.now())
        for new in (isinstance(search, CreateFileSearchResources) and search.vector_stores) or ():
            store_ids.append((await insert_store_of(tx, house, project, new, store_days)).id)
        stored["file_search"] = {"vector_store_ids": store_ids}
    return stored
