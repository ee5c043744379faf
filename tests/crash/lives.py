"""Servers that die between two commits, a model that knows how far a story has come, and what must be true after."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import msgspec
import openai
from openai.types.beta.threads import Run

from afterglow import app
from afterglow.app import Application, make_data_folder, open_application
from afterglow.contracts import START, ChatRequest, Delta, House, Store, Transaction, Work
from afterglow.rows.events import list_segments
from afterglow.runs.states import RUN_MOVES, TERMINAL
from afterglow.settings import Settings, load
from afterglow.store.sqlite import SqliteStore
from afterglow.testing import Saying, ScriptedEngine, ScriptedModels, ScriptedParser, SetClock

PROJECT = "default"
PATIENCE_S = 20


class DyingStore:
    """A store whose process dies right after so many commits that changed something: that commit is written, nobody
    hears of it, and nothing is done any more. lives: how many; None lives on."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.commits = 0
        self.lives: int | None = None
        self.dead = asyncio.Event()

    async def read(self, work: Work[Any]) -> Any:
        await self._survive()
        result = await self._store.read(work)
        await self._survive()
        return result

    async def write(self, work: Work[Any], *, rowwise: bool = False) -> Any:
        await self._survive()
        result, changed = await self._store.write(_noticing(work), rowwise=rowwise)
        await self._count(changed)
        return result

    async def write_early(self, work: Work[Any]) -> tuple[Any, Awaitable[None]]:
        await self._survive()
        (result, changed), committed = await self._store.write_early(_noticing(work))
        return result, asyncio.ensure_future(self._counted(committed, changed))

    async def _counted(self, committed: Awaitable[None], changed: bool) -> None:
        await committed
        await self._count(changed)

    async def _count(self, changed: bool) -> None:
        if changed and not self.dead.is_set():
            self.commits += 1
            if self.commits == self.lives:
                self.dead.set()
        await self._survive()

    async def _survive(self) -> None:
        if self.dead.is_set():
            await asyncio.Event().wait()

    async def close(self) -> None:
        await self._store.close()


def _noticing(work: Work[Any]) -> Work[tuple[Any, bool]]:
    async def noticing(tx: Transaction) -> tuple[Any, bool]:
        before = await tx.fetch("SELECT total_changes()")
        result = await work(tx)
        return result, await tx.fetch("SELECT total_changes()") != before

    return noticing


class Storyteller(ScriptedModels):
    """A model that, each time it is called, says the part of its story that the prompt has come to: the part after
    as many rounds of tool calls as the prompt shows. told: which parts it was asked for. pause_s: between two words,
    so that others get a turn."""

    def __init__(self, *story: Callable[[], Saying], pause_s: float = 0) -> None:
        super().__init__()
        self.story = story
        self.pause_s = pause_s
        self.told: list[int] = []

    async def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        part = sum(1 for message in request.messages if message.get("tool_calls"))
        self.told.append(part)
        self.scripts = [self.story[part]()]
        async with aclosing(super().stream(request)) as batches:
            async for batch in batches:
                await asyncio.sleep(self.pause_s)
                yield batch


class Life:
    """The whole server on a folder, with the official client, until it dies without a word or is closed."""

    def __init__(self, application: Application, store: DyingStore | None = None) -> None:
        self.application = application
        self.house = application.house
        self.store = store
        self.client = client_of(application)

    async def do(self, act: Awaitable[Any]) -> bool:
        """Let a caller act; return whether the server outlived it. It dies at once when its store does."""
        assert self.store is not None
        acting = asyncio.ensure_future(act)
        dying = asyncio.ensure_future(self.store.dead.wait())
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([acting, dying], return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if self.store.dead.is_set():
            acting.cancel()
            return False
        await acting
        return True


def client_of(application: Application) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=application), timeout=PATIENCE_S)
    return openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="test-key", max_retries=0, http_client=http)


def settings_of(folder: Path, **settings: Any) -> Settings:
    return load({"data": str(folder), **settings}, environ={})


@asynccontextmanager
async def mortal(folder: Path, model: ScriptedModels, **settings: Any) -> AsyncGenerator[Life, None]:
    """A server that at the end of the block dies: its tasks are gone, its leases are left, nothing is cleaned up."""
    before = asyncio.all_tasks()
    make_data_folder(folder)
    loaded = settings_of(folder, **settings)
    store = DyingStore(SqliteStore(app.database_path(loaded)))
    # Not `open_application`: that cannot be left without an orderly end.
    opened = AsyncExitStack()
    application = await app._build(
        loaded, opened, "all", model, SetClock(), ScriptedEngine(), ScriptedParser(), None, store
    )
    await application.start(work=True)
    try:
        yield Life(application, store)
    finally:
        store.dead.set()
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        waiting = left
        while waiting:  # again and again: who tidies up when cancelled would do so through the dead store
            for task in waiting:
                task.cancel()
            _, waiting = await asyncio.wait(waiting, timeout=0.01)
        await asyncio.gather(*left, return_exceptions=True)
        await application.house.index.close()
        await store.close()


