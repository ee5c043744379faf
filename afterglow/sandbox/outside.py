"""What the kernel says of two sessions when it is asked from outside, where no session can lie.

Part of the self-probe at start, beside the attacks from within (`attacks.py`): a step of the wall that was left out
need not open a hole that an attack happens to find.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from afterglow.sandbox.guest import guard

PROC = Path("/proc")
MB = 1 << 20
BORN_WITH_BYTES = 1 << 30  # more than a session has of its own when it is forked
ADDRESSES_BYTES = 6 << 30  # to be reserved, beside memory
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
NONE = {"0" * 16}


class Bounds(NamedTuple):
    """What a session may have: memory and disk in bytes, processes."""

    memory: int
    disk: int
    processes: int

    def limits(self) -> dict[str, int]:
        """By their names in /proc, the most that a limit may be."""
        return {
            "Max core file size": 1,
            "Max address space": self.memory + BORN_WITH_BYTES + ADDRESSES_BYTES,
            "Max data size": self.memory + BORN_WITH_BYTES,
            "Max file size": self.disk,
            "Max processes": self.processes,
            "Max open files": 128,
            "Max locked memory": 0,
            "Max pending signals": 256,
            "Max msgqueue size": 0,
            "Max nice priority": 0,
            "Max realtime priority": 0,
        }


def faults(init: int, other: int, bounds: Bounds, proc: Path = PROC) -> list[str]:
    """What is wrong with a session, in words. init: the pid of its first process, which has one child, the worker;
    other: that of another session's. Raises OSError, ValueError or KeyError where the kernel does not tell."""
    worker = worker_of(init)
    found = [
        *(fault for pid in (init, worker) for fault in _of_process(pid, bounds, proc)),
        *_of_filters(init, worker, proc),
        *_of_users(init, other, proc),
    ]
    return list(dict.fromkeys(found))


def worker_of(init: int) -> int:
    """Raises ValueError if it has not just one child."""
    [worker] = [process.pid for process in guard.processes() if process.parent == init]
    return worker


def _of_process(pid: int, bounds: Bounds, proc: Path) -> Iterator[str]:
    status = _status(pid, proc)
    if {status[name] for name in CAPABILITIES} != NONE:
        yield "it has capabilities"
    if status["NoNewPrivs"] != "1":
        yield "it could come by new privileges"
    found = _limits(pid, proc)
    for name, most in bounds.limits().items():
        if not all(limit.isdigit() and int(limit) <= most for limit in found[name]):
            yield f"its limit `{name}` is {found[name][1]}, and not {most}"
    can_be_1 = resource.getrlimit(resource.RLIMIT_CORE)[1] != 0
    if can_be_1 and found["Max core file size"] != ["1", "1"]:
        yield "a crash in it may start the machine's core handler"


def _of_filters(init: int, worker: int, proc: Path) -> Iterator[str]:
    """Each process adds one to those that it was born with; the server itself may have some."""
    counts = [int(_status(pid, proc)["Seccomp_filters"]) for pid in ("self", init, worker)]
    if not counts[0] < counts[1] < counts[2]:
        yield "a filter of system calls is missing"


def _of_users(init: int, other: int, proc: Path) -> Iterator[str]:
    """Where the jail has more than one user, each session is one of its own, and none is the fork server's."""
    status = _status(init, proc)
    fork_server = int(status["PPid"])
    users = [_status(pid, proc)["Uid"] for pid in (init, other, fork_server)]
    mapped = (proc / str(fork_server) / "uid_map").read_text().split()
    if int(mapped[2]) > 1 and len(set(users)) != len(users):
        yield "sessions are one user"


def _status(pid: int | str, proc: Path) -> dict[str, str]:
    lines = (proc / str(pid) / "status").read_text(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _limits(pid: int, proc: Path) -> dict[str, list[str]]:
    """Soft and hard."""
    lines = (proc / str(pid) / "limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[:2] for line in lines}
