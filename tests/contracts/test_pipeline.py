"""The pipeline: who indexes a file, how often, and what is left when it is stopped anywhere on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from afterglow import vector_stores
from afterglow.app import Application, open_application
from afterglow.contracts import House, SearchIndex, Transaction
from afterglow.errors import ModelRefused, ModelUnreachable, StoreFull, StoreUnavailable
from afterglow.files import NewFile, create_file
from afterglow.ingest import pipeline as pipeline_module
from afterglow.ingest.pipeline import KEEPS_STOPPING, MISSING, WAITS_S, Pipeline
from afterglow.ingest.upkeep import AT_ONCE, settle_all
from afterglow.objects import (
    CreateVectorStore,
    CreateVectorStoreFile,
    Eq,
    StaticChunking,
    StaticChunkSizes,
    VectorStoreFile,
)
from afterglow.rows import vector_store_files as file_rows
from afterglow.rows.requests import Origin
from afterglow.rows.vector_stores import insert_chores
from afterglow.settings import load
from afterglow.testing import ScriptedEmbedder, ScriptedEngine, ScriptedModels, ScriptedParser, SetClock
from tests.api.wire import until

PROJECT = "default"
TEXT = b"Cats sleep.\nCats purr."
SMALL = StaticChunking(StaticChunkSizes(max_chunk_size_tokens=200, chunk_overlap_tokens=50))
_numbers = iter(range(10**6))


class HeldIndex:
    """A search index whose writes of files wait: before they begin for `go`, and once they are done for `back`. holds:
    how many wait to begin. fails: raised by the next writes."""

    def __init__(self, index: SearchIndex) -> None:
        self._index = index
        self.go, self.back = asyncio.Event(), asyncio.Event()
        self.go.set()
        self.back.set()
        self.holds = 0
        self.written: list[str] = []
        self.fails: list[Exception] = []

    async def put_file(self, project: str, store_id: str, file_id: str, *others: Any) -> int:
        """As the index itself: a write that has begun goes on when its caller is cancelled, and is waited for."""
        writing = asyncio.ensure_future(self._put(project, store_id, file_id, *others))
        try:
            size = await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])
            raise
        await self.back.wait()
        return size

    async def _put(self, project: str, store_id: str, file_id: str, *others: Any) -> int:
        self.holds += 1
        await self.go.wait()
        self.holds -= 1
        if self.fails:
            raise self.fails.pop(0)
        size = await self._index.put_file(project, store_id, file_id, *others)
        self.written.append(file_id)
        return size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)


class Bench:
    """An application without HTTP, whose parser, embedder, clock and index do as they are told."""

    def __init__(self, application: Application, parser: ScriptedParser, embedder: Any, clock: SetClock) -> None:
        self.application = application
        self.house: House = application.house
        self.index = HeldIndex(application.house.index)
        self.house.index = self.index  # type: ignore[assignment]
        self.parser = parser
        self.embedder = embedder
        self.clock = clock

    @property
    def origin(self) -> Origin:
        return Origin(f"req_{next(_numbers)}", "", "test", "")

    async def file(self, data: bytes = TEXT, name: str = "a.txt") -> str:
        async def chunks() -> AsyncGenerator[bytes, None]:
            yield data

        async def finish() -> tuple[NewFile, Origin]:
            return NewFile(name, "assistants"), self.origin

        return (await create_file(self.house, PROJECT, chunks(), finish)).id

    async def store(self, *file_ids: str) -> str:
        body = CreateVectorStore(file_ids=list(file_ids))
        return (await vector_stores.create_store(self.house, PROJECT, body, self.origin)).id

    async def attach(self, store_id: str, file_id: str, **fields: Any) -> VectorStoreFile:
        body = CreateVectorStoreFile(file_id=file_id, **fields)
        return await vector_stores.create_file(self.house, PROJECT, store_id, body, self.origin)

    async def look(self, store_id: str, file_id: str) -> VectorStoreFile | None:
        async def work(tx: Transaction) -> VectorStoreFile | None:
            return await file_rows.get_file(tx, PROJECT, store_id, file_id)

        return await self.house.store.read(work)

    async def ended(self, store_id: str, file_id: str) -> VectorStoreFile:
        async with asyncio.timeout(20):
            while not (file := await self.look(store_id, file_id)) or file.status == "in_progress":
                await asyncio.sleep(0.002)
        return file

    async def column(self, name: str) -> list[Any]:
        rows = await self.house.store.read(lambda tx: tx.fetch(f"SELECT {name} FROM vector_store_files ORDER BY seq"))
        return [value for (value,) in rows]

    async def text(self, store_id: str, file_id: str) -> str:
        return await self.house.index.text(PROJECT, store_id, file_id)

    async def idle(self) -> None:
        await until(lambda: not self.application.pipeline._tasks)

    async def chores(self) -> int:
        return len(await self.house.store.read(lambda tx: tx.fetch("SELECT * FROM index_chores")))


@asynccontextmanager
async def opened(folder: Path, *, embedder: Any = None, **settings: Any) -> AsyncGenerator[Bench, None]:
    parser, clock = ScriptedParser(), SetClock()
    async with open_application(
        load({"data": str(folder), **settings}, environ={}),
        models=ScriptedModels(),
        clock=clock,
        code_engine=ScriptedEngine(),
        parser=parser,
        embedder=embedder,
    ) as application:
        yield Bench(application, parser, embedder, clock)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncGenerator[Bench, None]:
    async with opened(tmp_path) as found:
        yield found


# --- who does it -----------------------------------------------------------------------------------------------


async def test_two_pipelines_index_each_file_once(bench: Bench):
    """However many look for work."""
    others = [Pipeline(bench.house, bench.parser) for _ in range(3)]
    for other in others:
        await other.start()
    ids = [await bench.file() for _ in range(12)]
    store = await bench.store(*ids)
    for file_id in ids:
        assert (await bench.ended(store, file_id)).status == "completed"
    assert sorted(bench.index.written) == sorted(ids)
    assert len(bench.parser.parsed) == 12
    for other in others:
        await other.close()


async def test_no_more_files_are_in_hand_than_may_be(tmp_path: Path):
    """`ingest_files` of them; the rest wait, and follow."""
    async with opened(tmp_path, ingest_files=3) as bench:
        bench.parser.holds["a.txt"] = asyncio.Event()
        ids = [await bench.file() for _ in range(8)]
        store = await bench.store(*ids)
        await until(lambda: len(bench.parser.parsed) == 3)
        assert sum(worker is not None for worker in await bench.column("worker")) == 3
        bench.parser.holds["a.txt"].set()
        for file_id in ids:
            assert (await bench.ended(store, file_id)).status == "completed"


async def test_stores_take_turns(tmp_path: Path):
    """One file of each that waits, then the next of each, whoever came first with however many."""
    async with opened(tmp_path, ingest_files=1) as bench:
        blocker = await bench.file(name="blocker")
        bench.parser.holds["blocker"] = asyncio.Event()
        await bench.store(blocker)
        await until(lambda: bench.parser.parsed)
        for letter, count in (("a", 4), ("b", 2), ("c", 1)):
            await bench.store(*[await bench.file(name=f"{letter}{number}") for number in range(count)])
        bench.parser.holds["blocker"].set()
        await until(lambda: len(bench.parser.parsed) == 8)
        names = [name for name, _, _ in bench.parser.parsed]
        assert names == ["blocker", "a0", "b0", "c0", "a1", "b1", "a2", "a3"]


async def test_a_job_that_was_taken_over_writes_nothing(bench: Bench):
    """A pipeline whose lease ran out, and whose file another one has, finds its writes refused; the other's stand."""
    bench.parser.holds["a.txt"] = asyncio.Event()
    file_id = await bench.file()
    await bench.store(file_id)
    await until(lambda: bench.parser.parsed)
    taken_over = "UPDATE vector_store_files SET worker = 'another', attempt = attempt + 1"
    await bench.house.store.write(lambda tx: tx.execute(taken_over))
    bench.parser.holds["a.txt"].set()
    await bench.idle()
    assert bench.index.written == []
    assert await bench.column("status") == ["in_progress"]


