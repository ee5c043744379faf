"""Rows of `projects`: what belongs together, and what it may use."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import ProjectSettings
from afterglow.rows.lists import ListPage, list_page


class ProjectRow(NamedTuple):
    """One project. id: as in every other row. archived_at: Unix seconds, from when on its keys are refused."""

    id: str
    name: str
    created_at: int
    archived_at: int | None
    settings: ProjectSettings


_COLUMNS = "id, name, created_at, archived_at, settings"


async def try_writing(tx: Transaction) -> None:
    """Write, and leave nothing behind. An update that changes nothing would not do: SQLite writes none of it."""
    await tx.execute("INSERT INTO projects (id, created_at) VALUES ('', 0)")
    await tx.execute("DELETE FROM projects WHERE id = ''")


async def ensure_project(tx: Transaction, project: str, now: int) -> None:
    """Have a row for a project that is named by its id."""
    await tx.execute(
        "INSERT INTO projects (id, name, created_at) VALUES ($1, $1, $2) ON CONFLICT (id) DO NOTHING", project, now
    )


async def insert_project(tx: Transaction, row: ProjectRow) -> None:
    await tx.execute(
        "INSERT INTO projects (id, name, created_at, settings) VALUES ($1, $2, $3, $4)",
        row.id,
        row.name,
        row.created_at,
        msgspec.json.encode(row.settings).decode(),
    )


async def get_project(tx: Transaction, project: str) -> ProjectRow | None:
    rows = await tx.fetch(f"SELECT {_COLUMNS} FROM projects WHERE id = $1", project)
    return _row(rows[0]) if rows else None


async def find_projects(tx: Transaction, name: str) -> list[ProjectRow]:
    """The project of this id, else those of this name."""
    found = await get_project(tx, name)
    if found:
        return [found]
    rows = await tx.fetch(f"SELECT {_COLUMNS} FROM projects WHERE name = $1 ORDER BY created_at, id", name)
    return [_row(row) for row in rows]


async def get_project_settings(tx: Transaction, project: str) -> ProjectSettings:
    """Of a project that nobody has made, and that is there nevertheless, the defaults."""
    row = await get_project(tx, project)
    return row.settings if row else ProjectSettings()


async def list_projects(tx: Transaction) -> list[ProjectRow]:
    """All of them, the archived as well."""
    return [_row(row) for row in await tx.fetch(f"SELECT {_COLUMNS} FROM projects ORDER BY created_at, id")]


async def page_of_projects(
    tx: Transaction, include_archived: bool, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    """In place of objects are ids. Raises UnknownCursor."""
    table = "(SELECT id, id AS object, 0 AS seq, created_at, archived_at FROM projects) listed"
    where = "id <> $1" if include_archived else "id <> $1 AND archived_at IS NULL"
    return await list_page(tx, table, where, ("",), limit=limit, order=order, after=after, before=before)


async def update_project(tx: Transaction, row: ProjectRow) -> None:
    """Write what can be changed of a project."""
    await tx.execute(
        "UPDATE projects SET name = $2, archived_at = $3, settings = $4 WHERE id = $1",
        row.id,
        row.name,
        row.archived_at,
        msgspec.json.encode(row.settings).decode(),
    )


async def touch_project(tx: Transaction, project: str) -> None:
    """Works that count what the project has, and then add to it, do so one after the other."""
    await tx.execute("UPDATE projects SET created_at = created_at WHERE id = $1", project)


def _row(columns: tuple[str, str, int, int | None, str]) -> ProjectRow:
    project, name, created_at, archived_at, settings = columns
    decoded = msgspec.json.decode(settings, type=ProjectSettings)
    return ProjectRow(project, name or project, created_at, archived_at, decoded)
