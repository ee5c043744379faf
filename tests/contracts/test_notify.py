"""What `store/notify.py` promises: words reach the other processes, whatever happens to the connection, and nobody
waits for it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import asyncpg
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.store import notify
from afterglow.store.notify import PAYLOAD_BYTES, Notifier, packed
from tests.postgres import fresh_database, own_postgres

PATIENCE_S = 20.0
CHANNEL = "test words"


class Ear:
    """A process that listens. heard: the words, in order. returned: how often its connection was made."""

    def __init__(self, url: str) -> None:
        self.notifier = Notifier(url)
        self.payloads: list[list[str]] = []
        self.returned = 0
        self.notifier.listen(CHANNEL, self.payloads.append)
        self.notifier.on_return(self._return)

    def _return(self) -> None:
        self.returned += 1

    @property
    def heard(self) -> list[str]:
        return [word for words in self.payloads for word in words]

    async def hears(self, *words: str) -> None:
        await until(lambda: set(words) <= set(self.heard))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def ear(url: str) -> AsyncGenerator[Ear, None]:
    made = Ear(url)
    made.notifier.start()
    try:
        await made.notifier.connected()
        yield made
    finally:
        await made.notifier.close()


async def test_words_reach_all_others_in_order(database_url: str):
    """Every other process hears each word, in the order of saying, and the one that says them hears nothing."""
    words = [f"run_{number}" for number in range(1000)]
    async with ear(database_url) as one, ear(database_url) as two, ear(database_url) as three:
        for word in words:
            one.notifier.notify(CHANNEL, word)
        await two.hears(words[-1])
        await three.hears(words[-1])
        assert two.heard == three.heard == words
        assert one.heard == []


async def test_words_said_together_leave_together(database_url: str):
    """A thousand words said at once, some of them often, come as a few payloads with each word once."""
    async with ear(database_url) as one, ear(database_url) as two:
        for number in range(3000):
            one.notifier.notify(CHANNEL, f"run_{number % 1000}")
        await two.hears("run_999")
        assert sorted(two.heard) == sorted(f"run_{number}" for number in range(1000))
        assert len(two.payloads) < 10


async def test_nobody_hears_what_is_said_elsewhere(database_url: str):
    """Channels, and databases, do not mix."""
    async with (
        fresh_database(migrated=False) as other_url,
        ear(other_url) as other,
        ear(database_url) as one,
        ear(database_url) as two,
    ):
        one.notifier.notify("another channel", "run_1")
        other.notifier.notify(CHANNEL, "run_2")
        one.notifier.notify(CHANNEL, "run_3")
        await two.hears("run_3")
        assert two.heard == ["run_3"]


async def test_what_is_said_before_there_is_a_connection_is_not_lost(database_url: str):
    """Words wait for the connection."""
    async with ear(database_url) as hearing:
        early = Notifier(database_url)
        early.notify(CHANNEL, "run_1")
        early.start()
        await hearing.hears("run_1")
        await early.close()


async def test_the_last_words_leave_before_the_end(database_url: str):
    """What was said just before `close` is still heard."""
    async with ear(database_url) as hearing:
        async with ear(database_url) as saying:
            saying.notifier.notify(CHANNEL, "last")
        await hearing.hears("last")


async def test_a_lost_connection_is_made_again(database_url: str, monkeypatch: pytest.MonkeyPatch):
    """After the server has ended both connections, whoever listens is told, and words pass again, with those that were
    said meanwhile."""
    monkeypatch.setattr(notify, "FIRST_BACK_OFF_S", 0.01)
    async with ear(database_url) as one, ear(database_url) as two:
        administrator = await asyncpg.connect(database_url)
        await administrator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'afterglow'"
        )
        await until(lambda: one.returned == two.returned == 2)
        one.notifier.notify(CHANNEL, "run_1")
        await two.hears("run_1")
        await administrator.close()


async def test_a_database_that_is_away_stops_nobody(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Without a database words are taken, up to a bound, and the end comes at once."""
    monkeypatch.setattr(notify, "WORDS_WAITING", 10)
    away = Notifier(f"postgresql://postgres@/none?host={tmp_path}")
    away.start()
    for number in range(100):
        away.notify(CHANNEL, str(number))
    await asyncio.sleep(0.02)
    assert len(away._waiting) == 10
    async with asyncio.timeout(1):
        await away.close()


async def test_closing_what_was_not_started_is_no_error():
    """A process that ends while it starts has nothing to wait for."""
    await Notifier("postgresql://nowhere/none").close()


@pytest.mark.slow
async def test_a_restart_of_the_server_is_survived():
    """When Postgres was killed and started again, words pass between the same processes as before."""
    with own_postgres() as postgres:
        async with ear(postgres.url()) as one, ear(postgres.url()) as two:
            postgres.stop()
            one.notifier.notify(CHANNEL, "said meanwhile")
            await asyncio.sleep(0.3)
            postgres.start()
            await until(lambda: one.returned == two.returned == 2)
            one.notifier.notify(CHANNEL, "said after")
            await two.hears("said after")


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.text(max_size=60)), max_size=400))
def test_payloads_are_no_longer_than_postgres_takes(words: list[tuple[str, str]]):
    """Whatever the words, each payload fits, and together they say all words of a channel in order."""
    said = defaultdict(list)
    channels, payloads = packed(words)
    for channel, payload in zip(channels, payloads, strict=True):
        assert len(payload.encode()) <= PAYLOAD_BYTES
        said[channel] += msgspec.json.decode(payload)
    assert said == {
        channel: [word for other, word in words if other == channel] for channel in {channel for channel, _ in words}
    }