async def test_a_lost_lease_is_noticed(bench: Bench):
    """With the next renewal, while the file is being read; and a dead worker's file is taken over."""
    bench.parser.holds["a.txt"] = asyncio.Event()
    file_id = await bench.file()
    store = await bench.store(file_id)
    await until(lambda: bench.parser.parsed)
    await bench.house.store.write(
        lambda tx: tx.execute("UPDATE vector_store_files SET worker = 'dead', lease_until = $1", bench.clock.time + 5)
    )
    await bench.application.pipeline._renew()
    await bench.idle()
    bench.parser.holds.clear()
    bench.house.ingest_queue.wake()
    bench.clock.time += 6
    assert (await bench.ended(store, file_id)).status == "completed"
    assert await bench.column("attempt") == [2]


async def test_a_late_cancel_strands_no_file(tmp_path: Path):
    """A file is detached, attached again and in hand again before the cancel of its old job comes, which ends the new
    one too. It is indexed once that one's lease is over, however busy the pipeline is."""
    async with opened(tmp_path, ingest_files=3) as bench:
        bench.parser.holds = {"a.txt": asyncio.Event(), "b.txt": asyncio.Event()}
        file_id, other = await bench.file(), await bench.file(name="b.txt")
        store = await bench.store(file_id, other)
        await until(lambda: len(bench.parser.parsed) == 2)
        chores = await bench.house.store.write(
            lambda tx: vector_stores.leave_stores(tx, PROJECT, file_id, bench.clock.time)
        )
        await bench.attach(store, file_id)
        await until(lambda: len(bench.parser.parsed) == 3)
        await vector_stores.follow_up(bench.house, chores)
        await until(lambda: len(bench.application.pipeline._tasks) == 1)
        bench.parser.holds["a.txt"].set()
        for _ in range(2):
            bench.clock.time += 0.6 * bench.house.settings.run_lease_s
            await bench.application.pipeline._renew()
        bench.house.ingest_queue.wake()
        assert (await bench.ended(store, file_id)).status == "completed"
        bench.parser.holds["b.txt"].set()


