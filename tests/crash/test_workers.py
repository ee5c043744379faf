"""Workers that sleep, that meet a full or failing database, or that come back from the dead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.beta.threads import Run

from afterglow.contracts import House, Store, Transaction
from afterglow.errors import ModelBroke, StoreFull, StoreUnavailable
from afterglow.events.local import LocalEvents
from afterglow.queue.local import LocalQueue
from afterglow.runs.worker import Worker
from afterglow.testing import Saying, ScriptedModels, SetClock, calls, ended, says
from tests.conftest import GET_WEATHER
from tests.crash.lives import PATIENCE_S, Life, Storyteller, check_run, next_life, stored_log

LEASE_S = 10.0
ANSWER = "Nothing of this is lost."
OVER = ("completed", "failed", "cancelled", "incomplete", "expired")


async def start(life: Life, **fields: Any) -> Run:
    """A run on a new thread."""
    assistant = await life.client.beta.assistants.create(model="m")
    thread = await life.client.beta.threads.create(messages=[{"role": "user", "content": "Well?"}])
    return await life.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id, **fields)


async def until(life: Life, run: Run, *statuses: str) -> Run:
    """The run, once it has one of these statuses."""
    async with asyncio.timeout(PATIENCE_S):
        while run.status not in statuses:
            await asyncio.sleep(0.002)
            run = await life.client.beta.threads.runs.retrieve(run.id, thread_id=run.thread_id)
    return run


async def eventually(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.002)


async def dump(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in the database, but for marks that requests were answered."""

    async def work(tx: Transaction) -> dict[str, list[tuple[Any, ...]]]:
        tables = await tx.fetch("SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'requests'")
        return {name: await tx.fetch(f"SELECT * FROM {name} ORDER BY rowid") for (name,) in tables}

    return await store.read(work)


@asynccontextmanager
async def worker_beside(house: House, models: ScriptedModels) -> AsyncGenerator[Worker, None]:
    """A worker as another process would have it: on the same database, with a memory of its own."""
    events = LocalEvents(house.store, house.clock, flush_ms=1, keep_alive_s=60)
    worker = Worker(replace(house, models=models, events=events, queue=LocalQueue()))
    events.start()
    await worker.start()
    try:
        yield worker
    finally:
        await worker.close()
        await events.close()


# --- leases ----------------------------------------------------------------------------------------------------

LAST_WORDS: dict[str, Callable[[], Saying]] = {
    "text": lambda: says("said too late"),
    "no text": lambda: says("x")[1:],
    "calls": lambda: calls(("get_weather", {"city": "Oslo"})),
    "an error": lambda: [ModelBroke("It broke.")],
}


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("said_before", [False, True])
@pytest.mark.parametrize("last_words", LAST_WORDS)
async def test_a_worker_that_wakes_up_too_late_changes_nothing(
    tmp_path: Path, last_words: str, said_before: bool, over: bool
):
    """A worker is paused past its lease; another takes its run over, and is still at it or done with it when the
    first wakes up; what the first does then is refused, every bit of it."""
    paused, going_on, stale, fresh = asyncio.Event(), asyncio.Event(), ScriptedModels(), ScriptedModels()
    stale.will([*(says("It will be")[:-1] if said_before else []), paused, *LAST_WORDS[last_words]()])
    fresh.will([*says(ANSWER)[:-1], going_on, ended("stop")])
    clock = SetClock()
    async with next_life(tmp_path / "data", stale, clock, run_lease_s=LEASE_S, event_flush_ms=1) as life:
        run = await until(life, await start(life, tools=[GET_WEATHER]), "in_progress")
        await eventually(lambda: len(stale.requests) == 1)
        if said_before:
            await until_stored(life, run, "will be")
        clock.time += LEASE_S + 1
        async with worker_beside(life.house, fresh) as worker:
            await until_stored(life, run, "lost.")
            if over:
                going_on.set()
                await until(life, run, *OVER)
            before = await dump(life.house.store)
            paused.set()
            await eventually(lambda: life.application.worker.running == 0)
            await life.house.events.close()
            assert await dump(life.house.store) == before
            going_on.set()
            run = await until(life, run, *OVER)
            await eventually(lambda: worker.running == 0)
        assert (run.status, run.usage and run.usage.total_tokens) == ("completed", 15)
        await check_run(life, run, assistant_texts=[ANSWER])


async def until_stored(life: Life, run: Run, text: str) -> None:
    """Wait until the last of a streamed text is in the database."""
    async with asyncio.timeout(PATIENCE_S):
        while text.split()[-1].encode() not in await stored_log(life.house, run.id):
            await asyncio.sleep(0.002)


async def test_a_lease_that_is_renewed_is_not_taken(tmp_path: Path):
    """While its worker lives, a run stays with it, however many leases it lasts and whoever else looks for work."""
    silence, model, other = asyncio.Event(), ScriptedModels(), ScriptedModels()
    model.will([silence, *says(ANSWER)])
    clock = SetClock()
    async with next_life(tmp_path / "data", model, clock, run_lease_s=0.03) as life:
        run = await until(life, await start(life), "in_progress")
        async with worker_beside(life.house, other):
            for _ in range(10):
                before = await leases(life.house.store)
                clock.time += 0.02
                while await leases(life.house.store) == before:
                    await asyncio.sleep(0.002)
        silence.set()
        run = await until(life, run, *OVER)
        await check_run(life, run, assistant_texts=[ANSWER])
        assert other.requests == []
        assert len(model.requests) == 1


