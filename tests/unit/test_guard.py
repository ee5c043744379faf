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
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.sandbox.guest import guard
from afterglow.sandbox.guest.guard import Guard, Memory, Process, Session

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


def process(pid: int, parent: int, cpu_s: float = 0.0, rss_mb: int = 1) -> Process:
    return Process(pid, parent, cpu_s, started=7, rss_bytes=rss_mb * MB)


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
    monkeypatch.setattr(guard, "tmpfs_bytes", lambda init: 0)  # these "sessions" see the machine's own folders
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
    return found


def children(pid: int) -> list[int]:
    return [found.pid for found in guard.processes() if found.parent == pid]


@given(name=st.binary(max_size=15))
def test_no_name_hides_a_process(name: bytes) -> None:
    """A process is read rightly whatever bytes it has given itself as its name."""
    fields = [b"S", b"42", *[b"0"] * 9, b"150", b"50", *[b"0"] * 6, b"777", b"0", b"300", b"0"]
    line = b"7 (" + name + b") " + b" ".join(fields) + b"\n"
    found = guard.parse(line)
    assert found == Process(7, 42, 200 / guard.TICKS, 777, 300 * guard.PAGE)


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


def test_memory_that_forks_share_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose forks share their pages is measured by what they hold together, and not again at every look."""
    asked = []

    def proportional(members: list[Process]) -> Memory:
        asked.append(len(members))
        return Memory(300 * MB, 20 * MB)

    monkeypatch.setattr(guard, "proportional", proportional)
    monkeypatch.setattr(guard, "tmpfs_bytes", lambda init: 50 * MB)
    session = Session()
    session.look([process(10 + n, 2, rss_mb=200) for n in range(10)], busy=True)
    assert session.memory_bytes(10, 1000 * MB, now=1.0) == 350 * MB
    assert session.memory_bytes(10, 1000 * MB, now=1.5) == 350 * MB
    assert asked == [10]
    assert session.memory_bytes(10, 1000 * MB, now=2.5) == 350 * MB
    assert asked == [10, 10]


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
    watch.look()
    assert reports(ours) == [(max(sizes, key=sizes.__getitem__), guard.MACHINE_SHORT)]


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
