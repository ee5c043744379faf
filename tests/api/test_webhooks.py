"""Webhooks: endpoints, the events that are sent to them, and the log of deliveries."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow.testing import says
from tests.api.wire import Wire, until
from tests.conftest import Server, ServerFactory
from tests.scripted_server import Received, ScriptedServer, reply

RUN_DONE = "thread.run.completed"


class Target(ScriptedServer):
    """Takes webhooks at /hook. secret: of the endpoint that leads there."""

    secret = ""

    @property
    def hook(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def posts(self) -> list[Received]:
        return [request for request in self.requests if request.path.startswith("/hook")]

    async def got(self, count: int) -> list[dict[str, Any]]:
        """The first events that were sent, once there are so many; each verified as a receiver does."""
        await until(lambda: len(self.posts) >= count)
        return [unwrapped(self.secret, post) for post in self.posts[:count]]


def unwrapped(secret: str, post: Received) -> dict[str, Any]:
    """The event as the official client reads it. Raises InvalidWebhookSignatureError."""
    client = openai.OpenAI(api_key="unused", webhook_secret=secret, http_client=NO_HTTP)
    return client.webhooks.unwrap(post.body, post.headers).to_dict(mode="json")


NO_HTTP = openai.DefaultHttpxClient(verify=False)
OK = reply({})


@pytest.fixture
async def target() -> AsyncGenerator[Target, None]:
    async with Target() as target:
        target.on("POST /hook", OK)
        yield target


@pytest.fixture
async def server(tmp_path: Path, start_server: ServerFactory) -> AsyncGenerator[Server, None]:
    async with start_server(tmp_path / "data", private_webhooks=True) as server:
        yield server


async def endpoint(wire: Wire, target: Target, *event_types: str, **fields: Any) -> str:
    """Register the target; its id."""
    made = await wire.made("/webhook_endpoints", {"url": target.hook, "event_types": event_types or ["*"], **fields})
    target.secret = made["signing_secret"]
    return str(made["id"])


async def log(wire: Wire, endpoint_id: str) -> list[dict[str, Any]]:
    """Its deliveries, the oldest first."""
    answer = await wire.get(f"/webhook_endpoints/{endpoint_id}/deliveries?order=asc")
    return list(answer.json["data"])


async def settled(wire: Wire, endpoint_id: str, count: int = 1, status: str = "delivered") -> list[dict[str, Any]]:
    """The log, once so many deliveries have this status."""
    async with asyncio.timeout(10):
        while True:
            found = [one for one in await log(wire, endpoint_id) if one["status"] == status]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.005)


async def test_a_run_that_completes_is_told(server: Server, wire: Wire, target: Target) -> None:
    """The end of a run reaches the endpoint, signed as the SDK verifies it, with ids and facts and no text."""
    await endpoint(wire, target)
    server.model.will(says("It is a secret."))
    run = await server.run("Tell nobody.")
    [event] = await target.got(1)
    assert re.fullmatch("evt_[0-9A-Za-z]{24}", event["id"])
    assert event == {
        "id": target.posts[0].headers["webhook-id"],
        "object": "event",
        "created_at": event["created_at"],
        "type": RUN_DONE,
        "data": {
            "id": run.id,
            "thread_id": run.thread_id,
            "assistant_id": run.assistant_id,
            "status": "completed",
            "last_error_code": None,
            "incomplete_reason": None,
        },
    }
