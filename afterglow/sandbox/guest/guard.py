"""The watch over the sessions: pid 1 of the outer jail, which no session can see or signal.

It ends a session that holds too much memory, the largest one when the machine runs short, and one that burns the
processor while no cell runs in it; and says so to the server. Where sessions have cgroups it is the second line.
No session can put it to sleep for the others: what is dear to measure is measured piece by piece, and what the machine
has left is read at every turn.

Nothing here catches what it does not expect: when this process ends, by a fault as well, the kernel kills everything
in its namespace, and the server starts anew; so it does when this one is silent. All names in /proc are hostile bytes.
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
# To the server: (pid of the init, why, how much in MB or seconds). ALIVE is about nobody: the guard is there.
REPORT = struct.Struct("!IBI")
ALIVE, TOO_MUCH_MEMORY, MACHINE_SHORT, IDLE_CPU = 0, 1, 2, 3

PERIOD_S = 0.2
SHARE = 20  # of one processor, the part that watching should take at most
LONGEST_PAUSE_S = 1.0  # whatever that share is
BEAT_S = 2.0
IDLE_CPU_S = 5.0
SPARED_S = 1.0  # before another session may be ended for the machine's sake: memory does not come back at once
PIECE_S = 0.05  # of a sum of PSS, at one look
DEAREST_S = 2.0  # for a whole one; what it could not read by then is taken for what it seems
AT_ONCE_S = 0.2  # the same, when the machine is short
MB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
TMPFS = (b"mnt/data", b"tmp", b"dev/shm", b"home/sandbox")


class Limits(TypedDict):
    """memory_bytes: what a session may hold, its files included; free_bytes: what the machine keeps free."""

    memory_bytes: int
    free_bytes: int


class Process(NamedTuple):
    """One line of the process table. cpu_s: its own; rss_bytes: also what it shares with others; children_s: CPU time
    of children that have ended and were waited for, and of theirs."""

    pid: int
    parent: int
    cpu_s: float
    started: int
    rss_bytes: int
    children_s: float = 0.0


class Memory(NamedTuple):
    """In bytes. shared: files in a tmpfs and the like, as far as they are mapped."""

    anonymous: int
    shared: int


NOTHING = Memory(0, 0)


class Proportional:
    """A sum in which each page counts once, however many processes share it; read piece by piece.

    held: the sum so far, which only grows. took_s: what reading it has taken.
    """

    def __init__(self, members: list[Process]) -> None:
        self.held = NOTHING
        self.took_s = 0.0
        self._unread = list(members)

    @property
    def complete(self) -> bool:
        return not self._unread

    def go_on(self, seconds: float) -> None:
        """Read for about so long, at least one process."""
        began = time.monotonic()
        while self._unread and time.monotonic() <= began + seconds:
            self._add(proportional(self._unread.pop()))
        self.took_s += time.monotonic() - began

    def guess_the_rest(self) -> None:
        """Take what is not read for what it seems."""
        self._add(Memory(sum(member.rss_bytes for member in self._unread), 0))
        self._unread.clear()

    def _add(self, more: Memory) -> None:
        self.held = Memory(self.held.anonymous + more.anonymous, self.held.shared + more.shared)


class Session:
    """What is remembered of one session between two looks."""

    def __init__(self) -> None:
        self.cpu_s: Spent = {}
        self.idle_cpu_s = 0.0
        self.members: list[Process] = []
        self.rss_bytes = 0
        self.hidden_bytes = 0
        self._measuring: Proportional | None = None
        self._measure_at = 0.0

    def look(self, members: list[Process], busy: bool) -> None:
        """Take note of the processes that it has now."""
        spent: Spent = {(member.pid, member.started): (member.cpu_s, member.children_s) for member in members}
        self.idle_cpu_s = 0.0 if busy else self.idle_cpu_s + _grown(self.cpu_s, spent)
        self.cpu_s = spent
        self.members = members
        self.rss_bytes = sum(member.rss_bytes for member in members)

    def memory_bytes(self, init: int, limit: int, now: float) -> int:
        """What it is known to hold; over the limit only if it truly is. Forks share much, so the sum of RSS is an upper
        bound; the truth (PSS) is dear, and asked for only when that sum is over the limit."""
        files = tmpfs_bytes(init)
        if files + self.hidden_bytes + self.rss_bytes <= limit:
            self._measuring = None
            return files + self.hidden_bytes + self.rss_bytes
        held = self._measure(now)
        return self.hidden_bytes + held.anonymous + max(files, held.shared)

    def _measure(self, now: float) -> Memory:
        """What is read so far of the sum of PSS that is in the making; nothing in the pause between two."""
        if self._measuring is None and now >= self._measure_at:
            self._measuring = Proportional(self.members)
        if (making := self._measuring) is None:
            return NOTHING
        making.go_on(PIECE_S)
        if making.took_s > DEAREST_S:
            making.guess_the_rest()
        if making.complete:
            self._measuring = None
            self._measure_at = now + min(SHARE * making.took_s, LONGEST_PAUSE_S)
        return making.held

    def measure_at_once(self, init: int) -> int:
        """What it holds, as well as can be told in short time."""
        made = Proportional(self.members)
        made.go_on(AT_ONCE_S)
        made.guess_the_rest()
        return tmpfs_bytes(init) + self.hidden_bytes + made.held.anonymous


Spent = dict[tuple[int, int], tuple[float, float]]  # by pid and start: its own CPU time, and that of its children


def _grown(before: Spent, now: Spent) -> float:
    """CPU time spent between two looks, from each process's own and that of the children it has waited for.

    Those come and go between two looks, and are only told of so; but what was seen of a child as it lived is told once
    more then. And they are never told of where a parent does not want to know.
    """
    own = sum(cpu_s - before.get(key, (0.0, 0.0))[0] for key, (cpu_s, _) in now.items())
    children = sum(cpu_s - before.get(key, (0.0, 0.0))[1] for key, (_, cpu_s) in now.items())
    seen = sum(sum(spent) for key, spent in before.items() if key not in now)
    return own + max(children - seen, 0.0)


class Guard:
    """The state of the watch. fork_server: pid of the parent of all inits."""

    def __init__(self, orders: socket.socket, fork_server: int, limits: Limits) -> None:
        self._orders = orders
        self._fork_server = fork_server
        self._memory_bytes = limits["memory_bytes"]
        self._free_bytes = limits["free_bytes"]
        self._socket_bytes = orders.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._busy: set[int] = set()
        self._was_busy: set[int] = set()  # since the last look
        self._sessions: dict[int, Session] = {}
        self._spared_until = 0.0
        self._beat_at = 0.0

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
            session.hidden_bytes = sockets(init) * self._socket_bytes  # full ones; they are in nobody's RSS
            if (held := session.memory_bytes(init, self._memory_bytes, now)) > self._memory_bytes:
                self._end(init, TOO_MUCH_MEMORY, held // MB)
            elif session.idle_cpu_s > IDLE_CPU_S:
                self._end(init, IDLE_CPU, int(session.idle_cpu_s))
        self._busy &= trees.keys()
        self._was_busy.clear()

    def keep_memory_free(self) -> None:
        """End the largest session when the machine runs short."""
        now, free = time.monotonic(), available_bytes()
        if free is None or free >= self._free_bytes or now < self._spared_until or not self._sessions:
            return
        sizes = {
            init: tmpfs_bytes(init) + session.hidden_bytes + session.rss_bytes
            for init, session in self._sessions.items()
        }
        largest = sorted(sizes, key=sizes.__getitem__)[-5:]  # the truth decides among these; it is dear
        truth = {init: self._sessions[init].measure_at_once(init) for init in largest}
        init = max(truth, key=truth.__getitem__)
        self._end(init, MACHINE_SHORT, truth[init] // MB)
        self._spared_until = now + SPARED_S

    def beat(self) -> None:
        """Tell the server now and then that the watch goes on."""
        if (now := time.monotonic()) >= self._beat_at:
            self._beat_at = now + BEAT_S
            self._report(0, ALIVE, 0)

    def _end(self, init: int, why: int, amount: int) -> None:
        self._report(init, why, amount)  # first, so that the server knows why before it sees the end
        with suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)

    def _report(self, init: int, why: int, amount: int) -> None:
        """A server that does not listen, or is gone, changes nothing."""
        with suppress(BlockingIOError, ConnectionError):
            self._orders.send(REPORT.pack(init, why, amount), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def main(orders_fd: int, fork_server: int, limits: Limits) -> None:
    """Watch until the fork server or the server has ended; then the caller must end this process.

    orders_fd: the guard's end of a SEQPACKET pair. fork_server: a child of this process.
    """
    with socket.socket(fileno=orders_fd) as orders:
        watch(Guard(orders, fork_server, limits), orders, fork_server)


def watch(guard: Guard, orders: socket.socket, fork_server: int) -> None:
    """Take turns until the fork server or the server has ended."""
    waiting = select.poll()
    waiting.register(orders, select.POLLIN)
    next_turn = next_look = time.monotonic()
    while True:
        waiting.poll(max(next_turn - time.monotonic(), 0) * 1000)
        if not guard.obey() or fork_server in reap():
            return
        if (now := time.monotonic()) < next_turn:
            continue
        if now >= next_look:
            guard.look()
            took_s = time.monotonic() - now
            next_look = now + took_s + min(SHARE * took_s, LONGEST_PAUSE_S)
        guard.keep_memory_free()
        guard.beat()
        next_turn = time.monotonic() + PERIOD_S


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
    cpu_s, children_s = ((int(fields[at]) + int(fields[at + 1])) / TICKS for at in (11, 13))
    return Process(int(pid), int(fields[1]), cpu_s, int(fields[19]), int(fields[21]) * PAGE, children_s)


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


def proportional(process: Process) -> Memory:
    """What it holds, a page that n processes share being an n-th of a page. Pages of program files are left out."""
    try:
        rollup = read(b"/proc/%d/smaps_rollup" % process.pid)
    except PermissionError:
        return Memory(process.rss_bytes, 0)
    found = {b"Pss_Anon:": 0, b"Pss_Shmem:": 0}
    for line in rollup.splitlines():
        name, _, size = line.partition(b" ")
        if name in found:
            found[name] = int(size.split()[0]) * 1024
    return Memory(found[b"Pss_Anon:"], found[b"Pss_Shmem:"])


def sockets(init: int) -> int:
    """How many there are in a session's network: those in a queue or on their way to another process, too."""
    with suppress(OSError):
        words = read(b"/proc/%d/net/sockstat" % init).split(None, 3)
        if words[:2] == [b"sockets:", b"used"]:
            return int(words[2])
    return 0


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
    return meminfo(b"MemAvailable:")


def meminfo(name: bytes) -> int | None:
    """A line of /proc/meminfo, in bytes."""
    for line in read(b"/proc/meminfo").splitlines():
        if line.startswith(name):
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
