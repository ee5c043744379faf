"""What is measured: one function per row, or group of rows, of the table that is printed.

Every scenario starts servers of its own on empty data folders, so that none lives on what another left behind.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from bench import cluster, polls, sandbox, search
from bench.calls import (
    STARTS_PER_S,
    STREAM_RATE,
    Made,
    Swarm,
    ask_stub,
    connect,
    in_batches,
    make,
    make_assistant,
    make_thread,
    message,
    percentiles,
    stream_run,
    swarm_of,
    thread_and_run,
)
from bench.client import Answer, BenchFailure, Connection, Pace, expect, loop_for, percentile, together
from bench.processes import Memory, Part, Server, afterglow, cpu_s, has_proc, memory_of

T = TypeVar("T")
Sign = Literal["≤", "≥"]

OWED: dict[str, tuple[Sign, float]] = {
    "first delta, added, p50": ("≤", 5),
    "runs, 32 clients × 64 tokens": ("≥", 200),
    "500 streams, complete": ("≥", 500),
    "500 streams, first delta, p99": ("≤", 250),
    "1,000 streams, complete": ("≥", 1000),
    "memory per open stream": ("≤", 60),
    "polled run, requests": ("≤", 2),
    "polled run, lag after the end, p50": ("≤", 10),
    "read a thread, 1 client, p50": ("≤", 0.5),
    "read a thread, 64 clients": ("≥", 3000),
    "thread of 10,000: list 20": ("≤", 1.2),
    "thread of 10,000: append": ("≤", 1.2),
    "thread of 10,000: run": ("≤", 1.2),
    "thread of 100,000: list 20": ("≤", 1.2),
    "thread of 100,000: append": ("≤", 1.2),
    "thread of 100,000: run": ("≤", 1.2),
    "start to first 200, empty folder, p50": ("≤", 1.0),
    "start to first 200, used folder, p50": ("≤", 1.0),
    "memory at rest": ("≤", 90),
    "search: indexing words": ("≥", 2),
    "search: 10,000 chunks, hybrid, p50": ("≤", 3),
    "sandbox: DataFrame, pool, p50": ("≤", 20),
    "sandbox: DataFrame, on demand, p50": ("≤", 80),
}
STREAM_TOKENS = 160  # long enough that all are open together
BURST_TOKENS = 30


class Row(msgspec.Struct, kw_only=True):
    """One line of the table. owed: the figure promised, or None where nothing is; beside: what to read it against."""

    what: str
    measured: float
    unit: str
    sign: Sign | None = None
    owed: float | None = None
    beside: str = ""

    @property
    def kept(self) -> bool | None:
        """Whether the promise is kept; None where there is none."""
        if self.owed is None:
            return None
        return self.measured <= self.owed if self.sign == "≤" else self.measured >= self.owed


def row(what: str, measured: float, unit: str, beside: str = "") -> Row:
    """A line of the table, with what OWED promises for it."""
    sign, owed = OWED.get(what, (None, None))
    return Row(what=what, measured=measured, unit=unit, sign=sign, owed=owed, beside=beside)


class Findings(msgspec.Struct):
    """What a scenario found. raw: percentiles and counts, for the JSON file."""

    rows: list[Row]
    raw: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """What all scenarios need. program: the `afterglow` to start; folder: a temporary one, for data and logs.

    collections: folders with test collections for `retrieval`; embed: what embeds them. postgres: URL of a server for
    `cluster`; large: measure there what takes minutes, too.
    """

    program: Path
    stub_port: int
    folder: Path
    quick: bool
    collections: Sequence[Path] = ()
    embed: search.Embedder | None = None
    postgres: str = ""
    large: bool = False

    def server(self, name: str, code_interpreter: str = "off") -> AbstractAsyncContextManager[Server]:
        """Start a server on the data folder of this name, made if it is not there."""
        return afterglow(self.program, self.folder / name, self.stub_port, code_interpreter)

    def pick(self, full: T, quick: T) -> T:
        return quick if self.quick else full


# --- runs ------------------------------------------------------------------------------------------------------


async def first_delta(setup: Setup) -> Findings:
    """What the first text of a streamed run takes longer than from the stub itself. One client; the two in turns."""
    tokens, warm_up = 16, 20
    ours: list[float] = []
    direct: list[float] = []
    async with setup.server("first_delta") as server:
        client, stub = Connection(server.port), Connection(setup.stub_port)
        assistant = await make_assistant(client, tokens)
        for _ in range(warm_up + setup.pick(500, 100)):
            thread = await make(client, "/v1/threads", {})
            await make(client, f"/v1/threads/{thread}/messages", message())
            ours.append((await stream_run(client, thread, assistant, tokens)).first_ms)
            direct.append((await ask_stub(stub, tokens)).first_ms)
    run, alone = percentiles(ours[warm_up:]), percentiles(direct[warm_up:])
    rows = [row(f"first delta, added, {p}", run[p] - alone[p], "ms", f"stub {alone[p]:.2f} ms") for p in ("p50", "p99")]
    return Findings(rows, {"run_ms": run, "stub_ms": alone})


async def throughput(setup: Setup) -> Findings:
    """Streamed runs per second: 32 clients; each makes a thread with a message, streams a run on it, and repeats."""
    tokens, clients = 64, 32
    stubs = connect(setup.stub_port, clients)
    ceiling = await loop_for(setup.pick(3, 1), stubs, lambda stub: ask_stub(stub, tokens))
    deltas: list[int] = []
    async with setup.server("throughput") as server:
        ours = connect(server.port, clients)
        assistant = await make_assistant(ours[0], tokens)

        async def one_run(client: Connection) -> None:
            deltas.append(len((await thread_and_run(client, assistant, tokens)).marks))

        cpu_before_s = cpu_s(server.pid)
        pace = await loop_for(setup.pick(8, 3), ours, one_run, warm_up_s=1)
        cpu_ms = (cpu_s(server.pid) - cpu_before_s) * 1000 / len(deltas)
    deltas_per_run = sum(deltas) / len(deltas)
    rows = [
        row("runs, 32 clients × 64 tokens", pace.per_s, "per s", f"driver on the stub {ceiling.per_s:,.0f} per s"),
        row("server CPU per run", cpu_ms, "ms", f"{deltas_per_run:.1f} deltas per run"),
    ]
    raw = {"runs_per_s": pace.per_s, "thread_and_run_ms": percentiles(pace.took_ms), "server_cpu_ms_per_run": cpu_ms}
    return Findings(rows, raw | {"driver_calls_per_s": ceiling.per_s, "deltas_per_run": deltas_per_run})


# --- many streams ----------------------------------------------------------------------------------------------


async def streams(setup: Setup) -> Findings:
    """500 and 1,000 streams at once, 160 tokens at 20 a second, started at the owed 200 runs per second; and, without
    a target, what a burst of 500 starts within one second does to the first delta."""
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for count in (500,) if setup.quick else (500, 1000):
        direct = await _stub_streams(setup, count)
        ours, server_cpu_s = await _server_streams(setup, count)
        rows += _stream_rows(count, ours, direct, server_cpu_s)
        raw[str(count)] = {"afterglow": swarm_raw(ours), "stub": swarm_raw(direct), "server_cpu_s": server_cpu_s}
    burst, _ = await _server_streams(setup, 500, BURST_TOKENS, 500)
    if burst.completed:
        beside = f"{burst.completed} of 500 complete"
        rows.append(row("500 streams in 1 s, first delta, p99", percentile(burst.first_ms, 99), "ms", beside))
    raw["burst"] = swarm_raw(burst)
    return Findings(rows, raw)


async def _stub_streams(setup: Setup, count: int) -> Swarm:
    stubs = connect(setup.stub_port, count)
    swarm = await swarm_of([partial(ask_stub, stub, STREAM_TOKENS, STREAM_RATE) for stub in stubs])
    for stub in stubs:
        stub.close()
    return swarm


async def _server_streams(
    setup: Setup, count: int, tokens: int = STREAM_TOKENS, per_s: float = STARTS_PER_S
) -> tuple[Swarm, float]:
    """The streams, and the CPU seconds that the server spent on them."""
    async with setup.server(f"streams_{count}") as server:
        clients = connect(server.port, count)
        assistant = await make_assistant(clients[0], tokens, STREAM_RATE)
        threads = await in_batches([partial(make_thread, client) for client in clients])
        before_s = cpu_s(server.pid)
        pairs = zip(clients, threads, strict=True)
        swarm = await swarm_of(
            [partial(stream_run, client, thread, assistant, tokens) for client, thread in pairs], per_s
        )
        return swarm, cpu_s(server.pid) - before_s


def _stream_rows(count: int, ours: Swarm, direct: Swarm, server_cpu_s: float) -> list[Row]:
    name = f"{count:,} streams"
    beside = f"stub {direct.completed:,}" + (f"; {ours.failures[0][:60]}" if ours.failures else "")
    rows = [row(f"{name}, complete", ours.completed, f"of {count:,}", beside)]
    if ours.completed:
        for p in (50, 99):
            beside = f"stub {percentile(direct.first_ms, p):.1f} ms"
            rows.append(row(f"{name}, first delta, p{p}", percentile(ours.first_ms, p), "ms", beside))
        beside = f"stub {percentile(direct.late_ms, 99):.1f} ms"
        rows.append(row(f"{name}, gap over 50 ms, p99", percentile(ours.late_ms, 99), "ms", beside))
        rows.append(row(f"{name}, server CPU per token", server_cpu_s * 1e6 / (count * STREAM_TOKENS), "µs"))
    return rows


def swarm_raw(swarm: Swarm) -> dict[str, Any]:
    raw: dict[str, Any] = {"completed": swarm.completed, "failures": swarm.failures[:5]}
    if swarm.first_ms:
        raw |= {"first_delta_ms": percentiles(swarm.first_ms), "late_ms": percentiles(swarm.late_ms)}
    return raw


# --- memory ----------------------------------------------------------------------------------------------------


async def memory(setup: Setup) -> Findings:
    """Resident memory per open stream: 500 runs of one token per second, each on a connection of its own.

    The warm-up, 100 whole runs on 20 other connections, has loaded all code but cannot have made room for 500 streams.
    """
    _need_proc()
    count = setup.pick(500, 200)
    async with setup.server("memory") as server:
        makers = connect(server.port, 20)
        slow, at_once = await make_assistant(makers[0], 60, 1), await make_assistant(makers[0], 64)
        await in_batches([partial(thread_and_run, maker, at_once, 64) for maker in makers * 5], 20)
        threads = await in_batches([partial(make_thread, makers[number % 20]) for number in range(count)], 20)
        await asyncio.sleep(1)
        before = memory_of(server.pid)
        after = await _memory_of_open(server, threads, slow)
    children = f"children {(after.children_kb - before.children_kb) / count:.1f} KB"
    rows = [row("memory per open stream", (after.server_kb - before.server_kb) / count, "KB", children)]
    return Findings(rows, {"streams": count, "before": before._asdict(), "open": after._asdict()})


async def _memory_of_open(server: Server, threads: Sequence[str], assistant: str) -> Memory:
    """Open a stream on each thread, wait until each has sent text, and read the server's memory while all are open."""
    clients = connect(server.port, len(threads))
    pairs = zip(clients, threads, strict=True)
    runs = [asyncio.create_task(stream_run(client, thread, assistant, 60)) for client, thread in pairs]
    try:
        async with asyncio.timeout(20):
            while not all(client.marks for client in clients):
                await _while_running(runs, 0.1)
        await _while_running(runs, 2)
        return memory_of(server.pid)
    finally:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def _while_running(runs: Iterable[asyncio.Task[Answer]], seconds: float) -> None:
    """Let time pass, and raise what a run has failed of meanwhile."""
    ended, _ = await asyncio.wait(runs, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for run in ended:
        run.result()


def _need_proc() -> None:
    if not has_proc():
        raise BenchFailure("memory is read from /proc, which is Linux")


# --- waiting ---------------------------------------------------------------------------------------------------


async def waiting(setup: Setup) -> Findings:
    """A run polled by the official client's own helper; 10,000 held polls; and loops by hand."""
    _need_proc()
    count = setup.pick(10_000, 1_000)
    async with setup.server("waiting") as server:
        helped = await polls.helped(server.port, setup.pick(10, 3), tokens=30, rate=20)
        memory, from_rows = await polls.by_hand(server, 32, setup.pick(3, 1))
    async with setup.server("held") as server:
        held = await polls.held(server, count, setup.pick(50, 10))
    lag, wake, all_at_once = (percentiles(took) for took in (helped.lag_ms, held.wake_ms, held.all_ms))
    each_kb = (held.held.server_kb - held.before.server_kb) / count
    rows = [
        row("polled run, requests", max(helped.requests), "GETs", "runs of 1.5 s"),
        row("polled run, lag after the end, p50", lag["p50"], "ms", f"most {max(helped.lag_ms):.1f} ms"),
        row(f"{count:,} held polls, memory each", each_kb, "KB"),
        row(f"{count:,} held polls, wake-up of one, p50", wake["p50"], "ms", f"p99 {wake['p99']:.1f} ms"),
        row(f"{count:,} held polls, all answered, p99", all_at_once["p99"], "ms"),
        row("polls by hand, 32 clients", memory.per_s, "per s", f"read each time {from_rows.per_s:,.0f} per s"),
        row("polls by hand, server CPU", memory.cpu_ms, "ms", f"read each time {from_rows.cpu_ms:.2f} ms"),
    ]
    raw = {"helped": helped, "wake_ms": wake, "all_ms": all_at_once, "before": held.before, "held": held.held}
    return Findings(rows, msgspec.to_builtins(raw | {"from_memory": memory, "read": from_rows}))


# --- plain requests --------------------------------------------------------------------------------------------


async def crud(setup: Setup) -> Findings:
    """Plain requests: latency with one client, rate with 64; each client has a thread of 20 messages of its own."""
    stubs = connect(setup.stub_port, 64)
    ceiling = await _alone_and_together(setup, stubs, lambda stub: stub.ask("GET", "/v1/models"))
    async with setup.server("crud") as server:
        clients = connect(server.port, 64)
        made = await in_batches([partial(make_thread, client, 20) for client in clients])
        at = {client: f"/v1/threads/{thread}" for client, thread in zip(clients, made, strict=True)}
        kinds: dict[str, Callable[[Connection], Awaitable[Answer]]] = {
            "read a thread": lambda client: client.ask("GET", at[client]),
            "list 20 messages": lambda client: client.ask("GET", f"{at[client]}/messages"),
            "post a message": lambda client: client.ask("POST", f"{at[client]}/messages", message()),
            "create a thread": lambda client: client.ask("POST", "/v1/threads", {}),
        }
        paces = {what: await _alone_and_together(setup, clients, ask) for what, ask in kinds.items()}
    rows = [line for what, pair in paces.items() for line in _crud_rows(what, pair, ceiling)]
    raw = {what: _crud_raw(*pair) for what, pair in [*paces.items(), ("stub", ceiling)]}
    return Findings(rows, raw)


async def _alone_and_together(
    setup: Setup, clients: Sequence[Connection], ask: Callable[[Connection], Awaitable[Answer]]
) -> tuple[Pace, Pace]:
    async def call(client: Connection) -> None:
        expect(await ask(client))

    alone = await loop_for(setup.pick(2, 0.5), clients[:1], call)
    return alone, await loop_for(setup.pick(3, 1), clients, call)


def _crud_rows(what: str, paces: tuple[Pace, Pace], ceiling: tuple[Pace, Pace]) -> list[Row]:
    (alone, crowd), (stub_alone, stub_crowd) = paces, ceiling
    stub_ms = percentile(stub_alone.took_ms, 50)
    return [
        row(f"{what}, 1 client, p50", percentile(alone.took_ms, 50), "ms", f"stub {stub_ms:.2f} ms"),
        row(f"{what}, 64 clients", crowd.per_s, "per s", f"driver on the stub {stub_crowd.per_s:,.0f} per s"),
    ]


def _crud_raw(alone: Pace, crowd: Pace) -> dict[str, Any]:
    return {"alone_ms": percentiles(alone.took_ms), "crowd_ms": percentiles(crowd.took_ms), "crowd_per_s": crowd.per_s}


# --- long threads ----------------------------------------------------------------------------------------------

LIST, APPEND, RUN, SHORT_RUN = "list 20", "append", "run", "run, last 10 messages"
# A thread holds 100,000 messages at most; the measurement appends some too.
LONG = {"10,000": 10_000, "100,000": 99_000}


async def long_threads(setup: Setup) -> Findings:
    """List, append and run on threads of 10,000 and 100,000 messages, over the same on new threads of 10.

    The threads take turns, so that all see the same noise. The list is compared with that of a thread of 20, which
    fills its page; a plain run sees as many messages as fit the model's window; the last kind sees ten on all.
    """
    took_ms: dict[str, dict[str, list[float]]] = {}
    fill_s: dict[str, float] = {}
    async with setup.server("long_threads") as server:
        client = Connection(server.port)
        assistant = await make_assistant(client, 8)
        threads: dict[str, str] = {}
        order = random.Random(1)  # a fixed order can keep step with something periodic, such as garbage collection
        for name, count in LONG.items():
            started = asyncio.get_running_loop().time()
            threads[name] = await _long_thread(server, count)
            fill_s[name] = asyncio.get_running_loop().time() - started
        for _ in range(setup.pick(100, 30)):
            for name in order.sample(("10", *threads), k=len(threads) + 1):
                sink = took_ms.setdefault(name, {})
                await _one_of_each(client, threads.get(name), assistant, sink)
    rows = [line for name in threads for line in _long_rows(name, took_ms)]
    raw = {name: {kind: percentiles(values) for kind, values in kinds.items()} for name, kinds in took_ms.items()}
    return Findings(rows, {"took_ms": raw, "fill_s": fill_s})


async def _one_of_each(client: Connection, long: str | None, assistant: str, sink: dict[str, list[float]]) -> None:
    # New threads are made in every turn: a request that follows others at once is faster than one after a pause.
    listed, thread = await make_thread(client, 20), await make_thread(client, 10)
    if long:
        listed = thread = long
    tail: dict[str, object] = {"truncation_strategy": {"type": "last_messages", "last_messages": 10}}
    answers = {
        LIST: expect(await client.ask("GET", f"/v1/threads/{listed}/messages?limit=20")),
        APPEND: expect(await client.ask("POST", f"/v1/threads/{thread}/messages", message())),
        RUN: await stream_run(client, thread, assistant, 8),
        SHORT_RUN: await stream_run(client, thread, assistant, 8, **tail),
    }
    for kind, answer in answers.items():
        sink.setdefault(kind, []).append(answer.took_ms)


async def _long_thread(server: Server, count: int) -> str:
    """Make a thread of so many messages: with the thread as far as the server takes them, the rest one by one."""
    clients = connect(server.port, 64)
    for with_thread in (count, 10_000, 1_000, 0):
        body = {"messages": [message()] * with_thread}
        answer = await clients[0].ask("POST", "/v1/threads", body)
        if answer.status == 200:
            break
    thread = msgspec.json.decode(expect(answer).body, type=Made).id
    await together(_append(client, thread, len(range(n, count - with_thread, 64))) for n, client in enumerate(clients))
    for client in clients:
        client.close()
    return thread


async def _append(client: Connection, thread: str, count: int) -> None:
    for _ in range(count):
        expect(await client.ask("POST", f"/v1/threads/{thread}/messages", message()))


def _long_rows(name: str, took_ms: dict[str, dict[str, list[float]]]) -> Iterable[Row]:
    for kind in (LIST, APPEND, RUN, SHORT_RUN):
        long, short = percentile(took_ms[name][kind], 50), percentile(took_ms["10"][kind], 50)
        yield row(f"thread of {name}: {kind}", long / short, "×", f"{long:.2f} ms, short thread {short:.2f} ms")


# --- start -----------------------------------------------------------------------------------------------------


async def start(setup: Setup) -> Findings:
    """Start to the first 200 on /healthz, on empty data folders and on a used one, and the memory six seconds later."""
    times = setup.pick(5, 3)
    empty = [await _start_s(setup, f"start_{number}") for number in range(times)]
    await _use_folder(setup, "start_0")
    used = [await _start_s(setup, "start_0") for _ in range(times)]
    rows = [
        row("start to first 200, empty folder, p50", percentile(empty, 50), "s", f"slowest {max(empty):.2f} s"),
        row("start to first 200, used folder, p50", percentile(used, 50), "s", f"slowest {max(used):.2f} s"),
    ]
    raw: dict[str, Any] = {"empty_s": empty, "used_s": used}
    if has_proc():
        async with setup.server("start_rest", "auto") as server:
            await asyncio.sleep(6)  # the code interpreter's engine starts behind the first answers
            rest = memory_of(server.pid)
        total_mb = (rest.server_kb + rest.children_kb) / 1024
        rows.append(row("memory at rest", rest.server_kb / 1024, "MB", f"with children {total_mb:.1f} MB"))
        raw["at_rest"] = rest._asdict()
    return Findings(rows, raw)


async def _start_s(setup: Setup, folder: str) -> float:
    async with setup.server(folder, "auto") as server:
        return server.start_s


async def _use_folder(setup: Setup, folder: str) -> None:
    async with setup.server(folder) as server:
        clients = connect(server.port, 20)
        assistant = await make_assistant(clients[0], 64)
        await in_batches([partial(thread_and_run, client, assistant, 64) for client in clients * 10], 20)
        await make_thread(clients[0], 5_000)


# --- the code interpreter --------------------------------------------------------------------------------------


async def code_interpreter(setup: Setup) -> Findings:
    """Sessions, cells, files and memory of the native engine; a Jupyter kernel started cold beside it."""
    _need_proc()
    times = setup.pick(20, 5)
    starts = await sandbox.engine_start(setup.pick(3, 1))
    took = await sandbox.latencies(times)
    alone_mb, table_mb, plot_mb = await sandbox.memory(setup.pick(20, 5))
    put, got = await sandbox.file_throughput()
    together_ms = await sandbox.crowd(setup.pick(sandbox.SESSIONS, 10))
    cold = sandbox.cold_kernel(setup.folder / "kernel", setup.pick(5, 2))
    beside = {what: f"Jupyter kernel, cold: {sandbox.middle(ms):,.0f} ms" for what, ms in (cold or {}).items()}
    rows = [row("sandbox: engine start", sandbox.middle(starts) / 1000, "s", f"slowest {max(starts) / 1000:.1f} s")]
    for what, ms in took.items():
        spread = f"p95 {percentile(ms, 95):.1f} ms; " + beside.get(what.partition(",")[0], "no Jupyter kernel")
        rows.append(row(f"sandbox: {what}, p50", sandbox.middle(ms), "ms", spread if "," in what else ""))
    in_4_gb = (4096 - alone_mb) / plot_mb
    rows += [
        row("sandbox: memory per session, DataFrame", table_mb, "MB", f"PSS; engine alone {alone_mb:.0f} MB"),
        row("sandbox: memory per session, plot", plot_mb, "MB", f"so {in_4_gb:.0f} sessions in 4 GB"),
        row("sandbox: file in", put, "MB/s"),
        row("sandbox: file out", got, "MB/s"),
        row(
            f"sandbox: {len(together_ms)} threads at once, DataFrame, p50",
            sandbox.middle(together_ms),
            "ms",
            f"slowest {max(together_ms):,.0f} ms",
        ),
    ]
    return Findings(rows, {"start_ms": starts, **took, "together_ms": together_ms, "jupyter": cold or {}})


# --- file search -----------------------------------------------------------------------------------------------

DIMENSIONS = 384


async def file_search(setup: Setup) -> Findings:
    """The search index by itself: indexing, and questions to one large store and to many small ones."""
    page, passage = {"words": 640, "new_words": 320}, {"words": 80, "new_words": 80}
    stores = setup.pick(1_000, 20)
    words = search.Load(stores=1, files=100, chunks=10_000, dimensions=0, **page)
    both = search.Load(stores=1, files=100, chunks=10_000, dimensions=DIMENSIONS, **page)
    large = search.Load(stores=1, files=1_000, chunks=100_000, dimensions=DIMENSIONS, **passage)
    spread = search.Load(stores=stores, files=stores, chunks=stores * 100, dimensions=DIMENSIONS, **passage)
    loads = {"10,000 chunks, hybrid": both, f"{spread.chunks:,} chunks in {stores:,} stores, hybrid": spread}
    if not setup.quick:
        loads |= {"10,000 chunks, lexical": words, "100,000 chunks, hybrid": large}
    speeds = {what: await search.speed(load) for what, load in loads.items()}
    rows = []
    for what, load in loads.items():
        if load not in (words, both):
            continue
        took, kind = speeds[what], f"words and {DIMENSIONS} dimensions" if load.dimensions else "words"
        beside = f"{load.chunks / took.put_s:,.0f} chunks and {took.text_mb / took.put_s:.1f} MB per second elapsed"
        rows.append(row(f"search: indexing {kind}", took.text_mb / took.put_cpu_s, "MB/s", beside))
    for what, took in speeds.items():
        beside = f"CPU {took.query_cpu_ms:.1f} ms; {took.rss_mb:,.0f} MB more memory, {took.disk_mb:,.0f} MB on disk"
        rows.append(row(f"search: {what}, p50", percentile(took.query_ms, 50), "ms", beside))
        rows.append(row(f"search: {what}, p99", percentile(took.query_ms, 99), "ms"))
    return Findings(rows, {what: msgspec.structs.asdict(took) for what, took in speeds.items()})


async def retrieval(setup: Setup) -> Findings:
    """How well the search index finds, on each collection given, beside a plain BM25 library on the same chunks."""
    if not setup.collections:
        return Findings([], {"skipped": "no collection given: --beir FOLDER"})
    rows: list[Row] = []
    for folder in setup.collections:
        collection = search.read_collection(folder)
        runs = await search.retrieve(collection, setup.folder / f"beir_{collection.name}", setup.embed)
        plain = search.plain_bm25(collection)
        for what, measure in (("nDCG@10", search.ndcg), ("recall@20", search.recall)):
            owed = measure(plain, collection.judgements) if plain else None
            for way, run in runs.items():
                line = Row(
                    what=f"{collection.name}: {way}, {what}", measured=measure(run, collection.judgements), unit=""
                )
                line.beside = "no BM25 library here" if owed is None else f"plain BM25 {owed:.4f}"
                if owed is not None and way == "lexical":
                    line.sign, line.owed = "≥", owed
                rows.append(line)
    return Findings(rows, {"collections": [str(folder) for folder in setup.collections]})


# --- several processes on one Postgres -------------------------------------------------------------------------

SHAPES: dict[str, tuple[Part, ...]] = {
    "1 process": ("all",),
    "2 processes": ("api", "worker"),
    "4 processes": ("api", "api", "worker", "worker"),
}
SUSTAINED_FIRST_MS = 500


async def several_processes(setup: Setup) -> Findings:
    """What the cluster shape costs beside the laptop shape: with 1, 2 and 4 processes on one Postgres."""
    if not setup.postgres:
        return Findings([], {"skipped": "no Postgres given: --postgres URL"})
    findings = Findings([], {})
    async with setup.server("laptop") as server:
        await _measure_shape(setup, findings, "laptop", ("all",), [server])
    async with cluster.fresh_database(setup.postgres) as url:
        shared = cluster.Cluster(setup.program, setup.folder / "cluster", setup.stub_port, url)
        for shape, parts in SHAPES.items():
            if setup.quick and shape != "2 processes":
                continue
            before = await cluster.load_so_far(url)
            async with shared.processes(*parts) as processes:
                await _measure_shape(setup, findings, shape, parts, processes)
            _add_load(findings, shape, (await cluster.load_so_far(url)).since(before))
        await _measure_pick_up(setup, findings, shared)
        if setup.large:
            await _measure_sustained(findings, shared)
            await _measure_growth(findings, shared)
    return findings


async def _measure_shape(
    setup: Setup, findings: Findings, shape: str, parts: Sequence[Part], processes: Sequence[Server]
) -> None:
    """Memory at rest; one client's first text; 32 clients' runs; a token's way to its client; memory after that."""
    await asyncio.sleep(0.5)
    rest = cluster.memory(parts, processes)
    ports = [server.port for part, server in zip(parts, processes, strict=True) if part != "worker"]
    ours, direct = await cluster.first_delta(ports[0], setup.stub_port, setup.pick(150, 30))
    run, alone = percentiles(ours), percentiles(direct)
    pace, used_ms = await cluster.throughput(ports, [server.pid for server in processes], setup.pick(5, 1))
    name = f"cluster: {shape}"
    used = ", ".join(f"{part} {ms:.1f}" for part, ms in zip(parts, used_ms, strict=True))
    findings.rows += [
        row(f"{name}, first delta, added, {p}", run[p] - alone[p], "ms", f"stub {alone[p]:.2f} ms")
        for p in ("p50", "p99")
    ]
    findings.rows.append(row(f"{name}, runs, 32 clients × 64 tokens", pace.per_s, "per s", f"CPU ms per run: {used}"))
    found = findings.raw[shape] = {"run_ms": run, "stub_ms": alone, "runs_per_s": pace.per_s, "cpu_ms": used_ms}
    if shape in ("laptop", "2 processes"):
        await _measure_events(setup, findings, shape, ports[0])
    loaded = cluster.memory(parts, processes)
    found |= {"thread_and_run_ms": percentiles(pace.took_ms), "at_rest": rest, "after_load": loaded}
    if shape in ("laptop", "2 processes"):
        for part, before, after in zip(parts, rest, loaded, strict=True):
            beside = (
                f"RSS {before.rss_kb / 1024:.1f} MB; after load {after.pss_kb / 1024:.1f}, {after.rss_kb / 1024:.1f}"
            )
            findings.rows.append(row(f"{name}, {part}, memory at rest (PSS)", before.pss_kb / 1024, "MB", beside))


async def _measure_events(setup: Setup, findings: Findings, shape: str, port: int) -> None:
    runs, tokens = 50, setup.pick(60, 15)
    direct = percentiles(await cluster.stub_latency(setup.stub_port, runs, tokens))
    ours = percentiles(await cluster.event_latency(port, runs, tokens))
    findings.rows += [
        row(f"cluster: {shape}, token to client, {p}", ours[p], "ms", f"from the stub {direct[p]:.2f} ms")
        for p in ("p50", "p99")
    ]
    findings.raw[shape] |= {"token_ms": ours, "token_from_stub_ms": direct}


def _add_load(findings: Findings, shape: str, per_run: dict[str, float]) -> None:
    """What a run, with its thread and its reader, is to Postgres."""
    findings.raw[shape]["postgres_per_run"] = per_run
    if "statements" in per_run:
        findings.rows.append(row(f"cluster: {shape}, statements per run", per_run["statements"], ""))
    beside = f"{per_run['rows']:.1f} rows written"
    findings.rows.append(row(f"cluster: {shape}, transactions per run", per_run["transactions"], "", beside))
    findings.rows.append(row(f"cluster: {shape}, WAL per run", per_run["wal_bytes"] / 1024, "KB"))


async def _measure_pick_up(setup: Setup, findings: Findings, shared: cluster.Cluster) -> None:
    lease_s = setup.pick(10.0, 2.0)
    settings = {"AFTERGLOW_RUN_LEASE_S": str(lease_s), "AFTERGLOW_DRAIN_S": "0"}
    found = [await cluster.pick_up(replace(shared, settings=settings)) for _ in range(setup.pick(2, 1))]
    taken = [seconds for times in found for seconds in times.taken_s]
    late = [seconds for times in found for seconds in times.late_s]
    silent = [seconds for times in found for seconds in times.silent_s]
    beside = f"lease {lease_s:g} s; the client has text again after {max(silent):.1f} s"
    findings.rows += [
        row("cluster: kill -9 of a worker to the pick-up, slowest", max(taken), "s", beside),
        row("cluster: pick-up after the lease's end, slowest", max(late), "s", f"quickest {min(late):.2f} s"),
    ]
    findings.raw["pick_up"] = {"taken_s": taken, "late_s": late, "silent_s": silent, "lease_s": lease_s}


async def _measure_sustained(findings: Findings, shared: cluster.Cluster) -> None:
    """How many runs an API process and a worker sustain: in steps of 100, until the first text is late."""
    sustained, levels, raw = 0, [], {}
    async with shared.processes("api", "worker") as (api, _):
        for count in range(100, 2001, 100):
            swarm = await cluster.sustained(api.port, count)
            raw[str(count)] = swarm_raw(swarm)
            first_ms = percentile(swarm.first_ms, 99) if swarm.first_ms else math.inf
            levels.append(f"{count}: {first_ms:.0f} ms" + (f", {swarm.failures[0][:60]}" if swarm.failures else ""))
            if swarm.failures or first_ms > SUSTAINED_FIRST_MS:
                break
            sustained = count
    what = f"cluster: runs at once, first delta p99 ≤ {SUSTAINED_FIRST_MS} ms"
    findings.rows.append(row(what, sustained, "", "; ".join(levels)))
    findings.raw["sustained"] = raw


async def _measure_growth(findings: Findings, shared: cluster.Cluster) -> None:
    """Calls before and after 1,000,000 runs and 10,000,000 messages were added, under running processes."""
    async with shared.processes("api", "worker") as (api, _):
        before = await cluster.call_times(api.port, await cluster.long_threads(api.port, 20), 100)
        filled = await cluster.fill(shared.url, api.port)
        numbers = random.Random(2).sample(range(1, cluster.THREADS + 1), 1000)
        threads = [cluster.filled_thread(number) for number in numbers]
        at_once = await cluster.call_times(api.port, threads, 100)
        await cluster.analyze(shared.url)
        after = await cluster.call_times(api.port, threads, 100)
    for what, took in after.items():
        was, at_first = percentile(before[what], 50), percentile(at_once[what], 50)
        beside = f"p50 {percentile(took, 50):.2f} ms; empty {was:.2f}; full, not yet analyzed {at_first:.2f}"
        findings.rows.append(row(f"cluster: 10,000,000 messages: {what}", percentile(took, 50) / was, "×", beside))
    spread = {
        when: {what: percentiles(ms) for what, ms in took.items()}
        for when, took in (("empty", before), ("full", at_once), ("analyzed", after))
    }
    findings.raw["growth"] = {"filled": filled, **spread}


SCENARIOS: dict[str, Callable[[Setup], Awaitable[Findings]]] = {
    "start": start,
    "first_delta": first_delta,
    "throughput": throughput,
    "crud": crud,
    "streams": streams,
    "memory": memory,
    "waiting": waiting,
    "long_threads": long_threads,
    "code_interpreter": code_interpreter,
    "file_search": file_search,
    "retrieval": retrieval,
    "cluster": several_processes,
}
