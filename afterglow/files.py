"""What happens to files: stored, read and deleted, by callers and by the code interpreter.

Bytes and rows cannot be written together. So the key of bytes is noted as loose before they are written, and loses
that note in the transaction that gives them a file; deleting does the same the other way round. Whatever is loose and
in nobody's hands is deleted: at once when a request fails, and after a crash at the next start.

A file is deleted in two transactions. The first one condemns it: it waits for all that are just making something name
the file, and whoever comes later does not find it. So the second one sees everything that names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import NamedTuple

from afterglow.contracts import House, Transaction
from afterglow.errors import BlobMissing, NotFound, StoreError, StoreUnavailable
from afterglow.ids import new_id
from afterglow.objects import DAY_S, File, Json
from afterglow.quotas import check_storage
from afterglow.rows import assistants as assistant_rows
from afterglow.rows import files as file_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.events import blank_run_events
from afterglow.rows.files import LooseBlob, StoredFile
from afterglow.rows.requests import Origin, insert_request
from afterglow.rows.retention import is_unused
from afterglow.rows.search_results import forget_file
from afterglow.rows.vector_stores import Chore
from afterglow.vector_stores import follow_up, leave_stores

OUTPUT_PURPOSE = "assistants_output"
SWEEP_LIMIT = 100
LOOSE_AFTER_S = DAY_S  # no upload takes longer; what is loose for so long was left by one that could not tidy up


class NewFile(NamedTuple):
    """What is said of a file that is being stored. filename: without folders."""

    filename: str
    purpose: str
    expires_after_s: int | None = None


class Stored(NamedTuple):
    """Bytes that have been stored for what is to be: a file, or a part of one."""

    id: str
    loose: LooseBlob
    size_bytes: int


def no_file(file_id: str) -> NotFound:
    return NotFound(f"No such File object: {file_id}", param="id")


# --- storing ---------------------------------------------------------------------------------------------------


async def create_file(
    house: House,
    project: str,
    chunks: AsyncIterator[bytes],
    finish: Callable[[], Awaitable[tuple[NewFile, Origin]]],
) -> File:
    """Store what a caller sends. finish: called after the last of `chunks`; says what the file is, or refuses it."""
    async with storing(house, project, new_id("file", "-"), chunks) as stored:
        new, origin = await finish()

        async def work(tx: Transaction) -> File:
            return await insert_file(tx, house, stored, new, origin)

        return await house.store.write(work)


async def store_output(
    house: House,
    project: str,
    filename: str,
    chunks: AsyncIterator[bytes],
    note: Callable[[Transaction, File], Awaitable[None]],
) -> File:
    """Store what the code interpreter has made. note: is done in the file's own transaction. What it or `chunks` raises
    is raised, and nothing kept."""
    new = NewFile(filename, OUTPUT_PURPOSE, house.settings.output_retention_d * DAY_S or None)
    async with storing(house, project, new_id("file", "-"), chunks) as stored:

        async def work(tx: Transaction) -> File:
            file = await insert_file(tx, house, stored, new)
            await note(tx, file)
            return file

        return await house.store.write(work)


@contextlib.asynccontextmanager
async def storing(
    house: House, project: str, object_id: str, chunks: AsyncIterator[bytes]
) -> AsyncGenerator[Stored, None]:
    """Store bytes under the id of what they are to be; they are deleted again when what follows fails."""
    loose = LooseBlob(project, f"{object_id[-2:]}/{object_id}")

    async def note(tx: Transaction) -> None:
        await file_rows.insert_loose_blob(tx, loose, int(house.clock.now()))

    await house.store.write(note)
    try:
        yield Stored(object_id, loose, await house.blobs.put(loose.blob, chunks))
    except BaseException:
        await delete_loose(house, [loose])
        raise


async def keep(tx: Transaction, stored: Stored) -> None:
    """These bytes belong to something from this transaction on."""
    if not await file_rows.take_loose_blob(tx, stored.loose):
        raise StoreUnavailable(f"{stored.loose.blob} was swept away while it was written")


async def insert_file(
    tx: Transaction, house: House, stored: Stored, new: NewFile, origin: Origin | None = None
) -> File:
    """Make stored bytes a file."""
    now = house.clock.now()
    project = stored.loose.project
    file = File(
        id=stored.id,
        bytes=stored.size_bytes,
        created_at=int(now),
        expires_at=None if new.expires_after_s is None else int(now) + new.expires_after_s,
        filename=new.filename,
        purpose=new.purpose,
    )
    key_id = origin.key_id if origin is not None else ""
    if origin is not None:
        await check_storage(tx, house, project, key_id, stored.size_bytes)
    await keep(tx, stored)
    await file_rows.insert_file(tx, project, file, stored.loose.blob, round(now * 1_000_000), key_id)
    if origin is not None:
        await insert_request(tx, project, origin, file.id, file.created_at)
    return file


# --- reading ---------------------------------------------------------------------------------------------------


async def get_stored_file(house: House, project: str, file_id: str) -> StoredFile | None:
    async def work(tx: Transaction) -> StoredFile | None:
        return await file_rows.get_file(tx, project, file_id, house.clock.now())

    return await house.store.read(work)


async def read_file(house: House, project: str, file_id: str) -> AsyncGenerator[bytes, None]:
    """The bytes of a file. Raises BlobMissing before the first when there is no such file, or no such bytes."""
    stored = await get_stored_file(house, project, file_id)
    if stored is None:
        raise BlobMissing(f"there is no file {file_id}")
    async with aclosing(house.blobs.get(stored.blob)) as chunks:
        async for chunk in chunks:
            yield chunk


async def check_files(tx: Transaction, project: str, file_ids: Iterable[str], now: float) -> None:
    """Raise NotFound for the first that is not there; the others stay until this work, which names them, is done."""
    for file_id in dict.fromkeys(file_ids):
        if await file_rows.hold_file(tx, project, file_id, now) is None:
            raise no_file(file_id)


# --- deleting --------------------------------------------------------------------------------------------------


class _LetGo(NamedTuple):
    """What is left to be done for files whose rows are deleted."""

    loose: list[LooseBlob]
    chores: list[Chore]


async def delete_file(house: House, project: str, file_id: str) -> None:
    """Delete a file with its bytes, and take it out of all vector stores and the lists of the code interpreter."""
    now = house.clock.now()

    async def condemn(tx: Transaction) -> None:
        if not await file_rows.condemn_file(tx, project, file_id, now):
            raise no_file(file_id)

    async def work(tx: Transaction) -> _LetGo:
        return await _let_go(tx, [(project, file_id)], int(now))

    await house.store.write(condemn)
    await _finish(house, await house.store.write(work))


async def condemn_unused_file(house: House, project: str, file_id: str, before: int) -> bool:
    """Condemn a file that is older than `before` and that nothing uses; `tidy_files` deletes it. Return whether so."""

    async def work(tx: Transaction) -> bool:
        await file_rows.touch_file(tx, project, file_id)  # waits for those who are just making something name it
        if not await is_unused(tx, project, file_id, before):
            return False
        return await file_rows.condemn_file(tx, project, file_id, house.clock.now())

    # Rowwise: what others have written meanwhile is to be seen by the second statement.
    return await house.store.write(work, rowwise=True)


async def tidy_files(house: House) -> None:
    """Delete what has expired, and bytes that were left behind long ago."""
    now = house.clock.now()

    async def condemn(tx: Transaction) -> int:
        return await file_rows.condemn_expired(tx, now)

    async def work(tx: Transaction) -> _LetGo:
        return await _let_go(tx, await file_rows.list_condemned(tx, SWEEP_LIMIT), int(now))

    await house.store.write(condemn, rowwise=True)
    while (gone := await house.store.write(work)).loose:
        await _finish(house, gone)
    await sweep_blobs(house, now - LOOSE_AFTER_S)


async def _finish(house: House, gone: _LetGo) -> None:
    await follow_up(house, gone.chores)
    await delete_loose(house, gone.loose)


async def sweep_blobs(house: House, before: float) -> None:
    """Delete the bytes that no file owns and that were noted before that time."""

    async def work(tx: Transaction) -> list[LooseBlob]:
        return await file_rows.list_loose_blobs(tx, before, SWEEP_LIMIT)

    while loose := await house.store.read(work):
        if not await delete_loose(house, loose):
            return


async def _let_go(tx: Transaction, files: list[tuple[str, str]], now: int) -> _LetGo:
    """Delete rows, by (project, id), and all that names them; their bytes are loose from then on."""
    gone = _LetGo([], [])
    for project, file_id in files:
        blob = await file_rows.delete_file(tx, project, file_id)
        if blob is None:
            continue
        gone.loose.append(LooseBlob(project, blob))
        await file_rows.insert_loose_blob(tx, gone.loose[-1], now)
        for holder, holder_id in await file_rows.list_file_uses(tx, project, file_id):
            if holder == "threads":
                await _take_from_thread(tx, project, holder_id, file_id)
            else:
                await _take_from_assistant(tx, project, holder_id, file_id)
        gone.chores.extend(await leave_stores(tx, project, file_id, now))
        for run_id in await forget_file(tx, project, file_id):
            await blank_run_events(tx, project, run_id)  # they may quote it
    return gone


async def _take_from_thread(tx: Transaction, project: str, thread_id: str, file_id: str) -> None:
    if thread := await thread_rows.get_thread(tx, project, thread_id):
        _take_from(thread.tool_resources, file_id)
        await thread_rows.update_thread(tx, project, thread)


async def _take_from_assistant(tx: Transaction, project: str, assistant_id: str, file_id: str) -> None:
    if row := await assistant_rows.get_assistant(tx, project, assistant_id):
        _take_from(row.assistant.tool_resources, file_id)
        await assistant_rows.update_assistant(tx, project, row)


def _take_from(tool_resources: Json, file_id: str) -> None:
    named = tool_resources["code_interpreter"]
    named["file_ids"] = [other for other in named["file_ids"] if other != file_id]


async def delete_loose(house: House, loose: list[LooseBlob]) -> bool:
    """Delete bytes that are loose and in nobody's hands; return whether it could be done. Else it is done later."""

    async def condemn(tx: Transaction) -> list[LooseBlob]:
        return [blob for blob in loose if await file_rows.condemn_loose_blob(tx, blob)]

    async def forget(tx: Transaction) -> None:
        for blob in loose:
            await file_rows.delete_loose_blob(tx, blob)

    try:
        # A write may still be giving these bytes a file, though nobody waits for it any more: it is first, or fails.
        found = await house.store.write(condemn)
        await house.blobs.delete([blob.blob for blob in found])
        await house.store.write(forget)
    except StoreError:
        return False
    return True
