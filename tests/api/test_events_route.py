"""GET …/events: any run's log, joined late and resumed, and always the bytes of the live stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai.types.beta.threads import Run

from afterglow.contracts import Logs, TextDelta
from afterglow.rows.events import delete_events_before
from afterglow.testing import Saying, calls, says
from tests.api.streams import HEADERS, PATIENCE_S, answers, happened, polled, read_events, split, stored, stream
from tests.conftest import GET_WEATHER, Server, ServerFactory

DONE = b"event: done\ndata: [DONE]\n\n"
PING = b": ping\n"
WEATHER_IN_OSLO = ("get_weather", {"city": "Oslo"})
HELLO: Any = {"messages": [{"role": "user", "content": "Hello"}]}


async def start(server: Server, *script: Saying, **fields: Any) -> Run:
    """A run on a new thread that nobody streams."""
    server.model.will(*script)
    assistant_id = (await server.assistant()).id
    return await server.client.beta.threads.create_and_run(assistant_id=assistant_id, thread=HELLO, **fields)


async def start_stream(server: Server, **fields: Any) -> bytes:
    """All that a run that is streamed from its creation says."""
    thread = await server.client.beta.threads.create(**HELLO)
    body = {"assistant_id": (await server.assistant()).id, **fields}
    return await stream(server, f"/threads/{thread.id}/runs", body)


def path_of(run: Run) -> str:
    return f"/threads/{run.thread_id}/runs/{run.id}/events"


def run_in(raw: bytes) -> Run:
    """The run as the last event before `done` tells of it."""
    return Run.model_validate(read_events(raw)[-2].data)


@asynccontextmanager
async def following(
    server: Server, run: Run, headers: dict[str, str] | None = None, **query: Any
) -> AsyncGenerator[httpx2.Response, None]:
    async with (
        httpx2.AsyncClient(headers=HEADERS, timeout=PATIENCE_S, verify=False) as client,
        client.stream("GET", f"{server.url}/v1{path_of(run)}", params=query, headers=headers) as response,
    ):
        yield response


async def follow(server: Server, run: Run, headers: dict[str, str] | None = None, **query: Any) -> bytes:
    """All the bytes of a stream that ends."""
    async with following(server, run, headers, **query) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return await response.aread()


async def followed(server: Server) -> None:
    """Wait until a stream is open."""
    async with asyncio.timeout(PATIENCE_S):
        while not server.house.metrics.open_streams._value.get():
            await asyncio.sleep(0.001)


async def refused(server: Server, run: Run, headers: dict[str, str] | None = None, **query: Any) -> tuple[int, Any]:
    """Status and error of an answer that is no stream."""
    async with following(server, run, headers, **query) as response:
        await response.aread()
        return response.status_code, response.json()["error"] if response.content else None


# --- the same bytes --------------------------------------------------------------------------------------------


async def test_a_text_run(server: Server) -> None:
    """The replay of a finished run is its live stream, byte for byte, and ends at once."""
    server.model.will(says("Once upon a time."))
    raw = await start_stream(server)
    assert await follow(server, run_in(raw)) == raw
    assert await follow(server, run_in(raw), until="stop") == raw


async def test_function_calls(server: Server) -> None:
    """What two POSTs streamed is one log; `until=stop` ends it where each of them ended."""
    server.model.will(calls(WEATHER_IN_OSLO, WEATHER_IN_OSLO), says("Rain."))
    first = await start_stream(server, tools=[GET_WEATHER])
    run = run_in(first)
    path = path_of(run).replace("events", "submit_tool_outputs")
    second = await stream(server, path, {"tool_outputs": answers(run, {"get_weather": "rain"})})
    assert await follow(server, run) == first.removesuffix(DONE) + second
    assert await follow(server, run, until="stop") == first
    assert await follow(server, run, after=read_events(first)[-2].id, until="stop") == second


async def test_the_code_interpreter(server: Server) -> None:
    """Its code and outputs are in the log as they were streamed."""
    server.model.will(calls(("python", {"code": "print(42)"})), says("42."))
    server.code.will([Logs("4"), Logs("2\n")])
    raw = await start_stream(server, tools=[{"type": "code_interpreter"}])
    assert b"logs" in raw
    assert await follow(server, run_in(raw)) == raw


async def test_a_run_that_nobody_streamed_is_joined_while_it_runs(server: Server) -> None:
    """A follower that comes in the middle gets the beginning, then what comes, through requires_action to the end."""
    go = asyncio.Event()
    run = await start(server, calls(WEATHER_IN_OSLO), [TextDelta("Once"), go, *says("more.")], tools=[GET_WEATHER])
    run = await polled(server, run)
    task = asyncio.create_task(follow(server, run))
    outputs = answers(run, {"get_weather": "rain"})
    await server.client.beta.threads.runs.submit_tool_outputs(run.id, thread_id=run.thread_id, tool_outputs=outputs)
    await happened(server, run.id, "thread.message.delta")
    late = asyncio.create_task(follow(server, run))
    go.set()
    raw = await task
    assert raw == await late == await stored(server, run.id) + DONE
    assert [event.name for event in read_events(raw)].count("thread.run.requires_action") == 1


async def test_a_resume_at_every_event(server: Server) -> None:
    """Behind whichever event a follower breaks off, it gets the rest, by `Last-Event-ID` or by `after`."""
    server.model.will(says("Once upon a time."))
    raw = await start_stream(server)
    blocks, events = split(raw), read_events(raw)
    for number, event in enumerate(events[:-2], 1):
        rest = b"".join(blocks[number:])
        assert await follow(server, run_in(raw), after=event.id) == rest
        assert await follow(server, run_in(raw), {"last-event-id": str(event.id)}, after="0.0") == rest


async def test_several_attempts(start_server: ServerFactory, tmp_path: Path) -> None:
    """A follower of a run whose server stopped goes on where it was, with the next attempt's events."""
    before, mark = b"", b"event: thread.message.delta\n"
    async with start_server(tmp_path) as server:
        run = await start(server, [TextDelta("Once"), asyncio.Event()])
        async with following(server, run) as response:
            async for piece in response.aiter_raw():
                before += piece
                if mark in before:
                    break
    async with start_server(tmp_path) as server:
        server.model.will(says("Twice."))
        assert (await polled(server, run)).status == "completed"
        whole = await stored(server, run.id) + DONE
        assert b"\nid: 2." in whole
        last = read_events(before)[-1].id
        assert before + await follow(server, run, {"last-event-id": str(last)}) == whole
        assert await follow(server, run) == whole


