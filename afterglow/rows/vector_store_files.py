"""Rows of `vector_store_files`, which are jobs as well, and of `file_batches` and `batch_files`.

Whatever changes the status of a file here counts it in its store, in the same transaction.

Turns keep large batches from holding up small ones: the first job of a store takes the turn that is up, each further
one a turn after its predecessor. So the stores that have jobs take part alike, however many jobs each has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

import msgspec

from afterglow.contracts import SqlRow, SqlValue, Transaction
from afterglow.ingest.states import batch_status
from afterglow.objects import FileCounts, FileStatus, VectorStoreFile, VectorStoreFileBatch
from afterglow.rows.lists import PASSING_OVER, ListPage, list_page
from afterglow.rows.requests import delete_answers_in

STATUSES: tuple[FileStatus, ...] = get_args(FileStatus)


class Job(NamedTuple):
    """A file that is to be indexed. tries: how often that was begun since it was attached; attempt: ever."""

    project: str
    file: VectorStoreFile
    tries: int
    attempt: int

    @property
    def key(self) -> str:
        """As `House.ingest_queue` knows it."""
        return f"{self.file.vector_store_id}/{self.file.id}"


async def get_file_object(tx: Transaction, project: str, store_id: str, file_id: str) -> str | None:
    rows = await tx.fetch(
        "SELECT object FROM vector_store_files WHERE project_id = $1 AND store_id = $2 AND id = $3",
        project,
        store_id,
        file_id,
    )
    return rows[0][0] if rows else None


async def get_file(tx: Transaction, project: str, store_id: str, file_id: str) -> VectorStoreFile | None:
    text = await get_file_object(tx, project, store_id, file_id)
    return None if text is None else msgspec.json.decode(text, type=VectorStoreFile)


async def list_files(
    tx: Transaction,
    project: str,
    store_id: str,
    status: str | None,
    batch_id: str | None,
    *,
    limit: int,
    order: str,
    after: str | None,
    before: str | None,
) -> ListPage:
    """status, batch_id: only files of this status, of this batch."""
    where = "project_id = $1 AND store_id = $2"
    values: tuple[SqlValue, ...] = (project, store_id)
    if batch_id is not None:
        where += " AND id IN (SELECT file_id FROM batch_files b WHERE b.project_id = $1 AND b.batch_id = $3)"
        values += (batch_id,)
    return await list_page(
        tx, "vector_store_files", where, values, limit=limit, order=order, after=after, before=before, status=status
    )


async def list_in_status(tx: Transaction, project: str, store_id: str, status: FileStatus) -> list[VectorStoreFile]:
    rows = await tx.fetch(
        "SELECT object FROM vector_store_files WHERE project_id = $1 AND store_id = $2 AND status = $3"
        " ORDER BY created_at, seq",
        project,
        store_id,
        status,
    )
    return [msgspec.json.decode(text, type=VectorStoreFile) for (text,) in rows]


async def list_holders(tx: Transaction, project: str, file_id: str) -> list[str]:
    """The ids of the stores that have this file."""
    rows = await tx.fetch("SELECT store_id FROM vector_store_files WHERE project_id = $1 AND id = $2", project, file_id)
    return [store_id for (store_id,) in rows]


async def insert_files(
    tx: Transaction, project: str, store_id: str, files: Sequence[VectorStoreFile], seq: int
) -> None:
    """Attach files that are not there yet, as jobs. seq: of the first."""
    turn = await _next_turn(tx, project, store_id)
    for offset, file in enumerate(files):
        await tx.execute(
            "INSERT INTO vector_store_files (project_id, store_id, id, seq, created_at, status, usage_bytes, turn,"
            " object) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            project,
            store_id,
            file.id,
            seq + offset,
            file.created_at,
            file.status,
            file.usage_bytes,
            turn + offset,
            msgspec.json.encode(file).decode(),
        )
    await _count(tx, project, store_id, Counter(file.status for file in files))


async def _next_turn(tx: Transaction, project: str, store_id: str) -> int:
    rows = await tx.fetch(
        "SELECT MAX(turn) + 1 FROM vector_store_files"
        " WHERE project_id = $1 AND store_id = $2 AND status = 'in_progress'",
        project,
        store_id,
    )
    if rows[0][0] is None:
        rows = await tx.fetch("SELECT COALESCE(MIN(turn), 0) FROM vector_store_files WHERE status = 'in_progress'")
    return int(rows[0][0])


async def update_file(tx: Transaction, project: str, file: VectorStoreFile) -> None:
    """Write status, usage and object. Once it is in progress no more, nobody has the job; failed or cancelled, it
    leaves the index."""
    let_go = "" if file.status == "in_progress" else ", worker = NULL, lease_until = NULL"
    if file.status in ("failed", "cancelled"):
        let_go += ", embedding_model = NULL"
    keys = (project, file.vector_store_id, file.id)
    [(status, usage_bytes)] = await tx.fetch(
        "SELECT status, usage_bytes FROM vector_store_files WHERE project_id = $1 AND store_id = $2 AND id = $3", *keys
    )
    await tx.execute(
        f"UPDATE vector_store_files SET status = $4, usage_bytes = $5, object = $6{let_go}"
        " WHERE project_id = $1 AND store_id = $2 AND id = $3",
        *keys,
        file.status,
        file.usage_bytes,
        msgspec.json.encode(file).decode(),
    )
    change = Counter({file.status: 1})
    change.subtract({status: 1})
    await _count(tx, project, file.vector_store_id, change, file.usage_bytes - usage_bytes)


async def queue_file(tx: Transaction, project: str, file: VectorStoreFile) -> None:
    """Make a file that is there a job, anew if it is one; whoever has it in hand loses it."""
    turn = await _next_turn(tx, project, file.vector_store_id)
    await update_file(tx, project, file)
    await tx.execute(
        "UPDATE vector_store_files SET turn = $4, tries = 0, not_before = 0, worker = NULL, lease_until = NULL"
        " WHERE project_id = $1 AND store_id = $2 AND id = $3",
        project,
        file.vector_store_id,
        file.id,
        turn,
    )


async def delete_file(tx: Transaction, project: str, file: VectorStoreFile) -> None:
    """Detach it. What the index holds of it is a chore."""
    await tx.execute(
        "DELETE FROM vector_store_files WHERE project_id = $1 AND store_id = $2 AND id = $3",
        project,
        file.vector_store_id,
        file.id,
    )
    await delete_answers_in(tx, project, file.id, file.vector_store_id)
    await _count(tx, project, file.vector_store_id, Counter({file.status: -1}), -file.usage_bytes)


async def _count(
    tx: Transaction, project: str, store_id: str, change: Counter[FileStatus], usage_bytes: int = 0
) -> None:
    await tx.execute(
        "UPDATE vector_stores SET usage_bytes = CASE swept WHEN 0 THEN usage_bytes + $3 ELSE 0 END,"
        " in_progress = in_progress + $4, completed = completed + $5, failed = failed + $6, cancelled = cancelled + $7"
        " WHERE project_id = $1 AND id = $2",
        project,
        store_id,
        usage_bytes,
        *(change[status] for status in STATUSES),
    )


# --- embeddings ------------------------------------------------------------------------------------------------


async def get_embedding_model(tx: Transaction, project: str, store_id: str, besides: str = "") -> str | None:
    """The model of the embeddings of a store's files, which is one; None when they have none. besides: a file that
    does not count."""
    rows = await tx.fetch(
        "SELECT embedding_model FROM vector_store_files"
        " WHERE project_id = $1 AND store_id = $2 AND embedding_model IS NOT NULL AND id <> $3 LIMIT 1",
        project,
        store_id,
        besides,
    )
    return rows[0][0] if rows else None


async def get_model_of_file(tx: Transaction, project: str, store_id: str, file_id: str) -> str | None:
    rows = await tx.fetch(
        "SELECT embedding_model FROM vector_store_files WHERE project_id = $1 AND store_id = $2 AND id = $3",
        project,
        store_id,
        file_id,
    )
    return rows[0][0] if rows else None


async def set_embedding_model(tx: Transaction, project: str, file: VectorStoreFile, model: str | None) -> None:
    await tx.execute(
        "UPDATE vector_store_files SET embedding_model = $4 WHERE project_id = $1 AND store_id = $2 AND id = $3",
        project,
        file.vector_store_id,
        file.id,
        model,
    )


# --- jobs ------------------------------------------------------------------------------------------------------

_JOB = "project_id, object, tries, attempt"


def _job(row: SqlRow) -> Job:
    return Job(row[0], msgspec.json.decode(row[1], type=VectorStoreFile), *row[2:])


async def claim_jobs(tx: Transaction, worker: str, now: float, lease_until: float, limit: int) -> list[Job]:
    """Up to `limit` jobs that nobody alive has, of all projects, in the order of their turns; `worker` has them now.

    A store that the index is to let go of first has to wait.
    """
    rows = await tx.fetch(
        f"SELECT {_JOB} FROM vector_store_files f"
        " WHERE status = 'in_progress' AND not_before <= $1 AND (lease_until IS NULL OR lease_until < $1)"
        " AND NOT EXISTS (SELECT 1 FROM index_chores c"
        " WHERE c.project_id = f.project_id AND c.store_id = f.store_id AND c.file_id = '')"
        f" ORDER BY turn, seq LIMIT {limit} {PASSING_OVER}",
        now,
    )
    jobs = [job._replace(tries=job.tries + 1, attempt=job.attempt + 1) for job in map(_job, rows)]
    for job in jobs:
        await tx.execute(
            "UPDATE vector_store_files SET tries = $4, attempt = $5, worker = $6, lease_until = $7"
            " WHERE project_id = $1 AND store_id = $2 AND id = $3",
            job.project,
            job.file.vector_store_id,
            job.file.id,
            job.tries,
            job.attempt,
            worker,
            lease_until,
        )
    return jobs


async def get_held_file(tx: Transaction, job: Job, worker: str) -> VectorStoreFile | None:
    """The file as it is now, if `worker` still has this very job."""
    rows = await tx.fetch(
        "SELECT object FROM vector_store_files WHERE project_id = $1 AND store_id = $2 AND id = $3"
        " AND attempt = $4 AND worker = $5 AND status = 'in_progress'",
        job.project,
        job.file.vector_store_id,
        job.file.id,
        job.attempt,
        worker,
    )
    return msgspec.json.decode(rows[0][0], type=VectorStoreFile) if rows else None


async def put_back(tx: Transaction, job: Job, worker: str, not_before: float, tries: int) -> None:
    """Give the job up, if `worker` has it: it is to be done by whoever claims it from then on."""
    await tx.execute(
        "UPDATE vector_store_files SET worker = NULL, lease_until = NULL, not_before = $6, tries = $7"
        " WHERE project_id = $1 AND store_id = $2 AND id = $3 AND attempt = $4 AND worker = $5",
        job.project,
        job.file.vector_store_id,
        job.file.id,
        job.attempt,
        worker,
        not_before,
        tries,
    )


async def renew_jobs(tx: Transaction, worker: str, jobs: Iterable[Job], lease_until: float) -> list[Job]:
    """Renew those that `worker` still has; return them. Whatever else it seems to have is nobody's, soon."""
    return [job for job in jobs if await _renew_job(tx, worker, job, lease_until)]


