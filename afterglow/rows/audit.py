"""Rows of `audit_log`: administrative acts, each written in the transaction of the act. Never a secret, never a text
of a thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from afterglow.contracts import SqlValue, Transaction
from afterglow.ids import new_id
from afterglow.objects import AuditLog, Json
from afterglow.rows.lists import ListPage, list_page
from afterglow.rows.projects import get_project

COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
MAX_TEXT = 256


class Actor(NamedTuple):
    """Who acts. kind: a key over HTTP, or a session: whoever runs a command. id: of the key, or the user's name."""

    kind: str
    id: str
    ip_address: str = ""
    user_agent: str = ""

    def as_json(self) -> Json:
        session: Json = {"ip_address": self.ip_address, "user_agent": self.user_agent[:MAX_TEXT]}
        if self.kind == "api_key":
            return {"type": "api_key", "api_key": {"id": self.id, "type": "service_account"}, "session": session}
        return {"type": "session", "session": {**session, "user": {"id": self.id, "email": None}}}


class AuditFilter(NamedTuple):
    """Which acts; an empty filter keeps all. effective_at: Unix seconds by comparison, of COMPARISONS."""

    effective_at: dict[str, int]
    types: Sequence[str] = ()
    projects: Sequence[str] = ()
    actors: Sequence[str] = ()
    resources: Sequence[str] = ()


async def insert_act(
    tx: Transaction, now: float, actor: Actor, type: str, project: str, details: Json, resource_id: str = ""
) -> AuditLog:
    """Note an act. type: as `project.created`. details: what was done, without secrets; goes under the key `type`.
    resource_id: what it was done to, if not the project."""
    row = await get_project(tx, project) if project else None
    act = AuditLog(
        id=new_id("audit_log", "-"),
        type=type,
        effective_at=int(now),
        project={"id": project or None, "name": row.name if row else None},
        actor=actor.as_json(),
    )
    await tx.execute(
        "INSERT INTO audit_log (project_id, id, seq, created_at, type, actor_id, resource_id, object)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        project,
        act.id,
        round(now * 1_000_000),
        act.effective_at,
        type,
        actor.id,
        resource_id or project,
        msgspec.json.encode({**msgspec.to_builtins(act), type: details}).decode(),
    )
    return act


async def page_of_acts(
    tx: Transaction, wanted: AuditFilter, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    """Acts of all projects. Raises UnknownCursor for one that the filter does not keep."""
    conditions, arguments = ["id <> $1"], list[SqlValue]([""])
    for comparison, value in wanted.effective_at.items():
        arguments.append(value)
        conditions.append(f"created_at {COMPARISONS[comparison]} ${len(arguments)}")
    for column, kept in (
        ("type", wanted.types),
        ("project_id", wanted.projects),
        ("actor_id", wanted.actors),
        ("resource_id", wanted.resources),
    ):
        if kept:
            numbers = ", ".join(f"${len(arguments) + offset}" for offset in range(1, len(kept) + 1))
            conditions.append(f"{column} IN ({numbers})")
            arguments += kept
    where = " AND ".join(conditions)
    return await list_page(
        tx, "audit_log", where, tuple(arguments), limit=limit, order=order, after=after, before=before
    )
