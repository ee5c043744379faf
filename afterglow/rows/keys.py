"""Rows of `api_keys`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import KeyScope, Limits
from afterglow.rows.lists import ListPage, list_page
from afterglow.rows.projects import ensure_project

SCOPES: tuple[KeyScope, ...] = ("read", "write", "admin")
USUAL_SCOPES: frozenset[KeyScope] = frozenset({"read", "write"})
NO_LIMITS = Limits()


class KeyRow(NamedTuple):
    """A key without its secret. hint: first and last characters. Times are Unix seconds; expires_at: from then on it is
    refused; last_used_at: to the minute."""

    id: str
    project_id: str
    name: str
    hint: str
    created_at: int
    revoked_at: int | None
    scopes: frozenset[KeyScope] = USUAL_SCOPES
    expires_at: int | None = None
    last_used_at: int | None = None
    limits: Limits = NO_LIMITS


_COLUMNS = "id, project_id, name, hint, created_at, revoked_at, scopes, expires_at, last_used_at, limits"
_VALID = "project_id = $1 AND revoked_at IS NULL"


def _row(columns: tuple[str, str, str, str, int, int | None, str, int | None, int | None, str]) -> KeyRow:
    row = KeyRow(*columns[:6])
    scopes, expires_at, last_used_at, limits = columns[6:]
    held = frozenset(scope for scope in SCOPES if scope in scopes.split(","))
    return row._replace(
        scopes=held,
        expires_at=expires_at,
        last_used_at=last_used_at,
        limits=msgspec.json.decode(limits, type=Limits),
    )


def in_order(scopes: frozenset[KeyScope]) -> list[KeyScope]:
    return [scope for scope in SCOPES if scope in scopes]


async def insert_key(tx: Transaction, project: str, row: KeyRow, key_hash: str) -> None:
    await ensure_project(tx, project, row.created_at)
    await tx.execute(
        "INSERT INTO api_keys (id, project_id, name, hash, hint, created_at, scopes, expires_at, limits)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        row.id,
        project,
        row.name,
        key_hash,
        row.hint,
        row.created_at,
        ",".join(in_order(row.scopes)),
        row.expires_at,
        msgspec.json.encode(row.limits).decode(),
    )


async def get_key_by_hash(tx: Transaction, key_hash: str) -> KeyRow | None:
    """The key with this hash that was not revoked, whatever its project; it may have expired."""
    rows = await tx.fetch(
        f"SELECT {_COLUMNS} FROM api_keys WHERE hash = $1 AND revoked_at IS NULL",
        key_hash,
    )
    return _row(rows[0]) if rows else None


async def get_key(tx: Transaction, project: str, key_id: str) -> KeyRow | None:
    """A key of the project that was not revoked."""
    rows = await tx.fetch(f"SELECT {_COLUMNS} FROM api_keys WHERE {_VALID} AND id = $2", project, key_id)
    return _row(rows[0]) if rows else None


async def get_key_limits(tx: Transaction, key_id: str) -> Limits:
    """Of a key of the settings, or one that is gone, none."""
    rows = await tx.fetch("SELECT limits FROM api_keys WHERE id = $1 AND limits <> '{}'", key_id)
    return msgspec.json.decode(rows[0][0], type=Limits) if rows else NO_LIMITS


async def has_keys(tx: Transaction) -> bool:
    """Whether a key was ever made: revoking the last one must not let everybody in."""
    return bool(await tx.fetch("SELECT 1 FROM api_keys LIMIT 1"))


async def list_keys(tx: Transaction) -> list[KeyRow]:
    """All of them, the revoked as well."""
    return [_row(row) for row in await tx.fetch(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at, id")]


async def page_of_keys(
    tx: Transaction, project: str, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    """Keys that were not revoked; in place of objects are ids. Raises UnknownCursor."""
    table = "(SELECT project_id, id, id AS object, 0 AS seq, created_at, revoked_at FROM api_keys) listed"
    return await list_page(tx, table, _VALID, (project,), limit=limit, order=order, after=after, before=before)


async def update_key(tx: Transaction, row: KeyRow) -> None:
    """Write what can be changed of a key."""
    await tx.execute(
        "UPDATE api_keys SET scopes = $2, expires_at = $3, limits = $4 WHERE id = $1",
        row.id,
        ",".join(in_order(row.scopes)),
        row.expires_at,
        msgspec.json.encode(row.limits).decode(),
    )


async def replace_secret(tx: Transaction, row: KeyRow, key_hash: str) -> None:
    await tx.execute("UPDATE api_keys SET hash = $2, hint = $3 WHERE id = $1", row.id, key_hash, row.hint)


async def revoke_key(tx: Transaction, key_id: str, now: int) -> bool:
    return await tx.execute("UPDATE api_keys SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL", key_id, now) > 0


async def note_uses(tx: Transaction, uses: Mapping[str, int]) -> None:
    """uses: when each key was last used, by id."""
    for key_id, used_at in sorted(uses.items()):
        await tx.execute("UPDATE api_keys SET last_used_at = $2 WHERE id = $1", key_id, used_at)
