"""The commands `afterglow keys` and `afterglow projects`."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from afterglow.commands import add_command, add_data_flags, with_store
from afterglow.contracts import Store
from afterglow.errors import ConfigError
from afterglow.objects import (
    DAY_S,
    MAX_KEY_LIFE_S,
    Budget,
    CreateApiKey,
    CreateProject,
    Limits,
    ModifyProject,
    ModifyProjectSettings,
    ProjectSettings,
    Retention,
)

T = TypeVar("T", Limits, Retention, Budget)
UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": DAY_S}
LIFE = re.compile(r"([0-9]{1,9})([smhd])")
PARTS: dict[str, type[Limits | Retention | Budget]] = {"limits": Limits, "retention": Retention, "budget": Budget}


def add_access_commands(commands: Any) -> None:
    """`keys` and `projects`, with what is below them."""
    keys = commands.add_parser("keys", help="make, list and revoke API keys", allow_abbrev=False)
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = add_command(actions, "create", _keys_create, "make a key and print it, once")
    create.add_argument("--project", default="default", help="what the key may see, by id or name (default: default)")
    create.add_argument("--name", default="", help="a note on what the key is for")
    create.add_argument("--scopes", default="read,write", help="of read, write and admin (default: read,write)")
    create.add_argument(
        "--expires", metavar="TIME", help="after how long it is refused: 30d, 12h, 90m (default: never)"
    )
    _set_flag(create, "limit", "limits", Limits)
    listing = add_command(actions, "list", _keys_list, "list the keys, without their secrets")
    revoke = add_command(actions, "revoke", _keys_revoke, "make a key worthless, within a second")
    revoke.add_argument("key_id", metavar="KEY_ID", help="as `keys list` shows it")
    for command in (create, listing, revoke):
        add_data_flags(command)
    _add_projects(commands)


def _add_projects(commands: Any) -> None:
    projects = commands.add_parser("projects", help="make, list, change and archive projects", allow_abbrev=False)
    actions = projects.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = add_command(actions, "list", _projects_list, "list the projects, the archived as well")
    create = add_command(actions, "create", _projects_create, "make a project and print its id")
    create.add_argument("name", metavar="NAME", help="what it is called")
    show = add_command(actions, "show", _projects_show, "show a project and its settings")
    change = add_command(actions, "set", _projects_set, "change a project's name or settings, within a second")
    change.add_argument("--name", dest="new_name", metavar="NAME", help="what it is called from now on")
    archive = add_command(actions, "archive", _projects_archive, "refuse the keys of a project; its data stays")
    for command in (show, change, archive):
        command.add_argument("project", metavar="PROJECT", help="its id or name")
    for command in (create, change):
        _set_flag(command, "limit", "limits", Limits)
        _set_flag(command, "retention", "retention", Retention)
        _set_flag(command, "budget", "budget", Budget)
    for command in (listing, create, show, change, archive):
        add_data_flags(command)


def _set_flag(command: argparse.ArgumentParser, flag: str, dest: str, kind: type[msgspec.Struct]) -> None:
    said = f"any number of times; `none` takes it off: {', '.join(kind.__struct_fields__)}"
    command.add_argument(f"--{flag}", dest=dest, action="append", default=[], metavar="NAME=VALUE", help=said)


# --- what is said with a command -------------------------------------------------------------------------------


def _changed(kind: type[T], before: T, assignments: Sequence[str]) -> T:
    """`before` with what `NAME=VALUE` says. Raises ConfigError."""
    values = msgspec.structs.asdict(before)
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign or name not in values:
            raise ConfigError(f"{assignment[:80]!r}: expected NAME=VALUE, NAME of {', '.join(values)}.")
        values[name] = None if text == "none" else text
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{' '.join(assignments)}: {str(error).partition(' - at ')[0]}.") from None


def _life_s(text: str | None) -> int | None:
    """`30d` in seconds. Raises ConfigError."""
    if text is None or text == "never":
        return None
    found = LIFE.fullmatch(text)
    if found is None or not 1 <= (life_s := int(found[1]) * UNIT_S[found[2]]) <= MAX_KEY_LIFE_S:
        raise ConfigError(f"--expires {text[:40]!r}: expected a number and s, m, h or d, such as 30d.")
    return life_s


def _day(at: int | None, never: str) -> str:
    return never if at is None else time.strftime("%Y-%m-%d", time.gmtime(at))


async def _project_id(store: Store, name: str) -> str:
    """The id of a project that is named by its id or name. Raises ConfigError."""
    from afterglow.rows.projects import find_projects

    found = await store.read(lambda tx: find_projects(tx, name))
    if not found:
        raise ConfigError(f"There is no project {name!r}. `afterglow projects list` shows them.")
    if len(found) > 1:
        raise ConfigError(
            f"Several projects are called {name!r}; say which by its id: {', '.join(r.id for r in found)}."
        )
    return found[0].id


def named_project(options: argparse.Namespace) -> str:
    """The id of the project of `--project`; of one that nobody has made, its name. Raises ConfigError."""
    from afterglow.rows.projects import find_projects

    async def find(store: Store) -> str:
        found = await store.read(lambda tx: find_projects(tx, options.project))
        return await _project_id(store, options.project) if found else str(options.project)

    return with_store(options, find)


# --- keys ------------------------------------------------------------------------------------------------------


def _keys_create(options: argparse.Namespace) -> int:
    from afterglow import projects
    from afterglow.access import read_scopes
    from afterglow.audit import operator
    from afterglow.rows.keys import in_order
    from afterglow.rows.projects import find_projects

    body = CreateApiKey(
        name=options.name,
        scopes=in_order(read_scopes(options.scopes, ",")),
        expires_in_seconds=_life_s(options.expires),
        limits=_changed(Limits, Limits(), options.limits),
    )

    async def create(store: Store) -> projects.NewKey:
        now = time.time()
        if not await store.read(lambda tx: find_projects(tx, options.project)):
            await projects.name_project(store, now, operator(), options.project)
        project = await _project_id(store, options.project)
        return await projects.create_key(store, now, operator(), project, body)

    secret, row = with_store(options, create)
    print(secret)
    print(f"This is {row.id} of project {row.project_id}. It is shown this once.", file=sys.stderr)
    return 0


def _keys_list(options: argparse.Namespace) -> int:
    from afterglow.rows.keys import in_order, list_keys

    now = time.time()
    for row in with_store(options, lambda store: store.read(list_keys)):
        expired = row.expires_at is not None and row.expires_at <= now
        state = "revoked" if row.revoked_at else "expired" if expired else "valid"
        scopes = ",".join(in_order(row.scopes))
        life = f"expires {_day(row.expires_at, 'never')}  used {_day(row.last_used_at, 'never')}"
        made = _day(row.created_at, "")
        print(f"{row.id}  {row.hint}  {row.project_id}  {made}  {state}  {scopes}  {life}  {row.name}".rstrip())
    return 0


def _keys_revoke(options: argparse.Namespace) -> int:
    from afterglow import projects
    from afterglow.audit import operator
    from afterglow.rows.keys import list_keys

    async def revoke(store: Store) -> bool:
        rows = await store.read(list_keys)
        project = next((row.project_id for row in rows if row.id == options.key_id and not row.revoked_at), None)
        if project is None:
            return False
        await projects.revoke_key(store, time.time(), operator(), project, options.key_id)
        return True

    if with_store(options, revoke):
        print(f"{options.key_id} is revoked.")
        return 0
    print(f"afterglow: there is no valid key {options.key_id}.", file=sys.stderr)
    return 1


# --- projects --------------------------------------------------------------------------------------------------


def _projects_list(options: argparse.Namespace) -> int:
    from afterglow.rows.projects import list_projects

    for row in with_store(options, lambda store: store.read(list_projects)):
        state = "active" if row.archived_at is None else "archived"
        print(f"{row.id}  {_day(row.created_at, '')}  {state}  {row.name}")
    return 0


def _projects_create(options: argparse.Namespace) -> int:
    from afterglow import projects
    from afterglow.audit import operator

    settings = ProjectSettings(**_changed_parts(ProjectSettings(), options))
    body = CreateProject(name=options.name, settings=settings)
    made = with_store(options, lambda store: projects.create_project(store, time.time(), operator(), body))
    print(made.id)
    return 0


def _changed_parts(before: ProjectSettings, options: argparse.Namespace) -> dict[str, Any]:
    """The parts of the settings that the flags say something of."""
    return {
        name: _changed(kind, getattr(before, name), getattr(options, name))
        for name, kind in PARTS.items()
        if getattr(options, name)
    }


def _projects_show(options: argparse.Namespace) -> int:
    from afterglow import projects

    async def show(store: Store) -> Any:
        project = await _project_id(store, options.project)
        return await store.read(lambda tx: projects.existing_project(tx, project))

    row = with_store(options, show)
    print(f"{row.id}  {_day(row.created_at, '')}  {row.name}")
    if row.archived_at is not None:
        print(f"archived {_day(row.archived_at, '')}")
    for name in PARTS:
        for key, value in msgspec.structs.asdict(getattr(row.settings, name)).items():
            print(f"{name}.{key} = {'none' if value is None else value}")
    return 0


def _projects_set(options: argparse.Namespace) -> int:
    from afterglow import projects
    from afterglow.audit import operator

    if options.new_name is None and not any(getattr(options, name) for name in PARTS):
        raise ConfigError("Nothing to change: --name, --limit, --retention or --budget says what.")

    async def change(store: Store) -> str:
        project = await _project_id(store, options.project)
        before = (await store.read(lambda tx: projects.existing_project(tx, project))).settings
        body = ModifyProject(settings=ModifyProjectSettings(**_changed_parts(before, options)))
        if options.new_name is not None:
            body.name = options.new_name
        await projects.modify_project(store, time.time(), operator(), project, body)
        return project

    print(f"{with_store(options, change)} is changed.")
    return 0


def _projects_archive(options: argparse.Namespace) -> int:
    from afterglow import projects
    from afterglow.audit import operator

    async def archive(store: Store) -> str:
        project = await _project_id(store, options.project)
        await projects.archive_project(store, time.time(), operator(), project)
        return project

    print(f"{with_store(options, archive)} is archived; its keys are refused.")
    return 0
