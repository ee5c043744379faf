"""The search index of the cluster shape: chunks, words and vectors in Postgres, searched exactly.

A search is one snapshot: the stores, where the query's words are, the nearest vectors, the chunks found. It reads what
belongs to the stores asked and nothing else, and is ranked here, by the code that ranks for the embedded index; scores
are the same. Writers of one store wait for each other at its row. Vectors need pgvector; where it is missing they are
kept, words alone are searched, and once it has been installed the next process that starts moves them.

Deleted rows are gone for every search at once. Their bytes are Postgres' to overwrite: VACUUM does it, by itself after
a while, and its log and the operator's backups have ends of their own.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from io import BytesIO
from itertools import islice, takewhile
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import asyncpg
import msgspec

from afterglow.contracts import Chunk, Hit, Weights
from afterglow.errors import ConfigError, DimensionMismatch, StoreUnavailable
from afterglow.objects import AttributeValue, Filter
from afterglow.search import postings, ranking
from afterglow.search import statements as sql
from afterglow.search.filters import matches
from afterglow.search.pieces import FILE_BITS, checked_dimensions, checked_text, chunks_of, cut, usage_of
from afterglow.search.postings import BLOCK, MAX_TERM_CHARS, PLACE_BYTES, Places
from afterglow.search.ranking import Term
from afterglow.search.sessions import Sessions
from afterglow.search.statements import READ, TABLES, WRITE
from afterglow.search.tokens import Tokenizer

if TYPE_CHECKING:
    from afterglow.search.sessions import Session

T = TypeVar("T")
DELETED_AT_ONCE = 5_000  # rows in a transaction, when a store goes
EVERYTHING = 1 << 62


class _Question(NamedTuple):
    """terms: how often each was asked. tokens: of each piece of the query. vector: as Postgres reads it, if any."""

    terms: Counter[Term]
    tokens: dict[str, list[str]]
    vector: str | None
    dimensions: int


class PostgresIndex:
    """A `contracts.SearchIndex` over a pool of connections to one Postgres database. Made by `open`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._tables: tuple[str, ...] = TABLES
        self._asking = Tokenizer()
        self._indexing = Tokenizer()

    @classmethod
    async def open(cls, url: str, *, connections: int, pooled: bool) -> PostgresIndex:
        """Connect, and bring the schema up to date.

        connections: at most so many are open at once. pooled: there is a pooler between, such as PgBouncer, that hands
        each transaction another session: nothing may be kept in one.
        Raises ConfigError when the schema is newer than this release, StoreUnavailable when the database cannot be
        reached.
        """
        index = cls(await Sessions.open(url, connections=connections, pooled=pooled))
        try:
            await index._prepare()
        except BaseException:
            await index.close()
            raise
        return index

    @property
    def has_vectors(self) -> bool:
        """Whether pgvector is there."""
        return "search_vectors" in self._tables

    async def close(self) -> None:
        await self._sessions.close()
        self._asking.close()
        self._indexing.close()

    # Writing.

    async def put_file(
        self,
        project: str,
        store_id: str,
        file_id: str,
        attributes: Mapping[str, AttributeValue],
        chunks: Sequence[Chunk],
        embeddings: Sequence[bytes] | None,
        text: str | None = None,
    ) -> int:
        whole = await asyncio.to_thread(checked_text, chunks, embeddings, text)
        size = usage_of(whole, embeddings)

        async def work(session: Session, store: asyncpg.Record) -> int:
            number, kept = store["number"], store["dimensions"]
            if (left := await self._delete_file(session, number, file_id)) is not None:
                kept = left["dimensions"]
            dimensions = checked_dimensions(store_id, embeddings, kept)
            count, vectors = len(chunks), len(embeddings or ())
            row = (file_id, ranking.FORMAT, msgspec.json.encode(attributes), size, count, vectors)
            file = await session.fetchval(sql.CREATE_FILE, number, *row)
            first = file << FILE_BITS
            await _insert_chunks(session, number, first, chunks, whole)
            words = await self._insert_words(session, number, first, [chunk.text for chunk in chunks])
            await self._insert_vectors(session, number, first, embeddings or ())
            await session.execute(sql.SET_WORDS, file, words, ranking.FORMAT)
            await session.execute(sql.COUNT_IN, number, ranking.FORMAT, dimensions, count, words, vectors)
            return size

        written = await self._write(project, store_id, work, create=True)
        assert written is not None
        return written

    async def set_attributes(
        self, project: str, store_id: str, file_id: str, attributes: Mapping[str, AttributeValue]
    ) -> None:
        async with self._sessions.transaction(WRITE) as session:
            await session.execute(sql.SET_ATTRIBUTES, project, store_id, file_id, msgspec.json.encode(attributes))

    async def delete_file(self, project: str, store_id: str, file_id: str) -> None:
        async def work(session: Session, store: asyncpg.Record) -> None:
            await self._delete_file(session, store["number"], file_id)

        await self._write(project, store_id, work)

    async def delete_store(self, project: str, store_id: str) -> None:
        async with self._sessions.transaction(WRITE) as session:
            await session.execute(sql.DELETE_STORE, project, store_id)
        await self._sweep()

    async def _write(
        self,
        project: str,
        store_id: str,
        work: Callable[[Session, asyncpg.Record], Awaitable[T]],
        create: bool = False,
    ) -> T | None:
        """Run `work` while nobody else writes to the store. What an older release wrote is brought up to date before,
        each file in a transaction of its own."""
        while True:
            async with self._sessions.transaction(WRITE) as session:
                if not self.has_vectors and await session.fetchval(sql.HAS_VECTORS):
                    self._tables = TABLES  # another process, started since, has found pgvector
                if create:
                    store = await session.fetchrow(sql.CREATE_STORE, project, store_id, ranking.FORMAT)
                else:
                    store = await session.fetchrow(sql.LOCK_STORE, project, store_id)
                if store is None and create:
                    raise StoreUnavailable(f"the vector store {store_id} is another's")
                if store is None:
                    return None
                if not _is_older(store["format"], ranking.FORMAT):
                    return await work(session, store)
                await self._index_words_anew(session, store["number"])

    async def _delete_file(self, session: Session, store: int, file_id: str) -> asyncpg.Record | None:
        """The store's row, as far as that has changed; None when the file is not there."""
        file = await session.fetchrow(sql.DELETE_FILE, store, file_id)
        if file is None:
            return None
        for table in self._tables:
            if table in sql.KEYS:
                await session.execute(sql.delete_of_file(table), *_numbers_of(file["number"]))
        return await session.fetchrow(sql.COUNT_OUT, store, file["chunks"], file["words"], file["vectors"])

    async def _insert_words(self, session: Session, store: int, first: int, texts: Sequence[str]) -> int:
        """How many words the texts have, about: what is between spaces."""
        words = 0
        for at in range(first, first + len(texts), BLOCK):
            block = texts[at - first : at - first + BLOCK]
            found, count = await asyncio.to_thread(postings.postings, self._indexing, at, block)
            words += count
            await session.copy_records_to_table(
                "search_words",
                columns=["store", "first", "term", "places", "offsets"],
                records=[(store, at, one.term, one.places, one.offsets) for one in found],
            )
        return words

    async def _insert_vectors(self, session: Session, store: int, first: int, embeddings: Sequence[bytes]) -> None:
        for at in range(0, len(embeddings), BLOCK):
            dimensions, block = len(embeddings[0]) // 2, b"".join(embeddings[at : at + BLOCK])
            if self.has_vectors:
                await _copy_vectors(session, store, first + at, dimensions, block)
            else:
                await session.execute(sql.PACK_VECTORS, first + at, store, dimensions, block)

    async def _index_words_anew(self, session: Session, store: int) -> None:
        """Write the words of one file as this release does; when none is left, the store is up to date."""
        file = await session.fetchrow(sql.OLD_FILE, store, ranking.FORMAT)
        if file is None:
            await session.execute(sql.SET_FORMAT, store, ranking.FORMAT)
            return
        number = file["number"]
        await session.execute(sql.delete_of_file("search_words"), *_numbers_of(number))
        chunks = _chunks(await session.fetch(sql.FILE_CHUNKS, *_numbers_of(number), None))
        words = await self._insert_words(session, store, number << FILE_BITS, [chunk.text for chunk in chunks])
        await session.execute(sql.SET_WORDS, number, words, ranking.FORMAT)
        await session.execute(sql.ADD_WORDS, store, words - file["words"])

    async def _sweep(self) -> None:
        """Delete what is left of deleted stores, unless another process is at it."""
        async with self._sessions.transaction(READ) as session:
            stores = [row["store"] for row in await session.fetch(sql.DELETED_STORES)]
        for store in stores:
            while await self._delete_some(store):
                pass

    async def _delete_some(self, store: int) -> bool:
        """Delete up to so many rows of a store that is gone; whether there may be more."""
        async with self._sessions.transaction(WRITE) as session:
            if not await session.fetchval(sql.CLAIM_DELETED_STORE, store):
                return False
            for table in self._tables:
                done = await session.execute(sql.delete_some_of_store(table), store, DELETED_AT_ONCE)
                if done != "DELETE 0":
                    return True
            await session.execute(sql.FORGET_DELETED_STORE, store)
            return False

    # Reading.

    async def search(
        self,
        project: str,
        store_ids: Sequence[str],
        query: str,
        embedding: Sequence[float] | None,
        limit: int,
        where: Filter | None = None,
        threshold: float = 0.0,
        weights: Weights | None = None,
    ) -> list[Hit]:
        weights = weights if weights and embedding is not None else Weights()
        question = await asyncio.to_thread(self._question, query, embedding, weights)

        async def work(session: Session) -> list[Hit]:
            stores = await session.fetch(sql.STORES, project, list(store_ids))
            numbers = [store["number"] for store in stores]
            files = await _files(session, numbers, where) if where is not None else None
            lexical, ideal = await _best_by_words(session, stores, question, files)
            similar = await self._best_by_vector(session, stores, question, files)
            ranked = islice(ranking.fuse(lexical, similar, ideal, weights), limit)
            return await _hits(session, list(takewhile(lambda one: one.score >= threshold, ranked)))

        return await self._sessions.read(work)

    async def list_chunks(self, project: str, store_id: str, file_id: str, after: int, limit: int) -> list[Chunk]:
        async def work(session: Session) -> list[Chunk]:
            file = await session.fetchval(sql.FILE, project, store_id, file_id)
            if file is None:
                return []
            first, last = _numbers_of(file)
            return _chunks(await session.fetch(sql.FILE_CHUNKS, first + max(after + 1, 0), last, limit))

        return await self._sessions.read(work)

    async def text(self, project: str, store_id: str, file_id: str) -> str:
        async def work(session: Session) -> str:
            file = await session.fetchval(sql.FILE, project, store_id, file_id)
            pieces = await session.fetch(sql.PIECES, *_numbers_of(file)) if file is not None else []
            return b"".join(row[0] for row in pieces).decode()

        return await self._sessions.read(work)

    async def read_file(
        self, project: str, store_id: str, file_id: str
    ) -> tuple[dict[str, AttributeValue], list[Chunk], list[bytes] | None, str] | None:
        async def work(
            session: Session,
        ) -> tuple[dict[str, AttributeValue], list[Chunk], list[bytes] | None, str] | None:
            file = await session.fetchrow(sql.FILE_ROW, project, store_id, file_id)
            if file is None:
                return None
            between = _numbers_of(file["number"])
            chunks = _chunks(await session.fetch(sql.FILE_CHUNKS, *between, None))
            text = b"".join(row[0] for row in await session.fetch(sql.PIECES, *between)).decode()
            attributes = msgspec.json.decode(file["attributes"], type=dict[str, AttributeValue])
            return attributes, chunks, await self._read_vectors(session, between, file["dimensions"]), text

        return await self._sessions.read(work)

    async def _read_vectors(
        self, session: Session, between: tuple[int, int], dimensions: int | None
    ) -> list[bytes] | None:
        packed = b"".join(row[0] for row in await session.fetch(sql.PACKED_VECTORS, *between))
        if self.has_vectors:
            rows = await session.fetch(sql.VECTORS, *between)
            packed += b"".join(_swapped(row[0][4:]) for row in rows)  # behind the number of dimensions
        size = 2 * (dimensions or 0)
        return [packed[at : at + size] for at in range(0, len(packed), size)] if packed else None

    async def usage_bytes(self, project: str, store_id: str) -> int:
        async def work(session: Session) -> int:
            return int(await session.fetchval(sql.USAGE, project, store_id))

        return await self._sessions.read(work)

    async def backup(self, target: Path) -> None:
        raise ConfigError("The search index is in Postgres, and is backed up with it: use `pg_dump`.")

    def _question(self, query: str, embedding: Sequence[float] | None, weights: Weights) -> _Question:
        pieces = ranking.asked(query) if weights.text else Counter()
        tokens = self._asking.split(list(pieces))
        tokens = {piece: [token[:MAX_TERM_CHARS] for token in those] for piece, those in tokens.items()}
        vector = None
        if embedding is not None and weights.embedding:
            length = hypot(*embedding) or 1.0
            vector = f"[{','.join(f'{value / length:.8f}' for value in embedding)}]"
        return _Question(ranking.terms(pieces, tokens), tokens, vector, len(embedding or ()))

    async def _best_by_vector(
        self, session: Session, stores: Sequence[asyncpg.Record], question: _Question, files: list[int] | None
    ) -> dict[int, float]:
        if question.vector is None:
            return {}
        with_vectors = [store for store in stores if store["dimensions"]]
        for store in with_vectors:
            if store["dimensions"] != question.dimensions:
                raise DimensionMismatch(store["id"], store["dimensions"], question.dimensions)
        if not with_vectors or not self.has_vectors:
            return {}
        numbers = [store["number"] for store in with_vectors]
        rows = await session.fetch(sql.NEAREST, numbers, question.vector, files, ranking.DEPTH)
        return {number: -opposite for number, opposite in rows if opposite < 0}

    # The start.

    async def _prepare(self) -> None:
        if await self._sessions.bring_up_to_date():
            while await self._move_packed_vectors():
                pass
        else:
            self._tables = tuple(table for table in TABLES if table != "search_vectors")
        await self._sweep()

    async def _move_packed_vectors(self) -> bool:
        """Move a block of vectors to where they are searched; whether there was one."""
        async with self._sessions.transaction(WRITE) as session:
            row = await session.fetchrow(sql.TAKE_PACKED_VECTORS)
            if row is not None:
                await _copy_vectors(session, row["store"], row["first"], row["dimensions"], row["vectors"])
            return row is not None


