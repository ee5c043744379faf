"""/metrics: who may read it, and that its numbers are those of what was done."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from afterglow.contracts import CellEnd, Logs
from afterglow.errors import ContextOverflow, ModelTimeout, SandboxBusy, StoreUnavailable
from afterglow.objects import Usage
from afterglow.probes import serve_metrics
from afterglow.testing import SetClock, calls, says
from tests.api import stores
from tests.api.streams import happened, idle, streaming
from tests.conftest import GET_WEATHER, Server, ServerFactory

KEY = "sk-one"
RUN = "/v1/threads/{thread_id}/runs/{run_id}"
Samples = dict[tuple[str, ...], float]


async def scraped(server: Server) -> Samples:
    """All samples, by their name and their labels' values in the order of the labels' names."""
    async with httpx2.AsyncClient(verify=False) as client:
        answer = await client.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (
            sample.name.removeprefix("afterglow_"),
            *(sample.labels[label] for label in sorted(sample.labels)),
        ): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


# --- what is counted -------------------------------------------------------------------------------------------


async def test_runs_and_tokens(server: Server):
    """Each run is counted once, when it is over, under its status; tokens under the model that answered."""
    server.model.will(
        calls(("get_weather", {"city": "Oslo"})), says("Rain."), says("Hello."), [ModelTimeout("Too late.")]
    )
    waiting = await server.run("Weather?", tools=[GET_WEATHER])
    assert (await scraped(server))["runs_ended_total", "completed"] == 0
    await server.submit(waiting, {"get_weather": "rain"})
    await server.run("Hi.")
    assert (await server.run("Hi.")).status == "failed"
    await idle(server)
    found = await scraped(server)
    ended = {key[1]: value for key, value in found.items() if key[0] == "runs_ended_total"}
    assert ended == {"completed": 2, "failed": 1, "cancelled": 0, "expired": 0, "incomplete": 0}
    assert found["run_duration_seconds_count",] == 3
    assert found["run_queued_seconds_count",] == 3
    assert found["model_tokens_total", "prompt", "scripted"] == 30
    assert found["model_tokens_total", "completion", "scripted"] == 15
    assert found["model_first_token_seconds_count", "scripted"] == 3
    assert found["model_call_seconds_count", "scripted"] == 3
    assert found["model_errors_total", "ModelTimeout"] == 1
    assert found["runs_executing",] == 0


async def test_an_overflow_that_is_mended_is_an_error_of_the_model(server: Server):
    """What the caller never hears of is counted, beside the call that went well."""
    server.model.will([ContextOverflow("Too long.", 4000)], says("Hello.", usage=Usage(prompt_tokens=7)))
    assert (await server.run("Hi.")).status == "completed"
    await idle(server)
    found = await scraped(server)
    assert found["model_errors_total", "ContextOverflow"] == 1
    assert found["model_tokens_total", "prompt", "scripted"] == 7


async def test_what_waits_and_what_is_at_work(tmp_path: Path, start_server: ServerFactory):
    """Queue and age are the database's, asked once a second; a run that ends without a worker is counted as well."""
    clock, going_on = SetClock(), asyncio.Event()
    async with start_server(tmp_path, clock=clock, max_running_runs=1) as server:
        server.model.will([going_on, *says("Done.")])
        assistant, threads = await server.assistant(), [await server.client.beta.threads.create() for _ in range(3)]
        create = server.client.beta.threads.runs.create
        runs = [await create(thread.id, assistant_id=assistant.id) for thread in threads]
        await eventually(lambda: server.model.requests)
        clock.time += 30
        found = await scraped(server)
        assert found["database_up",] == 1
        assert (found["runs_executing",], found["runs_queued",]) == (1, 2)
        assert 30 <= found["oldest_queued_run_age_seconds",] <= 31
        await server.client.beta.threads.runs.cancel(runs[1].id, thread_id=threads[1].id)
        assert (await scraped(server))["runs_queued",] == 2
        server.house.metrics._backlog_until = 0
        found = await scraped(server)
        assert (found["runs_queued",], found["runs_ended_total", "cancelled"]) == (1, 1)
        going_on.set()
        await server.poll(runs[0])
        await server.poll(runs[2])
        server.house.metrics._backlog_until = 0
        found = await scraped(server)
        assert (found["runs_queued",], found["oldest_queued_run_age_seconds",]) == (0, 0)


async def test_a_database_that_is_silent(server: Server, monkeypatch: pytest.MonkeyPatch):
    """The page is there all the same: the database is down, and what only it knows is not a number."""

    async def refuse(work: object) -> None:
        raise StoreUnavailable("Gone.")

    await scraped(server)  # the key is known for a second
    server.house.metrics._backlog_until = 0
    monkeypatch.setattr(server.house.store, "read", refuse)
    found = await scraped(server)
    assert found["database_up",] == 0
    assert found["runs_queued",] != found["runs_queued",]
    assert found["ingest_files_pending",] != found["ingest_files_pending",]


async def test_takeovers_and_lost_leases(tmp_path: Path, start_server: ServerFactory):
    """A run that goes on after a restart is a takeover; one that is gone while it is executed is a lost lease."""
    async with start_server(tmp_path) as server:
        server.model.will([asyncio.Event()])
        assistant, thread = await server.assistant(), await server.client.beta.threads.create()
        run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
        await eventually(lambda: server.model.requests)
    async with start_server(tmp_path) as server:
        going_on = asyncio.Event()
        server.model.will([going_on, *says("Hello.")])
        await happened(server, run.id, "thread.run.in_progress")
        await eventually(lambda: server.model.requests)
        found = await scraped(server)
        assert (found["runs_taken_over_total",], found["run_leases_lost_total",]) == (1, 0)
        await server.client.beta.threads.delete(thread.id)
        going_on.set()
        await eventually(lambda: server.application.worker.running == 0)
        assert (await scraped(server))["run_leases_lost_total",] == 1


