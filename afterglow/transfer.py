"""Import and export of assistants, threads, messages, runs and run steps, as the API's own objects in files.

Every object that is read is brought into the form of ours (`saved.py`) and set down in a scratch database, so that
input of any size can be put in order; then it is written in batches. Import changes nothing that is stored:
what is there already is left alone, so that an import can be repeated and goes on where it was interrupted.

Order within one second is not told by `created_at`: it is the order given, turned round where a thread was given
newest first, as list pages are. An export gives a thread's objects in the one order that they have among themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import msgspec

from afterglow.contracts import Store, Transaction
from afterglow.errors import ConfigError, InvalidRequest, StoreUnavailable
from afterglow.objects import Assistant, Message, Run, RunStep, Thread
from afterglow.rows import assistants as assistant_rows
from afterglow.rows import messages as message_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import steps as step_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.assistants import AssistantRow
from afterglow.rows.files import count_files
from afterglow.rows.lists import ListPage
from afterglow.rows.transfer import find_object, list_places, next_seq
from afterglow.saved import KINDS, LeftOut, Note, asked_of, read_object

BATCH = 500
EXPORT_PAGE = 500
SUFFIXES = (".json", ".jsonl", ".ndjson")
LINE_SUFFIXES = (".jsonl", ".ndjson")
MAX_NESTING = 10  # arrays in arrays: what is deeper is no saved list
NOUNS = {kind.table: kind.noun for kind in KINDS.values()}


# --- files -----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """One value of a file. place: file, line or JSON pointer; paged: it stood in a list page."""

    place: str
    value: Any
    paged: bool


class NotJson(Exception):
    """args: what is wrong, for the report."""


def _files(path: Path) -> list[Path]:
    """The file itself, or all of a folder, `page2` before `page10`."""
    if not path.is_dir():
        return [path]
    inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return sorted((file for file in inside if file.is_file()), key=_natural)


def _natural(path: Path) -> list[str | int]:
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def _read_file(path: Path, fail: Callable[[str, str], None]) -> Iterator[Found]:
    """All values of a file. JSONL is read line by line; other files at once, and as JSONL if that is what they are."""
    if path.suffix.lower() not in LINE_SUFFIXES:
        data = path.read_bytes()
        try:
            yield from _values(_parse(data), str(path), "", False)
            return
        except NotJson as error:
            if not _is_json(data.partition(b"\n")[0]):
                fail(str(path), str(error))
                return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield from _values(_parse(line), f"{path}:{number}", "", False)
                except NotJson as error:
                    fail(f"{path}:{number}", str(error))


def _parse(data: bytes) -> Any:
    """Plain data; lone surrogates pass, so that their place can be told."""
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise NotJson("not UTF-8 text") from None
    except ValueError as error:
        raise NotJson(f"no JSON: {error}") from None
    except RecursionError:
        raise NotJson("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(_parse(data), dict | list)
    except NotJson:
        return False


def _values(plain: Any, file: str, pointer: str, paged: bool) -> Iterator[Found]:
    """The objects in it: of an array, of a saved list page, or it alone."""
    if isinstance(plain, dict) and isinstance(plain.get("data"), list) and plain.get("object") in (None, "list"):
        plain, pointer, paged = plain["data"], f"{pointer}/data", True
    if not isinstance(plain, list) or pointer.count("/") > MAX_NESTING:
        yield Found(f"{file} {pointer}".rstrip(), plain, paged)
        return
    for index, item in enumerate(plain):
        yield from _values(item, file, f"{pointer}/{index}", paged)


# --- the report ------------------------------------------------------------------------------------------------

Outcome = Literal["new", "filled in", "made up", "already here", "given twice", "different", "left out"]


@dataclass
class Tally:
    """What came of the objects of one kind. notes: how often, and where first."""

    read: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    notes: dict[Note, tuple[int, str]] = field(default_factory=dict)

    def note(self, note: Note, place: str) -> None:
        count, first = self.notes.get(note, (0, place))
        self.notes[note] = (count + 1, first)

    def lines(self) -> Iterator[str]:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items())
        yield f"{self.read} read: {outcomes or 'none taken'}"
        taken_once = self.fields["id"]
        names = (name if count == taken_once else f"{name} ({count})" for name, count in self.fields.items() if count)
        if taken := ", ".join(names):
            yield f"  taken: {taken}"
        for note, seen in sorted(self.notes.items()):
            yield f"  {note.verdict}: {note.text} {_times(*seen)}"


def _times(count: int, first: str) -> str:
    return f"({count}, first {first})"


@dataclass
class ImportReport:
    """What an import did, or would do. left_out: sorts of objects that are not imported; conflicts: objects that
    differ from what was there before them; faults: what could not be read, by place."""

    dry_run: bool
    tallies: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in KINDS})
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the store now holds all that was given, as it was given."""
        return not self.conflicts and not self.faults

    def fail(self, place: str, reason: str) -> None:
        self.faults.append(f"{place}: {reason}")

    def leave_out(self, sort: str, place: str) -> None:
        count, first = self.left_out.get(sort, (0, place))
        self.left_out[sort] = (count + 1, first)

    def lines(self) -> Iterator[str]:
        if self.dry_run:
            yield "Dry run: nothing was written."
        for kind, tally in self.tallies.items():
            if tally.read or tally.outcomes:
                first, *others = tally.lines()
                yield f"{KINDS[kind].noun}s: {first}"
                yield from others
        for sort, seen in self.left_out.items():
            yield f"left out: {sort} {_times(*seen)}"
        for conflict in self.conflicts:
            yield f"conflict: {conflict}"
        for fault in self.faults:
            yield f"fault: {fault}"


