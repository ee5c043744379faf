"""What happens to threads and their messages when a caller asks.

Runs are in `runs/lifecycle.py`; it also decides what a busy thread refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from afterglow.contracts import House, Segment, Transaction
from afterglow.errors import InvalidRequest, NotFound, ThreadBusy
from afterglow.files import check_files
from afterglow.ids import new_id
from afterglow.objects import (
    AttachedCodeInterpreter,
    Attachment,
    CreateMessage,
    CreateRun,
    CreateThread,
    CreateThreadAndRun,
    CreateToolResources,
    ImageFileInput,
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
from afterglow.runs.lifecycle import Happened, expire_if_due, free_thread, insert_run, tell
from afterglow.runs.transcript import error_event

MAX_CODE_FILES = 20  # of a thread, and of an assistant

# --- threads ---------------------------------------------------------------------------------------------------


async def create_thread(house: House, project: str, body: CreateThread, origin: Origin) -> str:
    """Make a thread with its messages; return its JSON."""

    async def work(tx: Transaction) -> Thread:
        thread = await insert_thread(tx, house, project, body)
        await insert_request(tx, project, origin, thread.id, thread.created_at)
        return thread

    return msgspec.json.encode(await house.store.write(work)).decode()


async def insert_thread(tx: Transaction, house: House, project: str, body: CreateThread) -> Thread:
    now = house.clock.now()
    thread = Thread(
        id=new_id("thread"),
        created_at=int(now),
        metadata=body.metadata or {},
        tool_resources=await checked_resources(tx, project, body.tool_resources, now),
    )
    await thread_rows.insert_thread(tx, project, thread, round(now * 1_000_000))
    if not body.messages:
        return thread
    await insert_messages(tx, project, thread.id, body.messages, int(now))
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
            thread.tool_resources = await checked_resources(tx, project, body.tool_resources, house.clock.now())
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
        gone = error_event("The thread of this run was deleted.")
        house.events.announce(project, run_id, Segment(2**31, 1, 1, gone, "end"))


# --- runs on a thread ------------------------------------------------------------------------------------------


async def start_run(
    house: House, project: str, thread_id: str, body: CreateRun, include: list[str], origin: Origin
) -> Happened:
    """Put a run on a thread, after the additional messages. One transaction over row, messages and events.

    Raises NotFound, or ThreadBusy while another run is active.
    """
    now = int(house.clock.now())

    async def work(tx: Transaction) -> tuple[Happened | None, Happened]:
        expired = await free_thread(tx, house, project, thread_id)
        await insert_messages(tx, project, thread_id, body.additional_messages or [], now)
        happened = await insert_run(tx, house, project, thread_id, body, include)
        await insert_request(tx, project, origin, happened.run.id, now)
        return expired, happened

    expired, happened = await house.store.write(work)
    tell(house, expired)
    tell(house, happened)
    return happened


async def start_thread_and_run(
    house: House, project: str, body: CreateThreadAndRun, include: list[str], origin: Origin
) -> tuple[Thread, Happened]:
    """Make a thread and put a run on it, in one transaction."""

    async def work(tx: Transaction) -> tuple[Thread, Happened]:
        thread = await insert_thread(tx, house, project, body.thread or CreateThread())
        resources = await checked_resources(tx, project, body.tool_resources, house.clock.now())
        happened = await insert_run(tx, house, project, thread.id, body, include, resources)
        await insert_request(tx, project, origin, happened.run.id, happened.run.created_at)
        return thread, happened

    thread, happened = await house.store.write(work)
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
        [message] = await insert_messages(tx, project, thread_id, [body], now)
        await insert_request(tx, project, origin, message.id, now)
        return message, expired

    message, expired = await house.store.write(work)
    tell(house, expired)
    return message


async def insert_messages(
    tx: Transaction, project: str, thread_id: str, bodies: Sequence[CreateMessage], now: int
) -> list[Message]:
    """Append messages in order. Raises NotFound for the thread, or for a file that is named and not there."""
    seq = await thread_rows.take_seq(tx, project, thread_id, len(bodies))
    if seq is None:
        raise NotFound.of("thread", thread_id)
    await _take_files(tx, project, thread_id, bodies, now)
    messages = []
    for offset, body in enumerate(bodies):
        message = Message(
            id=new_id("msg"),
            created_at=now,
            thread_id=thread_id,
            role=body.role,
            content=stored_content(body),
            attachments=[msgspec.to_builtins(attachment) for attachment in body.attachments or []],
            metadata=body.metadata or {},
            completed_at=now,
        )
        await message_rows.insert_message(tx, project, message, seq + offset)
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


# --- files, and the stores that later work brings --------------------------------------------------------------


async def _take_files(
    tx: Transaction, project: str, thread_id: str, bodies: Sequence[CreateMessage], now: float
) -> None:
    """Make sure that the files of new messages are there, and give those attached for code to the thread.

    Raises NotFound, or InvalidRequest when these are too many.
    """
    attachments = [attachment for body in bodies for attachment in body.attachments or []]
    parts = [part for body in bodies if not isinstance(body.content, str) for part in body.content]
    shown = [part.image_file.file_id for part in parts if isinstance(part, ImageFileInput)]
    await check_files(tx, project, [*(attachment.file_id for attachment in attachments), *shown], now)
    if for_code := [attachment.file_id for attachment in attachments if _is_for_code(attachment)]:
        await _attach_to_thread(tx, project, thread_id, for_code)


def _is_for_code(attachment: Attachment) -> bool:
    return attachment.tools is not UNSET and any(isinstance(tool, AttachedCodeInterpreter) for tool in attachment.tools)


async def _attach_to_thread(tx: Transaction, project: str, thread_id: str, file_ids: list[str]) -> None:
    thread = await thread_rows.get_thread(tx, project, thread_id)
    assert thread is not None
    named = thread.tool_resources.get("code_interpreter") or {}
    together = list(dict.fromkeys([*named.get("file_ids", []), *file_ids]))
    if len(together) > MAX_CODE_FILES:
        raise InvalidRequest(
            f"Invalid 'attachments': too many files. The code interpreter of a thread takes at most {MAX_CODE_FILES} "
            f"files, and with these it would have {len(together)}.",
            param="attachments",
        )
    thread.tool_resources["code_interpreter"] = {"file_ids": together}
    await thread_rows.update_thread(tx, project, thread)


async def checked_resources(
    tx: Transaction, project: str, resources: CreateToolResources | ToolResources | Any, now: float
) -> dict[str, Any]:
    """Tool resources as they are stored. Raises NotFound for what does not exist: no dangling id is kept."""
    if resources is None or resources is UNSET:
        return {}
    stored: dict[str, Any] = {}
    if resources.code_interpreter:
        file_ids = list(dict.fromkeys(resources.code_interpreter.file_ids or []))
        await check_files(tx, project, file_ids, now)
        stored["code_interpreter"] = {"file_ids": file_ids}
    if resources.file_search:
        store_ids = resources.file_search.vector_store_ids or []
        if store_ids:
            raise NotFound(f"Vector store with id '{store_ids[0]}' not found.")
        if getattr(resources.file_search, "vector_stores", None):
            raise InvalidRequest(
                "This server cannot make vector stores yet.", param="tool_resources.file_search.vector_stores"
            )
        stored["file_search"] = {"vector_store_ids": store_ids}
    return stored
