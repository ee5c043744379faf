"""Multipart forms with one file in them, read as they come in: the file is never held whole.

What the fields say is the business of the route.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncGenerator, Collection
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.requests import Request

from afterglow.api import faults, schema_faults
from afterglow.errors import BodyTooLarge, InvalidRequest

PIECE_BYTES = 64 * 1024
MAX_FIELD_BYTES = 1024
MAX_FILENAME_CHARS = 255
PARAMETER = re.compile(rb';\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;]*))', re.DOTALL)
# What clients escape in a file name. Nothing else is unescaped: a name may hold a percent sign of its own.
ESCAPED = {"%22": '"', "%0D": "\r", "%0A": "\n"}


class Form:
    """A form with one file. filename: set once `find_file` has returned. fields: the others, as far as they were read.

    Nothing is read before it is asked for: `find_file`, then all of `file`, then `finish`. They raise InvalidRequest
    for the first thing that is wrong with the form, and ClientDisconnect.
    """

    def __init__(self, request: Request, file_field: str, fields: Collection[str], max_file_mb: int) -> None:
        """fields: names of the others that may be there. Raises InvalidRequest when the request holds no form."""
        self.filename = ""
        self.fields: dict[str, str] = {}
        self._file_field = file_field
        self._allowed = fields
        self._max_file_mb = max_file_mb
        self._parser = MultipartParser(
            _boundary(request.headers.get("content-type", "")),
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._take_header_name,
                "on_header_value": self._take_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._name_part,
                "on_part_data": self._take_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )
        self._chunks = request.stream()
        self._header_name = self._header_value = self._disposition = b""
        self._field = ""
        self._text = b""
        self._in_file = False
        self._size = 0
        self._pieces: deque[bytes] = deque()
        self._ended = False

    async def find_file(self) -> None:
        """Read as far as the start of the file."""
        while not self.filename:
            if not await self._read():
                raise schema_faults.missing(self._file_field)

    async def file(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the file. Raises BodyTooLarge."""
        while True:
            while self._pieces:
                yield self._pieces.popleft()
            if not self._in_file:
                return
            await self._read()

    async def finish(self) -> None:
        """Read what comes after the file."""
        while await self._read():
            pass

    async def _read(self) -> bool:
        """Take in some of the body; False when there is no more and the form is whole."""
        chunk = await anext(self._chunks, None)
        if chunk is None:
            if not self._ended:
                raise _broken("it ends before its last boundary")
            return False
        try:
            for at in range(0, len(chunk), PIECE_BYTES):
                self._parser.write(chunk[at : at + PIECE_BYTES])
        except FormParserError as error:
            raise _broken(str(error)) from None
        return True

    # --- called by the parser ----------------------------------------------------------------------------------

    def _begin_part(self) -> None:
        self._disposition = self._text = b""

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _name_part(self) -> None:
        parameters = _parameters(self._disposition)
        if b"name" not in parameters:
            raise _broken("a part of it has no name")
        self._field = field = _text(parameters[b"name"], "name")
        if field != self._file_field and field not in self._allowed:
            raise schema_faults.unexpected(field)
        if field in self.fields or (field == self._file_field and self.filename):
            raise schema_faults.given_twice(field)
        if field == self._file_field:
            self.filename, self._in_file = _filename(parameters, field), True

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._text += data[start:end]
            if len(self._text) > MAX_FIELD_BYTES:
                raise schema_faults.too_long(_text(self._text, self._field), self._field)
            return
        self._size += end - start
        if self._size > self._max_file_mb * 1024 * 1024:
            raise BodyTooLarge(f"The file is larger than {self._max_file_mb} MB.")
        self._pieces.append(data[start:end])

    def _end_part(self) -> None:
        if not self._in_file:
            self.fields[self._field] = _text(self._text, self._field)
        self._in_file = False

    def _end(self) -> None:
        self._ended = True


# --- headers ---------------------------------------------------------------------------------------------------


def _boundary(content_type: str) -> bytes:
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise InvalidRequest(f"Invalid Content-Type header ({faults.shown(kind)}), expected multipart/form-data.")
    boundary = _parameters(content_type.encode("latin-1")).get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:
        raise _broken("its Content-Type header names no boundary of 1 to 70 characters")
    return boundary


def _parameters(header: bytes) -> dict[bytes, bytes]:
    """Those after the first semicolon, by name in small letters."""
    return {
        name.lower(): plain.strip() if quoted is None else re.sub(rb'\\(["\\])', rb"\1", quoted)
        for name, quoted, plain in (found.groups() for found in PARAMETER.finditer(header))
    }


def _filename(parameters: dict[bytes, bytes], field: str) -> str:
    """The name without its folders. Raises InvalidRequest when the part is no file, or has no name that can be kept."""
    given = _extended(parameters.get(b"filename*", b""))
    if given is None:
        given = re.sub("%22|%0[DA]", lambda found: ESCAPED[found[0]], _text(parameters.get(b"filename", b""), field))
    if not given:
        raise InvalidRequest(f"'{field}' is not of type 'file': this part of the form has no filename")
    name = re.split(r"[/\\]", given)[-1]
    if name in ("", ".", ".."):
        raise InvalidRequest(f"{faults.shown(given)!r} is not the name of a file - '{field}'")
    if len(name) > MAX_FILENAME_CHARS:
        raise schema_faults.too_long(name, "filename")
    return name


def _extended(value: bytes) -> str | None:
    """`UTF-8''na%C3%AFve.txt`: the form in which some clients send what is not ASCII. None when it is no such text."""
    charset, *others = value.split(b"'", 2)
    if charset.lower() != b"utf-8" or len(others) != 2:
        return None
    return _text(unquote_to_bytes(others[1]), "filename")


def _text(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise InvalidRequest(f"'{name}' is not UTF-8 text") from None
    faults.check_text(text, name)
    return text


def _broken(reason: str) -> InvalidRequest:
    return InvalidRequest(f"Could not parse the multipart form: {reason}.")
