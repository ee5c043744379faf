"""Rows of `projects`: what belongs together, and what it may use."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from afterglow.contracts import Transaction
from afterglow.objects import ProjectSettings


class ProjectRow(NamedTuple):
    """One project. id: as in every other row. archived_at: Unix seconds, from when on its keys are refused."""

    id: str
    name: str
    created_at: int
    archived_at: int | None
    settings: ProjectSettings


async def get_project(tx: Transaction, project: str) -> ProjectRow | None:
    rows = await tx.fetch("SELECT id, name, created_at, archived_at, settings FROM projects WHERE id = $1", project)
    return _row(rows[0]) if rows else None


async def get_project_settings(tx: Transaction, project: str) -> ProjectSettings:
    """Of a project that nobody has made, and that is there nevertheless, the defaults."""
    row = await get_project(tx, project)
    return row.settings if row else ProjectSettings()


def _row(columns: tuple[str, str, int, int | None, str]) -> ProjectRow:
    project, name, created_at, archived_at, settings = columns
    return ProjectRow(project, name, created_at, archived_at, msgspec.json.decode(settings, type=ProjectSettings))
