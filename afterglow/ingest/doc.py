"""Text of Word documents of 1997 to 2003 (.doc): a small file system, and in it a table of the pieces of the text.

Source: [MS-CFB] for the file system, [MS-DOC] 2.4.1 for finding the text. Formatting is not read, so tables keep only
their cells and lists only their items.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from afterglow.ingest.extract import Extracted, clean, invalid, too_large, unsupported

MAX_DOC_BYTES = 256_000_000
_OLD = "save it as .docx or PDF, and upload that"
_END_OF_CHAIN = 0xFFFFFFFA  # this and above are no sectors
_MINI_STREAM_BELOW = 4096


def read_doc(data: bytes) -> Extracted:
    """A Word document. Raises Unreadable for other programs' files in the same file system."""
    if len(data) > MAX_DOC_BYTES:
        raise too_large()
    try:
        streams = _Streams(data)
        if streams.find("EncryptedPackage") is not None:
            raise invalid("it is protected by a password. Remove the password, and upload it again")
        word = streams.find("WordDocument")
        if word is None:
            raise unsupported(_other_program(streams))
        return Extracted(_readable(_text(word, streams)))
    except (struct.error, IndexError):
        raise invalid(f"it is a damaged Word document; {_OLD}") from None


def _other_program(streams: _Streams) -> str:
    if streams.find("Workbook") is not None or streams.find("Book") is not None:
        return "it is an old Excel workbook; save it as .xlsx, and upload that"
    if streams.find("PowerPoint Document") is not None:
        return "it is an old PowerPoint presentation; save it as .pptx or PDF, and upload that"
    return "it is a file of a program that is not known here"


class _Streams:
    """The compound file: sectors, chained by a table, that make up named streams."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        shift, mini_shift = struct.unpack_from("<HH", data, 30)
        if shift not in (9, 12) or mini_shift != 6:
            raise struct.error("sector size")
        self._size = 1 << shift
        first_directory, first_mini = struct.unpack_from("<I", data, 48)[0], struct.unpack_from("<I", data, 60)[0]
        self._table = self._read_table()
        directory = self._chain(first_directory)
        self._entries = dict(self._read_entries(directory))
        self._mini_table = self._numbers(self._chain(first_mini))
        root = self._entries.get("Root Entry")
        self._mini = self._chain(root[0]) if root else b""

    def find(self, name: str) -> bytes | None:
        """A stream by its name, in whichever folder."""
        if name not in self._entries:
            return None
        first, size = self._entries[name]
        data = self._chain(first) if size >= _MINI_STREAM_BELOW else self._mini_chain(first)
        return data[:size]

    def _sector(self, number: int) -> bytes:
        return self._data[(number + 1) * self._size : (number + 2) * self._size]

    def _numbers(self, data: bytes) -> list[int]:
        return [number for (number,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4])]

    def _read_table(self) -> list[int]:
        """Which sector follows which. Its own sectors are listed in the header, then in a chain of lists."""
        sectors = list(struct.unpack_from("<109I", self._data, 76))
        following, count = struct.unpack_from("<II", self._data, 68)
        for _ in range(min(count, len(self._data) // self._size)):
            if following >= _END_OF_CHAIN:
                break
            *more, following = self._numbers(self._sector(following))
            sectors += more
        limit = len(self._data) // self._size
        return [n for sector in sectors[: limit + 109] if sector < limit for n in self._numbers(self._sector(sector))]

    def _chain(self, first: int) -> bytes:
        return b"".join(self._sector(number) for number in self._follow(first, self._table))

    def _mini_chain(self, first: int) -> bytes:
        return b"".join(self._mini[n * 64 : n * 64 + 64] for n in self._follow(first, self._mini_table))

    def _follow(self, number: int, table: list[int]) -> Iterator[int]:
        seen = 0
        while number < _END_OF_CHAIN:
            seen += 1
            if seen > len(table):
                raise struct.error("a ring of sectors")
            yield number
            number = table[number]

    def _read_entries(self, directory: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
        for at in range(0, len(directory) - 127, 128):
            length, kind = struct.unpack_from("<HB", directory, at + 64)
            if kind in (2, 5):  # a stream, or the root, which holds the small streams
                name = directory[at : at + max(0, min(length, 64) - 2)].decode("utf-16-le", "replace")
                yield name, struct.unpack_from("<II", directory, at + 116)


def _text(word: bytes, streams: _Streams) -> str:
    """The main text and the notes, as the piece table gives them."""
    magic, version = struct.unpack_from("<HH", word)
    flags = struct.unpack_from("<H", word, 10)[0]
    if magic != 0xA5EC or version < 0xC1:
        raise unsupported(f"it is a Word document of before 1997; {_OLD}")
    if flags & 0x0100:
        raise invalid("it is protected by a password. Remove the password, and upload it again")
    table = streams.find("1Table" if flags & 0x0200 else "0Table")
    start, size = struct.unpack_from("<II", word, 0x01A2)
    if table is None or not size:
        raise struct.error("no piece table")
    return "".join(_pieces(word, table[start : start + size]))


def _pieces(word: bytes, table: bytes) -> Iterator[str]:
    at = 0
    while table[at] == 1:  # properties, which are of no use here
        at += 3 + struct.unpack_from("<H", table, at + 1)[0]
    if table[at] != 2:
        raise struct.error("no piece table")
    count = (struct.unpack_from("<I", table, at + 1)[0] - 4) // 12
    ends = struct.unpack_from(f"<{count + 1}I", table, at + 5)
    for piece in range(count):
        characters = max(0, ends[piece + 1] - ends[piece])
        offset = struct.unpack_from("<I", table, at + 5 + 4 * (count + 1) + 8 * piece + 2)[0]
        if offset & 0x40000000:
            start = (offset & 0x3FFFFFFF) // 2
            yield word[start : start + characters].decode("cp1252", "replace")
        else:
            yield word[offset : offset + 2 * characters].decode("utf-16-le", "replace")


def _readable(text: str) -> str:
    """Marks become what they stand for: fields show their result, cells are parted, paragraphs stand apart."""
    text = re.sub(r"\x13[^\x13-\x15]*\x14|\x13[^\x13-\x15]*\x15|[\x13-\x15]", "", text)
    text = text.replace("\x07\x07", "\n").replace("\x07", " | ").replace("\x1e", "-").replace("\x1f", "")
    text = text.translate({0x0B: "\n", 0x0C: "\n\n", 0x0D: "\n\n", 0x0E: "\n"})
    return clean(re.sub(r"\n{3,}", "\n\n", re.sub(r"[\x00-\x08\x10-\x1f]", "", text)).strip())
