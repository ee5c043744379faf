"""Held polls: who asks how a run is gets the answer when there is one, and costs nothing until then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.beta.threads import Run

from afterglow.api import holding
from afterglow.contracts import TextDelta
from afterglow.runs.lifecycle import expire_overdue
from afterglow.testing import Saying, SetClock, calls, says
from tests.api.stores import upload
from tests.api.streams import HEADERS, PATIENCE_S, answers, happened, polled
from tests.conftest import GET_WEATHER, Server, ServerFactory

AGAIN = "5"
WEATHER_IN_OSLO = ("get_weather", {"city": "Oslo"})


def never() -> Saying:
    """An answer that does not end."""
    return [TextDelta("Once"), asyncio.Event()]


async def start(server: Server, *script: Saying, **fields: Any) -> Run:
    """A run on a new thread."""
    server.model.will(*script)
    return await server.client.beta.threads.create_and_run(
        assistant_id=(await server.assistant()).id,
        thread={"messages": [{"role": "user", "content": "Hello"}]},
        **fields,
    )


def path_of(run: Run) -> str:
    return f"/threads/{run.thread_id}/runs/{run.id}"


async def get(server: Server, path: str, headers: dict[str, str] | None = None, **query: Any) -> httpx2.Response:
    async with httpx2.AsyncClient(headers=HEADERS, timeout=PATIENCE_S, verify=False) as client:
        return await client.get(f"{server.url}/v1{path}", params=query, headers=headers)


@asynccontextmanager
async def waiting(server: Server, *polls: Awaitable[Any]) -> AsyncGenerator[list[asyncio.Task[Any]], None]:
    """The polls under way, each of them held, and all of them answered at the end."""
    tasks = [asyncio.ensure_future(poll) for poll in polls]
    await held(server, len(tasks))
    yield tasks
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks)


async def held(server: Server, count: int) -> None:
    """Wait until so many polls are held, all of which have read what they wait for."""
    async with asyncio.timeout(PATIENCE_S):
        while [watch._future is None for watch in watches(server)] != [False] * count:
            await asyncio.sleep(0.001)


def watches(server: Server) -> Any:
    return server.house.events._watches.all()  # type: ignore[attr-defined]


def count_reads(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One item for each read of the database from now on."""
    reads: list[object] = []
    read = server.house.store.read

    async def counted(work: Any) -> Any:
        reads.append(work)
        return await read(work)

    monkeypatch.setattr(server.house.store, "read", counted)
    return reads


# --- until it stops --------------------------------------------------------------------------------------------


async def test_one_poll_of_a_helper_lasts_as_long_as_the_run(server: Server) -> None:
    """create_and_run_poll and submit_tool_outputs_and_poll ask once, and again after the calls."""
    asked: list[str] = []

    async def note(request: Any) -> None:
        asked.append(request.method)

    http_client = openai.DefaultAsyncHttpxClient(verify=False, event_hooks={"request": [note]})
    go, finish = asyncio.Event(), asyncio.Event()
    server.model.will([go, *calls(WEATHER_IN_OSLO)], [finish, *says("Rain.")])
    assistant = await server.assistant(tools=[GET_WEATHER])
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", http_client=http_client) as client:
        thread: Any = {"messages": [{"role": "user", "content": "Weather?"}]}
        task = asyncio.create_task(client.beta.threads.create_and_run_poll(assistant_id=assistant.id, thread=thread))
        await held(server, 1)
        go.set()
        run = await task
        assert run.status == "requires_action"
        runs = client.beta.threads.runs
        outputs = answers(run, {"get_weather": "rain"})
        task = asyncio.create_task(
            runs.submit_tool_outputs_and_poll(run_id=run.id, thread_id=run.thread_id, tool_outputs=outputs)
        )
        await held(server, 1)
        finish.set()
        assert (await task).status == "completed"
    assert asked == ["POST", "GET", "POST", "GET"]


async def test_a_held_poll_reads_nothing(server: Server, monkeypatch: pytest.MonkeyPatch, on_sqlite: None) -> None:
    """A poll reads its run once, when it comes; what it answers at the end is what was announced, byte for byte."""
    go = asyncio.Event()
    run = await start(server, [TextDelta("Once"), go, *says("done.")])
    await happened(server, run.id, "thread.message.delta")
    reads = count_reads(server, monkeypatch)
    async with waiting(server, get(server, path_of(run), wait=60)) as [poll]:
        at_start = len(reads)
        go.set()
        answer = await poll
        assert (len(reads), at_start) == (1, 1)
    assert answer.json()["status"] == "completed"
    assert answer.headers["openai-poll-after-ms"] == AGAIN
    assert answer.content == (await get(server, path_of(run))).content