# --- the scratch database --------------------------------------------------------------------------------------

CREATE_STAGED = """
    CREATE TABLE staged (
        number      INTEGER PRIMARY KEY,    -- the order given
        part        INTEGER NOT NULL,       -- 0: assistants, 1: threads, 2: what hangs on a thread
        thread_id   TEXT NOT NULL,          -- empty in parts 0 and 1
        kind        TEXT NOT NULL,
        id          TEXT NOT NULL,
        run_id      TEXT,
        created_at  INTEGER NOT NULL,
        paged       INTEGER NOT NULL,
        made_up     INTEGER NOT NULL,
        place       TEXT NOT NULL,
        object      TEXT NOT NULL,
        UNIQUE (kind, id)
    )
"""
CREATE_STAGED_LISTS = "CREATE INDEX staged_lists ON staged (part, thread_id, number)"
INSERT_STAGED = (
    "INSERT INTO staged (part, thread_id, kind, id, run_id, created_at, paged, made_up, place, object)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
)
GET_STAGED_BY_ID = "SELECT place, object FROM staged WHERE kind = ? AND id = ?"
LIST_THREADLESS = (
    "SELECT thread_id, MIN(created_at), MIN(place) FROM staged WHERE part = 2 AND thread_id NOT IN"
    " (SELECT id FROM staged WHERE kind = 'thread') GROUP BY thread_id ORDER BY MIN(number)"
)
LIST_LISTS = "SELECT part, thread_id FROM staged GROUP BY part, thread_id ORDER BY part, MIN(number)"
LIST_ENTRIES = "SELECT number, kind, created_at, paged FROM staged WHERE part = ? AND thread_id = ? ORDER BY number"
GET_STAGED = (
    "SELECT kind, id, place, object, made_up, run_id, EXISTS (SELECT 1 FROM staged r WHERE r.kind = 'thread.run'"
    " AND r.id = staged.run_id) FROM staged WHERE number = ?"
)
PARTS = {"assistant": 0, "thread": 1}


class Entry(NamedTuple):
    """One object of a list as it was given."""

    number: int
    kind: str
    created_at: int
    paged: bool


class Staged(NamedTuple):
    """One object that waits to be written. object: JSON; with_run: the run it names waits too."""

    kind: str
    id: str
    place: str
    object: str
    made_up: bool
    run_id: str | None
    with_run: bool


