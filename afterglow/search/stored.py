"""What a vector store's file holds, and every statement that is run on it. One connection, one thread; no decisions
about ranking, which are `ranking.py`'s.

Chunks are numbered, and text is cut, as `pieces.py` says. FTS5 holds no text, only where the words are: BM25 is
computed from that, because FTS5's own knows one table only and takes ten times as long. What numpy needs of many
chunks at once (their lengths, their vectors) lies together in blocks.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from afterglow.contracts import Chunk
from afterglow.objects import AttributeValue, Filter
from afterglow.search import ranking
from afterglow.search.filters import matches
from afterglow.search.pieces import FILE_BITS, checked_dimensions, chunks_of, cut, usage_of
from afterglow.search.pool import BUSY_TIMEOUT_MS
from afterglow.search.ranking import Term
from afterglow.search.tokens import FTS5

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORDS = (
    f"CREATE VIRTUAL TABLE words USING fts5(text, content='', columnsize=0, {FTS5})",
    "CREATE VIRTUAL TABLE frequencies USING fts5vocab(words, row)",
    "CREATE VIRTUAL TABLE places USING fts5vocab(words, instance)",
)
SCHEMA = (
    """CREATE TABLE store (
        project TEXT NOT NULL,
        id TEXT NOT NULL,
        format TEXT NOT NULL,         -- of the indexed words: ranking.FORMAT
        dimensions INTEGER,           -- floats in each vector; NULL while there is none
        version INTEGER NOT NULL,     -- grows whenever chunks come or go
        unscrubbed INTEGER NOT NULL   -- 1 while traces of deleted text are left in the file
    )""",
    """CREATE TABLE files (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        attributes BLOB NOT NULL,     -- JSON
        usage_bytes INTEGER NOT NULL
    )""",
    """CREATE TABLE chunks (
        number INTEGER PRIMARY KEY,   -- that of the file << 24 | index
        start INTEGER NOT NULL,
        end INTEGER NOT NULL,
        page INTEGER,
        tokens INTEGER NOT NULL,
        piece TEXT NOT NULL           -- the file's text from this chunk's start to the next one's
    )""",
    """CREATE TABLE blocks (
        number INTEGER PRIMARY KEY,   -- of the first of up to 1,024 chunks of one file
        words BLOB NOT NULL,          -- how many words each has: int32
        vectors BLOB                  -- float16, of unit length
    )""",
    *WORDS,
)
SCRUB_WAIT_MS = 500
BLOCK = 1024
BATCH = 256


FileContent = tuple[dict[str, AttributeValue], list[Chunk], list[bytes] | None, str]  # as `put_file` takes it


class Store(NamedTuple):
    """The row that every file has one of."""

    project: str
    id: str
    format: str
    dimensions: int | None
    version: int
    unscrubbed: bool


def has_store(connection: sqlite3.Connection) -> bool:
    """Whether anything was ever written: the file may have been made, and its first transaction lost."""
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'store'").fetchone() is not None


def read_store(connection: sqlite3.Connection, project: str, store_id: str) -> Store | None:
    """The store, or None when its file was never written, or is another's: on some disks vs_a and vs_A are one name."""
    if not has_store(connection):
        return None
    store = Store(*connection.execute("SELECT * FROM store").fetchone())
    return store if (store.project, store.id) == (project, store_id) else None


def create_store(connection: sqlite3.Connection, project: str, store_id: str) -> Store:
    for statement in SCHEMA:
        connection.execute(statement)
    store = Store(project, store_id, ranking.FORMAT, None, 0, False)
    connection.execute("INSERT INTO store VALUES (?, ?, ?, ?, ?, ?)", store)
    return store


def changed(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE store SET version = version + 1")


# --- files -----------------------------------------------------------------------------------------------------


def insert_file(
    connection: sqlite3.Connection,
    file_id: str,
    attributes: Mapping[str, AttributeValue],
    chunks: Sequence[Chunk],
    embeddings: Sequence[bytes] | None,
    text: str,
) -> int:
    """Write a file that is not there and return its size. `text` holds every chunk where it says it stands."""
    usage_bytes = usage_of(text, embeddings)
    row = (file_id, msgspec.json.encode(attributes), usage_bytes)
    number = connection.execute("INSERT INTO files (id, attributes, usage_bytes) VALUES (?, ?, ?)", row).lastrowid
    assert number is not None
    first = number << FILE_BITS
    connection.executemany(
        "INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)",
        (
            (first | chunk.index, chunk.start, chunk.end, chunk.page, chunk.tokens, piece)
            for chunk, piece in zip(chunks, cut(chunks, text), strict=True)
        ),
    )
    for at in range(0, len(chunks), BLOCK):
        words = [_index_words(connection, first | chunk.index, chunk.text) for chunk in chunks[at : at + BLOCK]]
        vectors = b"".join(embeddings[at : at + BLOCK]) if embeddings is not None else None
        connection.execute("INSERT INTO blocks VALUES (?, ?, ?)", (first | at, _int32(words), vectors))
    return usage_bytes


def _index_words(connection: sqlite3.Connection, number: int, text: str) -> int:
    """How many words the chunk has, about: what is between spaces."""
    words = ranking.searchable(text)
    connection.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (number, words))
    return len(words.split())


