"""Both search indexes opened for a test, and short words for what is asked of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from afterglow.contracts import Chunk, Hit, SearchIndex
from afterglow.search.embedded import EmbeddedIndex
from afterglow.search.postgres import PostgresIndex
from afterglow.search.ranking import pack_vector
from afterglow.search.statements import TABLES, WRITE
from tests.postgres import shared_postgres

P, S = "default", "vs_one"


@asynccontextmanager
async def embedded_index(folder: Path, **options: Any) -> AsyncGenerator[EmbeddedIndex, None]:
    index = EmbeddedIndex(folder, **options)
    try:
        yield index
    finally:
        await index.close()


@asynccontextmanager
async def postgres_index(url: str, **options: Any) -> AsyncGenerator[PostgresIndex, None]:
    index = await PostgresIndex.open(url, **{"connections": 4, "pooled": False, **options})
    try:
        yield index
    finally:
        await index.close()


@asynccontextmanager
async def emptied_database() -> AsyncGenerator[str, None]:
    """A database with the tables of the index, made once for all tests of a process, and no rows in them."""
    postgres = shared_postgres()
    administrator = await asyncpg.connect(postgres.url())
    if not await administrator.fetchval("SELECT 1 FROM pg_database WHERE datname = 'search'"):
        await administrator.execute("CREATE DATABASE search TEMPLATE template0")
    await administrator.close()
    async with postgres_index(postgres.url("search")) as index:
        assert index.has_vectors
        async with index._sessions.transaction(WRITE) as session:
            await session.execute(f"TRUNCATE search_stores, search_deleted, {', '.join(TABLES)}")
    yield postgres.url("search")


def cut(text: str) -> list[Chunk]:
    """One chunk for each line."""
    chunks, at = [], 0
    for number, line in enumerate(text.split("\n")):
        chunks.append(Chunk(number, line, at, at + len(line), number + 1, len(line.split())))
        at += len(line) + 1
    return chunks


async def put(
    index: SearchIndex,
    text: str,
    file_id: str = "file-a",
    store_id: str = S,
    vectors: list[list[float]] | None = None,
    **attributes: str | float | bool,
) -> int:
    packed = [pack_vector(vector) for vector in vectors] if vectors is not None else None
    return await index.put_file(P, store_id, file_id, attributes, cut(text), packed, text)


async def find(index: SearchIndex, query: str, *stores: str, **options: Any) -> list[Hit]:
    embedding, limit = options.pop("embedding", None), options.pop("limit", 50)
    return await index.search(P, stores or (S,), query, embedding, limit, **options)


async def texts(index: SearchIndex, query: str, *stores: str, **options: Any) -> list[str]:
    return [hit.chunk.text for hit in await find(index, query, *stores, **options)]
