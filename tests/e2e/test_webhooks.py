"""What other clients make of the webhooks of a real server: they verify them, and let events pass that they do not
know."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from afterglow.testing import calls, says
from tests.api.wire import until
from tests.conftest import GET_WEATHER, ServerFactory
from tests.e2e.test_node_clients import node
from tests.e2e.test_old_python_clients import python
from tests.scripted_server import ScriptedServer, reply

pytestmark = pytest.mark.slow


@pytest.fixture
async def posts(tmp_path: Path, start_server: ServerFactory) -> AsyncGenerator[Path, None]:
    """What a target was sent of a run that called a function, with both secrets of an endpoint signing."""
    async with (
        ScriptedServer() as target,
        start_server(tmp_path / "data", private_webhooks=True) as server,
    ):
        target.on("POST /hook", reply({}))
        url = f"http://127.0.0.1:{target.port}/hook"
        hooks = server.client.webhooks
        made = await hooks.create(name="", url=url, event_types=["*"])  # type: ignore[list-item]
        await hooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        server.model.will(calls(("get_weather", {"city": "Oslo"})), says("Rain."))
        run = await server.run("How is the weather in Zürich?", tools=[GET_WEATHER])
        await until(lambda: len(target.requests) == 1)
        await server.submit(run, {"get_weather": "rain"})
        await until(lambda: len(target.requests) == 2)
        sent = [{"headers": request.headers, "body": request.body.decode()} for request in target.requests]
        file = tmp_path / "posts.json"
        file.write_text(json.dumps({"secret": made.signing_secret, "posts": sent, "run": run.id}))
        yield file


def expected(posts: Path) -> list[str]:
    run_id = json.loads(posts.read_text())["run"]
    told = [f"thread.run.{status} {run_id}" for status in ("requires_action", "completed")]
    return [told[0], "refused", told[1], "refused"]


@pytest.mark.parametrize("version", ["1.109.1", "current"])
async def test_python_clients_verify_webhooks(version: str, posts: Path) -> None:
    """Both clients, sync and async, also by a secret that is being replaced."""
    ended = await python(version, "client_webhooks.py", str(posts))
    assert ended.out.splitlines() == expected(posts) * 2


async def test_node_verifies_webhooks(posts: Path) -> None:
    """openai-node, from the release on that can."""
    ended = await node("7.57.0", "client_webhooks.mjs", str(posts))
    assert ended.out.splitlines() == expected(posts)
