"""The words of messages: both databases find the same, whatever was written, deleted, and by whom at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from afterglow.contracts import Store
from afterglow.objects import Message, Thread
from afterglow.rows import message_words, messages, threads
from afterglow.rows.message_words import Wanted
from afterglow.store.postgres import PostgresStore
from afterglow.store.sqlite import SqliteStore
from tests.postgres import fresh_database

P = "default"
WORDS = ["amber", "birch", "cedar", "dune", "elm", "fir", "東京", "ginkgo"]


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Store, None]:
    if request.param == "sqlite":
        opened: Any = SqliteStore(tmp_path / "afterglow.db")
        yield opened
        await opened.close()
        return
    async with fresh_database() as url:
        opened = await PostgresStore.open(url, connections=4, pooled=False)
        yield opened
        await opened.close()


async def say(store: Store, number: int, text: str, thread_id: str = "thread_0") -> None:
    content = [{"type": "text", "text": {"value": text, "annotations": []}}]
    message = Message(id=f"msg_{number:05}", created_at=number, thread_id=thread_id, role="user", content=content)
    await store.write(lambda tx: messages.insert_message(tx, P, message, number))


async def index_some(store: Store, limit: int = 1000) -> int:
    async def work(tx: Any) -> int:
        unindexed = await message_words.list_unindexed(tx, limit)
        return await message_words.index_messages(tx, P, unindexed)

    return await store.write(work)


async def clean(store: Store) -> bool:
    cleaning = await store.read(message_words.read_cleaning)
    if cleaning is not None:
        await store.write(lambda tx: message_words.clean(tx, cleaning))
    return cleaning is not None


async def find(store: Store, *words: str, **cursor: Any) -> list[str]:
    page = {"limit": 1000, "order": "desc", "after": None, "before": None, **cursor}
    found = await store.read(partial(message_words.find_messages, project=P, wanted=Wanted(words), **page))
    return found.ids


async def check(store: Store, said: dict[str, set[str]]) -> None:
    """What is found by any one or two words is what was said with them, newest first."""
    for first in WORDS:
        for second in WORDS:
            expected = sorted((name for name, words in said.items() if {first, second} <= words), reverse=True)
            assert await find(store, *{first, second}) == expected, (first, second)


async def test_what_is_found_is_what_was_said(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Through blocks and batches of any size, deletes of messages and threads, and cleaning in between."""
    monkeypatch.setattr(message_words, "BLOCK", 16)
    chance = random.Random(7)
    said: dict[str, set[str]] = {}
    places: dict[str, str] = {}
    for number in range(3):
        thread = Thread(id=f"thread_{number}", created_at=1)
        await store.write(lambda tx, thread=thread, number=number: threads.insert_thread(tx, P, thread, number))
    for number in range(120):
        words = set(chance.sample(WORDS, chance.randint(1, 4)))
        thread_id = f"thread_{chance.randrange(3)}"
        await say(store, number, " ".join(words), thread_id)
        said[f"msg_{number:05}"] = words
        places[f"msg_{number:05}"] = thread_id
        if number % 9 == 0:
            while await index_some(store, chance.randint(1, 40)):
                pass
        if number % 13 == 0:
            gone = chance.choice(list(said))
            await store.write(partial(messages.delete_message, project=P, thread_id=places[gone], message_id=gone))
            del said[gone]
        if number % 31 == 0:
            await clean(store)
    await index_some(store)
    await check(store, said)
    await store.write(partial(threads.delete_thread, project=P, thread_id="thread_1"))
    said = {name: words for name, words in said.items() if places[name] != "thread_1"}
    await check(store, said)
    while await clean(store):
        pass
    await check(store, said)
    rows = await store.read(lambda tx: tx.fetch("SELECT places FROM message_terms"))
    words_left = sum(len(bytes(packed)) // 2 for (packed,) in rows)
    assert words_left == sum(len(words) + ("東京" in words) * 2 for words in said.values())


async def test_deleting_while_it_is_being_indexed(store: Store):
    """A message that is deleted at the very moment in which it is indexed is found by nobody, and leaves no word."""
    thread = Thread(id="thread_0", created_at=1)
    await store.write(lambda tx: threads.insert_thread(tx, P, thread, 1))
    for round in range(5):
        for number in range(20):
            await say(store, round * 20 + number, "amber birch")
        deletes = [
            store.write(
                partial(messages.delete_message, project=P, thread_id="thread_0", message_id=f"msg_{number:05}")
            )
            for number in range(round * 20, round * 20 + 20)
        ]
        await asyncio.gather(index_some(store, 5), *deletes)
        while await index_some(store):
            pass
        assert await find(store, "amber") == []
    while await clean(store):
        pass
    for table in ("unindexed_messages", "indexed_messages", "message_terms", "removed_messages"):
        assert await store.read(lambda tx, table=table: tx.fetch(f"SELECT * FROM {table}")) == []


async def test_a_page_reads_no_more_than_it_needs(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A page of a word that all messages have takes seven statements, however many messages there are."""
    monkeypatch.setattr(message_words, "BLOCK", 32)
    for number in range(300):
        await say(store, number, "amber")
    while await index_some(store):
        pass
    assert await count_statements(store, 20, Wanted(["amber"])) <= 7


async def test_one_thread_is_searched_alone(store: Store, monkeypatch: pytest.MonkeyPatch):
    """What other threads say costs a search of one thread nothing, however common the word is."""
    monkeypatch.setattr(message_words, "BLOCK", 32)
    for number in range(300):
        await say(store, number, "amber", "thread_1" if number in (3, 150, 151) else "thread_0")
    while await index_some(store):
        pass
    assert await count_statements(store, 3, Wanted(["amber"], thread_id="thread_1")) <= 8
    assert await count_statements(store, 0, Wanted(["amber"], thread_id="thread_none")) <= 2


async def count_statements(store: Store, finds: int, wanted: Wanted) -> int:
    """Of a search that finds so many."""
    statements: list[str] = []

    async def work(tx: Any) -> list[str]:
        class Watched:
            async def fetch(self, sql: str, *values: Any) -> Any:
                statements.append(sql)
                return await tx.fetch(sql, *values)

        watched: Any = Watched()
        found = await message_words.find_messages(watched, P, wanted, limit=20, order="desc", after=None, before=None)
        return found.ids

    assert len(await store.read(work)) == finds
    return len(statements)