async def test_a_server_that_stops(start_server: ServerFactory, tmp_path: Path) -> None:
    """Its followers get an `error` without an id, and no `done`: they come back to where they were."""
    async with start_server(tmp_path) as server:
        run = await start(server, [TextDelta("Once"), asyncio.Event()])
        await happened(server, run.id, "thread.message.delta")
        task = asyncio.create_task(follow(server, run))
        await followed(server)
    assert split(await task)[-1].startswith(b"event: error\n")


async def test_pings_fill_silence(start_server: ServerFactory, tmp_path: Path) -> None:
    """While the run says nothing, the stream carries `: ping` with a single newline."""
    async with start_server(tmp_path, keep_alive_s=0.01) as server:
        go = asyncio.Event()
        run = await start(server, [go, *says("Hi.")])
        raw = b""
        async with following(server, run) as response:
            async for piece in response.aiter_raw():
                raw += piece
                if raw.endswith(PING + PING):
                    go.set()
        assert PING + b"\n" not in raw
        assert raw.replace(PING, b"") == await stored(server, run.id) + DONE


# --- the end ---------------------------------------------------------------------------------------------------


async def test_after_the_end_there_is_nothing(server: Server) -> None:
    """A resume behind the last event is a 204, by which a browser's EventSource stops coming back."""
    server.model.will(says("Hi."))
    raw = await start_stream(server)
    last = read_events(raw)[-2].id
    for place in (last, "9.1"):
        assert await refused(server, run_in(raw), {"last-event-id": str(place)}) == (204, None)


async def test_a_place_beyond_the_end(server: Server) -> None:
    """Who names a place that the run never reaches hears nothing of it, but that it is over."""
    go = asyncio.Event()
    run = await start(server, [TextDelta("Once"), go, *says("more.")])
    task = asyncio.create_task(follow(server, run, after="9.9"))
    await followed(server)
    go.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await task == DONE


