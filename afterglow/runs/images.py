"""Stored images for the model: the bytes in place of the URLs that stand for them in a prompt."""

from __future__ import annotations

import asyncio
import base64
from contextlib import aclosing

from afterglow.contracts import ChatRequest, House
from afterglow.errors import BlobMissing
from afterglow.files import get_stored_file
from afterglow.objects import Json
from afterglow.rows.files import StoredFile
from afterglow.runs.context import STORED_IMAGE

MAX_IMAGE_BYTES = 20 * 1024 * 1024
MAX_TOGETHER_BYTES = 50 * 1024 * 1024  # of one call; of more, the newest are sent


def image_type(head: bytes) -> str | None:
    """The media type of an image that models take, by its first bytes."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    return None


async def inline_stored_images(house: House, project: str, request: ChatRequest) -> None:
    """Put `data:` URLs in the place of those of stored images. One that cannot be sent is named in words instead."""
    room = MAX_TOGETHER_BYTES
    for message in reversed(request.messages):
        parts = message["content"]
        if not isinstance(parts, list) or not any(_file_id(part) for part in parts):
            continue
        for index in reversed(range(len(parts))):
            if file_id := _file_id(parts[index]):
                parts[index], size_bytes = await _inlined(house, project, parts[index], file_id, room)
                room -= size_bytes
        if all(part["type"] == "text" for part in parts):
            message["content"] = "\n".join(part["text"] for part in parts)


def _file_id(part: Json) -> str:
    url: str = part["image_url"]["url"] if part["type"] == "image_url" else ""
    return url.removeprefix(STORED_IMAGE) if url.startswith(STORED_IMAGE) else ""


async def _inlined(house: House, project: str, part: Json, file_id: str, room: int) -> tuple[Json, int]:
    """The part that is sent, and how many bytes of image are in it."""
    stored = await get_stored_file(house, project, file_id)
    if stored is None:
        return _mention(file_id), 0
    if stored.file.bytes > min(MAX_IMAGE_BYTES, room):
        return _mention(f"{file_id}, too large to be shown"), 0
    try:
        data = await _read(house, stored)
    except BlobMissing:
        return _mention(file_id), 0
    media_type = image_type(data)
    if media_type is None:
        return _mention(f"{file_id}, no PNG, JPEG, GIF or WebP image"), 0
    encoded = await asyncio.to_thread(base64.b64encode, data)
    url = f"data:{media_type};base64,{encoded.decode()}"
    return {"type": "image_url", "image_url": {**part["image_url"], "url": url}}, len(data)


def _mention(words: str) -> Json:
    return {"type": "text", "text": f"[image: {words}]"}


async def _read(house: House, stored: StoredFile) -> bytes:
    async with aclosing(house.blobs.get(stored.blob)) as chunks:
        return b"".join([chunk async for chunk in chunks])
