"""The watch over sessions: what it counts, whom it ends, and that no name can put it out."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.sandbox.guest import guard
from afterglow.sandbox.guest.guard import Guard, Memory, Process, Proportional, Session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MB = 1 << 20
# A stand-in for the fork server: its children are "sessions", each told by a line of Python.
PARENT = """
import ctypes, mmap, os, sys, time
for line in sys.argv[1:]:
    if os.fork() == 0:
        exec(line)
        print("up", flush=True)
        while True:
            time.sleep(60)
time.sleep(600)
"""
NAMED = "ctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)"


def process(pid: int, parent: int, cpu_s: float = 0.0, rss_mb: int = 1, children_s: float = 0.0) -> Process:
    return Process(pid, parent, cpu_s, started=7, rss_bytes=rss_mb * MB, children_s=children_s)


@pytest.fixture
def parent() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process whose children do what the given lines say, and wait until all have done it."""
    started = []

    def start(*lines: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", PARENT, *lines], stdout=subprocess.PIPE, start_new_session=True)
        started.append(child)
        assert child.stdout is not None
        for _line in lines:
            child.stdout.readline()
        return child

    yield start
    for child in started:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


Watch = Callable[..., tuple[Guard, socket.socket]]


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Make a guard over the children of a process, and the server's end of its socket."""
    monkeypatch.setattr(guard, "tmpfs_bytes", lambda init: 0)  # these "sessions" see the machine's own folders,
    monkeypatch.setattr(guard, "sockets", lambda init: 0)  # and are in its own network
    with ExitStack() as closing:

        def make(fork_server: int, memory_mb: int = 1 << 20, free_mb: int = 0) -> tuple[Guard, socket.socket]:
            ours, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            closing.enter_context(ours)
            closing.enter_context(orders)
            return Guard(orders, fork_server, {"memory_bytes": memory_mb * MB, "free_bytes": free_mb * MB}), ours

        yield make


def reports(ours: socket.socket) -> list[tuple[int, int]]:
    found = []
    while select.select([ours], [], [], 0)[0]:
        pid, why, _amount = guard.REPORT.unpack(ours.recv(guard.REPORT.size))
        found.append((pid, why))
    return [report for report in found if report != (0, guard.ALIVE)]


def children(pid: int) -> list[int]:
    return [found.pid for found in guard.processes() if found.parent == pid]


@given(name=st.binary(max_size=15))
def test_no_name_hides_a_process(name: bytes) -> None:
    """A process is read rightly whatever bytes it has given itself as its name."""
    fields = [b"S", b"42", *[b"0"] * 9, b"150", b"50", b"20", b"10", *[b"0"] * 4, b"777", b"0", b"300", b"0"]
    line = b"7 (" + name + b") " + b" ".join(fields) + b"\n"
    found = guard.parse(line)
    assert found == Process(7, 42, 200 / guard.TICKS, 777, 300 * guard.PAGE, 30 / guard.TICKS)


@given(line=st.binary(max_size=200))
def test_a_line_that_is_none_is_passed_over(line: bytes) -> None:
    """What is no line of the process table is nothing, and no fault, unless it has the form of one."""
    if b")" not in line:
        assert guard.parse(line) is None


def test_everything_below_an_init_is_its_session() -> None:
    """The fork server's children are sessions, with all that descends from each; nobody else belongs to one."""
    everything = [process(1, 0), process(2, 1), process(10, 2), process(11, 10), process(12, 11), process(20, 2)]
    trees = guard.session_trees([*everything, process(99, 1)], fork_server=2)
    assert {init: [member.pid for member in members] for init, members in trees.items()} == {10: [10, 11, 12], 20: [20]}


def test_idle_work_adds_up_although_its_processes_come_and_go() -> None:
    """Processor time between cells is summed over processes that have ended since; a cell's own is not counted."""
    session = Session()
    session.look([process(10, 2, 0.5), process(11, 10, 1.0)], busy=False)
    session.look([process(10, 2, 0.5), process(12, 10, 1.0)], busy=False)
    assert session.idle_cpu_s == pytest.approx(2.5)
    session.look([process(10, 2, 9.5)], busy=True)
    assert session.idle_cpu_s == 0
    session.look([process(10, 2, 9.75)], busy=False)
    assert session.idle_cpu_s == pytest.approx(0.25)


def test_work_of_children_that_nobody_saw_counts_once() -> None:
    """What short processes used is told by whoever waited for them; what was seen of a living one is not told again."""
    session = Session()
    session.look([process(10, 2)], busy=False)
    session.look([process(10, 2, children_s=2.0)], busy=False)
    assert session.idle_cpu_s == pytest.approx(2.0)
    session.look([process(10, 2, children_s=2.0), process(11, 10, 1.5)], busy=False)
    assert session.idle_cpu_s == pytest.approx(3.5)
    session.look([process(10, 2, children_s=3.75)], busy=False)
    assert session.idle_cpu_s == pytest.approx(3.75)


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine on which each PSS is 30 MB, and takes a second to read. The pids that were read so far."""
    asked: list[int] = []
    now = [0.0]

    def proportional(member: Process) -> Memory:
        asked.append(member.pid)
        now[0] += 1.0
        return Memory(30 * MB, 2 * MB)

    monkeypatch.setattr(guard, "proportional", proportional)
    monkeypatch.setattr(guard, "tmpfs_bytes", lambda init: 50 * MB)
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return asked


def test_memory_that_forks_share_counts_once(monkeypatch: pytest.MonkeyPatch, dear: list[int]) -> None:
    """A session whose forks share their pages is measured by what they hold together, then left alone for a moment."""
    monkeypatch.setattr(guard, "PIECE_S", 60.0)
    monkeypatch.setattr(guard, "DEAREST_S", 60.0)
    session = Session()
    session.look([process(10 + n, 2, rss_mb=200) for n in range(10)], busy=True)
    assert session.memory_bytes(10, 1000 * MB, now=1.0) == 350 * MB
    assert session.memory_bytes(10, 1000 * MB, now=1.5) == 50 * MB
    assert len(dear) == 10
    assert session.memory_bytes(10, 1000 * MB, now=2.5) == 350 * MB
    assert len(dear) == 20


def test_one_session_does_not_keep_the_guard_from_the_others(monkeypatch: pytest.MonkeyPatch, dear: list[int]) -> None:
    """However long it would take to measure one session, a look takes a piece of it; the pieces add up to the truth."""
    monkeypatch.setattr(guard, "DEAREST_S", 60.0)
    session = Session()
    session.look([process(10 + n, 2, rss_mb=200) for n in range(4)], busy=True)
    held = [session.memory_bytes(10, 500 * MB, now=0.0) for _ in range(4)]
    assert [held_bytes // MB for held_bytes in held] == [80, 110, 140, 170]
    assert sorted(dear) == [10, 11, 12, 13]


def test_what_cannot_be_measured_counts_as_what_it_seems(dear: list[int]) -> None:
    """A session that hides behind a measure too long is taken at its RSS."""
    session = Session()
    session.look([process(10 + n, 2, rss_mb=200) for n in range(30)], busy=True)
    held = [session.memory_bytes(10, 1000 * MB, now=0.0) for _ in range(3)]
    assert held[:2] == [80 * MB, 110 * MB]
    assert held[2] == (50 + 3 * 30 + 27 * 200) * MB
    assert len(dear) == 3


def test_a_sum_in_the_making_is_of_those_that_were_there() -> None:
    """What it has read stays, and what is left can be guessed."""
    sum_ = Proportional([process(0, 0, rss_mb=7), process(0, 0, rss_mb=5)])
    sum_.guess_the_rest()
    assert (sum_.complete, sum_.held) == (True, Memory(12 * MB, 0))


def test_sockets_are_counted_by_network(parent: Any) -> None:
    """Those that are queued, or that nobody has a descriptor of, count; those of others do not."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a network of its own")
    own = "import socket; ctypes.CDLL(None).unshare(0x40000000); listening = socket.socket(socket.AF_UNIX)"
    queue = "listening.bind(chr(0) + 'x'); listening.listen(64)"
    connect = "[socket.socket(socket.AF_UNIX).connect(chr(0) + 'x') for _ in range(20)]"
    [init] = children(parent(f"{own}; {queue}; {connect}").pid)
    assert 20 < guard.sockets(init) < 60


