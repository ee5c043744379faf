"""The command `afterglow tools`."""

from __future__ import annotations

import argparse
import time
from typing import Any

from afterglow.cli_access import named_project
from afterglow.commands import add_command, add_data_flags, with_store
from afterglow.contracts import Transaction
from afterglow.objects import AuditLog


def add_tools_commands(commands: Any) -> None:
    tools = commands.add_parser("tools", help="what calls of tools with a URL are signed with", allow_abbrev=False)
    actions = tools.add_subparsers(dest="action", required=True, metavar="ACTION")
    secret = add_command(actions, "secret", _secret, "print the secret of a project's calls; the first time, make it")
    rotate = add_command(actions, "rotate", _rotate, "make a new secret and print it; the old one signs no more")
    for command in (secret, rotate):
        command.add_argument("--project", default="default", help="whose calls, by id or name (default: default)")
        add_data_flags(command)


def _secret(options: argparse.Namespace) -> int:
    from afterglow.rows.tool_calls import take_tool_secret
    from afterglow.signing import new_secret

    project, new, now = named_project(options), new_secret(), int(time.time())
    print(with_store(options, lambda store: store.write(lambda tx: take_tool_secret(tx, project, new, now))))
    return 0


def _rotate(options: argparse.Namespace) -> int:
    from afterglow.audit import carry_out, operator
    from afterglow.rows.audit import insert_act
    from afterglow.rows.tool_calls import replace_tool_secret
    from afterglow.signing import new_secret

    project, new, now, actor = named_project(options), new_secret(), time.time(), operator()

    async def rotate(tx: Transaction) -> tuple[None, AuditLog]:
        await replace_tool_secret(tx, project, new, int(now))
        return None, await insert_act(tx, now, actor, "tool_secret.rotated", project, {"id": project})

    with_store(options, lambda store: carry_out(store, actor, rotate))
    print(new)
    return 0
