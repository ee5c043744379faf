"""/v1/vector_stores, their files and file batches"""

from __future__ import annotations

from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import Response

from afterglow import vector_stores
from afterglow.api.answers import house_of, origin_of, project_of, reply, reply_list
from afterglow.api.bodies import parse
from afterglow.api.holding import Seen, held, read_wait
from afterglow.api.pages import query_choice
from afterglow.contracts import Transaction
from afterglow.objects import (
    BatchStatus,
    CreateFileBatch,
    CreateVectorStore,
    CreateVectorStoreFile,
    Deleted,
    FileContentPage,
    FileStatus,
    ModifyVectorStore,
    ModifyVectorStoreFile,
    SearchPage,
    SearchRanking,
    SearchResult,
    SearchVectorStore,
    TextContent,
)
from afterglow.rows import vector_store_files as file_rows
from afterglow.rows import vector_stores as store_rows
from afterglow.rows.lists import ListPage
from afterglow.vector_stores import no_file_in_store

FILE_STATUSES: tuple[str, ...] = get_args(FileStatus)
BATCH_STATUSES: tuple[str, ...] = get_args(BatchStatus)
ENDED_FILES, ENDED_BATCHES = ({*statuses} - {"in_progress"} for statuses in (FILE_STATUSES, BATCH_STATUSES))


def _ids(request: Request) -> tuple[str, str]:
    """Project and vector store."""
    return project_of(request), request.path_params["vector_store_id"]


# --- stores ----------------------------------------------------------------------------------------------------


async def create_vector_store(request: Request) -> Response:
    """POST /vector_stores"""
    body = await parse(request, CreateVectorStore, empty_ok=True)
    origin = await origin_of(request)
    return reply(await vector_stores.create_store(house_of(request), project_of(request), body, origin))


async def list_vector_stores(request: Request) -> Response:
    """GET /vector_stores"""
    now = house_of(request).clock.now()

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        return await store_rows.list_stores(tx, project_of(request), now, **cursor)

    return await reply_list(request, "vector store", page)


async def retrieve_vector_store(request: Request) -> Response:
    """GET /vector_stores/{vector_store_id}"""
    return reply(await vector_stores.retrieve_store(house_of(request), *_ids(request)))


async def modify_vector_store(request: Request) -> Response:
    """POST /vector_stores/{vector_store_id}"""
    body = await parse(request, ModifyVectorStore)
    return reply(await vector_stores.modify_store(house_of(request), *_ids(request), body))


async def delete_vector_store(request: Request) -> Response:
    """DELETE /vector_stores/{vector_store_id}. Its files stay."""
    project, store_id = _ids(request)
    await vector_stores.delete_store(house_of(request), project, store_id)
    return reply(Deleted(id=store_id, object="vector_store.deleted"))


async def search_vector_store(request: Request) -> Response:
    """POST /vector_stores/{vector_store_id}/search. `rewrite_query` is taken and changes nothing."""
    body = await parse(request, SearchVectorStore)
    project, store_id = _ids(request)
    queries = [body.query] if isinstance(body.query, str) else body.query
    found = await vector_stores.search(
        house_of(request),
        project,
        [store_id],
        queries,
        limit=body.max_num_results,
        where=body.filters or None,
        threshold=(body.ranking_options or SearchRanking()).score_threshold,
    )
    return reply(
        SearchPage(
            search_query=queries,
            data=[
                SearchResult(
                    file_id=hit.file_id,
                    filename=found.files[hit.file_id].filename,
                    score=hit.score,
                    attributes=dict(found.files[hit.file_id].attributes),
                    content=[TextContent(hit.chunk.text)],
                )
                for hit in found.hits
            ],
        )
    )


# --- files -----------------------------------------------------------------------------------------------------


async def create_vector_store_file(request: Request) -> Response:
    """POST /vector_stores/{vector_store_id}/files"""
    body = await parse(request, CreateVectorStoreFile)
    return reply(await vector_stores.create_file(house_of(request), *_ids(request), body, await origin_of(request)))