@asynccontextmanager
async def next_life(
    folder: Path, model: ScriptedModels, clock: SetClock | None = None, **settings: Any
) -> AsyncGenerator[Life, None]:
    """A server that was started as always, on what another one left."""
    loaded = settings_of(folder, **settings)
    async with open_application(
        loaded, models=model, clock=clock or SetClock(), parser=ScriptedParser()
    ) as application:
        yield Life(application)


# --- what must be true of a run that is over -------------------------------------------------------------------


class Event(NamedTuple):
    attempt: int
    sequence: int
    name: str
    data: Any


class Left(NamedTuple):
    """What the database holds. calls: recorded model calls of all runs."""

    calls: int
    usage: int

    @classmethod
    async def by(cls, folder: Path) -> Left:
        store = SqliteStore(folder / "afterglow.db", readers=1)
        try:
            rows = await store.read(lambda tx: tx.fetch("SELECT usage FROM model_calls"))
        finally:
            await store.close()
        return cls(len(rows), sum(msgspec.json.decode(usage)["total_tokens"] for (usage,) in rows if usage))


def parse(log: bytes) -> list[Event]:
    """Each event of a log. Fails on anything else."""
    found = re.findall(rb"event: ([a-z._]+)\ndata: (.*)\nid: (\d+)\.(\d+)\n\n", log)
    events = [Event(int(a), int(s), name.decode(), msgspec.json.decode(data)) for name, data, a, s in found]
    size = sum(len(b"event: \ndata: \nid: .\n\n") + sum(map(len, one)) for one in found)
    assert size == len(log), "there is something between the events"
    return events


async def stored_log(house: House, run_id: str) -> bytes:
    segments = await house.store.read(lambda tx: list_segments(tx, PROJECT, run_id, START))
    return b"".join(segment.data for segment in segments)


def check_log(events: Sequence[Event]) -> None:
    """A log is well-formed: numbered without a gap; a run that moves as it may, to one end; and whatever is created
    ends once, says nothing before and nothing after, and holds what its deltas said."""
    places = [(event.attempt, event.sequence) for event in events]
    expected = [
        (attempt, number)
        for attempt, total in sorted(Counter(attempt for attempt, _ in places).items())
        for number in range(1, total + 1)
    ]
    assert places == expected
    _check_run([event for event in events if event.data["object"] == "thread.run"])
    assert events[-1].data["object"] == "thread.run"
    things: dict[str, list[Event]] = {}
    for event in events:
        if event.data["object"] != "thread.run":
            things.setdefault(event.data["id"], []).append(event)
    for story in things.values():
        _check_thing(story)


def _check_run(events: Sequence[Event]) -> None:
    assert [event.name for event in events[:2]] == ["thread.run.created", "thread.run.queued"]
    statuses = [event.data["status"] for event in events[1:]]
    for event, status in zip(events[1:], statuses, strict=True):
        assert event.name == f"thread.run.{status}"
    for before, after in pairwise(statuses):
        assert after in RUN_MOVES[before].values(), statuses
    assert statuses[-1] in TERMINAL
    assert sum(status in TERMINAL for status in statuses) == 1


def _check_thing(story: Sequence[Event]) -> None:
    """The events of one step or one message, from `created` to its end."""
    stem = "thread.run.step" if story[0].data["object"] == "thread.run.step" else "thread.message"
    said = [event.name.removeprefix(f"{stem}.") for event in story]
    assert said[:2] == ["created", "in_progress"], said
    assert set(said[2:-1]) <= {"delta"}, said
    assert said[-1] in {"completed", "incomplete", "failed", "cancelled", "expired"}, said
    if stem == "thread.message":
        text = "".join(
            part["text"].get("value", "") for event in story[2:-1] for part in event.data["delta"]["content"]
        )
        assert "".join(part["text"]["value"] for part in story[-1].data["content"]) == text


async def check_run(life: Life, run: Run, *, assistant_texts: Sequence[str] | None = None) -> None:
    """A run is over, well and once: its log, its steps, its usage and its thread agree, and the thread is free.

    assistant_texts: what the thread's assistant messages say, oldest first; None when that depends.
    """
    threads = life.client.beta.threads
    assert run.status in TERMINAL
    check_log(events := parse(await stored_log(life.house, run.id)))
    assert events[-1].data == run.to_dict(mode="json")
    steps = [step async for step in await threads.runs.steps.list(run.id, thread_id=run.thread_id)]
    assert all(step.status != "in_progress" for step in steps)
    assert run.usage is not None
    spent = [step.usage for step in steps if step.usage]
    assert run.usage.total_tokens == sum(usage.total_tokens for usage in spent)
    assert run.usage.total_tokens == run.usage.prompt_tokens + run.usage.completion_tokens
    messages = [message async for message in await threads.messages.list(run.thread_id, order="asc")]
    assert len({message.id for message in messages}) == len(messages)
    assert all(message.status != "in_progress" for message in messages)
    texts = ["".join(part.text.value for part in one.content) for one in messages if one.role == "assistant"]
    assert assistant_texts is None or texts == list(assistant_texts)
    announced = {event.data["id"] for event in events if event.name == "thread.message.created"}
    assert {message.id for message in messages if message.role == "assistant"} <= announced
    await threads.messages.create(run.thread_id, role="user", content="Is anybody there?")
