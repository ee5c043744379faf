"""What this machine's process table says of us."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One living process. started: tells it from a later one with its pid."""

    pid: int
    started: int


def _table() -> dict[int, list[Process]]:
    """All processes, by their parent; those that have ended and wait to be reaped are left out."""
    children = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                state, parent, *rest = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                if state != b"Z":
                    children[int(parent)].append(Process(int(folder.name), int(rest[17])))
    return children


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def children(pid: int) -> list[int]:
    return [process.pid for process in _table()[pid]]


def descendants(pid: int) -> set[Process]:
    """Without the database server that other tests of the same process may have started."""
    table, found, waiting = _table(), set(), [pid]
    while waiting:
        below = [process for process in table[waiting.pop()] if _name(process.pid) != "postgres"]
        found.update(below)
        waiting += [process.pid for process in below]
    return found


def living(processes: set[Process]) -> set[Process]:
    return processes & {process for family in _table().values() for process in family}


def fork_server_of(launcher: int) -> int:
    """launcher → guard → fork server."""
    [guard] = children(launcher)
    [fork_server] = children(guard)
    return fork_server


class Census(NamedTuple):
    """How much there is of what could be left over."""

    processes: int
    descriptors: int
    mounts: int
    cgroups: int


def census() -> Census:
    me = os.getpid()
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
    return Census(len(descendants(me)), len(os.listdir("/proc/self/fd")), mounts, len(cgroups_of(me)))


def cgroups_of(pid: int) -> list[str]:
    """The cgroups that a server has made."""
    return [folder for folder, _, _ in os.walk("/sys/fs/cgroup") if f"/afterglow-{pid}-" in folder]


async def until(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.02)
    return True
