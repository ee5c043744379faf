"""What tests of vector stores have in common: files, waiting, and what must be true of the counts at every moment."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from afterglow.contracts import Transaction
from afterglow.objects import FileCounts, VectorStore, VectorStoreFile
from afterglow.rows.vector_stores import get_store
from tests.conftest import Server

CATS = b"Cats sleep through most of the day.\nA cat's whiskers are as wide as the cat."
DOGS = b"Dogs bark at the moon.\nA dog buries its bones."


async def upload(server: Server, data: bytes = CATS, name: str = "cats.txt") -> str:
    return (await server.client.files.create(file=(name, data), purpose="assistants")).id


async def make_store(server: Server, *files: bytes) -> tuple[str, list[str]]:
    """A store with these files, indexed; their names are their numbers."""
    ids = [await upload(server, data, f"{number}.txt") for number, data in enumerate(files)]
    store = await server.client.vector_stores.create(file_ids=ids)
    await settled(server, store.id)
    return store.id, ids


async def settled(server: Server, store_id: str) -> None:
    """Wait until nothing of the store is in progress."""
    async with asyncio.timeout(20):
        while (await server.client.vector_stores.retrieve(store_id)).status == "in_progress":
            await asyncio.sleep(0.002)


async def search(server: Server, store_id: str, query: str = "cat dog", **options: object) -> list[str]:
    """The names of the files that are found, best first, each once."""
    found = await server.client.vector_stores.search(store_id, query=query, **options)
    return list(dict.fromkeys(result.filename for result in found.data))


def indexed_files(server: Server, store_id: str) -> list[str]:
    """The ids of the files that the index holds, as they are on the disk. Where they are in Postgres, the test that
    asks is skipped."""
    if server.house.settings.database_url:
        pytest.skip("the index is in no file")
    [*paths] = Path(server.house.settings.data, "search").glob(f"*/{store_id}.db")
    if not paths:
        return []
    with closing(sqlite3.connect(paths[0])) as connection:
        return [file_id for (file_id,) in connection.execute("SELECT id FROM files ORDER BY number")]


async def check_counts(server: Server, store_id: str) -> FileCounts:
    """What the store says of its files is what its files say, in one moment."""

    async def work(tx: Transaction) -> tuple[VectorStore | None, list[VectorStoreFile]]:
        rows = await tx.fetch("SELECT object FROM vector_store_files WHERE store_id = $1", store_id)
        store = await get_store(tx, "default", store_id, server.house.clock.now())
        return store, [msgspec.json.decode(text, type=VectorStoreFile) for (text,) in rows]

    store, files = await server.house.store.read(work)
    assert store is not None
    counted = Counter(file.status for file in files)
    assert store.file_counts == FileCounts(**counted, total=len(files))
    assert store.usage_bytes == sum(file.usage_bytes for file in files)
    return store.file_counts
