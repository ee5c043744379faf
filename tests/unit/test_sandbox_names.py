"""Names of files below /mnt/data, and sizes as the model reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.sandbox.guest.frames import is_clean_name
from afterglow.tools.code_interpreter import clean_name, free_name, readable_size


@given(st.text(max_size=400))
def test_clean_names_are_one_printable_component(filename: str) -> None:
    """Whatever a caller names a file: no slash, no control or format character, no dots alone, 200 bytes at most."""
    name = clean_name(filename)
    assert len(name.encode()) <= 200
    assert name == "" or name.strip(". ")
    assert name == "" or is_clean_name(name)


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("sales.csv", "sales.csv"),
        ("..", ""),
        ("a/b\\c", "a_b_c"),
        ("é" * 200 + ".xlsx", "é" * 97 + ".xlsx"),
        ("one\u2028two\u2029", "one_two_"),
    ],
)
def test_clean_names(filename: str, name: str) -> None:
    """What is harmless stays as it is; what is long keeps its suffix."""
    assert clean_name(filename) == name


def test_equal_names_get_numbers() -> None:
    """The first keeps its name, the next get numbers before the suffix."""
    taken = {"a.csv", "a-2.csv", "b"}
    assert [free_name(name, taken) for name in ("a.csv", "b", "c.tar.gz")] == ["a-3.csv", "b-2", "c.tar.gz"]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (12_300, "12.3 KB"), (2_000_000, "2.0 MB"), (3e9, "3.0 GB")]
)
def test_sizes_are_readable(size: int, text: str) -> None:
    """Three digits and a unit of thousands."""
    assert readable_size(size) == text
