"""What clients ask the server and the model stub for: one call, or many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import msgspec

from bench.client import CHUNK, DELTA, Answer, BenchFailure, Connection, expect, percentile, together
from bench.stub import model_name, text_of

T = TypeVar("T")

STARTS_PER_S = 200  # the rate of runs that is owed; a burst of 500 in one second is reported beside it
STREAM_RATE = 20.0
STREAM_LIMIT_S = 30.0


class Made(msgspec.Struct):
    """Any object of the API that has just been created."""

    id: str


async def make(client: Connection, path: str, body: object) -> str:
    answer = expect(await client.ask("POST", path, body))
    return msgspec.json.decode(answer.body, type=Made).id


async def make_assistant(client: Connection, tokens: int, rate: float = 0) -> str:
    body = {"model": model_name(tokens, rate), "instructions": "Answer briefly."}
    return await make(client, "/v1/assistants", body)


def message() -> dict[str, str]:
    return {"role": "user", "content": "What is the weather in Oslo, and what should I wear on a walk tonight?"}


async def make_thread(client: Connection, messages: int = 1) -> str:
    return await make(client, "/v1/threads", {"messages": [message()] * messages})


async def stream_run(client: Connection, thread: str, assistant: str, tokens: int, **options: object) -> Answer:
    """Stream a run to `done`; marks are its text deltas. Fails unless the whole text came and the run completed."""
    body = {"assistant_id": assistant, "stream": True, **options}
    answer = await client.ask("POST", f"/v1/threads/{thread}/runs", body, mark=DELTA)
    text = msgspec.json.encode(text_of(tokens))
    return expect(answer, DELTA, text, b"event: thread.run.completed", b"event: done")


async def thread_and_run(client: Connection, assistant: str, tokens: int) -> Answer:
    return await stream_run(client, await make_thread(client), assistant, tokens)


async def ask_stub(stub: Connection, tokens: int, rate: float = 0) -> Answer:
    """The same answer from the stub itself; marks are its chunks with text."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": model_name(tokens, rate), "messages": [message()], **options}
    return expect(await stub.ask("POST", "/v1/chat/completions", body, mark=CHUNK), CHUNK, b"[DONE]")


async def in_batches(calls: Sequence[Callable[[], Awaitable[T]]], size: int = 32) -> list[T]:
    async def one(call: Callable[[], Awaitable[T]]) -> T:
        return await call()

    done: list[T] = []
    for start in range(0, len(calls), size):
        done += await together(one(call) for call in calls[start : start + size])
    return done


def connect(port: int, count: int) -> list[Connection]:
    return [Connection(port) for _ in range(count)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(values, percent) for percent in (5, 50, 95, 99)} | {"count": len(values)}


class Swarm(msgspec.Struct):
    """What became of many streams at once. late_ms: by how much the gap between two texts exceeded the stub's."""

    completed: int
    first_ms: list[float]
    late_ms: list[float]
    failures: list[str]


async def swarm_of(starts: Sequence[Callable[[], Awaitable[Answer]]], per_s: float = STARTS_PER_S) -> Swarm:
    """Start all streams, evenly at `per_s` a second, and wait for each until STREAM_LIMIT_S after its start."""
    swarm = Swarm(0, [], [], [])

    async def one(number: int, start: Callable[[], Awaitable[Answer]]) -> None:
        await asyncio.sleep(number / per_s)
        try:
            async with asyncio.timeout(STREAM_LIMIT_S):
                answer = await start()
        except (BenchFailure, OSError, TimeoutError) as failure:
            swarm.failures.append(f"{type(failure).__name__}: {failure}")
            return
        swarm.completed += 1
        swarm.first_ms.append(answer.first_ms)
        swarm.late_ms += [(after - before - 1 / STREAM_RATE) * 1000 for before, after in pairwise(answer.marks)]

    await together(one(number, start) for number, start in enumerate(starts))
    return swarm
