"""What events among processes that share a Postgres promise beyond `contracts.Events`: words may be lost, memory is
bounded, and whatever is committed in whichever order, followers elsewhere get it in the log's order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager

import pytest

from afterglow.contracts import DELETED, START, News, Position, Segment, Transaction
from afterglow.events import postgres
from afterglow.events.postgres import GONE_ATTEMPT, PostgresEvents
from afterglow.rows.runs import list_abandoned
from afterglow.store.notify import Notifier
from afterglow.store.postgres import PostgresStore
from afterglow.testing import SetClock
from tests.contracts.test_events import PROJECT, Writer, following, until_stop
from tests.postgres import own_postgres

GONE = b"event: gone\n\n"


class WatchedStore:
    """A store whose writes can be made slow. reads: how many there were."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store
        self.reads = 0
        self.slow_s = 0.0
        self.writing = asyncio.Event()
        self.close = store.close

    async def read(self, work):  # type: ignore[no-untyped-def]
        self.reads += 1
        return await self._store.read(work)

    async def write(self, work, *, rowwise=False):  # type: ignore[no-untyped-def]
        slow_s, self.slow_s = self.slow_s, 0.0

        async def slowly(tx: Transaction) -> object:
            result = await work(tx)
            self.writing.set()
            await tx.fetch(f"SELECT pg_sleep({slow_s})")
            return result

        return await self._store.write(slowly if slow_s else work, rowwise=rowwise)


class Process:
    """Store and events as one process has them. deaf: no word reaches it, and none leaves it."""

    def __init__(self, url: str, store: PostgresStore, *, deaf: bool, flush_ms: int) -> None:
        self.store = WatchedStore(store)
        self.notifier = Notifier(url)
        self.deaf = deaf
        self.events = PostgresEvents(
            self.store,  # type: ignore[arg-type]
            SetClock(),
            self.notifier,
            gone=GONE,
            flush_ms=flush_ms,
            keep_alive_s=60,
        )

    async def start(self) -> None:
        self.events.start()
        if not self.deaf:
            self.notifier.start()
            await self.notifier.connected()

    async def close(self) -> None:
        await self.events.close()
        await self.notifier.close()
        await self.store.close()

    async def writer(self) -> Writer:
        return await Writer(self.store, self.events).start()  # type: ignore[arg-type]


@asynccontextmanager
async def process(url: str, *, deaf: bool = False, flush_ms: int = 1) -> AsyncGenerator[Process, None]:
    store = await PostgresStore.open(url, connections=4, pooled=False)
    made = Process(url, store, deaf=deaf, flush_ms=flush_ms)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def test_text_in_flight_comes_before_what_a_transaction_adds(database_url: str):
    """A transaction that ends while a batch with earlier text of the same run is still being written does not get
    ahead of it, for those who follow elsewhere and for replay."""
    async with process(database_url) as here, process(database_url) as there:
        for _ in range(3):
            writer = await here.writer()
            live = following(there.events, writer.run_id)
            await writer.commits()
            here.store.writing.clear()
            here.store.slow_s = 0.05
            writer.streams(3)
            await here.store.writing.wait()
            writer.streams(2)
            await writer.commits(1, "end")
            assert await live == writer.bytes_after(START) == await writer.stored()


async def test_a_batch_that_was_overtaken_writes_nothing_twice(database_url: str):
    """When the transaction was first, the batch finds its rows there."""
    async with process(database_url, flush_ms=5) as here:
        writer = await here.writer()
        for _ in range(20):
            writer.streams(2)
            await asyncio.sleep(0.004)
            await writer.commits()
        await writer.commits(1, "end")
        await here.events.close()
        assert await writer.stored() == writer.bytes_after(START)


async def is_abandoned(store: WatchedStore, run_id: str) -> bool:
    rows = await store.write(lambda tx: list_abandoned(tx, 1, 100))
    return run_id in {row.run.id for row in rows}


async def leave(store: WatchedStore, run_id: str) -> None:
    """Its lease has run out, though whoever had it is still at it."""
    held = "UPDATE runs SET status = 'in_progress', worker = 'w', lease_until = 0 WHERE id = $1"
    await store.write(lambda tx: tx.execute(held, run_id))


