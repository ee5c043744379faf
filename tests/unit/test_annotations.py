"""Annotations: exact places, and only for files that are there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from afterglow.tools.annotations import SANDBOX_PATH, Markers, citations, file_paths

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


KNOWN = {"【0:1†a.pdf】": "file-1", "【12:0†日本.md】": "file-2"}
PIECES = ["【", "0:1", "†a.pdf", "】", "【0:1†a.pdf】", "【9:9†b】", "【12:0†日本.md】", "【注】", "x 😀", "†", "12:0"]


@given(st.lists(st.sampled_from(PIECES)).map("".join), st.integers(1, 7))
def test_only_markers_that_name_a_result_stay(text: str, step: int) -> None:
    """However the text is cut, what is let through is the text without unknown markers; other brackets stay."""
    markers = Markers(KNOWN)
    shown = "".join(markers.feed(text[at : at + step]) for at in range(0, len(text), step)) + markers.end()
    whole = Markers(KNOWN)
    assert shown == whole.feed(text) + whole.end()
    found = citations(shown, KNOWN)
    assert all(shown[part["start_index"] : part["end_index"]] == part["text"] for part in found)
    assert len(citations(text, KNOWN)) == len(found)


def test_a_marker_may_say_source() -> None:
    """As the original's markers did; with any other name than its own it names nothing."""
    text = "a【0:1†source】 b【12:0†source】 c【1:1†source】 d【0:1†b.pdf】"
    markers = Markers(KNOWN)
    shown = markers.feed(text) + markers.end()
    assert shown == "a【0:1†source】 b【12:0†source】 c d"
    found = citations(shown, KNOWN)
    assert [(part["text"], part["file_citation"]["file_id"]) for part in found] == [
        ("【0:1†source】", "file-1"),
        ("【12:0†source】", "file-2"),
    ]


def test_text_is_held_back_only_while_it_may_become_a_marker() -> None:
    """An ordinary bracket passes with the next character."""
    markers = Markers(KNOWN)
    assert [markers.feed(piece) for piece in ("a【", "注】b", "【0", ":1†a.p", "df】 c", "【1:1†x】", "!【")] == [
        *("a", "【注】b", "", "", "【0:1†a.pdf】 c", "", "!")
    ]
    assert markers.end() == "【"
