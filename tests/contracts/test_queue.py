"""What `contracts.RunQueue` promises: whoever waits is woken by what was queued, and cancels are heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from afterglow.contracts import RunQueue
from afterglow.queue.local import LocalQueue
from afterglow.queue.postgres import PostgresQueue
from afterglow.store.notify import Notifier

LONG_S = 60.0  # longer than any test: who waits for it was not woken


@asynccontextmanager
async def local_queue(url: str) -> AsyncGenerator[RunQueue, None]:
    yield LocalQueue()


@asynccontextmanager
async def joined_queue(url: str) -> AsyncGenerator[PostgresQueue, None]:
    """The queue of one process."""
    notifier = Notifier(url)
    made = PostgresQueue(notifier, "runs")
    notifier.start()
    try:
        await notifier.connected()
        await made.wait(LONG_S)  # that it is connected wakes it
        yield made
    finally:
        await notifier.close()


class Apart:
    """Two processes as one: the one wakes and cancels, the other waits and listens."""

    def __init__(self, teller: RunQueue, worker: RunQueue) -> None:
        self.wake = teller.wake
        self.cancel = teller.cancel
        self.wait = worker.wait
        self.on_cancel = worker.on_cancel


@asynccontextmanager
async def queues_apart(url: str) -> AsyncGenerator[RunQueue, None]:
    async with joined_queue(url) as teller, joined_queue(url) as worker:
        yield Apart(teller, worker)


# A new kind of queue is another entry here.
KINDS = {"local": local_queue, "postgres": joined_queue, "apart": queues_apart}
IN_ONE_PROCESS = pytest.mark.parametrize("kind", ["local", "postgres"])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(request: pytest.FixtureRequest, kind: str) -> str:
    return "" if kind == "local" else str(request.getfixturevalue("database_url"))


@pytest.fixture
async def queue(kind: str, url: str) -> AsyncGenerator[RunQueue, None]:
    async with KINDS[kind](url) as made:
        yield made


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not true():
            await asyncio.sleep(0.001)


async def test_a_waiter_is_woken(queue: RunQueue):
    """`wake` ends a wait that is under way."""
    waiting = asyncio.create_task(queue.wait(LONG_S))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.wake()
    await waiting


@IN_ONE_PROCESS
async def test_what_was_queued_before_is_not_missed(queue: RunQueue):
    """A wake since the last wait ends the next one at once, and only that one, however many there were."""
    queue.wake()
    queue.wake()
    await queue.wait(LONG_S)
    waiting = asyncio.create_task(queue.wait(LONG_S))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.wake()
    await waiting


async def test_waiting_ends_by_itself(queue: RunQueue):
    """Without a wake the wait ends after its time, and again."""
    await queue.wait(0.001)
    await queue.wait(0.001)
    queue.wake()
    await queue.wait(LONG_S)


async def test_a_wait_that_was_given_up_loses_no_wake(queue: RunQueue):
    """After a cancelled wait the next wake is heard."""
    waiting = asyncio.create_task(queue.wait(LONG_S))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    queue.wake()
    await queue.wait(LONG_S)


async def test_no_wake_is_lost_between_looking_and_waiting(queue: RunQueue):
    """A worker that looks after each wait finds all of a thousand things queued beside it."""
    queued, found = 0, 0

    async def put() -> None:
        nonlocal queued
        for number in range(1000):
            queued += 1
            queue.wake()
            if number % 7 == 0:
                await asyncio.sleep(0)

    async def work() -> None:
        nonlocal found
        while found < 1000:
            await queue.wait(LONG_S)
            found = queued

    async with asyncio.timeout(LONG_S / 2):
        await asyncio.gather(work(), put())


async def test_cancels_reach_every_listener(queue: RunQueue):
    """Each cancel is told to all who listen, with its run."""
    heard: list[tuple[str, str]] = []
    queue.on_cancel(lambda run_id: heard.append(("a", run_id)))
    queue.on_cancel(lambda run_id: heard.append(("b", run_id)))
    queue.cancel("run_1")
    queue.cancel("run_2")
    await until(lambda: len(heard) == 4)
    assert heard == [("a", "run_1"), ("b", "run_1"), ("a", "run_2"), ("b", "run_2")]


@IN_ONE_PROCESS
async def test_cancels_are_heard_at_once_in_their_own_process(queue: RunQueue):
    """Who cancels a run that is executed in the same process waits for no database."""
    heard: list[str] = []
    queue.on_cancel(heard.append)
    queue.cancel("run_1")
    assert heard == ["run_1"]


async def test_a_cancel_that_nobody_hears_is_no_error(queue: RunQueue):
    """Without a worker in this process there is nobody to tell."""
    queue.cancel("run_1")


async def test_no_process_hears_its_own_word_twice(database_url: str):
    """Of three processes, the one that cancels tells its own listeners once, and so do the others."""
    heard: list[str] = []
    async with (
        joined_queue(database_url) as one,
        joined_queue(database_url) as two,
        joined_queue(database_url) as three,
    ):
        for name, queue in (("one", one), ("two", two), ("three", three)):
            queue.on_cancel(lambda run_id, name=name: heard.append(f"{name} {run_id}"))
        one.cancel("run_1")
        two.cancel("run_2")
        await until(lambda: len(heard) >= 6)
        three.cancel("last")
        await until(lambda: len(heard) >= 9)
    assert sorted(heard) == sorted(
        f"{name} {run}" for name in ("one", "two", "three") for run in ("run_1", "run_2", "last")
    )


async def test_queues_do_not_mix(database_url: str):
    """What is said on one queue is not heard on another of the same database."""
    heard: list[str] = []
    teller, worker = Notifier(database_url), Notifier(database_url)
    runs, files = PostgresQueue(teller, "runs"), PostgresQueue(teller, "files")
    for name in ("runs", "files"):
        PostgresQueue(worker, name).on_cancel(lambda key, name=name: heard.append(f"{name} {key}"))
    for notifier in (teller, worker):
        notifier.start()
        await notifier.connected()
    runs.cancel("run_1")
    files.cancel("vs_1")
    await until(lambda: len(heard) == 2)
    for notifier in (teller, worker):
        await notifier.close()
    assert sorted(heard) == ["files vs_1", "runs run_1"]
