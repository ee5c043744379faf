"""What happens to threads and their messages when a caller asks.

Runs are in `runs/lifecycle.py`; it also decides what a busy thread refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from afterglow.contracts import House, Segment, Transaction
from afterglow.errors import InvalidRequest, NotFound, ThreadBusy
from afterglow.files import check_files
from afterglow.ids import new_id
from afterglow.objects import (
    AttachedCodeInterpreter,
    AttachedFileSearch,
    Attachment,
    CreateFileSearchResources,
    CreateMessage,
    CreateRun,
    CreateThread,
    CreateThreadAndRun,
    CreateToolResources,
    ImageFileInput,
    Json,
    Message,
    ModifyMessage,
    ModifyThread,
    Thread,
    ToolResources,
)
from afterglow.rows import events as event_rows
from afterglow.rows import messages as message_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.requests import Origin, insert_request
from afterglow.runs.lifecycle import NO_LIMITS, Happened, RunLimits, expire_if_due, free_thread, insert_run, tell
from afterglow.runs.transcript import error_event
from afterglow.vector_stores import attach_to_thread, check_stores, insert_store_of

MAX_CODE_FILES = 20  # of a thread, and of an assistant

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
    """Delete it and all that hangs on it; a run that is active on it is stopped, and its followers are told."""

    async def work(tx: Transaction) -> str | None:
        active = await run_rows.get_active_run(tx, project, thread_id)
        if not await thread_rows.delete_thread(tx, project, thread_id):
            raise NotFound.of("thread", thread_id)
        return active.run.id if active else None

    run_id = await house.store.write(work)
    if run_id is not None:
        house.queue.cancel(run_id)
        house.events.forget(run_id)
        house.events.announce(project, run_id, Segment(2**31, 1, 1, gone_event(), "end"))


def gone_event() -> bytes:
    """What followers of a run are told when its thread was deleted."""
    return error_event("The thread of this run was deleted.")


# --- runs on a thread ------------------------------------------------------------------------------------------


async def start_run(
    house: House,
    project: str,
    thread_id: str,
    body: CreateRun,
    include: list[str],
    origin: Origin,
    limits: RunLimits = NO_LIMITS,
) -> Happened:
    """Put a run on a thread, after the additional messages. One transaction over row, messages and events.

    Raises NotFound, or ThreadBusy while another run is active.
    """
    now = int(house.clock.now())

    async def work(tx: Transaction) -> tuple[Happened | None, Happened]:
        expired = await free_thread(tx, house, project, thread_id)
        await insert_messages(tx, house, project, thread_id, body.additional_messages or [], now)
        happened = await insert_run(tx, house, project, thread_id, body, include, limits=limits)
        await insert_request(tx, project, origin, happened.run.id, now)
        return expired, happened

    expired, happened = await house.store.write(work)
    _wake_for_messages(house, body.additional_messages or [])
    tell(house, expired)
    tell(house, happened)
    return happened


async def start_thread_and_run(
    house: House,
    project: str,
    body: CreateThreadAndRun,
    include: list[str],
    origin: Origin,
    limits: RunLimits = NO_LIMITS,
) -> tuple[Thread, Happened]:
    """Make a thread and put a run on it, in one transaction."""

    async def work(tx: Transaction) -> tuple[Thread, Happened]:
        thread = await insert_thread(tx, house, project, body.thread or CreateThread())
        resources = await checked_resources(tx, house, project, body.tool_resources)
        happened = await insert_run(tx, house, project, thread.id, body, include, resources, limits)
        await insert_request(tx, project, origin, happened.run.id, happened.run.created_at)
        return thread, happened

    thread, happened = await house.store.write(work)
    wake_for_files(house, thread.tool_resources)
    tell(house, happened)
    return thread, happened


# --- messages --------------------------------------------------------------------------------------------------


async def create_message(house: House, project: str, thread_id: str, body: CreateMessage, origin: Origin) -> Message:
    """Append a message. Raises ThreadBusy while a run is active on the thread."""
    now = int(house.clock.now())

    async def work(tx: Transaction) -> tuple[Message, Happened | None]:
        active = await run_rows.get_active_run(tx, project, thread_id)
        expired = await expire_if_due(tx, house, active) if active else None
        if active and expired is None:
            raise ThreadBusy.for_message(thread_id, active.run.id)
        [message] = await insert_messages(tx, house, project, thread_id, [body], now)
        await insert_request(tx, project, origin, message.id, now)
        return message, expired

    message, expired = await house.store.write(work)
    _wake_for_messages(house, [body])
    tell(house, expired)
    return message


async def insert_messages(
    tx: Transaction, house: House, project: str, thread_id: str, bodies: Sequence[CreateMessage], now: int
) -> list[Message]:
    """Append messages in order. Raises NotFound for the thread, or for a file that is named and not there."""
    place = await thread_rows.take_place(tx, project, thread_id, now, len(bodies))
    if place is None:
        raise NotFound.of("thread", thread_id)
    await _take_files(tx, house, project, thread_id, bodies, now)
    messages = []
    for offset, body in enumerate(bodies):
        message = Message(
            id=new_id("msg"),
            created_at=place.created_at,
            thread_id=thread_id,
            role=body.role,
            content=stored_content(body),
            attachments=[msgspec.to_builtins(attachment) for attachment in body.attachments or []],
            metadata=body.metadata or {},
            completed_at=place.created_at,
        )
        await message_rows.insert_message(tx, project, message, place.seq + offset)
        messages.append(message)
    return messages


def stored_content(body: CreateMessage) -> list[dict[str, Any]]:
    """The content as it is answered: a text part's `text` becomes `{"value", "annotations"}`."""
    if isinstance(body.content, str):
        return [{"type": "text", "text": {"value": body.content, "annotations": []}}]
    parts: list[dict[str, Any]] = [msgspec.to_builtins(part) for part in body.content]
    for part in parts:
        if part["type"] == "text":
            part["text"] = {"value": part["text"], "annotations": []}
    return parts


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