# --- writing ---------------------------------------------------------------------------------------------------


async def _insert_chunks(session: Session, store: int, first: int, chunks: Sequence[Chunk], text: str) -> None:
    starts = [chunk.start for chunk in chunks]

    def reach(chunk: Chunk) -> int:
        return max(bisect_left(starts, chunk.end) - 1 - chunk.index, 0)

    await session.copy_records_to_table(
        "search_chunks",
        columns=["number", "store", "start", "stop", "page", "tokens", "reach", "piece"],
        records=(
            (first | one.index, store, one.start, one.end, one.page, one.tokens, reach(one), piece.encode())
            for one, piece in zip(chunks, cut(chunks, text), strict=True)
        ),
    )


async def _copy_vectors(session: Session, store: int, first: int, dimensions: int, vectors: bytes) -> None:
    """As COPY's binary form has it, since the driver does not know the type."""
    import numpy as np

    fields = [("fields", ">i2"), ("size1", ">i4"), ("number", ">i8"), ("size2", ">i4"), ("store", ">i8")]
    halfvec = [("size3", ">i4"), ("dimensions", ">i2"), ("unused", ">i2"), ("values", ">u2", (dimensions,))]
    values = np.frombuffer(vectors, "<u2").reshape(-1, dimensions)
    rows = np.zeros(len(values), dtype=[*fields, *halfvec])
    rows["fields"], rows["size1"], rows["size2"], rows["size3"] = 3, 8, 8, 4 + 2 * dimensions
    rows["number"], rows["store"], rows["dimensions"] = np.arange(first, first + len(values)), store, dimensions
    rows["values"] = values
    source = BytesIO(b"PGCOPY\n\xff\r\n\0" + bytes(8) + rows.tobytes() + b"\xff\xff")
    await session.copy_to_table(
        "search_vectors", source=source, columns=["number", "store", "embedding"], format="binary"
    )


