"""/v1/organization: projects, their keys, and the audit log. The edge lets in keys with the scope `admin` alone."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow import projects
from afterglow.api import faults
from afterglow.api.answers import actor_of, house_of, origin_of, project_of, reply, reply_list
from afterglow.api.bodies import parse
from afterglow.api.pages import query_flag, query_integer
from afterglow.contracts import Transaction
from afterglow.objects import (
    ApiKey,
    CreateApiKey,
    CreatedApiKey,
    CreateProject,
    Deleted,
    ModifyApiKey,
    ModifyProject,
    Project,
)
from afterglow.projects import NewKey
from afterglow.rows import audit as audit_rows
from afterglow.rows import keys as key_rows
from afterglow.rows import projects as project_rows
from afterglow.rows.audit import COMPARISONS, AuditFilter
from afterglow.rows.keys import KeyRow, in_order
from afterglow.rows.lists import ListPage
from afterglow.rows.projects import ProjectRow
from afterglow.rows.requests import Asked

FARTHEST_AT = 2**53
MAX_VALUES = 100  # of one filter


async def _asked(request: Request) -> Asked:
    return Asked(project_of(request), await origin_of(request))


# --- projects --------------------------------------------------------------------------------------------------


async def list_projects(request: Request) -> Response:
    """GET /organization/projects. Archived ones only with `include_archived=true`."""
    archived = query_flag(request, "include_archived")

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        found = await project_rows.page_of_projects(tx, archived, **cursor)
        return await _filled(tx, found, lambda project: projects.existing_project(tx, project), _project)

    return await reply_list(request, "project", page)


async def create_project(request: Request) -> Response:
    """POST /organization/projects"""
    body = await parse(request, CreateProject)
    house, asked = house_of(request), await _asked(request)
    row = await projects.create_project(house.store, house.clock.now(), actor_of(request), body, asked)
    return reply(_project(row))


async def retrieve_project(request: Request) -> Response:
    """GET /organization/projects/{project_id}"""
    project = request.path_params["project_id"]
    return reply(_project(await house_of(request).store.read(lambda tx: projects.existing_project(tx, project))))


async def modify_project(request: Request) -> Response:
    """POST /organization/projects/{project_id}. Each part of `settings` that is given replaces the one before."""
    body = await parse(request, ModifyProject)
    house, project = house_of(request), request.path_params["project_id"]
    row = await projects.modify_project(house.store, house.clock.now(), actor_of(request), project, body)
    return reply(_project(row))


async def archive_project(request: Request) -> Response:
    """POST /organization/projects/{project_id}/archive. Its keys are refused from then on; its data stays."""
    house, project = house_of(request), request.path_params["project_id"]
    row = await projects.archive_project(house.store, house.clock.now(), actor_of(request), project)
    return reply(_project(row))


def _project(row: ProjectRow) -> Project:
    return Project(
        id=row.id,
        name=row.name,
        created_at=row.created_at,
        archived_at=row.archived_at,
        status="active" if row.archived_at is None else "archived",
        settings=row.settings,
    )


# --- keys ------------------------------------------------------------------------------------------------------


async def list_keys(request: Request) -> Response:
    """GET /organization/projects/{project_id}/api_keys: those that were not revoked."""
    project = request.path_params["project_id"]

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        await projects.existing_project(tx, project)
        found = await key_rows.page_of_keys(tx, project, **cursor)
        return await _filled(tx, found, lambda key_id: projects.existing_key(tx, project, key_id), _key)

    return await reply_list(request, "key", page)


async def create_key(request: Request) -> Response:
    """POST /organization/projects/{project_id}/api_keys. The answer's `value` is the key, shown this once."""
    body = await parse(request, CreateApiKey)
    house, project = house_of(request), request.path_params["project_id"]
    asked = await _asked(request)
    return reply(
        _created(await projects.create_key(house.store, house.clock.now(), actor_of(request), project, body, asked))
    )


async def renew_key(request: Request) -> Response:
    """What a retry is told of a key that was made, and whose answer nobody heard: its secret is not kept, so it gets
    another one."""
    house, project, key_id = house_of(request), request.path_params["project_id"], request.path_params["key_id"]
    return reply(_created(await projects.renew_key(house.store, house.clock.now(), actor_of(request), project, key_id)))


async def retrieve_key(request: Request) -> Response:
    """GET /organization/projects/{project_id}/api_keys/{key_id}"""
    project, key_id = request.path_params["project_id"], request.path_params["key_id"]
    return reply(_key(await house_of(request).store.read(lambda tx: projects.existing_key(tx, project, key_id))))


async def modify_key(request: Request) -> Response:
    """POST /organization/projects/{project_id}/api_keys/{key_id}"""
    body = await parse(request, ModifyApiKey)
    house, project, key_id = house_of(request), request.path_params["project_id"], request.path_params["key_id"]
    row = await projects.modify_key(house.store, house.clock.now(), actor_of(request), project, key_id, body)
    return reply(_key(row))


async def delete_key(request: Request) -> Response:
    """DELETE /organization/projects/{project_id}/api_keys/{key_id}. It is worthless within a second."""
    house, project, key_id = house_of(request), request.path_params["project_id"], request.path_params["key_id"]
    await projects.revoke_key(house.store, house.clock.now(), actor_of(request), project, key_id)
    return reply(Deleted(id=key_id, object="organization.project.api_key.deleted"))


def _created(made: NewKey) -> CreatedApiKey:
    return CreatedApiKey(**msgspec.structs.asdict(_key(made.row)), value=made.secret)


def _key(row: KeyRow) -> ApiKey:
    account = {"id": row.id, "name": row.name, "role": "member", "created_at": row.created_at}
    return ApiKey(
        id=row.id,
        name=row.name,
        redacted_value=row.hint,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        expires_at=row.expires_at,
        owner={"type": "service_account", "service_account": account},
        scopes=in_order(row.scopes),
        limits=row.limits,
    )


async def _filled(
    tx: Transaction, page: ListPage, get: Callable[[str], Awaitable[Any]], shape: Callable[[Any], Any]
) -> ListPage:
    """A page of ids with objects in their places."""
    return page._replace(objects=[msgspec.json.encode(shape(await get(name))).decode() for name in page.ids])


# --- the audit log ---------------------------------------------------------------------------------------------


async def list_audit_logs(request: Request) -> Response:
    """GET /organization/audit_logs, newest first."""
    wanted = AuditFilter(
        effective_at=_times(request),
        types=_values(request, "event_types"),
        projects=_values(request, "project_ids"),
        actors=_values(request, "actor_ids"),
        resources=_values(request, "resource_ids"),
    )

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        return await audit_rows.page_of_acts(tx, wanted, **cursor)

    return await reply_list(request, "audit log", page)


def _times(request: Request) -> dict[str, int]:
    asked = {sign: query_integer(request, f"effective_at[{sign}]", 0, FARTHEST_AT) for sign in COMPARISONS}
    return {sign: at for sign, at in asked.items() if at is not None}


def _values(request: Request, name: str) -> list[str]:
    """Of an array in the query: `name[]`, `name` or `name[0]`, each as often as one likes."""
    form = re.compile(rf"{name}(\[[0-9]*\])?")
    values = [value for key, value in request.query_params.multi_items() if form.fullmatch(key)]
    for index, value in enumerate(values):
        faults.check_text(value, f"{name}[{index}]")
    if len(values) > MAX_VALUES:
        got = f"an array with length {len(values)}"
        flaw = f"array too long. Expected an array with maximum length {MAX_VALUES}, but got {got} instead."
        raise faults.invalid(name, flaw, "array_above_max_length")
    return values
