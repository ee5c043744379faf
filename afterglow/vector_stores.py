"""What happens to vector stores, their files and their batches when a caller asks, and when their time is over.

Files are indexed by `ingest/pipeline.py`; each change here leaves jobs for it, and chores for the index
(`ingest/upkeep.py`), in the transaction that makes the change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec import UNSET, UnsetType, structs

from afterglow.contracts import Hit, House, Store, Transaction, Weights
from afterglow.errors import DimensionMismatch, InvalidRequest, ModelError, NotFound
from afterglow.ids import new_id
from afterglow.ingest.states import move_file
from afterglow.ingest.upkeep import settle
from afterglow.objects import (
    Attributes,
    AttributeValue,
    AutoChunking,
    CreateFileBatch,
    CreateVectorStore,
    CreateVectorStoreFile,
    FileError,
    Filter,
    ModifyVectorStore,
    NewVectorStore,
    StaticChunking,
    StaticChunkSizes,
    StoreExpiry,
    Thread,
    VectorStore,
    VectorStoreFile,
    VectorStoreFileBatch,
)
from afterglow.rows import files as stored_file_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows import vector_store_files as file_rows
from afterglow.rows import vector_stores as store_rows
from afterglow.rows.requests import Origin, insert_request
from afterglow.rows.vector_stores import Chore
from afterglow.telemetry import log
from afterglow.tools.file_search import merged
from afterglow.webhooks import end_in_batches, record_batch, record_file

AUTO = StaticChunking(StaticChunkSizes(max_chunk_size_tokens=800, chunk_overlap_tokens=400))
ACTIVE_EVERY_S = 60  # a store that is searched all the time is not written all the time
EMBEDDED_QUERY_CHARS = 8000
SWEEP_LIMIT = 100
FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 0.5
EXPIRED_MEANWHILE = FileError("server_error", "The vector store expired before the file was indexed.")


def no_store(store_id: str) -> NotFound:
    return NotFound(f"Vector store with id '{store_id}' not found.")


def no_file_in_store(store_id: str, file_id: str) -> NotFound:
    return NotFound(f"No file found with id '{file_id}' in vector store '{store_id}'.")


def has_expired(store_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"Vector store '{store_id}' has expired: its files can no longer be searched. "
        "Create a new one with the same files, which are still listed."
    )


# --- stores ----------------------------------------------------------------------------------------------------


async def create_store(house: House, project: str, body: CreateVectorStore, origin: Origin) -> VectorStore:
    async def work(tx: Transaction) -> VectorStore:
        store = await insert_store(tx, house, project, body)
        await insert_request(tx, project, origin, store.id, store.created_at)
        return store

    store = await house.store.write(work)
    house.ingest_queue.wake()
    return store


async def insert_store(tx: Transaction, house: House, project: str, body: CreateVectorStore) -> VectorStore:
    """Make a store with its files. Raises NotFound for files that are not there."""
    now = house.clock.now()
    store = VectorStore(
        id=new_id("vs"),
        created_at=int(now),
        name=body.name or "",
        expires_after=body.expires_after or None,
        last_active_at=int(now),
        metadata=body.metadata or {},
    )
    await store_rows.insert_store(tx, project, store, round(now * 1_000_000))
    asked = [CreateVectorStoreFile(file_id=id, chunking_strategy=body.chunking_strategy) for id in body.file_ids or ()]
    await attach_files(tx, house, project, store, asked)
    return await _store(tx, project, store.id, now)


async def retrieve_store(house: House, project: str, store_id: str) -> VectorStore:
    async def work(tx: Transaction) -> VectorStore:
        return await _store(tx, project, store_id, house.clock.now())

    return await house.store.read(work)


async def modify_store(house: House, project: str, store_id: str, body: ModifyVectorStore) -> VectorStore:
    """Change what `body` names. Expiry goes on counting from the last use; what has expired stays so."""
    now = house.clock.now()

    async def work(tx: Transaction) -> VectorStore:
        store = await _store(tx, project, store_id, now)
        if body.name is not UNSET:
            store.name = body.name or ""
        if body.metadata is not UNSET:
            store.metadata = body.metadata or {}
        if body.expires_after is not UNSET:
            if store.status == "expired":
                raise has_expired(store_id)
            store.expires_after = body.expires_after
        await store_rows.update_store(tx, project, store)
        return await _store(tx, project, store_id, now)

    return await house.store.write(work)


async def delete_store(house: House, project: str, store_id: str) -> None:
    """Delete it with its index. The files stay, and whoever names it keeps its id."""

    async def work(tx: Transaction) -> list[Chore]:
        if not await store_rows.delete_store(tx, project, store_id):
            raise no_store(store_id)
        return await store_rows.insert_chores(tx, project, store_id)

    await follow_up(house, await house.store.write(work))


async def _store(tx: Transaction, project: str, store_id: str, now: float) -> VectorStore:
    store = await store_rows.get_store(tx, project, store_id, now)
    if store is None:
        raise no_store(store_id)
    return store


async def _living_store(tx: Transaction, project: str, store_id: str, now: float) -> VectorStore:
    store = await _store(tx, project, store_id, now)
    if store.status == "expired":
        raise has_expired(store_id)
    return store


async def _touch(tx: Transaction, project: str, store: VectorStore, now: float) -> None:
    """It was used: its expiry moves. One that has expired stays so."""
    if store.status != "expired":
        store.last_active_at = int(now)
        await store_rows.update_store(tx, project, store)


# --- files -----------------------------------------------------------------------------------------------------


async def create_file(
    house: House, project: str, store_id: str, body: CreateVectorStoreFile, origin: Origin
) -> VectorStoreFile:
    """Attach a file; it is indexed soon."""
    now = house.clock.now()

    async def work(tx: Transaction) -> tuple[VectorStoreFile, list[Chore]]:
        store = await _living_store(tx, project, store_id, now)
        [file], chores = await attach_files(tx, house, project, store, [body])
        await insert_request(tx, project, origin, file.id, int(now))
        return file, chores

    file, chores = await house.store.write(work)
    house.ingest_queue.wake()
    await settle(house, chores)
    return file


async def attach_files(
    tx: Transaction, house: House, project: str, store: VectorStore, asked: Sequence[CreateVectorStoreFile]
) -> tuple[list[VectorStoreFile], list[Chore]]:
    """Attach files to a store that has not expired, each once, and note its use; return them as they now are there.

    Raises NotFound, with all ids of those that do not exist.
    """
    now = house.clock.now()
    wanted = {one.file_id: one for one in asked}
    missing = [id for id in wanted if await stored_file_rows.hold_file(tx, project, id, now) is None]
    if missing:
        raise NotFound(f"Files [{', '.join(missing)}] were not found")
    files: dict[str, VectorStoreFile] = {}
    chores: list[Chore] = []
    for file_id, one in wanted.items():
        if file := await file_rows.get_file(tx, project, store.id, file_id):
            chores += await _attach_again(tx, house, project, file, one)
            files[file_id] = file
    new = [_new_file(store.id, one, int(now)) for file_id, one in wanted.items() if file_id not in files]
    if new:
        await file_rows.insert_files(tx, project, store.id, new, round(now * 1_000_000))
    await _touch(tx, project, store, now)
    files |= {file.id: file for file in new}
    return [files[file_id] for file_id in wanted], chores


def _new_file(store_id: str, asked: CreateVectorStoreFile, now: int) -> VectorStoreFile:
    return VectorStoreFile(
        id=asked.file_id,
        created_at=now,
        vector_store_id=store_id,
        chunking_strategy=_shown(asked.chunking_strategy, AUTO),
        attributes=asked.attributes or {},
    )


def _shown(asked: AutoChunking | StaticChunking | UnsetType, unless_asked: StaticChunking) -> StaticChunking:
    if asked is UNSET:
        return unless_asked
    return asked if isinstance(asked, StaticChunking) else AUTO


async def _attach_again(
    tx: Transaction, house: House, project: str, file: VectorStoreFile, asked: CreateVectorStoreFile
) -> list[Chore]:
    """A file that is attached already is indexed again when it is not in the index as it is wanted."""
    before = structs.replace(file)
    file.chunking_strategy = _shown(asked.chunking_strategy, file.chunking_strategy)
    if asked.attributes is not UNSET:
        file.attributes = asked.attributes or {}
    model = await file_rows.get_model_of_file(tx, project, file.vector_store_id, file.id)
    as_wanted = file.status == "in_progress" or (
        file.status == "completed" and (house.embedder is None or model == house.embedder.model)
    )
    if as_wanted and file.chunking_strategy == before.chunking_strategy:
        if file == before:
            return []
        await file_rows.update_file(tx, project, file)
        return await store_rows.insert_chores(tx, project, file.vector_store_id, [file.id])
    move_file(file, "attached")
    await file_rows.queue_file(tx, project, file)
    return []


async def modify_file(
    house: House, project: str, store_id: str, file_id: str, attributes: Attributes | None
) -> VectorStoreFile:
    """Put these attributes in the place of the file's."""
    now = house.clock.now()

    async def work(tx: Transaction) -> tuple[VectorStoreFile, list[Chore]]:
        store = await _store(tx, project, store_id, now)
        file = await _file(tx, project, store_id, file_id)
        file.attributes = attributes or {}
        await file_rows.update_file(tx, project, file)
        await _touch(tx, project, store, now)
        return file, await store_rows.insert_chores(tx, project, store_id, [file_id])

    file, chores = await house.store.write(work)
    await settle(house, chores)
    return file


