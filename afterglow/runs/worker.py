"""Who executes runs: claims, leases, crashes, and the clock's part in a run's life.

Theory of operation. A run that is queued, or in progress without a living lease, may be claimed by any worker. A
claim gives the run a new attempt number and a lease, in one transaction; every later write of that attempt first
checks that the number is still its own, so an attempt that was taken for dead and wakes up can change nothing. A
worker renews the leases of all its runs in one statement, every third of the lease. Whoever claims a run in progress
takes over from a dead worker: what that left open is closed and kept from prompts, and the run goes on from its last
finished step. Nothing that was finished is done again: steps are closed, with their usage, in one transaction.

A worker that is drained claims nothing more and lets its runs end. One that is closed gives its leases up and lets go
of its runs; they go on elsewhere at once, or at the next start. A run whose attempts keep dying still ends, at its
deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from typing import NamedTuple

from afterglow import telemetry
from afterglow.contracts import House, Segment, Transaction
from afterglow.errors import AfterglowError, LostLease, StoreError
from afterglow.files import tidy_files
from afterglow.finding import index_messages
from afterglow.ids import new_id
from afterglow.retention import Retention
from afterglow.rows import events as event_rows
from afterglow.rows import requests as request_rows
from afterglow.rows import runs as run_rows
from afterglow.rows.runs import RunRow
from afterglow.runs import report
from afterglow.runs.budgets import Budgets
from afterglow.runs.closing import leave_behind_open_steps
from afterglow.runs.interrupt import Why
from afterglow.runs.lifecycle import expire_overdue, pass_on_stranded, time_out_calls
from afterglow.runs.loop import Execution
from afterglow.runs.states import move_run
from afterglow.runs.transcript import Event, Transcript, run_event
from afterglow.telemetry import log
from afterglow.tools.code_interpreter import CodeInterpreter
from afterglow.uploads import tidy_uploads
from afterglow.vector_stores import expire_stores
from afterglow.webhooks import tidy_deliveries

CLAIM_LIMIT = 64
POLL_S = 1.0  # how long a lost wake-up, or a run left by another worker, can go unnoticed
SWEEP_S = 1.0
INDEX_S = 1.0  # after that, and what it takes, a message is found by its words
TIDY_EVERY_SWEEPS = 60
TIDY_LIMIT = 500
STORE_RETRY_S = 1.0
SORRY = "Sorry, something went wrong."


class Claim(NamedTuple):
    """A run that is ours now. started: the events of the claim, not announced yet. taken_over: from a dead worker."""

    row: RunRow
    transcript: Transcript
    started: list[Segment]
    taken_over: bool


class Worker:
    """Executes up to `max_running_runs` at a time."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._id = new_id("worker")
        self.budgets = Budgets(house)
        self._interpreter = CodeInterpreter(house, self._id)
        self._retention = Retention(house)
        self._executions: dict[str, Execution] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._claiming: asyncio.Task[None] | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._sweeps = 0
        house.queue.on_cancel(lambda run_id: self._interrupt(run_id, "cancelled"))

    @property
    def running(self) -> int:
        """How many runs this worker executes just now."""
        return len(self._executions)

    async def start(self) -> None:
        self._claiming = asyncio.create_task(self._claim_forever())
        self._loops = [
            self._claiming,
            asyncio.create_task(self._repeat(self._renew, self._house.settings.run_lease_s / 3)),
            asyncio.create_task(self._repeat(self._sweep, SWEEP_S)),
            asyncio.create_task(self._repeat(self._index_messages, INDEX_S)),
        ]

    async def drain(self) -> None:
        """Claim nothing more, and wait until no run is being executed here."""
        self._draining = True
        self._house.queue.wake()
        if self._claiming is not None:
            await self._claiming
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Let go of everything; the runs go on where another worker, or the next start, picks them up."""
        for task in [*self._loops, *self._tasks]:
            task.cancel()
        await asyncio.gather(*self._loops, *self._tasks, return_exceptions=True)
        await self._interpreter.close()

        async def work(tx: Transaction) -> int:
            return await run_rows.release_leases(tx, self._id)

        with contextlib.suppress(StoreError):
            await self._house.store.write(work, rowwise=True)

    # --- claiming ----------------------------------------------------------------------------------------------

    async def _claim_forever(self) -> None:
        while not self._draining:
            free = min(self._house.settings.max_running_runs - self.running, CLAIM_LIMIT)
            try:
                claimed = await self._claim(free) if free > 0 else 0
            except StoreError as error:
                log.error("No run can be claimed: %s", error)
                await asyncio.sleep(STORE_RETRY_S)
                continue
            if not claimed:
                await self._house.queue.wait(POLL_S)

    async def _claim(self, limit: int) -> int:
        executing = frozenset(self._executions)

        async def work(tx: Transaction) -> list[Claim]:
            return await claim_next(tx, self._house, self._id, limit, executing)

        claims, committed = await self._house.store.write_early(work)
        if not claims:
            await committed
        for claim in claims:
            task = asyncio.create_task(self._execute(claim, committed))
            # Before the task first runs: from now on it counts as running, and a cancel must find it.
            self._executions[claim.row.run.id] = Execution(
                self._house,
                claim.row,
                claim.transcript,
                self._house.calibration,
                claim.started,
                task,
                self._interpreter,
                self.budgets,
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(claims)

    # --- executing ---------------------------------------------------------------------------------------------

    async def _execute(self, claim: Claim, committed: Awaitable[None]) -> None:
        """The worker's edge: whatever goes wrong in a run ends here, with the run ended or let go."""
        run = claim.row.run
        telemetry.subject.set(run.id)
        execution = self._executions[run.id]
        left_s = max(claim.row.deadline - self._house.clock.now(), 0)
        timer = asyncio.get_running_loop().call_later(left_s, execution.interrupt.ask, "expired")
        try:
            if claim.taken_over:  # what the prompt is read from has just been changed
                await asyncio.shield(asyncio.ensure_future(committed))
            with report.attempt(self._house, claim.row, self._id, taken_over=claim.taken_over):
                await execution.run(committed)
        except LostLease:
            log.info("Run %s was taken over or deleted; attempt %d stops.", run.id, claim.row.attempt)
            self._house.events.forget(run.id)
        except StoreError as error:
            log.error("Run %s was let go: %s", run.id, error)
            await self._let_go(claim.row)
        except Exception:  # noqa: BLE001  this is the edge: the run must end, whatever it was
            log.exception("Run %s failed by a fault of ours.", run.id)
            with contextlib.suppress(AfterglowError):
                await execution.fail(SORRY)
        finally:
            timer.cancel()
            if self._executions.get(run.id) is execution:
                del self._executions[run.id]
                if self.running + 1 >= self._house.settings.max_running_runs:
                    self._house.queue.wake()  # there is room again

    async def _let_go(self, row: RunRow) -> None:
        """Give a run back, or this worker would go on renewing its lease while nobody executes it."""

        async def work(tx: Transaction) -> int:
            return await run_rows.release_run(tx, row.project, row.run.id, row.attempt)

        while True:
            await asyncio.sleep(STORE_RETRY_S)
            with contextlib.suppress(StoreError):
                await self._house.store.write(work)
                return

    def _interrupt(self, run_id: str, why: Why) -> None:
        if execution := self._executions.get(run_id):
            execution.interrupt.ask(why)

    # --- keeping up --------------------------------------------------------------------------------------------

    async def _repeat(self, act: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await act()
            except StoreError as error:
                log.error("%s was not done: %s", act.__name__.strip("_"), error)

    async def _renew(self) -> None:
        """Renew the leases; whatever runs here and is not ours any more is told to stop."""
        if not self._executions:
            return
        asked = dict(self._executions)
        until = self._house.clock.now() + self._house.settings.run_lease_s

        async def work(tx: Transaction) -> set[str]:
            return await run_rows.renew_leases(tx, self._id, until)

        renewed = await self._house.store.write(work, rowwise=True)
        for run_id in asked.keys() - renewed:
            asked[run_id].interrupt.ask("lost")  # not whatever executes the run by now

    async def _sweep(self) -> None:
        now = self._house.clock.now()
        for execution in self._executions.values():
            if execution.row.deadline <= now:  # its timer was late: timers stand still while a laptop sleeps
                execution.interrupt.ask("expired")
        if self._executions:  # the word of a cancel can be lost between two processes
            for run_id in await self._house.store.read(lambda tx: run_rows.list_cancelling(tx, self._id)):
                self._interrupt(run_id, "cancelled")
        await expire_overdue(self._house, CLAIM_LIMIT, frozenset(self._executions))
        while await time_out_calls(self._house, CLAIM_LIMIT) >= CLAIM_LIMIT:
            pass
        if stranded := await pass_on_stranded(self._house, CLAIM_LIMIT):
            log.error("%d runs waited for threads that no run held; they have them now.", stranded)
        await self._interpreter.sweep()
        self._sweeps += 1
        if self._sweeps % TIDY_EVERY_SWEEPS == 0:
            await self._tidy()

    async def _index_messages(self) -> None:
        await index_messages(self._house)

    async def _tidy(self) -> None:
        """Delete what has outlived its use, a bounded number at a time."""
        now = int(self._house.clock.now())

        async def work(tx: Transaction) -> int:
            return await request_rows.delete_requests_before(tx, now - request_rows.KEYS_KEPT_S, TIDY_LIMIT)

        while await self._house.store.write(work, rowwise=True) >= TIDY_LIMIT:
            pass
        await self._retention.sweep()
        await tidy_files(self._house)
        await tidy_uploads(self._house)
        await expire_stores(self._house)
        await tidy_deliveries(self._house)


async def claim_next(
    tx: Transaction, house: House, worker: str, limit: int, executing: Collection[str] = ()
) -> list[Claim]:
    """Claim up to `limit` runs: those that a dead worker left, then the oldest queued.

    executing: ids of those that the worker has in hand. Their lease may have run out while it slept; nobody has them
    but it.
    """
    now = house.clock.now()
    rows = [row for row in await run_rows.list_abandoned(tx, now, limit) if row.run.id not in executing]
    if len(rows) < limit:
        rows += await run_rows.list_queued(tx, limit - len(rows))
    return [await _claim_one(tx, house, row, worker, now) for row in rows]


async def _claim_one(tx: Transaction, house: House, row: RunRow, worker: str, now: float) -> Claim:
    queued = row.run.status == "queued"
    row.attempt += 1
    events: list[Event] = []
    # A run that will not go on closes what is open as its end demands.
    if row.run.status == "in_progress" and row.deadline > now:
        events = await leave_behind_open_steps(tx, row.project, row.run, int(now))
    move_run(row.run, "claimed", int(now))
    if queued:
        events = [run_event(row.run)]
    await run_rows.set_holder(tx, row, worker, now + house.settings.run_lease_s)
    transcript = Transcript(row.attempt)
    started = []
    if events:
        segment = transcript.number(events)
        await event_rows.insert_segment(tx, row.project, row.run.id, segment, int(now))
        started.append(segment)
    return Claim(row, transcript, started, taken_over=not queued)