async def test_without_being_asked_to_nothing_waits(server: Server) -> None:
    """A plain GET, `wait=0`, and `status` alone are answered at once, and say how long to wait."""
    run = await start(server, never())
    for query in ({}, {"wait": 0}, {"status": "in_progress"}):
        answer = await get(server, path_of(run), **query)
        assert answer.json()["status"] in ("queued", "in_progress")
        assert answer.headers["openai-poll-after-ms"] == "250"


async def test_the_time_is_over(start_server: ServerFactory, tmp_path: Path) -> None:
    """After its time, which `poll_hold_max_s` bounds, a poll is answered with the run as it is; the next may follow."""
    async with start_server(tmp_path, poll_hold_s=0.01, poll_hold_max_s=0.02) as server:
        run = await start(server, never())
        await happened(server, run.id, "thread.message.delta")
        helper = {"x-stainless-poll-helper": "true"}
        for headers, query in (({}, {"wait": 1e5}), ({}, {"wait": ""}), (helper, {}), ({"prefer": "wait=9"}, {})):
            answer = await get(server, path_of(run), headers, **query)  # type: ignore[arg-type]
            assert answer.json()["status"] == "in_progress"
            assert answer.headers["openai-poll-after-ms"] == AGAIN


async def test_prefer_wait(server: Server) -> None:
    """`Prefer: wait=N` among other preferences is honoured, and the answer says so; a broken one is no preference."""
    go = asyncio.Event()
    run = await start(server, [go, *says("Hi.")])
    prefer = {"prefer": 'respond-async, Wait="7"; x=1'}
    async with waiting(server, get(server, path_of(run), prefer)) as [poll]:
        go.set()
        assert (await poll).headers["preference-applied"] == "wait=7"
    answer = await get(server, path_of(run), {"prefer": "wait=soon"})
    assert "preference-applied" not in answer.headers


async def test_until_the_status_differs(server: Server, wire: Any) -> None:
    """With `status`, a poll is held while the run has it: also in requires_action, and through a cancel."""
    go = asyncio.Event()
    run = await start(server, [TextDelta("Once"), go, *calls(WEATHER_IN_OSLO)], never(), tools=[GET_WEATHER])
    await happened(server, run.id, "thread.message.delta")
    async with waiting(server, get(server, path_of(run), wait=60, status="in_progress")) as [poll]:
        go.set()
        assert (await poll).json()["status"] == "requires_action"
    run = await polled(server, run)
    async with waiting(server, get(server, path_of(run), wait=60, status="requires_action")) as [poll]:
        outputs = answers(run, {"get_weather": "rain"})
        await server.client.beta.threads.runs.submit_tool_outputs(run.id, thread_id=run.thread_id, tool_outputs=outputs)
        assert (await poll).json()["status"] in ("queued", "in_progress")
    await happened(server, run.id, "thread.message.delta", 2)
    async with waiting(server, get(server, path_of(run), wait=60, status="in_progress")) as [poll]:
        await server.client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)
        assert (await poll).json()["status"] in ("cancelling", "cancelled")
    assert (await polled(server, run)).status == "cancelled"
    assert (await get(server, path_of(run), wait=60, status="cancelled")).json()["status"] == "cancelled"


@pytest.mark.parametrize("wait", ["-1", "soon", "1e3", "1,5", "nan"])
async def test_a_wait_that_is_no_number(server: Server, wait: str) -> None:
    """Is a 400 that names it."""
    answer = await get(server, "/threads/thread_x/runs/run_x", wait=wait)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "wait")


async def test_a_status_that_there_is_not(server: Server) -> None:
    """Is a 400 that names it."""
    answer = await get(server, "/threads/thread_x/runs/run_x", wait=1, status="done")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "status")


# --- the clients' patience -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x-stainless-read-timeout", "x-stainless-timeout"])
async def test_a_hold_ends_before_the_clients_patience(server: Server, name: str) -> None:
    """A client that says how long it waits for answers gets one in half of that."""
    run = await start(server, never())
    answer = await get(server, path_of(run), {"x-stainless-poll-helper": "true", name: "0.04"})
    assert answer.json()["status"] in ("queued", "in_progress")
    assert (await get(server, path_of(run), {name: "0"}, wait=60)).headers["openai-poll-after-ms"] == "250"


