"""/v1/vector_stores and their files by the official client and by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow import vector_stores
from afterglow.app import build_parser
from afterglow.errors import ModelUnreachable, Unreadable
from afterglow.ingest.upkeep import settle_all
from afterglow.settings import load
from afterglow.testing import ScriptedEmbedder, SetClock
from tests.api.stores import CATS, DOGS, check_counts, indexed_files, make_store, search, settled, upload
from tests.api.wire import Fault, Json, Wire, until
from tests.conftest import Server, ServerFactory

DAY_S = 24 * 3600
AUTO: Json = {"type": "static", "static": {"max_chunk_size_tokens": 800, "chunk_overlap_tokens": 400}}
SMALL: Json = {"type": "static", "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 50}}


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
async def dated(start_server: ServerFactory, tmp_path: Path, clock: SetClock) -> AsyncGenerator[Server, None]:
    """A server whose time is set by hand."""
    async with start_server(tmp_path, clock=clock) as server:
        yield server


# --- stores ----------------------------------------------------------------------------------------------------


async def test_an_empty_store(wire: Wire):
    """It is completed, holds nothing, was last active when it was made, and its name is never null."""
    made = await wire.made("/vector_stores")
    assert made == {
        "id": made["id"],
        "object": "vector_store",
        "created_at": made["created_at"],
        "name": "",
        "usage_bytes": 0,
        "file_counts": {"in_progress": 0, "completed": 0, "failed": 0, "cancelled": 0, "total": 0},
        "status": "completed",
        "expires_after": None,
        "expires_at": None,
        "last_active_at": made["created_at"],
        "metadata": {},
    }
    assert made["id"].startswith("vs_")
    assert await wire.read(f"/vector_stores/{made['id']}") == made
    assert (await wire.read("/vector_stores"))["data"] == [made]


async def test_a_store_is_modified_and_deleted(wire: Wire):
    """Left out stays, null clears, metadata is replaced; what is deleted is gone."""
    expiry = {"anchor": "last_active_at", "days": 3}
    made = await wire.made("/vector_stores", {"name": "n", "expires_after": expiry, "metadata": {"a": "1"}})
    path = f"/vector_stores/{made['id']}"
    assert made["expires_at"] == made["last_active_at"] + 3 * DAY_S
    assert await wire.made(path, {}) == made
    assert await wire.made(path, {"metadata": {"b": "2"}}) == made | {"metadata": {"b": "2"}}
    cleared = await wire.made(path, {"name": None, "expires_after": None, "metadata": None})
    assert cleared == made | {"name": "", "expires_after": None, "expires_at": None, "metadata": {}}
    deleted = (await wire.delete(path)).json
    assert deleted == {"id": made["id"], "object": "vector_store.deleted", "deleted": True}
    assert (await wire.get(path)).fault == Fault(404, f"Vector store with id '{made['id']}' not found.")
    assert (await wire.read("/vector_stores"))["data"] == []


BAD_STORES: list[Any] = [
    ({"name": 1}, "name", "invalid_type"),
    ({"x": 1}, "x", "unknown_parameter"),
    ({"expires_after": {"anchor": "created_at", "days": 1}}, "expires_after.anchor", "invalid_value"),
    (
        {"expires_after": {"anchor": "last_active_at", "days": 0}},
        "expires_after.days",
        "integer_below_min_value",
    ),
    (
        {"expires_after": {"anchor": "last_active_at", "days": 366}},
        "expires_after.days",
        "integer_above_max_value",
    ),
    ({"file_ids": ["file-x"] * 501}, "file_ids", "array_above_max_length"),
    ({"chunking_strategy": {"type": "other"}}, "chunking_strategy.type", "invalid_value"),
    (
        {
            "chunking_strategy": {
                "type": "static",
                "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 51},
            }
        },
        "chunking_strategy.static.chunk_overlap_tokens",
        "integer_above_max_value",
    ),
]


async def test_a_bad_store_is_refused(wire: Wire):
    """Each fault is named with its path and code, and nothing is made."""
    for body, param, code in BAD_STORES:
        fault = (await wire.post("/vector_stores", body)).fault
        assert (fault.status, fault.param, fault.code) == (400, param, code), body
    assert (await wire.get("/vector_stores")).ids == []


async def test_a_store_with_a_file_that_is_not_there_is_not_made(server: Server, wire: Wire):
    """All that are missing are named."""
    there = await upload(server)
    answer = await wire.post("/vector_stores", {"file_ids": ["file-x", there, "file-y"]})
    assert answer.fault == Fault(404, "Files [file-x, file-y] were not found")
    assert (await wire.get("/vector_stores")).ids == []


# --- files -----------------------------------------------------------------------------------------------------


async def test_a_file_is_there_at_once_and_indexed_soon(server: Server, wire: Wire):
    """The answer says in_progress, a GET finds it right away and says when to poll again; counts and usage follow."""
    server.parser.holds["cats.txt"] = asyncio.Event()
    store, file_id = (await wire.made("/vector_stores"))["id"], await upload(server)
    made = await wire.made(f"/vector_stores/{store}/files", {"file_id": file_id})
    assert made == {
        "id": file_id,
        "object": "vector_store.file",
        "created_at": made["created_at"],
        "usage_bytes": 0,
        "vector_store_id": store,
        "status": "in_progress",
        "last_error": None,
        "chunking_strategy": AUTO,
        "attributes": {},
    }
    answer = await wire.get(f"/vector_stores/{store}/files/{file_id}")
    assert answer.json == made
    assert int(answer.headers["openai-poll-after-ms"]) == server.house.settings.poll_after_ms
    assert (await wire.read(f"/vector_stores/{store}"))["status"] == "in_progress"
    assert (await check_counts(server, store)).in_progress == 1
    refused = await wire.get(f"/vector_stores/{store}/files/{file_id}/content")
    assert refused.fault == Fault(400, f"File '{file_id}' has no content here in status 'in_progress'.")
    server.parser.holds["cats.txt"].set()
    await settled(server, store)
    done = await wire.read(f"/vector_stores/{store}/files/{file_id}")
    assert done == made | {"status": "completed", "usage_bytes": len(CATS)}
    assert (await check_counts(server, store)).completed == 1
    assert await server.house.index.usage_bytes("default", store) == len(CATS)
    content = await wire.read(f"/vector_stores/{store}/files/{file_id}/content")
    assert content["data"] == [{"type": "text", "text": CATS.decode()}]


async def test_the_helpers_of_the_sdk_come_to_an_end(server: Server):
    """create_and_poll, upload_and_poll and poll, with a file that fails as well."""
    stores = server.client.vector_stores
    store = await stores.create()
    file = await stores.files.upload_and_poll(vector_store_id=store.id, file=("a.txt", CATS), poll_interval_ms=5)
    assert file.status == "completed"
    empty_id = await upload(server, b"")
    empty = await stores.files.create_and_poll(empty_id, vector_store_id=store.id, poll_interval_ms=5)
    assert empty.status == "failed"
    assert empty.last_error is not None
    assert empty.last_error.code == "invalid_file"
    assert empty.last_error.message == "The file could not be parsed because it is empty."


async def test_chunk_sizes_are_those_asked_for(server: Server):
    """`auto` and nothing are 800 and 400 tokens, and are shown so."""
    stores = server.client.vector_stores
    for asked, shown in ((None, AUTO), ({"type": "auto"}, AUTO), (SMALL, SMALL)):
        file_id = await upload(server)
        options: Any = {} if asked is None else {"chunking_strategy": asked}
        store = await stores.create(file_ids=[file_id], **options)
        await settled(server, store.id)
        file = await stores.files.retrieve(file_id, vector_store_id=store.id)
        assert file.chunking_strategy is not None
        assert file.chunking_strategy.to_dict() == shown
        sizes = shown["static"]
        assert server.parser.parsed[-1] == ("cats.txt", sizes["max_chunk_size_tokens"], sizes["chunk_overlap_tokens"])


async def test_a_file_that_cannot_be_read_says_why(server: Server, wire: Wire):
    """It has the code and the words of whoever tried; it takes no space and is not found; others are not concerned."""
    server.parser.fails["bad.pdf"] = Unreadable("unsupported_file", "The file could not be parsed: it is a scan.")
    store, _ = await make_store(server, DOGS)
    bad = await upload(server, b"cat", "bad.pdf")
    await wire.made(f"/vector_stores/{store}/files", {"file_id": bad})
    await settled(server, store)
    found = await wire.read(f"/vector_stores/{store}/files/{bad}")
    assert (found["status"], found["usage_bytes"]) == ("failed", 0)
    assert found["last_error"] == {
        "code": "unsupported_file",
        "message": "The file could not be parsed: it is a scan.",
    }
    counts = await check_counts(server, store)
    assert (counts.completed, counts.failed) == (1, 1)
    assert await search(server, store) == ["0.txt"]
    assert (await wire.read(f"/vector_stores/{store}"))["status"] == "completed"


async def test_a_fault_of_ours_fails_one_file(server: Server):
    """Whatever goes wrong with a file ends with that file failed, in words that give nothing away."""
    server.parser.fails["0.txt"] = RuntimeError("secret")
    store, [file_id] = await make_store(server, CATS)
    file = await server.client.vector_stores.files.retrieve(file_id, vector_store_id=store)
    assert file.last_error is not None
    assert (file.last_error.code, file.last_error.message) == ("server_error", "Sorry, something went wrong.")


async def test_attaching_again_is_idempotent(server: Server, wire: Wire):
    """A file that is in the index as it is wanted is not read again, nor is its place in the list changed; with
    other chunks, or when it had failed, it is."""
    server.parser.fails["1.txt"] = Unreadable("server_error", "Not today.")
    store, [first, second] = await make_store(server, CATS, DOGS)
    path = f"/vector_stores/{store}/files"
    before = await wire.read(f"{path}/{first}")
    assert await wire.made(path, {"file_id": first}) == before
    assert await wire.made(path, {"file_id": first, "chunking_strategy": AUTO}) == before
    assert len(server.parser.parsed) == 2
    again = await wire.made(path, {"file_id": first, "chunking_strategy": SMALL})
    assert again == before | {"chunking_strategy": SMALL, "status": "in_progress", "usage_bytes": 0}
    await settled(server, store)
    assert await wire.made(path, {"file_id": first}) == before | {"chunking_strategy": SMALL}
    server.parser.fails.clear()
    again = await wire.made(path, {"file_id": second})
    assert (again["status"], again["last_error"]) == ("in_progress", None)
    await settled(server, store)
    assert (await check_counts(server, store)).completed == 2
    assert (await wire.get(path)).ids == [second, first]
    assert server.parser.parsed[2:] == [("0.txt", 200, 50), ("1.txt", 800, 400)]


async def test_lists_of_files_can_be_filtered(server: Server, wire: Wire):
    """By status; another word is refused."""
    server.parser.fails["1.txt"] = Unreadable("server_error", "Not today.")
    store, [first, second] = await make_store(server, CATS, DOGS)
    path = f"/vector_stores/{store}/files"
    for status, ids in (("completed", [first]), ("failed", [second]), ("in_progress", []), ("cancelled", [])):
        assert (await wire.get(f"{path}?filter={status}")).ids == ids
    fault = (await wire.get(f"{path}?filter=done")).fault
    assert (fault.status, fault.param, fault.code) == (400, "filter", "invalid_value")


async def test_a_cursor_may_name_a_file_whose_status_has_changed(server: Server, wire: Wire):
    """Files are indexed while somebody pages through those in progress, in the store or in a batch."""
    ids = [await upload(server, CATS, f"{number}.txt") for number in range(3)]
    server.parser.holds |= {f"{number}.txt": asyncio.Event() for number in (1, 2)}
    store = (await wire.made("/vector_stores"))["id"]
    batch = (await wire.made(f"/vector_stores/{store}/file_batches", {"file_ids": ids}))["id"]
    await until(lambda: len(server.parser.parsed) == 3)
    for path in (f"/vector_stores/{store}/files", f"/vector_stores/{store}/file_batches/{batch}/files"):
        assert (await wire.get(f"{path}?filter=in_progress&order=asc&after={ids[0]}")).ids == ids[1:]
        assert (await wire.get(f"{path}?filter=completed&before={ids[1]}&order=asc")).ids == ids[:1]


async def test_a_detached_file_leaves_the_index(server: Server, wire: Wire):
    """It is not found any more and its text is gone from the disk; the file itself stays, and can come back."""
    store, [cats, dogs] = await make_store(server, CATS, DOGS)
    path = f"/vector_stores/{store}/files/{cats}"
    assert (await wire.delete(path)).json == {"id": cats, "object": "vector_store.file.deleted", "deleted": True}
    assert indexed_files(server, store) == [dogs]
    assert await search(server, store) == ["1.txt"]
    missing = Fault(404, f"No file found with id '{cats}' in vector store '{store}'.")
    for method, body in (("GET", None), ("DELETE", None), ("POST", {"attributes": {}})):
        assert (await wire.ask(method, path, body)).fault == missing
    assert (await check_counts(server, store)).total == 1
    assert (await server.client.files.content(cats)).read() == CATS
    await wire.made(f"/vector_stores/{store}/files", {"file_id": cats})
    await settled(server, store)
    assert await search(server, store, "whiskers") == ["0.txt"]


async def test_a_deleted_file_leaves_every_store(server: Server, wire: Wire):
    """Rows, counts and indexes of all of them."""
    file_id = await upload(server)
    stores = [(await server.client.vector_stores.create(file_ids=[file_id])).id for _ in range(3)]
    for store in stores:
        await settled(server, store)
    await server.client.files.delete(file_id)
    for store in stores:
        assert (await wire.get(f"/vector_stores/{store}/files")).ids == []
        assert (await check_counts(server, store)).total == 0
        assert indexed_files(server, store) == []
        assert await search(server, store) == []


async def test_a_deleted_store_takes_its_index_along(server: Server, wire: Wire):
    """The files stay, and so do the ids of assistants and threads that name it."""
    store, [file_id] = await make_store(server, CATS)
    resources = {"file_search": {"vector_store_ids": [store]}}
    thread = await wire.made("/threads", {"tool_resources": resources})
    await wire.delete(f"/vector_stores/{store}")
    assert list(Path(server.house.settings.data, "search").glob("*/*")) == []
    assert (await server.client.files.content(file_id)).read() == CATS
    assert (await wire.read(f"/threads/{thread['id']}"))["tool_resources"] == resources


@pytest.mark.parametrize("what", ["the file", "the store", "its place in the store"])
async def test_what_is_deleted_while_it_is_indexed_leaves_nothing(server: Server, wire: Wire, what: str):
    """Neither while it is read nor while it is written: no row, no text in the index."""
    for in_index in (False, True):
        server.parser.holds["cats.txt"] = asyncio.Event()
        file_id = await upload(server)
        store = (await server.client.vector_stores.create(file_ids=[file_id])).id
        await until(lambda: server.parser.parsed)
        if in_index:  # the lock is free, and the pipeline about to take it
            server.parser.holds["cats.txt"].set()
        path = {"the file": f"/files/{file_id}", "the store": f"/vector_stores/{store}"}
        await wire.delete(path.get(what, f"/vector_stores/{store}/files/{file_id}"))
        server.parser.holds["cats.txt"].set()
        await until(lambda: not server.application.pipeline._tasks)
        assert indexed_files(server, store) == []
        assert await server.house.store.read(lambda tx: tx.fetch("SELECT * FROM vector_store_files")) == []
        assert await server.house.store.read(lambda tx: tx.fetch("SELECT * FROM index_chores")) == []
        server.parser.parsed.clear()


# --- attributes ------------------------------------------------------------------------------------------------


async def test_attributes_are_replaced_and_searched_by(server: Server, wire: Wire):
    """Text, numbers and booleans; an update takes the place of all, null clears, and searches see it at once."""
    store, [file_id] = await make_store(server, CATS)
    path = f"/vector_stores/{store}/files/{file_id}"
    first: Json = {"author": "ada", "year": 1843, "score": 0.5, "draft": False}
    assert (await wire.made(path, {"attributes": first}))["attributes"] == first
    [found] = (await wire.made(f"/vector_stores/{store}/search", {"query": "whiskers"}))["data"]
    assert found["attributes"] == first
    by_ada: Json = {"type": "eq", "key": "author", "value": "ada"}
    assert await search(server, store, filters=by_ada) == ["0.txt"]
    assert (await wire.made(path, {"attributes": {"author": "bob"}}))["attributes"] == {"author": "bob"}
    assert await search(server, store, filters=by_ada) == []
    assert (await wire.made(path, {"attributes": None}))["attributes"] == {}
    assert (await wire.read(path))["attributes"] == {}


BAD_ATTRIBUTES: list[Any] = [
    ({"k" * 65: 1}, "attributes." + "k" * 65, "property_name_above_max_length"),
    ({"k": "v" * 513}, "attributes.k", "string_above_max_length"),
    ({str(number): 1 for number in range(17)}, "attributes", "object_above_max_properties"),
    ({"k": None}, "attributes.k", "invalid_type"),
    ({"k": [1]}, "attributes.k", "invalid_type"),
    ({"k": "a\0"}, "attributes.k", "invalid_value"),
    ("x", "attributes", "invalid_type"),
]


async def test_bad_attributes_are_refused(server: Server, wire: Wire):
    """When attaching and when modifying."""
    store, [file_id] = await make_store(server, CATS)
    for attributes, param, code in BAD_ATTRIBUTES:
        for path, more in ((f"/{file_id}", {}), ("", {"file_id": file_id})):
            answer = await wire.post(f"/vector_stores/{store}/files{path}", {**more, "attributes": attributes})
            assert (answer.status, answer.fault.param, answer.fault.code) == (400, param, code), attributes
    assert (await wire.read(f"/vector_stores/{store}/files/{file_id}"))["attributes"] == {}


async def test_attributes_set_while_a_file_is_indexed_count(server: Server, wire: Wire):
    """The last of them, wherever the pipeline is."""
    server.parser.holds["cats.txt"] = asyncio.Event()
    file_id = await upload(server)
    store = (await server.client.vector_stores.create(file_ids=[file_id])).id
    await until(lambda: server.parser.parsed)
    for number in range(3):
        await wire.made(f"/vector_stores/{store}/files/{file_id}", {"attributes": {"n": number}})
    server.parser.holds["cats.txt"].set()
    await settled(server, store)
    assert await search(server, store, filters={"type": "eq", "key": "n", "value": 2}) == ["cats.txt"]


# --- searching -------------------------------------------------------------------------------------------------


async def test_a_search_answers_as_published(server: Server, wire: Wire):
    """One passage an entry, best first, with score, file name and attributes; queries are echoed."""
    store, [cats, _] = await make_store(server, CATS, DOGS)
    body: Json = {"query": "whiskers of a cat", "rewrite_query": True}
    page = await wire.made(f"/vector_stores/{store}/search", body)
    assert page["search_query"] == ["whiskers of a cat"]
    assert (page["has_more"], page["next_page"]) == (False, None)
    best, *others = page["data"]
    assert best["file_id"] == cats
    assert best["filename"] == "0.txt"
    assert best["content"] == [{"type": "text", "text": "A cat's whiskers are as wide as the cat."}]
    assert 1 >= best["score"] >= max(other["score"] for other in others) > 0


async def test_a_search_takes_several_queries(server: Server, wire: Wire):
    """Passages of all of them, each once, with its best score."""
    store, _ = await make_store(server, CATS, DOGS)
    page = await wire.made(f"/vector_stores/{store}/search", {"query": ["whiskers", "bones", "whiskers bones"]})
    assert page["search_query"] == ["whiskers", "bones", "whiskers bones"]
    assert [found["filename"] for found in page["data"]] in (["0.txt", "1.txt"], ["1.txt", "0.txt"])


async def test_a_search_can_be_narrowed(server: Server, wire: Wire):
    """By number of results, by score, by attributes; the ranker makes no difference."""
    store, [cats, _] = await make_store(server, CATS, DOGS)
    await wire.made(f"/vector_stores/{store}/files/{cats}", {"attributes": {"kind": "cat", "legs": 4}})
    path = f"/vector_stores/{store}/search"
    everything = (await wire.made(path, {"query": "cat dog"}))["data"]
    assert len(everything) > 2
    assert (await wire.made(path, {"query": "cat dog", "max_num_results": 1}))["data"] == everything[:1]
    for ranker in ("none", "auto", "default-2024-11-15"):
        options = {"ranker": ranker, "score_threshold": everything[1]["score"]}
        kept = (await wire.made(path, {"query": "cat dog", "ranking_options": options}))["data"]
        assert kept == [found for found in everything if found["score"] >= everything[1]["score"]]
    legs = {"type": "gte", "key": "legs", "value": 4}
    for filters, names in (
        ({"type": "and", "filters": [legs, {"type": "in", "key": "kind", "value": ["cat"]}]}, ["0.txt"]),
        ({"type": "or", "filters": [legs, {"type": "ne", "key": "kind", "value": "cat"}]}, ["0.txt", "1.txt"]),
        ({"type": "nin", "key": "kind", "value": ["cat"]}, ["1.txt"]),
        ({"type": "lt", "key": "legs", "value": 4}, []),
    ):
        assert sorted(await search(server, store, filters=filters)) == names


def nested(depth: int) -> Json:
    filters: Json = {"type": "eq", "key": "k", "value": "v"}
    for _ in range(depth - 1):
        filters = {"type": "and", "filters": [filters]}
    return filters


BAD_SEARCHES: list[Any] = [
    ({}, "query", "missing_required_parameter"),
    ({"query": ""}, "query", "string_below_min_length"),
    ({"query": []}, "query", "empty_array"),
    ({"query": ["a", 1]}, "query[1]", "invalid_type"),
    ({"query": "q", "max_num_results": 51}, "max_num_results", "integer_above_max_value"),
    ({"query": "q", "max_num_results": 0}, "max_num_results", "integer_below_min_value"),
    ({"query": "q", "ranking_options": {"ranker": "best"}}, "ranking_options.ranker", "invalid_value"),
    (
        {"query": "q", "ranking_options": {"score_threshold": 2}},
        "ranking_options.score_threshold",
        "decimal_above_max_value",
    ),
    ({"query": "q", "filters": {"type": "like", "key": "k", "value": 1}}, "filters.type", "invalid_value"),
    ({"query": "q", "filters": {"type": "eq", "key": "k"}}, "filters.value", "missing_required_parameter"),
    ({"query": "q", "filters": {"type": "and", "filters": []}}, "filters.filters", "empty_array"),
    ({"query": "q", "filters": nested(11)}, "filters", "invalid_value"),
    ({"query": "q", "filters": nested(400)}, "filters", "invalid_value"),
    ({"query": "q", "filters": nested(400), "x": 1}, "filters", "invalid_value"),
]


async def test_a_bad_search_is_refused(wire: Wire):
    """Each fault is named with its path and code; filters are nested no more than ten deep."""
    store = (await wire.made("/vector_stores"))["id"]
    for body, param, code in BAD_SEARCHES:
        fault = (await wire.post(f"/vector_stores/{store}/search", body)).fault
        assert (fault.status, fault.param, fault.code) == (400, param, code), body


async def test_whatever_is_asked_for_is_a_query(server: Server, wire: Wire):
    """Syntax of databases, a megabyte, other scripts: an answer, never a fault. A thousand filters are no JSON."""
    store, _ = await make_store(server, CATS)
    path = f"/vector_stores/{store}/search"
    for query in ('"cat', "cat* OR (dog", "NEAR(a b)", "'; DROP TABLE files; --", "猫", "cat " * 250_000, "col:cat"):
        assert (await wire.post(path, {"query": query})).status == 200
    assert (await wire.post(path, {"query": "q", "filters": nested(10)})).status == 200
    assert (await wire.post(path, {"query": "q", "filters": nested(400)})).status == 400


# --- time ------------------------------------------------------------------------------------------------------


async def test_expiry_moves_with_use(dated: Server, clock: SetClock):
    """A search, a file that comes, goes or changes: each is a use."""
    stores = dated.client.vector_stores
    file_id = await upload(dated)
    store = await stores.create(expires_after={"anchor": "last_active_at", "days": 1})
    for use in (
        lambda: stores.files.create_and_poll(file_id, vector_store_id=store.id, poll_interval_ms=5),
        lambda: stores.search(store.id, query="cat"),
        lambda: stores.files.update(file_id, vector_store_id=store.id, attributes={"a": 1}),
        lambda: stores.file_batches.create_and_poll(store.id, file_ids=[file_id], poll_interval_ms=5),
        lambda: stores.files.delete(file_id, vector_store_id=store.id),
    ):
        clock.time += DAY_S - 1
        await use()
        found = await stores.retrieve(store.id)
        assert found.last_active_at == int(clock.time)
        assert found.expires_at == found.last_active_at + DAY_S
        assert found.status == "completed"


async def test_an_expired_store_says_so(dated: Server, clock: SetClock, connect: Any):
    """Its status, searches and new files say so; its files are still listed, its index is gone; it stays so, and can
    be deleted."""
    wire = connect(dated)
    store, [file_id] = await make_store(dated, CATS)
    path = f"/vector_stores/{store}"
    await wire.made(path, {"expires_after": {"anchor": "last_active_at", "days": 1}})
    clock.time += DAY_S
    for _ in range(2):
        found = await wire.read(path)
        assert (found["status"], found["file_counts"]["completed"]) == ("expired", 1)
        assert [one["status"] for one in (await wire.read("/vector_stores"))["data"]] == ["expired"]
        expired = Fault(
            400,
            f"Vector store '{store}' has expired: its files can no longer be searched. "
            "Create a new one with the same files, which are still listed.",
        )
        assert (await wire.post(f"{path}/search", {"query": "cat"})).fault == expired
        assert (await wire.post(f"{path}/files", {"file_id": file_id})).fault == expired
        assert (await wire.post(f"{path}/file_batches", {"file_ids": [file_id]})).fault == expired
        assert (await wire.get(f"{path}/files/{file_id}/content")).fault == expired
        assert (await wire.post(path, {"expires_after": None})).fault == expired
        assert (await wire.made(path, {"name": "old"}))["status"] == "expired"
        assert (await wire.get(f"{path}/files")).ids == [file_id]
        await vector_stores.expire_stores(dated.house)
    assert list(Path(dated.house.settings.data, "search").glob("*/*")) == []
    await wire.delete(f"{path}/files/{file_id}")
    assert (await wire.read(path))["usage_bytes"] == 0
    assert (await wire.delete(path)).status == 200


async def test_a_file_in_progress_does_not_outlive_its_store(dated: Server, clock: SetClock):
    """It fails, so that nobody waits for it for ever."""
    dated.parser.holds["cats.txt"] = asyncio.Event()
    file_id = await upload(dated)
    stores = dated.client.vector_stores
    store = await stores.create(file_ids=[file_id], expires_after={"anchor": "last_active_at", "days": 1})
    await until(lambda: dated.parser.parsed)
    clock.time += DAY_S
    await vector_stores.expire_stores(dated.house)
    file = await stores.files.retrieve(file_id, vector_store_id=store.id)
    assert file.last_error is not None
    assert file.last_error.message == "The vector store expired before the file was indexed."
    assert indexed_files(dated, store.id) == []


# --- threads and assistants ------------------------------------------------------------------------------------


def attachment(file_id: str, *tools: str) -> Json:
    return {"file_id": file_id, "tools": [{"type": tool} for tool in tools]}


async def test_stores_are_made_along_with_their_owners(server: Server, wire: Wire):
    """With an assistant for good, with a thread for seven days; files, chunks and metadata are those asked for."""
    file_id = await upload(server)
    new = {"file_ids": [file_id], "metadata": {"a": "b"}, "chunking_strategy": SMALL}
    resources = {"file_search": {"vector_stores": [new]}}
    for path, body, days in (("/assistants", {"model": "m"}, None), ("/threads", {}, 7)):
        owner = await wire.made(path, {**body, "tool_resources": resources})
        [store_id] = owner["tool_resources"]["file_search"]["vector_store_ids"]
        await settled(server, store_id)
        store = await wire.read(f"/vector_stores/{store_id}")
        assert store["metadata"] == {"a": "b"}
        assert store["expires_after"] == (days and {"anchor": "last_active_at", "days": days})
        [file] = (await wire.read(f"/vector_stores/{store_id}/files"))["data"]
        assert (file["id"], file["status"], file["chunking_strategy"]) == (file_id, "completed", SMALL)
        other = {"file_search": {"vector_store_ids": [store_id]}}
        assert (await wire.made(path, {**body, "tool_resources": other}))["tool_resources"] == other


async def test_attachments_make_one_store_for_a_thread(server: Server, wire: Wire):
    """The first makes it, for seven days, and names it on the thread; later ones go there; both tools may be asked."""
    first, second, third = [await upload(server, CATS, f"{name}.txt") for name in "abc"]
    message = {"role": "user", "content": "hi", "attachments": [attachment(first, "file_search")]}
    thread = await wire.made("/threads", {"messages": [message]})
    path = f"/threads/{thread['id']}"
    [store_id] = thread["tool_resources"]["file_search"]["vector_store_ids"]
    both = [attachment(second, "file_search", "code_interpreter"), attachment(first, "file_search")]
    await wire.made(f"{path}/messages", {"role": "user", "content": "hi", "attachments": both})
    await wire.made(f"{path}/messages", {"role": "user", "content": "hi", "attachments": [attachment(third)]})
    assert (await wire.read(path))["tool_resources"] == {
        "code_interpreter": {"file_ids": [second]},
        "file_search": {"vector_store_ids": [store_id]},
    }
    assert await vector_stores.wait_for_thread_store(server.house, "default", thread["id"], 10)
    assert (await wire.get(f"/vector_stores/{store_id}/files?order=asc")).ids == [first, second]
    assert (await wire.read(f"/vector_stores/{store_id}"))["expires_after"]["days"] == 7
    await wire.delete(path)
    assert (await wire.read(f"/vector_stores/{store_id}"))["file_counts"]["completed"] == 2


async def test_a_thread_whose_store_is_gone_gets_another(server: Server, wire: Wire):
    """Deleted: a new one with the next attachment."""
    store = (await wire.made("/vector_stores"))["id"]
    thread = await wire.made("/threads", {"tool_resources": {"file_search": {"vector_store_ids": [store]}}})
    await wire.delete(f"/vector_stores/{store}")
    attached = [attachment(await upload(server), "file_search")]
    path = f"/threads/{thread['id']}"
    await wire.made(f"{path}/messages", {"role": "user", "content": "hi", "attachments": attached})
    [new] = (await wire.read(path))["tool_resources"]["file_search"]["vector_store_ids"]
    assert new != store


async def test_an_attachment_to_an_expired_store_is_refused(dated: Server, clock: SetClock, connect: Any):
    """With the store's words, and no message is added."""
    wire = connect(dated)
    file_id = await upload(dated)
    message = {"role": "user", "content": "hi", "attachments": [attachment(file_id, "file_search")]}
    thread = await wire.made("/threads", {"messages": [message]})
    clock.time += 7 * DAY_S
    answer = await wire.post(f"/threads/{thread['id']}/messages", message)
    assert answer.status == 400
    assert "has expired" in answer.fault.message
    assert len((await wire.get(f"/threads/{thread['id']}/messages")).ids) == 1


