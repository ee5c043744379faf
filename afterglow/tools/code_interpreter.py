"""The code interpreter: one session per thread, with the thread's files in it and what it writes kept.

A session lives in this process, and ends by age, by idleness, or with its thread. It ends as well when another process
has opened one for the same thread since: its variables and files are out of date. Its files survive it: they are API
files, noted with their names below /mnt/data (`rows/files.py`), and are put back when a new session is opened. What a
session says of files is checked by the engine; what it may store is bounded here.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from afterglow.contracts import CellEnd, CodeSession, House, Logs, Picture, SandboxFile, Transaction
from afterglow.errors import LostLease, SandboxBusy, SandboxFull, SessionLost, StoreError
from afterglow.files import read_file, store_output
from afterglow.objects import File
from afterglow.quotas import check_sandbox, note_sandbox, storage_left
from afterglow.rows import files as file_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.assistants import get_assistant
from afterglow.rows.files import PlacedFile
from afterglow.rows.runs import RunRow, touch_held_run

MAX_OUTPUT_FILES = 100  # of one call; more are named and not kept
MAX_LISTED_FILES = 50
KEPT_SESSIONS = 4  # as many times the disk of a session can be kept of what one thread's code writes
ROOM_SHARE = 0.9  # of a session's disk that input files may fill
NAME_BYTES = 200
SUFFIX_BYTES = 50
RESTARTED = "[A new sandbox session: variables and imports of earlier calls are gone, files are back.]\n"

ThreadKey = tuple[str, str]  # (project, thread id)


@dataclass(slots=True)
class _Open:
    """A thread's session. busy: a call is at work in it. known: size and mtime of each file when it was last looked
    at."""

    session: CodeSession
    opened_at: float
    used_at: float
    busy: bool = True
    known: dict[str, tuple[int, int]] = field(default_factory=dict)


class SandboxListing(NamedTuple):
    """The files of a thread's session. placed: those that fit; too_large: those that do not."""

    placed: list[PlacedFile]
    too_large: list[PlacedFile]

    def paragraph(self) -> str:
        """What the model is told of them; empty when there are none."""
        lines = [f"- /mnt/data/{file.name} ({readable_size(file.size_bytes)})" for file in self.placed]
        lines += [
            f"- /mnt/data/{file.name} ({readable_size(file.size_bytes)}, too large to be put there)"
            for file in self.too_large
        ]
        more = [f"- and {len(lines) - MAX_LISTED_FILES} more"] if len(lines) > MAX_LISTED_FILES else []
        return "\n".join(["Files for the python tool:", *lines[:MAX_LISTED_FILES], *more]) if lines else ""