async def test_a_patience_that_was_computed(server: Server) -> None:
    """A timeout may have all the digits of a float, as what is left of some time has; it is kept all the same."""
    run = await start(server, never())
    headers = {"x-stainless-poll-helper": "true", "x-stainless-read-timeout": str(0.1 + 0.2 - 0.26)}
    assert (await get(server, path_of(run), headers)).json()["status"] in ("queued", "in_progress")


async def test_a_patience_that_cannot_be_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is as none that was said: the poll is held for less than people set."""
    monkeypatch.setattr(holding, "UNTOLD_HOLD_S", 0.02)
    run = await start(server, never())
    headers = {"x-stainless-poll-helper": "true", "x-stainless-read-timeout": "soon"}
    assert (await get(server, path_of(run), headers)).headers["openai-poll-after-ms"] == AGAIN


async def test_a_body_without_end(start_server: ServerFactory, tmp_path: Path) -> None:
    """A GET that is held, and has a body larger than any may be, is refused as others are."""
    async with start_server(tmp_path, max_body_mb=1) as server:
        run = await start(server, never())
        host = server.url.removeprefix("http://")
        head = f"GET /v1{path_of(run)}?wait=60 HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer k\r\n"
        chunk = b"10001\r\n" + bytes(0x10001) + b"\r\n"
        reader, writer = await asyncio.open_connection(*host.split(":"))
        writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 16)
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        writer.close()


async def test_a_poll_that_was_cut_off_is_not_held_again(server: Server) -> None:
    """A retry of a poll is answered at once: something in between may have less patience than the client."""
    run = await start(server, never())
    headers = {"x-stainless-poll-helper": "true", "x-stainless-retry-count": "1"}
    assert (await get(server, path_of(run), headers)).headers["openai-poll-after-ms"] == "250"


async def test_who_leaves_waits_no_more(server: Server) -> None:
    """Nothing is left of a poll whose client has gone."""
    run = await start(server, never())
    task = asyncio.create_task(get(server, path_of(run), wait=60))
    await held(server, 1)
    task.cancel()
    await held(server, 0)


# --- other ends ------------------------------------------------------------------------------------------------


async def test_the_thread_is_deleted(server: Server) -> None:
    """Who waits for a run whose thread is deleted is told at once that there is no such thread."""
    run = await start(server, never())
    async with waiting(server, get(server, path_of(run), wait=60)) as [poll]:
        await server.client.beta.threads.delete(run.thread_id)
        answer = await poll
    assert answer.status_code == 404
    assert run.thread_id in answer.json()["error"]["message"]


async def test_a_run_expires(start_server: ServerFactory, tmp_path: Path) -> None:
    """Who waits for a run that expires in the queue is told so."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, max_running_runs=1) as server:
        await start(server, never())
        run = await start(server)
        async with waiting(server, get(server, path_of(run), wait=60)) as [poll]:
            clock.time += 600
            await expire_overdue(server.house, 10)
            assert (await poll).json()["status"] == "expired"


async def test_a_server_that_drains(server: Server) -> None:
    """A server that lets its work end answers held polls at once, and then holds each no longer than a client would
    pause."""
    go = asyncio.Event()
    run = await start(server, [TextDelta("Once"), go, *says("done.")])
    await happened(server, run.id, "thread.message.delta")
    async with waiting(server, get(server, path_of(run), wait=60)) as [poll]:
        draining = asyncio.create_task(server.application.drain())
        assert (await poll).json()["status"] == "in_progress"
    async with waiting(server, get(server, path_of(run), wait=60)) as [poll]:
        go.set()
        answer = await poll
        assert (answer.json()["status"], answer.headers["openai-poll-after-ms"]) == ("completed", "250")
    await draining


async def test_a_server_that_stops(start_server: ServerFactory, tmp_path: Path) -> None:
    """A server that stops answers whoever waits."""
    async with start_server(tmp_path) as server:
        run = await start(server, never())
        poll = asyncio.create_task(get(server, path_of(run), wait=60))
        await held(server, 1)
    assert (await poll).json()["status"] in ("queued", "in_progress")


# --- files and batches -----------------------------------------------------------------------------------------