def _int32(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def check_dimensions(connection: sqlite3.Connection, store_id: str, embeddings: Sequence[bytes] | None) -> None:
    """Raise DimensionMismatch when these have not the length of the store's; remember it when they are the first."""
    (kept,) = connection.execute("SELECT dimensions FROM store").fetchone()
    connection.execute("UPDATE store SET dimensions = ?", (checked_dimensions(store_id, embeddings, kept),))


def delete_file(connection: sqlite3.Connection, file_id: str) -> bool:
    """Delete a file's rows; whether it was there. Until the store is scrubbed, traces are left in the file."""
    number = file_number(connection, file_id)
    if number is None:
        return False
    for batch in _batches(connection, number):
        words = [(chunk_number, ranking.searchable(chunk.text)) for chunk_number, chunk in batch]
        connection.executemany("INSERT INTO words (words, rowid, text) VALUES ('delete', ?, ?)", words)
    for table in ("chunks", "blocks"):
        between = (number << FILE_BITS, number + 1 << FILE_BITS)
        connection.execute(f"DELETE FROM {table} WHERE number >= ? AND number < ?", between)  # noqa: S608  our names
    connection.execute("DELETE FROM files WHERE number = ?", (number,))
    any_vectors = "EXISTS (SELECT 1 FROM blocks WHERE vectors IS NOT NULL)"
    connection.execute(f"UPDATE store SET unscrubbed = 1, dimensions = CASE WHEN {any_vectors} THEN dimensions END")  # noqa: S608  our names
    return True


def is_unscrubbed(connection: sqlite3.Connection) -> bool:
    return has_store(connection) and bool(connection.execute("SELECT unscrubbed FROM store").fetchone()[0])


def count_chunks(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT COALESCE(SUM(LENGTH(words)), 0) / 4 FROM blocks").fetchone()[0])


def scrub(connection: sqlite3.Connection) -> bool:
    """Remove the traces that deleted rows leave: in FTS5 until its segments are merged, in empty pages, in the log.
    Whether it was done: the log cannot be emptied while a search is reading from it."""
    connection.execute("INSERT INTO words (words) VALUES ('optimize')")
    connection.execute("PRAGMA incremental_vacuum").fetchall()
    connection.execute(f"PRAGMA busy_timeout = {SCRUB_WAIT_MS}")
    busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    if not busy:
        connection.execute("UPDATE store SET unscrubbed = 0")
    return not busy


def index_words_anew(connection: sqlite3.Connection) -> None:
    """Write the words of all chunks as this release does."""
    for table in ("places", "frequencies", "words"):
        connection.execute(f"DROP TABLE {table}")
    for statement in WORDS:
        connection.execute(statement)
    for (number,) in connection.execute("SELECT number FROM files ORDER BY number").fetchall():
        words = [
            _index_words(connection, at, chunk.text) for batch in _batches(connection, number) for at, chunk in batch
        ]
        for start in range(0, len(words), BLOCK):
            block = _int32(words[start : start + BLOCK]), number << FILE_BITS | start
            connection.execute("UPDATE blocks SET words = ? WHERE number = ?", block)
    connection.execute("UPDATE store SET format = ?, unscrubbed = 1", (ranking.FORMAT,))


def set_attributes(connection: sqlite3.Connection, file_id: str, attributes: Mapping[str, AttributeValue]) -> None:
    connection.execute("UPDATE files SET attributes = ? WHERE id = ?", (msgspec.json.encode(attributes), file_id))


def file_number(connection: sqlite3.Connection, file_id: str) -> int | None:
    row = connection.execute("SELECT number FROM files WHERE id = ?", (file_id,)).fetchone()
    return row and int(row[0])


def file_id(connection: sqlite3.Connection, number: int) -> str | None:
    row = connection.execute("SELECT id FROM files WHERE number = ?", (number,)).fetchone()
    return row and str(row[0])


def usage_bytes(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT COALESCE(SUM(usage_bytes), 0) FROM files").fetchone()[0])


def file_numbers(connection: sqlite3.Connection, where: Filter | None) -> list[int]:
    """The files that a filter lets through."""
    if where is None:
        return [number for (number,) in connection.execute("SELECT number FROM files")]
    decode = msgspec.json.Decoder(dict[str, AttributeValue]).decode
    rows = connection.execute("SELECT number, attributes FROM files")
    return [number for number, attributes in rows if matches(where, decode(attributes))]


# --- chunks and their text -------------------------------------------------------------------------------------


def read_chunks(connection: sqlite3.Connection, number: int, limit: int) -> list[Chunk]:
    """Up to `limit` chunks of one file from chunk `number` on."""
    rows = connection.execute(
        "SELECT number, start, end, page, tokens, piece FROM chunks WHERE number >= ? AND number < ? ORDER BY number",
        (number, (number >> FILE_BITS) + 1 << FILE_BITS),
    )
    found: list[Any] = []
    pieces: list[str] = []
    reach = 0
    for row in rows:
        if len(found) < limit:
            found.append(row)
            reach = max(reach, row[2])
        elif row[1] >= reach:
            break
        pieces.append(row[5])
    rows.close()
    return chunks_of([row[:5] for row in found], "".join(pieces))


def _batches(connection: sqlite3.Connection, file: int) -> Iterator[list[tuple[int, Chunk]]]:
    """All chunks of a file, some at a time, with their numbers."""
    number = file << FILE_BITS
    while chunks := read_chunks(connection, number, BATCH):
        yield [(file << FILE_BITS | chunk.index, chunk) for chunk in chunks]
        number = (file << FILE_BITS | chunks[-1].index) + 1


def read_text(connection: sqlite3.Connection, file: int) -> str:
    between = (file << FILE_BITS, file + 1 << FILE_BITS)
    rows = connection.execute("SELECT piece FROM chunks WHERE number >= ? AND number < ? ORDER BY number", between)
    return "".join(piece for (piece,) in rows)


def read_file(connection: sqlite3.Connection, file_id: str) -> FileContent | None:
    """All of a file, as it was given."""
    row = connection.execute("SELECT number, attributes FROM files WHERE id = ?", (file_id,)).fetchone()
    if row is None:
        return None
    number, attributes = row
    chunks = read_chunks(connection, number << FILE_BITS, 1 << FILE_BITS)
    decoded = msgspec.json.decode(attributes, type=dict[str, AttributeValue])
    return decoded, chunks, _read_packed_vectors(connection, number), read_text(connection, number)


def _read_packed_vectors(connection: sqlite3.Connection, file: int) -> list[bytes] | None:
    between = (file << FILE_BITS, file + 1 << FILE_BITS)
    rows = connection.execute(
        "SELECT vectors FROM blocks WHERE number >= ? AND number < ? AND vectors IS NOT NULL ORDER BY number", between
    )
    packed = b"".join(vectors for (vectors,) in rows)
    if not packed:
        return None
    size = 2 * connection.execute("SELECT dimensions FROM store").fetchone()[0]
    return [packed[at : at + size] for at in range(0, len(packed), size)]


# --- words -----------------------------------------------------------------------------------------------------


def frequency(connection: sqlite3.Connection, term: Term) -> int:
    """In how many chunks a term is."""
    if term.kind == "word":
        row = connection.execute("SELECT doc FROM frequencies WHERE term = ?", (term.text,)).fetchone()
        return int(row[0]) if row else 0
    return len(places(connection, term)[0])


def places(connection: sqlite3.Connection, term: Term) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers of the chunks that have this term, ascending, and how often each has it (a phrase counts once)."""
    import numpy as np

    # One text of numbers, because making a Python object of each takes most of the time of a search.
    listed = connection.execute(*_places_statement(term)).fetchone()[0]
    every = np.fromstring(listed or "", dtype=np.int64, sep=",")
    if term.kind == "prefix":  # of several tokens, one after another
        every.sort()
    first = np.flatnonzero(np.diff(every, prepend=-1))
    return every[first], np.diff(first, append=len(every))


def _places_statement(term: Term) -> tuple[str, tuple[str, ...]]:
    match term.kind:
        case "word":
            return "SELECT group_concat(doc) FROM places WHERE term = ?", (term.text,)
        case "prefix":
            between = (term.text, f"{term.text}\U0010ffff")
            return "SELECT group_concat(doc) FROM places WHERE term >= ? AND term < ?", between
        case _:
            quoted = '"' + term.text.replace('"', '""') + '"'
            return "SELECT group_concat(rowid) FROM words WHERE words MATCH ?", (quoted,)


# --- columns ---------------------------------------------------------------------------------------------------


def read_lengths(connection: sqlite3.Connection, after: int) -> Iterable[tuple[int, NDArray[np.int32]]]:
    """How many words chunks have, block by block, with the number of each block's first chunk."""
    import numpy as np

    for number, words in connection.execute(
        "SELECT number, words FROM blocks WHERE number > ? ORDER BY number", (after,)
    ):
        yield number, np.frombuffer(words, dtype="<i4")


def read_vectors(
    connection: sqlite3.Connection, after: int, dimensions: int
) -> Iterable[tuple[int, NDArray[np.float16]]]:
    """The vectors, likewise."""
    import numpy as np

    rows = connection.execute(
        "SELECT number, vectors FROM blocks WHERE number > ? AND vectors IS NOT NULL ORDER BY number", (after,)
    )
    for number, vectors in rows:
        yield number, np.frombuffer(vectors, dtype="<f2").reshape(-1, dimensions)
