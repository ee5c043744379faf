"""Statements that decide something: who may claim a run, who holds it, and what a dead attempt leaves behind."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from afterglow.contracts import Position, Segment, Transaction
from afterglow.objects import Message, Run, RunStatus, RunStep, Thread, Usage
from afterglow.rows import events, files, messages, runs, steps, threads
from afterglow.rows.runs import RunAsked, RunRow
from afterglow.store.sqlite import SqliteStore

P = "acme"
NOW = 1_700_000_000
DEADLINE = NOW + 600
PAGE: dict[str, Any] = {"limit": 100, "order": "asc", "after": None, "before": None}


class Rows:
    """A database, and its row functions without their transactions."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store

    async def __call__(self, function: Any, *values: Any, **named: Any) -> Any:
        return await self.store.write(lambda tx: function(tx, *values, **named))

    async def sql(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return await self.store.write(lambda tx: tx.fetch(sql, *values))

    async def run(
        self, run_id: str, *, thread_id: str = "", seq: int = 1, created_at: int = NOW, project: str = P
    ) -> RunRow:
        """A queued run, on a thread of its own unless told otherwise."""
        run = Run(
            id=run_id,
            created_at=created_at,
            assistant_id="asst_1",
            thread_id=thread_id or f"thread_{run_id}",
            model="m",
        )
        row = RunRow(
            project=project, run=run, asked=RunAsked(), spent=Usage(), attempt=0, deadline=created_at + 600, seq=seq
        )
        await self(runs.insert_run, row)
        return row

    async def claim(self, row: RunRow, worker: str, until: float, status: RunStatus = "in_progress") -> None:
        """Give the run to a worker, as its next attempt."""
        row.attempt += 1
        row.run.status = status
        await self(runs.set_holder, row, worker, until)

    async def abandoned(self, now: float, limit: int = 100) -> list[str]:
        return [row.run.id for row in await self(runs.list_abandoned, now, limit)]

    async def held(self, row: RunRow, attempt: int) -> bool:
        return await self(runs.get_held_run, row.project, row.run.id, attempt) is not None


@pytest.fixture
async def rows(tmp_path: Path) -> AsyncGenerator[Rows, None]:
    store = SqliteStore(tmp_path / "afterglow.db", readers=1)
    yield Rows(store)
    await store.close()


# --- one run holds a thread ------------------------------------------------------------------------------------


async def test_a_thread_takes_one_active_run(rows: Rows):
    """The database itself refuses a second one, whatever the status of the first, until that is over."""
    row = await rows.run("run_1", thread_id="thread_1")
    for status in ("queued", "in_progress", "requires_action", "cancelling"):
        row.run.status = status
        await rows(runs.update_run, row)
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            await rows.run("run_2", thread_id="thread_1", seq=2)
    row.run.status = "completed"
    await rows(runs.update_run, row)
    await rows.run("run_2", thread_id="thread_1", seq=2)
    found = await rows(runs.get_active_run, P, "thread_1")
    assert found.run.id == "run_2"


async def test_threads_of_other_projects_are_other_threads(rows: Rows):
    """The same ids in another project are in nobody's way, and are not found from here."""
    await rows.run("run_1", thread_id="thread_1")
    await rows.run("run_1", thread_id="thread_1", project="other")
    assert await rows(runs.get_active_run, "third", "thread_1") is None
    assert await rows(runs.get_run, "third", "thread_1", "run_1") is None
    assert await rows(runs.get_run, P, "thread_2", "run_1") is None


async def test_a_run_is_read_as_it_was_written(rows: Rows):
    """Object, what was asked, what was spent, deadline, attempt and place come back."""
    row = await rows.run("run_1", seq=7)
    row.asked.temperature = 0.5
    await rows.claim(row, "w1", NOW + 10)
    row.spent = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
    await rows(runs.update_run, row)
    found = await rows(runs.get_run, P, row.run.thread_id, "run_1")
    row.asked.temperature = None  # what was asked is written once, at the start
    assert found == row


# --- the queue -------------------------------------------------------------------------------------------------


async def test_the_queue_is_in_order_across_projects(rows: Rows):
    """Oldest first, then by place; only what is queued; no more than asked for."""
    await rows.run("run_c", created_at=NOW + 1, seq=1)
    await rows.run("run_b", seq=2, project="other")
    await rows.run("run_a", seq=1)
    gone = await rows.run("run_0", created_at=NOW - 5)
    await rows.claim(gone, "w1", NOW + 10)
    for limit, expected in ((9, ["run_a", "run_b", "run_c"]), (2, ["run_a", "run_b"]), (0, [])):
        assert [row.run.id for row in await rows(runs.list_queued, limit)] == expected


async def test_a_run_is_abandoned_when_its_lease_is_over(rows: Rows):
    """Held runs without a lease beyond now, oldest first; nothing that waits, is queued or is over."""
    for number, (run_id, until, status) in enumerate(
        [
            ("dead", NOW - 1, "in_progress"),
            ("dying", NOW - 1, "cancelling"),
            ("alive", NOW + 1, "in_progress"),
            ("just", NOW, "in_progress"),
        ]
    ):
        row = await rows.run(run_id, seq=number)
        await rows.claim(row, "w1", until, status)
    await rows.run("queued")
    waiting = await rows.run("waiting")
    await rows.claim(waiting, "w1", NOW - 1)
    waiting.run.status = "requires_action"
    await rows(runs.update_run, waiting)
    over = await rows.run("over")
    await rows.claim(over, "w1", NOW - 1)
    over.run.status = "failed"
    await rows(runs.update_run, over)
    assert await rows.abandoned(NOW) == ["dead", "dying"]
    assert await rows.abandoned(NOW, limit=1) == ["dead"]
    assert await rows.abandoned(NOW + 2) == ["dead", "dying", "alive", "just"]


async def test_a_worker_renews_what_is_its_own(rows: Rows):
    """One statement for all of a worker's runs; those of others, and those that it gave up, stay as they are."""
    mine, theirs, done = [await rows.run(name) for name in ("mine", "theirs", "done")]
    await rows.claim(mine, "w1", NOW + 1)
    await rows.claim(theirs, "w2", NOW + 1)
    await rows.claim(done, "w1", NOW + 1)
    done.run.status = "requires_action"
    await rows(runs.update_run, done)
    assert await rows(runs.renew_leases, "w1", NOW + 20) == {"mine"}
    assert await rows.abandoned(NOW + 10) == ["theirs"]
    assert await rows.abandoned(NOW + 30) == ["mine", "theirs"]


async def test_leases_are_released_for_one_or_for_all(rows: Rows):
    """Released runs can be taken over at once; how many there were is told."""
    for number, worker in enumerate(("w1", "w1", "w2")):
        await rows.claim(await rows.run(f"run_{number}", seq=number), worker, NOW + 10)
    assert await rows(runs.release_leases, "w1") == 2
    assert await rows.abandoned(NOW) == ["run_0", "run_1"]
    assert await rows(runs.release_leases) == 3
    assert await rows.abandoned(NOW) == ["run_0", "run_1", "run_2"]


async def test_one_run_is_released_by_who_holds_it(rows: Rows):
    """The lease of one run ends only when its attempt is still that one."""
    row = await rows.run("run_1")
    await rows.claim(row, "w1", NOW + 10)
    await rows.claim(row, "w2", NOW + 10)
    assert await rows(runs.release_run, P, "run_1", 1) == 0
    assert await rows.abandoned(NOW) == []
    assert await rows(runs.release_run, P, "run_1", 2) == 1
    assert await rows.abandoned(NOW) == ["run_1"]


async def test_only_the_last_attempt_holds_a_run(rows: Rows):
    """Fencing: an attempt holds its run until another claims it, or it is let go of."""
    row = await rows.run("run_1")
    assert not await rows.held(row, 0)
    await rows.claim(row, "w1", NOW + 10)
    assert await rows.held(row, 1)
    await rows.claim(row, "w1", NOW + 10)
    assert (await rows.held(row, 1), await rows.held(row, 2)) == (False, True)
    row.run.status = "requires_action"
    await rows(runs.update_run, row)
    assert not await rows.held(row, 2)
    await rows.claim(row, "w1", NOW + 10)
    row.run.status = "completed"
    await rows(runs.update_run, row)
    assert not await rows.held(row, 3)


async def test_an_expired_lease_still_holds_until_it_is_taken(rows: Rows):
    """A worker that was slow, and whom nobody has followed, may go on."""
    row = await rows.run("run_1")
    await rows.claim(row, "w1", NOW - 100)
    assert await rows.held(row, 1)


async def test_what_is_overdue_and_held_by_nobody_is_found(rows: Rows):
    """Past the deadline, active, and without a living lease."""
    await rows.run("queued")
    dead, alive, over = [await rows.run(name) for name in ("dead", "alive", "over")]
    await rows.claim(dead, "w1", DEADLINE - 1)
    await rows.claim(alive, "w1", DEADLINE + 5)
    over.run.status = "expired"
    await rows(runs.update_run, over)

    async def overdue(now: float) -> set[str]:
        return {row.run.id for row in await rows(runs.list_overdue, now, 10)}

    assert await overdue(DEADLINE - 0.5) == set()
    assert await overdue(DEADLINE) == {"queued", "dead"}
    assert await overdue(DEADLINE + 6) == {"queued", "dead", "alive"}


# --- events ----------------------------------------------------------------------------------------------------


def segment(attempt: int, first: int, last: int) -> Segment:
    return Segment(attempt, first, last, b"%d.%d-%d" % (attempt, first, last))


async def test_only_the_last_attempt_writes_events(rows: Rows):
    """A segment of an attempt that was taken over is not written; nor one of a run that is gone."""
    row = await rows.run("run_1")
    await rows(events.insert_segment, P, "run_1", segment(0, 1, 2), NOW)
    await rows.claim(row, "w1", NOW + 10)
    await rows(events.insert_segment, P, "run_1", segment(0, 3, 4), NOW)
    await rows(events.insert_segment, P, "run_1", segment(1, 1, 1), NOW)
    await rows(events.insert_segment, P, "run_none", segment(1, 1, 1), NOW)
    found = await rows(events.list_segments, P, "run_1", Position(0, 0))
    assert [one.data for one in found] == [b"0.1-2", b"1.1-1"]
    assert await rows.sql("SELECT COUNT(*) FROM events") == [(2,)]


async def test_segments_are_found_from_any_place(rows: Rows):
    """From the one that holds the next event on, in the order of attempts, then of numbers."""
    row = await rows.run("run_1")
    for first, last in ((1, 2), (3, 9), (10, 10)):
        await rows(events.insert_segment, P, "run_1", segment(0, first, last), NOW)
    for _ in range(2):
        await rows.claim(row, "w1", NOW + 10)
    await rows(events.insert_segment, P, "run_1", segment(2, 1, 3), NOW)
    everything = [b"0.1-2", b"0.3-9", b"0.10-10", b"2.1-3"]
    for place, skipped in (((0, 0), 0), ((0, 1), 0), ((0, 2), 1), ((0, 8), 1), ((0, 9), 2), ((0, 99), 3), ((1, 5), 3)):
        found = await rows(events.list_segments, P, "run_1", Position(*place))
        assert [one.data for one in found] == everything[skipped:]
    assert await rows(events.list_segments, P, "run_1", Position(2, 3)) == []
    assert await rows(events.get_last_position, P, "run_1") == (2, 3)
    assert await rows(events.get_last_position, P, "run_none") == (0, 0)


async def test_events_of_active_runs_are_kept(rows: Rows):
    """What is old goes, a bounded number at a time, but never of a run that is not over."""
    active, over = await rows.run("active"), await rows.run("over")
    for run in (active, over):
        for number, at in enumerate((NOW, NOW + 1, NOW + 100), 1):
            await rows(events.insert_segment, P, run.run.id, segment(0, number, number), at)
    over.run.status = "completed"
    await rows(runs.update_run, over)
    assert await rows(events.delete_events_before, P, NOW + 50, 1) == 1
    assert await rows(events.delete_events_before, P, NOW + 50, 9) == 1
    assert await rows(events.delete_events_before, P, NOW + 50, 9) == 0
    assert len(await rows(events.list_segments, P, "active", Position(0, 0))) == 3
    assert len(await rows(events.list_segments, P, "over", Position(0, 0))) == 1


async def test_text_of_a_run_that_is_gone_goes_with_time(rows: Rows):
    """Text that was being written while its thread was deleted is deleted like what is old."""
    await rows.run("run_1")
    await rows(events.insert_segment, P, "run_1", segment(0, 1, 1), NOW)
    await rows.sql("DELETE FROM runs RETURNING id")
    assert await rows(events.delete_events_before, P, NOW + 1, 9) == 1


async def test_a_segment_is_there_once(rows: Rows):
    """One that is written again, since nobody knew whether it was, stays as it is."""
    await rows.run("run_1")
    for _ in range(2):
        await rows(events.insert_segment, P, "run_1", segment(0, 1, 1), NOW)
    assert len(await rows(events.list_segments, P, "run_1", Position(0, 0))) == 1


# --- bytes that no file owns -----------------------------------------------------------------------------------


async def test_bytes_that_are_to_be_deleted_are_owned_by_nobody(rows: Rows):
    """Who takes loose bytes has them for good; once they are condemned, nobody can take them."""
    taken, condemned = files.LooseBlob(P, "ta/taken"), files.LooseBlob(P, "co/condemned")
    for loose in (taken, condemned):
        await rows(files.insert_loose_blob, loose, NOW)
    assert await rows(files.take_loose_blob, taken)
    assert not await rows(files.condemn_loose_blob, taken)
    assert await rows(files.condemn_loose_blob, condemned)
    assert not await rows(files.take_loose_blob, condemned)
    assert await rows(files.list_loose_blobs, NOW, 9) == [condemned]
    await rows(files.delete_loose_blob, condemned)
    assert await rows(files.list_loose_blobs, float("inf"), 9) == []


# --- what is left behind ---------------------------------------------------------------------------------------


async def test_what_is_left_behind_is_listed_until_it_is_replaced(rows: Rows):
    """Left behind, a message and its step are kept from prompts at once, and from lists when their replacement is
    there; other runs' are not touched."""
    for run_id in ("run_1", "run_2"):
        message = Message(id=f"msg_{run_id}", created_at=NOW, thread_id="t", role="assistant", run_id=run_id)
        message.status = "completed"
        await rows(messages.insert_message, P, message, 1 if run_id == "run_1" else 3)
        step = RunStep(
            id=f"step_{run_id}", created_at=NOW, run_id=run_id, assistant_id="a", thread_id="t", type="tool_calls",
            step_details={"type": "tool_calls", "tool_calls": []},
        )  # fmt: skip
        step.status = "completed"
        await rows(steps.insert_step, P, step, 2 if run_id == "run_1" else 4, 1)
        if run_id == "run_1":
            await rows(messages.update_message, P, message, left_behind=True)
            await rows(steps.update_step, P, step, left_behind=True)

    async def seen(tx: Transaction) -> tuple[list[str], list[str], list[str], list[str]]:
        far = (NOW + 1, 99)
        return (
            (await messages.list_messages(tx, P, "t", None, **PAGE)).ids,
            (await steps.list_steps(tx, P, "run_1", **PAGE)).ids,
            [placed.message.id for placed in await messages.list_messages_before(tx, P, "t", 99, far, 9)],
            [placed.step.id for placed in await steps.list_calls_before(tx, P, "t", 99, far, (0, 0), 9)],
        )

    assert await rows(seen) == (["msg_run_1", "msg_run_2"], ["step_run_1"], ["msg_run_2"], ["step_run_2"])
    await rows(messages.hide_left_behind, P, "run_2")
    assert (await rows(seen))[0] == ["msg_run_1", "msg_run_2"]
    await rows(messages.hide_left_behind, P, "run_1")
    assert await rows(seen) == (["msg_run_2"], [], ["msg_run_2"], ["step_run_2"])
    found = await rows(messages.get_message, P, "t", "msg_run_1")
    assert found.id == "msg_run_1"


# --- threads ---------------------------------------------------------------------------------------------------


async def test_a_thread_numbers_what_it_holds(rows: Rows):
    """Numbers are drawn once each, several at a time; a thread that is gone has none."""
    await rows(threads.insert_thread, P, Thread(id="t", created_at=NOW), 1)
    assert [await rows(threads.take_seq, P, "t", count) for count in (1, 3, 1)] == [1, 2, 5]
    assert await rows(threads.get_last_seq, P, "t") == 5
    assert await rows(threads.take_seq, P, "none") is None
    assert await rows(threads.take_seq, "other", "t") is None


async def test_deleting_a_thread_leaves_nothing(rows: Rows):
    """Messages, runs, steps, events, calls and metadata go with it, in every table; another project's stay."""
    for project in (P, "other"):
        await rows(threads.insert_thread, project, Thread(id="t", created_at=NOW, metadata={"k": "v"}), 1)
        run = await rows.run("run_1", thread_id="t", project=project)
        await rows(events.insert_segment, project, "run_1", segment(0, 1, 1), NOW)
        await rows(messages.insert_message, project, Message(id="m", created_at=NOW, thread_id="t", role="user"), 2)
        step = RunStep(
            id="s",
            created_at=NOW,
            run_id=run.run.id,
            assistant_id="a",
            thread_id="t",
            type="tool_calls",
            step_details={},
        )
        await rows(steps.insert_step, project, step, 3, 1)
    assert await rows(threads.delete_thread, P, "t")
    assert not await rows(threads.delete_thread, P, "t")
    of_projects = (
        "SELECT t.name FROM sqlite_master t JOIN pragma_table_info(t.name) c"
        " WHERE t.type = 'table' AND c.name = 'project_id' ORDER BY t.name"
    )
    for (table,) in await rows.sql(of_projects):
        assert await rows.sql(f"SELECT COUNT(*) FROM {table} WHERE project_id = $1", P) == [(0,)], table
    assert await rows.sql("SELECT COUNT(*) FROM events WHERE project_id = 'other'") == [(1,)]
    assert await rows(threads.delete_thread, "other", "t")
