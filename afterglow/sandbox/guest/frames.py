"""The wire between the server and a session: how frames are cut, and which file names may pass.

A frame is the header's length (4 bytes, big-endian), the header (a JSON object in UTF-8), and a body of `n` bytes.
What the frames say is in `agent.py`, which alone writes those of a session, and `afterglow/sandbox/session.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

HEADER_BYTES = 65_536
BODY_BYTES = 1 << 20
NAME_BYTES = 1024
PART_BYTES = 255
NAME_PARTS = 32  # folders deeper than this are not looked into
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
IMAGE_BYTES = 8 << 20

H = TypeVar("H")

# Control characters, halves of surrogates, ends of lines and paragraphs, marks that turn the direction of writing.
_UNCLEAN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\\\\]")


class BadFrame(Exception):
    """The other side does not speak this wire. Nothing after it can be understood."""


def pack(header: dict[str, Any], body: bytes | bytearray = b"") -> bytes:
    """One frame. header: JSON values; `n` is added."""
    if body:
        header = {**header, "n": len(body)}
    told = json.dumps(header, separators=(",", ":")).encode()
    return len(told).to_bytes(4, "big") + told + body


def parse_header(raw: bytes) -> tuple[dict[str, Any], int]:
    """A header as plain data, and the size of its body. Raises BadFrame."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadFrame("the header is no JSON") from None
    size = header.get("n", 0) if isinstance(header, dict) else None
    if type(size) is not int:
        raise BadFrame("the header is no object, or its size no number")
    return header, size


class Frames(Generic[H]):
    """Cuts frames out of bytes as they come. Holds one unfinished frame at most, beside what is fed at once.

    parse: gives a header, and the size in bytes of the body that follows it.
    """

    def __init__(self, parse: Callable[[bytes], tuple[H, int]]) -> None:
        self._parse = parse
        self._held = bytearray()
        self._header: H | None = None
        self._wanted = 0

    def feed(self, data: bytes) -> Iterator[tuple[H, bytes]]:
        """The frames that `data` completes. Sizes are checked before anything is kept. Raises BadFrame."""
        self._held += data
        while True:
            if self._header is None and not self._read_header():
                return
            if len(self._held) < self._wanted:
                return
            header, body = self._header, bytes(self._held[: self._wanted])
            del self._held[: self._wanted]
            self._header = None
            assert header is not None
            yield header, body

    def _read_header(self) -> bool:
        if len(self._held) < 4:
            return False
        size = int.from_bytes(self._held[:4], "big")
        if size > HEADER_BYTES:
            raise BadFrame("the header is too long")
        if len(self._held) < 4 + size:
            return False
        self._header, self._wanted = self._parse(bytes(self._held[4 : 4 + size]))
        if not 0 <= self._wanted <= BODY_BYTES:
            raise BadFrame("the body is too long")
        del self._held[: 4 + size]
        return True


def is_clean_name(name: str) -> bool:
    """Whether a path below /mnt/data may pass: relative, plain components, and nothing that is no printable text."""
    if _UNCLEAN.search(name):
        return False
    path = name.encode()
    parts = path.split(b"/")
    if len(path) > NAME_BYTES or len(parts) > NAME_PARTS:
        return False
    return not any(part in (b"", b".", b"..") or len(part) > PART_BYTES for part in parts)


def is_image(data: bytes | bytearray, mime: str) -> bool:
    """Whether the first bytes are those of a picture of this kind, and there are not too many."""
    start = {"image/png": PNG, "image/jpeg": JPEG}.get(mime)
    return start is not None and data.startswith(start) and len(data) <= IMAGE_BYTES
