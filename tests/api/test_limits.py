"""Limits as callers meet them: 429 with headers, and what goes on all the same."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow.contracts import Logs
from afterglow.limits import Limiter
from afterglow.objects import Usage
from afterglow.quotas import share_rates
from afterglow.testing import SetClock, Write, calls, says
from tests.api.test_keys import ADMIN
from tests.api.test_projects import PROJECTS
from tests.api.wire import Answer, Json, Wire, until
from tests.conftest import GET_WEATHER, Server, ServerFactory
from tests.postgres import FolderDatabases

KEYS = (ADMIN, "test-key:blue")
MEGABYTE = b"x" * 1024 * 1024


async def limit(server: Server, clock: SetClock, connect: Any, **limits: int) -> Wire:
    """Set limits of the project blue, let them hold, and return a client of it."""
    await connect(server, "sk-admin").made(f"{PROJECTS}/blue", {"settings": {"limits": limits}})
    clock.time += 1
    wire: Wire = connect(server, "test-key")
    return wire


def rates(answer: Answer) -> Json:
    prefix = "x-ratelimit-"
    return {name.removeprefix(prefix): value for name, value in answer.headers.items() if name.startswith(prefix)}


async def test_requests_are_limited_with_the_headers_that_sdks_read(
    start_server: ServerFactory, connect: Any, tmp_path: Path
):
    """Every answer of a limited project tells what is left, errors as well; then comes 429. Other projects, and
    administration, go on; where nothing is limited, nothing is told."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        wire = await limit(server, clock, connect, requests_per_minute=3)
        assert rates(await wire.get("/assistants")) == {
            "limit-requests": "3",
            "remaining-requests": "2",
            "reset-requests": "20s",
        }
        assert rates(await wire.get("/assistants/asst_x"))["remaining-requests"] == "1"
        assert rates(await wire.post("/nowhere"))["remaining-requests"] == "0"
        refused = await wire.get("/assistants")
        assert (refused.status, refused.json["error"]["type"]) == (429, "requests")
        assert refused.fault.code == "rate_limit_exceeded"
        assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("20", "20000")
        assert rates(refused) == {"limit-requests": "3", "remaining-requests": "0", "reset-requests": "1m0s"}
        admin = connect(server, "sk-admin")
        assert rates(await admin.get("/assistants")) == {}
        acting = await admin.get("/assistants", headers={"OpenAI-Project": "blue"})
        assert acting.status == 429
        assert rates(await admin.get("/organization/projects", headers={"OpenAI-Project": "blue"})) == {}
        await limit(server, clock, connect)
        assert rates(await wire.get("/assistants")) == {}