async def detach_file(house: House, project: str, store_id: str, file_id: str) -> None:
    """Take a file out of the store and out of its index; the file itself stays."""
    now = house.clock.now()

    async def work(tx: Transaction) -> list[Chore]:
        store = await _store(tx, project, store_id, now)
        file = await _file(tx, project, store_id, file_id)
        await _touch(tx, project, store, now)
        return await _leave_store(tx, project, file, now)

    await follow_up(house, await house.store.write(work))


async def leave_stores(tx: Transaction, project: str, file_id: str, now: float) -> list[Chore]:
    """Take a file that is being deleted out of all stores. The caller stops its jobs and settles the chores."""
    chores: list[Chore] = []
    for store_id in await file_rows.list_holders(tx, project, file_id):
        chores += await _leave_store(tx, project, await _file(tx, project, store_id, file_id), now)
    return chores


async def _leave_store(tx: Transaction, project: str, file: VectorStoreFile, now: float) -> list[Chore]:
    await file_rows.delete_file(tx, project, file)
    await end_in_batches(tx, project, file.vector_store_id, file.id, "cancelled", now)
    return await store_rows.insert_chores(tx, project, file.vector_store_id, [file.id])


async def follow_up(house: House, chores: Sequence[Chore]) -> None:
    """After the commit: stop the jobs of files and stores that are gone, tell who waits for them, and let go of them in
    the index."""
    house.webhook_queue.wake()
    for chore in chores:
        house.ingest_queue.cancel(f"{chore.store_id}/{chore.file_id}" if chore.file_id else chore.store_id)
    for project, store_id in {(chore.project, chore.store_id) for chore in chores}:
        house.events.note(project, store_id)
    await settle(house, chores)


