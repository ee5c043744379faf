"""Rows of `files`, of `file_uses` and `loose_blobs` beside them, and of `sandbox_files`.

A file that has expired is not there, though its row may still be: whoever reads says what time it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from afterglow.contracts import SqlValue, Transaction
from afterglow.objects import File, Json
from afterglow.rows.lists import ListPage, list_page

LIVING = "project_id = $1 AND (expires_at IS NULL OR expires_at > $2)"
Holder = Literal["assistants", "threads"]


class StoredFile(NamedTuple):
    """A file, and the key of its bytes."""

    file: File
    blob: str


class LooseBlob(NamedTuple):
    """Bytes that no file owns: they are being written, or are to be deleted."""

    project: str
    blob: str


class PlacedFile(NamedTuple):
    """A file of a thread's code interpreter. name: its path below /mnt/data. input_id: the file that was given under
    this name, if one was; file_id is another once code has changed it."""

    name: str
    file_id: str
    size_bytes: int
    input_id: str | None


# --- files -----------------------------------------------------------------------------------------------------


async def get_file_object(tx: Transaction, project: str, file_id: str, now: float) -> str | None:
    rows = await tx.fetch(f"SELECT object FROM files WHERE {LIVING} AND id = $3", project, now, file_id)
    return rows[0][0] if rows else None


async def get_file(tx: Transaction, project: str, file_id: str, now: float) -> StoredFile | None:
    rows = await tx.fetch(f"SELECT object, blob FROM files WHERE {LIVING} AND id = $3", project, now, file_id)
    return StoredFile(msgspec.json.decode(rows[0][0], type=File), rows[0][1]) if rows else None


async def get_files(tx: Transaction, project: str, file_ids: Iterable[str], now: float) -> dict[str, File]:
    """Those of `file_ids` that are there, by id, in the order given."""
    found = {}
    for file_id in file_ids:
        if stored := await get_file(tx, project, file_id, now):
            found[file_id] = stored.file
    return found


async def list_files(
    tx: Transaction, project: str, purpose: str | None, now: float, *, limit: int, order: str, after: str | None
) -> ListPage:
    where = LIVING
    values: tuple[SqlValue, ...] = (project, now)
    if purpose is not None:
        where, values = f"{LIVING} AND purpose = $3", (project, now, purpose)
    return await list_page(tx, "files", where, values, limit=limit, order=order, after=after, before=None)


async def count_files(tx: Transaction, project: str) -> int:
    rows = await tx.fetch("SELECT COUNT(*) FROM files WHERE project_id = $1", project)
    return int(rows[0][0])


async def insert_file(tx: Transaction, project: str, file: File, blob: str, seq: int) -> None:
    await tx.execute(
        "INSERT INTO files (project_id, id, seq, created_at, expires_at, purpose, blob, object)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        project,
        file.id,
        seq,
        file.created_at,
        file.expires_at,
        file.purpose,
        blob,
        msgspec.json.encode(file).decode(),
    )


async def delete_file(tx: Transaction, project: str, file_id: str) -> str | None:
    """Delete the row, also of a file that has expired, and what sandboxes know of it; return the key of its bytes."""
    rows = await tx.fetch("DELETE FROM files WHERE project_id = $1 AND id = $2 RETURNING blob", project, file_id)
    for column in ("file_id", "input_id"):
        await tx.execute(f"DELETE FROM sandbox_files WHERE project_id = $1 AND {column} = $2", project, file_id)
    return rows[0][0] if rows else None


async def list_expired(tx: Transaction, now: float, limit: int) -> list[tuple[str, str]]:
    """(project, id) of files whose time is over, in all projects."""
    rows = await tx.fetch(f"SELECT project_id, id FROM files WHERE expires_at <= $1 LIMIT {limit}", now)
    return [(project, file_id) for project, file_id in rows]


# --- who names them --------------------------------------------------------------------------------------------


async def set_file_uses(tx: Transaction, project: str, holder: Holder, holder_id: str, tool_resources: Json) -> None:
    """Note which files an assistant or a thread names for the code interpreter, in place of those before."""
    await tx.execute(
        "DELETE FROM file_uses WHERE project_id = $1 AND holder = $2 AND holder_id = $3", project, holder, holder_id
    )
    for file_id in dict.fromkeys((tool_resources.get("code_interpreter") or {}).get("file_ids") or ()):
        await tx.execute("INSERT INTO file_uses VALUES ($1, $2, $3, $4)", project, file_id, holder, holder_id)


async def list_file_uses(tx: Transaction, project: str, file_id: str) -> list[tuple[Holder, str]]:
    rows = await tx.fetch(
        "SELECT holder, holder_id FROM file_uses WHERE project_id = $1 AND file_id = $2", project, file_id
    )
    return [(holder, holder_id) for holder, holder_id in rows]


# --- bytes that no file owns -----------------------------------------------------------------------------------


async def insert_loose_blob(tx: Transaction, loose: LooseBlob, now: int) -> None:
    await tx.execute("INSERT INTO loose_blobs VALUES ($1, $2, $3)", *loose, now)


async def is_loose(tx: Transaction, loose: LooseBlob) -> bool:
    return bool(await tx.fetch("SELECT 1 FROM loose_blobs WHERE project_id = $1 AND blob = $2", *loose))


async def delete_loose_blob(tx: Transaction, loose: LooseBlob) -> bool:
    return await tx.execute("DELETE FROM loose_blobs WHERE project_id = $1 AND blob = $2", *loose) > 0


async def list_loose_blobs(tx: Transaction, before: float, limit: int) -> list[LooseBlob]:
    """Those noted before that time, in all projects."""
    rows = await tx.fetch(f"SELECT project_id, blob FROM loose_blobs WHERE created_at < $1 LIMIT {limit}", before)
    return [LooseBlob(project, blob) for project, blob in rows]


# --- names below /mnt/data -------------------------------------------------------------------------------------


async def list_sandbox_files(tx: Transaction, project: str, thread_id: str) -> list[PlacedFile]:
    """In the order in which the names were taken."""
    rows = await tx.fetch(
        "SELECT name, file_id, size_bytes, input_id FROM sandbox_files WHERE project_id = $1 AND thread_id = $2"
        " ORDER BY seq",
        project,
        thread_id,
    )
    return [PlacedFile(*row) for row in rows]


async def put_sandbox_file(tx: Transaction, project: str, thread_id: str, placed: PlacedFile, now: int) -> None:
    """Let the name stand for this file. One that was taken keeps its place, and its input unless another is given."""
    await tx.execute(
        "INSERT INTO sandbox_files (project_id, thread_id, name, file_id, size_bytes, input_id, created_at, seq)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, (SELECT COALESCE(MAX(seq), 0) + 1 FROM sandbox_files"
        " WHERE project_id = $1 AND thread_id = $2)) ON CONFLICT (project_id, thread_id, name) DO UPDATE SET"
        " file_id = excluded.file_id, size_bytes = excluded.size_bytes, created_at = excluded.created_at,"
        " input_id = COALESCE(excluded.input_id, sandbox_files.input_id)",
        project,
        thread_id,
        *placed,
        now,
    )


async def delete_sandbox_files(tx: Transaction, project: str, thread_id: str, names: Sequence[str]) -> None:
    for name in names:
        await tx.execute(
            "DELETE FROM sandbox_files WHERE project_id = $1 AND thread_id = $2 AND name = $3",
            project,
            thread_id,
            name,
        )


async def forget_outputs(tx: Transaction, project: str, thread_id: str, names: Sequence[str]) -> None:
    """Free the names of what code has made; a name under which a file was given stays with it."""
    for name in names:
        await tx.execute(
            "DELETE FROM sandbox_files WHERE project_id = $1 AND thread_id = $2 AND name = $3 AND input_id IS NULL",
            project,
            thread_id,
            name,
        )