async def test_a_run_is_not_taken_over_while_its_text_is_being_written(database_url: str):
    """Whoever takes over has all that the one before has written: text that is in flight is waited for."""
    async with process(database_url) as here, process(database_url) as there:
        writer = await here.writer()
        await leave(here.store, writer.run_id)
        here.store.slow_s = 0.05
        writer.streams(3)
        await here.store.writing.wait()
        assert not await is_abandoned(there.store, writer.run_id)
        await writer.is_written()
        assert await is_abandoned(there.store, writer.run_id)


async def test_text_that_comes_while_its_run_is_taken_over_is_not_written(database_url: str):
    """From the moment that a run is taken over, nothing more of the attempt before gets into its log."""
    async with process(database_url) as here, process(database_url) as there:
        writer = await here.writer()
        await leave(here.store, writer.run_id)

        async def take_over(tx: Transaction) -> None:
            await list_abandoned(tx, 1, 100)
            await tx.execute("UPDATE runs SET attempt = attempt + 1 WHERE id = $1", writer.run_id)

        there.store.slow_s = 0.05
        taking_over = asyncio.create_task(there.store.write(take_over))
        await there.store.writing.wait()
        writer.streams(3)
        await taking_over
        await here.events.close()
        assert await writer.stored() == b""


async def test_lost_words_are_made_up_for(database_url: str, monkeypatch: pytest.MonkeyPatch):
    """A process that hears nothing gets everything all the same, a little later."""
    monkeypatch.setattr(postgres, "POLL_S", 0.05)
    async with process(database_url) as here, process(database_url, deaf=True) as there:
        writer = await here.writer()
        live = following(there.events, writer.run_id)
        await writer.commits(2)
        writer.streams(3)
        await writer.commits(2, "end")
        assert await live == writer.bytes_after(START)


async def test_lost_words_of_what_is_watched_are_made_up_for(database_url: str, monkeypatch: pytest.MonkeyPatch):
    """A process that hears nothing learns of the statuses of runs, files and batches all the same, and of what is
    gone; all that is watched is read together."""
    monkeypatch.setattr(postgres, "POLL_S", 0.05)
    async with process(database_url, deaf=True) as there:
        writers = [await there.writer() for _ in range(20)]
        work = "UPDATE runs SET status = 'completed' WHERE id = $1"
        batch = "INSERT INTO file_batches (project_id, id, store_id, created_at) VALUES ($1, 'vsfb_over', 'vs_1', 0)"
        await there.store.write(lambda tx: tx.execute(batch, PROJECT))
        with ExitStack() as opened:
            watches = [opened.enter_context(there.events.watch("run", PROJECT, one.run_id)) for one in writers]
            gone = opened.enter_context(there.events.watch("run", PROJECT, "run_gone"))
            file = opened.enter_context(there.events.watch("file", PROJECT, "file-gone", "vs_1"))
            over = opened.enter_context(there.events.watch("batch", PROJECT, "vsfb_over", "vs_1"))
            tasks = [asyncio.create_task(watch.next("queued", 10)) for watch in watches]
            assert await gone.next("queued", 10) == await file.next("in_progress", 10) == News(DELETED)
            assert await over.next("in_progress", 10) == News()
            assert not any(task.done() for task in tasks)
            reads = there.store.reads
            for writer in writers:
                await there.store.write(lambda tx, run_id=writer.run_id: tx.execute(work, run_id))
            assert set(await asyncio.gather(*tasks)) == {News("completed")}
            assert there.store.reads - reads < len(writers)


async def test_one_read_serves_all_runs(database_url: str):
    """What fifty runs say at once is read for all of them together."""
    async with process(database_url, flush_ms=20) as here, process(database_url) as there:
        writers = [await here.writer() for _ in range(50)]
        live = [following(there.events, writer.run_id) for writer in writers]
        for writer in writers:
            writer.streams(2)
        await asyncio.gather(*(writer.is_written() for writer in writers))
        for writer in writers:
            await writer.commits(1, "end")
        assert await asyncio.gather(*live) == [writer.bytes_after(START) for writer in writers]
        assert there.store.reads < 60  # one each would be 150


