"""Keeps the index as the rows say.

Rows and index cannot be changed together. So whoever changes rows notes in the same transaction what the index has to
be told (a chore), tells it after the commit, and strikes the chore off. What a crash leaves is done at the next start.
Telling means: read what the rows say now, and do that. It is done under the lock of the store, and so is indexing a
file: whichever comes last has read the newest rows, so a file that is detached while it is indexed leaves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from afterglow.contracts import House, Transaction
from afterglow.errors import StoreError
from afterglow.objects import VectorStoreFile
from afterglow.rows import vector_store_files as file_rows
from afterglow.rows import vector_stores as store_rows
from afterglow.rows.vector_stores import Chore
from afterglow.telemetry import log

AT_ONCE = 100


async def settle(house: House, chores: Sequence[Chore]) -> bool:
    """Tell the index; return whether it could be done. Else it is done later."""
    by_store: dict[tuple[str, str], list[Chore]] = {}
    for chore in chores:
        by_store.setdefault((chore.project, chore.store_id), []).append(chore)
    return all([await _settle_or_log(house, *place, those) for place, those in by_store.items()])


async def _settle_or_log(house: House, project: str, store_id: str, chores: list[Chore]) -> bool:
    """A store whose file on the disk is damaged keeps none of the others waiting."""
    try:
        async with house.locks.hold(store_id):
            await _settle_store(house, project, store_id, chores)
    except StoreError as error:
        log.error("The search index was not brought up to date, and will be later: %s", error)
        return False
    return True


async def settle_all(house: House) -> bool:
    """Do whatever was left undone; return whether all of it could be."""
    places = await house.store.read(store_rows.list_stores_with_chores)
    return all([await _settle_rest(house, *place) for place in places])


async def _settle_rest(house: House, project: str, store_id: str) -> bool:
    async def work(tx: Transaction) -> list[Chore]:
        return await store_rows.list_chores(tx, project, store_id, AT_ONCE)

    while chores := await house.store.read(work):
        if not await settle(house, chores):
            return False
    return True


async def _settle_store(house: House, project: str, store_id: str, chores: list[Chore]) -> None:
    files = dict.fromkeys(chore.file_id for chore in chores if chore.file_id)

    async def look(tx: Transaction) -> dict[str, VectorStoreFile | None] | None:
        if not await store_rows.has_index(tx, project, store_id, anew=any(not chore.file_id for chore in chores)):
            return None
        return {file_id: await file_rows.get_file(tx, project, store_id, file_id) for file_id in files}

    async def strike(tx: Transaction) -> None:
        await store_rows.delete_chores(tx, chores)

    found = await house.store.read(look)
    if found is None:
        await house.index.delete_store(project, store_id)
    else:
        for file_id, file in found.items():
            await _settle_file(house, project, store_id, file_id, file)
    await house.store.write(strike)


async def _settle_file(house: House, project: str, store_id: str, file_id: str, file: VectorStoreFile | None) -> None:
    if file is None or file.status in ("failed", "cancelled"):
        await house.index.delete_file(project, store_id, file_id)
    else:
        await house.index.set_attributes(project, store_id, file_id, file.attributes)