def test_a_small_session_is_not_measured_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """While even the upper bound is within the limit, the dear measure is not taken; files in memory count."""
    monkeypatch.setattr(guard, "proportional", lambda members: pytest.fail("measured"))
    monkeypatch.setattr(guard, "tmpfs_bytes", lambda init: 50 * MB)
    session = Session()
    session.look([process(10, 2, rss_mb=200)], busy=True)
    assert session.memory_bytes(10, 300 * MB, now=1.0) == 250 * MB


def test_a_hog_is_ended_and_its_neighbour_is_not(parent: Any, watching: Watch) -> None:
    """A session over its limit is killed and reported with the reason, whatever names others have given themselves."""
    names = [b"\xff\xfe", b"\n", b") R 1 (", b"a) S 2"]
    small = [NAMED.format(name=name) for name in names]
    hog = "held = mmap.mmap(-1, 200 << 20, mmap.MAP_PRIVATE); [held.write(bytes(1 << 20)) for _ in range(200)]"
    fork_server = parent(hog, *small)
    sizes = {found.pid: found.rss_bytes for found in guard.processes()}
    watch, ours = watching(fork_server.pid, memory_mb=150)
    before = children(fork_server.pid)
    watch.look()
    hogs = [pid for pid in before if sizes[pid] > 200 * MB]
    assert reports(ours) == [(pid, guard.TOO_MUCH_MEMORY) for pid in hogs]
    assert len(hogs) == 1


