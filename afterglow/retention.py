"""What has not been used for as long as its project says is deleted for good: threads, files, events.

A project's own times come before those of the server's settings. Workers look through old threads and files, some at a
time; what still is in use is passed over, and looked at again once they have come to the end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

from afterglow.contracts import House, Transaction
from afterglow.files import condemn_unused_file
from afterglow.objects import DAY_S
from afterglow.rows import events as event_rows
from afterglow.rows import retention as retention_rows
from afterglow.rows.projects import get_project_settings
from afterglow.rows.retention import START, Found, Place
from afterglow.telemetry import log
from afterglow.threads import delete_idle_thread

LOOKED_AT = 500  # threads, or files, of a project, read at once
LOOKS = 20  # of these in one round
EVENTS_AT_ONCE = 500

Look = Callable[[Transaction, str, int, Place, int], Awaitable[Found]]
Delete = Callable[[House, str, str, int], Awaitable[bool]]


class Deleted(NamedTuple):
    """How many of each. events: their rows, of some events each."""

    threads: int
    files: int
    events: int


class Retention:
    """A worker's part in it: how far it has come with the threads and the files of each project."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._reached: dict[tuple[str, str], Place] = {}

    async def sweep(self) -> Deleted:
        """Delete what is due, a bounded number of threads and files of each project."""
        now = int(self._house.clock.now())
        threads = files = 0
        for project, retention in await self._house.store.read(retention_rows.list_retentions):
            if days := retention.threads_days:
                before = now - days * DAY_S
                threads += await self._look(project, before, retention_rows.list_old_threads, delete_idle_thread)
            if days := retention.files_days:
                before = now - days * DAY_S
                files += await self._look(project, before, retention_rows.list_old_files, condemn_unused_file)
        deleted = Deleted(threads, files, await self._delete_events(now))
        if any(deleted):
            log.info("Deleted for their age: %d threads, %d files, %d rows of events.", *deleted)
        return deleted

    async def _look(self, project: str, before: int, look: Look, delete: Delete) -> int:
        """Go on where the last round ended."""
        key = (look.__name__, project)
        deleted = 0
        for _ in range(LOOKS):
            after = self._reached.get(key, START)
            found = await self._house.store.read(partial(_call, look, project, before, after))
            for object_id in found.ids:
                deleted += await delete(self._house, project, object_id, before)
            self._reached[key] = found.reached
            if found.reached == START:
                break
        return deleted

    async def _delete_events(self, now: int) -> int:
        """Of runs that are over, project by project."""
        deleted, project = 0, ""
        while (found := await self._house.store.read(partial(_next_project, project))) is not None:
            project, days = found
            before = now - (days * DAY_S if days else self._house.settings.event_retention_h * 3600)
            while count := await self._house.store.write(partial(_delete_events, project, before), rowwise=True):
                deleted += count
        return deleted


async def _call(look: Look, project: str, before: int, after: Place, tx: Transaction) -> Found:
    return await look(tx, project, before, after, LOOKED_AT)


async def _next_project(after: str, tx: Transaction) -> tuple[str, int | None] | None:
    """The next project that has events, and for how many days it keeps them, if it says so."""
    project = await event_rows.next_project(tx, after)
    return None if project is None else (project, (await get_project_settings(tx, project)).retention.events_days)


async def _delete_events(project: str, before: int, tx: Transaction) -> int:
    return await event_rows.delete_events_before(tx, project, before, EVENTS_AT_ONCE)
