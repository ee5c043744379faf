"""Where an answer's text names files: the annotations that clients replace by links. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from afterglow.objects import Json

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
