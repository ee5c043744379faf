"""What must be true once everything is quiet: the database against what callers were told and what the model plays."""

from __future__ import annotations

import re
import sqlite3
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from afterglow.contracts import Store
from tests.chaos.callers import DONE, Heard, Ordered, Records, Talk
from tests.chaos.model import Player, Script, output_for, read_script
from tests.crash.lives import check_log, parse

LATE_S = 12  # how long after its deadline a run may end while processes and database are away
EARLY_ENDS = {"answers": "completed", "breaks": "failed", "refuses": "failed", "hangs": "expired"}
ENDED_AT = ("completed_at", "failed_at", "cancelled_at")
PING = b": ping\n"
FINISHED = ("stop", "tool_calls")


class Row(NamedTuple):
    """A row of runs, with what hangs on it, each oldest first. log: its events as bytes. calls: of the model."""

    thread_id: str
    status: str
    holds_thread: int
    deadline: int
    attempt: int
    run: Any
    script: Script
    steps: list[Any]
    messages: list[Any]
    calls: list[tuple[str, Any]]
    log: bytes
    ended_at: int


class Verdict:
    """checked: how often each invariant was looked at. violations: what did not hold, by invariant."""

    def __init__(self) -> None:
        self.checked: Counter[str] = Counter()
        self.violations: list[str] = []

    def expect(self, holds: bool, invariant: str, *about: Any) -> None:
        self.checked[invariant] += 1
        if not holds:
            self.violations.append(f"{invariant}: {' '.join(map(str, about))}"[:2000])

    @contextmanager
    def asserting(self, invariant: str, *about: Any) -> Iterator[None]:
        """Take an AssertionError for a violation."""
        try:
            yield
        except AssertionError as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.expect(False, invariant, *about, place.line, error)
        else:
            self.expect(True, invariant)


class Evidence:
    """All rows, read at once when everything is quiet."""

    def __init__(self, tables: dict[str, list[Any]]) -> None:
        self.tables = tables
        self.threads: set[str] = {row[0] for row in tables["threads"]}
        steps, messages, calls, events, ends = (defaultdict[str, list[Any]](list) for _ in range(5))
        for run_id, left_behind, text in tables["steps"]:
            steps[run_id].append({**msgspec.json.decode(text), "left_behind": left_behind})
        self.messages: dict[str, list[Any]] = defaultdict(list)
        for thread_id, run_id, left_behind, text in tables["messages"]:
            message = {**msgspec.json.decode(text), "left_behind": left_behind}
            self.messages[thread_id].append(message)
            if run_id:
                messages[run_id].append(message)
        for run_id, reason, used in tables["model_calls"]:
            calls[run_id].append((reason, msgspec.json.decode(used) if used else None))
        for run_id, created_at, data in tables["events"]:
            events[run_id].append(bytes(data))
            ends[run_id].append(created_at)
        self.runs: dict[str, Row] = {}
        for run_id, thread_id, *columns, text in tables["runs"]:
            run = msgspec.json.decode(text)
            self.runs[run_id] = Row(
                thread_id,
                *columns,
                run,
                read_script(run["instructions"]),
                steps[run_id],
                messages[run_id],
                calls[run_id],
                b"".join(events[run_id]),
                max(ends[run_id], default=0),
            )

    def write(self, folder: Path) -> None:
        """For whoever looks into a violation."""
        for run_id, row in self.runs.items():
            parts = [msgspec.json.format(msgspec.json.encode(part)) for part in (row.run, row.steps, row.messages)]
            (folder / f"{run_id}.txt").write_bytes(b"\n".join([row.log, *parts, repr(row.calls).encode()]))

    @classmethod
    async def read(cls, store: Store) -> Evidence:
        queries = {
            "threads": "SELECT id FROM threads",
            "runs": "SELECT id, thread_id, status, holds_thread, deadline, attempt, object FROM runs ORDER BY seq",
            "steps": "SELECT run_id, left_behind, object FROM steps ORDER BY created_at, seq",
            "messages": "SELECT thread_id, run_id, left_behind, object FROM messages ORDER BY created_at, seq",
            "model_calls": "SELECT run_id, finish_reason, usage FROM model_calls ORDER BY created_at, id",
            "events": "SELECT run_id, created_at, data FROM events ORDER BY run_id, attempt, first_seq",
            "steps_of": "SELECT DISTINCT thread_id FROM steps",
            "stores": "SELECT id, swept, in_progress, completed, failed, cancelled FROM vector_stores",
            "store_files": "SELECT store_id, id, status, object FROM vector_store_files",
            "batch_files": "SELECT store_id, file_id, status FROM batch_files",
            "chores": "SELECT id FROM index_chores",
            "files": "SELECT id, blob FROM files",
            "parts": "SELECT blob FROM upload_parts",
            "loose": "SELECT blob FROM loose_blobs",
        }

        async def work(tx: Any) -> dict[str, list[Any]]:
            return {name: await tx.fetch(query) for name, query in queries.items()}

        return cls(await store.read(work))


