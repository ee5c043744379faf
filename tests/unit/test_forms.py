"""Forms are read the same whatever pieces they come in, and what is no form is told as such."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from afterglow.api.forms import MAX_FILENAME_CHARS, Form
from afterglow.errors import ApiError, BodyTooLarge, InvalidRequest

BOUNDARY = "x-boundary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
NEARLY_BOUNDARIES = [b"\r", b"\n", b"-", b"--x-bound", b"\r\n--x-boundar"]


def request(pieces: Iterable[bytes], content_type: str) -> Request:
    body = iter(pieces)

    async def receive() -> dict[str, Any]:
        piece = next(body, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    headers = [(b"content-type", content_type.encode("latin-1"))]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def part(disposition: str, data: bytes, *more: str) -> bytes:
    head = "\r\n".join([f"--{BOUNDARY}", f"Content-Disposition: form-data; {disposition}", *more])
    return head.encode("utf-8", "surrogatepass") + b"\r\n\r\n" + data + b"\r\n"


def a_file(data: bytes = b"data", filename: str = 'filename="a.txt"') -> bytes:
    return part(f'name="file"; {filename}', data, "Content-Type: text/plain")


PURPOSE = part('name="purpose"', b"assistants")
END = f"--{BOUNDARY}--\r\n".encode()


def cut(body: bytes, size: int) -> list[bytes]:
    return [body[at : at + size] for at in range(0, len(body), size)]


async def read(pieces: Iterable[bytes], content_type: str = FORM) -> tuple[str, bytes, dict[str, str]]:
    form = Form(request(pieces, content_type), "file", ("purpose", "other"), max_file_mb=1)
    await form.find_file()
    data = b"".join([chunk async for chunk in form.file()])
    await form.finish()
    return form.filename, data, form.fields


async def refused(pieces: Iterable[bytes], content_type: str = FORM) -> str:
    with pytest.raises(InvalidRequest) as raised:
        await read(pieces, content_type)
    assert raised.value.code is None or raised.value.code == "invalid_value"
    return raised.value.message


# --- what is read ----------------------------------------------------------------------------------------------


@given(
    st.binary(max_size=300) | st.lists(st.sampled_from(NEARLY_BOUNDARIES)).map(b"".join),
    st.integers(1, 80),
    st.booleans(),
)
async def test_the_pieces_do_not_matter(data: bytes, size: int, file_first: bool):
    """Any bytes, in pieces of any size, with the fields before or after the file, come out as they went in."""
    parts = [a_file(data), PURPOSE] if file_first else [PURPOSE, a_file(data)]
    assert await read(cut(b"".join(parts) + END, size)) == ("a.txt", data, {"purpose": "assistants"})


async def test_a_file_may_be_empty():
    """A file without bytes is a file."""
    assert await read([PURPOSE + a_file(b"") + END]) == ("a.txt", b"", {"purpose": "assistants"})


async def test_what_comes_before_the_file_is_known_when_it_begins():
    """So that a bad field is refused before anything is stored."""
    form = Form(request([PURPOSE, a_file(), END], FORM), "file", ("purpose",), max_file_mb=1)
    await form.find_file()
    assert (form.filename, form.fields) == ("a.txt", {"purpose": "assistants"})


@pytest.mark.parametrize("content_type", [FORM.replace(BOUNDARY, f'"{BOUNDARY}"'), FORM.replace("multi", "Multi")])
async def test_content_types(content_type: str):
    """The boundary may stand in quotes, and letters are large or small."""
    assert (await read([a_file() + END], content_type))[0] == "a.txt"


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ('filename="naïve – 日本語 😀.PDF"', "naïve – 日本語 😀.PDF"),
        ('filename="مرحبا.txt"', "مرحبا.txt"),
        ('filename="e\u0301.txt"', "e\u0301.txt"),
        ('filename="say %22hi%22.txt"', 'say "hi".txt'),
        ('filename="say \\"hi\\".txt"', 'say "hi".txt'),
        ('filename="100%.txt"', "100%.txt"),
        ('filename="%41.txt"', "%41.txt"),
        ('filename="a;b=c.txt"', "a;b=c.txt"),
        ("filename=plain.txt", "plain.txt"),
        ('filename="../../etc/x"', "x"),
        ('filename="/mnt/data/out.csv"', "out.csv"),
        ('filename="C:\\fakepath\\out.csv"', "out.csv"),
        ('filename="C:\\\\fakepath\\\\out.csv"', "out.csv"),
        ("filename=\"x.txt\"; filename*=UTF-8''na%C3%AFve%20%F0%9F%98%80.txt", "naïve 😀.txt"),
        ("filename*=utf-8'en'%2e%2e%2fx.txt", "x.txt"),
        ("filename=\"x.txt\"; filename*=koi8-r''%C1", "x.txt"),
        (f'filename="{"é" * MAX_FILENAME_CHARS}"', "é" * MAX_FILENAME_CHARS),
        ('filename=" .hidden "', " .hidden "),
    ],
)
async def test_names(given_name: str, kept: str):
    """A name is kept as it is, without its folders, in each of the forms in which clients send one."""
    assert (await read([a_file(filename=given_name) + PURPOSE + END]))[0] == kept


@pytest.mark.parametrize(
    ("given_name", "words"),
    [
        ('filename="a\0b.txt"', "Invalid 'file': string contains a NUL character."),
        ("filename*=UTF-8''a%00b", "Invalid 'filename': string contains a NUL character."),
        ('filename="\ud800.txt"', "Invalid 'file': string contains a lone surrogate."),
        ("filename*=UTF-8''%ED%A0%80", "Invalid 'filename': string contains a lone surrogate."),
        ("filename*=UTF-8''%FF", "'filename' is not UTF-8 text"),
        ('filename=".."', "'..' is not the name of a file - 'file'"),
        ('filename="folder/"', "'folder/' is not the name of a file - 'file'"),
        (f'filename="{"x" * (MAX_FILENAME_CHARS + 1)}"', "is too long - 'filename'"),
        ('filename=""', "'file' is not of type 'file': this part of the form has no filename"),
        ("", "'file' is not of type 'file': this part of the form has no filename"),
    ],
)
async def test_names_that_cannot_be_kept(given_name: str, words: str):
    """What no file system or header could hold is refused, and so is a file that is sent as text."""
    assert words in await refused([a_file(filename=given_name) + PURPOSE + END])


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([PURPOSE], "'file' is a required property"),
        ([], "'file' is a required property"),
        ([a_file(), a_file()], "'file' was given more than once"),
        ([PURPOSE, PURPOSE, a_file()], "'purpose' was given more than once"),
        ([part('name="x"', b""), a_file()], "Additional properties are not allowed ('x' was unexpected)"),
        ([a_file(), part('name="x"; filename="y"', b"")], "Additional properties are not allowed ('x' was unexpected)"),
        ([part('name="purpose"', b"x" * 1025), a_file()], "is too long - 'purpose'"),
        ([part('name="purpose"', b"\xff"), a_file()], "'purpose' is not UTF-8 text"),
        ([part('name="purpose"', b"a\0"), a_file()], "Invalid 'purpose': string contains a NUL character."),
        ([part("", b"")], "Could not parse the multipart form: a part of it has no name."),
    ],
)
async def test_fields_that_must_not_be(parts: list[bytes], words: str):
    """One file and no more, known fields once each, in bounded text."""
    assert words in await refused([b"".join(parts) + END])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"\r\n\r\n\r\n",
        PURPOSE,
        a_file(),
        (PURPOSE + a_file())[:-1],
        PURPOSE + a_file() + END[:-4],
        PURPOSE + f"--{BOUNDARY}\r\n".encode(),
        f"--{BOUNDARY}\rx".encode() + b"\0" * 1000,
        f"--{BOUNDARY}\r\nno header\r\n\r\n".encode(),
        f"--{BOUNDARY}\r\n{'x' * 100_000}".encode(),
        f"--{BOUNDARY}\r\nx: {'x' * 100_000}\r\n\r\n".encode(),
        f"--{BOUNDARY}\r\n".encode() + b"x: y\r\n" * 10_000,
        (f"--{BOUNDARY}\r\n\r\n" * 10_000).encode(),
        (f"--{BOUNDARY}" + " " * 100_000).encode(),
        b"-" * 100_000,
    ],
    ids=range(16),
)
async def test_what_is_no_form(body: bytes):
    """What breaks off or was never a form is told as such, in whatever pieces it comes."""
    for size in (1000, 10_000_000):
        assert (await refused(cut(body, size))).startswith("Could not parse the multipart form: ")


@pytest.mark.parametrize(
    ("content_type", "words"),
    [
        ("application/json", "Invalid Content-Type header (application/json), expected multipart/form-data."),
        ("", "Invalid Content-Type header (), expected multipart/form-data."),
        ("multipart/form-data", "names no boundary"),
        ("multipart/form-data; boundary=", "names no boundary"),
        (f"multipart/form-data; boundary={'x' * 71}", "names no boundary"),
        ("multipart/mixed; boundary=x", "expected multipart/form-data."),
    ],
)
async def test_content_types_of_no_form(content_type: str, words: str):
    """Without the right type and a boundary nothing is read."""
    assert words in await refused([PURPOSE + a_file() + END], content_type)


async def test_a_file_has_its_limit():
    """A file of exactly the limit is read, one byte more is not, and what was read is not given out again."""
    limit = 1024 * 1024
    assert len((await read(cut(a_file(bytes(limit)) + END, 50_000)))[1]) == limit
    with pytest.raises(BodyTooLarge, match="The file is larger than 1 MB"):
        await read(cut(a_file(bytes(limit + 1)) + END, 50_000))


@given(st.lists(st.sampled_from([PURPOSE, a_file(), END, b"\r\n", b"--", BOUNDARY.encode(), b"\0", b"name=", b": "])))
async def test_anything_else_is_refused_in_the_same_way(pieces: list[bytes]):
    """Whatever is sent is a form or an error of the API's."""
    with suppress(ApiError):
        await read(pieces)


async def test_a_body_is_not_read_before_it_is_asked_for():
    """The file's bytes are taken from the connection as fast as they are stored, and no faster."""
    taken = []

    def pieces() -> Iterable[bytes]:
        for number, piece in enumerate([PURPOSE + a_file(b"")[:-2], b"one", b"two", b"\r\n" + END]):
            taken.append(number)
            yield piece

    form = Form(request(pieces(), FORM), "file", ("purpose",), max_file_mb=1)
    assert taken == []
    await form.find_file()
    assert taken == [0]
    chunks: AsyncIterator[bytes] = form.file()
    assert await anext(chunks) == b"one"
    assert taken == [0, 1]
