"""What `contracts.RunQueue` promises: whoever waits is woken by what was queued, and cancels are heard."""

from __future__ import annotations

import asyncio

import pytest

from afterglow.contracts import RunQueue
from afterglow.queue.local import LocalQueue

LONG_S = 60.0  # longer than any test: who waits for it was not woken


@pytest.fixture(params=[LocalQueue])
def queue(request: pytest.FixtureRequest) -> RunQueue:
    """A new kind of queue is another `params`."""
    made: RunQueue = request.param()
    return made


async def test_a_waiter_is_woken(queue: RunQueue):
    """`wake` ends a wait that is under way."""
    waiting = asyncio.create_task(queue.wait(LONG_S))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.wake()
    await waiting


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


def test_cancels_reach_every_listener(queue: RunQueue):
    """Each cancel is told to all who listen, with its run."""
    heard: list[tuple[str, str]] = []
    queue.on_cancel(lambda run_id: heard.append(("a", run_id)))
    queue.on_cancel(lambda run_id: heard.append(("b", run_id)))
    queue.cancel("run_1")
    queue.cancel("run_2")
    assert heard == [("a", "run_1"), ("b", "run_1"), ("a", "run_2"), ("b", "run_2")]


def test_a_cancel_that_nobody_hears_is_no_error(queue: RunQueue):
    """Without a worker in this process there is nobody to tell."""
    queue.cancel("run_1")
