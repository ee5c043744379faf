"""Rows of `files`, of `file_uses` and `loose_blobs` beside them, and of `sandbox_files` and `sandbox_sessions`.

A file that has expired is not there, though its row may still be: whoever reads says what time it is. One that is to be
deleted is condemned first, in a transaction of its own: it has expired then, at 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from afterglow.contracts import SqlValue, Transaction
from afterglow.objects import File, Json
from afterglow.rows.lists import HELD, ListPage, list_page
from afterglow.rows.requests import delete_answers

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
    rows = await tx.fetch(f"SELECT object FROM files WHERE {LIVING} AND id = $3", project, int(now), file_id)
    return rows[0][0] if rows else None


async def get_file(tx: Transaction, project: str, file_id: str, now: float) -> StoredFile | None:
    rows = await tx.fetch(f"SELECT object, blob FROM files WHERE {LIVING} AND id = $3", project, int(now), file_id)
    return StoredFile(msgspec.json.decode(rows[0][0], type=File), rows[0][1]) if rows else None


async def hold_file(tx: Transaction, project: str, file_id: str, now: float) -> File | None:
    """The file, for a work that lets something name it: it is not condemned before that is committed."""
    rows = await tx.fetch(f"SELECT object FROM files WHERE {LIVING} AND id = $3 {HELD}", project, int(now), file_id)
    return msgspec.json.decode(rows[0][0], type=File) if rows else None


async def hold_files(tx: Transaction, project: str, file_ids: Iterable[str], now: float) -> dict[str, File]:
    """Those of `file_ids` that are there, by id, in the order given; held as by `hold_file`."""
    held = {file_id: await hold_file(tx, project, file_id, now) for file_id in file_ids}
    return {file_id: file for file_id, file in held.items() if file is not None}


async def list_files(
    tx: Transaction, project: str, purpose: str | None, now: float, *, limit: int, order: str, after: str | None
) -> ListPage:
    where = LIVING
    values: tuple[SqlValue, ...] = (project, int(now))
    if purpose is not None:
        where, values = f"{LIVING} AND purpose = $3", (*values, purpose)
    return await list_page(tx, "files", where, values, limit=limit, order=order, after=after, before=None)


async def count_files(tx: Transaction, project: str) -> int:
    rows = await tx.fetch("SELECT COUNT(*) FROM files WHERE project_id = $1", project)
    return int(rows[0][0])


async def insert_file(tx: Transaction, project: str, file: File, blob: str, seq: int, key_id: str = "") -> None:
    await tx.execute(
        "INSERT INTO files (project_id, id, seq, created_at, expires_at, purpose, blob, object, key_id, size_bytes)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        project,
        file.id,
        seq,
        file.created_at,
        file.expires_at,
        file.purpose,
        blob,
        msgspec.json.encode(file).decode(),
        key_id,
        file.bytes,
    )


async def touch_file(tx: Transaction, project: str, file_id: str) -> None:
    """Write it as it is: whoever holds it is waited for."""
    await tx.execute("UPDATE files SET blob = blob WHERE project_id = $1 AND id = $2", project, file_id)


async def condemn_file(tx: Transaction, project: str, file_id: str, now: float) -> bool:
    """Whether it is there; from the commit on it is not, and nothing more can come to name it."""
    condemned = await tx.execute(
        f"UPDATE files SET expires_at = 0 WHERE {LIVING} AND id = $3", project, int(now), file_id
    )
    return condemned > 0


async def condemn_expired(tx: Transaction, now: float) -> int:
    """Condemn those whose time is over, in all projects."""
    return await tx.execute("UPDATE files SET expires_at = 0 WHERE expires_at <= $1 AND expires_at > 0", int(now))


async def delete_file(tx: Transaction, project: str, file_id: str) -> str | None:
    """Delete the row of a file that is condemned, and what sandboxes know of it; return the key of its bytes, or None
    when another has deleted it."""
    rows = await tx.fetch("DELETE FROM files WHERE project_id = $1 AND id = $2 RETURNING blob", project, file_id)
    for column in ("file_id", "input_id"):
        await tx.execute(f"DELETE FROM sandbox_files WHERE project_id = $1 AND {column} = $2", project, file_id)
    await delete_answers(tx, project, file_id)
    return rows[0][0] if rows else None


async def list_condemned(tx: Transaction, limit: int) -> list[tuple[str, str]]:
    """(project, id) of files that are to be deleted, in all projects."""
    rows = await tx.fetch(f"SELECT project_id, id FROM files WHERE expires_at = 0 LIMIT {limit}")
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


async def take_loose_blob(tx: Transaction, loose: LooseBlob) -> bool:
    """Let something own it; False when it is condemned, or gone."""
    return (
        await tx.execute("DELETE FROM loose_blobs WHERE project_id = $1 AND blob = $2 AND created_at > 0", *loose) > 0
    )


async def condemn_loose_blob(tx: Transaction, loose: LooseBlob) -> bool:
    """Whether it still is loose; from then on nothing can own it."""
    return await tx.execute("UPDATE loose_blobs SET created_at = 0 WHERE project_id = $1 AND blob = $2", *loose) > 0


async def delete_loose_blob(tx: Transaction, loose: LooseBlob) -> None:
    await tx.execute("DELETE FROM loose_blobs WHERE project_id = $1 AND blob = $2", *loose)


async def list_loose_blobs(tx: Transaction, before: float, limit: int) -> list[LooseBlob]:
    """Those noted before that time, in all projects."""
    rows = await tx.fetch(
        f"SELECT project_id, blob FROM loose_blobs WHERE created_at < CAST($1 AS DOUBLE PRECISION) LIMIT {limit}",
        before,
    )
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


async def get_session_worker(tx: Transaction, project: str, thread_id: str) -> str | None:
    """Which worker opened the thread's last session."""
    rows = await tx.fetch(
        "SELECT worker FROM sandbox_sessions WHERE project_id = $1 AND thread_id = $2", project, thread_id
    )
    return rows[0][0] if rows else None


async def set_session_worker(tx: Transaction, project: str, thread_id: str, worker: str) -> None:
    await tx.execute(
        "INSERT INTO sandbox_sessions (project_id, thread_id, worker) VALUES ($1, $2, $3)"
        " ON CONFLICT (project_id, thread_id) DO UPDATE SET worker = excluded.worker",
        project,
        thread_id,
        worker,
    )