# --- runs ------------------------------------------------------------------------------------------------------


class RunChecks:
    """exact: streams showed nothing but what is stored. Otherwise their last words may be lost, if the process that
    said them was killed."""

    def __init__(self, verdict: Verdict, evidence: Evidence, player: Player, records: Records, *, exact: bool) -> None:
        self._verdict = verdict
        self._evidence = evidence
        self._player = player
        self._exact = exact
        self._cancelled = {order.run_id for talk in records.talks for order in talk.orders if order.cancelled}

    def check(self, excused: Callable[[float], bool]) -> None:
        """excused: whether a worker that stood still had just come back."""
        for run_id, row in self._evidence.runs.items():
            self._check_end(run_id, row)
            with self._verdict.asserting("the log is well-formed", run_id):
                events = parse(row.log)
                check_log(events)
                assert events[-1].data == row.run, "the last event is not the run"
            self._check_said(run_id, row)
            self._check_steps(run_id, row)
            self._check_usage(run_id, row)
            self._check_calls(run_id, row, excused)
        self._check_one_at_a_time()

    def _check_end(self, run_id: str, row: Row) -> None:
        expect, script = self._verdict.expect, row.script
        expect(row.holds_thread == 0, "every run is over", run_id, row.status)
        expect(row.ended_at <= row.deadline + LATE_S, "no run ends late", run_id, row.ended_at - row.deadline)
        allowed = {EARLY_ENDS[script.kind]}
        if run_id in self._cancelled:
            allowed.add("cancelled")
        statuses = [event.data["status"] for event in parse(row.log) if event.data["object"] == "thread.run"]
        if "requires_action" in statuses[-2:] or row.attempt > 1 + script.rounds:
            allowed.add("expired")  # nobody has given the outputs; or its attempts kept dying
        expect(row.status in allowed, "a run ends as it must", run_id, row.status, script, row.run["last_error"])

    def _check_said(self, run_id: str, row: Row) -> None:
        shown = [message for message in row.messages if message["left_behind"] < 2]
        texts = ["".join(part["text"]["value"] for part in message["content"]) for message in shown]
        expect, script = self._verdict.expect, row.script
        if row.status == "completed":
            expect(texts == [script.text], "a completed run says its text once", run_id, texts, script)
            expect(all(one["status"] == "completed" for one in shown), "its message is completed", run_id)
        else:
            fits = len(texts) <= 1 and all(script.text.startswith(text) for text in texts)
            expect(fits, "a run that ends early says the beginning of its text, once", run_id, texts, script)
        is_open = any(one["status"] == "in_progress" for one in [*row.messages, *row.steps])
        expect(not is_open, "nothing is left open", run_id)

    def _check_steps(self, run_id: str, row: Row) -> None:
        shown = [step for step in row.steps if step["left_behind"] < 2]
        calls = [step for step in shown if step["type"] == "tool_calls" and step["status"] == "completed"]
        got = [
            [(call["id"], call["function"]["output"]) for call in step["step_details"]["tool_calls"]] for step in calls
        ]
        parts = [
            [(f"call_{city}", output_for(city)) for city in row.script.cities(part)]
            for part in range(row.script.rounds)
        ]
        expect = self._verdict.expect
        if row.status == "completed":
            expect(got == parts, "a completed run has each round of calls once", run_id, got)
            expect(len(shown) == len(parts) + 1, "a completed run has its steps once", run_id, len(shown))
        else:
            expect(got == parts[: len(got)], "finished rounds are there once", run_id, got)

    def _check_usage(self, run_id: str, row: Row) -> None:
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        used = row.run["usage"] or {}
        of_run = [used.get(name) for name in names]
        of_steps = [sum((step["usage"] or {}).get(name, 0) for step in row.steps) for name in names]
        of_calls = [sum((usage or {}).get(name, 0) for _, usage in row.calls) for name in names]
        self._verdict.expect(of_run == of_steps, "usage is the sum of the steps", run_id, of_run, of_steps, row.status)
        self._verdict.expect(of_run == of_calls, "usage is the sum of the calls", run_id, of_run, of_calls, row.status)

    def _check_calls(self, run_id: str, row: Row, excused: Callable[[float], bool]) -> None:
        finished = sum(reason in FINISHED for reason, _ in row.calls)
        most = row.script.rounds + 1
        fits = finished == most if row.status == "completed" else finished <= most
        self._verdict.expect(fits, "no finished call is recorded twice", run_id, finished, most, row.status)
        for before, after in pairwise(self._player.asked[row.script.key]):
            again = after.part < before.part and not excused(after.at)
            self._verdict.expect(not again, "no finished step is asked for again", run_id, before, after)

    def _check_one_at_a_time(self) -> None:
        by_thread: dict[str, list[Row]] = defaultdict(list)
        for row in self._evidence.runs.values():
            by_thread[row.thread_id].append(row)
        for rows in by_thread.values():
            for before, after in pairwise(rows):
                ended = max((before.run[name] or 0 for name in ENDED_AT), default=0)
                begun = after.run["started_at"]  # it may have been created earlier, to wait for the thread
                apart = begun is None or begun >= ended
                self._verdict.expect(apart, "one run at a time", before.run["id"], after.run["id"])

    # --- what callers were told --------------------------------------------------------------------------------

    def check_told(self, talk: Talk, ordered: Ordered) -> None:
        row = self._evidence.runs.get(ordered.run_id)
        if row is None:
            told = ordered.run_id and talk.deleted is None
            self._verdict.expect(not told, "no acknowledged run is lost", ordered.run_id, talk.thread_id)
            return
        if ordered.over is not None:
            self._verdict.expect(ordered.over == row.run, "what is over stays as it is", ordered.run_id)
        for heard in ordered.heard:
            with self._verdict.asserting("a stream is what was stored", ordered.run_id, ordered.script.key):
                self._check_heard(heard, row.log)

    def _check_heard(self, heard: Heard, log: bytes) -> None:
        data = heard.data.replace(PING, b"").removesuffix(DONE)
        events, error, _ = data[: data.rfind(b"\n\n") + 2].partition(b"event: error\n")
        start = 0 if heard.first else log.find(events.partition(b"\n\n")[0])
        assert start >= 0, "its first event is nowhere in the log"
        same = len(commonprefix([events, log[start:]]))  # noqa: RUF071
        lost = events[events.rfind(b"\n\n", 0, same) + 2 :] if same < len(events) else b""
        if lost:
            assert not self._exact, f"seen and not stored: {lost[:600]!r}"
            names = set(re.findall(rb"^event: (.*)$", lost, re.MULTILINE))
            assert names <= {b"thread.message.delta", b"thread.run.step.delta"}, f"seen and not stored: {names}"
            assert not heard.whole, "it is whole, and not stored"
        elif heard.whole and not error:
            last = parse(events)[-1]
            assert last.name in STOPS, f"it ends with {last.name}"