async def _file(tx: Transaction, project: str, store_id: str, file_id: str) -> VectorStoreFile:
    file = await file_rows.get_file(tx, project, store_id, file_id)
    if file is None:
        raise no_file_in_store(store_id, file_id)
    return file


async def retrieve_file_content(house: House, project: str, store_id: str, file_id: str) -> str:
    """The text that was found in a file. Raises as `check_indexed`."""
    await check_indexed(house, project, store_id, file_id)
    return await house.index.text(project, store_id, file_id)


async def check_indexed(house: House, project: str, store_id: str, file_id: str) -> None:
    """Raise NotFound when the store has no such file, and InvalidRequest while it is not in the index."""
    now = house.clock.now()

    async def work(tx: Transaction) -> VectorStoreFile:
        await _living_store(tx, project, store_id, now)
        return await _file(tx, project, store_id, file_id)

    file = await house.store.read(work)
    if file.status != "completed":
        raise InvalidRequest(f"File '{file_id}' has no content here in status '{file.status}'.")


# --- batches ---------------------------------------------------------------------------------------------------


async def create_batch(
    house: House, project: str, store_id: str, body: CreateFileBatch, origin: Origin
) -> VectorStoreFileBatch:
    now = house.clock.now()
    asked = body.files or [
        CreateVectorStoreFile(file_id=file_id, attributes=body.attributes, chunking_strategy=body.chunking_strategy)
        for file_id in body.file_ids or ()
    ]

    async def work(tx: Transaction) -> tuple[VectorStoreFileBatch, list[Chore]]:
        store = await _living_store(tx, project, store_id, now)
        files, chores = await attach_files(tx, house, project, store, asked)
        batch_id = new_id("vsfb")
        await file_rows.insert_batch(tx, project, store_id, batch_id, files, int(now))
        await insert_request(tx, project, origin, batch_id, int(now))
        batch = await _batch(tx, project, store_id, batch_id)
        await record_batch(tx, project, batch, house.clock.now())
        return batch, chores

    batch, chores = await house.store.write(work)
    house.ingest_queue.wake()
    house.webhook_queue.wake()
    await settle(house, chores)
    return batch