def newest_first(entries: Sequence[Entry]) -> bool:
    """Whether a list was given newest first; in doubt, list pages are, and other files are not."""
    rising, last = 0, dict[str, int]()
    for entry in entries:
        before = last.get(entry.kind, entry.created_at)
        rising += (entry.created_at > before) - (entry.created_at < before)
        last[entry.kind] = entry.created_at
    return rising < 0 or (rising == 0 and any(entry.paged for entry in entries))


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Oldest first. Files that are given newest first hold one kind each: within a second, runs follow messages."""
    if not newest_first(entries):
        return sorted(entries, key=lambda entry: (entry.created_at, entry.number))
    kinds = list(KINDS)
    return sorted(entries, key=lambda entry: (entry.created_at, kinds.index(entry.kind), -entry.number))


class Stage:
    """Everything that was read, in a scratch database that is gone with the process; ids are there once."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute(CREATE_STAGED)
        self._db.execute(CREATE_STAGED_LISTS)

    def close(self) -> None:
        self._db.close()

    def add(self, found: Any, place: str, *, paged: bool = False, made_up: bool = False) -> tuple[str, str] | None:
        """Set down an object. When its id is there already: (place, JSON) of that one, which stays."""
        part = PARTS.get(found.object, 2)
        thread_id = found.thread_id if part == 2 else ""
        run_id = getattr(found, "run_id", None)
        text = msgspec.json.encode(found).decode()
        row = (part, thread_id, found.object, found.id, run_id, found.created_at, paged, made_up, place, text)
        if self._db.execute(INSERT_STAGED, row).rowcount:
            return None
        there: tuple[str, str] = self._db.execute(GET_STAGED_BY_ID, (found.object, found.id)).fetchone()
        return there

    def make_up_threads(self) -> None:
        """Add a thread for messages, runs and steps whose own was not given."""
        for thread_id, created_at, place in self._db.execute(LIST_THREADLESS).fetchall():
            self.add(Thread(id=thread_id, created_at=created_at), place, made_up=True)

    def lists(self) -> Iterator[list[Entry]]:
        """Assistants, threads, then thread by thread what hangs on it; each as given."""
        for part, thread_id in self._db.execute(LIST_LISTS).fetchall():
            yield [Entry(*row) for row in self._db.execute(LIST_ENTRIES, (part, thread_id))]

    def get(self, number: int) -> Staged:
        return Staged(*self._db.execute(GET_STAGED, (number,)).fetchone())


# --- import ----------------------------------------------------------------------------------------------------


async def import_objects(
    store: Store, project: str, paths: Sequence[Path | str], *, dry_run: bool = False
) -> ImportReport:
    """Take over the objects in files and folders; what is wrong or not taken is in the report, never raised.

    Works beside a running server: nothing is locked for longer than one batch. Raises StoreError; what was written
    until then stays, and the import can be repeated.
    """
    report = ImportReport(dry_run)
    with _scratch() as stage:
        for path in paths:
            _stage_path(Path(path), stage, report)
        stage.make_up_threads()
        numbers = (entry.number for entries in stage.lists() for entry in _placed(stage, entries, report))
        while batch := [stage.get(number) for number in islice(numbers, BATCH)]:
            work = partial(_put_batch, project=project, batch=batch, write=not dry_run)
            outcomes = await (store.read(work) if dry_run else store.write(work))
            for staged, (outcome, differing) in zip(batch, outcomes, strict=True):
                _count(report, staged, outcome, differing)
    return report


@contextlib.contextmanager
def _scratch() -> Iterator[Stage]:
    try:
        with contextlib.closing(Stage()) as stage:
            yield stage
    except sqlite3.Error as error:
        raise StoreUnavailable(f"the scratch database: {error}") from None


def _stage_path(path: Path, stage: Stage, report: ImportReport) -> None:
    files = _files(path)
    if not files:
        report.fail(str(path), f"no {', '.join(SUFFIXES)} files in this folder")
    for file in files:
        try:
            for found in _read_file(file, report.fail):
                _stage_found(found, stage, report)
        except OSError as error:
            report.fail(str(file), f"cannot be read: {error.strerror}")


