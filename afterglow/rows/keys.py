"""Rows of `api_keys` and `projects`."""

from __future__ import annotations

from typing import NamedTuple

from afterglow.contracts import Transaction


class KeyRow(NamedTuple):
    """A key without its secret. hint: first and last characters. revoked_at: Unix seconds or None."""

    id: str
    project_id: str
    name: str
    hint: str
    created_at: int
    revoked_at: int | None


_COLUMNS = "id, project_id, name, hint, created_at, revoked_at"


async def try_writing(tx: Transaction) -> None:
    """Write, and leave nothing behind. An update that changes nothing would not do: SQLite writes none of it."""
    await tx.execute("INSERT INTO projects (id, created_at) VALUES ('', 0)")
    await tx.execute("DELETE FROM projects WHERE id = ''")


async def insert_key(tx: Transaction, project: str, row: KeyRow, key_hash: str) -> None:
    await tx.execute(
        "INSERT INTO projects (id, created_at) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING", project, row.created_at
    )
    await tx.execute(
        "INSERT INTO api_keys (id, project_id, name, hash, hint, created_at) VALUES ($1, $2, $3, $4, $5, $6)",
        row.id,
        project,
        row.name,
        key_hash,
        row.hint,
        row.created_at,
    )


async def get_key_by_hash(tx: Transaction, key_hash: str) -> KeyRow | None:
    """The living key with this hash, whatever its project."""
    rows = await tx.fetch(
        f"SELECT {_COLUMNS} FROM api_keys WHERE hash = $1 AND revoked_at IS NULL",
        key_hash,
    )
    return KeyRow(*rows[0]) if rows else None


async def has_keys(tx: Transaction) -> bool:
    """Whether a key was ever made: revoking the last one must not let everybody in."""
    return bool(await tx.fetch("SELECT 1 FROM api_keys LIMIT 1"))


async def list_keys(tx: Transaction) -> list[KeyRow]:
    return [KeyRow(*row) for row in await tx.fetch(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at, id")]


async def revoke_key(tx: Transaction, key_id: str, now: int) -> bool:
    return await tx.execute("UPDATE api_keys SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL", key_id, now) > 0
