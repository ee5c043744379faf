"""What administrators do to projects and keys, by API and by command: each act with its line in the audit log, in one
transaction."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import UNSET

from afterglow.access import DEFAULT_PROJECT, new_key
from afterglow.audit import carry_out
from afterglow.contracts import Store, Transaction
from afterglow.errors import InvalidRequest, NotFound
from afterglow.ids import new_id
from afterglow.objects import (
    AuditLog,
    CreateApiKey,
    CreateProject,
    Json,
    KeyScope,
    ModifyApiKey,
    ModifyProject,
    ProjectSettings,
)
from afterglow.rows import keys as key_rows
from afterglow.rows import projects as project_rows
from afterglow.rows.audit import Actor, insert_act
from afterglow.rows.keys import KeyRow, in_order
from afterglow.rows.projects import ProjectRow
from afterglow.rows.quotas import forget_key
from afterglow.rows.requests import Asked, insert_request


class NewKey(NamedTuple):
    """A key that was just made. secret: shown once, and kept nowhere."""

    secret: str
    row: KeyRow


# --- projects --------------------------------------------------------------------------------------------------


async def create_project(
    store: Store, now: float, actor: Actor, body: CreateProject, asked: Asked | None = None
) -> ProjectRow:
    """asked: by which request, if by one."""
    row = ProjectRow(new_id("proj"), body.name, int(now), None, body.settings)

    async def work(tx: Transaction) -> tuple[ProjectRow, AuditLog]:
        await project_rows.insert_project(tx, row)
        if asked is not None:
            await insert_request(tx, *asked, row.id, int(now))
        details: Json = {"id": row.id, "data": {"name": row.name, "title": row.name}}
        if row.settings != ProjectSettings():
            details["data"]["settings"] = msgspec.to_builtins(row.settings)
        return row, await insert_act(tx, now, actor, "project.created", row.id, details)

    return await carry_out(store, actor, work)


async def name_project(store: Store, now: float, actor: Actor, project: str) -> None:
    """Have a project whose id is a name that an operator chose."""

    async def work(tx: Transaction) -> tuple[None, AuditLog | None]:
        if await project_rows.get_project(tx, project):
            return None, None
        await project_rows.ensure_project(tx, project, int(now))
        details: Json = {"id": project, "data": {"name": project, "title": project}}
        return None, await insert_act(tx, now, actor, "project.created", project, details)

    await carry_out(store, actor, work)


async def modify_project(store: Store, now: float, actor: Actor, project: str, body: ModifyProject) -> ProjectRow:
    """Raises NotFound."""

    async def work(tx: Transaction) -> tuple[ProjectRow, AuditLog | None]:
        before = await existing_project(tx, project)
        row = before if body.name is UNSET else before._replace(name=body.name)
        asked: Json = {} if body.name is UNSET else {"title": body.name}
        if body.settings is not UNSET:
            parts = {name: part for name, part in msgspec.structs.asdict(body.settings).items() if part is not UNSET}
            row = row._replace(settings=msgspec.structs.replace(row.settings, **parts))
            asked["settings"] = msgspec.to_builtins(body.settings)
        if row == before:
            return row, None
        await project_rows.update_project(tx, row)
        details: Json = {"id": project, "changes_requested": asked}
        return row, await insert_act(tx, now, actor, "project.updated", project, details)

    return await carry_out(store, actor, work)


async def archive_project(store: Store, now: float, actor: Actor, project: str) -> ProjectRow:
    """Its keys are refused within a second, and its data stays. Raises NotFound; InvalidRequest for the default."""

    async def work(tx: Transaction) -> tuple[ProjectRow, AuditLog | None]:
        row = await existing_project(tx, project)
        if project == DEFAULT_PROJECT:
            raise InvalidRequest("The default project cannot be archived.")
        if row.archived_at is not None:
            return row, None
        row = row._replace(archived_at=int(now))
        await project_rows.update_project(tx, row)
        return row, await insert_act(tx, now, actor, "project.archived", project, {"id": project})

    return await carry_out(store, actor, work)


async def existing_project(tx: Transaction, project: str) -> ProjectRow:
    """Raises NotFound."""
    row = await project_rows.get_project(tx, project) if project else None
    if row is None:
        raise NotFound.of("project", project)
    return row


# --- keys ------------------------------------------------------------------------------------------------------


async def create_key(
    store: Store, now: float, actor: Actor, project: str, body: CreateApiKey, asked: Asked | None = None
) -> NewKey:
    """Make a key of a project that is there. asked: by which request, if by one. Raises NotFound; InvalidRequest once
    the project is archived."""
    expires_at = None if body.expires_in_seconds is None else int(now) + body.expires_in_seconds
    scopes: frozenset[KeyScope] = frozenset(body.scopes)
    secret, row, key_hash = new_key(project, body.name, int(now), scopes, expires_at, body.limits)

    async def work(tx: Transaction) -> tuple[NewKey, AuditLog]:
        if (await existing_project(tx, project)).archived_at is not None:
            raise InvalidRequest(f"The project '{project}' is archived; its keys would be refused.")
        await key_rows.insert_key(tx, project, row, key_hash)
        if asked is not None:
            await insert_request(tx, *asked, row.id, int(now))
        details: Json = {"id": row.id, "data": {"scopes": in_order(scopes), "name": row.name}}
        if expires_at is not None:
            details["data"]["expires_at"] = expires_at
        return NewKey(secret, row), await insert_act(tx, now, actor, "api_key.created", project, details, row.id)

    return await carry_out(store, actor, work)


async def renew_key(store: Store, now: float, actor: Actor, project: str, key_id: str) -> NewKey:
    """Give a key another secret, where nobody has seen the one it has. Raises NotFound."""
    secret, new, key_hash = new_key(project, "", int(now))

    async def work(tx: Transaction) -> tuple[NewKey, AuditLog]:
        row = (await existing_key(tx, project, key_id))._replace(hint=new.hint)
        await key_rows.replace_secret(tx, row, key_hash)
        details: Json = {"id": key_id, "changes_requested": {"secret": "renewed"}}
        return NewKey(secret, row), await insert_act(tx, now, actor, "api_key.updated", project, details, key_id)

    return await carry_out(store, actor, work)


async def modify_key(store: Store, now: float, actor: Actor, project: str, key_id: str, body: ModifyApiKey) -> KeyRow:
    """Raises NotFound."""

    async def work(tx: Transaction) -> tuple[KeyRow, AuditLog | None]:
        row = before = await existing_key(tx, project, key_id)
        if body.scopes is not UNSET:
            row = row._replace(scopes=frozenset(body.scopes))
        if body.expires_in_seconds is not UNSET:
            life_s = body.expires_in_seconds
            row = row._replace(expires_at=None if life_s is None else int(now) + life_s)
        if body.limits is not UNSET:
            row = row._replace(limits=body.limits)
        if row == before:
            return row, None
        await key_rows.update_key(tx, row)
        details: Json = {"id": key_id, "changes_requested": msgspec.to_builtins(body)}
        return row, await insert_act(tx, now, actor, "api_key.updated", project, details, key_id)

    return await carry_out(store, actor, work)


async def revoke_key(store: Store, now: float, actor: Actor, project: str, key_id: str) -> None:
    """It is dead within a second. Raises NotFound."""

    async def work(tx: Transaction) -> tuple[None, AuditLog]:
        await existing_key(tx, project, key_id)
        await key_rows.revoke_key(tx, key_id, int(now))
        await forget_key(tx, key_id)
        return None, await insert_act(tx, now, actor, "api_key.deleted", project, {"id": key_id}, key_id)

    await carry_out(store, actor, work)


async def existing_key(tx: Transaction, project: str, key_id: str) -> KeyRow:
    """Raises NotFound."""
    row = await key_rows.get_key(tx, project, key_id)
    if row is None:
        await existing_project(tx, project)
        raise NotFound.of("key", key_id)
    return row