async def test_files_and_batches(server: Server) -> None:
    """Polls of files and batches are held until they are in progress no more; a batch until its last file."""
    go, file_ids = asyncio.Event(), [await upload(server), await upload(server, b"", "empty.txt")]
    server.parser.holds = {"cats.txt": go}
    stores = server.client.vector_stores
    store = await stores.create()
    batch = await stores.file_batches.create(store.id, file_ids=file_ids)
    async with waiting(
        server,
        stores.files.poll(file_ids[0], vector_store_id=store.id),
        stores.file_batches.poll(batch.id, vector_store_id=store.id),
        get(server, f"/vector_stores/{store.id}/files/{file_ids[0]}", wait=60),
        get(server, f"/vector_stores/{store.id}/file_batches/{batch.id}", wait=60),
    ) as polls:
        failed = await stores.files.poll(file_ids[1], vector_store_id=store.id)
        assert failed.status == "failed"
        go.set()
        file, polled_batch, file_answer, batch_answer = await asyncio.gather(*polls)
    assert file.status == "completed"
    assert (polled_batch.file_counts.completed, polled_batch.file_counts.failed) == (1, 1)
    assert file_answer.headers["openai-poll-after-ms"] == batch_answer.headers["openai-poll-after-ms"] == AGAIN
    assert (file_answer.json()["status"], batch_answer.json()["status"]) == ("completed", "completed")


async def test_files_and_batches_that_are_given_up(server: Server) -> None:
    """Who waits for a batch that is cancelled, for a file that is detached, or in a store that is deleted, is told."""
    server.parser.holds = {"cats.txt": asyncio.Event()}
    stores = server.client.vector_stores
    store, file_id = await stores.create(), await upload(server)
    batch = await stores.file_batches.create(store.id, file_ids=[file_id])
    file_path, batch_path = (
        f"/vector_stores/{store.id}/{key}" for key in (f"files/{file_id}", f"file_batches/{batch.id}")
    )
    async with waiting(server, get(server, file_path, wait=60), get(server, batch_path, wait=60)) as polls:
        await stores.file_batches.cancel(batch.id, vector_store_id=store.id)
        assert [answer.json()["status"] for answer in await asyncio.gather(*polls)] == ["cancelled", "cancelled"]
    await stores.files.create(store.id, file_id=file_id)
    async with waiting(server, get(server, file_path, wait=60)) as [poll]:
        await stores.files.delete(file_id, vector_store_id=store.id)
        assert (await poll).status_code == 404
    await stores.files.create(store.id, file_id=file_id)
    async with waiting(server, get(server, file_path, wait=60)) as [poll]:
        await stores.delete(store.id)
        assert (await poll).status_code == 404


# --- from memory -----------------------------------------------------------------------------------------------


async def test_a_loop_by_hand_is_answered_from_memory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """GETs of a run that does not change read it once; after whatever changes it they see the change."""
    if server.house.run_memory is None:
        pytest.skip("there is no memory where others may change a run, or where what writes is run twice")
    run = await start(server, never())
    await happened(server, run.id, "thread.message.delta")
    reads = count_reads(server, monkeypatch)
    for number in range(3):
        for _ in range(3):
            assert (await get(server, path_of(run))).json()["status"] == "in_progress"
        assert len(reads) == number + 1
        changed = await server.client.beta.threads.runs.update(
            run.id, thread_id=run.thread_id, metadata={"number": str(number)}
        )
        assert (await get(server, path_of(run))).json()["metadata"] == changed.metadata
    other = await get(server, f"/threads/thread_other/runs/{run.id}")
    assert other.status_code == 404
    await server.client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)
    assert (await get(server, path_of(run))).json()["status"] in ("cancelling", "cancelled")
    await polled(server, run)
    await server.client.beta.threads.delete(run.thread_id)
    assert (await get(server, path_of(run))).status_code == 404


async def test_memory_forgets_what_is_deleted(server: Server) -> None:
    """A run that is asked for again and again is gone with its thread."""
    run = await start(server, never())
    await happened(server, run.id, "thread.message.delta")
    assert (await get(server, path_of(run))).status_code == 200
    await server.client.beta.threads.delete(run.thread_id)
    assert (await get(server, path_of(run))).status_code == 404


async def test_memory_knows_what_expires(start_server: ServerFactory, tmp_path: Path) -> None:
    """A run that waits in memory past its deadline is answered as expired."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        run = await start(server, calls(WEATHER_IN_OSLO), tools=[GET_WEATHER])
        assert (await polled(server, run)).status == "requires_action"
        assert (await get(server, path_of(run))).json()["status"] == "requires_action"
        clock.time += 600
        assert (await get(server, path_of(run))).json()["status"] == "expired"
