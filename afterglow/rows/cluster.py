"""Statements on what processes that share a database know of each other: their data folders."""

from __future__ import annotations

from typing import NamedTuple

from afterglow.contracts import Transaction


class DataFolder(NamedTuple):
    """A data folder in use. id: written in the folder itself; two hosts that read the same one share it."""

    id: str
    host: str
    path: str
    seen_at: int


async def list_data_folders(tx: Transaction, since: int) -> list[DataFolder]:
    """Those seen since then. Whoever asks, to decide on one of its own, takes its turn: no other does so meanwhile."""
    await tx.execute("UPDATE data_folders SET seen_at = 0 WHERE id = ''")
    rows = await tx.fetch(
        "SELECT id, host, path, seen_at FROM data_folders WHERE seen_at >= $1 AND id <> '' ORDER BY id", since
    )
    return [DataFolder(*row) for row in rows]


async def note_data_folder(tx: Transaction, folder: DataFolder) -> None:
    """Remember the folder; what was in its place before is forgotten."""
    await tx.execute("DELETE FROM data_folders WHERE id = $1 OR (host = $2 AND path = $3)", *folder[:3])
    await tx.execute("INSERT INTO data_folders (id, host, path, seen_at) VALUES ($1, $2, $3, $4)", *folder)
