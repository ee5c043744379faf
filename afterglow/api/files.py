"""/v1/files"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, get_args
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from afterglow import files
from afterglow.api import schema_faults
from afterglow.api.answers import JSON, house_of, origin_of, project_of, reply, reply_stored
from afterglow.api.forms import Form
from afterglow.api.pages import ORDERS, list_body, query_value
from afterglow.contracts import Transaction
from afterglow.errors import InvalidRequest, NotFound
from afterglow.files import NewFile, no_file
from afterglow.objects import Deleted, File, FilePurpose
from afterglow.rows import files as file_rows
from afterglow.rows.lists import ListPage, UnknownCursor
from afterglow.rows.requests import Origin

PURPOSES = get_args(FilePurpose)
MAX_FILES = 10_000
SHORTEST_S, LONGEST_S = 3600, 30 * 24 * 3600
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = ("purpose", ANCHOR, SECONDS)
RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
UNQUOTABLE = re.compile(r'[^ -~]|["\\%]')  # in the plain `filename` of a header


async def create_file(request: Request) -> Response:
    """POST /files. A multipart form with `file` and `purpose`, in any order."""
    form = Form(request, "file", FIELDS, house_of(request).settings.max_file_mb)
    await form.find_file()
    _check_fields(form.fields)  # before the file is read, if they came before it
    hashed = hashlib.sha256()

    async def finish() -> tuple[NewFile, Origin]:
        await form.finish()
        new = _new_file(form)
        hashed.update(repr(new).encode())
        return new, await origin_of(request, hashed.hexdigest())

    async with aclosing(hashing(form.file(), hashed)) as chunks:
        return reply(await files.create_file(house_of(request), project_of(request), chunks, finish))


async def hashing(chunks: AsyncIterator[bytes], hashed: Any) -> AsyncGenerator[bytes, None]:
    """The same, fed to a hash of the request. The body itself would not do: its boundary is another one each time."""
    async for chunk in chunks:
        hashed.update(chunk)
        yield chunk


def _check_fields(fields: dict[str, str]) -> None:
    """Refuse what is wrong with those that are there."""
    if "purpose" in fields:
        schema_faults.check_choice(fields["purpose"], PURPOSES, "purpose")
    if ANCHOR in fields:
        schema_faults.check_choice(fields[ANCHOR], ["created_at"], ANCHOR)
    if SECONDS in fields:
        schema_faults.read_integer(fields[SECONDS], SHORTEST_S, LONGEST_S, SECONDS)


def _new_file(form: Form) -> NewFile:
    fields = form.fields
    _check_fields(fields)
    for name in ("purpose", *(FIELDS if ANCHOR in fields or SECONDS in fields else ())):
        if name not in fields:
            raise schema_faults.missing(name)
    expires_after_s = int(fields[SECONDS]) if SECONDS in fields else None
    if expires_after_s is None and fields["purpose"] == "batch":
        expires_after_s = LONGEST_S
    return NewFile(form.filename, fields["purpose"], expires_after_s)


async def list_files(request: Request) -> Response:
    """GET /files"""
    limit, order = query_value(request, "limit"), query_value(request, "order") or "desc"
    page_size = MAX_FILES if limit is None else schema_faults.read_integer(limit, 1, MAX_FILES, "limit")
    schema_faults.check_choice(order, ORDERS, "order")
    purpose, after = query_value(request, "purpose"), query_value(request, "after")
    now = house_of(request).clock.now()

    async def work(tx: Transaction) -> ListPage:
        return await file_rows.list_files(
            tx, project_of(request), purpose, now, limit=page_size, order=order, after=after
        )

    try:
        found = await house_of(request).store.read(work)
    except UnknownCursor:
        raise NotFound("Resource not found.", param="after") from None
    return reply(list_body(found.objects, found.ids, found.has_more))


async def retrieve_file(request: Request) -> Response:
    """GET /files/{file_id}"""
    file_id, now = request.path_params["file_id"], house_of(request).clock.now()

    async def work(tx: Transaction) -> str | None:
        return await file_rows.get_file_object(tx, project_of(request), file_id, now)

    return await reply_stored(request, work, lambda: no_file(file_id))


async def delete_file(request: Request) -> Response:
    """DELETE /files/{file_id}"""
    file_id = request.path_params["file_id"]
    await files.delete_file(house_of(request), project_of(request), file_id)
    return reply(Deleted(id=file_id, object="file"))


# --- contents --------------------------------------------------------------------------------------------------


async def retrieve_file_content(request: Request) -> Response:
    """GET /files/{file_id}/content. The bytes, or those of one range; a browser saves and never shows them."""
    file_id = request.path_params["file_id"]
    stored = await files.get_stored_file(house_of(request), project_of(request), file_id)
    if stored is None:
        raise no_file(file_id)
    size, headers = stored.file.bytes, _headers(stored.file)
    wanted = _wanted_range(request, stored.file)
    if wanted is None:
        start, end, status = 0, size, 200
    elif wanted[0] < wanted[1]:
        (start, end), status = wanted, 206
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    else:
        fault = InvalidRequest(f"The file has {size} bytes, and none in this range.")
        return Response(fault.body(), 416, {"content-range": f"bytes */{size}"}, JSON)
    headers["content-length"] = str(end - start)
    if request.method == "HEAD":
        return Response(None, status, headers)
    chunks = house_of(request).blobs.get(stored.blob, start, end)
    first = await anext(chunks, b"")  # if the bytes are missing, that must be known before the answer begins
    return StreamingResponse(_with_first(first, chunks), status, headers)


def _headers(file: File) -> dict[str, str]:
    plain = UNQUOTABLE.sub("_", file.filename)
    return {
        "content-type": "application/octet-stream",
        "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(file.filename, safe='')}",
        "x-content-type-options": "nosniff",
        "accept-ranges": "bytes",
        "etag": f'"{file.id}"',
    }


def _wanted_range(request: Request, file: File) -> tuple[int, int] | None:
    """The start and the end (not included) that are asked for; None for the whole file. Several at once are ignored,
    and so is a range of what the client takes for another file."""
    found = RANGE.fullmatch(request.headers.get("range", ""))
    if not found or not (found[1] or found[2]) or request.headers.get("if-range", f'"{file.id}"') != f'"{file.id}"':
        return None
    if not found[1]:
        return max(file.bytes - int(found[2]), 0), file.bytes
    last = int(found[2]) if found[2] else file.bytes
    return None if last < int(found[1]) else (int(found[1]), min(last + 1, file.bytes))


async def _with_first(first: bytes, others: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(others):
        yield first
        del first  # a slow reader would hold it to the end
        async for chunk in others:
            yield chunk
