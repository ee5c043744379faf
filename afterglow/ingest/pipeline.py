"""Who indexes the files of vector stores: claims, leases, crashes, as `runs/worker.py` does it for runs.

A file's row in progress is the job. A claim gives it a worker, a lease and a new attempt number; before anything is
written to the index, and again with the result, the row is asked whether this attempt still has it. Reading a document
is the work of other processes, and waiting for embeddings is nobody's; few files are in hand at a time, and their turns
are those of `rows/vector_store_files.py`. So neither a thousand files nor a large one hold up runs, or each other.

What a server of embeddings cannot do now is tried again later, some minutes in all. A job whose process dies each time
is not tried for ever: its file fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol, TypeVar

from afterglow import telemetry
from afterglow.contracts import Chunk, House, Transaction, Work
from afterglow.errors import (
    BlobMissing,
    ContextOverflow,
    DimensionMismatch,
    InvalidRequest,
    LostLease,
    ModelError,
    ModelRefused,
    StoreError,
    Unreadable,
)
from afterglow.files import read_file
from afterglow.ids import new_id
from afterglow.ingest.parse import Parsed
from afterglow.ingest.states import move_file
from afterglow.ingest.upkeep import settle, settle_all
from afterglow.objects import FileError, FileStatus
from afterglow.rows import files as stored_file_rows
from afterglow.rows import vector_store_files as file_rows
from afterglow.rows import vector_stores as store_rows
from afterglow.rows.vector_store_files import Job
from afterglow.rows.vector_stores import Chore
from afterglow.search.ranking import pack_vector
from afterglow.telemetry import log
from afterglow.vector_stores import check_model
from afterglow.webhooks import record_file

T = TypeVar("T")
POLL_S = 1.0  # how long a lost wake-up, or a job left by another worker, can go unnoticed
STORE_RETRY_S = 1.0
WAITS_S = (5, 15, 45, 120, 240)  # before a job is tried again
SORRY = "Sorry, something went wrong."
KEEPS_STOPPING = "The file could not be indexed: the server stopped each time it was tried."
MISSING = "The contents of the file are missing on the server."


class Parser(Protocol):
    """Reads documents and cuts their text. `ingest/parse.py` does it in other processes."""

    async def parse(self, name: str, data: AsyncIterator[bytes], max_tokens: int, overlap_tokens: int) -> Parsed:
        """Raises Unreadable, and what `data` raises."""
        ...

    async def close(self) -> None: ...


class Later(Exception):
    """The job cannot be done now. args: why, in words for the file's owner."""


class Claim(NamedTuple):
    """A job that is ours now. filename: None when the file is gone. model: of the store's embeddings, if it has any."""

    job: Job
    filename: str | None
    model: str | None


