"""openai-node of today and of yesterday against a real server."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.e2e.clients import node_client
from tests.e2e.polls import HeldModel
from tests.e2e.processes import Ended, Served, run
from tests.e2e.recordings import record, replaying

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
NODE_OF = {"4.104.0": 18, "7.57.0": 20}  # the releases, and the oldest Node each was seen to run on
VERSIONS = [*NODE_OF]


async def node(version: str, script: str, *arguments: str) -> Ended:
    """Run a script beside the client: imports are looked for where the script lies."""
    folder = node_client(version)
    here = (await run("node", "--version")).out.strip()
    if int(here.lstrip("v").partition(".")[0]) < NODE_OF[version]:
        pytest.skip(f"openai-node {version} needs Node {NODE_OF[version]}; this is {here}")
    shutil.copy(FOLDER / script, folder)
    ended = await run("node", "--no-deprecation", folder / script, *arguments, cwd=folder)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return ended


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_whole_app(version: str, story_server: Served):
    """What apps do with this SDK works unmodified, while pings fall into every stream."""
    ended = await node(version, "client_story.mjs", story_server.url, "sk-story")
    assert f"openai-node {version}" in ended.out
    assert story_server.complaints == []


@pytest.mark.parametrize("version", VERSIONS)
async def test_pings_are_not_seen(version: str, server: Server):
    """A keep-alive between any two events, or between all of them, changes nothing of what the SDK makes of them."""
    async with replaying(await record(server)) as (url, counts):
        ended = await node(version, "client_pings.mjs", url, *counts)
        assert ended.out.count("all the same") == len(counts)


@pytest.mark.parametrize("version", VERSIONS)
async def test_polls_are_held(version: str, server: Server):
    """A helper asks once for each stop of a run, and a client of little patience gets its answers in time."""
    model = HeldModel(server)
    task = asyncio.create_task(
        node(version, "client_polls.mjs", f"{server.url}/v1", "sk-polls", await model.assistant())
    )
    await model.play(task)
    await task
