"""What is kept of the stores searched last: of all their chunks the lengths and vectors, and how frequent words are."""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from weakref import WeakValueDictionary

from afterglow.search.pieces import FILE_BITS
from afterglow.search.ranking import Term
from afterglow.search.stored import Store, file_numbers, frequency, read_lengths, read_vectors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["lengths", "vectors"]
KNOWN_STORES = 64
KNOWN_TERMS = 10_000


class Column(NamedTuple):
    """One value, or row of values, for each chunk of a store. numbers: of the chunks, ascending."""

    version: int
    numbers: NDArray[np.int64]
    values: NDArray[Any]

    @property
    def size_bytes(self) -> int:
        return int(self.numbers.nbytes + self.values.nbytes)


class Columns:
    """Columns of the stores searched last, no more than fit. Called from any thread.

    What is asked comes with the connection, which has a transaction open, and the store's row as read in it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, Kind], Column] = OrderedDict()
        self._reading: WeakValueDictionary[tuple[Path, Kind], threading.Lock] = WeakValueDictionary()
        self._size_bytes = 0
        self._frequencies: OrderedDict[Path, tuple[int, dict[Term, int]]] = OrderedDict()

    def lengths(self, connection: sqlite3.Connection, path: Path, store: Store) -> Column:
        """How many words each chunk has."""
        import numpy as np

        empty = Column(0, np.zeros(0, np.int64), np.zeros(0, np.int32))
        return self._get("lengths", connection, path, store, empty, lambda after: read_lengths(connection, after))

    def frequencies(
        self, connection: sqlite3.Connection, path: Path, store: Store, terms: Iterable[Term]
    ) -> dict[Term, int]:
        """In how many chunks each term is. Most questions share their most frequent words, which take longest."""
        with self._lock:
            version, known = self._frequencies.pop(path, (store.version, {}))
            if version != store.version or len(known) > KNOWN_TERMS:
                known = {}
            self._frequencies[path] = store.version, known
            if len(self._frequencies) > KNOWN_STORES:
                self._frequencies.popitem(last=False)
        found = {term: known[term] if term in known else frequency(connection, term) for term in terms}
        known.update(found)
        return found

    def similarities(
        self, connection: sqlite3.Connection, path: Path, store: Store, vector: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The chunks that have a vector, and what each has in common with this one."""
        import numpy as np

        def read(after: int) -> Iterable[tuple[int, NDArray[np.float16]]]:
            return read_vectors(connection, after, len(vector))

        # Not `@`: BLAS would take all cores for it, and wait for those that are busy.
        if len(self.lengths(connection, path, store).numbers) * vector.nbytes > self._limit_bytes:
            products = ((first, np.vecdot(vectors.astype(np.float32), vector)) for first, vectors in read(0))
            _, numbers, values = _joined(0, Column(0, np.zeros(0, np.int64), np.zeros(0, np.float32)), products)
            return numbers, values
        empty = Column(0, np.zeros(0, np.int64), np.zeros((0, len(vector)), np.float32))
        _, numbers, values = self._get("vectors", connection, path, store, empty, read)
        return numbers, np.vecdot(values, vector)

    def forget(self, path: Path) -> None:
        """The store was deleted."""
        with self._lock:
            self._frequencies.pop(path, None)
            for kind in get_args(Kind):
                self._drop((path, kind))

    def _get(
        self,
        kind: Kind,
        connection: sqlite3.Connection,
        path: Path,
        store: Store,
        empty: Column,
        read: Callable[[int], Iterable[tuple[int, NDArray[Any]]]],
    ) -> Column:
        with self._lock:
            reading = self._reading.setdefault((path, kind), threading.Lock())
        # One thread reads, the others wait for it: each would need as much memory as what is read.
        with reading:
            return self._get_alone(kind, connection, path, store, empty, read)

    def _get_alone(
        self,
        kind: Kind,
        connection: sqlite3.Connection,
        path: Path,
        store: Store,
        empty: Column,
        read: Callable[[int], Iterable[tuple[int, NDArray[Any]]]],
    ) -> Column:
        with self._lock:
            kept = self._kept.get((path, kind), empty)
            if kept.version == store.version:
                self._kept.move_to_end((path, kind))
                return kept
        if kept.version > store.version or kept.values.shape[1:] != empty.values.shape[1:]:
            kept = empty
        last = int(kept.numbers[-1]) if len(kept.numbers) else 0
        fresh = _joined(store.version, _still_there(kept, connection), read(last))
        self._keep((path, kind), fresh)
        return fresh

    def _keep(self, key: tuple[Path, Kind], column: Column) -> None:
        with self._lock:
            if key in self._kept and self._kept[key].version > column.version:
                return
            self._drop(key)
            self._kept[key] = column
            self._size_bytes += column.size_bytes
            while self._size_bytes > self._limit_bytes:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[Path, Kind]) -> None:
        if key in self._kept:
            self._size_bytes -= self._kept.pop(key).size_bytes


def _still_there(old: Column, connection: sqlite3.Connection) -> Column:
    """What has changed since is whole files: those that are gone are left out, new ones have higher numbers."""
    import numpy as np

    files = np.array(file_numbers(connection, None), dtype=np.int64)
    there = np.isin(old.numbers >> FILE_BITS, files)
    return old if there.all() else Column(old.version, old.numbers[there], old.values[there])


def _joined(version: int, old: Column, blocks: Iterable[tuple[int, NDArray[Any]]]) -> Column:
    import numpy as np

    numbers, values = [old.numbers], [old.values]
    for first, block in blocks:
        numbers.append(np.arange(first, first + len(block), dtype=np.int64))
        values.append(block)
    return Column(version, np.concatenate(numbers), np.concatenate(values, dtype=old.values.dtype))