async def retrieve_batch(house: House, project: str, store_id: str, batch_id: str) -> VectorStoreFileBatch:
    async def work(tx: Transaction) -> VectorStoreFileBatch:
        await _store(tx, project, store_id, house.clock.now())
        return await _batch(tx, project, store_id, batch_id)

    return await house.store.read(work)


async def cancel_batch(house: House, project: str, store_id: str, batch_id: str) -> VectorStoreFileBatch:
    """Cancel the files that are still in progress, unless another batch waits for them too. One that is over stays
    as it is."""

    async def work(tx: Transaction) -> tuple[VectorStoreFileBatch, list[Chore]]:
        await _store(tx, project, store_id, house.clock.now())
        await _batch(tx, project, store_id, batch_id)
        await store_rows.touch_store(tx, project, store_id)  # two batches that wait for a file see each other's end
        file_ids = await file_rows.list_waited_for(tx, project, batch_id)
        cancelled = await file_rows.cancel_batch(tx, project, batch_id)
        for file_id in file_ids:
            file = await _file(tx, project, store_id, file_id)
            move_file(file, "cancel_asked")
            await file_rows.update_file(tx, project, file)
            await record_file(tx, project, file, house.clock.now())
        chores = await store_rows.insert_chores(tx, project, store_id, file_ids)
        batch = await _batch(tx, project, store_id, batch_id)
        if cancelled:
            await record_batch(tx, project, batch, house.clock.now())
        return batch, chores

    batch, chores = await house.store.write(work)
    house.events.note(project, batch_id, batch.status)
    await follow_up(house, chores)
    return batch


async def check_batch(tx: Transaction, project: str, store_id: str, batch_id: str) -> None:
    """Raise NotFound unless the store has this batch."""
    await _batch(tx, project, store_id, batch_id)


async def _batch(tx: Transaction, project: str, store_id: str, batch_id: str) -> VectorStoreFileBatch:
    batch = await file_rows.get_batch(tx, project, store_id, batch_id)
    if batch is None:
        raise NotFound.of("file batch", batch_id)
    return batch


# --- stores of assistants and threads --------------------------------------------------------------------------


async def check_stores(tx: Transaction, project: str, store_ids: Iterable[str], now: float) -> None:
    """Raise NotFound for the first that is not there. One that has expired may be named; searching it says so."""
    for store_id in store_ids:
        await _store(tx, project, store_id, now)