async def test_what_a_stopped_pipeline_had_in_hand_is_free(tmp_path: Path):
    """An orderly end counts as no try; the next start goes on."""
    async with opened(tmp_path) as bench:
        bench.parser.holds["a.txt"] = asyncio.Event()
        file_id = await bench.file()
        store = await bench.store(file_id)
        await until(lambda: bench.parser.parsed)
    async with opened(tmp_path) as bench:
        assert (await bench.ended(store, file_id)).status == "completed"
        assert await bench.column("tries") == [1]


async def test_a_file_that_kills_the_server_is_given_up(bench: Bench):
    """It is not tried for ever."""
    bench.parser.holds["a.txt"] = asyncio.Event()
    file_id = await bench.file()
    store = await bench.store(file_id)
    await until(lambda: bench.parser.parsed)
    for _ in range(len(WAITS_S) + 2):  # what a crash and the next start amount to
        [task] = bench.application.pipeline._tasks
        task.cancel()
        await bench.idle()
        await bench.house.store.write(file_rows.release_jobs)
        bench.house.ingest_queue.wake()
        await until(lambda: bench.application.pipeline._tasks)
    file = await bench.ended(store, file_id)
    assert file.last_error is not None
    assert file.last_error.message == KEEPS_STOPPING


# --- what happens meanwhile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["detached", "store deleted", "attached with other chunks", "attributes"])
async def test_what_happens_while_the_index_is_written_counts(bench: Bench, what: str):
    """The index says what the rows say, whichever of them was last: here the write to the index has begun."""
    bench.index.go.clear()
    file_id, other = await bench.file(), await bench.file(name="b.txt")
    store = await bench.store(file_id)
    await until(lambda: bench.index.holds)
    act = {
        "detached": lambda: vector_stores.detach_file(bench.house, PROJECT, store, file_id),
        "store deleted": lambda: vector_stores.delete_store(bench.house, PROJECT, store),
        "attached with other chunks": lambda: bench.attach(store, file_id, chunking_strategy=SMALL),
        "attributes": lambda: vector_stores.modify_file(bench.house, PROJECT, store, file_id, {"n": 1}),
    }[what]
    acting = asyncio.create_task(act())
    await asyncio.sleep(0.05)
    bench.index.go.set()
    await acting
    await bench.idle()
    assert await bench.chores() == 0
    file = await bench.look(store, file_id)
    if file is None:
        assert await bench.text(store, file_id) == ""
        return
    assert (await bench.ended(store, file_id)).status == "completed"
    assert await bench.text(store, file_id) == TEXT.decode()
    if what == "attributes":
        found = await vector_stores.search(bench.house, PROJECT, [store], ["cats"], limit=5)
        assert found.files[file_id].attributes == {"n": 1}
    else:
        assert bench.parser.parsed[-1] == ("a.txt", 200, 50)
    assert (await bench.attach(store, other)).status == "in_progress"


