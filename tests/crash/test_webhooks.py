"""The server dies between any two commits while runs and files end and are told of: what was ever shown has its event,
once in the log, and reaches its endpoint at least once, always under the same id."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from afterglow.testing import SetClock
from tests.api.wire import until
from tests.crash.lives import PATIENCE_S, Life, Storyteller, mortal, next_life
from tests.crash.test_between_commits import Caller, answers, asks_one
from tests.scripted_server import ScriptedServer, reply

# Whoever dies while it connects leaves sockets and coroutines behind, and Python says so.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SETTINGS: dict[str, Any] = {"private_webhooks": True, "event_flush_ms": 60_000}


@pytest.fixture(autouse=True)
def _left_behind_here() -> Generator[None, None, None]:
    yield
    gc.collect()  # or another test hears of it


@pytest.fixture
async def target() -> AsyncGenerator[ScriptedServer, None]:
    async with ScriptedServer() as target:
        target.on("POST /hook", reply({}))
        yield target


async def register(life: Life, target: ScriptedServer) -> None:
    await life.client.webhooks.create(
        name="",
        url=f"http://127.0.0.1:{target.port}/hook",
        event_types=["*"],  # type: ignore[list-item]
    )


async def recorded(life: Life) -> list[dict[str, Any]]:
    """The deliveries of the one endpoint."""
    [endpoint] = [one async for one in life.client.webhooks.list()]
    path = f"/webhook_endpoints/{endpoint.id}/deliveries?limit=100"
    answer = await life.client.get(path, cast_to=httpx2.Response)
    return list(answer.json()["data"])


async def all_delivered(life: Life) -> list[dict[str, Any]]:
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await recorded(life)) or any(one["status"] != "delivered" for one in found):
            await asyncio.sleep(0.002)
    return found


def check(target: ScriptedServer, log: list[dict[str, Any]], expected: list[str]) -> None:
    """Each event once in the log, and what was sent is what the log has."""
    assert Counter(one["event_type"] for one in log) == Counter(expected)
    sent = {request.headers["webhook-id"]: request.json for request in target.requests}
    assert sent == {one["event_id"]: one["event"] for one in log}


@pytest.mark.parametrize("lives", range(1, 18))
async def test_a_run_is_told_whenever_the_server_dies(tmp_path: Path, target: ScriptedServer, lives: int) -> None:
    """Its wait for outputs and its end are recorded once, and delivered by whoever comes after."""
    model, caller = Storyteller(asks_one, answers), Caller()
    async with mortal(tmp_path, model, **SETTINGS) as life:
        assert life.store is not None
        caller.client = life.client
        await register(life, target)
        await caller.prepare()
        life.store.commits, life.store.lives = 0, lives
        await life.do(caller.talk())
    async with next_life(tmp_path, model, SetClock(), **SETTINGS) as life:
        caller.client = life.client
        await caller.find(life)
        async with asyncio.timeout(PATIENCE_S):
            await caller.talk()
        log = await all_delivered(life)
    check(target, log, ["thread.run.requires_action", "thread.run.completed"])


@pytest.mark.parametrize("lives", range(1, 13))
async def test_files_are_told_whenever_the_server_dies(tmp_path: Path, target: ScriptedServer, lives: int) -> None:
    """Each file's end, and the batch's."""
    made: dict[str, str] = {}

    async def attach(client: openai.AsyncOpenAI) -> None:
        batches = client.vector_stores.file_batches
        found = await client.vector_stores.files.list(made["store"])
        if not found.data:
            await batches.create(made["store"], file_ids=[made["a"], made["b"]])
        while (await client.vector_stores.retrieve(made["store"])).status == "in_progress":
            await asyncio.sleep(0.001)

    async with mortal(tmp_path, Storyteller(answers), **SETTINGS) as life:
        assert life.store is not None
        await register(life, target)
        for name in "ab":
            file = await life.client.files.create(file=(f"{name}.txt", b"Cats sleep."), purpose="assistants")
            made[name] = file.id
        made["store"] = (await life.client.vector_stores.create()).id
        life.store.commits, life.store.lives = 0, lives
        await life.do(attach(life.client))
    async with next_life(tmp_path, Storyteller(answers), SetClock(), **SETTINGS) as life:
        async with asyncio.timeout(PATIENCE_S):
            await attach(life.client)
        log = await all_delivered(life)
    check(target, log, ["vector_store.file.completed"] * 2 + ["vector_store.file_batch.completed"])


async def test_a_process_that_dies_while_it_sends(tmp_path: Path, target: ScriptedServer) -> None:
    """What was under way is sent again, under its id; nobody knows whether it had arrived."""
    target.on("POST /hook", reply({}, 500))
    model, caller = Storyteller(answers), Caller()
    async with mortal(tmp_path, model, **SETTINGS) as life:
        assert life.store is not None
        caller.client = life.client
        await register(life, target)
        await caller.prepare()
        await caller.talk()
        await until(lambda: target.requests)
        life.store.dead.set()
    target.on("POST /hook", reply({}))
    clock = SetClock()
    clock.time += 10
    async with next_life(tmp_path, model, clock, **SETTINGS) as life:
        [delivery] = await all_delivered(life)
    assert {request.headers["webhook-id"] for request in target.requests} == {delivery["event_id"]}
    assert len(target.requests) == 2