STOPS = {f"thread.run.{status}" for status in ("requires_action", "completed", "failed", "cancelled", "expired")}


# --- threads and messages --------------------------------------------------------------------------------------


def check_talk(verdict: Verdict, evidence: Evidence, talk: Talk) -> None:
    """Each acknowledged message is there, once, and in the order of whoever posted it."""
    thread_id = talk.thread_id
    there = thread_id in evidence.threads
    if talk.deleted == "kept" or not there:
        verdict.expect(talk.deleted is not None, "no acknowledged thread is lost", thread_id)
        verdict.expect(not there, "a deleted thread is gone", thread_id)
        rests = [name for name in ("messages",) if evidence.messages.get(thread_id)]
        rests += [row.run["id"] for row in evidence.runs.values() if row.thread_id == thread_id]
        rests += [row[0] for row in evidence.tables["steps_of"] if row[0] == thread_id]
        verdict.expect(not rests, "nothing of a deleted thread is left", thread_id, rests)
        return
    said = [
        message["content"][0]["text"]["value"] for message in evidence.messages[thread_id] if message["role"] == "user"
    ]
    times = Counter(said)
    for post in talk.posts:
        wanted = {"kept": (1,), "refused": (0,), "unknown": (0, 1)}[post.fate]
        verdict.expect(times[post.text] in wanted, "each message is there as told", post, times[post.text])
    for hand in {post.hand for post in talk.posts}:
        kept = [post.text for post in talk.posts if post.hand == hand and post.fate == "kept"]
        found = [text for text in said if text in set(kept)]
        verdict.expect(found == kept, "messages are in order", thread_id, found, kept)
    verdict.expect(set(said) <= {post.text for post in talk.posts}, "nobody else's message is there", thread_id)


