"""Assistants that the operator declares in a TOML file, with fixed ids, so that hard-coded ones go on working.

    [assistants.asst_abc123]
    model = "gpt-4o"
    instructions_file = "prompts/tutor.md"        # beside this file; or instructions = "…"
    tools = [{ type = "function", function = { name = "grade", parameters = { type = "object" } } }]
    project = "default"

Keys are those of the API's create request; `instructions_file` and `project` are ours. At each start the file wins
over what is stored; an assistant that is no longer declared stays, as an ordinary one.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from afterglow.access import DEFAULT_PROJECT
from afterglow.api.bodies import decode
from afterglow.assistants import new_assistant
from afterglow.contracts import House, Transaction
from afterglow.errors import ConfigError, InvalidRequest
from afterglow.objects import CreateAssistant, CreateToolResources, Json
from afterglow.rows.assistants import AssistantRow, get_assistant, list_declared, put_assistant, update_assistant
from afterglow.telemetry import log

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Declaration(NamedTuple):
    """One table of the file. row: as it is stored, but for `created_at`."""

    project: str
    row: AssistantRow


async def declare_assistants(house: House, path: str) -> int:
    """Make the store hold what the file declares; return how many assistants that is. Unchanged ones stay untouched.

    Raises ConfigError, which names file, id and key.
    """
    declarations = read_declarations(Path(path))
    now = house.clock.now()

    async def work(tx: Transaction) -> list[str]:
        for offset, declaration in enumerate(declarations):
            await _put(tx, declaration, int(now), round(now * 1_000_000) + offset)
        return await _release_others(tx, {(made.project, made.row.assistant.id) for made in declarations})

    for assistant_id in await house.store.write(work):
        log.warning("%s is no longer declared in %s; it stays as an ordinary assistant.", assistant_id, path)
    return len(declarations)


async def _put(tx: Transaction, declaration: Declaration, now: int, seq: int) -> None:
    project, row = declaration
    stored = await get_assistant(tx, project, row.assistant.id)
    row.assistant.created_at = stored.assistant.created_at if stored else now
    if row != stored:
        await put_assistant(tx, project, row, seq)


async def _release_others(tx: Transaction, declared: set[tuple[str, str]]) -> list[str]:
    """Let go of assistants that an earlier file declared; return their ids."""
    released = []
    for project, assistant_id in await list_declared(tx):
        row = await get_assistant(tx, project, assistant_id)
        if row is not None and (project, assistant_id) not in declared:
            await update_assistant(tx, project, row._replace(declared=False))
            released.append(assistant_id)
    return released


# --- the file --------------------------------------------------------------------------------------------------


def read_declarations(path: Path) -> list[Declaration]:
    """What the file declares, in its order. Raises ConfigError."""
    tables = _read_toml(path)
    assistants = tables.pop("assistants", {})
    if tables or not isinstance(assistants, dict):
        raise ConfigError(f"{path}: expected tables named [assistants.ID] and nothing else.")
    return [_declaration(path, assistant_id, fields) for assistant_id, fields in assistants.items()]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"The assistants file {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not UTF-8, or no TOML
        raise ConfigError(f"The assistants file {path} is no TOML: {error}.") from None


def _declaration(path: Path, assistant_id: str, fields: Any) -> Declaration:
    place = f"{path}: [assistants.{assistant_id}]"
    if not ID.fullmatch(assistant_id):
        raise ConfigError(f"{place}: an id is up to 64 letters, digits, hyphens and underscores.")
    if not isinstance(fields, dict):
        raise ConfigError(f"{place}: expected a table.")
    project = fields.pop("project", DEFAULT_PROJECT)
    if not isinstance(project, str) or not project:
        raise ConfigError(f"{place}: project: expected a name.")
    if "instructions_file" in fields:
        fields["instructions"] = _read_instructions(place, path.parent, fields)
    body = _parse(place, fields)
    row = new_assistant(body, assistant_id, 0, declared=True)
    row.assistant.tool_resources = _resources(place, body.tool_resources)
    return Declaration(project, row)


def _read_instructions(place: str, folder: Path, fields: Json) -> str:
    name = fields.pop("instructions_file")
    if "instructions" in fields:
        raise ConfigError(f"{place}: give instructions or instructions_file, not both.")
    if not isinstance(name, str):
        raise ConfigError(f"{place}: instructions_file: expected the path of a text file.")
    try:
        return (folder / name).read_text("utf-8-sig").rstrip("\n")
    except OSError as error:
        raise ConfigError(f"{place}: instructions_file {name} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ConfigError(f"{place}: instructions_file {name} is not UTF-8 text.") from None


def _parse(place: str, fields: Json) -> CreateAssistant:
    """Read the keys exactly as those of a request are read."""
    try:
        return decode(json.dumps(fields, default=_refuse, allow_nan=False).encode(), CreateAssistant)
    except (InvalidRequest, ValueError) as error:
        raise ConfigError(f"{place}: {error}") from None


def _refuse(value: Any) -> None:
    raise ValueError(f"{value} is a {type(value).__name__}, which JSON does not have; write it in quotes.")


def _resources(place: str, resources: CreateToolResources | None) -> Json:
    """Ids are kept as they are: the operator's word, though no engine may hold what they name yet."""
    found: Json = msgspec.to_builtins(resources) if resources else {}
    if "vector_stores" in (found.get("file_search") or {}):
        raise ConfigError(f"{place}: tool_resources.file_search: name vector_store_ids; stores are not made from here.")
    return {kind: ids for kind, ids in found.items() if ids}