def _swapped(values: bytes) -> bytes:
    """Numbers of two bytes, in the other order of these."""
    import numpy as np

    return np.frombuffer(values, ">u2").astype("<u2").tobytes()


def _is_older(one: str, other: str) -> bool:
    """Whether a `ranking.FORMAT` is. Releases, and Pythons with other tables of Unicode, may share a database for good:
    only the newer ones bring words up to date, else each would undo what the other did."""
    return _version(one) < _version(other)


def _version(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# --- reading ---------------------------------------------------------------------------------------------------


async def _files(session: Session, stores: list[int], where: Filter) -> list[int]:
    """The files that a filter lets through."""
    decode = msgspec.json.Decoder(dict[str, AttributeValue]).decode
    rows = await session.fetch(sql.FILES, stores)
    return [number for number, attributes in rows if matches(where, decode(attributes))]


async def _best_by_words(
    session: Session, stores: Sequence[asyncpg.Record], question: _Question, files: list[int] | None
) -> tuple[dict[int, float], float]:
    """The best chunks with their BM25, and what the ideal one would have."""
    chunks = sum(store["chunks"] for store in stores)
    if not chunks or not question.terms:
        return {}, 0.0
    average = sum(store["words"] for store in stores) / chunks
    found = _Found(session, [store["number"] for store in stores])
    frequencies = await found.look(question, chunks)
    asked = ranking.weigh(question.terms, frequencies, chunks)
    await found.complete(asked)
    best = await asyncio.to_thread(postings.score, asked, found.places, max(average, 1e-9), files)
    return dict(best), asked.ideal


class _Found:
    """Where a query's terms are in some stores."""

    def __init__(self, session: Session, stores: list[int]) -> None:
        self._session = session
        self._stores = stores
        self.places: dict[Term, Places] = {}

    async def look(self, question: _Question, chunks: int) -> dict[Term, int]:
        """In how many chunks each term is, of `chunks` in all."""
        limit = max(ranking.COMMON_SHARE * chunks, ranking.COMMON_CHUNKS) * PLACE_BYTES
        words = [term.text for term in question.terms if term.kind == "word"]
        frequencies: dict[Term, int] = {}
        for word, size, places in await self._session.fetch(sql.WORDS, self._stores, words, int(limit)):
            term = Term("word", word)
            frequencies[term] = size // PLACE_BYTES
            if places is not None:
                self.places[term] = postings.unpacked(places)
        await self._look_for_prefixes([term for term in question.terms if term.kind == "prefix"])
        absent = {word for word in words if Term("word", word) not in frequencies}
        phrases = {term: question.tokens[term.text] for term in question.terms if term.kind == "phrase"}
        await self._look_for_phrases({term: tokens for term, tokens in phrases.items() if absent.isdisjoint(tokens)})
        return frequencies | {term: len(places.numbers) for term, places in self.places.items()}

    async def complete(self, asked: ranking.Asked) -> None:
        """Read the places of those frequent words that are to be looked for all the same."""
        missing = [term.text for term in asked.weights if term not in self.places]
        for word, _, places in (
            await self._session.fetch(sql.WORDS, self._stores, missing, EVERYTHING) if missing else ()
        ):
            self.places[Term("word", word)] = postings.unpacked(places)

    async def _look_for_prefixes(self, prefixes: list[Term]) -> None:
        for term in prefixes:
            if places := await self._session.fetchval(sql.PREFIX, self._stores, term.text):
                self.places[term] = postings.merged(places)

    async def _look_for_phrases(self, phrases: Mapping[Term, list[str]]) -> None:
        tokens = list({token for those in phrases.values() for token in those})
        rows = await self._session.fetch(sql.OFFSETS, self._stores, tokens) if tokens else []
        found = {token: (places, offsets) for token, places, offsets in rows}
        for term, those in phrases.items():
            if found.keys() >= set(those):
                self.places[term] = postings.side_by_side([found[token] for token in those])


async def _hits(session: Session, ranked: list[ranking.Ranked[int]]) -> list[Hit]:
    rows = await session.fetch(sql.HITS, [one.key for one in ranked]) if ranked else []
    found = {row["number"]: (row["store_id"], row["file_id"], _chunk(row)) for row in rows}
    # A process that found no pgvector when it started may have left vectors of a file that it deleted.
    return [ranking.hit(one, *found[one.key]) for one in ranked if one.key in found]


def _chunks(rows: Sequence[asyncpg.Record]) -> list[Chunk]:
    return [_chunk(row) for row in rows]


def _chunk(row: asyncpg.Record) -> Chunk:
    place = (row["number"], row["start"], row["stop"], row["page"], row["tokens"])
    return chunks_of([place], row["text"].decode())[0]


def _numbers_of(file: int) -> tuple[int, int]:
    """The first and last number that a chunk of this file can have."""
    return file << FILE_BITS, (file + 1 << FILE_BITS) - 1