# --- files and vector stores -----------------------------------------------------------------------------------


def check_library(verdict: Verdict, evidence: Evidence, indexed: dict[str, set[str]]) -> None:
    """indexed: the files that the index has, by vector store."""
    rows = defaultdict[str, dict[str, str]](dict)
    for store_id, file_id, status, _ in evidence.tables["store_files"]:
        rows[store_id][file_id] = status
        verdict.expect(status != "in_progress", "no job is stuck", store_id, file_id)
    stores = {row[0]: row for row in evidence.tables["stores"]}
    for store_id, _, *counts in stores.values():
        statuses = Counter(rows[store_id].values())
        real = [statuses[name] for name in ("in_progress", "completed", "failed", "cancelled")]
        verdict.expect(list(counts) == real, "file_counts are the rows", store_id, counts, real)
        completed = {file_id for file_id, status in rows[store_id].items() if status == "completed"}
        verdict.expect(
            indexed.get(store_id, set()) == completed,
            "the index is the rows",
            store_id,
            indexed.get(store_id),
            completed,
        )
    for store_id in rows.keys() | indexed.keys():
        verdict.expect(store_id in stores, "nothing is left of a deleted store", store_id)
    verdict.expect(not evidence.tables["chores"], "no chore is left", evidence.tables["chores"])
    for store_id, file_id, status in evidence.tables["batch_files"]:
        verdict.expect(status != "in_progress", "no batch is stuck", store_id, file_id)