async def test_a_cancel_whose_word_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker that is not told of a cancel sees it in the rows within a second."""
    monkeypatch.setattr("afterglow.runs.worker.SWEEP_S", 0.01)
    model = ScriptedModels()
    model.will([asyncio.Event()])
    async with next_life(tmp_path / "data", model) as life:
        run = await until(life, await start(life), "in_progress")
        await eventually(lambda: len(model.requests) == 1)
        monkeypatch.setattr(life.house.queue, "cancel", lambda run_id: None)
        await life.client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)
        assert (await until(life, run, *OVER)).status == "cancelled"


async def leases(store: Store) -> list[tuple[Any, ...]]:
    return await store.read(lambda tx: tx.fetch("SELECT id, attempt, lease_until FROM runs"))


async def test_a_worker_that_slept_keeps_what_nobody_took(tmp_path: Path):
    """A lease that has run out while its own worker slept is no reason to begin again."""
    silence, model = asyncio.Event(), ScriptedModels()
    model.will([silence, *says(ANSWER)], says("A second run."))
    clock = SetClock()
    async with next_life(tmp_path / "data", model, clock, run_lease_s=LEASE_S) as life:
        run = await until(life, await start(life), "in_progress")
        await eventually(lambda: len(model.requests) == 1)
        clock.time += LEASE_S + 1
        await until(life, await start(life), "completed")  # it has looked for work since
        silence.set()
        run = await until(life, run, *OVER)
        await check_run(life, run, assistant_texts=[ANSWER])
        assert len(model.requests) == 2
        assert (await leases(life.house.store))[0][1] == 1


async def test_what_a_dead_worker_left_expires_at_its_deadline(tmp_path: Path):
    """A run that was left behind long ago ends as expired, and is not begun again."""
    silence, model, clock = asyncio.Event(), ScriptedModels(), SetClock()
    model.will([*says("It is")[:-1], silence])
    async with next_life(tmp_path / "data", model, clock) as life:
        run = await until(life, await start(life), "in_progress")
        await eventually(lambda: len(model.requests) == 1)
    clock.time += 601
    async with next_life(tmp_path / "data", model, clock) as life:
        run = await until(life, run, *OVER)
        assert run.status == "expired"
        await check_run(life, run)
    assert len(model.requests) == 1


# --- a database that fails for a while -------------------------------------------------------------------------


class FailingReads:
    """A store whose next reads fail."""

    def __init__(self, store: Store, times: int) -> None:
        self._store = store
        self.times = times
        self.write = store.write
        self.write_early = store.write_early
        self.close = store.close

    async def read(self, work: Any) -> Any:
        if self.times > 0:
            self.times -= 1
            raise StoreUnavailable("the database is somewhere else")
        return await self._store.read(work)


async def test_a_run_that_was_let_go_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run whose prompt could not be read is tried again, also while its worker is busy with others."""
    monkeypatch.setattr("afterglow.runs.worker.STORE_RETRY_S", 0.01)
    monkeypatch.setattr("afterglow.runs.worker.POLL_S", 0.01)
    silence, model = asyncio.Event(), ScriptedModels()
    model.will([silence, *says("Slowly.")], says(ANSWER))
    async with next_life(tmp_path / "data", model, run_lease_s=LEASE_S) as life:
        slow = await until(life, await start(life), "in_progress")
        await eventually(lambda: len(model.requests) == 1)
        thread = await life.client.beta.threads.create()
        failing = FailingReads(life.house.store, 2)
        life.house.store = failing
        run = await life.client.beta.threads.runs.create(thread.id, assistant_id=slow.assistant_id)
        await eventually(lambda: failing.times == 0)
        run = await until(life, run, *OVER)
        await check_run(life, run, assistant_texts=[ANSWER])
        silence.set()
        await check_run(life, await until(life, slow, *OVER), assistant_texts=["Slowly."])


async def set_page_limit(store: Store, pages: int | None) -> None:
    """Let the database grow no further than this; None: than it is."""

    async def work(tx: Transaction) -> None:
        limit = pages or (await tx.fetch("PRAGMA page_count"))[0][0]
        await tx.fetch(f"PRAGMA max_page_count = {limit}")

    await store.write(work)


@pytest.mark.parametrize("for_s", [1, 60])
async def test_a_full_disk_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, for_s: int
):
    """While the disk is full new requests are refused, and what the model says is kept; with space again all of it
    is stored, in messages and log alike, and the model was asked once, even after more than a lease."""
    monkeypatch.setattr("afterglow.runs.loop.STORE_RETRY_S", 0.01)
    monkeypatch.setattr("afterglow.runs.worker.STORE_RETRY_S", 0.01)
    long = " ".join(f"{number}{'.' * 5000}" for number in range(40))
    full, clock = asyncio.Event(), SetClock()
    model = Storyteller(lambda: [*says("First")[:-1], full, *says(f" {long}")], pause_s=0.001)
    async with next_life(tmp_path / "data", model, clock, event_flush_ms=5, run_lease_s=0.05) as life:
        idle, run = await life.client.beta.threads.create(), await start(life)
        messages = life.client.beta.threads.messages
        while not (await messages.list(run.thread_id, run_id=run.id)).data:
            await asyncio.sleep(0.002)
        await set_page_limit(life.house.store, None)
        with pytest.raises(openai.InternalServerError) as refused:
            await messages.create(idle.id, role="user", content=long)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "30"
        full.set()
        await eventually(lambda: "is not written" in caplog.text)
        clock.time += for_s
        await asyncio.sleep(0.2)  # some rounds of everything that repeats
        assert (await until(life, run, "in_progress")).status == "in_progress"
        with contextlib.suppress(StoreFull):  # it may share a group with work that still meets the old limit
            await set_page_limit(life.house.store, 1_000_000)
        run = await until(life, run, *OVER)
        assert run.status == "completed", run.last_error
        await check_run(life, run, assistant_texts=[f"First {long}"])
    assert model.told == [0]
