"""What happens to uploads: a large file comes in parts, in any order, and is put together at the end.

Parts are kept as files are, each on its own. Putting them together copies them, a piece at a time, so that the file is
whole on the disk before anybody hears of it, and a crash on the way leaves the upload as it was.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from afterglow.contracts import House, Transaction
from afterglow.errors import BlobMissing, InvalidRequest, NotFound
from afterglow.files import NewFile, delete_loose, insert_file, keep, storing
from afterglow.ids import new_id
from afterglow.objects import CompleteUpload, Upload, UploadPart
from afterglow.quotas import check_storage
from afterglow.rows import uploads as upload_rows
from afterglow.rows.files import LooseBlob, insert_loose_blob
from afterglow.rows.requests import Origin, give_answers, insert_request
from afterglow.rows.uploads import Part, UploadRow

LIFE_S = 3600
COMPLETING_S = 3600  # parts of an upload that expires while it is put together are left alone for so long
SWEEP_LIMIT = 20
MEGABYTE = 1024 * 1024


class _Whole(NamedTuple):
    """What an upload is to become."""

    row: UploadRow
    parts: list[Part]


async def create_upload(house: House, project: str, new: NewFile, size_bytes: int, origin: Origin) -> Upload:
    now = int(house.clock.now())
    if size_bytes > house.settings.max_upload_mb * MEGABYTE:
        raise InvalidRequest(f"{size_bytes} is greater than the maximum of {house.settings.max_upload_mb} MB - 'bytes'")
    upload = Upload(
        id=new_id("upload"),
        bytes=size_bytes,
        created_at=now,
        filename=new.filename,
        purpose=new.purpose,
        expires_at=now + LIFE_S,
    )

    async def work(tx: Transaction) -> None:
        await upload_rows.insert_upload(tx, project, UploadRow(upload, new.expires_after_s))
        await insert_request(tx, project, origin, upload.id, now)

    await house.store.write(work)
    return upload


async def create_part(
    house: House,
    project: str,
    upload_id: str,
    chunks: AsyncIterator[bytes],
    finish: Callable[[], Awaitable[Origin]],
) -> UploadPart:
    """Store a part. finish: called after the last of `chunks`. Raises NotFound, and InvalidRequest once it is over."""
    part = UploadPart(id=new_id("part"), created_at=int(house.clock.now()), upload_id=upload_id)
    try:
        await house.store.read(lambda tx: _pending(tx, house, project, upload_id, "add parts to"))
    except InvalidRequest:  # unless it is there already, and this asks for it again
        async for _ in chunks:
            pass
        await finish()
        raise
    async with storing(house, project, part.id, chunks) as stored:
        origin = await finish()

        async def work(tx: Transaction) -> None:
            await _pending(tx, house, project, upload_id, "add parts to")
            most = house.settings.max_upload_mb * MEGABYTE
            if await upload_rows.get_size(tx, project, upload_id) + stored.size_bytes > most:
                raise InvalidRequest(f"The parts of an upload can have {house.settings.max_upload_mb} MB together.")
            await check_storage(tx, house, project, origin.key_id, stored.size_bytes)
            await keep(tx, stored)
            await upload_rows.insert_part(tx, project, upload_id, Part(part.id, stored.size_bytes, stored.loose.blob))
            await insert_request(tx, project, origin, part.id, part.created_at)

        await house.store.write(work)
    return part


async def complete_upload(house: House, project: str, upload_id: str, body: CompleteUpload, origin: Origin) -> Upload:
    """Put the parts together in the order of `part_ids`; the others are dropped. Raises InvalidRequest when bytes or
    md5 are not as they were said to be, and leaves the upload as it was."""

    async def look(tx: Transaction) -> _Whole:
        row = await _pending(tx, house, project, upload_id, "complete")
        return _Whole(row, _in_order(await upload_rows.get_parts(tx, project, upload_id), body.part_ids, row.upload))

    whole = await house.store.read(look)
    try:
        return await _put_together(house, project, whole, body.md5 or "", origin)
    except BlobMissing:
        await house.store.read(lambda tx: _pending(tx, house, project, upload_id, "complete"))  # closed meanwhile?
        raise


async def _put_together(house: House, project: str, whole: _Whole, md5: str, origin: Origin) -> Upload:
    (upload, life_s), parts = whole
    hashed = hashlib.md5(usedforsecurity=False) if md5 else None
    async with (
        aclosing(_bytes_of(house, parts, hashed)) as chunks,
        storing(house, project, new_id("file", "-"), chunks) as stored,
    ):
        if hashed and hashed.hexdigest() != md5.lower():
            raise InvalidRequest(f"The file's md5 is {hashed.hexdigest()}, and the request says {md5[:64]}.")

        async def work(tx: Transaction) -> list[LooseBlob]:
            still = await _upload(tx, project, upload.id)
            _check_pending(still.upload.status, "complete")  # its time may have come meanwhile
            loose = await _close(tx, house, project, upload, "completed")  # first: its parts count no more
            upload.file = await insert_file(tx, house, stored, NewFile(upload.filename, upload.purpose, life_s), origin)
            await upload_rows.update_upload(tx, project, upload)
            await give_answers(tx, project, upload.id, upload.file.id)
            return loose

        loose = await house.store.write(work)
    await delete_loose(house, loose)
    return upload


def _in_order(have: dict[str, Part], part_ids: Sequence[str], upload: Upload) -> list[Part]:
    for part_id in part_ids:
        if part_id not in have:
            raise NotFound.of("part", part_id)
    if len(set(part_ids)) < len(part_ids):
        raise InvalidRequest("A part is named twice - 'part_ids'")
    parts = [have[part_id] for part_id in part_ids]
    if (size := sum(part.size_bytes for part in parts)) != upload.bytes:
        raise InvalidRequest(f"The parts have {size} bytes together, and the upload was to have {upload.bytes}.")
    return parts


async def _bytes_of(house: House, parts: Sequence[Part], hashed: Any) -> AsyncGenerator[bytes, None]:
    for part in parts:
        async with aclosing(house.blobs.get(part.blob)) as chunks:
            async for chunk in chunks:
                if hashed:
                    await asyncio.to_thread(hashed.update, chunk)
                yield chunk


async def cancel_upload(house: House, project: str, upload_id: str, origin: Origin) -> Upload:
    """Nothing more can be added, and its parts are deleted."""

    async def work(tx: Transaction) -> tuple[Upload, list[LooseBlob]]:
        upload = (await _pending(tx, house, project, upload_id, "cancel")).upload
        await insert_request(tx, project, origin, upload_id, int(house.clock.now()))
        return upload, await _close(tx, house, project, upload, "cancelled")

    upload, loose = await house.store.write(work)
    await delete_loose(house, loose)
    return upload


async def tidy_uploads(house: House) -> None:
    """Delete the parts of uploads that have expired."""
    before = house.clock.now() - COMPLETING_S

    async def work(tx: Transaction) -> tuple[int, list[LooseBlob]]:
        overdue = await upload_rows.list_overdue(tx, before, SWEEP_LIMIT)
        closed = [await _close(tx, house, project, upload, "expired") for project, upload in overdue]
        return len(overdue), [blob for blobs in closed for blob in blobs]

    count = SWEEP_LIMIT
    while count == SWEEP_LIMIT:
        count, loose = await house.store.write(work)
        await delete_loose(house, loose)


async def _upload(tx: Transaction, project: str, upload_id: str) -> UploadRow:
    row = await upload_rows.get_upload(tx, project, upload_id)
    if row is None:
        raise NotFound.of("upload", upload_id)
    return row


async def _pending(tx: Transaction, house: House, project: str, upload_id: str, what_for: str) -> UploadRow:
    """An upload that is open. Raises NotFound, and InvalidRequest once it is closed or its time is over."""
    row = await _upload(tx, project, upload_id)
    over = row.upload.status == "pending" and row.upload.expires_at <= house.clock.now()
    _check_pending("expired" if over else row.upload.status, what_for)
    return row


def _check_pending(status: str, what_for: str) -> None:
    if status != "pending":
        raise InvalidRequest(f"Cannot {what_for} upload with status '{status}'.")


async def _close(tx: Transaction, house: House, project: str, upload: Upload, status: Any) -> list[LooseBlob]:
    """End it; the bytes of its parts are loose from then on."""
    upload.status = status
    await upload_rows.update_upload(tx, project, upload)
    loose = [LooseBlob(project, blob) for blob in await upload_rows.delete_parts(tx, project, upload.id)]
    for blob in loose:
        await insert_loose_blob(tx, blob, int(house.clock.now()))
    return loose