async def insert_store_of(
    tx: Transaction, house: House, project: str, body: NewVectorStore, days: int | None
) -> VectorStore:
    """Make the store of a new assistant, or of a thread, whose stores expire after so many days."""
    return await insert_store(
        tx,
        house,
        project,
        CreateVectorStore(
            file_ids=body.file_ids,
            chunking_strategy=body.chunking_strategy,
            metadata=body.metadata,
            expires_after=UNSET if days is None else StoreExpiry(anchor="last_active_at", days=days),
        ),
    )


async def attach_to_thread(
    tx: Transaction, house: House, project: str, thread: Thread, file_ids: Sequence[str]
) -> None:
    """Give files of messages to the thread's store. A thread that has none, or whose store was deleted, gets one.

    Raises InvalidRequest when it has expired. The caller writes the thread, and wakes the pipeline.
    """
    now = house.clock.now()
    named = thread.tool_resources.get("file_search") or {}
    for store_id in named.get("vector_store_ids") or ():
        if await store_rows.get_store(tx, project, store_id, now):
            store = await _living_store(tx, project, store_id, now)
            await attach_files(tx, house, project, store, [CreateVectorStoreFile(file_id=id) for id in file_ids])
            return
    new = NewVectorStore(file_ids=list(dict.fromkeys(file_ids)))
    store = await insert_store_of(tx, house, project, new, house.settings.thread_store_days)
    thread.tool_resources["file_search"] = {"vector_store_ids": [store.id]}


async def wait_for_thread_store(house: House, project: str, thread_id: str, timeout_s: float) -> bool:
    """Wait until no file of the thread's store is in progress; False when that takes longer."""
    now = house.clock.now()

    async def work(tx: Transaction) -> bool:
        thread = await thread_rows.get_thread(tx, project, thread_id)
        named = (thread and thread.tool_resources.get("file_search")) or {}
        stores = [await store_rows.get_store(tx, project, id, now) for id in named.get("vector_store_ids") or ()]
        return not any(store and store.status == "in_progress" for store in stores)

    wait_s, left_s = FIRST_WAIT_S, timeout_s
    while not await house.store.read(work):
        if left_s <= 0:
            return False
        await asyncio.sleep(min(wait_s, left_s))
        left_s -= wait_s
        wait_s = min(wait_s * 1.5, LONGEST_WAIT_S)
    return True


# --- searching -------------------------------------------------------------------------------------------------


class FoundFile(NamedTuple):
    filename: str
    attributes: Mapping[str, AttributeValue]


class Found(NamedTuple):
    """hits: best first. files: those that the hits are in, by id."""

    hits: list[Hit]
    files: dict[str, FoundFile]


async def search(
    house: House,
    project: str,
    store_ids: Sequence[str],
    queries: Sequence[str],
    *,
    limit: int,
    where: Filter | None = None,
    threshold: float = 0.0,
    weights: Weights | None = None,
) -> Found:
    """Search stores, and note their use. A passage that several queries find counts with its best score.

    limit: 1–50 hits for all queries together. Raises NotFound and InvalidRequest: no such store, it has expired, or
    its embeddings are of another model than the server's.
    """
    models = await _use_stores(house, project, store_ids)
    embeddings = await _embed_queries(house, models, queries)
    try:
        found = [
            await house.index.search(project, store_ids, query, embedding, limit, where, threshold, weights)
            for query, embedding in zip(queries, embeddings, strict=True)
        ]
    except DimensionMismatch as error:
        raise InvalidRequest(str(error)) from None
    hits = merged(found, limit)

    async def look(tx: Transaction) -> dict[str, FoundFile]:
        places = dict.fromkeys((hit.store_id, hit.file_id) for hit in hits)
        return {
            file_id: file
            for store_id, file_id in places
            if (file := await _found_file(tx, project, store_id, file_id, house.clock.now()))
        }

    files = await house.store.read(look)
    return Found([hit for hit in hits if hit.file_id in files], files)