def check_library_as_told(verdict: Verdict, evidence: Evidence, records: Records) -> None:
    """What was acknowledged of files and stores."""
    rows = {(store_id, file_id): status for store_id, file_id, status, _ in evidence.tables["store_files"]}
    stores = {row[0] for row in evidence.tables["stores"]}
    files = {row[0] for row in evidence.tables["files"]}
    for file_id in records.uploads:
        fate = records.gone_files.get(file_id)
        wanted = {None: (True,), "kept": (False,), "unknown": (True, False), "refused": (False,)}[fate]
        verdict.expect((file_id in files) in wanted, "each file is there as told", file_id, fate)
    for shelf in records.shelves:
        if shelf.deleted == "kept" or shelf.store_id not in stores:
            verdict.expect(shelf.deleted is not None, "no acknowledged store is lost", shelf.store_id)
            verdict.expect(shelf.store_id not in stores, "a deleted store is gone", shelf.store_id)
            continue
        for file_id, fate in shelf.files.items():
            if file_id in shelf.detached or file_id in records.gone_files:
                gone = shelf.detached.get(file_id) == "kept" or records.gone_files.get(file_id) == "kept"
                verdict.expect(not gone or (shelf.store_id, file_id) not in rows, "a detached file is gone", file_id)
            elif fate == "kept":
                status = rows.get((shelf.store_id, file_id))
                verdict.expect(status == "completed", "an attached file is indexed", shelf.store_id, file_id, status)


def check_blobs(verdict: Verdict, evidence: Evidence, folder: Path) -> None:
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    owned = {row[1] for row in evidence.tables["files"]} | {row[0] for row in evidence.tables["parts"]}
    loose = {row[0] for row in evidence.tables["loose"]}
    verdict.expect(owned <= on_disk, "the bytes of every file are there", owned - on_disk)
    stray = {key for key in on_disk if key.partition("#")[0] not in owned | loose}
    verdict.expect(not stray, "no bytes are nobody's", stray)


def embedded_index(folder: Path) -> dict[str, set[str]]:
    """What the search files hold."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.db"):
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'store'").fetchone():
                [(store_id,)] = connection.execute("SELECT id FROM store")
                found[store_id] = {row[0] for row in connection.execute("SELECT id FROM files")}
        finally:
            connection.close()
    return found


async def postgres_index(verdict: Verdict, store: Store) -> dict[str, set[str]]:
    """What the index' tables hold; and that they agree among themselves."""

    async def work(tx: Any) -> tuple[Any, Any, dict[str, int]]:
        stores = await tx.fetch("SELECT number, id FROM search_stores")
        files = await tx.fetch("SELECT store, id FROM search_files")
        rests = {}
        for table in ("search_files", "search_chunks", "search_words"):
            query = f"SELECT COUNT(*) FROM {table} WHERE store NOT IN (SELECT number FROM search_stores)"
            rests[table] = (await tx.fetch(query))[0][0]
        query = "SELECT COUNT(*) FROM search_chunks WHERE number >> 24 NOT IN (SELECT number FROM search_files)"
        rests["chunks of no file"] = (await tx.fetch(query))[0][0]
        query = "SELECT COUNT(*) FROM search_words WHERE first >> 24 NOT IN (SELECT number FROM search_files)"
        rests["words of no file"] = (await tx.fetch(query))[0][0]
        query = (
            "SELECT COUNT(*) FROM search_files f WHERE chunks <> (SELECT COUNT(*) FROM search_chunks c WHERE"
            " c.store = f.store AND c.number >> 24 = f.number)"
        )
        rests["files without their chunks"] = (await tx.fetch(query))[0][0]
        query = (
            "SELECT COUNT(*) FROM search_stores s WHERE chunks <> (SELECT COUNT(*) FROM search_chunks c WHERE"
            " c.store = s.number)"
        )
        rests["stores that count otherwise"] = (await tx.fetch(query))[0][0]
        return stores, files, rests

    stores, files, rests = await store.read(work)
    verdict.expect(not any(rests.values()), "the index has no orphans", rests)
    found: dict[str, set[str]] = {store_id: set() for _, store_id in stores}
    names = dict(stores)
    for number, file_id in files:
        found[names.get(number, f"number {number}")] = found.get(names.get(number, ""), set()) | {file_id}
    return found