async def test_the_sdk_tries_again_and_its_headers_parse(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """openai-python waits as it is told and then succeeds; without retries it raises RateLimitError."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        await limit(server, clock, connect, requests_per_minute=6000)
        raw = await server.client.beta.assistants.with_raw_response.list()
        assert int(raw.headers["x-ratelimit-remaining-requests"]) == 5999
        await limit(server, clock, connect, requests_per_minute=1)
        [bucket] = server.house.limits._buckets.values()
        bucket.level, bucket.at = 0.9999, clock.time  # so that the wait that is told is short
        with pytest.raises(openai.RateLimitError) as limited:
            await server.client.beta.assistants.list()
        assert (limited.value.code, limited.value.response.headers["retry-after-ms"]) == ("rate_limit_exceeded", "6")

        async def passes() -> None:
            await asyncio.sleep(0.002)
            clock.time += 60

        retrying = server.client.with_options(max_retries=2)
        page, _ = await asyncio.gather(retrying.beta.assistants.list(), passes())
        assert page.data == []


async def test_polling_never_eats_the_requests(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """A run is polled to its end though no request is left; polls have a limit of their own."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        server.model.will(says("Hello."))
        run = await server.run("hi")
        path = f"/threads/{run.thread_id}/runs/{run.id}"
        wire = await limit(server, clock, connect, requests_per_minute=1)
        assert (await wire.get("/assistants")).status == 200
        assert [(await wire.get(path)).status for _ in range(5)] == [200] * 5
        assert (await wire.get("/assistants")).status == 429
        wire = await limit(server, clock, connect, requests_per_minute=1, polls_per_minute=2)
        assert [(await wire.get(path)).status for _ in range(3)] == [200, 200, 429]


async def test_tokens_stop_new_runs_until_they_have_come_back(
    start_server: ServerFactory, connect: Any, tmp_path: Path
):
    """What a run's model calls report is counted; a run that would come next is refused, and told for how long."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        wire = await limit(server, clock, connect, tokens_per_minute=600)
        server.model.will(says("Hello.", usage=Usage(prompt_tokens=900, completion_tokens=100, total_tokens=1000)))
        run = await server.run("hi")
        path = f"/threads/{run.thread_id}/runs"
        refused = await wire.post(path, {"assistant_id": run.assistant_id})
        assert (refused.status, refused.json["error"]["type"]) == (429, "tokens")
        assert refused.headers["retry-after"] == "41"
        assert rates(refused)["remaining-tokens"] == "0"
        assert (await wire.get(f"{path}/{run.id}")).status == 200
        clock.time += 41
        server.model.will(says("Hello."))
        assert (await wire.post(path, {"assistant_id": run.assistant_id})).status == 200


async def test_runs_at_once_are_limited(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """So many of a project may be active, however many are asked for in the same moment; one that ends makes room. A
    run that waits for its thread is not active."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        wire = await limit(server, clock, connect, concurrent_runs=2)
        server.model.will(*(calls(("get_weather", {"city": "Oslo"})) for _ in range(3)))
        assistant = (await server.assistant()).id
        body = {"assistant_id": assistant, "tools": [GET_WEATHER]}
        answers = await asyncio.gather(*(wire.post("/threads/runs", body) for _ in range(6)))
        assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.json["error"]["type"] == "requests"
        assert refused.headers["retry-after"] == "1"
        run = await wire.stopped(next(answer for answer in answers if answer.status == 200).json)
        busy = await wire.post(f"/threads/{run['thread_id']}/runs", body)
        assert (busy.status, "already has an active run" in busy.fault.message) == (400, True)
        waits = await wire.made(f"/threads/{run['thread_id']}/runs?if_busy=queue", body)
        await wire.made(f"/threads/{run['thread_id']}/runs/{waits['id']}/cancel")
        await wire.made(f"/threads/{run['thread_id']}/runs/{run['id']}/cancel")
        assert (await wire.post("/threads/runs", body)).status == 200


async def test_a_key_has_limits_of_its_own(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Beside those of its project: requests, runs at once, and bytes of files that it stored."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        admin = connect(server, "sk-admin")
        limits = {"requests_per_minute": 100, "concurrent_runs": 1, "storage_mb": 1}
        made = await admin.made(f"{PROJECTS}/blue/api_keys", {"limits": limits})
        wire = connect(server, made["value"])
        server.model.will(*(calls(("get_weather", {"city": "Oslo"})) for _ in range(3)))
        body = {"assistant_id": (await server.assistant()).id, "tools": [GET_WEATHER]}
        assert rates(await wire.post("/threads/runs", body))["remaining-requests"] == "99"
        assert f"the key {made['id']}" in (await wire.post("/threads/runs", body)).fault.message
        other = connect(server, "test-key")
        assert (await other.post("/threads/runs", body)).status == 200
        assert rates(await other.get("/assistants")) == {}
        client = server.client.with_options(api_key=made["value"])
        await client.files.create(file=("a.txt", MEGABYTE[:-1]), purpose="assistants")
        with pytest.raises(openai.RateLimitError):
            await client.files.create(file=("b.txt", b"xx"), purpose="assistants")
        await server.client.files.create(file=("c.txt", b"xx"), purpose="assistants")


async def test_storage_is_limited(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Files and the parts of uploads together; a refusal tells SDKs not to try again, and keeps nothing; deleting
    makes room. Files that were stored before there were limits count."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        files = server.client.files
        first = await files.create(file=("a.txt", MEGABYTE), purpose="assistants")
        await server.house.store.write(lambda tx: tx.execute("UPDATE files SET size_bytes = NULL"))
        wire = await limit(server, clock, connect, storage_mb=2)
        upload = await wire.made(
            "/uploads",
            {"filename": "b.txt", "purpose": "assistants", "bytes": len(MEGABYTE), "mime_type": "text/plain"},
        )
        part = await server.client.uploads.parts.create(upload["id"], data=MEGABYTE)
        with pytest.raises(openai.RateLimitError) as refused:
            await server.client.with_options(max_retries=5).files.create(file=("c.txt", b"c"), purpose="assistants")
        assert (refused.value.type, refused.value.code) == ("insufficient_quota", "insufficient_quota")
        assert refused.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.RateLimitError):
            await server.client.uploads.parts.create(upload["id"], data=b"x")
        done = await wire.made(f"/uploads/{upload['id']}/complete", {"part_ids": [part.id]})
        assert done["status"] == "completed"
        assert len((await wire.read("/files"))["data"]) == 2
        await files.delete(first.id)
        await files.create(file=("c.txt", b"c"), purpose="assistants")


async def test_minutes_of_code_are_limited(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """When the day's are used up the model is told and the run goes on; the next day there are more."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS, run_lease_s=10_000, run_expires_s=10_000) as server:
        await limit(server, clock, connect, sandbox_minutes_per_day=1)

        async def told(*, takes_s: float = 0) -> str:
            """What the model is told of a cell that prints 42."""
            goes_on = asyncio.Event()
            server.code.cells[:] = [[goes_on, Logs("42")]]
            server.model.will(calls(("python", {"code": "6 * 7"})), says("Done."))
            running = asyncio.create_task(server.run("compute", tools=[{"type": "code_interpreter"}]))
            if takes_s:
                ran = len(server.code.ran)
                await until(lambda: len(server.code.ran) > ran)
                clock.time += takes_s
            goes_on.set()
            assert (await running).status == "completed"
            text: str = server.model.requests[-1].messages[-1]["content"]
            return text

        assert "42" in await told()
        assert "42" in await told(takes_s=61)
        used_up = await told()
        assert "The 1 minutes of code that project blue may run in a day are used up" in used_up
        assert "42" not in used_up
        clock.time += 24 * 3600
        assert "42" in await told()


@pytest.mark.slow
async def test_servers_on_one_postgres_hold_one_limit(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """What one of them has let pass is gone at the other as soon as both have told the database."""
    databases = FolderDatabases()
    place = {"database_url": await databases.url("limits"), "shared_data": True, "api_keys": KEYS}
    try:
        async with start_server(tmp_path, **place) as one, start_server(tmp_path, **place) as two:
            settings = {"limits": {"requests_per_minute": 30, "concurrent_runs": 3}}
            await connect(one, "sk-admin").made(f"{PROJECTS}/blue", {"settings": settings})
            first, second = connect(one, "test-key"), connect(two, "test-key")
            body = {"assistant_id": (await one.assistant()).id, "tools": [GET_WEATHER]}
            for server in (one, two):
                server.model.will(*(calls(("get_weather", {"city": "Oslo"})) for _ in range(6)))
            answers = await asyncio.gather(*(wire.post("/threads/runs", body) for wire in (first, second) * 5))
            assert sorted(answer.status for answer in answers) == [200] * 3 + [429] * 7
            assert [(await first.get("/assistants")).status for _ in range(19)] == [200] * 19
            for server in (one, two, one):
                await share_rates(server.house)
            await second.get("/assistants")
            await share_rates(two.house)
            assert int(rates(await second.get("/assistants"))["remaining-requests"]) < 10
    finally:
        await databases.drop()


async def test_what_code_leaves_is_limited(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Files for which there is no room in the project are not kept, and the model is told."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        wire = await limit(server, clock, connect, storage_mb=1)
        server.code.will([Write("small.txt", b"x"), Write("large.txt", MEGABYTE)])
        server.model.will(calls(("python", {"code": "write()"})), says("Done."))
        assert (await server.run("compute", tools=[{"type": "code_interpreter"}])).status == "completed"
        assert "[Not kept, because it is too much: large.txt" in server.model.requests[-1].messages[-1]["content"]
        assert [file["filename"] for file in (await wire.read("/files"))["data"]] == ["small.txt"]


async def test_processes_share_what_is_left(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """What one has let pass the others learn of when both have told the database, tokens that a worker has seen
    included; one that starts later begins where the others are."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=KEYS) as server:
        wire = await limit(server, clock, connect, requests_per_minute=10, tokens_per_minute=100)
        assert (await wire.get("/assistants")).status == 200
        house = server.house
        [who] = house.limits._holders
        holders = house.limits.holders(*who)
        first, second, worker = (Limiter(shared=True) for _ in range(3))
        for each in (first, second):
            each.believe(*who, *holders)

        async def left(limits: Limiter) -> tuple[str, str]:
            """What a request through this process is told, before the process tells and learns."""
            told = limits.admit(*who, "GET", "/v1/assistants", clock.now())
            house.limits = limits
            await share_rates(house)
            return told["x-ratelimit-remaining-requests"], told["x-ratelimit-remaining-tokens"]

        assert [await left(first) for _ in range(4)] == [("9", "100"), ("8", "100"), ("7", "100"), ("6", "100")]
        worker.spend(*who, 40, clock.now())
        house.limits = worker
        await share_rates(house)
        assert await left(second) == ("9", "100")
        assert await left(second) == ("4", "60")
        assert await left(first) == ("5", "100")
        assert await left(first) == ("2", "60")
        clock.time += 6
        assert await left(second) == ("4", "70")
