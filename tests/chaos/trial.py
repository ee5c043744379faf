"""One trial: start everything, let callers talk while the monkey plays, let it settle, and look at what is left."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from afterglow.contracts import Store
from afterglow.store.postgres import PostgresStore
from afterglow.store.sqlite import SqliteStore
from tests.chaos.callers import OVER, Caller, Crowd, Door, Librarian, Records, Talk, word_in
from tests.chaos.checks import (
    Evidence,
    RunChecks,
    Verdict,
    check_blobs,
    check_library,
    check_library_as_told,
    check_talk,
    embedded_index,
    postgres_index,
)
from tests.chaos.fleet import DRAIN_S, LEASE_S, Database, Member, Monkey
from tests.chaos.model import MODEL, Player, Script
from tests.e2e.processes import environment

CROWD = 3
LIBRARIANS = 2
CALM_CANCELS = 4
CANCEL_S = 1.5  # 1 s is owed; what looks at it takes a moment itself
SETTLES_S = 30.0  # beyond the last deadline of a run
CALLERS_END_S = 60.0
STALE_S = 10.0  # how long after it stood still a worker may ask the model for what is not its own any more
COMPLAINTS = ("Fatal Python error", "Traceback", "fault of ours", "never retrieved", "was never awaited")


class Plan(NamedTuple):
    seed: int
    shape: Literal["cluster", "laptop"] = "cluster"
    chaos_s: float = 30.0
    apis: int = 4
    workers: int = 4
    callers: int = 14
    run_expires_s: int = 25

    @property
    def exact(self) -> bool:
        """In the cluster streams show only what is stored already: another process has it."""
        return self.shape == "cluster"


class Report(NamedTuple):
    plan: Plan
    took_s: float
    done: Counter[str]
    runs: Counter[str]
    attempts: int
    messages: int
    files: int
    slowest_cancel_s: float
    latest_end_s: float
    checked: Counter[str]
    violations: list[str]

    def __str__(self) -> str:
        def counts(counted: Counter[str]) -> str:
            return ", ".join(f"{name} {number}" for name, number in sorted(counted.items())) or "none"

        lines = [
            f"seed {self.plan.seed}, {self.plan.shape}, {self.took_s:.0f} s",
            f"  chaos:      {counts(self.done)}",
            f"  runs:       {counts(self.runs)}; {self.attempts} attempts",
            f"  besides:    {self.messages} messages acknowledged, {self.files} files;"
            f" slowest cancel in quiet {self.slowest_cancel_s:.2f} s; latest end {self.latest_end_s:+.0f} s",
            f"  checked:    {len(self.checked)} invariants, {self.checked.total()} times",
            f"  violations: {len(self.violations)}",
            *(f"    {violation}" for violation in self.violations),
        ]
        return "\n".join(lines)


class Trial:
    """What is at hand while it lasts. url: of the database, empty for SQLite."""

    def __init__(self, plan: Plan, folder: Path, player: Player, database: Database | None, url: str) -> None:
        self._plan = plan
        self._folder = folder
        self._player = player
        self._url = url
        self._mark = secrets.token_hex(8)
        env = self._environment()
        roles = [("api", plan.apis), ("worker", plan.workers)] if database else [("all", 1)]
        self.members = [Member(role, number, folder, env) for role, count in roles for number in range(count)]  # type: ignore[arg-type]
        self.records = Records()
        self.verdict = Verdict()
        self._calm = asyncio.Event()
        self._door = Door(self._rng("door"), lambda: [one.url for one in self.members if one.url], self.records)
        self.monkey = Monkey(self._rng("monkey"), self.members, database)

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self._plan.seed} {name}")

    def _environment(self) -> dict[str, str]:
        return environment(
            CHAOS_TRIAL=self._mark,
            PYTHONFAULTHANDLER="1",
            AFTERGLOW_DATA=str(self._folder / "data"),
            AFTERGLOW_DATABASE_URL=self._url,
            AFTERGLOW_MODEL_URL=self._player.url,
            AFTERGLOW_RUN_LEASE_S=str(LEASE_S),
            AFTERGLOW_RUN_EXPIRES_S=str(self._plan.run_expires_s),
            AFTERGLOW_KEEP_ALIVE_S="2",
            AFTERGLOW_MODEL_RETRIES="2",
            AFTERGLOW_DRAIN_S=str(DRAIN_S),
            AFTERGLOW_DATABASE_CONNECTIONS="6",
        )

    # --- the way through a trial -------------------------------------------------------------------------------

    async def run(self) -> Report:
        began = time.monotonic()
        await asyncio.gather(*(member.start() for member in self.members))
        await self._make_assistants()
        talking = await self._let_talk()
        try:
            await self.monkey.play(self._plan.chaos_s)
            self._calm.set()
            await self._end(talking)
        finally:
            for task in talking:
                task.cancel()
            await asyncio.gather(*talking, return_exceptions=True)
        for member in self.members:
            member.check_alive()
        slowest_s = await self._cancel_in_calm()
        await self._settle()
        await self._search()
        await asyncio.gather(*(member.terminate() for member in self.members))
        evidence = await self._judge()
        return Report(
            self._plan,
            time.monotonic() - began,
            self.monkey.done,
            Counter(row.status for row in evidence.runs.values()),
            sum(row.attempt for row in evidence.runs.values()),
            sum(post.fate == "kept" for talk in self.records.talks for post in talk.posts),
            len(self.records.uploads),
            slowest_s,
            max(row.ended_at - row.deadline for row in evidence.runs.values()),
            self.verdict.checked,
            self.verdict.violations,
        )

    async def _make_assistants(self) -> None:
        while len(self.records.assistants) < 2:
            fate, assistant = await self._door.do("POST", "/assistants", {"model": MODEL})
            if fate == "kept":
                self.records.assistants.append(assistant["id"])

    async def _let_talk(self) -> list[asyncio.Task[None]]:
        def caller(kind: type[Any], name: str) -> Any:
            return kind(self._rng(name), self._door, self.records, name, self._calm)

        acts: list[Coroutine[Any, Any, None]] = []
        acts += [caller(Caller, f"c{number}").talk_on() for number in range(self._plan.callers)]
        crowd = [caller(Crowd, f"g{number}") for number in range(CROWD)]
        talk = await crowd[0].new_thread()
        acts += [one.join_in(talk) for one in crowd]
        acts += [caller(Librarian, f"l{number}").work_on() for number in range(LIBRARIANS)]
        return [asyncio.create_task(act) for act in acts]

    async def _end(self, talking: list[asyncio.Task[None]]) -> None:
        ended, late = await asyncio.wait(talking, timeout=CALLERS_END_S + self._plan.run_expires_s)
        self.verdict.expect(not late, "callers come to an end", [task.get_stack() for task in late])
        for task in ended:
            task.result()  # or what it has raised

    async def _cancel_in_calm(self) -> float:
        """Cancel runs whose model hangs, while nobody is tormented; return the longest that it took."""
        caller = Caller(self._rng("calm"), self._door, self.records, "calm", self._calm)
        slowest_s = 0.0
        for number in range(CALM_CANCELS):
            talk = await caller.new_thread()
            ordered = await caller.order(talk, Script(key=f"calm{number}x", kind="hangs", words=4))
            assert ordered is not None
            await self._until(talk, ordered.run_id, "in_progress")
            began = time.monotonic()
            self.verdict.expect(await caller.cancel(talk, ordered) == "kept", "a cancel is taken", ordered.run_id)
            status = await self._until(talk, ordered.run_id, *OVER)
            took_s = time.monotonic() - began
            slowest_s = max(slowest_s, took_s)
            self.verdict.expect(status == "cancelled", "a cancelled run is cancelled", ordered.run_id, status)
            self.verdict.expect(took_s < CANCEL_S, "a cancel wins at once", ordered.run_id, f"{took_s:.2f} s")
        return slowest_s

    async def _until(self, talk: Talk, run_id: str, *statuses: str) -> str:
        async with asyncio.timeout(self._plan.run_expires_s + SETTLES_S):
            while True:
                reply = await self._door.look(f"/threads/{talk.thread_id}/runs/{run_id}")
                if reply.body["status"] in (*statuses, *OVER):
                    return str(reply.body["status"])
                await asyncio.sleep(0.02)

    async def _settle(self) -> None:
        """Wait until nobody has anything left to do."""
        deadline = time.monotonic() + self._plan.run_expires_s + SETTLES_S
        async with self._store() as store:
            while any(left := await store.write(_left)) and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
        self.verdict.expect(not any(left), "everything settles", "runs, files, chores:", left)

    async def _search(self) -> None:
        """What is indexed can be found, by the one word that no other file has."""
        kept = [file_id for file_id in self.records.uploads if file_id not in self.records.gone_files]
        pairs = [(shelf.store_id, one) for shelf in self.records.shelves for one in shelf.files if one in kept]
        for store_id, file_id in pairs:
            await self._find(f"/vector_stores/{store_id}", file_id)
        for file_id in kept:
            got = await self._door.content(f"/files/{file_id}/content")
            self.verdict.expect(got == self.records.uploads[file_id], "a file has its bytes", file_id)

    async def _find(self, path: str, file_id: str) -> None:
        reply = await self._door.look(f"{path}/files/{file_id}")
        if reply.ok and reply.body["status"] == "completed":
            word = word_in(self.records.uploads[file_id])
            found = await self._door.ask("POST", f"{path}/search", {"query": word})
            ids = [hit["file_id"] for hit in found.body["data"]] if found.ok else found
            self.verdict.expect(ids == [file_id], "what is indexed is found", path, file_id, ids)

    async def _judge(self) -> Evidence:
        verdict, records = self.verdict, self.records
        async with self._store() as store:
            evidence = await Evidence.read(store)
            evidence.write(self._folder)
            folder = self._folder / "data" / "search"
            indexed = await postgres_index(verdict, store) if self._url else embedded_index(folder)
        checks = RunChecks(verdict, evidence, self._player, records, exact=self._plan.exact)
        checks.check(self._excused)
        for talk in records.talks:
            check_talk(verdict, evidence, talk)
            for ordered in talk.orders:
                checks.check_told(talk, ordered)
        check_library(verdict, evidence, indexed)
        check_library_as_told(verdict, evidence, records)
        check_blobs(verdict, evidence, self._folder / "data" / "blobs")
        of_members = [fault for member in self.members for fault in member.faults]
        for fault in [*records.faults, *self._player.faults, *of_members]:
            verdict.expect(False, "nobody saw a fault", fault)
        self._read_logs()
        verdict.expect(not (left := await self._processes()), "no process is left", left)
        return evidence

    def _excused(self, at: float) -> bool:
        return any(start <= at <= end + STALE_S for start, end in self.monkey.pauses)

    def _read_logs(self) -> None:
        for member in self.members:
            log = member.log.read_text()
            for complaint in COMPLAINTS:
                at = log.find(complaint)
                self.verdict.expect(at < 0, "no log tells of a fault", member.log, log[max(at - 200, 0) : at + 1500])

    async def _processes(self) -> list[int]:
        """Those that this trial has started, and their children: readers of documents. They may need a moment."""
        mark = f"CHAOS_TRIAL={self._mark}".encode()
        for _ in range(50):
            found = []
            for path in Path("/proc").glob("[0-9]*/environ"):
                with suppress(OSError):
                    if mark in path.read_bytes():
                        found.append(int(path.parent.name))
            if not found:
                break
            await asyncio.sleep(0.1)
        return found

    @asynccontextmanager
    async def _store(self) -> AsyncGenerator[Store, None]:
        store: Store
        if self._url:
            store = await PostgresStore.open(self._url, connections=2, pooled=False)
        else:
            store = SqliteStore(self._folder / "data" / "afterglow.db", readers=1)
        try:
            yield store
        finally:
            await store.close()

    async def close(self) -> None:
        for member in self.members:
            if member.lives:
                await member.kill()
        await self._door.close()


async def _left(tx: Any) -> list[int]:
    """How many runs, files and chores wait. A file that was put back for minutes is tried now."""
    await tx.execute("UPDATE vector_store_files SET not_before = 0 WHERE status = 'in_progress' AND worker IS NULL")
    return [
        (await tx.fetch(query))[0][0]
        for query in (
            "SELECT COUNT(*) FROM runs WHERE holds_thread = 1",
            "SELECT COUNT(*) FROM vector_store_files WHERE status = 'in_progress'",
            "SELECT COUNT(*) FROM index_chores",
        )
    ]


async def try_out(plan: Plan, folder: Path) -> Report:
    """folder: for data and logs; it must be there, and empty."""
    async with Player() as player:
        database = Database() if plan.shape == "cluster" else None
        try:
            trial = Trial(plan, folder, player, database, await database.start() if database else "")
            try:
                return await trial.run()
            finally:
                await trial.close()
        finally:
            if database:
                await database.close()
