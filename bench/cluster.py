"""Several processes on one Postgres: the database they share, and what is measured of them together."""

from __future__ import annotations

import asyncio
import os
import random
import re
import secrets
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from time import perf_counter, time
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import msgspec

from bench.calls import (
    STREAM_RATE,
    Swarm,
    ask_stub,
    connect,
    in_batches,
    make,
    make_assistant,
    make_thread,
    message,
    stream_run,
    swarm_of,
    thread_and_run,
)
from bench.client import CHUNK, DELTA, Answer, BenchFailure, Connection, Pace, expect, loop_for, together
from bench.processes import Part, Server, afterglow, cpu_s, has_proc, memory_of, whole_pss_kb
from bench.stub import model_name

STAMP = re.compile(rb"@(\d+\.\d{6})")
STREAM_TOKENS = 160
WAIT_S = 30.0


# --- the database ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def fresh_database(url: str) -> AsyncIterator[str]:
    """The URL of a new database there, which is gone afterwards. Raises BenchFailure for what Postgres says."""
    name = f"afterglow_bench_{secrets.token_hex(4)}"
    try:
        await _execute(url, f"CREATE DATABASE {name}")
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            await _execute(url, f"DROP DATABASE {name} WITH (FORCE)")
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise BenchFailure(f"Postgres: {error}") from error