class Pipeline:
    """Indexes up to `ingest_files` files at a time."""

    def __init__(self, house: House, parser: Parser) -> None:
        self._house = house
        self._parser = parser
        self._id = new_id("worker")
        self._tasks: dict[asyncio.Task[None], Job] = {}
        self._draining = False
        self._claiming: asyncio.Task[None] | None = None
        self._loops: list[asyncio.Task[None]] = []
        house.ingest_queue.on_cancel(self._cancel)

    async def start(self) -> None:
        self._claiming = asyncio.create_task(self._claim_forever())
        self._loops = [
            self._claiming,
            asyncio.create_task(self._renew_forever()),
            asyncio.create_task(self._settle_forever()),
        ]

    async def drain(self) -> None:
        """Claim nothing more, and wait until no file is in hand here."""
        self._draining = True
        self._house.ingest_queue.wake()
        if self._claiming is not None:
            await self._claiming
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Let go of everything; the jobs are done elsewhere at once, or at the next start."""
        jobs = list(self._tasks.values())
        for task in [*self._loops, *self._tasks]:
            task.cancel()
        await asyncio.gather(*self._loops, *self._tasks, return_exceptions=True)
        await self._parser.close()

        async def work(tx: Transaction) -> None:
            for job in jobs:
                await file_rows.put_back(tx, job, self._id, 0, job.tries - 1)

        with contextlib.suppress(StoreError):
            await self._house.store.write(work)

    def _cancel(self, key: str) -> None:
        for task, job in self._tasks.items():
            if key in (job.key, job.file.vector_store_id):
                task.cancel()

    # --- claiming ----------------------------------------------------------------------------------------------

    async def _claim_forever(self) -> None:
        while not self._draining:
            try:
                claimed = await self._claim()
            except StoreError as error:
                log.error("No file can be indexed: %s", error)
                await asyncio.sleep(STORE_RETRY_S)
                continue
            if not claimed:
                await self._house.ingest_queue.wait(POLL_S)

    async def _claim(self) -> bool:
        free = self._house.settings.ingest_files - len(self._tasks)
        if free <= 0:
            return False
        now = self._house.clock.now()

        async def work(tx: Transaction) -> list[Claim]:
            jobs = await file_rows.claim_jobs(tx, self._id, now, now + self._house.settings.run_lease_s, free)
            return [await _look_around(tx, job, now) for job in jobs]

        claims = await self._house.store.write(work)
        for claim in claims:
            task = asyncio.create_task(self._do(claim))
            self._tasks[task] = claim.job
            task.add_done_callback(self._forget)
        return bool(claims)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._house.ingest_queue.wake()  # there is room again

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._house.settings.run_lease_s / 3)
            try:
                await self._renew()
            except StoreError as error:
                log.error("The leases of files that are being indexed were not renewed: %s", error)

    async def _renew(self) -> None:
        """Renew the leases of what is in hand here; what is not ours any more is let go.

        No other leases: a file that is detached and attached again can lose its new job to the cancel of the old one,
        and must be claimed again.
        """
        asked = dict(self._tasks)
        if not asked:
            return
        until = self._house.clock.now() + self._house.settings.run_lease_s

        async def work(tx: Transaction) -> list[Job]:
            return await file_rows.renew_jobs(tx, self._id, asked.values(), until)

        renewed = await self._house.store.write(work, rowwise=True)
        for task, job in asked.items():
            if job not in renewed:
                task.cancel()

    async def _settle_forever(self) -> None:
        """Tell the index what a crash or another process has left undone."""
        while True:
            with contextlib.suppress(StoreError):
                await settle_all(self._house)
            await asyncio.sleep(POLL_S)

    # --- one job -----------------------------------------------------------------------------------------------

    async def _do(self, claim: Claim) -> None:
        """The pipeline's edge: whatever goes wrong with a file ends here, with the file failed or put back."""
        job = claim.job
        telemetry.subject.set(job.key)
        began = time.monotonic()
        try:
            chunks = await self._index(claim)
            took_s = time.monotonic() - began
            self._house.metrics.file_indexed(chunks, took_s)
            log.info("File %s was indexed: %d passages in %.1f s.", job.key, chunks, took_s)
        except LostLease:
            log.info("File %s was detached, or taken over; this attempt stops.", job.key)
        except Later as error:
            if job.tries <= len(WAITS_S):
                log.warning("File %s is put back: the server of embeddings did not do its part.", job.key)
                await self._put_back(job)
            else:
                await self._fail(job, str(error))
        except Unreadable as error:
            await self._fail(job, error.message, error.code)
        except (InvalidRequest, DimensionMismatch) as error:
            await self._fail(job, str(error))
        except BlobMissing:
            await self._fail(job, MISSING)
        except StoreError as error:
            log.error("File %s is put back: %s", job.key, error)
            await self._put_back(job)
        except Exception:  # noqa: BLE001  this is the edge: the job must end, whatever it was
            log.exception("File %s was not indexed by a fault of ours.", job.key)
            await self._fail(job, SORRY)

    async def _index(self, claim: Claim) -> int:
        """Return how many passages the file has."""
        job, house = claim.job, self._house
        if claim.filename is None:
            raise BlobMissing(f"there is no file {job.file.id}")
        if job.tries > len(WAITS_S) + 2:
            raise Unreadable("server_error", KEEPS_STOPPING)
        model = house.embedder.model if house.embedder else None
        if model is not None:
            check_model(job.file.vector_store_id, claim.model, model)
        sizes = job.file.chunking_strategy.static
        async with aclosing(read_file(house, job.project, job.file.id)) as data:
            parsed = await self._parser.parse(
                claim.filename, data, sizes.max_chunk_size_tokens, sizes.chunk_overlap_tokens
            )
        embeddings = await self._embed(parsed.chunks)
        async with house.locks.hold(job.file.vector_store_id):
            await self._put(job, parsed, embeddings, model)
        return len(parsed.chunks)

    async def _put(self, job: Job, parsed: Parsed, embeddings: list[bytes] | None, model: str | None) -> None:
        """Write it to the index, then to the row. What happens to the row meanwhile is settled after us."""
        file = await self._house.store.read(lambda tx: file_rows.get_held_file(tx, job, self._id))
        if file is None:
            raise LostLease
        text = parsed.extracted.text
        usage_bytes = await self._house.index.put_file(
            job.project, file.vector_store_id, file.id, file.attributes, parsed.chunks, embeddings, text
        )

        async def work(tx: Transaction) -> list[str]:
            held = await file_rows.get_held_file(tx, job, self._id)
            if held is None:
                raise LostLease
            if await stored_file_rows.hold_file(tx, job.project, held.id, self._house.clock.now()) is None:
                raise BlobMissing(f"there is no file {held.id}")
            move_file(held, "indexed", usage_bytes=usage_bytes)
            await file_rows.update_file(tx, job.project, held)
            await file_rows.set_embedding_model(tx, job.project, held, model)
            return await record_file(tx, job.project, held, self._house.clock.now())

        self._note(job, "completed", await self._house.store.write(work))

    def _note(self, job: Job, status: FileStatus, batch_ids: list[str]) -> None:
        """After the commit: tell who waits for the file, or for batches that are over with it."""
        for key in (job.key, *batch_ids):
            self._house.events.note(job.project, key, status if key == job.key else "")
        self._house.webhook_queue.wake()

    async def _embed(self, chunks: Sequence[Chunk]) -> list[bytes] | None:
        """The embeddings of chunks, or None when there is no server of them. Raises Later and Unreadable."""
        embedder, size = self._house.embedder, self._house.settings.embedding_batch
        if embedder is None:
            return None
        packed: list[bytes] = []
        try:
            for at in range(0, len(chunks), size):
                vectors = await embedder.embed([chunk.text for chunk in chunks[at : at + size]])
                packed += await asyncio.to_thread(_pack, vectors)
        except (ModelRefused, ContextOverflow) as error:
            raise Unreadable("server_error", f"The file could not be indexed. {error}") from None
        except ValueError as error:
            raise Unreadable("server_error", f"The file could not be indexed: {error}.") from None
        except ModelError as error:
            raise Later(
                f"The file could not be indexed, though it was tried {len(WAITS_S) + 1} times. {error}"
            ) from None
        return packed

    # --- other ends --------------------------------------------------------------------------------------------

    async def _fail(self, job: Job, message: str, code: str = "server_error") -> None:
        async def work(tx: Transaction) -> tuple[list[Chore], list[str]]:
            held = await file_rows.get_held_file(tx, job, self._id)
            if held is None:
                return [], []
            move_file(held, "broke", error=FileError(code, message))
            await file_rows.update_file(tx, job.project, held)
            over = await record_file(tx, job.project, held, self._house.clock.now())
            return await store_rows.insert_chores(tx, job.project, held.vector_store_id, [held.id]), over

        chores, over = await self._until_stored(work)
        if chores:
            self._note(job, "failed", over)
            self._house.metrics.files_ended.labels("failed").inc()
            level = logging.WARNING if code == "server_error" else logging.INFO  # a broken file is its owner's affair
            log.log(level, "File %s was not indexed: %s.", job.key, code)
        await settle(self._house, chores)

    async def _put_back(self, job: Job) -> None:
        not_before = self._house.clock.now() + WAITS_S[min(job.tries, len(WAITS_S)) - 1]

        async def work(tx: Transaction) -> None:
            await file_rows.put_back(tx, job, self._id, not_before, job.tries)

        await self._until_stored(work)
        self._house.metrics.files_ended.labels("put_back").inc()

    async def _until_stored(self, work: Work[T]) -> T:
        while True:
            try:
                return await self._house.store.write(work)
            except StoreError:
                await asyncio.sleep(STORE_RETRY_S)


async def _look_around(tx: Transaction, job: Job, now: float) -> Claim:
    stored = await stored_file_rows.get_file(tx, job.project, job.file.id, now)
    model = await file_rows.get_embedding_model(tx, job.project, job.file.vector_store_id, besides=job.file.id)
    return Claim(job, stored.file.filename if stored else None, model)


def _pack(vectors: Sequence[Sequence[float]]) -> list[bytes]:
    return [pack_vector(vector) for vector in vectors]
