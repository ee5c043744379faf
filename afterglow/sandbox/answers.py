"""What a session may answer, and what waits for it: every frame typed, every total bounded.

No clock and no connection: `session.py` reads the bytes, keeps time, and ends a session that does not fit.
"""

from __future__ import annotations

import asyncio
import codecs
import math
from collections import deque
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from afterglow.contracts import CellOutput, Logs, Picture, SandboxFile
from afterglow.sandbox.guest.frames import BODY_BYTES, IMAGE_BYTES, BadFrame, is_clean_name, is_image

FLOOD = 8  # so many times what is kept of a cell's text and pictures is read and dropped
CELL_FRAMES = 100_000
CELL_IMAGES = 20
CELL_IMAGE_BYTES = 32 << 20
ERROR_BYTES = 65_536  # an exception's text is kept, however much was printed before it
LIST_FILES = 10_000
LINE_CHARS = 200
DOWNLOAD_BYTES = 1 << 20  # read ahead of whoever takes a file

Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Answer(msgspec.Struct, tag_field="t", tag=str.lower, forbid_unknown_fields=True, kw_only=True):
    """The header of a frame from the agent. id: the request that it answers. n: bytes of the body that follows."""

    id: Size
    n: Annotated[int, msgspec.Meta(ge=0, le=BODY_BYTES)] = 0


class Ready(Answer):
    """The worker is there."""


class Text(Answer, tag="logs"):
    """More of what the cell prints. error: it is the text of an exception."""

    error: bool = False


class Image(Answer):
    """A piece of a picture."""

    mime: Literal["image/png", "image/jpeg"]
    last: bool


class Done(Answer):
    """The cell is over. exit: how the worker has died, as `Popen.returncode`. broke: its agent killed it."""

    status: Literal["ok", "error", "interrupted", "died"]
    exit: Annotated[int, msgspec.Meta(ge=-64, le=255)] = 0
    broke: bool = False


class Ok(Answer):
    """The file is written."""


class Fail(Answer):
    """The request cannot be carried out."""

    reason: Literal["full", "name", "missing", "large", "other"]


class Beat(Answer):
    """It lives."""


class Bytes(Answer):
    """More of a file."""


class Listed(Answer, tag="files"):
    """More files, as JSON."""


class End(Answer):
    """The last frame of a list or a file."""

    size: Size = 0


_header = msgspec.json.Decoder(Ready | Text | Image | Done | Ok | Fail | Beat | Bytes | Listed | End)
_listed = msgspec.json.Decoder(list[tuple[str, Size, Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]]])


def one_line(text: str) -> str:
    """What strangers say, as it may be logged or shown: one printable line of at most 200 characters."""
    line = " ".join(text.split())[:LINE_CHARS]
    return "".join(char if char.isprintable() else "?" for char in line)


def read_header(raw: bytes) -> tuple[Answer, int]:
    """Decode a header, and say how long its body is. Raises BadFrame."""
    try:
        answer = _header.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"its header is none: {error}") from None
    return answer, answer.n


class Request:
    """Something that waits for frames of one id. over: it has had its last, or will have none."""

    def __init__(self) -> None:
        self.over = False
        self._news = asyncio.Event()

    def take(self, answer: Answer, body: bytes) -> None:
        """A frame for it. Raises BadFrame when it cannot be one."""
        raise NotImplementedError

    def finish(self) -> None:
        self.over = True
        self._news.set()

    async def news(self) -> None:
        """Wait until something was taken since the last call, or it is over."""
        if not self.over:
            await self._news.wait()
            self._news.clear()

    async def room(self) -> None:
        """Wait until more may be taken."""


class Reply(Request):
    """A request that has one answer, `expected` or `fail`."""

    def __init__(self, expected: type[Answer]) -> None:
        super().__init__()
        self._expected = expected
        self.failed = ""

    def take(self, answer: Answer, body: bytes) -> None:
        if isinstance(answer, Fail):
            self.failed = answer.reason
        elif not isinstance(answer, self._expected) or body:
            raise BadFrame(f"{type(answer).__name__} answers nothing that was asked")
        self.finish()


