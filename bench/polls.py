"""What is measured of waiting: the official client's helper, ten thousand held polls, and loops by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import msgspec
import openai

from bench.calls import connect, make, make_assistant, make_thread
from bench.client import Answer, BenchFailure, Connection, expect, loop_for
from bench.processes import Memory, Server, cpu_s, memory_of

ENDED = b"event: thread.run.completed"
CANCELLED = b"event: thread.run.cancelled"
CONNECTED_TOGETHER = 100


class _Run(msgspec.Struct):
    """A run as lists and answers show it."""

    id: str
    status: str


class _Runs(msgspec.Struct):
    data: list[_Run]


class Helped(msgspec.Struct):
    """What `create_and_poll` did. requests: GETs of each run. lag_ms: from when a follower of the run's events had its
    end, to when the helper returned."""

    requests: list[float]
    lag_ms: list[float]


class _Asked:
    """How many GETs the client has sent."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, request: Any) -> None:
        self.count += request.method == "GET"


async def helped(port: int, runs: int, tokens: int, rate: float) -> Helped:
    """Run after run, each polled by the unmodified helper of the official client."""
    asked, found = _Asked(), Helped([], [])
    http_client = openai.DefaultHttpxClient(event_hooks={"request": [asked.note]})
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="bench", http_client=http_client)
    maker, follower = connect(port, 2)
    assistant = await make_assistant(maker, tokens, rate)
    for number in range(1 + runs):
        thread = await make_thread(maker)
        asked.count = 0
        polling = asyncio.ensure_future(asyncio.to_thread(_poll, client, thread, assistant))
        path = f"/v1/threads/{thread}/runs"
        events = expect(await follower.ask("GET", f"{path}/{await _newest(maker, path)}/events", mark=ENDED), ENDED)
        returned = await polling
        if number:  # the first has loaded the client's code
            found.requests.append(asked.count)
            found.lag_ms.append((returned - events.marks[0]) * 1000)
    client.close()
    return found


def _poll(client: openai.OpenAI, thread: str, assistant: str) -> float:
    run = client.beta.threads.runs.create_and_poll(thread_id=thread, assistant_id=assistant)
    if run.status != "completed":
        raise BenchFailure(f"the run ended as {run.status}")
    return perf_counter()


async def _newest(client: Connection, path: str) -> str:
    """The id of the thread's run, as soon as there is one."""
    while True:
        runs = msgspec.json.decode(expect(await client.ask("GET", path)).body, type=_Runs).data
        if runs:
            return runs[0].id
        await asyncio.sleep(0.001)


class Held(msgspec.Struct):
    """What so many polls of one run cost. wake_ms: from when a follower of another, short run had its end, to when the
    one poll of that run had; all_ms: from the end of their own run, to when each of the many had."""

    before: Memory
    held: Memory
    wake_ms: list[float]
    all_ms: list[float]


async def held(server: Server, count: int, runs: int) -> Held:
    """Hold `count` polls of a run that does not end, while `runs` short runs end; then cancel it."""
    maker, follower, poller = connect(server.port, 3)
    slow, quick = await make_assistant(maker, 600, 0.2), await make_assistant(maker, 3, 20)
    thread = await make_thread(maker)
    path = f"/v1/threads/{thread}/runs"
    path = f"{path}/{await make(maker, path, {'assistant_id': slow})}"
    await asyncio.sleep(1)
    before = memory_of(server.pid)
    clients = connect(server.port, count)
    polls = await _hold(clients, path)
    await asyncio.sleep(2)
    while_held = memory_of(server.pid)
    wake_ms = []
    for _ in range(runs):
        ended, answer = await _one_end(maker, follower, poller, quick)
        wake_ms.append((answer.ended - ended) * 1000)
    events = asyncio.ensure_future(follower.ask("GET", f"{path}/events", mark=CANCELLED))
    expect(await maker.ask("POST", f"{path}/cancel"))
    answers = [expect(answer) for answer in await asyncio.gather(*polls)]
    [ended] = (await events).marks
    for client in clients:
        client.close()
    return Held(before, while_held, wake_ms, [(answer.ended - ended) * 1000 for answer in answers])


async def _hold(clients: Sequence[Connection], path: str) -> list[asyncio.Task[Answer]]:
    polls = []
    for number, client in enumerate(clients, 1):
        polls.append(asyncio.create_task(client.ask("GET", f"{path}?wait=100")))
        if number % CONNECTED_TOGETHER == 0:
            await asyncio.sleep(0.02)
    return polls


async def _one_end(maker: Connection, follower: Connection, poller: Connection, assistant: str) -> tuple[float, Answer]:
    """When a follower had the end of a run, and the answer of its held poll."""
    path = f"/v1/threads/{await make_thread(maker)}/runs"
    path = f"{path}/{await make(maker, path, {'assistant_id': assistant})}"
    events, poll = await asyncio.gather(
        follower.ask("GET", f"{path}/events", mark=ENDED), poller.ask("GET", f"{path}?wait=60")
    )
    expect(poll, b'"status":"completed"')
    return events.marks[0], poll


class ByHand(msgspec.Struct):
    """What polls without a pause did. cpu_ms: of the server, for each poll."""

    per_s: float
    cpu_ms: float


async def by_hand(server: Server, clients: int, seconds: float) -> tuple[ByHand, ByHand]:
    """Loops that GET a run without a pause: of one that goes on, and of one that is over, which is read each time."""
    askers = connect(server.port, clients)
    slow, quick = await make_assistant(askers[0], 600, 0.2), await make_assistant(askers[0], 1)
    paces = []
    for assistant in (slow, quick):
        path = f"/v1/threads/{await make_thread(askers[0])}/runs"
        path = f"{path}/{await make(askers[0], path, {'assistant_id': assistant})}"
        expect(await askers[0].ask("GET", f"{path}?wait=1"))

        asked = 0

        async def ask(client: Connection, path: str = path) -> None:
            nonlocal asked
            expect(await client.ask("GET", path))
            asked += 1

        before_s = cpu_s(server.pid)
        pace = await loop_for(seconds, askers, ask)
        paces.append(ByHand(pace.per_s, (cpu_s(server.pid) - before_s) * 1000 / asked))
    return paces[0], paces[1]