async def test_a_run_can_wait_for_the_store_of_its_thread(server: Server, wire: Wire):
    """Until nothing is in progress, or the time is over; not at all without a store."""
    house = server.house
    plain = await wire.made("/threads")
    assert await vector_stores.wait_for_thread_store(house, "default", plain["id"], 0)
    server.parser.holds["cats.txt"] = asyncio.Event()
    message = {"role": "user", "content": "x", "attachments": [attachment(await upload(server), "file_search")]}
    thread = await wire.made("/threads", {"messages": [message]})
    assert not await vector_stores.wait_for_thread_store(house, "default", thread["id"], 0.01)
    waiting = asyncio.create_task(vector_stores.wait_for_thread_store(house, "default", thread["id"], 20))
    server.parser.holds["cats.txt"].set()
    assert await waiting


# --- embeddings ------------------------------------------------------------------------------------------------


async def test_with_a_server_of_embeddings_both_sides_are_searched(start_server: ServerFactory, tmp_path: Path):
    """Passages are embedded in batches, queries too; what shares no word with the query is found by its vector."""
    embedder = ScriptedEmbedder()
    async with start_server(tmp_path, embedder=embedder, embedding_batch=1) as server:
        store, _ = await make_store(server, CATS, DOGS)
        assert sorted(texts for [texts] in embedder.asked) == sorted((CATS + b"\n" + DOGS).decode().split("\n"))
        found = await vector_stores.search(server.house, "default", [store], ["acts"], limit=5)
        assert {hit.lexical_rank for hit in found.hits} == {None}
        assert [hit.vector_rank for hit in found.hits] == [1, 2, 3, 4]
        assert embedder.asked[-1] == ["acts"]
        embedder.errors.append(ModelUnreachable("nobody is there"))
        assert await search(server, store, "whiskers") == ["0.txt"]  # by words alone