async def test_after_a_stop_there_is_nothing_yet(server: Server) -> None:
    """With `until=stop`, a resume behind the stop that the run rests in is a 204 as well; without it, it waits."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    raw = await start_stream(server, tools=[GET_WEATHER])
    run, last = run_in(raw), str(read_events(raw)[-2].id)
    assert await refused(server, run, {"last-event-id": last}, until="stop") == (204, None)
    async with following(server, run, {"last-event-id": last}) as response:
        assert response.status_code == 200
        await server.client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)
        assert [event.name for event in read_events(await response.aread())][-2:] == ["thread.run.cancelled", "done"]


async def test_what_is_no_longer_kept(server: Server) -> None:
    """Once the log is gone the answer is a 410 that says so, not a stream with a hole."""
    server.model.will(says("Hi."))
    raw = await start_stream(server)
    await server.house.store.write(lambda tx: delete_events_before(tx, "default", 2**40, 1000))
    status, error = await refused(server, run_in(raw))
    assert status == 410
    assert "no longer kept" in error["message"]


async def test_a_log_without_its_beginning(server: Server) -> None:
    """Whoever has the beginning can go on; who asks for it is told that it is gone."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    raw = await start_stream(server, tools=[GET_WEATHER])
    run = run_in(raw)
    await server.submit(run, {"get_weather": "rain"})
    whole = await stored(server, run.id)
    await server.house.store.write(
        lambda tx: tx.execute("DELETE FROM events WHERE run_id = $1 AND attempt < 2", run.id)
    )
    last = str(read_events(raw)[-2].id)
    assert (await refused(server, run))[0] == 410
    assert (await refused(server, run, after=last))[0] == 410
    rest = await follow(server, run, after="2.1")
    assert whole.endswith(rest.removesuffix(DONE))
    assert read_events(rest)[0].id == "2.2"


async def test_deleted_text_stays_gone(server: Server) -> None:
    """A message that was deleted is in no replay."""
    server.model.will(says("A secret."))
    raw = await start_stream(server)
    run = run_in(raw)
    [message] = (await server.client.beta.threads.messages.list(run.thread_id, run_id=run.id)).data
    await server.client.beta.threads.messages.delete(message.id, thread_id=run.thread_id)
    status, error = await refused(server, run)
    assert status == 410
    assert "secret" not in str(error)


async def test_text_that_was_deleted_while_the_run_went_on(server: Server) -> None:
    """What a run has said since is not taken for all of it: whoever asks from the start is told that it is gone, and
    whoever was behind the deleted message goes on."""
    server.model.will([TextDelta("A secret."), *calls(WEATHER_IN_OSLO)], says("Rain."))
    first = await start_stream(server, tools=[GET_WEATHER])
    run = run_in(first)
    [message] = (await server.client.beta.threads.messages.list(run.thread_id, run_id=run.id)).data
    await server.client.beta.threads.messages.delete(message.id, thread_id=run.thread_id)
    path = path_of(run).replace("events", "submit_tool_outputs")
    second = await stream(server, path, {"tool_outputs": answers(run, {"get_weather": "rain"})})
    assert (await refused(server, run))[0] == 410
    assert await follow(server, run, after=read_events(first)[-2].id) == second


async def test_a_run_whose_thread_is_deleted(server: Server) -> None:
    """Its followers are told, and whoever comes later finds no thread."""
    run = await start(server, [TextDelta("Once"), asyncio.Event()])
    task = asyncio.create_task(follow(server, run))
    await happened(server, run.id, "thread.message.delta")
    await followed(server)
    await server.client.beta.threads.delete(run.thread_id)
    assert [event.name for event in read_events(await task)][-2:] == ["error", "done"]
    assert (await refused(server, run))[0] == 404


# --- bad requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["1", "1.", "a.b", "1.2.3", "-1.2", "1.99999999999", " 1.2"])
async def test_a_place_that_is_none(server: Server, place: str) -> None:
    """Is a 400 that names what held it."""
    run = Run.model_construct(id="run_x", thread_id="thread_x")
    status, error = await refused(server, run, after=place)
    assert (status, error["param"]) == (400, "after")
    if place.strip() == place:
        status, error = await refused(server, run, {"last-event-id": place})
        assert (status, error["param"]) == (400, "Last-Event-ID")


async def test_an_end_that_is_none(server: Server) -> None:
    """`until` takes `stop` and `end`."""
    status, error = await refused(server, Run.model_construct(id="run_x", thread_id="thread_x"), until="now")
    assert (status, error["param"]) == (400, "until")


async def test_a_run_that_there_is_not(server: Server) -> None:
    """Is a 404, as everywhere."""
    run = Run.model_construct(id="run_x", thread_id="thread_x")
    assert (await refused(server, run))[0] == 404
