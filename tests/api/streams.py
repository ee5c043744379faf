"""Reading a run's event stream as bytes, and waiting for what happens in a run without sleeping."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple

import httpx2
from openai.types.beta.threads import Run

from afterglow.contracts import START, Segment, Transaction
from afterglow.rows.events import list_segments

PROJECT = "default"
PATIENCE_S = 10
HEADERS = {"authorization": "Bearer test-key", "openai-beta": "assistants=v2"}


class Sent(NamedTuple):
    """One event as it came: `id` is None when it had none, `data` is decoded JSON, or the text `[DONE]`."""

    name: str
    data: Any
    id: str | None


def split(raw: bytes) -> list[bytes]:
    """The blocks of a stream, each with the blank line that ends it."""
    blocks = raw.split(b"\n\n")
    assert blocks.pop() == b"", "the stream breaks off in the middle of an event"
    return [block + b"\n\n" for block in blocks]


def read_events(raw: bytes) -> list[Sent]:
    """The events of a stream. Fails unless each is `event:`, `data:` on one line, then perhaps `id:`."""
    events = []
    for block in split(raw):
        lines = block.decode().rstrip("\n").split("\n")
        keys = [line.partition(": ")[0] for line in lines]
        values = [line.partition(": ")[2] for line in lines]
        assert keys in (["event", "data"], ["event", "data", "id"]), block
        data = values[1] if values[1] == "[DONE]" else json.loads(values[1])
        events.append(Sent(values[0], data, values[2] if len(values) == 3 else None))
    return events


def names(events: list[Sent]) -> list[str]:
    """The events' names, without `thread.` and with deltas in a row written once."""
    short = [event.name.removeprefix("thread.") for event in events]
    return [name for before, name in zip(["", *short], short, strict=False) if not (name == before and "delta" in name)]


@asynccontextmanager
async def streaming(server: Any, path: str, body: Any) -> AsyncGenerator[httpx2.Response, None]:
    """POST with `stream`, and the open answer."""
    async with (
        httpx2.AsyncClient(headers=HEADERS, timeout=PATIENCE_S, verify=False) as client,
        client.stream("POST", f"{server.url}/v1{path}", json={**body, "stream": True}) as response,
    ):
        yield response


async def stream(server: Any, path: str, body: Any) -> bytes:
    """POST with `stream`, and all the bytes of the answer."""
    async with streaming(server, path, body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return await response.aread()


async def stored(server: Any, run_id: str) -> bytes:
    """All that is stored of a run's events."""

    async def work(tx: Transaction) -> list[Segment]:
        return await list_segments(tx, PROJECT, run_id, START)

    return b"".join([segment.data for segment in await server.house.store.read(work)])


async def idle(server: Any) -> None:
    """Wait until no run and no file is in hand: a caller can read of its end before the log and the metrics have it."""
    async with asyncio.timeout(PATIENCE_S):
        while server.application.worker.running or server.application.pipeline._tasks:
            await asyncio.sleep(0.001)


async def happened(server: Any, run_id: str, name: str, times: int = 1) -> None:
    """Wait until an event of this name was announced, `times` times since the run began."""
    mark = f"event: {name}\n".encode()
    async with asyncio.timeout(PATIENCE_S), aclosing(server.house.events.follow(PROJECT, run_id, START)) as batches:
        async for batch in batches:
            times -= sum(segment.data.count(mark) for segment in batch)
            if times <= 0:
                return


async def submit(server: Any, run: Run, outputs: dict[str, str]) -> Run:
    """Answer the waiting calls by function name, and poll until the run stops again."""
    run = await server.client.beta.threads.runs.submit_tool_outputs(
        run_id=run.id, thread_id=run.thread_id, tool_outputs=answers(run, outputs)
    )
    return await polled(server, run)


def answers(run: Run, outputs: dict[str, str]) -> Any:
    """The `tool_outputs` for what a run waits for, by function name."""
    assert run.required_action is not None
    calls = run.required_action.submit_tool_outputs.tool_calls
    return [{"tool_call_id": call.id, "output": outputs[call.function.name]} for call in calls]


async def polled(server: Any, run: Run) -> Run:
    """Wait until the run stops; not forever."""
    async with asyncio.timeout(PATIENCE_S):
        stopped: Run = await server.poll(run)
    return stopped