def test_one_that_burns_between_cells_is_ended(parent: Any, watching: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that computes while no cell runs is ended; one that the server calls busy is not."""
    monkeypatch.setattr(guard, "IDLE_CPU_S", 0.01)
    burn = "began = time.process_time()\nwhile time.process_time() < began + 0.1: pass"
    fork_server = parent(burn, burn)
    busy, idle = sorted(children(fork_server.pid))
    watch, ours = watching(fork_server.pid)
    ours.send(guard.ORDER.pack(busy, True))
    assert watch.obey()
    watch.look()
    assert reports(ours) == [(idle, guard.IDLE_CPU)]


def test_a_cell_between_two_looks_is_no_idle_work(
    parent: Any, watching: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cell computed that began and ended since the last look is not held against its session."""
    monkeypatch.setattr(guard, "IDLE_CPU_S", 0.01)
    fork_server = parent("began = time.process_time()\nwhile time.process_time() < began + 0.1: pass")
    [init] = children(fork_server.pid)
    watch, ours = watching(fork_server.pid)
    for busy in (True, False):
        ours.send(guard.ORDER.pack(init, busy))
    assert watch.obey()
    watch.look()
    watch.look()
    assert reports(ours) == []


def test_the_largest_goes_when_the_machine_runs_short(
    parent: Any, watching: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the floor one session is ended, the largest, and then memory is given a moment to come back."""
    monkeypatch.setattr(guard, "available_bytes", lambda: 100 * MB)
    fork_server = parent("pass", "held = bytearray(b'x' * (80 << 20))")
    sizes = {found.pid: found.rss_bytes for found in guard.processes() if found.parent == fork_server.pid}
    watch, ours = watching(fork_server.pid, free_mb=200)
    watch.look()
    for _ in range(2):
        watch.keep_memory_free()
    assert reports(ours) == [(max(sizes, key=sizes.__getitem__), guard.MACHINE_SHORT)]


def test_who_hides_its_memory_goes_first(parent: Any, watching: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full sockets are in nobody's size, and count: both against the limit, and when the largest is looked for."""
    fork_server = parent("pass", "held = bytearray(b'x' * (80 << 20))")
    sizes = {found.pid: found.rss_bytes for found in guard.processes() if found.parent == fork_server.pid}
    [small, _large] = sorted(sizes, key=sizes.__getitem__)
    monkeypatch.setattr(guard, "sockets", lambda init: 1000 if init == small else 3)
    monkeypatch.setattr(guard, "available_bytes", lambda: 100 * MB)
    watch, ours = watching(fork_server.pid, free_mb=200)
    watch.look()
    watch.keep_memory_free()
    assert reports(ours) == [(small, guard.MACHINE_SHORT)]
    watch, ours = watching(fork_server.pid, memory_mb=150)
    watch.look()
    assert reports(ours) == [(small, guard.TOO_MUCH_MEMORY)]


def test_the_guard_gives_signs_of_life(parent: Any, watching: Watch) -> None:
    """Now and then it says that it is there, and not at every turn."""
    watch, ours = watching(parent().pid)
    for _ in range(5):
        watch.beat()
    assert ours.recv(64) == guard.REPORT.pack(0, guard.ALIVE, 0)
    assert not select.select([ours], [], [], 0)[0]


def test_the_machines_memory_is_read_at_every_turn(
    parent: Any, watching: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks that take long are followed by long pauses, and in those the machine is still watched."""
    watch, ours = watching(parent().pid)
    clock, looks, turns = [0.0], [], []
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(guard, "PERIOD_S", 0.0)
    monkeypatch.setattr(guard, "reap", list)

    def look(_guard: Guard) -> None:
        looks.append(clock[0])
        clock[0] += 60.0

    def keep_memory_free(_guard: Guard) -> None:
        turns.append(clock[0])
        clock[0] += 0.25
        if len(turns) > 20:
            ours.close()

    monkeypatch.setattr(Guard, "look", look)
    monkeypatch.setattr(Guard, "keep_memory_free", keep_memory_free)
    guard.watch(watch, watch._orders, 0)
    assert len(turns) == 21
    assert looks[1] - looks[0] <= 60.0 + guard.LONGEST_PAUSE_S + 0.25


def test_the_guard_ends_with_the_server(parent: Any, watching: Watch) -> None:
    """When the server has closed its socket there is nothing left to watch for."""
    watch, ours = watching(parent().pid)
    assert watch.obey()
    ours.close()
    assert not watch.obey()


def test_a_server_that_does_not_listen_stops_nothing(parent: Any, watching: Watch) -> None:
    """Killing goes on when reports cannot be delivered."""
    fork_server = parent("held = bytearray(b'x' * (80 << 20))")
    watch, ours = watching(fork_server.pid, memory_mb=50)
    ours.close()
    [hog] = children(fork_server.pid)
    ended = os.pidfd_open(hog)
    watch.look()
    assert select.select([ended], [], [], 10)[0]
    os.close(ended)
