"""What is kept of runs in memory is never older than what was committed last."""

from __future__ import annotations

import asyncio
from pathlib import Path

from afterglow.contracts import KnownRun, Transaction
from afterglow.store.run_memory import LocalRunMemory
from afterglow.store.sqlite import SqliteStore
from tests.unit.test_rows import P, Rows

RUN = KnownRun("{}", "in_progress", 600)

LAST = 60  # of the writes that are read meanwhile


def keep(memory: LocalRunMemory, run_id: str = "run_1", run: KnownRun | None = RUN) -> None:
    memory.keep(P, "thread_1", run_id, memory.reading(P, run_id), run)


def test_what_is_kept_is_of_one_project_and_thread() -> None:
    """Nobody else gets it."""
    memory = LocalRunMemory()
    keep(memory)
    assert memory.get(P, "thread_1", "run_1") == RUN
    assert memory.get(P, "thread_2", "run_1") is None
    assert memory.get("other", "thread_1", "run_1") is None


def test_runs_that_are_over_are_not_kept() -> None:
    """Nor is what could not be read."""
    memory = LocalRunMemory()
    keep(memory, run=RUN._replace(status="completed"))
    keep(memory, run=None)
    assert memory.get(P, "thread_1", "run_1") is None


def test_what_was_read_when_a_change_began_is_not_kept() -> None:
    """Whether the reader comes back while the transaction is open, or after it."""
    memory = LocalRunMemory()
    first, second = memory.reading(P, "run_1"), memory.reading(P, "run_1")
    memory.changing(P, "run_1")
    memory.keep(P, "thread_1", "run_1", first, RUN)
    memory.changed()
    memory.keep(P, "thread_1", "run_1", second, RUN)
    assert memory.get(P, "thread_1", "run_1") is None


def test_nothing_is_kept_while_a_change_is_open() -> None:
    """A reader that begins meanwhile may see what was before; one that begins after sees what is."""
    memory = LocalRunMemory()
    keep(memory)
    memory.changing(P, "run_1")
    assert memory.get(P, "thread_1", "run_1") is None
    mark = memory.reading(P, "run_1")
    memory.changed()
    memory.keep(P, "thread_1", "run_1", mark, RUN)
    assert memory.get(P, "thread_1", "run_1") is None
    keep(memory)
    assert memory.get(P, "thread_1", "run_1") == RUN


def test_memory_is_bounded() -> None:
    """What was not asked for the longest goes first; what is larger than all of it is not kept."""
    memory = LocalRunMemory(max_chars=4)
    keep(memory, "run_1")
    keep(memory, "run_2")
    assert memory.get(P, "thread_1", "run_1") == RUN
    keep(memory, "run_3")
    assert [memory.get(P, "thread_1", f"run_{number}") is not None for number in (1, 2, 3)] == [True, False, True]
    keep(memory, "run_4", RUN._replace(text="12345"))
    assert memory.get(P, "thread_1", "run_4") is None


async def test_the_store_tells_of_every_change(tmp_path: Path) -> None:
    """Whatever statement changes a run's object or deletes it, and whatever rolls it back, memory follows; what only
    renews leases changes nothing."""
    memory = LocalRunMemory()
    store = SqliteStore(tmp_path / "afterglow.db", readers=1, run_memory=memory)
    rows = Rows(store)
    await rows.run("run_1", thread_id="thread_1")
    for statement, stays in (
        ("UPDATE runs SET lease_until = 5, worker = 'w' WHERE id = $1", True),
        ("UPDATE runs SET attempt = attempt WHERE id = $1", True),
        ("UPDATE runs SET object = object WHERE id = $1", False),
        ("UPDATE runs SET status = 'queued' WHERE id = $1", False),
        ("DELETE FROM runs WHERE id = $1", False),
    ):
        keep(memory)
        await rows.sql(statement, "run_1")
        assert (memory.get(P, "thread_1", "run_1") is not None) == stays, statement
    await store.close()


async def test_no_reader_is_behind_what_was_acknowledged(tmp_path: Path) -> None:
    """However reading and writing are mixed, who asks after a write was acknowledged gets it, or a later one."""
    memory = LocalRunMemory()
    store = SqliteStore(tmp_path / "afterglow.db", readers=2, run_memory=memory)
    await Rows(store).run("run_1", thread_id="thread_1")
    acknowledged, from_memory = 0, 0

    async def write() -> None:
        nonlocal acknowledged
        for number in range(1, LAST + 1):

            async def work(tx: Transaction, text: str = str(number)) -> int:
                return await tx.execute("UPDATE runs SET object = $1 WHERE id = 'run_1'", text)

            await store.write(work)
            acknowledged = number
            await asyncio.sleep(0)

    async def look(tx: Transaction) -> KnownRun:
        [(text,)] = await tx.fetch("SELECT object FROM runs WHERE id = 'run_1'")
        return KnownRun(text if text.isdigit() else "0", "in_progress", 600)

    async def ask() -> None:
        nonlocal from_memory
        while acknowledged < LAST:
            least = acknowledged
            run = memory.get(P, "thread_1", "run_1")
            from_memory += run is not None
            if run is None:
                mark = memory.reading(P, "run_1")
                run = await store.read(look)
                memory.keep(P, "thread_1", "run_1", mark, run)
            assert int(run.text) >= least
            await asyncio.sleep(0)

    await asyncio.gather(write(), *[ask() for _ in range(4)])
    assert from_memory
    await store.close()