class Listing(Request):
    """A list under way."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[SandboxFile] = []
        self._told = 0

    def take(self, answer: Answer, body: bytes) -> None:
        if isinstance(answer, End) and not body:
            self.finish()
            return
        if not isinstance(answer, Listed):
            raise BadFrame(f"{type(answer).__name__} is no list")
        try:
            rows = _listed.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadFrame(f"its list is none: {error}") from None
        self._told += len(rows)
        if self._told > LIST_FILES or not rows:
            raise BadFrame("its list has no end")
        self.files += [SandboxFile(*row) for row in rows if is_clean_name(row[0])]


class Download(Request):
    """A file on its way. When nobody takes it any more, its frames are still counted."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.failed = ""
        self._left = max_bytes
        self._chunks: deque[bytes] = deque()
        self._dropped = False
        self._taken = asyncio.Event()

    def take(self, answer: Answer, body: bytes) -> None:
        match answer:
            case Bytes() if 0 < len(body) <= self._left:
                self._left -= len(body)
                if not self._dropped:
                    self._chunks.append(body)
                self._news.set()
            case End() if not body:
                self.finish()
            case Fail() if not body:
                self.failed = answer.reason
                self.finish()
            case _:
                raise BadFrame("it sends more of a file than was asked for, or something else")

    def next_chunk(self) -> bytes | None:
        self._taken.set()
        return self._chunks.popleft() if self._chunks else None

    def drop(self) -> None:
        self._dropped = True
        self._chunks.clear()
        self._taken.set()

    async def room(self) -> None:
        while sum(map(len, self._chunks)) > DOWNLOAD_BYTES and not self.over:
            self._taken.clear()
            await self._taken.wait()

    def finish(self) -> None:
        super().finish()
        self._taken.set()


class Cell(Request):
    """A cell that runs: what it has shown and nobody has taken yet, and the totals that bound it.

    cause: why it was interrupted, in words; empty when it was not. kill_at: when that ends the session, on the event
    loop's clock. flooded: called when it shows far more than is kept.
    """

    def __init__(self, text_bytes: int, flooded: Callable[[], None]) -> None:
        super().__init__()
        self.done: Done | None = None
        self.cause = ""
        self.kill_at = math.inf
        self.clipped_bytes = 0
        self._flooded = flooded
        self._text_bytes = text_bytes
        self._printed = self._errors = self._frames = self._images = self._image_bytes = 0
        self._waiting: deque[bytearray | Picture] = deque()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._image: bytearray | None = None
        self._mime = ""

    def take(self, answer: Answer, body: bytes) -> None:
        self._frames += 1
        match answer:
            case Text() if body:
                self._take_text(body, answer.error)
            case Image() if body:
                self._take_image(answer, body)
            case Done() if not body:
                self.done = answer
                self.finish()
                return
            case _:
                raise BadFrame(f"{type(answer).__name__} is nothing that a cell shows")
        printed = self._printed + self._errors
        if (
            self._frames > CELL_FRAMES
            or printed > FLOOD * self._text_bytes
            or self._image_bytes > FLOOD * CELL_IMAGE_BYTES
        ):
            self._flooded()
        self._news.set()

    def _take_text(self, body: bytes, error: bool) -> None:
        if error:
            kept = body[: max(0, ERROR_BYTES - self._errors)]
            self._errors += len(body)
        else:
            kept = body[: max(0, self._text_bytes - self._printed)]
            self._printed += len(body)
        self.clipped_bytes += len(body) - len(kept)
        # Joined, since frames of one byte each would take a hundred times their size.
        if self._waiting and isinstance(self._waiting[-1], bytearray):
            self._waiting[-1] += kept
        elif kept:
            self._waiting.append(bytearray(kept))

    def _take_image(self, answer: Image, body: bytes) -> None:
        if self._image is None:
            self._image, self._mime = bytearray(), answer.mime
        if answer.mime != self._mime:
            raise BadFrame("its picture changes its kind")
        self._image_bytes += len(body)
        if len(self._image) <= IMAGE_BYTES:
            self._image += body
        if answer.last:
            self._take_picture(bytes(self._image), answer.mime)
            self._image = None

    def _take_picture(self, data: bytes, mime: Literal["image/png", "image/jpeg"]) -> None:
        if not is_image(data[:16], mime):
            raise BadFrame("its picture is none")
        self._images += 1
        if len(data) > IMAGE_BYTES or self._images > CELL_IMAGES or self._image_bytes > CELL_IMAGE_BYTES:
            self.clipped_bytes += len(data)
        else:
            self._waiting.append(Picture(data, mime))

    def shown(self) -> list[CellOutput]:
        """What has come since the last call."""
        shown: list[CellOutput] = []
        while self._waiting:
            part = self._waiting.popleft()
            if isinstance(part, Picture):
                shown.append(part)
            elif text := self._decoder.decode(part):
                shown.append(Logs(text.replace("\0", "\ufffd")))
        if self.over and (rest := self._decoder.decode(b"", final=True)):
            shown.append(Logs(rest))
        return shown