def _stage_found(found: Found, stage: Stage, report: ImportReport) -> None:
    try:
        taken = read_object(found.value)
    except LeftOut as sort:
        report.leave_out(str(sort), found.place)
        return
    except (InvalidRequest, msgspec.ValidationError) as error:
        report.fail(found.place, str(error))
        return
    tally = report.tallies[taken.kind]
    tally.read += 1
    before = stage.add(taken.object, found.place, paged=found.paged)
    if before is None:
        tally.fields.update(taken.fields)
        for note in taken.notes:
            tally.note(note, found.place)
        return
    place, text = before
    if differing := _differing(text, msgspec.json.encode(taken.object).decode()):
        tally.outcomes["different"] += 1
        report.conflicts.append(
            f"{found.place}: {taken.object.id} is also at {place}, with other {differing}; the first counts"
        )
    else:
        tally.outcomes["given twice"] += 1


def _placed(stage: Stage, entries: list[Entry], report: ImportReport) -> list[Entry]:
    first, *others = placed = in_order(entries)
    if others and first.paged and all(entry.created_at == first.created_at for entry in others):
        note = Note("guessed", "the order of those of one second: newest first, as list pages are")
        report.tallies[first.kind].note(note, stage.get(first.number).place)
    return placed


def _count(report: ImportReport, staged: Staged, outcome: Outcome, differing: str) -> None:
    tally = report.tallies[staged.kind]
    if staged.made_up:
        if outcome == "made up":
            tally.outcomes[outcome] += 1
            guess = "a thread that was not given: made, as old as the oldest of what hangs on it"
            tally.note(Note("guessed", guess), f"{staged.id}, {staged.place}")
        return
    tally.outcomes[outcome] += 1
    if outcome == "different":
        report.conflicts.append(f"{staged.place}: {staged.id} is here with other {differing}; what is here was kept")
    elif outcome == "left out":
        report.leave_out(f"{KINDS[staged.kind].noun}s of a run or thread that is not here", staged.place)


def _differing(one: str, other: str) -> str:
    """The keys in which two objects differ; empty when they are the same."""
    if one == other:
        return ""
    first, second = msgspec.json.decode(one), msgspec.json.decode(other)
    return ", ".join(key for key in {**first, **second} if first.get(key) != second.get(key))


async def _put_batch(
    tx: Transaction, *, project: str, batch: Iterable[Staged], write: bool
) -> list[tuple[Outcome, str]]:
    return [await _put(tx, project, staged, write) for staged in batch]


async def _put(tx: Transaction, project: str, staged: Staged, write: bool) -> tuple[Outcome, str]:
    """Write one object unless there is one with its id. Returns what came of it, and the keys that differ if any."""
    there = await find_object(tx, project, KINDS[staged.kind].table, staged.id)
    if there is not None:
        return await _meet(tx, project, staged, *there, write)
    if staged.kind == "thread.run.step" and not staged.with_run:
        assert staged.run_id is not None
        if await find_object(tx, project, "runs", staged.run_id) is None:
            return "left out", ""
    if write and not await _insert(tx, project, staged):
        return "left out", ""
    return "made up" if staged.made_up else "new", ""


async def _meet(tx: Transaction, project: str, staged: Staged, text: str, seq: int, write: bool) -> tuple[Outcome, str]:
    """What to do when the id is there: nothing, unless an earlier import made up the thread that now is given, and
    nobody has written to it since."""
    differing = _differing(text, staged.object)
    if staged.made_up or not differing:
        return "already here", ""
    if staged.kind == "thread" and seq < 0 and _is_bare(text):
        thread = msgspec.json.decode(staged.object, type=Thread)
        if write:
            seq = await next_seq(tx, project, "threads", thread.created_at)
            await thread_rows.replace_made_up_thread(tx, project, thread, seq)
        return "filled in", ""
    return "different", differing


