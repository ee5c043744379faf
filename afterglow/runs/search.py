"""Searching files for a run: in which stores, and which search of the thread it is."""

from __future__ import annotations

from typing import NamedTuple

from afterglow.contracts import Hit, House, Transaction
from afterglow.rows import threads as thread_rows
from afterglow.rows import vector_stores as store_rows
from afterglow.rows.assistants import get_assistant
from afterglow.rows.runs import RunRow
from afterglow.rows.search_results import next_number
from afterglow.tools.file_search import SearchOptions
from afterglow.vector_stores import FoundFile, search


class RunFound(NamedTuple):
    """hits: best first. files: those that the hits are in, by id. number: of the search, for its markers."""

    hits: list[Hit]
    files: dict[str, FoundFile]
    number: int


async def search_for_run(house: House, row: RunRow, queries: list[str], options: SearchOptions) -> RunFound:
    """Search the stores of the run's assistant, its thread and its request, but for those that are gone.

    Raises InvalidRequest when one cannot be searched: it has expired, or needs another embedding model.
    """

    async def look(tx: Transaction) -> tuple[list[str], int]:
        return await _stores_of(tx, house, row), await next_number(tx, row.project, row.run.thread_id)

    store_ids, number = await house.store.read(look)
    if not store_ids or not queries:
        return RunFound([], {}, number)
    found = await search(
        house,
        row.project,
        store_ids,
        queries,
        limit=options.max_results,
        threshold=options.threshold,
        weights=options.weights,
    )
    return RunFound(found.hits, found.files, number)


async def _stores_of(tx: Transaction, house: House, row: RunRow) -> list[str]:
    assistant = await get_assistant(tx, row.project, row.run.assistant_id)
    thread = await thread_rows.get_thread(tx, row.project, row.run.thread_id)
    given = [
        assistant.assistant.tool_resources if assistant else {},
        thread.tool_resources if thread else {},
        row.run.tool_resources,
    ]
    ids = [store_id for named in given for store_id in (named.get("file_search") or {}).get("vector_store_ids", [])]
    now = house.clock.now()
    return [
        store_id
        for store_id in dict.fromkeys(ids)
        if await store_rows.get_store(tx, row.project, store_id, now) is not None
    ]