class CodeInterpreter:
    """All sessions of this process."""

    def __init__(self, house: House, worker: str) -> None:
        """worker: the id of whoever runs code here."""
        self._house = house
        self._worker = worker
        self._open: dict[ThreadKey, _Open] = {}
        self._kept_bytes: dict[ThreadKey, int] = {}  # of each thread, until its session ends by age or idleness

    async def place_files(self, row: RunRow) -> SandboxListing:
        """Give every file that the run's assistant, thread and request name a name below /mnt/data, for good."""

        async def work(tx: Transaction) -> tuple[list[PlacedFile], str | None]:
            await _check_held(tx, row)
            placed = await _place_files(tx, row, int(self._house.clock.now()))
            return placed, await file_rows.get_session_worker(tx, *key)

        key = row.project, row.run.thread_id
        placed, worker = await self._house.store.write(work)
        if worker != self._worker:
            await self._end(key)
        return _fitting(self._house, placed)

    # --- running -----------------------------------------------------------------------------------------------

    async def run(
        self, row: RunRow, files: list[PlacedFile], code: str, *, seen: bool
    ) -> AsyncGenerator[str | File, None]:
        """Run a cell in the session of the run's thread; yield its text as it comes, and its pictures as stored files.

        files: to be put there first. seen: whether the model has seen earlier calls, and so must hear of a new
        session. Raises SandboxError when no session can be had; whatever happens in one is told in the text. Closing
        the generator stops the code within a second.
        """
        await check_sandbox(self._house, row)
        key = row.project, row.run.thread_id
        opened = self._open.get(key)
        fresh = opened is None or not opened.session.alive
        if opened is None or fresh:
            opened = await self._open_session(row)
        opened.busy = True
        began = self._house.clock.now()
        try:
            if fresh and seen:
                yield RESTARTED
            async with aclosing(self._run(row, opened, files, code)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            opened.busy = False
            opened.used_at = self._house.clock.now()
            await note_sandbox(self._house, row, opened.used_at - began)

    async def _run(
        self, row: RunRow, opened: _Open, files: list[PlacedFile], code: str
    ) -> AsyncGenerator[str | File, None]:
        try:
            for note in await self._bring(row.project, opened, files):
                yield note
            pictures = 0
            async with aclosing(opened.session.run(code, self._house.settings.cell_timeout_s)) as outputs:
                async for output in outputs:
                    if isinstance(output, Logs):
                        yield output.text.replace("\0", "\ufffd")
                    elif isinstance(output, Picture):
                        pictures += 1
                        yield await self._keep_picture(row, output, pictures)
                    elif told := _end_note(output):
                        yield told
            if opened.session.alive:
                for note in await self._collect(row, opened):
                    yield note
        except SessionLost as lost:
            yield f"\n[{_over(str(lost))}]\n"

    async def _open_session(self, row: RunRow) -> _Open:
        key = row.project, row.run.thread_id

        async def work(tx: Transaction) -> None:
            await _check_held(tx, row)
            await file_rows.set_session_worker(tx, *key, self._worker)

        await self._end(key)
        await self._house.store.write(work)
        try:
            session = await self._house.code_engine.open()
        except SandboxBusy:
            idle = [other for other, opened in self._open.items() if not opened.busy]
            if not idle:
                raise
            await self._end(min(idle, key=lambda other: self._open[other].used_at))
            session = await self._house.code_engine.open()
        now = self._house.clock.now()
        self._open[key] = opened = _Open(session, now, now)
        self._house.metrics.code_sessions.inc()
        return opened

    async def _bring(self, project: str, opened: _Open, files: list[PlacedFile]) -> list[str]:
        """Put what is not there yet into the session; return what must be said of it."""
        notes = []
        missing = [file for file in files if file.name not in opened.known]
        for file in missing:
            try:
                async with aclosing(read_file(self._house, project, file.file_id)) as chunks:
                    await opened.session.put(file.name, file.size_bytes, chunks)
            except SandboxFull:
                size = readable_size(file.size_bytes)
                notes.append(f"[{file.name} ({size}) could not be put into /mnt/data: there is no room for it.]\n")
            except ValueError:  # a name that an earlier version let through
                notes.append(f"[{file.file_id} could not be put into /mnt/data: its name cannot be used there.]\n")
            except StoreError:
                notes.append(f"[{file.name} could not be put into /mnt/data: it cannot be read.]\n")
        if missing:
            _look(opened, await opened.session.list_files())
        return notes

    async def _keep_picture(self, row: RunRow, picture: Picture, number: int) -> File:
        suffix = picture.mime.removeprefix("image/").replace("jpeg", "jpg")

        async def note(tx: Transaction, _: File) -> None:
            await _check_held(tx, row)

        return await store_output(self._house, row.project, f"image-{number}.{suffix}", _once(picture.data), note)

    # --- what a cell has written -------------------------------------------------------------------------------

    async def _collect(self, row: RunRow, opened: _Open) -> list[str]:
        """Store new and changed files; return what must be said of those that are not kept."""
        listed = await opened.session.list_files()
        changed = [file for file in listed if opened.known.get(file.name) != (file.size_bytes, file.mtime_ns)]
        await self._forget_removed(row, opened, listed)
        disk, key = self._house.settings.sandbox_disk_mb * 2**20, (row.project, row.run.thread_id)
        room = min(disk, KEPT_SESSIONS * disk - self._kept_bytes.get(key, 0))
        limit = self._house.settings.max_file_mb * 2**20
        if changed and (left := await storage_left(self._house, row)) is not None:
            room = min(room, left)
        dropped = []
        for number, file in enumerate(changed):
            opened.known[file.name] = (file.size_bytes, file.mtime_ns)
            if number >= MAX_OUTPUT_FILES or file.size_bytes > min(limit, room):
                dropped.append(f"{file.name} ({readable_size(file.size_bytes)})")
                continue
            room -= file.size_bytes
            self._kept_bytes[key] = self._kept_bytes.get(key, 0) + file.size_bytes
            await self._store(row, opened.session, file)
        return [_dropped_note(dropped)] if dropped else []

    async def _store(self, row: RunRow, session: CodeSession, file: SandboxFile) -> None:
        async def note(tx: Transaction, stored: File) -> None:
            await _check_held(tx, row)
            placed = PlacedFile(file.name, stored.id, stored.bytes, None)
            await file_rows.put_sandbox_file(tx, row.project, row.run.thread_id, placed, stored.created_at)

        # A thread of the session's may have removed it since.
        with contextlib.suppress(FileNotFoundError):
            async with aclosing(session.get(file.name, file.size_bytes)) as chunks:
                await store_output(self._house, row.project, PurePosixPath(file.name).name, chunks, note)

    async def _forget_removed(self, row: RunRow, opened: _Open, listed: list[SandboxFile]) -> None:
        """What the code itself has made and removed is not put back into a later session."""
        gone = opened.known.keys() - {file.name for file in listed}
        for name in gone:
            del opened.known[name]
        if gone:

            async def work(tx: Transaction) -> None:
                await _check_held(tx, row)
                await file_rows.forget_outputs(tx, row.project, row.run.thread_id, list(gone))

            await self._house.store.write(work)

    # --- ending ------------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """End the sessions that are idle or old enough, dead, or whose thread is gone."""
        if not self._open:
            return
        seen = dict(self._open)  # others open and end sessions meanwhile

        async def living(tx: Transaction) -> set[ThreadKey]:
            return {key for key in seen if await thread_rows.get_thread_object(tx, *key) is not None}

        there = await self._house.store.read(living)
        for key, opened in seen.items():
            if self._open.get(key) is not opened:
                continue
            over = key not in there or (not opened.busy and self._is_old(opened))
            if over:
                self._kept_bytes.pop(key, None)
            if over or not (opened.busy or opened.session.alive):
                await self._end(key)

    def _is_old(self, opened: _Open) -> bool:
        settings, now = self._house.settings, self._house.clock.now()
        return now - opened.opened_at > settings.sandbox_ttl_s or now - opened.used_at > settings.sandbox_idle_s

    async def _end(self, key: ThreadKey) -> None:
        if opened := self._open.pop(key, None):
            self._house.metrics.code_sessions.dec()
            await opened.session.close()

    async def close(self) -> None:
        for key in list(self._open):
            await self._end(key)


# --- names and words -------------------------------------------------------------------------------------------


async def _check_held(tx: Transaction, row: RunRow) -> None:
    """Code that goes on after its worker was taken for dead leaves nothing behind. Raises LostLease."""
    if not await touch_held_run(tx, row.project, row.run.id, row.attempt):
        raise LostLease(row.run.id)


def _fitting(house: House, files: list[PlacedFile]) -> SandboxListing:
    """Which files go into the session: in order, as long as there is room."""
    room = house.settings.sandbox_disk_mb * 2**20 * ROOM_SHARE
    listing = SandboxListing([], [])
    for file in files:
        fits = file.size_bytes <= room
        (listing.placed if fits else listing.too_large).append(file)
        room -= file.size_bytes if fits else 0
    return listing


async def list_files_of(tx: Transaction, house: House, row: RunRow) -> SandboxListing:
    """What `place_files` would give, for a run that nobody holds; for a transaction that is rolled back."""
    return _fitting(house, await _place_files(tx, row, int(house.clock.now())))


async def _place_files(tx: Transaction, row: RunRow, now: int) -> list[PlacedFile]:
    """The files of the run's session, those given first; rows are made for the new, and dropped for those that are
    given no longer."""
    project, thread_id = row.project, row.run.thread_id
    wanted = await _given_files(tx, row)
    rows = await file_rows.list_sandbox_files(tx, project, thread_id)
    dropped = [file.name for file in rows if file.input_id and file.input_id not in wanted]
    await file_rows.delete_sandbox_files(tx, project, thread_id, dropped)
    kept = [file for file in rows if file.name not in dropped]
    taken, placed = {file.name for file in kept}, {file.input_id for file in kept}
    for file_id, file in (await file_rows.hold_files(tx, project, wanted, now)).items():
        if file_id not in placed:
            name = free_name(clean_name(file.filename) or file_id, taken)
            taken.add(name)
            kept.append(PlacedFile(name, file_id, file.bytes, file_id))
            await file_rows.put_sandbox_file(tx, project, thread_id, kept[-1], now)
    return sorted(kept, key=lambda file: file.input_id is None)


async def _given_files(tx: Transaction, row: RunRow) -> list[str]:
    """Ids of the files that the run may use: the assistant's, the thread's, and those of the request."""
    assistant = await get_assistant(tx, row.project, row.run.assistant_id)
    thread = await thread_rows.get_thread(tx, row.project, row.run.thread_id)
    resources = [
        assistant.assistant.tool_resources if assistant else {},
        thread.tool_resources if thread else {},
        row.run.tool_resources,
    ]
    ids = [file_id for given in resources for file_id in (given.get("code_interpreter") or {}).get("file_ids", [])]
    return list(dict.fromkeys(ids))


def clean_name(filename: str) -> str:
    """A caller's file name as a name below /mnt/data: one component, printable, of bounded length."""
    name = "".join("_" if char in "/\\" or _unprintable(char) else char for char in filename).strip()
    if not name.strip(". "):
        return ""
    suffix = PurePosixPath(name).suffix
    suffix = suffix if len(suffix.encode()) <= SUFFIX_BYTES else ""
    stem = name.removesuffix(suffix).encode()[: NAME_BYTES - len(suffix.encode())]
    return stem.decode("utf-8", "ignore") + suffix


def _unprintable(char: str) -> bool:
    """Control and format characters, halves of pairs, and what ends lines or paragraphs."""
    category = unicodedata.category(char)
    return category[0] == "C" or category in ("Zl", "Zp")


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or with a number before its suffix when that is taken: `sales-2.csv`."""
    path, number, free = PurePosixPath(name), 1, name
    while free in taken:
        number += 1
        free = f"{path.stem}-{number}{path.suffix}"
    return free


def readable_size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _over(why: str) -> str:
    return f"The sandbox session is over: {why.rstrip('.')}. Its variables are gone."


def _end_note(end: CellEnd) -> str:
    """What the model is told of how a cell ended."""
    notes = []
    if end.clipped_bytes:
        notes.append(f"[{readable_size(end.clipped_bytes)} of output left out: print less.]")
    if end.status == "timeout":
        notes.append(f"[Interrupted: {end.why.rstrip('.')}. Variables are kept.]")
    if end.status == "lost":
        notes.append(f"[{_over(end.why)}]")
    return "".join(f"\n{note}" for note in notes) + "\n" if notes else ""


def _dropped_note(names: list[str]) -> str:
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"\n[Not kept, because it is too much: {shown}.]\n"


def _look(opened: _Open, listed: Iterable[SandboxFile]) -> None:
    opened.known = {file.name: (file.size_bytes, file.mtime_ns) for file in listed}


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