@asynccontextmanager
async def _session(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    session = await asyncpg.connect(url, timeout=5)
    try:
        yield session
    finally:
        await session.close(timeout=5)


async def _execute(url: str, statement: str) -> None:
    async with _session(url) as session:
        await session.execute(statement)


class Load(msgspec.Struct):
    """What a database has borne so far. transactions: those that only read, too. rows: written. wal_bytes: of the whole
    server. statements: None where pg_stat_statements is not loaded."""

    runs: int
    transactions: int
    rows: int
    wal_bytes: int
    statements: int | None

    def since(self, before: Load) -> dict[str, float]:
        """How much it was for each run since then."""
        runs = self.runs - before.runs
        per_run = {
            "transactions": (self.transactions - before.transactions) / runs,
            "rows": (self.rows - before.rows) / runs,
            "wal_bytes": (self.wal_bytes - before.wal_bytes) / runs,
        }
        if self.statements is not None and before.statements is not None:
            per_run["statements"] = (self.statements - before.statements) / runs
        return per_run


async def load_so_far(url: str) -> Load:
    """Read it while no process of ours is connected: one that is keeps counts to itself for some seconds."""
    async with _session(url) as session:
        runs = 0
        if await session.fetchval("SELECT to_regclass('runs') IS NOT NULL"):
            runs = await session.fetchval("SELECT count(*) FROM runs")
        counts = await session.fetchrow(
            "SELECT xact_commit + xact_rollback, tup_inserted + tup_updated + tup_deleted,"
            " pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"
            " FROM pg_stat_database WHERE datname = current_database()"
        )
        assert counts
        statements = None
        if "pg_stat_statements" in await session.fetchval("SHOW shared_preload_libraries"):
            await session.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
            statements = await session.fetchval(
                "SELECT COALESCE(sum(calls), 0)::bigint FROM pg_stat_statements"
                " JOIN pg_database ON oid = dbid WHERE datname = current_database()"
            )
        transactions, rows, wal_bytes = counts
        return Load(runs, transactions, rows, wal_bytes, statements)


# --- the processes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where processes are started. url: of the database they share. settings: what differs from the defaults."""

    program: Path
    data: Path
    stub_port: int
    url: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def processes(self, *parts: Part) -> AsyncIterator[list[Server]]:
        """One process for each part, in that order; the first brings the schema up to date."""
        settings = {"AFTERGLOW_DATABASE_URL": self.url, **self.settings}
        async with AsyncExitStack() as stack:
            yield [
                await stack.enter_async_context(
                    afterglow(self.program, self.data, self.stub_port, part=part, settings=settings)
                )
                for part in parts
            ]


class Kept(msgspec.Struct):
    """Memory of one process, in KB. pss: with its children, what is shared divided."""

    part: str
    rss_kb: int
    pss_kb: int


def memory(parts: Sequence[Part], servers: Sequence[Server]) -> list[Kept]:
    if not has_proc():
        return []
    return [
        Kept(part, memory_of(server.pid).server_kb, whole_pss_kb(server.pid))
        for part, server in zip(parts, servers, strict=True)
    ]


# --- measurements ----------------------------------------------------------------------------------------------


async def throughput(ports: Sequence[int], pids: Sequence[int], seconds: float) -> tuple[Pace, list[float]]:
    """32 clients, spread over these ports, with runs of 64 tokens; and the CPU milliseconds that each process spent
    per run."""
    clients = [Connection(port) for _, port in zip(range(32), cycle(ports))]
    assistant = await make_assistant(clients[0], 64)
    ended = 0

    async def one_run(client: Connection) -> None:
        nonlocal ended
        await thread_and_run(client, assistant, 64)
        ended += 1

    before_s = [cpu_s(pid) for pid in pids]
    pace = await loop_for(seconds, clients, one_run, warm_up_s=1)
    used_ms = [(cpu_s(pid) - before) * 1000 / ended for pid, before in zip(pids, before_s, strict=True)]
    for client in clients:
        client.close()
    return pace, used_ms


async def first_delta(port: int, stub_port: int, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first text of a run, and of the same answer from the stub. One client; the two in turns."""
    client, stub = Connection(port), Connection(stub_port)
    assistant = await make_assistant(client, 64)
    ours, direct = [], []
    for number in range(count + 20):
        thread = await make_thread(client)
        run, alone = await stream_run(client, thread, assistant, 64), await ask_stub(stub, 64)
        if number >= 20:
            ours.append(run.first_ms)
            direct.append(alone.first_ms)
    client.close()
    stub.close()
    return ours, direct


async def event_latency(port: int, runs: int, tokens: int) -> list[float]:
    """Milliseconds from the stub's sending a token, 20 a second, until the client of a streamed run has it."""
    clients = connect(port, runs)
    body = {"model": model_name(tokens, STREAM_RATE, stamped=True)}
    assistant = await make(clients[0], "/v1/assistants", body)
    threads = await in_batches([partial(make_thread, client) for client in clients])

    async def one(number: int) -> list[float]:
        await asyncio.sleep(number / runs)  # so that they are not in step
        asked = {"assistant_id": assistant, "stream": True}
        answer = await clients[number].ask("POST", f"/v1/threads/{threads[number]}/runs", asked, mark=DELTA)
        return _ages_ms(expect(answer, b"event: thread.run.completed"), DELTA)

    return [*chain.from_iterable(await together(one(number) for number in range(runs)))]


async def stub_latency(stub_port: int, runs: int, tokens: int) -> list[float]:
    """The same from the stub itself."""
    body = {"model": model_name(tokens, STREAM_RATE, stamped=True), "messages": [message()], "stream": True}

    async def one(number: int) -> list[float]:
        await asyncio.sleep(number / runs)
        answer = await Connection(stub_port).ask("POST", "/v1/chat/completions", body, mark=CHUNK)
        return _ages_ms(expect(answer, b"[DONE]"), CHUNK)

    return [*chain.from_iterable(await together(one(number) for number in range(runs)))]


def _ages_ms(answer: Answer, mark: bytes) -> list[float]:
    """How old each stamp was when it came."""
    pieces = [piece.partition(b"\n\n")[0] for piece in answer.body.split(mark)[1:]]  # what ends a run repeats its text
    return [
        (arrived - float(stamp)) * 1000
        for arrived, piece in zip(answer.marks, pieces, strict=True)
        for stamp in STAMP.findall(piece)
    ]


class PickUp(msgspec.Struct):
    """What became of runs whose worker was killed. taken_s: after the kill, another one had the run. late_s: after the
    end of the lease. silent_s: until the stream's client had text again."""

    taken_s: list[float]
    late_s: list[float]
    silent_s: list[float]


async def pick_up(cluster: Cluster, runs: int = 8) -> PickUp:
    """Kill a worker with all its runs while another one stands by."""
    async with cluster.processes("api", "worker") as (api, worker), _session(cluster.url) as session:
        clients = connect(api.port, runs)
        assistant = await make_assistant(clients[0], STREAM_TOKENS, 4)
        threads = [await make_thread(client) for client in clients]
        pairs = zip(clients, threads, strict=True)
        streams = [asyncio.create_task(stream_run(client, thread, assistant, 0)) for client, thread in pairs]
        try:
            await _until_all(clients, 0)
            async with cluster.processes("worker"):
                os.kill(worker.pid, signal.SIGKILL)
                found = await _taken_over(session, runs)
                silent_s = await _until_all(clients, found.killed + 1)
                client = Connection(api.port)
                for run, thread in found.runs:
                    await client.ask("POST", f"/v1/threads/{thread}/runs/{run}/cancel")
                client.close()
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    return PickUp(found.taken_s, found.late_s, [at - found.killed for at in silent_s])


class _Taken(msgspec.Struct):
    """runs: with their threads."""

    killed: float
    runs: list[tuple[str, str]]
    taken_s: list[float]
    late_s: list[float]


async def _taken_over(session: asyncpg.Connection[asyncpg.Record], runs: int) -> _Taken:
    """Wait until another worker has each run of the one that has just been killed."""
    killed, wall = perf_counter(), time()
    held = await session.fetch("SELECT id, thread_id, attempt, lease_until FROM runs WHERE holds_thread = 1")
    if len(held) != runs:
        raise BenchFailure(f"{len(held)} runs were in progress, not {runs}")
    lease_s = {row["id"]: row["lease_until"] - wall for row in held}
    taken = _Taken(killed, [(row["id"], row["thread_id"]) for row in held], [], [])
    statement = await session.prepare("SELECT id FROM runs WHERE holds_thread = 1 AND attempt > $1")
    async with asyncio.timeout(WAIT_S):
        while lease_s:
            for row in await statement.fetch(held[0]["attempt"]):
                if row["id"] in lease_s:
                    taken.taken_s.append(perf_counter() - killed)
                    taken.late_s.append(taken.taken_s[-1] - lease_s.pop(row["id"]))
            await asyncio.sleep(0.005)
    return taken


async def _until_all(clients: Sequence[Connection], after: float) -> list[float]:
    """Wait until each has text that came after that time; return when each first had."""
    async with asyncio.timeout(WAIT_S):
        while not all(client.marks and client.marks[-1] > after for client in clients):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return [next(mark for mark in client.marks if mark > after) for client in clients]


async def sustained(port: int, count: int) -> Swarm:
    """So many runs at once, of 160 tokens at 20 a second: a new one starts for each that ends. first_ms: of those that
    started when all were there."""
    clients = connect(port, 2 * count)
    assistant = await make_assistant(clients[0], STREAM_TOKENS, STREAM_RATE)
    threads = await in_batches([partial(make_thread, client) for client in clients])
    pairs = zip(clients, threads, strict=True)
    starts = [partial(stream_run, client, thread, assistant, STREAM_TOKENS) for client, thread in pairs]
    swarm = await swarm_of(starts, count * STREAM_RATE / STREAM_TOKENS)
    for client in clients:
        client.close()
    return msgspec.structs.replace(swarm, first_ms=swarm.first_ms[count:])


# --- full tables -----------------------------------------------------------------------------------------------

THREADS, RUNS_EACH, MESSAGES_EACH = 100_000, 10, 100
BATCH = 2_000
# What is copied is a thread, a run and a message that the server has made. $1, $2: numbers of the first and the last
# new thread; $3 to $5: ids of what is copied, one more for each statement. New ids sort before all others, by time.
FILL = (
    f"""
INSERT INTO threads (project_id, id, seq, created_at, last_seq, object)
SELECT project_id, made.id, number, created_at - {THREADS + 1} + number, {RUNS_EACH + MESSAGES_EACH},
    replace(object, $3, made.id)
FROM threads, generate_series($1::int, $2::int) AS number,
    LATERAL (SELECT 'thread_' || lpad(number::text, 24, '0') AS id) AS made
WHERE threads.id = $3
""",
    f"""
INSERT INTO runs (project_id, thread_id, id, seq, created_at, assistant_id, status, holds_thread, deadline, attempt,
    asked, spent, object)
SELECT project_id, made.thread, made.id, seat, created_at - {THREADS + 1} + number, assistant_id, status, holds_thread,
    deadline, attempt, asked, spent, replace(replace(object, $3, made.thread), $4, made.id)
FROM runs, generate_series($1::int, $2::int) AS number, generate_series(1, {RUNS_EACH}) AS seat,
    LATERAL (SELECT 'thread_' || lpad(number::text, 24, '0') AS thread,
        'run_' || lpad((number * {RUNS_EACH} + seat)::text, 24, '0') AS id) AS made
WHERE runs.id = $4
""",
    f"""
INSERT INTO messages (project_id, thread_id, id, seq, created_at, run_id, status, object)
SELECT project_id, made.thread, made.id, {RUNS_EACH} + seat, created_at - {THREADS + 1} + number, made.run, status,
    replace(replace(replace(object, $3, made.thread), $4, made.run), $5, made.id)
FROM messages, generate_series($1::int, $2::int) AS number, generate_series(1, {MESSAGES_EACH}) AS seat,
    LATERAL (SELECT 'thread_' || lpad(number::text, 24, '0') AS thread,
        'run_' || lpad((number * {RUNS_EACH} + 1 + seat % {RUNS_EACH})::text, 24, '0') AS run,
        'msg_' || lpad((number * {MESSAGES_EACH} + seat)::text, 24, '0') AS id) AS made
WHERE messages.id = $5
""",
)
FOUND = "SELECT thread_id, run_id, id FROM messages WHERE thread_id = $1 AND run_id IS NOT NULL"


async def fill(url: str, port: int) -> dict[str, Any]:
    """Add 100,000 threads with 1,000,000 runs and 10,000,000 messages; return how long it took, and their size."""
    client = Connection(port)
    thread = await make_thread(client)
    await stream_run(client, thread, await make_assistant(client, 16), 16)
    began = perf_counter()
    async with _session(url) as one, _session(url) as other:
        copied = await one.fetchrow(FOUND, thread)
        assert copied
        starts = iter(range(1, THREADS + 1, BATCH))

        async def copy(session: asyncpg.Connection[asyncpg.Record]) -> None:
            await session.execute("SET synchronous_commit = off")
            for start in starts:
                for number, statement in enumerate(FILL, 1):
                    await session.execute(statement, start, start + BATCH - 1, *tuple(copied)[:number])

        await together([copy(one), copy(other)])
        size = await one.fetchval("SELECT pg_database_size(current_database())")
    return {"took_s": perf_counter() - began, "bytes": size}


async def analyze(url: str) -> None:
    """What autovacuum does by itself after a while."""
    await _execute(url, "ANALYZE")


def filled_thread(number: int) -> str:
    return f"thread_{number:024}"


async def long_threads(port: int, count: int) -> list[str]:
    """Threads as `fill` makes them, by the server itself."""
    client = Connection(port)
    return [await make_thread(client, MESSAGES_EACH) for _ in range(count)]


async def call_times(port: int, threads: Sequence[str], times: int) -> dict[str, list[float]]:
    """Milliseconds of single calls, one client. threads: of 100 messages, that are listed and appended to."""
    client = Connection(port)
    assistant = await make_assistant(client, 16)
    took: dict[str, list[float]] = {}
    order = random.Random(1)
    for number in range(times + 10):
        long = order.choice(threads)
        answers = {
            "create a thread": expect(await client.ask("POST", "/v1/threads", {})),
            "append": expect(await client.ask("POST", f"/v1/threads/{long}/messages", message())),
            "list 20": expect(await client.ask("GET", f"/v1/threads/{long}/messages?limit=20")),
            "run": await stream_run(client, await make_thread(client), assistant, 16),
        }
        if number >= 10:
            for what, answer in answers.items():
                took.setdefault(what, []).append(answer.took_ms)
    client.close()
    return took
