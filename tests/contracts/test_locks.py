"""Locks that processes on one Postgres share: one holder, whatever becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import asyncpg
import pytest

from afterglow.errors import StoreUnavailable
from afterglow.store import locks as locks_module
from afterglow.store.locks import PostgresLocks
from tests.postgres import fresh_database


@pytest.fixture
async def url() -> AsyncGenerator[str, None]:
    async with fresh_database(migrated=False) as fresh:
        yield fresh


@pytest.fixture
async def both(url: str) -> AsyncGenerator[tuple[PostgresLocks, PostgresLocks], None]:
    """Those of two processes."""
    async with AsyncExitStack() as opened:
        made = PostgresLocks(url), PostgresLocks(url)
        for locks in made:
            opened.push_async_callback(locks.close)
        yield made


async def somebody_waits(url: str) -> None:
    connection = await asyncpg.connect(url)
    async with asyncio.timeout(10):
        while not await connection.fetchval("SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"):
            await asyncio.sleep(0.005)
    await connection.close()


async def test_one_holder_among_all_processes(url: str, both: tuple[PostgresLocks, PostgresLocks]):
    """Whoever comes second waits for the first; another name is free."""
    here, there = both
    order: list[str] = []

    async def second() -> None:
        async with there.hold("vs_1"):
            order.append("second")

    async with here.hold("vs_1"):
        waiting = asyncio.create_task(second())
        await somebody_waits(url)
        async with there.hold("vs_2"):
            order.append("first")
    await waiting
    assert order == ["first", "second"]


async def test_a_holder_that_stands_still_does_not_stop_the_others_for_ever(
    both: tuple[PostgresLocks, PostgresLocks], monkeypatch: pytest.MonkeyPatch
):
    """Whoever waits for a process that was stopped hears StoreUnavailable after a while, and can have it later."""
    here, there = both
    monkeypatch.setitem(locks_module.SETTINGS, "lock_timeout", "50ms")
    async with here.hold("vs_1"):
        with pytest.raises(StoreUnavailable, match="lock"):
            async with there.hold("vs_1"):
                pass
    async with there.hold("vs_1"):
        pass


async def test_whoever_is_cancelled_while_it_waits_holds_nothing(url: str, both: tuple[PostgresLocks, PostgresLocks]):
    """The lock goes to the next one."""
    here, there = both

    async def wait() -> None:
        async with there.hold("vs_1"):
            raise AssertionError("it is held")

    async with here.hold("vs_1"):
        waiting = asyncio.create_task(wait())
        await somebody_waits(url)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
    async with here.hold("vs_1"), there.hold("vs_2"):
        pass


async def test_a_holder_whose_connection_is_lost_holds_nothing(url: str, both: tuple[PostgresLocks, PostgresLocks]):
    """A process that dies keeps nobody waiting."""
    here, there = both
    connection = await asyncpg.connect(url)
    async with here.hold("vs_1"):
        ends = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
        assert await connection.fetchval(ends)
        async with asyncio.timeout(10), there.hold("vs_1"):
            pass
    async with here.hold("vs_1"):
        pass
    await connection.close()
