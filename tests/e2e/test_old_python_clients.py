"""The official Python client of today and of yesterday against a real server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from afterglow.contracts import McpServer, McpTool
from afterglow.errors import OutboundFailed
from afterglow.objects import Limits
from afterglow.testing import calls, says
from tests.api.test_keys import make_key
from tests.conftest import Server, ServerFactory
from tests.e2e.clients import python_client
from tests.e2e.polls import HeldModel
from tests.e2e.processes import Ended, Served, run
from tests.e2e.recordings import record, replaying
from tests.endpoints import Answer, endpoint

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
# Until 1.55 the SDK gives httpx an argument that httpx 0.28 has taken away.
SDKS = {"1.40.0": ("openai==1.40.0", "httpx==0.27.2"), "1.109.1": ("openai==1.109.1",)}
VERSIONS = [*SDKS, "current"]


async def python(version: str, script: str, *arguments: str) -> Ended:
    """Run a script with this SDK; the current one is that which this project's tests use anyway."""
    program = python_client(f"openai-{version}", *SDKS[version]) if version in SDKS else sys.executable
    ended = await run(program, "-W", "ignore::DeprecationWarning", FOLDER / script, *arguments)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return ended


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_whole_app(version: str, story_server: Served):
    """What apps do with this SDK works unmodified, with both of its clients, while pings fall into every stream."""
    ended = await python(version, "client_story.py", story_server.url, "sk-story")
    assert ended.out.count("came to its end") == 2
    assert story_server.complaints == []


@pytest.mark.parametrize("version", VERSIONS)
async def test_pings_are_not_seen(version: str, server: Server):
    """A keep-alive between any two events, or between all of them, changes nothing of what the SDK makes of them."""
    async with replaying(await record(server)) as (url, counts):
        ended = await python(version, "client_pings.py", url, *counts)
        assert ended.out.count("all the same") == 2 * len(counts)


@pytest.mark.parametrize("version", VERSIONS)
async def test_refusals_are_the_errors_that_apps_catch(version: str, server: Server):
    """A scope that is missing, an unknown key, and a limit that is used up, which waiting as told cures."""
    reader = await make_key(server, "read")
    limited = await make_key(server, "read", limits=Limits(requests_per_minute=600))
    await server.client.with_options(api_key=limited).beta.assistants.list()
    [bucket] = server.house.limits._buckets.values()
    bucket.level = 5
    ended = await python(version, "client_limits.py", f"{server.url}/v1", reader, limited)
    assert ended.out == "as it should be\n"


@pytest.mark.parametrize("version", VERSIONS)
async def test_tools_of_ours_are_read(version: str, tmp_path: Path, start_server: ServerFactory):
    """Assistants with MCP servers and with tools that have a URL, and the steps in which the server has called them,
    are read as ever; outputs are given in parts."""
    async with endpoint() as tool, start_server(tmp_path, private_tools=True) as server:
        tool.will(Answer(b'{"output": "rain"}'))
        server.house.mcp = NoMcp()
        calling = calls(("get_weather", {"city": "Oslo"}), ("book", {}), ("book", {}))
        server.model.will(*([calling, says("It is rain.")] * 2))
        ended = await python(version, "client_tools.py", f"{server.url}/v1", tool.url)
        assert ended.out.count("came to its end") == 2


class NoMcp:
    """MCP servers that have no tools."""

    def why_refused(self, server: McpServer) -> None:
        """Every one may be asked."""

    async def list_tools(self, project: str, server: McpServer) -> list[McpTool]:
        return []

    async def call_tool(
        self, project: str, server: McpServer, name: str, arguments: dict[str, Any], *, timeout_s: float
    ) -> str:
        raise OutboundFailed("it has none")

    async def close(self) -> None:
        """Nothing to let go of."""


@pytest.mark.parametrize("version", VERSIONS)
async def test_polls_are_held(version: str, server: Server):
    """A helper asks once for each stop of a run, and a client of little patience gets its answers in time."""
    model = HeldModel(server)
    task = asyncio.create_task(
        python(version, "client_polls.py", f"{server.url}/v1", "sk-polls", await model.assistant())
    )
    await model.play(task)
    await task
