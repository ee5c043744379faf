"""Messages that come into a thread: their rows, and what becomes of the files that they name.

What callers ask of messages and threads is in `threads.py`; when a run's own messages come is in `runs/lifecycle.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from afterglow.contracts import House, Transaction
from afterglow.errors import InvalidRequest, NotFound
from afterglow.files import check_files
from afterglow.ids import new_id
from afterglow.objects import (
    AttachedCodeInterpreter,
    AttachedFileSearch,
    Attachment,
    CreateMessage,
    ImageFileInput,
    Message,
    Thread,
)
from afterglow.rows import messages as message_rows
from afterglow.rows import threads as thread_rows
from afterglow.vector_stores import attach_to_thread

MAX_CODE_FILES = 20  # of a thread, and of an assistant


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


async def _take_files(
    tx: Transaction, house: House, project: str, thread_id: str, bodies: Sequence[CreateMessage], now: float
) -> None:
    """Make sure that the files of new messages are there, and give those that are attached for a tool to the thread.

    Raises NotFound; InvalidRequest when there are too many for code, or the thread's vector store has expired.
    """
    await check_named_files(tx, project, bodies, now)
    attachments = [attachment for body in bodies for attachment in body.attachments or []]
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


async def check_named_files(tx: Transaction, project: str, bodies: Sequence[CreateMessage], now: float) -> None:
    """Raise NotFound for the first file that these messages attach or show and that is not there."""
    attachments = [attachment for body in bodies for attachment in body.attachments or []]
    parts = [part for body in bodies if not isinstance(body.content, str) for part in body.content]
    shown = [part.image_file.file_id for part in parts if isinstance(part, ImageFileInput)]
    await check_files(tx, project, [*(attachment.file_id for attachment in attachments), *shown], now)


def _attached(attachments: Sequence[Attachment], tool: type[AttachedCodeInterpreter | AttachedFileSearch]) -> list[str]:
    """The ids of the files that are attached for one of the tools."""
    return [one.file_id for one in attachments if any(isinstance(named, tool) for named in one.tools or ())]


def attach_for_search(bodies: Sequence[CreateMessage]) -> bool:
    """Whether these messages have files that are to be indexed."""
    return any(_attached(body.attachments or [], AttachedFileSearch) for body in bodies)


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
