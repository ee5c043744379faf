"""The wire of a session: frames are cut as they were packed, and nothing else passes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.sandbox.guest.frames import (
    BODY_BYTES,
    HEADER_BYTES,
    BadFrame,
    Frames,
    is_clean_name,
    is_image,
    pack,
    parse_header,
)

HEADERS = st.dictionaries(
    st.text().filter(lambda key: key != "n"), st.integers() | st.text() | st.booleans(), max_size=5
)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[start:end] for start, end in pairwise(places)]


@given(st.lists(st.tuples(HEADERS, st.binary(max_size=200)), max_size=5), st.lists(st.integers(0), max_size=20))
def test_frames_come_as_they_were_packed(sent: list[tuple[dict[str, Any], bytes]], at: list[int]) -> None:
    """However the bytes are cut on their way, the same frames come out."""
    frames = Frames(parse_header)
    came = [frame for part in cut(b"".join(pack(*frame) for frame in sent), at) for frame in frames.feed(part)]
    assert [({key: value for key, value in header.items() if key != "n"}, body) for header, body in came] == sent


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_any_bytes_are_frames_or_refused(parts: list[bytes]) -> None:
    """Arbitrary bytes raise nothing but BadFrame."""
    frames = Frames(parse_header)
    try:
        for part in parts:
            list(frames.feed(part))
    except BadFrame:
        return


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b'{"n": 1.0}',
        b'{"n": "1"}',
        b'{"n": true}',
        b'{"n": null}',
        b'{"n": -1}',
        json.dumps({"n": BODY_BYTES + 1}).encode(),
        b"[" * 60_000,
        b'{"n":' + b"1" * 9000 + b"}",
    ],
)
def test_an_odd_header_is_refused(header: bytes) -> None:
    """A header is a JSON object, and the size of its body a whole number within bounds."""
    with pytest.raises(BadFrame):
        list(Frames(parse_header).feed(len(header).to_bytes(4, "big") + header))


def test_a_size_is_checked_before_anything_is_kept() -> None:
    """The first four bytes are enough to refuse a header that is too long."""
    with pytest.raises(BadFrame):
        list(Frames(parse_header).feed((HEADER_BYTES + 1).to_bytes(4, "big")))


def test_the_largest_frame_passes() -> None:
    """A header and a body of just the largest size are no error."""
    header = {"t": "x" * (HEADER_BYTES - len(json.dumps({"t": "", "n": BODY_BYTES}, separators=(",", ":"))))}
    (came,) = Frames(parse_header).feed(pack(header, bytes(BODY_BYTES)))
    assert (came[0]["t"], len(came[1])) == (header["t"], BODY_BYTES)


@pytest.mark.parametrize(
    "name",
    ["a", "sales.csv", "a b/c d.txt", "grün/€.png", "👩‍🔬.txt", ".hidden", "...", "a" * 255, "/".join("a" * 32), "-rf"],
)
def test_clean_names(name: str) -> None:
    """Relative paths of printable text may pass."""
    assert is_clean_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "C:\\x", "a\nb", "a\0", "\x7f",
        "\x85", "\udcff", "\u202etxt", "\u2066a", "\u200fa", "a\u2028b", "a" * 256, "ä" * 128, "/".join("a" * 33),
        "/".join(["a" * 200] * 6),
    ],
)  # fmt: skip
def test_unclean_names(name: str) -> None:
    """Names that lead elsewhere, are too long, or do more to a reader than be read, may not."""
    assert not is_clean_name(name)


@given(st.text(max_size=50))
def test_a_clean_name_stays_below_its_folder(name: str) -> None:
    """Whatever passes can be encoded, and has only components that name something."""
    if is_clean_name(name):
        assert not {"", ".", ".."} & set(name.split("/"))
        assert name.encode().decode() == name


def test_images_are_known_by_their_first_bytes() -> None:
    """The media type alone makes no picture."""
    assert is_image(b"\x89PNG\r\n\x1a\n....", "image/png")
    assert is_image(b"\xff\xd8\xff\xe0....", "image/jpeg")
    assert not is_image(b"\xff\xd8\xff\xe0....", "image/png")
    assert not is_image(b"<svg>", "image/png")
    assert not is_image(b"<svg>", "image/svg+xml")
