"""Annotations: exact places, and only for files that are there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from afterglow.tools.annotations import SANDBOX_PATH, file_paths

FILES = {"a.csv": "file-1", "a.csv.gz": "file-2", "plots/é 1.png": "file-3"}


def test_every_place_gets_its_annotation() -> None:
    """The longest name counts, spaces may be percent-encoded, and one file may be named twice."""
    text = "sandbox:/mnt/data/a.csv.gz, [p](sandbox:/mnt/data/plots/%C3%A9%201.png) 😀 sandbox:/mnt/data/a.csv."
    found = file_paths(text, FILES)
    assert [(part["text"], part["file_path"]["file_id"]) for part in found] == [
        ("sandbox:/mnt/data/a.csv.gz", "file-2"),
        ("sandbox:/mnt/data/plots/%C3%A9%201.png", "file-3"),
        ("sandbox:/mnt/data/a.csv", "file-1"),
    ]


def test_unknown_files_get_none() -> None:
    """A path that names no file of the thread is left alone."""
    assert file_paths("sandbox:/mnt/data/b.csv sandbox:/mnt/data/ /mnt/data/a.csv", FILES) == []


@given(st.lists(st.sampled_from(["x😀", " ", SANDBOX_PATH, "a.csv", ".gz", "plots/é 1.png", "é"])).map("".join))
def test_indices_are_exact(text: str) -> None:
    """`text[start:end]` is the annotation's text, and places come in order."""
    found = file_paths(text, FILES)
    assert all(text[part["start_index"] : part["end_index"]] == part["text"] for part in found)
    assert [part["start_index"] for part in found] == sorted(part["start_index"] for part in found)