async def _use_stores(house: House, project: str, store_ids: Sequence[str]) -> dict[str, str]:
    """Check that stores can be searched; return the embedding models of those that have embeddings."""
    now = house.clock.now()

    async def look(tx: Transaction) -> tuple[dict[str, str], bool]:
        stores = [await _living_store(tx, project, store_id, now) for store_id in store_ids]
        models = {id: model for id in store_ids if (model := await file_rows.get_embedding_model(tx, project, id))}
        return models, any((store.last_active_at or 0) <= now - ACTIVE_EVERY_S for store in stores)

    async def touch(tx: Transaction) -> None:
        for store_id in store_ids:
            await _touch(tx, project, await _store(tx, project, store_id, now), now)

    models, stale = await house.store.read(look)
    if stale:
        await house.store.write(touch)
    return models


async def _embed_queries(
    house: House, models: Mapping[str, str], queries: Sequence[str]
) -> Sequence[Sequence[float] | None]:
    """None for each query where words alone are searched: without a server of embeddings, or without its answer."""
    embedder = house.embedder
    if embedder is None or not models:
        return [None] * len(queries)
    for store_id, model in models.items():
        check_model(store_id, model, embedder.model)
    try:
        return await embedder.embed([query[:EMBEDDED_QUERY_CHARS] for query in queries])
    except ModelError as error:
        log.warning("A search goes by words alone: %s", error)
        return [None] * len(queries)


def check_model(store_id: str, stores: str | None, servers: str) -> None:
    """Raises InvalidRequest when a store has embeddings of another model than the server's."""
    if stores not in (None, servers):
        raise InvalidRequest(
            f"Vector store '{store_id}' was indexed with the embedding model '{stores}', and this server now uses "
            f"'{servers}'. Configure the former, or run `afterglow reindex`."
        )


async def _found_file(tx: Transaction, project: str, store_id: str, file_id: str, now: float) -> FoundFile | None:
    """None when the file has just left the store."""
    file = await file_rows.get_file(tx, project, store_id, file_id)
    stored = await stored_file_rows.get_file(tx, project, file_id, now)
    if file is None or stored is None or file.status in ("failed", "cancelled"):
        return None
    return FoundFile(stored.file.filename, file.attributes)


# --- the clock, and the operator -------------------------------------------------------------------------------


async def expire_stores(house: House) -> None:
    """Let the index go of stores that have expired. Their rows stay, so that their files can be listed."""
    now = house.clock.now()

    async def work(tx: Transaction) -> list[Chore]:
        chores: list[Chore] = []
        for project, store_id in await store_rows.list_overdue(tx, now, SWEEP_LIMIT):
            for file in await file_rows.list_in_status(tx, project, store_id, "in_progress"):
                move_file(file, "broke", error=EXPIRED_MEANWHILE)
                await file_rows.update_file(tx, project, file)
                await record_file(tx, project, file, house.clock.now())
            await store_rows.mark_swept(tx, project, store_id)
            chores += await store_rows.insert_chores(tx, project, store_id)
        return chores

    while chores := await house.store.write(work):
        await follow_up(house, chores)


async def reindex(store: Store, now: float, only: str | None = None) -> int:
    """Have the files of all stores of all projects, or of one store, indexed anew; return how many there are.

    Raises NotFound when there is no such store, or when it has expired.

    Can be called beside a running server, whose pipeline then empties the index of each store and fills it again.
    """
    found = await store.read(lambda tx: store_rows.list_all(tx, now))
    if only is not None and only not in [store_id for _, store_id in found]:
        raise no_store(only)
    return sum([await _reindex_store(store, *place) for place in found if only in (None, place[1])])


async def _reindex_store(store: Store, project: str, store_id: str) -> int:
    async def work(tx: Transaction) -> int:
        completed = await file_rows.list_in_status(tx, project, store_id, "completed")
        for file in completed:
            move_file(file, "attached")
            await file_rows.set_embedding_model(tx, project, file, None)
        # Those in progress are begun anew as well: what has been done of them may be of the old model.
        files = [*completed, *await file_rows.list_in_status(tx, project, store_id, "in_progress")]
        for file in files:
            await file_rows.queue_file(tx, project, file)
        await store_rows.insert_chores(tx, project, store_id)
        return len(files)

    return await store.write(work)