async def _renew_job(tx: Transaction, worker: str, job: Job, lease_until: float) -> bool:
    renewed = await tx.execute(
        "UPDATE vector_store_files SET lease_until = $6 WHERE project_id = $1 AND store_id = $2 AND id = $3"
        " AND attempt = $4 AND worker = $5 AND status = 'in_progress'",
        job.project,
        job.file.vector_store_id,
        job.file.id,
        job.attempt,
        worker,
        lease_until,
    )
    return renewed > 0


async def release_jobs(tx: Transaction) -> int:
    """Free all jobs, for a start when no other process can be at work; return how many somebody had."""
    return await tx.execute(
        "UPDATE vector_store_files SET worker = NULL, lease_until = NULL, not_before = 0 WHERE worker IS NOT NULL"
    )


# --- batches ---------------------------------------------------------------------------------------------------


async def get_batch(tx: Transaction, project: str, store_id: str, batch_id: str) -> VectorStoreFileBatch | None:
    rows = await tx.fetch(
        "SELECT created_at, cancelled FROM file_batches WHERE project_id = $1 AND id = $2 AND store_id = $3",
        project,
        batch_id,
        store_id,
    )
    if not rows:
        return None
    counted = await tx.fetch(
        "SELECT status, COUNT(*) FROM batch_files WHERE project_id = $1 AND batch_id = $2 GROUP BY status",
        project,
        batch_id,
    )
    counts = FileCounts(**dict(counted), total=sum(number for _, number in counted))
    return VectorStoreFileBatch(
        id=batch_id,
        created_at=rows[0][0],
        vector_store_id=store_id,
        status=batch_status(counts, bool(rows[0][1])),
        file_counts=counts,
    )


