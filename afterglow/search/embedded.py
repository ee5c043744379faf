"""The search index of the laptop shape: one SQLite file per vector store, searched exactly.

A search is two rounds over the stores asked: how frequent its words are in all of them together, then the best of
each. Both run in a thread, on snapshots that no writer disturbs; a store has one writer at a time. Files are written
whole, in one transaction: whatever stops the process leaves the old state or the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

from afterglow.contracts import Chunk, Hit, Weights
from afterglow.errors import DimensionMismatch, StoreError, StoreUnavailable
from afterglow.objects import AttributeValue, Filter
from afterglow.search import ranking, stored
from afterglow.search.columns import Columns
from afterglow.search.pieces import FILE_BITS, checked_text
from afterglow.search.pool import Pool
from afterglow.search.stored import Store
from afterglow.search.tokens import Tokenizer

log = logging.getLogger("afterglow.search")

T = TypeVar("T")
Place = tuple[str, int]  # a chunk: its store, and its number there
READERS = 4
WRITERS = 2
MEMORY_MB = 256
STORE_ID = re.compile(r"[A-Za-z0-9_-]{2,200}")
# A store with no more chunks is scrubbed before a delete returns, which takes some tenths of a second at most; a
# larger one a moment after its last delete.
SCRUBBED_AT_ONCE = 10_000
SCRUB_AFTER_S = 5.0


class _Opened(NamedTuple):
    """A store in a read transaction."""

    connection: sqlite3.Connection
    path: Path
    row: Store


class _Question(NamedTuple):
    """What is searched for, and where."""

    project: str
    store_ids: list[str]
    query: str
    embedding: Sequence[float] | None
    weights: Weights
    where: Filter | None


class EmbeddedIndex:
    """A `contracts.SearchIndex` over a folder of SQLite files."""

    def __init__(self, folder: Path, *, memory_mb: int = MEMORY_MB, pool: Pool | None = None) -> None:
        """folder: made with the first store. memory_mb: what may be kept of vectors between searches."""
        self._folder = folder
        self._pool = pool or Pool()
        self._columns = Columns(memory_mb * 1024 * 1024)
        self._readers = ThreadPoolExecutor(READERS, "search-reader")
        self._writers = ThreadPoolExecutor(WRITERS, "search-writer")
        self._locks: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()
        self._scrubs: dict[Path, asyncio.Task[None]] = {}
        self._tokenizer = Tokenizer()
        self._closed = False

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
        def work(connection: sqlite3.Connection) -> int:
            whole = checked_text(chunks, embeddings, text)
            store = stored.read_store(connection, project, store_id)
            if store is None:
                store = _create(connection, project, store_id)
            self._bring_up_to_date(connection, store)
            stored.delete_file(connection, file_id)
            stored.check_dimensions(connection, store_id, embeddings)
            usage_bytes = stored.insert_file(connection, file_id, attributes, chunks, embeddings, whole)
            stored.changed(connection)
            return usage_bytes

        size = await self._write(store_id, work, create=True)
        assert size is not None
        return size

    async def set_attributes(
        self, project: str, store_id: str, file_id: str, attributes: Mapping[str, AttributeValue]
    ) -> None:
        def work(connection: sqlite3.Connection) -> None:
            if stored.read_store(connection, project, store_id):
                stored.set_attributes(connection, file_id, attributes)

        await self._write(store_id, work)

    async def delete_file(self, project: str, store_id: str, file_id: str) -> None:
        def work(connection: sqlite3.Connection) -> None:
            if store := stored.read_store(connection, project, store_id):
                self._bring_up_to_date(connection, store)
                if stored.delete_file(connection, file_id):
                    stored.changed(connection)

        await self._write(store_id, work)

    async def delete_store(self, project: str, store_id: str) -> None:
        path = self._path(store_id)

        def work() -> None:
            if not self._is_anothers(path, project, store_id):
                self._pool.remove(path)
                self._columns.forget(path)

        async with self._lock(path):
            if scrub := self._scrubs.pop(path, None):
                scrub.cancel()
            await self._in_writer(work)

    def _is_anothers(self, path: Path, project: str, store_id: str) -> bool:
        """Whether the file holds another store. One that is broken or was never written holds none."""
        try:
            with self._pool.use(path) as connection:
                if connection is None or not stored.has_store(connection):
                    return False
                return stored.read_store(connection, project, store_id) is None
        except StoreUnavailable:
            return False

    async def _write(self, store_id: str, work: Callable[[sqlite3.Connection], T], create: bool = False) -> T | None:
        path = self._path(store_id)
        async with self._lock(path):
            result, unscrubbed = await self._in_writer(partial(self._transact, path, work, create))
        if unscrubbed:
            self._scrub_later(path)
        return result

    def _transact(self, path: Path, work: Callable[[sqlite3.Connection], T], create: bool) -> tuple[T | None, bool]:
        """Run `work` in a transaction; return its result and whether the file is still to be scrubbed."""
        with self._pool.use(path, create=create) as connection:
            if connection is None:
                return None, False
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
            if not stored.is_unscrubbed(connection):
                return result, False
            if stored.count_chunks(connection) > SCRUBBED_AT_ONCE:
                return result, True
            return result, not stored.scrub(connection)

    def _bring_up_to_date(self, connection: sqlite3.Connection, store: Store) -> None:
        if store.format != ranking.FORMAT:
            stored.index_words_anew(connection)

    def _scrub_later(self, path: Path) -> None:
        if scrub := self._scrubs.pop(path, None):
            scrub.cancel()
        self._scrubs[path] = asyncio.create_task(self._scrub(path, SCRUB_AFTER_S))

    async def _scrub(self, path: Path, after_s: float) -> None:
        await asyncio.sleep(after_s)
        try:
            async with self._lock(path):
                if not await self._in_writer(partial(self._scrub_now, path)):
                    log.info("Deleted text is still in %s: it is being read, and goes with its next write.", path)
        except StoreError as error:
            log.warning("Deleted text is still in a file, and goes with its next write: %s", error)
        self._scrubs.pop(path, None)

    def _scrub_now(self, path: Path) -> bool:
        with self._pool.use(path) as connection:
            return connection is None or not stored.is_unscrubbed(connection) or stored.scrub(connection)

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
        stores = list(dict.fromkeys(store_ids))
        weights = weights if weights and embedding is not None else Weights()
        question = _Question(project, stores, query, embedding, weights, where)
        return await self._in_reader(partial(self._search, question, threshold, limit))

    async def list_chunks(self, project: str, store_id: str, file_id: str, after: int, limit: int) -> list[Chunk]:
        def work(connection: sqlite3.Connection) -> list[Chunk]:
            file = stored.file_number(connection, file_id)
            first = (file or 0) << FILE_BITS | max(after + 1, 0)
            return stored.read_chunks(connection, first, limit) if file is not None else []

        return await self._read(project, store_id, work) or []

    async def text(self, project: str, store_id: str, file_id: str) -> str:
        def work(connection: sqlite3.Connection) -> str:
            file = stored.file_number(connection, file_id)
            return stored.read_text(connection, file) if file is not None else ""

        return await self._read(project, store_id, work) or ""

    async def read_file(self, project: str, store_id: str, file_id: str) -> stored.FileContent | None:
        return await self._read(project, store_id, partial(stored.read_file, file_id=file_id))

    async def usage_bytes(self, project: str, store_id: str) -> int:
        return await self._read(project, store_id, stored.usage_bytes) or 0

    async def backup(self, target: Path) -> None:
        for path in await self._in_reader(lambda: sorted(self._folder.glob("??/*.db"))):
            await self._in_reader(partial(self._back_up, path, target / path.relative_to(self._folder)))

    async def close(self) -> None:
        scrubs, self._scrubs = self._scrubs, {}
        for scrub in scrubs.values():
            scrub.cancel()
        await asyncio.gather(*scrubs.values(), return_exceptions=True)
        for path in scrubs:
            await self._scrub(path, 0)
        self._closed = True
        await asyncio.to_thread(self._readers.shutdown)
        await asyncio.to_thread(self._writers.shutdown)
        await asyncio.to_thread(self._pool.close)
        self._tokenizer.close()

    async def _read(self, project: str, store_id: str, work: Callable[[sqlite3.Connection], T]) -> T | None:
        def read() -> T | None:
            with self._open(project, store_id) as store:
                return work(store.connection) if store else None

        return await self._in_reader(read)

    @contextlib.contextmanager
    def _open(self, project: str, store_id: str) -> Iterator[_Opened | None]:
        path = self._path(store_id)
        with self._pool.use(path) as connection:
            row = None
            if connection is not None:
                connection.execute("BEGIN")
                row = stored.read_store(connection, project, store_id)
            yield _Opened(connection, path, row) if connection is not None and row else None

    def _back_up(self, path: Path, copy: Path) -> None:
        with self._pool.use(path) as connection:
            if connection is None:
                return
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            copy.touch(mode=0o600)
            with contextlib.closing(sqlite3.connect(copy)) as target:
                connection.backup(target)

    # A search, in a reader's thread.

    def _search(self, question: _Question, threshold: float, limit: int) -> list[Hit]:
        asked, average = self._weigh(question)
        lexical: dict[Place, float] = {}
        similar: dict[Place, float] = {}
        for store_id in question.store_ids:
            with self._open(question.project, store_id) as store:
                if store is None:
                    continue
                files = stored.file_numbers(store.connection, question.where) if question.where is not None else None
                by_words = self._best_by_words(store, asked, average, files)
                lexical |= {(store_id, number): score for number, score in by_words}
                by_vector = self._best_by_vector(store, question, files)
                similar |= {(store_id, number): score for number, score in by_vector}
        ranked = ranking.fuse(lexical, similar, asked.ideal, question.weights)
        return self._hits(question.project, list(takewhile(lambda one: one.score >= threshold, islice(ranked, limit))))

    def _terms(self, query: str) -> Counter[ranking.Term]:
        pieces = ranking.asked(query)
        return ranking.terms(pieces, self._tokenizer.split(list(pieces)))

    def _weigh(self, question: _Question) -> tuple[ranking.Asked, float]:
        """What the query's terms are worth, and the average length of a chunk."""
        counts = self._terms(question.query) if question.weights.text else Counter()
        chunks = words = 0
        frequencies: Counter[ranking.Term] = Counter()
        for store_id in question.store_ids if counts else []:
            with self._open(question.project, store_id) as store:
                if store is not None:
                    lengths = self._columns.lengths(*store).values
                    chunks += len(lengths)
                    words += int(lengths.sum())
                    frequencies.update(self._columns.frequencies(*store, counts))
        return ranking.weigh(counts, frequencies, chunks), words / max(chunks, 1)

    def _best_by_words(
        self, store: _Opened, asked: ranking.Asked, average: float, files: list[int] | None
    ) -> list[tuple[int, float]]:
        import numpy as np

        if not asked.weights:
            return []
        _, numbers, lengths = self._columns.lengths(*store)
        scores = np.zeros(len(numbers))
        for term, weight in asked.weights.items():
            chunks, times = stored.places(store.connection, term)
            at = np.searchsorted(numbers, chunks)
            scores[at] += ranking.bm25(weight, times, lengths[at], average)
        return ranking.best(numbers, scores, files)

    def _best_by_vector(self, store: _Opened, question: _Question, files: list[int] | None) -> list[tuple[int, float]]:
        import numpy as np

        dimensions = store.row.dimensions
        if question.embedding is None or not question.weights.embedding or not dimensions:
            return []
        if len(question.embedding) != dimensions:
            raise DimensionMismatch(store.row.id, dimensions, len(question.embedding))
        vector = np.array(question.embedding, dtype=np.float32)
        vector /= float(np.linalg.norm(vector)) or 1.0
        return ranking.best(*self._columns.similarities(*store, vector), files)

    def _hits(self, project: str, ranked: list[ranking.Ranked[Place]]) -> list[Hit]:
        """Those of them that are still there, with their text."""
        found: dict[Place, tuple[str, Chunk]] = {}
        for store_id in {one.key[0] for one in ranked}:
            with self._open(project, store_id) as store:
                if store is None:
                    continue
                file_id_of = cache(partial(stored.file_id, store.connection))
                for number in [one.key[1] for one in ranked if one.key[0] == store_id]:
                    if file_id := file_id_of(number >> FILE_BITS):
                        found[store_id, number] = file_id, stored.read_chunks(store.connection, number, 1)[0]
        return [ranking.hit(one, one.key[0], *found[one.key]) for one in ranked if one.key in found]

    # Threads and places.

    async def _in_reader(self, work: Callable[[], T]) -> T:
        return await self._in_thread(self._readers, work)

    async def _in_writer(self, work: Callable[[], T]) -> T:
        """As `_in_reader`. When the caller is cancelled the work goes on, and the caller waits for its end: the next
        writer of the store must not start before."""
        writing = asyncio.ensure_future(self._in_thread(self._writers, work))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])
            if not writing.cancelled() and (error := writing.exception()):
                log.warning("A write to the search index failed after its caller had gone: %s", error)
            raise

    async def _in_thread(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        if self._closed:
            raise StoreUnavailable(f"{self._folder}: the search index is closed")
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def _lock(self, path: Path) -> asyncio.Lock:
        return self._locks.setdefault(path, asyncio.Lock())

    def _path(self, store_id: str) -> Path:
        """Folders by the last two characters: the first ones of an id are its time."""
        if not STORE_ID.fullmatch(store_id):
            raise ValueError(f"{store_id!r} cannot be the name of a vector store's file")
        return self._folder / store_id[-2:].lower() / f"{store_id}.db"


def _create(connection: sqlite3.Connection, project: str, store_id: str) -> Store:
    try:
        return stored.create_store(connection, project, store_id)
    except sqlite3.OperationalError as error:
        if "already exists" not in str(error):
            raise
        raise StoreUnavailable(f"the file of the vector store {store_id} is another's") from None