def _is_bare(text: str) -> bool:
    thread = msgspec.json.decode(text, type=Thread)
    return not thread.metadata and not thread.tool_resources


async def _insert(tx: Transaction, project: str, staged: Staged) -> bool:
    """False when the thread is gone: a server beside us has deleted it since."""
    found: Any = msgspec.json.decode(staged.object, type=KINDS[staged.kind].wire)
    match found:
        case Assistant():
            seq = await next_seq(tx, project, "assistants", found.created_at)
            await assistant_rows.put_assistant(tx, project, AssistantRow(found, asked_of(found), False), seq)
            return True
        case Thread():
            if staged.made_up:
                await thread_rows.insert_made_up_thread(tx, project, found)
            else:
                seq = await next_seq(tx, project, "threads", found.created_at)
                await thread_rows.insert_thread(tx, project, found, seq)
            return True
    place = await thread_rows.take_seq(tx, project, found.thread_id)
    if place is None:
        return False
    match found:
        case Message():
            await message_rows.insert_message(tx, project, found, place)
        case Run():
            await run_rows.insert_finished_run(tx, project, found, place)
        case RunStep():
            await step_rows.insert_step(tx, project, found, place, attempt=0)
    return True


# --- export ----------------------------------------------------------------------------------------------------


@dataclass
class ExportReport:
    """What was written, and what was left out because it is still being made, by noun. files: how many the project
    has; they stay where they are."""

    path: Path
    written: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    files: int = 0

    @property
    def ok(self) -> bool:
        return True

    def lines(self) -> Iterator[str]:
        yield f"{self.path}: {', '.join(_counted(self.written)) or 'nothing'}"
        for words in _counted(self.left_out):
            yield f"left out: {words} not finished"
        if self.files:
            yield f"left out: {self.files} {'file' if self.files == 1 else 'files'}: an export holds none"


def _counted(nouns: Counter[str]) -> list[str]:
    return [f"{count} {noun}" if count == 1 else f"{count} {noun}s" for noun, count in nouns.items()]


async def export_objects(store: Store, project: str, path: Path) -> ExportReport:
    """Write a project's objects to a JSONL file, as of one moment; importing it elsewhere gives the same again.

    Assistants first, then each thread with its messages, runs and steps in the order that they have in it. The file
    appears whole or not at all. Raises ConfigError when it cannot be written.
    """
    report = ExportReport(path)
    try:
        with _replacing(path) as file:
            await store.read(partial(_write_all, project=project, file=file, report=report))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
    return report


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A new file, which takes the place of `path` when all went well. Only its owner can read it."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(number, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


async def _write_all(tx: Transaction, project: str, file: IO[str], report: ExportReport) -> None:
    async for page in _pages(partial(assistant_rows.list_assistants, tx, project)):
        for text in page.objects:
            _write(file, report, "assistant", text)
    report.files = await count_files(tx, project)
    async for page in _pages(partial(thread_rows.list_threads, tx, project, {})):
        for thread_id, text in zip(page.ids, page.objects, strict=True):
            _write(file, report, "thread", text)
            await _write_thread(tx, project, thread_id, file, report)


async def _write_thread(tx: Transaction, project: str, thread_id: str, file: IO[str], report: ExportReport) -> None:
    for place in await list_places(tx, project, thread_id):
        found = await find_object(tx, project, place.table, place.id) if place.over else None
        if found is None:
            report.left_out[NOUNS[place.table]] += 1
        else:
            _write(file, report, NOUNS[place.table], found[0])


async def _pages(list_rows: Callable[..., Awaitable[ListPage]]) -> AsyncIterator[ListPage]:
    """All pages of a list, oldest first."""
    after = None
    while True:
        page = await list_rows(limit=EXPORT_PAGE, order="asc", after=after, before=None)
        yield page
        if not page.has_more:
            return
        after = page.ids[-1]


def _write(file: IO[str], report: ExportReport, noun: str, text: str) -> None:
    file.write(text + "\n")
    report.written[noun] += 1
