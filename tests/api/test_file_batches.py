"""/v1/vector_stores/{id}/file_batches by the official client and by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from afterglow.errors import Unreadable
from tests.api.stores import CATS, DOGS, check_counts, indexed_files, search, settled, upload
from tests.api.wire import Fault, Json, Wire, until
from tests.conftest import Server

SMALL: Json = {"type": "static", "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 50}}


def counts(**numbers: int) -> Json:
    return {
        **dict.fromkeys(("in_progress", "completed", "failed", "cancelled"), 0),
        **numbers,
        "total": sum(numbers.values()),
    }


@pytest.fixture
async def store(wire: Wire) -> str:
    made = await wire.made("/vector_stores")
    return str(made["id"])


async def hold(server: Server, *names: str) -> None:
    """Files of these names are read only when they are let go."""
    server.parser.holds |= {name: asyncio.Event() for name in names}


async def test_a_batch_begins_with_all_its_files_in_progress(server: Server, wire: Wire, store: str):
    """The answer counts them before any work, once each; later ones tell what became of them, and when to ask."""
    ids = [await upload(server, data, f"{number}.txt") for number, data in enumerate((CATS, b"", DOGS))]
    made = await wire.made(f"/vector_stores/{store}/file_batches", {"file_ids": [*ids, ids[0]]})
    assert made == {
        "id": made["id"],
        "object": "vector_store.files_batch",
        "created_at": made["created_at"],
        "vector_store_id": store,
        "status": "in_progress",
        "file_counts": counts(in_progress=3),
    }
    assert made["id"].startswith("vsfb_")
    await settled(server, store)
    path = f"/vector_stores/{store}/file_batches/{made['id']}"
    answer = await wire.get(path)
    assert answer.json == made | {"status": "completed", "file_counts": counts(completed=2, failed=1)}
    assert int(answer.headers["openai-poll-after-ms"]) == server.house.settings.poll_after_ms
    assert (await wire.get(f"{path}/files?order=asc")).ids == ids
    assert (await wire.get(f"{path}/files?filter=failed")).ids == [ids[1]]
    assert (await wire.get(f"{path}/files?limit=1&order=asc&after={ids[0]}")).ids == [ids[1]]
    fault = (await wire.get(f"{path}/files?filter=x")).fault
    assert (fault.status, fault.param) == (400, "filter")


async def test_the_helpers_of_the_sdk_come_to_an_end(server: Server, store: str):
    """create_and_poll and upload_and_poll, which uploads several files at once."""
    batches = server.client.vector_stores.file_batches
    files = [(f"{number}.txt", CATS) for number in range(7)]
    first = await batches.upload_and_poll(store, files=files, poll_interval_ms=5)
    assert (first.status, first.file_counts.completed) == ("completed", 7)
    second = await batches.create_and_poll(store, file_ids=[await upload(server)], poll_interval_ms=5)
    assert (second.status, second.file_counts.total) == ("completed", 1)
    assert (await check_counts(server, store)).completed == 8


async def test_files_can_say_each_their_own(server: Server, wire: Wire, store: str):
    """Attributes and chunk sizes of `files` count, and those beside them do not; beside `file_ids` they do."""
    first, second, third = [await upload(server, CATS, f"{name}.txt") for name in "abc"]
    path = f"/vector_stores/{store}/file_batches"
    files = [{"file_id": first, "attributes": {"n": 1}, "chunking_strategy": SMALL}, {"file_id": second}]
    await wire.made(path, {"files": files, "attributes": {"n": 2}})
    await wire.made(path, {"file_ids": [third], "attributes": {"n": 3}, "chunking_strategy": SMALL})
    await settled(server, store)
    found = {one["id"]: one for one in (await wire.read(f"/vector_stores/{store}/files"))["data"]}
    assert [found[file_id]["attributes"] for file_id in (first, second, third)] == [{"n": 1}, {}, {"n": 3}]
    assert found[first]["chunking_strategy"] == found[third]["chunking_strategy"] == SMALL
    assert found[second]["chunking_strategy"] != SMALL
    assert await search(server, store, filters={"type": "eq", "key": "n", "value": 3}) == ["c.txt"]


BAD_BATCHES: list[Any] = [
    ({}, "file_ids", "missing_required_parameter"),
    ({"file_ids": [], "attributes": {}}, "file_ids", "empty_array"),
    ({"files": []}, "files", "empty_array"),
    ({"file_ids": ["f"] * 2001}, "file_ids", "array_above_max_length"),
    ({"file_ids": ["f"], "files": [{"file_id": "f"}]}, "file_ids", "mutually_exclusive_parameters"),
    ({"files": [{"file_id": "f"}, {}]}, "files[1].file_id", "missing_required_parameter"),
    ({"files": [{"file_id": "f", "x": 1}]}, "files[0].x", "unknown_parameter"),
    (
        {
            "files": [
                {
                    "file_id": "f",
                    "chunking_strategy": {
                        "type": "static",
                        "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 99},
                    },
                }
            ]
        },
        "files[0].chunking_strategy.static.chunk_overlap_tokens",
        "integer_above_max_value",
    ),
]


async def test_a_bad_batch_is_refused(wire: Wire, store: str):
    """Each fault is named with its path and code."""
    for body, param, code in BAD_BATCHES:
        fault = (await wire.post(f"/vector_stores/{store}/file_batches", body)).fault
        assert (fault.status, fault.param, fault.code) == (400, param, code), body


async def test_a_batch_with_files_that_are_missing_is_not_made(server: Server, wire: Wire, store: str):
    """Nothing is attached when any of them is not there; a batch of another store is not there."""
    there = await upload(server)
    path = f"/vector_stores/{store}/file_batches"
    assert (await wire.post(path, {"file_ids": [there, "file-x"]})).fault == Fault(404, "Files [file-x] were not found")
    assert (await wire.get(f"/vector_stores/{store}/files")).ids == []
    batch = (await wire.made(path, {"file_ids": [there]}))["id"]
    other = (await wire.made("/vector_stores"))["id"]
    for method, end in (("GET", ""), ("GET", "/files"), ("POST", "/cancel")):
        answer = await wire.ask(method, f"/vector_stores/{other}/file_batches/{batch}{end}")
        assert answer.fault == Fault(404, f"No file batch found with id '{batch}'.")


async def test_a_cancelled_batch_keeps_what_is_done(server: Server, wire: Wire, store: str):
    """Files in progress are cancelled and leave nothing; done ones stay; nothing of it is found or counted wrong."""
    ids = [await upload(server, CATS, f"{number}.txt") for number in range(5)]
    await hold(server, "1.txt", "2.txt")
    path = f"/vector_stores/{store}/file_batches"
    batch = (await wire.made(path, {"file_ids": ids}))["id"]
    await until(lambda: len(server.parser.parsed) == 3)
    await until(lambda: indexed_files(server, store))
    cancelled = await wire.made(f"{path}/{batch}/cancel")
    assert (cancelled["status"], cancelled["file_counts"]) == ("cancelled", counts(completed=1, cancelled=4))
    assert await wire.read(f"{path}/{batch}") == cancelled
    for event in server.parser.holds.values():
        event.set()
    await until(lambda: not server.application.pipeline._tasks)
    assert indexed_files(server, store) == ids[:1]
    assert (await check_counts(server, store)).cancelled == 4
    assert (await wire.get(f"{path}/{batch}/files?filter=cancelled&order=asc")).ids == ids[1:]
    again = await wire.made(f"{path}/{batch}/cancel")
    assert again == cancelled
    await wire.made(f"/vector_stores/{store}/files", {"file_id": ids[4]})  # a cancelled file can be tried again
    await settled(server, store)
    assert indexed_files(server, store) == [ids[0], ids[4]]


async def test_a_batch_that_is_over_stays_as_it_is(server: Server, wire: Wire, store: str):
    """Cancelled too late, with its files attached again, detached or deleted, it tells what became of it."""
    server.parser.fails["1.txt"] = Unreadable("server_error", "Not today.")
    ids = [await upload(server, CATS, f"{number}.txt") for number in range(3)]
    path = f"/vector_stores/{store}/file_batches"
    batch = (await wire.made(path, {"file_ids": ids}))["id"]
    await settled(server, store)
    over = await wire.read(f"{path}/{batch}")
    assert (over["status"], over["file_counts"]) == ("completed", counts(completed=2, failed=1))
    assert await wire.made(f"{path}/{batch}/cancel") == over
    server.parser.fails.clear()
    second = await wire.made(path, {"file_ids": ids})
    assert second["file_counts"] == counts(completed=2, in_progress=1)  # what is there as wanted is there
    await wire.delete(f"/vector_stores/{store}/files/{ids[0]}")
    await wire.delete(f"/files/{ids[2]}")
    await settled(server, store)
    assert await wire.read(f"{path}/{batch}") == over
    assert (await wire.read(f"{path}/{second['id']}"))["file_counts"] == counts(completed=3)
    assert (await wire.get(f"{path}/{batch}/files")).ids == [ids[1]]


async def test_two_batches_can_wait_for_one_file(server: Server, wire: Wire, store: str):
    """The cancel of one leaves the file to the other; both come to an end."""
    shared, own = await upload(server, CATS, "shared.txt"), await upload(server, CATS, "own.txt")
    await hold(server, "shared.txt", "own.txt")
    path = f"/vector_stores/{store}/file_batches"
    first = (await wire.made(path, {"file_ids": [shared, own]}))["id"]
    second = (await wire.made(path, {"file_ids": [shared]}))["id"]
    cancelled = await wire.made(f"{path}/{first}/cancel")
    assert (cancelled["status"], cancelled["file_counts"]) == ("cancelled", counts(cancelled=2))
    assert (await wire.read(f"{path}/{second}"))["file_counts"] == counts(in_progress=1)
    server.parser.holds["shared.txt"].set()
    await settled(server, store)
    assert (await wire.read(f"{path}/{second}"))["file_counts"] == counts(completed=1)
    assert indexed_files(server, store) == [shared]


async def test_what_leaves_the_store_leaves_no_batch_waiting(server: Server, wire: Wire, store: str):
    """A file that is detached or deleted while its batch waits for it counts as cancelled."""
    ids = [await upload(server, CATS, f"{number}.txt") for number in range(3)]
    await hold(server, "0.txt", "1.txt", "2.txt")
    path = f"/vector_stores/{store}/file_batches"
    batch = (await wire.made(path, {"file_ids": ids}))["id"]
    await wire.delete(f"/vector_stores/{store}/files/{ids[0]}")
    await wire.delete(f"/files/{ids[1]}")
    waiting = await wire.read(f"{path}/{batch}")
    assert (waiting["status"], waiting["file_counts"]) == ("in_progress", counts(in_progress=1, cancelled=2))
    server.parser.holds["2.txt"].set()
    await settled(server, store)
    over = await wire.read(f"{path}/{batch}")
    assert (over["status"], over["file_counts"]) == ("completed", counts(completed=1, cancelled=2))


async def test_two_thousand_files(server: Server, wire: Wire, store: str):
    """As many as a batch may have are attached in one request, and cancelled in another."""
    first = await upload(server)

    async def copy(tx: Any) -> list[str]:
        ids = [f"file-{number:024d}" for number in range(2000)]
        for file_id in ids:
            await tx.execute(
                "INSERT INTO files SELECT project_id, $1, seq, created_at, expires_at, purpose, blob, object, key_id,"
                " size_bytes FROM files WHERE id = $2",
                file_id,
                first,
            )
        return ids

    ids = await server.house.store.write(copy)
    await hold(server, "cats.txt")
    path = f"/vector_stores/{store}/file_batches"
    made = await wire.made(path, {"file_ids": ids})
    assert made["file_counts"] == counts(in_progress=2000)
    cancelled = await wire.made(f"{path}/{made['id']}/cancel")
    assert (cancelled["status"], cancelled["file_counts"]) == ("cancelled", counts(cancelled=2000))
    assert (await check_counts(server, store)).cancelled == 2000