async def test_a_deleted_run_is_told_elsewhere(database_url: str):
    """Whoever follows a run in another process than the one that deletes it is told its end."""
    async with process(database_url) as here, process(database_url) as there:
        writer = await here.writer()
        live = following(there.events, writer.run_id)
        await writer.commits(2)
        async with aclosing(there.events.follow(PROJECT, writer.run_id, START)) as batches:
            await anext(batches)
        run_id = writer.run_id
        await here.store.write(lambda tx: tx.execute("DELETE FROM events WHERE run_id = $1", run_id))
        await here.store.write(lambda tx: tx.execute("DELETE FROM runs WHERE id = $1", run_id))
        here.events.announce(PROJECT, run_id, Segment(GONE_ATTEMPT, 1, 1, GONE, "end"))
        assert await live == writer.bytes_after(START) + GONE


async def test_whoever_is_slow_costs_no_memory(database_url: str, monkeypatch: pytest.MonkeyPatch):
    """A follower that does not read keeps nothing of the log in memory but its newest part, and gets all of it."""
    monkeypatch.setattr(postgres, "WINDOW_BYTES", 2000)
    monkeypatch.setattr(postgres, "ROWS_PER_RUN", 7)
    monkeypatch.setattr(postgres, "READ", postgres.READ.replace("LIMIT 256", "LIMIT 7"))
    async with process(database_url) as here, process(database_url) as there:
        writer = await here.writer()
        async with AsyncExitStack() as stack:
            slow = []
            for one in (here, there):
                batches = await stack.enter_async_context(aclosing(one.events.follow(PROJECT, writer.run_id, START)))
                await writer.commits()
                slow.append((batches, await anext(batches)))
            quick = following(there.events, writer.run_id)
            for _ in range(40):
                writer.streams(3)
                await writer.commits()
            await writer.commits(1, "end")
            await quick
            for one in (here, there):
                [feed] = one.events._feeds.values()
                assert feed.size <= 2000
            for batches, first in slow:
                got = b"".join(segment.data for segment in first)
                while not got.endswith(writer.said[-1].data):
                    got += b"".join(segment.data for segment in await anext(batches))
                assert got == writer.bytes_after(START)


async def test_a_place_that_never_was_disturbs_nobody(database_url: str):
    """Someone who names a place beyond the log waits alone, until the run is over; all others get what comes."""
    async with process(database_url) as here:
        writer = await here.writer()
        await writer.commits(2)
        waiting = [following(here.events, writer.run_id, place) for place in (Position(7, 0), Position(2**70, 2**70))]
        await asyncio.sleep(0.01)
        live = following(here.events, writer.run_id)
        await asyncio.sleep(0.01)
        writer.streams(3)
        writer.streams(1)
        await writer.commits(1, "end")
        assert await live == writer.bytes_after(START)
        assert await asyncio.gather(*waiting) == [b"", b""]


async def test_a_run_that_changes_hands_is_followed_through(database_url: str):
    """Three processes go on with a run in turn; followers in each of them get all of it in order."""
    async with process(database_url) as one, process(database_url) as two, process(database_url) as three:
        writer = await one.writer()
        live = [following(each.events, writer.run_id) for each in (one, two, three)]
        for each in (two, three, one, two):
            writer.events = each.events
            await writer.is_taken_over()
            await writer.commits(2)
            writer.streams(2)
            await writer.commits()
        await writer.commits(1, "end")
        for got in await asyncio.gather(*live):
            assert got == writer.bytes_after(START)


async def test_nothing_is_kept_of_runs_that_nobody_follows(database_url: str, monkeypatch: pytest.MonkeyPatch):
    """A process without followers lets go of what it announced, also while the run goes on."""
    monkeypatch.setattr(postgres, "POLL_S", 0.01)
    async with process(database_url) as here:
        writer = await here.writer()
        await writer.commits(2)
        writer.streams(2)
        while here.events._feeds:
            await asyncio.sleep(0.005)
        await writer.commits(1, "end")
        assert await until_stop(here.events, writer.run_id) == writer.bytes_after(START)


@pytest.mark.slow
async def test_a_restart_of_postgres_loses_nothing():
    """Postgres is killed in the midst of a stream and comes back: followers in both processes get all, once."""
    with own_postgres() as server:
        async with process(server.url()) as here, process(server.url()) as there:
            writer = await here.writer()
            live = [following(each.events, writer.run_id) for each in (here, there)]
            await writer.commits(2)
            writer.streams(3)
            await writer.is_written()
            server.stop()
            writer.streams(3)
            await asyncio.sleep(0.5)
            writer.streams(1)
            server.start()
            await writer.is_written()
            await writer.commits(1, "end")
            for got in await asyncio.gather(*live):
                assert got == writer.bytes_after(START)