async def test_another_embedding_model_is_refused(start_server: ServerFactory, tmp_path: Path):
    """Searching such a store, and adding to it, says what to do; indexed anew, it has the new model's embeddings."""
    async with start_server(tmp_path, embedder=ScriptedEmbedder("old")) as server:
        store, [first] = await make_store(server, CATS)
    async with start_server(tmp_path, embedder=ScriptedEmbedder("new")) as server:
        refused = (
            f"Vector store '{store}' was indexed with the embedding model 'old', and this server now uses 'new'. "
            "Configure the former, or run `afterglow reindex`."
        )
        with pytest.raises(openai.BadRequestError, match="Configure the former"):
            await search(server, store)
        second = await upload(server, DOGS, "1.txt")
        files = server.client.vector_stores.files
        file = await files.create_and_poll(second, vector_store_id=store, poll_interval_ms=5)
        assert file.last_error is not None
        assert file.last_error.to_dict() == {"code": "server_error", "message": refused}
        assert await vector_stores.reindex(server.house.store, server.house.clock.now(), store) == 1
        assert (await server.client.vector_stores.retrieve(store)).status == "in_progress"
        await settle_all(server.house)  # the pipeline does so by itself, once a second
        server.house.ingest_queue.wake()
        await settled(server, store)
        again = await files.create_and_poll(second, vector_store_id=store, poll_interval_ms=5)
        assert again.status == "completed"
        assert sorted(await search(server, store)) == ["0.txt", "1.txt"]
        assert indexed_files(server, store) == [first, second]
    async with start_server(tmp_path) as server:  # without embeddings, words alone are searched
        assert sorted(await search(server, store)) == ["0.txt", "1.txt"]


