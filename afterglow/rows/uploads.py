"""Rows of `uploads` and `upload_parts`."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import Upload


class UploadRow(NamedTuple):
    """life_s: how long the file is kept once it is there; None: until it is deleted."""

    upload: Upload
    life_s: int | None


class Part(NamedTuple):
    """A part's bytes are kept under `blob`."""

    id: str
    size_bytes: int
    blob: str


async def get_upload(tx: Transaction, project: str, upload_id: str) -> UploadRow | None:
    rows = await tx.fetch("SELECT object, life_s FROM uploads WHERE project_id = $1 AND id = $2", project, upload_id)
    return UploadRow(msgspec.json.decode(rows[0][0], type=Upload), rows[0][1]) if rows else None


async def insert_upload(tx: Transaction, project: str, row: UploadRow) -> None:
    upload = row.upload
    await tx.execute(
        "INSERT INTO uploads VALUES ($1, $2, $3, $4, $5, $6, $7)",
        project,
        upload.id,
        upload.created_at,
        upload.expires_at,
        upload.status,
        row.life_s,
        msgspec.json.encode(upload).decode(),
    )


async def update_upload(tx: Transaction, project: str, upload: Upload) -> None:
    await tx.execute(
        "UPDATE uploads SET status = $3, object = $4 WHERE project_id = $1 AND id = $2",
        project,
        upload.id,
        upload.status,
        msgspec.json.encode(upload).decode(),
    )


async def list_overdue(tx: Transaction, before: float, limit: int) -> list[tuple[str, Upload]]:
    """(project, upload) of those that wait for parts and expired before that time, in all projects."""
    rows = await tx.fetch(
        f"SELECT project_id, object FROM uploads WHERE status = 'pending' AND expires_at < $1 LIMIT {limit}",
        math.ceil(before),
    )
    return [(project, msgspec.json.decode(text, type=Upload)) for project, text in rows]


async def insert_part(tx: Transaction, project: str, upload_id: str, part: Part) -> None:
    """The upload is written as well, so that it is not closed, and gets no other part, at the same time."""
    await tx.execute("UPDATE uploads SET status = status WHERE project_id = $1 AND id = $2", project, upload_id)
    await tx.execute("INSERT INTO upload_parts VALUES ($1, $2, $3, $4, $5)", project, upload_id, *part)


async def get_parts(tx: Transaction, project: str, upload_id: str) -> dict[str, Part]:
    """All parts of an upload, by id."""
    rows = await tx.fetch(
        "SELECT id, size_bytes, blob FROM upload_parts WHERE project_id = $1 AND upload_id = $2", project, upload_id
    )
    return {row[0]: Part(*row) for row in rows}


async def get_size(tx: Transaction, project: str, upload_id: str) -> int:
    """The bytes of all parts together."""
    rows = await tx.fetch(
        "SELECT COALESCE(SUM(size_bytes), 0) FROM upload_parts WHERE project_id = $1 AND upload_id = $2",
        project,
        upload_id,
    )
    return int(rows[0][0])


async def delete_parts(tx: Transaction, project: str, upload_id: str) -> list[str]:
    """Delete them; return the keys of their bytes."""
    rows = await tx.fetch(
        "DELETE FROM upload_parts WHERE project_id = $1 AND upload_id = $2 RETURNING blob", project, upload_id
    )
    return [blob for (blob,) in rows]
