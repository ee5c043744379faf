"""The watch over the sessions: pid 1 of the outer jail, which no session can see or signal.

It ends a session that holds too much memory, the largest one when the machine runs short, and one that burns the
processor while no cell runs in it; and says so to the server. Where sessions have cgroups it is the second line.

Nothing here catches what it does not expect: when this process ends, by a fault as well, the kernel kills everything
in its namespace, and the server starts anew. All names in /proc are hostile bytes.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple, TypedDict

# From the server: the pid of a session's init, and whether a cell runs in it now.
ORDER = struct.Struct("!I?")
# To the server: (pid of the init, why, how much in MB or seconds).
REPORT = struct.Struct("!IBI")
TOO_MUCH_MEMORY, MACHINE_SHORT, IDLE_CPU = 1, 2, 3

PERIOD_S = 0.2
SHARE = 20  # of one processor, the part that watching may take at most
IDLE_CPU_S = 5.0
AGAIN_S = 1.0  # after this time a sum of PSS is made anew, and another session may be ended for the machine's sake
MB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
TMPFS = (b"mnt/data", b"tmp", b"dev/shm", b"home/sandbox")


class Limits(TypedDict):
    """memory_bytes: what a session may hold, its files included; free_bytes: what the machine keeps free."""

    memory_bytes: int
    free_bytes: int


class Process(NamedTuple):
    """One line of the process table. cpu_s: its own; rss_bytes: also what it shares with others."""

    pid: int
    parent: int
    cpu_s: float
    started: int
    rss_bytes: int


class Memory(NamedTuple):
    """In bytes. shared: files in a tmpfs and the like, as far as they are mapped."""

    anonymous: int
    shared: int


class Session:
    """What is remembered of one session between two looks."""

    def __init__(self) -> None:
        self.cpu_s: dict[tuple[int, int], float] = {}
        self.idle_cpu_s = 0.0
        self.members: list[Process] = []
        self.rss_bytes = 0
        self.pss = Memory(0, 0)
        self.pss_for_rss = -1
        self.pss_at = 0.0

    def look(self, members: list[Process], busy: bool) -> None:
        """Take note of the processes that it has now. CPU time is added up as it is seen to grow: what a parent has
        waited for may never be told, if it does not wait."""
        spent = {(member.pid, member.started): member.cpu_s for member in members}
        grown = sum(cpu_s - self.cpu_s.get(key, 0.0) for key, cpu_s in spent.items())
        self.idle_cpu_s = 0.0 if busy else self.idle_cpu_s + grown
        self.cpu_s = spent
        self.members = members
        self.rss_bytes = sum(member.rss_bytes for member in members)

    def memory_bytes(self, init: int, limit: int, now: float) -> int:
        """What it holds. Forks share much, so the sum of RSS is only an upper bound; the truth (PSS) is dear, and asked
        for only when that sum is over the limit, and not again while little has changed."""
        files, held = tmpfs_bytes(init), self.rss_bytes
        if files + held <= limit:
            return files + held
        if abs(held - self.pss_for_rss) > limit // 20 or now - self.pss_at > AGAIN_S:
            self.pss = proportional(self.members)
            self.pss_for_rss, self.pss_at = held, now
        return self.pss.anonymous + max(files, self.pss.shared)


class Guard:
    """The state of the watch. fork_server: pid of the parent of all inits."""

    def __init__(self, orders: socket.socket, fork_server: int, limits: Limits) -> None:
        self._orders = orders
        self._fork_server = fork_server
        self._memory_bytes = limits["memory_bytes"]
        self._free_bytes = limits["free_bytes"]
        self._busy: set[int] = set()
        self._was_busy: set[int] = set()  # since the last look
        self._sessions: dict[int, Session] = {}
        self._spared_until = 0.0

    def obey(self) -> bool:
        """Take the server's orders; False when it is gone."""
        while True:
            try:
                message = self._orders.recv(ORDER.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            if len(message) != ORDER.size:
                return False
            init, busy = ORDER.unpack(message)
            self._was_busy.add(init)
            if busy:
                self._busy.add(init)
            else:
                self._busy.discard(init)

    def look(self) -> None:
        """Look at every session once, and end those that break a limit."""
        now = time.monotonic()
        trees = session_trees(processes(), self._fork_server)
        self._sessions = {init: self._sessions.get(init) or Session() for init in trees}
        for init, members in trees.items():
            session = self._sessions[init]
            session.look(members, init in self._busy or init in self._was_busy)
            if (held := session.memory_bytes(init, self._memory_bytes, now)) > self._memory_bytes:
                self._end(init, TOO_MUCH_MEMORY, held // MB)
            elif session.idle_cpu_s > IDLE_CPU_S:
                self._end(init, IDLE_CPU, int(session.idle_cpu_s))
        self._busy &= trees.keys()
        self._was_busy.clear()
        self._keep_memory_free(now)

    def _keep_memory_free(self, now: float) -> None:
        free = available_bytes()
        if free is None or free >= self._free_bytes or now < self._spared_until or not self._sessions:
            return
        sizes = {init: tmpfs_bytes(init) + session.rss_bytes for init, session in self._sessions.items()}
        largest = sorted(sizes, key=sizes.__getitem__)[-5:]  # the truth decides among these; it is dear
        truth = {init: tmpfs_bytes(init) + proportional(self._sessions[init].members).anonymous for init in largest}
        init = max(truth, key=truth.__getitem__)
        self._end(init, MACHINE_SHORT, truth[init] // MB)
        self._spared_until = now + AGAIN_S  # memory does not come back at once

    def _end(self, init: int, why: int, amount: int) -> None:
        # First the report, so that the server knows why before it sees the end. One that does not listen, or is gone,
        # changes nothing.
        with suppress(BlockingIOError, ConnectionError):
            self._orders.send(REPORT.pack(init, why, amount), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        with suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)


def main(orders_fd: int, fork_server: int, limits: Limits) -> None:
    """Watch until the fork server or the server has ended; then the caller must end this process.

    orders_fd: the guard's end of a SEQPACKET pair. fork_server: a child of this process.
    """
    orders = socket.socket(fileno=orders_fd)
    guard = Guard(orders, fork_server, limits)
    waiting = select.poll()
    waiting.register(orders, select.POLLIN)
    next_look = time.monotonic()
    while True:
        waiting.poll(max(next_look - time.monotonic(), 0) * 1000)
        if not guard.obey() or fork_server in reap():
            return
        if (began := time.monotonic()) >= next_look:
            guard.look()
            ended = time.monotonic()
            next_look = ended + max(PERIOD_S, SHARE * (ended - began))


def reap() -> list[int]:
    """The pids of all children that have ended since the last call: pid 1 inherits orphans."""
    ended = []
    with suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            ended.append(pid)
    return ended


def processes() -> list[Process]:
    """Everything that runs in this pid namespace."""
    found = []
    for name in os.listdir(b"/proc"):
        if name.isdigit() and (process := parse(read(b"/proc/%s/stat" % name))):
            found.append(process)
    return found


def parse(stat: bytes) -> Process | None:
    """A line of /proc/PID/stat. The name may hold anything, a `)` too, but what follows it cannot."""
    pid, _, _ = stat.partition(b" ")
    fields = stat[stat.rfind(b")") + 1 :].split()
    if not pid.isdigit() or len(fields) < 22:
        return None
    cpu_s = (int(fields[11]) + int(fields[12])) / TICKS
    return Process(int(pid), int(fields[1]), cpu_s, int(fields[19]), int(fields[21]) * PAGE)


def session_trees(everything: list[Process], fork_server: int) -> dict[int, list[Process]]:
    """The processes of each session, by its init: the fork server's children, and all that descends from them.

    An orphan in a session becomes a child of its init, so that nothing falls out of its tree.
    """
    children = defaultdict(list)
    for process in everything:
        children[process.parent].append(process)
    trees = {}
    for init in children[fork_server]:
        members = [init]
        for member in members:  # grows as it is walked
            members.extend(children[member.pid])
        trees[init.pid] = members
    return trees


def proportional(members: list[Process]) -> Memory:
    """Memory in which each page counts once, however many processes share it. Pages of program files are left out."""
    anonymous = shared = 0
    for member in members:
        try:
            rollup = read(b"/proc/%d/smaps_rollup" % member.pid)
        except PermissionError:
            anonymous += member.rss_bytes
            continue
        for line in rollup.splitlines():
            if line.startswith(b"Pss_Anon:"):
                anonymous += int(line.split()[1]) * 1024
            elif line.startswith(b"Pss_Shmem:"):
                shared += int(line.split()[1]) * 1024
    return Memory(anonymous, shared)


def tmpfs_bytes(init: int) -> int:
    """What a session's files take; they are memory. The paths are mounts that the session cannot change."""
    total = 0
    for path in TMPFS:
        with suppress(OSError):
            found = os.statvfs(os.path.join(b"/proc", b"%d" % init, b"root", path))
            total += (found.f_blocks - found.f_bfree) * found.f_frsize
    return total


def available_bytes() -> int | None:
    """What the machine has left, or None where it does not say."""
    for line in read(b"/proc/meminfo").splitlines():
        if line.startswith(b"MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def read(path: bytes) -> bytes:
    """A file of /proc; nothing when its process has just ended."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return b""
    try:
        return os.read(fd, 65536)
    except ProcessLookupError:
        return b""
    finally:
        os.close(fd)