@pytest.mark.parametrize("then", ["indexed again", "detached", "store deleted"])
async def test_a_death_between_index_and_row_leaves_nothing_wrong(bench: Bench, then: str):
    """The index has the file, and the row does not say so: it is indexed again in its place, or removed."""
    bench.index.back.clear()
    file_id = await bench.file()
    store = await bench.store(file_id)
    await until(lambda: bench.index.written)
    [task] = bench.application.pipeline._tasks
    task.cancel()
    await bench.idle()
    assert await bench.text(store, file_id) == TEXT.decode()
    if then == "detached":
        await vector_stores.detach_file(bench.house, PROJECT, store, file_id)
    elif then == "store deleted":
        await vector_stores.delete_store(bench.house, PROJECT, store)
    await bench.house.store.write(file_rows.release_jobs)
    bench.index.back.set()
    bench.house.ingest_queue.wake()
    if then == "indexed again":
        file = await bench.ended(store, file_id)
        assert file.usage_bytes == await bench.house.index.usage_bytes(PROJECT, store) == len(TEXT)
    else:
        assert await bench.text(store, file_id) == ""


async def test_attaching_anew_replaces_what_was_there(bench: Bench):
    """Until then the old content is found."""
    file_id = await bench.file()
    store = await bench.store(file_id)
    await bench.ended(store, file_id)
    bench.index.go.clear()
    assert (await bench.attach(store, file_id, chunking_strategy=SMALL)).status == "in_progress"
    await until(lambda: bench.index.holds)
    assert await bench.chores() == 0
    found = await vector_stores.search(bench.house, PROJECT, [store], ["purr"], limit=5)
    assert [hit.file_id for hit in found.hits] == [file_id]
    bench.index.go.set()
    file = await bench.ended(store, file_id)
    assert (file.status, file.chunking_strategy) == ("completed", SMALL)
    assert await bench.house.index.usage_bytes(PROJECT, store) == file.usage_bytes


async def test_other_changes_leave_what_is_there(tmp_path: Path):
    """A file that waits to be indexed anew is found meanwhile, and by attributes that it got since."""
    async with opened(tmp_path, ingest_files=1) as bench:
        blocker, file_id = await bench.file(name="blocker"), await bench.file()
        store = await bench.store(file_id)
        await bench.ended(store, file_id)
        bench.parser.holds["blocker"] = asyncio.Event()
        await bench.store(blocker)
        await until(lambda: len(bench.parser.parsed) == 2)
        await bench.attach(store, file_id, chunking_strategy=SMALL)
        await vector_stores.modify_file(bench.house, PROJECT, store, file_id, {"n": 1})
        where = Eq(key="n", value=1)
        found = await vector_stores.search(bench.house, PROJECT, [store], ["purr"], limit=5, where=where)
        assert [hit.file_id for hit in found.hits] == [file_id]


async def test_a_file_that_fails_the_second_time_is_not_found(bench: Bench):
    """What the index had of it goes."""
    file_id, other = await bench.file(), await bench.file(name="b.txt")
    store = await bench.store(file_id, other)
    await bench.ended(store, file_id)
    await bench.ended(store, other)
    bench.parser.fails["a.txt"] = RuntimeError("broken")
    await bench.attach(store, file_id, chunking_strategy=SMALL)
    assert (await bench.ended(store, file_id)).status == "failed"
    await until(lambda: not bench.application.pipeline._tasks)
    assert await bench.text(store, file_id) == ""
    assert await bench.text(store, other) != ""


# --- what goes wrong -------------------------------------------------------------------------------------------


async def test_a_server_of_embeddings_that_is_away_is_waited_for(tmp_path: Path):
    """With growing pauses, kept in the row; then the file fails, with the reason."""
    embedder = ScriptedEmbedder()
    async with opened(tmp_path, embedder=embedder) as bench:
        embedder.errors = [ModelUnreachable("Nobody is there.")] * (len(WAITS_S) + 1)
        first = await bench.file()
        store = await bench.store(first)
        for tries, wait_s in enumerate(WAITS_S, 1):
            await until(lambda tries=tries: len(embedder.asked) == tries)
            await bench.idle()
            assert await bench.column("not_before") == [bench.clock.time + wait_s]
            assert await bench.column("status") == ["in_progress"]
            bench.clock.time += wait_s
            bench.house.ingest_queue.wake()
        file = await bench.ended(store, first)
        assert file.last_error is not None
        assert file.last_error.code == "server_error"
        assert file.last_error.message == (
            "The file could not be indexed, though it was tried 6 times. Nobody is there."
        )
        again = await bench.attach(store, first)
        assert again.status == "in_progress"
        assert (await bench.ended(store, first)).status == "completed"
        assert await bench.column("embedding_model") == ["letters"]