async def _take_files(
    tx: Transaction, house: House, project: str, thread_id: str, bodies: Sequence[CreateMessage], now: float
) -> None:
    """Make sure that the files of new messages are there, and give those that are attached for a tool to the thread.

    Raises NotFound; InvalidRequest when there are too many for code, or the thread's vector store has expired.
    """
    attachments = [attachment for body in bodies for attachment in body.attachments or []]
    parts = [part for body in bodies if not isinstance(body.content, str) for part in body.content]
    shown = [part.image_file.file_id for part in parts if isinstance(part, ImageFileInput)]
    await check_files(tx, project, [*(attachment.file_id for attachment in attachments), *shown], now)
    for_code = _attached(attachments, AttachedCodeInterpreter)
    for_search = _attached(attachments, AttachedFileSearch)
    if not for_code and not for_search:
        return
    thread = await thread_rows.get_thread(tx, project, thread_id)
    assert thread is not None
    if for_code:
        _attach_for_code(thread, for_code)
    if for_search:
        await attach_to_thread(tx, house, project, thread, for_search)
    await thread_rows.update_thread(tx, project, thread)


def _attached(attachments: Sequence[Attachment], tool: type[AttachedCodeInterpreter | AttachedFileSearch]) -> list[str]:
    """The ids of the files that are attached for one of the tools."""
    return [one.file_id for one in attachments if any(isinstance(named, tool) for named in one.tools or ())]


def _wake_for_messages(house: House, bodies: Sequence[CreateMessage]) -> None:
    """After the commit, as `wake_for_files`."""
    if any(_attached(body.attachments or [], AttachedFileSearch) for body in bodies):
        house.ingest_queue.wake()


def _attach_for_code(thread: Thread, file_ids: list[str]) -> None:
    named = thread.tool_resources.get("code_interpreter") or {}
    together = list(dict.fromkeys([*named.get("file_ids", []), *file_ids]))
    if len(together) > MAX_CODE_FILES:
        raise InvalidRequest(
            f"Invalid 'attachments': too many files. The code interpreter of a thread takes at most {MAX_CODE_FILES} "
            f"files, and with these it would have {len(together)}.",
            param="attachments",
        )
    thread.tool_resources["code_interpreter"] = {"file_ids": together}


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
