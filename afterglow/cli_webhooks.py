"""The command `afterglow webhooks`."""

from __future__ import annotations

import argparse
import time
from typing import Any, get_args

from afterglow.cli_access import named_project
from afterglow.commands import add_command, add_data_flags, with_store
from afterglow.contracts import Store, Transaction
from afterglow.objects import DeliveryStatus, WebhookDelivery


def add_webhook_commands(commands: Any) -> None:
    webhooks = commands.add_parser("webhooks", help="look after webhooks", allow_abbrev=False)
    actions = webhooks.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = add_command(actions, "list", _list, "list the endpoints, without their secrets")
    log = add_command(actions, "deliveries", _deliveries, "list the newest deliveries to an endpoint")
    log.add_argument("endpoint_id", metavar="ENDPOINT_ID", help="as `webhooks list` shows it")
    log.add_argument("--status", choices=get_args(DeliveryStatus), help="only those of this status")
    resend = add_command(actions, "resend", _resend, "have an event sent once more")
    resend.add_argument("endpoint_id", metavar="ENDPOINT_ID", help="as `webhooks list` shows it")
    resend.add_argument("delivery_id", metavar="DELIVERY_ID", help="as `webhooks deliveries` shows it")
    for command in (listing, log, resend):
        command.add_argument("--project", default="default", help="whose they are, by id or name (default: default)")
        add_data_flags(command)


def _list(options: argparse.Namespace) -> int:
    from afterglow.rows.webhooks import get_endpoints

    project = named_project(options)
    for endpoint in with_store(options, lambda store: store.read(lambda tx: get_endpoints(tx, project))):
        events = ",".join(endpoint.event_types)
        print(f"{endpoint.id}  {endpoint.status}  {endpoint.url}  {events}  {endpoint.name}".rstrip())
    return 0


def _deliveries(options: argparse.Namespace) -> int:
    from afterglow.webhooks import list_newest

    project = named_project(options)

    async def work(tx: Transaction) -> list[WebhookDelivery]:
        return await list_newest(tx, project, options.endpoint_id, options.status)

    for delivery in with_store(options, lambda store: store.read(work)):
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(delivery.created_at))
        said = (delivery.tries[-1].error or delivery.tries[-1].status_code) if delivery.tries else "not tried yet"
        print(f"{delivery.id}  {made}  {delivery.status}  {delivery.event_type}  {said}")
    return 0


def _resend(options: argparse.Namespace) -> int:
    from afterglow.audit import operator
    from afterglow.webhooks import resend

    project = named_project(options)

    async def act(store: Store) -> None:
        await resend(store, time.time(), operator(), project, options.endpoint_id, options.delivery_id)

    with_store(options, act)
    print(f"{options.delivery_id} is sent by the server: now if it is running, else when it starts.")
    return 0