async def test_a_refusal_is_final(tmp_path: Path):
    """What would be refused again is not tried again."""
    embedder = ScriptedEmbedder()
    async with opened(tmp_path, embedder=embedder) as bench:
        embedder.errors = [ModelRefused("No such model.")]
        file_id = await bench.file()
        store = await bench.store(file_id)
        file = await bench.ended(store, file_id)
        assert file.last_error is not None
        assert file.last_error.message == "The file could not be indexed. No such model."
        assert len(embedder.asked) == 1


async def test_a_full_disk_is_waited_for(bench: Bench):
    """The job is put back, and done when there is room."""
    bench.index.fails = [StoreFull("no space left")]
    file_id = await bench.file()
    store = await bench.store(file_id)
    await until(lambda: not bench.index.fails)
    await bench.idle()
    assert await bench.column("status") == ["in_progress"]
    bench.clock.time += WAITS_S[0]
    bench.house.ingest_queue.wake()
    assert (await bench.ended(store, file_id)).status == "completed"


async def test_bytes_that_are_missing_are_said_to_be(bench: Bench):
    """A file whose blob is gone fails."""
    file_id = await bench.file()
    await bench.house.blobs.delete([f"{file_id[-2:]}/{file_id}"])
    store = await bench.store(file_id)
    file = await bench.ended(store, file_id)
    assert file.last_error is not None
    assert file.last_error.message == MISSING


async def test_what_the_index_was_not_told_it_is_told_later(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """When it fails while a file is detached, the caller is not concerned, and the file goes a moment later."""
    file_id, other = await bench.file(), await bench.file(name="b.txt")
    store = await bench.store(file_id, other)
    for each in (file_id, other):
        await bench.ended(store, each)

    async def fails(*_: Any) -> None:
        raise StoreFull("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(bench.index, "delete_file", fails, raising=False)
        await vector_stores.detach_file(bench.house, PROJECT, store, file_id)
        assert await bench.chores() == 1
        found = await vector_stores.search(bench.house, PROJECT, [store], ["purr"], limit=5)
        assert {hit.file_id for hit in found.hits} == {other}
    assert await settle_all(bench.house)
    assert await bench.chores() == 0
    assert await bench.text(store, file_id) == ""


async def test_a_damaged_store_keeps_no_other_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """What its index cannot be told is tried again; all others are told meanwhile, however much that is."""
    file_id, other = await bench.file(), await bench.file()
    damaged, sound = await bench.store(file_id, other), await bench.store(file_id, other)
    for store in (damaged, sound):
        await bench.ended(store, file_id)
        await bench.ended(store, other)
    delete_file = bench.index.delete_file

    async def fails(project: str, store_id: str, file_id: str) -> None:
        if store_id == damaged:
            raise StoreUnavailable("its file is no database")
        await delete_file(project, store_id, file_id)

    async def note(tx: Transaction) -> None:
        await insert_chores(tx, PROJECT, damaged, ["file-gone"] * 2 * AT_ONCE)
        await vector_stores.leave_stores(tx, PROJECT, file_id, bench.clock.time)

    monkeypatch.setattr(bench.index, "delete_file", fails, raising=False)
    await bench.house.store.write(note)
    assert not await settle_all(bench.house)
    assert await bench.text(sound, file_id) == ""
    assert await bench.chores() == 2 * AT_ONCE + 1


async def test_a_store_that_is_to_be_emptied_is_not_filled(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """After `reindex`, files wait until the index has let go of what it had."""
    file_id = await bench.file()
    store = await bench.store(file_id)
    await bench.ended(store, file_id)

    async def nothing(*_: Any) -> bool:
        return True

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "settle_all", nothing)
        assert await vector_stores.reindex(bench.house.store, bench.clock.time) == 1
        bench.house.ingest_queue.wake()
        await asyncio.sleep(0.02)
        assert len(bench.parser.parsed) == 1
    assert await settle_all(bench.house)
    assert await bench.text(store, file_id) == ""
    bench.house.ingest_queue.wake()
    assert (await bench.ended(store, file_id)).status == "completed"
    assert await bench.text(store, file_id) == TEXT.decode()
