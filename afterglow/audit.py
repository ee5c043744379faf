"""What happens beside the audit log: who acts from the command line, and the line in the log once an act is done.

The acts themselves are written by `rows/audit.py`, in the transaction of what they tell of.
"""

from __future__ import annotations

import logging
import os
import pwd
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from afterglow.contracts import Store, Transaction
from afterglow.objects import AuditLog, Json
from afterglow.rows.audit import Actor, insert_act

T = TypeVar("T")
log = logging.getLogger("afterglow.audit")
COMMAND_LINE = "afterglow command line"


def operator() -> Actor:
    """Whoever runs this process, by the name that the operating system has for them."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # containers run under numbers that have no name
        name = str(os.getuid())
    return Actor("session", name, user_agent=COMMAND_LINE)


def tell(act: AuditLog, actor: Actor) -> None:
    """After the commit: a line in the log."""
    about = act.project["id"] or ""
    fields = {"audit_id": act.id, "act": act.type, "project": about, "actor": actor.id, "ip_address": actor.ip_address}
    log.info("%s in project %s by %s.", act.type, about or "–", actor.id, extra={"fields": fields})


async def carry_out(
    store: Store, actor: Actor, work: Callable[[Transaction], Awaitable[tuple[T, AuditLog | None]]]
) -> T:
    """Do what `work` does and notes in one transaction; None: there was nothing to do."""
    done, act = await store.write(work)
    if act is not None:
        tell(act, actor)
    return done


async def note(store: Store, actor: Actor, type: str, project: str, details: Json) -> None:
    """Note an act that has no transaction of its own, such as an export. project: "" for all of them."""
    now = time.time()

    async def work(tx: Transaction) -> AuditLog:
        return await insert_act(tx, now, actor, type, project, details)

    tell(await store.write(work), actor)