async def test_tools_and_sessions(server: Server):
    """Calls of the server's own tools by how they ended, and the sessions that are open."""
    python = {"type": "code_interpreter"}
    call = calls(("python", {"code": "1"}))
    server.code.will([Logs("1"), CellEnd("ok")])
    server.model.will(call, says("One."))
    await server.run("Count.", tools=[python])
    await idle(server)
    found = await scraped(server)
    assert found["tool_call_seconds_count", "ok", "code_interpreter"] == 1
    assert found["code_sessions_open",] == 1
    server.code.refuses = SandboxBusy("Too many.")
    server.model.will(call, says("None."))
    server.application.worker._interpreter._open.clear()
    await server.run("Count.", tools=[python])
    await idle(server)
    assert (await scraped(server))["tool_call_seconds_count", "failed", "code_interpreter"] == 1


async def test_files(server: Server):
    """Files that were indexed with their passages, and files that could not be."""
    await stores.make_store(server, stores.CATS, stores.DOGS, b"")
    await idle(server)
    found = await scraped(server)
    assert found["ingest_files_total", "indexed"] == 2
    assert found["ingest_files_total", "failed"] == 1
    assert found["ingest_chunks_total",] == 4
    assert found["ingest_seconds_count",] == 2
    assert found["ingest_files_pending",] == 0


async def test_requests_and_streams(server: Server):
    """Requests by the template of their route, whatever the ids and the prefix; streams while they are open."""
    going_on = asyncio.Event()
    server.model.will([going_on, *says("Hello there.")])
    assistant, thread = await server.assistant(), await server.client.beta.threads.create()
    async with streaming(server, f"/threads/{thread.id}/runs", {"assistant_id": assistant.id}) as response:
        await eventually(lambda: server.model.requests)
        assert (await scraped(server))["open_streams",] == 1
        going_on.set()
        await response.aread()
    with pytest.raises(openai.NotFoundError):
        await server.client.beta.threads.runs.retrieve("run_x", thread_id=thread.id)
    with pytest.raises(openai.NotFoundError):
        await server.client.get("/no/such/route", cast_to=object)
    found = await scraped(server)
    assert found["open_streams",] == 0
    assert found["http_requests_total", "POST", "/v1/threads/{thread_id}/runs", "2xx"] == 1
    assert found["http_requests_total", "GET", RUN, "4xx"] == 1
    assert found["http_requests_total", "GET", "other", "4xx"] == 1
    assert found["http_request_seconds_count", "POST", "/v1/assistants"] == 1


async def test_batches_of_text(tmp_path: Path, start_server: ServerFactory):
    """Streamed text that waited for a batch is counted by the rows that it became."""
    async with start_server(tmp_path, event_flush_ms=1) as server:
        going_on = asyncio.Event()
        server.model.will([*says("Hello there.")[:-1], going_on, *says("")[1:]])
        assistant, thread = await server.assistant(), await server.client.beta.threads.create()
        run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
        async with asyncio.timeout(10):
            while not (await scraped(server))["event_flush_rows_sum",]:
                await asyncio.sleep(0.002)
        going_on.set()
        assert (await server.poll(run)).status == "completed"


# --- who may read it -------------------------------------------------------------------------------------------


async def test_a_key_is_needed(tmp_path: Path, start_server: ServerFactory):
    """On the main port any key of any project will do, and none or a wrong one will not."""
    async with (
        start_server(tmp_path, api_keys=f"{KEY},sk-two:other") as server,
        httpx2.AsyncClient(verify=False) as client,
    ):
        for key, status in ((KEY, 200), ("sk-two", 200), ("sk-three", 401), ("", 401)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            assert (await client.get(f"{server.url}/metrics", headers=headers)).status_code == status
        assert (
            await client.get(f"{server.url}/metrics", headers={"origin": "https://evil.example"})
        ).status_code == 403
        assert (await client.get(f"{server.url}/v1/metrics", headers={"api-key": KEY})).status_code == 404


@asynccontextmanager
async def second_port(server: Server) -> AsyncGenerator[httpx2.AsyncClient, None]:
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    async with serve_metrics(server.application, listening), httpx2.AsyncClient(base_url=url, verify=False) as client:
        yield client
    assert listening.fileno() == -1


@pytest.mark.slow
async def test_the_second_port(tmp_path: Path, start_server: ServerFactory):
    """Three pages without a key, by whatever name of the host; nothing else is there, with or without one."""
    async with start_server(tmp_path, api_keys=KEY) as server, second_port(server) as client:
        found = await client.get("/metrics", headers={"host": "afterglow.internal:9000"})
        assert found.status_code == 200
        assert b"afterglow_runs_queued 0.0" in found.content
        assert (await client.get("/healthz")).json()["status"] == "ok"
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        for path in ("/v1/assistants", "/openapi.json", "/", "/metrics/", "/v1/metrics", "/nowhere"):
            for headers in ({}, {"authorization": f"Bearer {KEY}"}):
                assert (await client.get(path, headers=headers)).status_code == 404
        assert (await client.post("/metrics")).status_code == 404


async def test_the_second_port_under_a_path(tmp_path: Path, start_server: ServerFactory):
    """A server below a path of its proxy has its second port at the root: no proxy is before that."""
    async with start_server(tmp_path, api_keys=KEY, root_path="/afterglow") as server, second_port(server) as client:
        assert (await client.get("/metrics")).status_code == 200