async def insert_batch(
    tx: Transaction, project: str, store_id: str, batch_id: str, files: Iterable[VectorStoreFile], created_at: int
) -> None:
    await tx.execute(
        "INSERT INTO file_batches (project_id, id, store_id, created_at) VALUES ($1, $2, $3, $4)",
        project,
        batch_id,
        store_id,
        created_at,
    )
    for file in files:
        await tx.execute(
            "INSERT INTO batch_files (project_id, batch_id, store_id, file_id, status) VALUES ($1, $2, $3, $4, $5)",
            project,
            batch_id,
            store_id,
            file.id,
            file.status,
        )


async def end_in_batches(tx: Transaction, project: str, store_id: str, file_id: str, status: FileStatus) -> list[str]:
    """Tell the batches that wait for this file what became of it; return the ids of those that are over with it."""
    rows = await tx.fetch(
        "UPDATE batch_files SET status = $4"
        " WHERE project_id = $1 AND store_id = $2 AND file_id = $3 AND status = 'in_progress' RETURNING batch_id",
        project,
        store_id,
        file_id,
        status,
    )
    return [batch_id for (batch_id,) in rows if not await _waits(tx, project, batch_id)]


async def _waits(tx: Transaction, project: str, batch_id: str) -> bool:
    return bool(
        await tx.fetch(
            "SELECT 1 FROM batch_files WHERE project_id = $1 AND batch_id = $2 AND status = 'in_progress' LIMIT 1",
            project,
            batch_id,
        )
    )


async def list_waited_for(tx: Transaction, project: str, batch_id: str) -> list[str]:
    """The ids of the files that a batch, and no other, waits for."""
    rows = await tx.fetch(
        "SELECT file_id FROM batch_files b WHERE project_id = $1 AND batch_id = $2 AND status = 'in_progress'"
        " AND NOT EXISTS (SELECT 1 FROM batch_files other WHERE other.project_id = $1 AND other.store_id = b.store_id"
        " AND other.file_id = b.file_id AND other.status = 'in_progress' AND other.batch_id <> $2)",
        project,
        batch_id,
    )
    return [file_id for (file_id,) in rows]


async def cancel_batch(tx: Transaction, project: str, batch_id: str) -> bool:
    """Stop waiting for files; whether it waited for any."""
    waiting = await tx.execute(
        "UPDATE batch_files SET status = 'cancelled'"
        " WHERE project_id = $1 AND batch_id = $2 AND status = 'in_progress'",
        project,
        batch_id,
    )
    if waiting:
        await tx.execute("UPDATE file_batches SET cancelled = 1 WHERE project_id = $1 AND id = $2", project, batch_id)
    return waiting > 0
