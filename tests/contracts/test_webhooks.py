"""Claims of deliveries by several workers, on both databases."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from msgspec import structs

from afterglow.contracts import Store, Transaction
from afterglow.objects import WebhookDelivery, WebhookEvent
from afterglow.rows import webhooks as rows
from afterglow.rows.webhooks import Claim
from afterglow.store.postgres import PostgresStore
from afterglow.store.sqlite import SqliteStore
from afterglow.webhooks import new_delivery
from tests.postgres import fresh_database

P = "acme"
NOW = 1_700_000_000.0


@pytest.fixture(params=["sqlite", "postgres"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[list[Store], None]:
    """The same database as several processes see it; SQLite's is one process's."""
    async with AsyncExitStack() as opened:
        found: list[Store]
        if request.param == "sqlite":
            found = [SqliteStore(tmp_path / "afterglow.db")] * 3
        else:
            url = await opened.enter_async_context(fresh_database())
            found = [await PostgresStore.open(url, connections=2, pooled=False, silence_s=5) for _ in range(3)]
        for store in {id(store): store for store in found}.values():
            opened.push_async_callback(store.close)
        yield found


def delivery(endpoint_id: str, number: int) -> WebhookDelivery:
    event = WebhookEvent(id=f"evt_{number}", created_at=1, type="thread.run.completed", data={"id": f"run_{number}"})
    return new_delivery(endpoint_id, event, NOW)


async def insert(store: Store, *deliveries: WebhookDelivery, owner_id: str = "thread_1") -> None:
    async def work(tx: Transaction) -> None:
        for number, one in enumerate(deliveries):
            await rows.insert_delivery(tx, P, one, owner_id, number, NOW + number / 1000)

    await store.write(work)


async def claim(
    store: Store, worker: str = "w", now: float = NOW + 1, in_hand: dict[str, int] | None = None, most: int = 100
) -> list[Claim]:
    async def work(tx: Transaction) -> list[Claim]:
        return await rows.claim_deliveries(tx, worker, now, now + 30, 10, in_hand or {}, most)

    return await store.write(work)


async def test_each_delivery_is_claimed_once(stores: list[Store]) -> None:
    """However many workers claim at the same time, nobody gets what another has."""
    await insert(stores[0], *(delivery("whe_a", number) for number in range(60)))

    async def work_off(store: Store, worker: str) -> list[str]:
        ids = []
        while claims := await claim(store, worker):
            ids += [one.delivery.id for one in claims]
        return ids

    taken = await asyncio.gather(*(work_off(store, f"w{number}") for number, store in enumerate(stores)))
    counts = Counter(one for ids in taken for one in ids)
    assert len(counts) == 60
    assert set(counts.values()) == {1}


async def test_a_claim_that_was_lost_writes_nothing(stores: list[Store]) -> None:
    """After its time a delivery is somebody else's, and the first may not say how it went."""
    await insert(stores[0], delivery("whe_a", 1))
    [first] = await claim(stores[0], "w1")
    assert await claim(stores[1], "w2") == []
    [second] = await claim(stores[1], "w2", now=NOW + 40)
    assert second.number == first.number + 1
    done = structs.replace(first.delivery, status="delivered")
    assert not await stores[0].write(lambda tx: rows.close_claim(tx, first, done, None))
    assert await stores[1].write(lambda tx: rows.close_claim(tx, second, done, None))
    assert await claim(stores[2], now=NOW + 1000) == []


async def test_one_endpoint_does_not_take_all(stores: list[Store]) -> None:
    """A worker claims a few deliveries of one endpoint and goes on to others, however many wait before them."""
    await insert(stores[0], *(delivery("whe_a", number) for number in range(30)))
    await insert(stores[0], *(delivery("whe_b", number) for number in range(2)))
    first = endpoints(await claim(stores[0], most=3))
    assert first.count("whe_a") == 3
    second = endpoints(await claim(stores[0], in_hand={"whe_a": 3}, most=3))
    assert "whe_a" not in second
    assert (first + second).count("whe_b") == 2


def endpoints(claims: list[Claim]) -> list[str]:
    return [one.delivery.webhook_endpoint_id for one in claims]


async def test_a_deletion_in_the_same_moment_wins(stores: list[Store]) -> None:
    """A thread that is deleted while its event is under way leaves the log, whatever the try's outcome is."""
    await insert(stores[0], delivery("whe_a", 1))
    [held] = await claim(stores[0])
    done = structs.replace(held.delivery, status="delivered")
    await asyncio.gather(
        stores[1].write(lambda tx: rows.forget_events(tx, P, "thread_1")),
        stores[0].write(lambda tx: rows.close_claim(tx, held, done, None)),
    )
    left = await stores[2].read(lambda tx: rows.get_delivery(tx, P, "whe_a", held.delivery.id))
    assert left is not None
    assert left.event is None
    assert left.status in ("cancelled", "delivered")


async def test_what_a_process_had_is_free_at_its_next_start(stores: list[Store]) -> None:
    """As it is when it was put back untried."""
    await insert(stores[0], delivery("whe_a", 1), delivery("whe_a", 2))
    held = await claim(stores[0])
    await stores[0].write(lambda tx: rows.put_back(tx, held[:1], NOW))
    assert [one.delivery.id for one in await claim(stores[1])] == [held[0].delivery.id]
    assert await stores[0].write(rows.release_deliveries) == 2
    assert len(await claim(stores[1])) == 2