# --- documents -------------------------------------------------------------------------------------------------


async def test_documents_are_read_by_the_real_parser(start_server: ServerFactory, tmp_path: Path):
    """In a process of its own, which ends with the server; what is no document fails with words for its owner."""
    parser = build_parser(load({}, environ={}))
    async with start_server(tmp_path, parser=parser) as server:
        page = b"<html><body><h1>Leave</h1><p>Thirty days a year.</p></body></html>"
        store, [html, broken] = await make_store(server, page, b"PK\x03\x04 no archive")
        [found] = (await server.client.vector_stores.search(store, query="days of leave")).data
        assert found.file_id == html
        assert "Thirty days a year." in found.content[0].text
        file = await server.client.vector_stores.files.retrieve(broken, vector_store_id=store)
        assert file.last_error is not None
        assert file.last_error.code == "invalid_file"
        assert file.last_error.message.startswith("The file could not be parsed because")


# --- everything at once ----------------------------------------------------------------------------------------


async def test_counts_are_right_at_every_moment(server: Server, wire: Wire):
    """While files come, fail, come again, go, and batches are cancelled, the store's counts and usage are those of
    its files at whatever moment one looks."""
    ids = [await upload(server, CATS if number % 3 else b"", f"{number}.txt") for number in range(12)]
    store = (await wire.made("/vector_stores"))["id"]
    path = f"/vector_stores/{store}"

    async def come_and_go(file_id: str) -> None:
        for chunks in (AUTO, SMALL):
            await wire.post(f"{path}/files", {"file_id": file_id, "chunking_strategy": chunks})
            await asyncio.sleep(0.005)
        await wire.delete(f"{path}/files/{file_id}")
        await wire.post(f"{path}/files", {"file_id": file_id})

    async def batch(file_ids: list[str]) -> None:
        made = await wire.made(f"{path}/file_batches", {"file_ids": file_ids, "chunking_strategy": SMALL})
        await wire.made(f"{path}/file_batches/{made['id']}/cancel")

    acting = asyncio.gather(*map(come_and_go, ids), batch(ids[:6]), batch(ids[3:]))
    while not acting.done():
        await check_counts(server, store)
        await asyncio.sleep(0)
    await acting
    await settled(server, store)
    counts = await check_counts(server, store)
    assert counts.in_progress == 0
    completed = (await wire.get(f"{path}/files?filter=completed&limit=100")).ids
    assert sorted(indexed_files(server, store)) == sorted(completed)


async def test_many_files_do_not_hold_up_one(server: Server, wire: Wire):
    """A store with few files is not behind one with many: they take turns."""
    many = [await upload(server, CATS, f"{number}.txt") for number in range(20)]
    server.parser.holds = {"0.txt": asyncio.Event(), "1.txt": asyncio.Event()}
    await wire.made("/vector_stores", {"file_ids": many})
    await until(lambda: len(server.parser.parsed) == 2)
    last = await upload(server, DOGS, "last.txt")
    await wire.made("/vector_stores", {"file_ids": [last]})
    for event in server.parser.holds.values():
        event.set()
    await until(lambda: len(server.parser.parsed) >= 8)
    assert "last.txt" in [name for name, _, _ in server.parser.parsed[:8]]
