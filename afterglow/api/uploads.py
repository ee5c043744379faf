"""/v1/uploads"""

from __future__ import annotations

import hashlib
import re
from contextlib import aclosing
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow import uploads
from afterglow.api import schema_faults
from afterglow.api.answers import house_of, origin_of, project_of, reply
from afterglow.api.bodies import read_plain
from afterglow.api.edge import MAX_PART_MB
from afterglow.api.files import LONGEST_S, hashing
from afterglow.api.forms import MAX_FILENAME_CHARS, Form
from afterglow.errors import InvalidRequest
from afterglow.files import NewFile
from afterglow.objects import Body, CompleteUpload, CreateUpload
from afterglow.rows.requests import Origin

T = TypeVar("T", bound=Body)


async def create_upload(request: Request) -> Response:
    """POST /uploads"""
    body = await _parse(request, CreateUpload)
    life_s = body.expires_after.seconds if body.expires_after else LONGEST_S if body.purpose == "batch" else None
    new = NewFile(_without_folders(body.filename), body.purpose, life_s)
    origin = await origin_of(request)
    return reply(await uploads.create_upload(house_of(request), project_of(request), new, body.bytes, origin))


def _without_folders(given: str) -> str:
    name = re.split(r"[/\\]", given)[-1]
    if name in ("", ".", ".."):
        raise InvalidRequest(f"{given[:256]!r} is not the name of a file - 'filename'")
    if len(name) > MAX_FILENAME_CHARS:
        raise schema_faults.too_long(name, "filename")
    return name


async def create_upload_part(request: Request) -> Response:
    """POST /uploads/{upload_id}/parts. A multipart form with `data`, of up to 64 MB."""
    upload_id = request.path_params["upload_id"]
    form = Form(request, "data", (), MAX_PART_MB)
    await form.find_file()
    hashed = hashlib.sha256()

    async def finish() -> Origin:
        await form.finish()
        return await origin_of(request, hashed.hexdigest())

    async with aclosing(hashing(form.file(), hashed)) as chunks:
        return reply(await uploads.create_part(house_of(request), project_of(request), upload_id, chunks, finish))


async def complete_upload(request: Request) -> Response:
    """POST /uploads/{upload_id}/complete"""
    body = await _parse(request, CompleteUpload)
    upload_id, origin = request.path_params["upload_id"], await origin_of(request)
    return reply(await uploads.complete_upload(house_of(request), project_of(request), upload_id, body, origin))


async def cancel_upload(request: Request) -> Response:
    """POST /uploads/{upload_id}/cancel"""
    upload_id, origin = request.path_params["upload_id"], await origin_of(request)
    return reply(await uploads.cancel_upload(house_of(request), project_of(request), upload_id, origin))


async def _parse(request: Request, kind: type[T]) -> T:
    """Read the body as a `kind`. Raises InvalidRequest in the words of the older validator."""
    plain = read_plain(await request.body())
    schema_faults.check_shape(kind, plain)
    return msgspec.convert(plain, kind)