async def list_vector_store_files(request: Request) -> Response:
    """GET /vector_stores/{vector_store_id}/files; `filter` keeps those of one status."""
    return await _list_files(request, None)


async def _list_files(request: Request, batch_id: str | None) -> Response:
    project, store_id = _ids(request)
    status = query_choice(request, "filter", FILE_STATUSES)

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        await vector_stores.check_stores(tx, project, [store_id], 0)
        if batch_id is not None:
            await vector_stores.check_batch(tx, project, store_id, batch_id)
        return await file_rows.list_files(tx, project, store_id, status, batch_id, **cursor)

    return await reply_list(request, "file", page)


async def retrieve_vector_store_file(request: Request) -> Response:
    """GET /vector_stores/{vector_store_id}/files/{file_id}. With `wait`, and for polls of SDK helpers, held while the
    file is in progress."""
    (project, store_id), file_id = _ids(request), request.path_params["file_id"]
    house = house_of(request)

    async def work(tx: Transaction) -> Seen:
        file = await file_rows.get_file(tx, project, store_id, file_id)
        if file is None:
            await vector_stores.check_stores(tx, project, [store_id], 0)
            raise no_file_in_store(store_id, file_id)
        return Seen(file, file.status)

    wait = read_wait(request, FILE_STATUSES)
    watch = house.events.watch("file", project, file_id, store_id)
    return await held(request, wait, ENDED_FILES, watch, lambda: house.store.read(work))


async def modify_vector_store_file(request: Request) -> Response:
    """POST /vector_stores/{vector_store_id}/files/{file_id}. The attributes take the place of those before."""
    body = await parse(request, ModifyVectorStoreFile)
    file_id = request.path_params["file_id"]
    return reply(await vector_stores.modify_file(house_of(request), *_ids(request), file_id, body.attributes))


async def delete_vector_store_file(request: Request) -> Response:
    """DELETE /vector_stores/{vector_store_id}/files/{file_id}. The file itself stays."""
    file_id = request.path_params["file_id"]
    await vector_stores.detach_file(house_of(request), *_ids(request), file_id)
    return reply(Deleted(id=file_id, object="vector_store.file.deleted"))


async def retrieve_vector_store_file_content(request: Request) -> Response:
    """GET /vector_stores/{vector_store_id}/files/{file_id}/content. The text that was found in it, whole."""
    file_id = request.path_params["file_id"]
    text = await vector_stores.retrieve_file_content(house_of(request), *_ids(request), file_id)
    return reply(FileContentPage(data=[TextContent(text)]))


# --- batches ---------------------------------------------------------------------------------------------------


async def create_file_batch(request: Request) -> Response:
    """POST /vector_stores/{vector_store_id}/file_batches"""
    body = await parse(request, CreateFileBatch)
    return reply(await vector_stores.create_batch(house_of(request), *_ids(request), body, await origin_of(request)))


async def retrieve_file_batch(request: Request) -> Response:
    """GET /vector_stores/{vector_store_id}/file_batches/{batch_id}. With `wait`, and for polls of SDK helpers, held
    while any of its files is in progress."""
    (project, store_id), batch_id = _ids(request), request.path_params["batch_id"]
    house = house_of(request)

    async def read() -> Seen:
        batch = await vector_stores.retrieve_batch(house, project, store_id, batch_id)
        return Seen(batch, batch.status)

    wait = read_wait(request, BATCH_STATUSES)
    return await held(request, wait, ENDED_BATCHES, house.events.watch("batch", project, batch_id, store_id), read)


async def cancel_file_batch(request: Request) -> Response:
    """POST /vector_stores/{vector_store_id}/file_batches/{batch_id}/cancel"""
    batch_id = request.path_params["batch_id"]
    return reply(await vector_stores.cancel_batch(house_of(request), *_ids(request), batch_id))


async def list_files_of_batch(request: Request) -> Response:
    """GET /vector_stores/{vector_store_id}/file_batches/{batch_id}/files; `filter` keeps those of one status."""
    return await _list_files(request, request.path_params["batch_id"])
