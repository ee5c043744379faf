"""Messages are findable by their words soon after they were written: what keeps that index up, in the background.

How the index is kept is in `rows/message_words.py`; what callers ask of it in `api/finding.py`.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from itertools import groupby
from operator import attrgetter

from afterglow.contracts import House, Transaction
from afterglow.rows import message_words as word_rows
from afterglow.rows.message_words import Cleaning

BATCH = 64  # messages in one transaction
LOCK = "the words of messages"


async def index_messages(house: House) -> int:
    """Index what was written, and take out what was deleted, until nothing is left; return how many messages.

    One process at a time does so; another one waits until it is done.
    """
    if not await house.store.read(_is_work):
        return 0
    done = 0
    async with house.locks.hold(LOCK):
        while count := await _index_batch(house):
            done += count
        while cleaning := await house.store.read(word_rows.read_cleaning):
            await house.store.write(partial(_clean, cleaning))
    return done


async def _clean(cleaning: Cleaning, tx: Transaction) -> None:
    await word_rows.clean(tx, cleaning)


async def _is_work(tx: Transaction) -> bool:
    rows = await tx.fetch(
        "SELECT 1 WHERE EXISTS (SELECT 1 FROM unindexed_messages) OR EXISTS (SELECT 1 FROM removed_messages)"
    )
    return bool(rows)


async def _index_batch(house: House) -> int:
    """Some messages; then others have the database for as long as it took."""
    began = time.monotonic()
    count = await house.store.write(_index_some)
    if count == BATCH:
        await asyncio.sleep(time.monotonic() - began)
    return count


async def _index_some(tx: Transaction) -> int:
    unindexed = await word_rows.list_unindexed(tx, BATCH)
    unindexed.sort(key=attrgetter("project"))  # a stable order: of one project they stay in order of their times
    for project, some in groupby(unindexed, key=attrgetter("project")):
        await word_rows.index_messages(tx, project, list(some))
    return len(unindexed)
