"""Where an answer's text names files: the annotations that clients replace by links. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import quote

from afterglow.objects import Json

T = TypeVar("T")
SANDBOX_PATH = "sandbox:/mnt/data/"


def file_paths(text: str, files: Mapping[str, str]) -> list[Json]:
    """One `file_path` annotation for each place where `text` names a file as `sandbox:/mnt/data/…`.

    files: file id by name below /mnt/data. The longest name that fits a place counts, as it is or percent-encoded; a
    name that is not there gets no annotation. Indices are code points, the end not included.
    """
    spellings = {spelling: file_id for name, file_id in files.items() for spelling in (quote(name), name)}
    longest_first = sorted({len(spelling) for spelling in spellings}, reverse=True)
    found = []
    start = text.find(SANDBOX_PATH)
    while start >= 0:
        at = start + len(SANDBOX_PATH)
        name = next((name for length in longest_first if (name := text[at : at + length]) in spellings), None)
        if name is not None:
            found.append(_file_path(text[start : at + len(name)], start, spellings[name]))
        start = text.find(SANDBOX_PATH, at)
    return found


def _file_path(path: str, start: int, file_id: str) -> Json:
    return {
        "type": "file_path",
        "text": path,
        "start_index": start,
        "end_index": start + len(path),
        "file_path": {"file_id": file_id},
    }


# --- citations -------------------------------------------------------------------------------------------------

MARKER = re.compile(r"【\d{1,6}:\d{1,6}†[^【】]{0,300}】")
_SOURCE = "†source】"
# What may still become a marker: the brackets alone are common in Chinese and Japanese text.
_BEGUN = re.compile(r"【(?:\d{1,6}(?::(?:\d{1,6}(?:†[^【】]{0,300})?)?)?)?$")


def citations(text: str, files: Mapping[str, str]) -> list[Json]:
    """One `file_citation` annotation for each marker in `text` that names a result. files: file id by marker. Indices
    are code points, the end not included."""
    found = [(at, named_by(at[0], files)) for at in MARKER.finditer(text)]
    return [_file_citation(at, file_id) for at, file_id in found if file_id is not None]


def named_by(marker: str, results: Mapping[str, T]) -> T | None:
    """Which of `results`, by their markers, this one names. The original's said `source` in the place of the file's
    name, and models still do."""
    if marker in results or not marker.endswith(_SOURCE):
        return results.get(marker)
    numbers = marker.removesuffix(_SOURCE)
    return next((result for known, result in results.items() if known.startswith(f"{numbers}†")), None)


def _file_citation(at: re.Match[str], file_id: str) -> Json:
    return {
        "type": "file_citation",
        "text": at[0],
        "start_index": at.start(),
        "end_index": at.end(),
        "file_citation": {"file_id": file_id},
    }


class Markers:
    """Lets text through as it streams, without the markers that name nothing. known: those that name a result."""

    def __init__(self, known: Mapping[str, str]) -> None:
        self._known = known
        self._held = ""

    def feed(self, piece: str) -> str:
        """What can be shown now; what may still become a marker waits."""
        text = self._held + piece
        begun = _BEGUN.search(text)
        at = begun.start() if begun else len(text)
        self._held = text[at:]
        return MARKER.sub(self._if_known, text[:at])

    def end(self) -> str:
        """What was still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _if_known(self, at: re.Match[str]) -> str:
        return at[0] if named_by(at[0], self._known) is not None else ""
