"""Rows of `unindexed_messages`, `indexed_messages`, `message_blocks`, `message_terms` and `removed_messages`: which
messages have which words, in both databases alike.

Theory of operation. A message that is written, or finished, is noted in `unindexed_messages` in the same transaction;
its words follow within seconds. It gets the next number of its project. `BLOCK` numbers in a row share a block, and of
each block there is one row for each word, with the places of the messages that have it: two bytes for each. To find
words is to read, block by block from the newest, one row for each, and to keep the places that all of them have.

Whoever deletes a message deletes its number: from the commit on nothing finds it. Its places stay behind, without the
text, until they are taken out as well (`removed_messages`); for that the rows of its block are read, which is why it is
not done in the transaction that deletes. Blocks and words are written by one process at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from afterglow.contracts import SqlValue, Transaction
from afterglow.objects import Json
from afterglow.rows.lists import ListPage, UnknownCursor, repeated
from afterglow.search.words import word_of_file, words_of

BLOCK = 2048
ROWS_AT_ONCE = 64  # of words, in one statement
BLOCKS_AT_ONCE = 32  # that are looked into together
CANDIDATES = 64  # messages read together
LAST_NUMBER = 2**53


class _Said(msgspec.Struct):
    """What is indexed of a message."""

    content: list[Json]
    attachments: list[Json] = []


class Unindexed(NamedTuple):
    project: str
    message_id: str
    created_at: int


class Wanted(NamedTuple):
    """What is looked for. words: all must occur; none at all finds nothing. since, until: when messages were created,
    Unix seconds, `until` not included. thread_id: only in this one."""

    words: Sequence[str]
    since: int = 0
    until: int = 2**62
    thread_id: str | None = None


# --- what is to be indexed -------------------------------------------------------------------------------------


async def note_unindexed(tx: Transaction, project: str, message_id: str, created_at: int) -> None:
    await tx.execute(
        "INSERT INTO unindexed_messages (project_id, message_id, created_at) VALUES ($1, $2, $3)"
        " ON CONFLICT (project_id, message_id) DO NOTHING",
        project,
        message_id,
        created_at,
    )


async def list_unindexed(tx: Transaction, limit: int) -> list[Unindexed]:
    """Of all projects, oldest first."""
    rows = await tx.fetch(
        f"SELECT project_id, message_id, created_at FROM unindexed_messages ORDER BY created_at LIMIT {limit}"
    )
    return [Unindexed(*row) for row in rows]


async def is_all_indexed(tx: Transaction, project: str) -> bool:
    return not await tx.fetch("SELECT 1 FROM unindexed_messages WHERE project_id = $1 LIMIT 1", project)


async def list_words(tx: Transaction, project: str, message_id: str) -> set[str] | None:
    """The words of a message, and those of the files that it names; None when it is gone."""
    rows = await tx.fetch("SELECT object FROM messages WHERE project_id = $1 AND id = $2", project, message_id)
    if not rows:
        return None
    said = msgspec.json.decode(rows[0][0], type=_Said)
    texts: list[str] = []
    files = {attachment.get("file_id") for attachment in said.attachments}
    for part in said.content:
        if part["type"] == "text":
            texts.append(part["text"]["value"])
            for annotation in part["text"]["annotations"]:
                files |= {named.get("file_id") for named in annotation.values() if isinstance(named, dict)}
        elif part["type"] == "refusal":
            texts.append(part["refusal"])
        elif part["type"] == "image_file":
            files.add(part["image_file"]["file_id"])
    return words_of(" ".join(texts)) | {word_of_file(file_id) for file_id in files if file_id}


# --- indexing --------------------------------------------------------------------------------------------------


async def index_messages(tx: Transaction, project: str, unindexed: Sequence[Unindexed]) -> int:
    """Put the words of these messages, all of one project, into the index; return how many there were."""
    block = await _last_block(tx, project)
    places: dict[str, array[int]] = {}
    for one in unindexed:
        words = await list_words(tx, project, one.message_id)
        taken = await tx.execute(
            "DELETE FROM unindexed_messages WHERE project_id = $1 AND message_id = $2", project, one.message_id
        )
        if words is None or not taken or await _number_of(tx, project, one.message_id) is not None:
            continue
        if block.used == BLOCK:
            await _write_block(tx, project, block, places)
            block, places = _Block(block.block + 1), {}
        await tx.execute(
            "INSERT INTO indexed_messages (project_id, number, message_id) VALUES ($1, $2, $3)",
            project,
            block.block * BLOCK + block.used,
            one.message_id,
        )
        for word in words:
            places.setdefault(word, array("H")).append(block.used)
        block.add(one.created_at)
    await _write_block(tx, project, block, places)
    return len(unindexed)


class _Block:
    """A row of `message_blocks`."""

    def __init__(self, block: int, used: int = 0, first_at: int = 2**62, last_at: int = 0) -> None:
        self.block = block
        self.used = used
        self.first_at = first_at
        self.last_at = last_at

    def add(self, created_at: int) -> None:
        self.used += 1
        self.first_at = min(self.first_at, created_at)
        self.last_at = max(self.last_at, created_at)


async def _last_block(tx: Transaction, project: str) -> _Block:
    rows = await tx.fetch(
        "SELECT block, used, first_at, last_at FROM message_blocks WHERE project_id = $1 ORDER BY block DESC LIMIT 1",
        project,
    )
    return _Block(*rows[0]) if rows else _Block(0)


async def _write_block(tx: Transaction, project: str, block: _Block, places: dict[str, array[int]]) -> None:
    if not places and not block.used:
        return
    await tx.execute(
        "INSERT INTO message_blocks (project_id, block, used, first_at, last_at) VALUES ($1, $2, $3, $4, $5)"
        " ON CONFLICT (project_id, block)"
        " DO UPDATE SET used = excluded.used, first_at = excluded.first_at, last_at = excluded.last_at",
        project,
        block.block,
        block.used,
        block.first_at,
        block.last_at,
    )
    words = sorted(places)
    for at in range(0, len(words), ROWS_AT_ONCE):
        some = words[at : at + ROWS_AT_ONCE]
        before = await _read_words(tx, project, [block.block], some)
        rows = [(word, before.get((block.block, word), b"") + places[word].tobytes()) for word in some]
        await _write_words(tx, project, block.block, rows)


async def _read_words(
    tx: Transaction, project: str, blocks: Sequence[int], words: Sequence[str]
) -> dict[tuple[int, str], bytes]:
    """The places of words in some blocks."""
    padded = repeated(words)
    rows = await tx.fetch(
        "SELECT block, term, places FROM message_terms"
        f" WHERE project_id = $1 AND block IN ({_places(2, blocks)}) AND term IN ({_places(2 + len(blocks), padded)})",
        project,
        *blocks,
        *padded,
    )
    return {(block, term): bytes(places) for block, term, places in rows}


async def _write_words(tx: Transaction, project: str, block: int, rows: Sequence[tuple[str, bytes]]) -> None:
    """Put these places in place of those that were there."""
    size = ROWS_AT_ONCE
    while rows:
        while size > len(rows):
            size //= 2
        some, rows = rows[:size], rows[size:]
        lines = ", ".join(f"($1, $2, ${3 + 2 * at}, ${4 + 2 * at})" for at in range(size))
        await tx.execute(
            f"INSERT INTO message_terms (project_id, block, term, places) VALUES {lines}"
            " ON CONFLICT (project_id, block, term) DO UPDATE SET places = excluded.places",
            project,
            block,
            *(value for row in some for value in row),
        )


# --- deleting --------------------------------------------------------------------------------------------------

_OF_A_THREAD = "SELECT id FROM messages WHERE project_id = $1 AND thread_id = $2"
# To be done before the messages themselves are deleted.
FORGET_THREAD = tuple(
    statement.format(messages=_OF_A_THREAD)
    for statement in (
        "DELETE FROM unindexed_messages WHERE project_id = $1 AND message_id IN ({messages})",
        "INSERT INTO removed_messages SELECT project_id, number FROM indexed_messages"
        " WHERE project_id = $1 AND message_id IN ({messages})",
        "DELETE FROM indexed_messages WHERE project_id = $1 AND message_id IN ({messages})",
    )
)


async def forget_message(tx: Transaction, project: str, message_id: str) -> None:
    """Let nothing find a message any more: it is deleted in the same transaction, or indexed anew."""
    await tx.execute("DELETE FROM unindexed_messages WHERE project_id = $1 AND message_id = $2", project, message_id)
    await tx.execute(
        "INSERT INTO removed_messages SELECT project_id, number FROM indexed_messages"
        " WHERE project_id = $1 AND message_id = $2",
        project,
        message_id,
    )
    await tx.execute("DELETE FROM indexed_messages WHERE project_id = $1 AND message_id = $2", project, message_id)


class Cleaning(NamedTuple):
    """Places of deleted messages in one block. numbers: of the messages. words: what is left of the places of each word
    that any of them had."""

    project: str
    block: int
    numbers: list[int]
    words: list[tuple[str, bytes]]


async def read_cleaning(tx: Transaction) -> Cleaning | None:
    """What is to be taken out of one block next. All its words are read, hence not in the transaction that writes."""
    rows = await tx.fetch("SELECT project_id, number FROM removed_messages ORDER BY project_id, number LIMIT 1")
    if not rows:
        return None
    project, first = rows[0]
    block = first // BLOCK
    found = await tx.fetch(
        "SELECT number FROM removed_messages WHERE project_id = $1 AND number >= $2 AND number < $3",
        project,
        first,
        (block + 1) * BLOCK,
    )
    numbers = [number for (number,) in found]
    gone = {number - block * BLOCK for number in numbers}
    rows = await tx.fetch("SELECT term, places FROM message_terms WHERE project_id = $1 AND block = $2", project, block)
    words = []
    for term, packed in rows:
        places = array("H", bytes(packed))
        if not gone.isdisjoint(places):
            words.append((term, array("H", [place for place in places if place not in gone]).tobytes()))
    return Cleaning(project, block, numbers, words)


async def clean(tx: Transaction, cleaning: Cleaning) -> None:
    project, block, numbers, words = cleaning
    await _write_words(tx, project, block, [(term, places) for term, places in words if places])
    for term, places in words:
        if not places:
            await tx.execute(
                "DELETE FROM message_terms WHERE project_id = $1 AND block = $2 AND term = $3", project, block, term
            )
    for number in numbers:
        await tx.execute("DELETE FROM removed_messages WHERE project_id = $1 AND number = $2", project, number)


# --- finding ---------------------------------------------------------------------------------------------------


async def find_messages(
    tx: Transaction, project: str, wanted: Wanted, *, limit: int, order: str, after: str | None, before: str | None
) -> ListPage:
    """One page of the messages that have all the words, in the order in which they came into the index.

    Paging is that of `list_page`. Raises UnknownCursor.
    """
    forward = before is None or after is not None
    low, high = 0, LAST_NUMBER
    for name, cursor in (("after", after), ("before", before)):
        if cursor is not None:
            number = await _number_of(tx, project, cursor)
            if number is None:
                raise UnknownCursor(name, cursor)
            if (name == "after") == (order == "desc"):
                high = number
            else:
                low = number + 1
    search = _Search(tx, project, wanted, low, high, descending=(order == "desc") == forward)
    found: list[tuple[str, str]] = []
    while len(found) <= limit and (numbers := await search.next_numbers()):
        found += await search.read("object, id", numbers)
    page = found[:limit] if forward else found[:limit][::-1]
    return ListPage([text for text, _ in page], [message_id for _, message_id in page], len(found) > limit)


async def find_threads(tx: Transaction, project: str, wanted: Wanted, limit: int) -> list[str]:
    """The threads of the newest messages that have all the words: of so many messages, more or less."""
    search = _Search(tx, project, wanted, 0, LAST_NUMBER, descending=True)
    threads: dict[str, None] = {}
    looked_at = 0
    while looked_at < limit and (numbers := await search.next_numbers()):
        threads |= dict.fromkeys([thread_id for (thread_id,) in await search.read("thread_id", numbers)])
        looked_at += len(numbers)
    return list(threads)


class _Search:
    """The numbers of the messages that have all the words, from `low` up to `high` (not included), some at a time."""

    def __init__(self, tx: Transaction, project: str, wanted: Wanted, low: int, high: int, *, descending: bool) -> None:
        self._tx = tx
        self._project = project
        self._wanted = wanted
        self._low = low
        self._high = high
        self._descending = descending
        self._blocks: list[int] | None = None
        self._of_thread: set[int] | None = None  # the numbers of its messages, where one thread is searched
        self._at_once = 1  # blocks that are looked into together
        self._numbers: list[int] = []

    async def next_numbers(self) -> list[int]:
        """The next ones, in order; none at the end."""
        if self._blocks is None:
            self._blocks = await self._list_blocks()
        while self._blocks and not self._numbers:
            await self._look_into_blocks(self._blocks[: self._at_once])
            del self._blocks[: self._at_once]
            self._at_once = min(2 * self._at_once, BLOCKS_AT_ONCE)
        numbers, self._numbers = self._numbers[:CANDIDATES], self._numbers[CANDIDATES:]
        return numbers

    async def _list_blocks(self) -> list[int]:
        """Those that may hold what is wanted, in the order in which they are to be looked into."""
        if not self._wanted.words:
            return []
        rows = await self._tx.fetch(
            "SELECT block FROM message_blocks WHERE project_id = $1 AND block >= $2 AND block <= $3"
            f" AND last_at >= $4 AND first_at < $5 ORDER BY block {'DESC' if self._descending else 'ASC'}",
            self._project,
            self._low // BLOCK,
            self._high // BLOCK,
            self._wanted.since,
            self._wanted.until,
        )
        blocks = [block for (block,) in rows]
        if self._wanted.thread_id is None:
            return blocks
        # Found first: a word that everybody uses would be looked up in all other threads, message by message.
        found = await self._tx.fetch(
            f"SELECT number FROM indexed_messages WHERE project_id = $1 AND message_id IN ({_OF_A_THREAD})",
            self._project,
            self._wanted.thread_id,
        )
        self._of_thread = {number for (number,) in found}
        having = {number // BLOCK for number in self._of_thread}
        return [block for block in blocks if block in having]

    async def _look_into_blocks(self, blocks: Sequence[int]) -> None:
        places = await _read_words(self._tx, self._project, blocks, self._wanted.words)
        for block in blocks:
            packed = sorted((places.get((block, word), b"") for word in self._wanted.words), key=len)
            if packed[0]:
                common = set(array("H", packed[0])).intersection(*(array("H", one) for one in packed[1:]))
                numbers = sorted((block * BLOCK + place for place in common), reverse=self._descending)
                self._numbers += [number for number in numbers if self._is_wanted(number)]

    def _is_wanted(self, number: int) -> bool:
        return self._low <= number < self._high and (self._of_thread is None or number in self._of_thread)

    async def read(self, columns: str, numbers: Sequence[int]) -> list[tuple[Any, ...]]:
        """Columns of those of the messages that still are there, and are wanted, in the order of `numbers`."""
        padded = repeated(numbers)
        found = await self._tx.fetch(
            "SELECT number, message_id FROM indexed_messages"
            f" WHERE project_id = $1 AND number IN ({_places(2, padded)})",
            self._project,
            *padded,
        )
        if not found:
            return []
        ids: dict[int, str] = dict(found)
        padded_ids = repeated(list(ids.values()))
        values: list[SqlValue] = [self._project, self._wanted.since, self._wanted.until, *padded_ids]
        rows = await self._tx.fetch(
            f"SELECT id, {columns} FROM messages WHERE project_id = $1 AND id IN ({_places(4, padded_ids)})"
            " AND created_at >= $2 AND created_at < $3 AND left_behind < 2",
            *values,
        )
        by_id = {message_id: tuple(rest) for message_id, *rest in rows}
        return [by_id[ids[number]] for number in numbers if ids.get(number) in by_id]


def _places(first: int, values: Sequence[Any]) -> str:
    return ", ".join(f"${first + at}" for at in range(len(values)))


async def _number_of(tx: Transaction, project: str, message_id: str) -> int | None:
    rows = await tx.fetch(
        "SELECT number FROM indexed_messages WHERE project_id = $1 AND message_id = $2", project, message_id
    )
    return rows[0][0] if rows else None
