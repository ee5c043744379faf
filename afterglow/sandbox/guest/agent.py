"""The first process of a session: it answers the server, and keeps the worker that runs the cells.

It never waits: one poll over non-blocking files, answers made piece by piece as the server takes them, and nothing
read from the worker while the server does not read. What the worker says is data: the agent alone writes frames to
the server. Nothing rests on it either: time and memory are bounded from outside (`session.py`, the engine), since
code in the session may find a way to break it.

From the server (`id` is echoed in every answer):
    hello {id, memory_bytes, processes, output_bytes}   → ready, fail. Starts the worker
    exec {id} + code                                    → logs + text, image {mime, last} + bytes, done {status}
    interrupt {id}                                      SIGINT to the worker, while that exec runs
    put {id, name, size}, bytes {id} + …, end {id}      → ok, fail {reason}. `drop {id}` instead of `end` gives it up
    list {id}                                           → files + JSON list of [name, size, mtime_ns], …, end
    get {id, name, max}                                 → bytes + …, end {size}; fail {reason}
    beat {id}                                           → beat: a sign of life, where nothing else tells of a death
hello: of its limits only memory is the agent's to set, so that an array too large is a MemoryError.
done: status `ok`, `error`, `interrupted`, or `died` with `exit` (as `Popen.returncode`) and `broke`, whether the
worker was killed for speaking no sense. logs: `error` is true for the text of an exception.
fail: reason `full`, `name`, `missing`, `large` or `other`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import os
import resource
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import cells
from .files import FileRefused, Files, Put
from .frames import BadFrame, Frames, pack, parse_header

TEXT_BYTES = 65_536
PIPE_BYTES = 1 << 20  # as large as an unprivileged process can make a pipe
OUT_BYTES = 262_144  # waiting for the server; beyond it nothing more is read or made
READ_BYTES = 262_144
UNHEARD_BYTES = 2 << 20  # more than the longest code
INTERRUPT_PAUSE_S = 0.2
DYING_S = 0.2  # from a worker's closed connection to its death, when it is dying
TEXT_PAUSE_S = 0.01  # a drip makes a hundred frames a second, not a hundred thousand
MAX_ANSWERS = 64  # lists, gets and puts under way

_SET_DUMPABLE, _SET_CHILD_SUBREAPER = 4, 36  # prctl


def run(
    fd_in: int,
    fd_out: int,
    folder: str = "/mnt/data",
    *,
    before_worker: Callable[[], None] = lambda: None,
    silence_s: float = math.inf,
    alone: bool = False,
) -> None:
    """Serve one session until the server closes the connection; then everything else in it was killed.

    fd_in, fd_out: where the server's frames come from and ours go; the same number for a connected socket, 0 and 1 in
    a container. They are taken over: moved above 2, and 0, 1 and 2 become /dev/null. folder: `/mnt/data`; it must
    exist and belong to the session. before_worker: called in the forked worker when its files are in place, before
    anything of a cell (a second seccomp filter, say); an exception there ends the worker. silence_s: a server that
    sends nothing for so long, not even a beat, is gone. alone: nobody is in our pid namespace but its first process.
    The agent makes itself non-dumpable and ignores SIGINT, SIGTERM and SIGHUP. The worker is forked only on the
    server's `hello`, and is dumpable again; RLIMIT_DATA is lowered to the hello's `memory_bytes`; every other limit
    is the caller's. As pid 1, or alone, it ends everything else in its pid namespace by kill(-1), which spares the
    first process; otherwise its descendants. After the return the caller calls os._exit(0).
    """
    fd_in, fd_out = _take_over(fd_in, fd_out)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _prctl(_SET_DUMPABLE, 0)  # else a cell could write into this process
    if os.getpid() != 1:
        _prctl(_SET_CHILD_SUBREAPER, 1)
    Agent(fd_in, fd_out, folder, before_worker, silence_s, alone or os.getpid() == 1).serve()


def _take_over(fd_in: int, fd_out: int) -> tuple[int, int]:
    """Move the connection out of the way of 0, 1 and 2: what a library prints must not get into it."""
    kept_in = fcntl.fcntl(fd_in, fcntl.F_DUPFD_CLOEXEC, 10)
    kept_out = kept_in if fd_out == fd_in else fcntl.fcntl(fd_out, fcntl.F_DUPFD_CLOEXEC, 10)
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    for fd in {fd_in, fd_out, nothing} - {0, 1, 2}:
        os.close(fd)
    os.set_blocking(kept_in, False)
    os.set_blocking(kept_out, False)
    return kept_in, kept_out


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Worker:
    """The process that runs cells, as its parent sees it.

    text: what it and its children print, the reading end of a pipe; None once nobody can print any more.
    """

    def __init__(self, before: Callable[[], None], folder: str, memory_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        text, printed = os.pipe()
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _become_worker(theirs.fileno(), printed, before, folder, memory_bytes)
        except OSError:
            ours.close()
            os.close(text)
            raise
        finally:
            theirs.close()
            os.close(printed)
        ours.setblocking(False)
        os.set_blocking(text, False)
        self.control: socket.socket | None = ours
        self.text: int | None = text
        self.frames = Frames(parse_header)
        self.outgoing = bytearray()
        self.broke = False

    def break_off(self) -> None:
        """It speaks no sense, or has closed our connection: kill it. Its death is noticed as any other."""
        self.broke = True
        self.close_control()
        os.kill(self.pid, signal.SIGKILL)

    def close_control(self) -> None:
        if self.control:
            self.control.close()
            self.control = None

    def close(self) -> None:
        self.close_control()
        if self.text is not None:
            os.close(self.text)
            self.text = None


def _become_worker(control: int, printed: int, before: Callable[[], None], folder: str, memory_bytes: int) -> NoReturn:
    """In the forked child: keep nothing of the agent but the two ends, on 3 and 4, and run cells until the end."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, lambda *_: None)  # until the first cell says what it does
        _arrange_files(control, printed)
        _prctl(_SET_DUMPABLE, 1)
        os.chdir(folder)
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if memory_bytes and (most == resource.RLIM_INFINITY or memory_bytes < most):
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        before()
        cells.main(3, 4)
    finally:
        os._exit(1)


def _arrange_files(control: int, printed: int) -> None:
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (control, printed)]
    for fd, at in zip(high, (3, 4), strict=True):
        os.dup2(fd, at, inheritable=False)
    for at in (1, 2):
        os.dup2(high[1], at)
    os.closerange(5, os.sysconf("SC_OPEN_MAX"))


class Agent:
    """One session. `serve` turns until the server is gone; what carries out which request is in `_requests`."""

    def __init__(
        self,
        fd_in: int,
        fd_out: int,
        folder: str,
        before_worker: Callable[[], None],
        silence_s: float,
        alone: bool,
    ) -> None:
        self._in, self._out = fd_in, fd_out
        self._folder = folder
        self._before_worker = before_worker
        self._alone = alone
        self._files = Files(folder)
        self._frames = Frames(parse_header)
        self._outgoing = bytearray()
        self._answers: deque[Iterator[bytes]] = deque()  # lists and gets, made as the server takes them
        self._puts: dict[int, Put] = {}
        self._worker: Worker | None = None
        self._memory_bytes = 0
        self._died: dict[str, Any] | None = None  # between cells; the next exec is told
        self._cell: int | None = None
        self._text_at = 0.0
        self._interrupt_at = math.inf
        self._silence_s = silence_s
        self._heard_at = time.monotonic()
        self._open = True
        self._wake = _wake_on_deaths()
        self._requests: dict[str, Callable[[int, dict[str, Any], bytes], None]] = {
            "hello": self._hello,
            "exec": self._exec,
            "interrupt": self._interrupt,
            "put": self._put,
            "bytes": self._put_bytes,
            "end": self._put_end,
            "drop": self._put_drop,
            "list": self._list,
            "get": self._get,
            "beat": self._beat,
        }

    def serve(self) -> None:
        while self._open:
            self._turn()
        self._end_all()

    # --- the loop

    def _turn(self) -> None:
        """Wait until something can be done, and do it."""
        now = time.monotonic()
        wanted = self._wanted(now)
        poll = select.poll()
        for fd, (events, _) in wanted.items():
            poll.register(fd, events)
        for fd, happened in poll.poll(self._patience_ms(now)):
            if self._open:
                wanted[fd][1](happened)
        if self._answers and self._has_room():
            self._make_answer()
        if now >= self._interrupt_at:
            self._send_interrupt()
        if time.monotonic() - self._heard_at >= self._silence_s:  # after reading: we may have been stopped meanwhile
            self._open = False

    def _wanted(self, now: float) -> dict[int, tuple[int, Callable[[int], object]]]:
        """What is waited for: only what will be taken, since poll tells of an end again and again."""
        sends = select.POLLOUT if self._outgoing else 0
        wanted: dict[int, tuple[int, Callable[[int], object]]] = {self._wake: (select.POLLIN, self._bury)}
        if self._in == self._out:
            wanted[self._in] = (select.POLLIN | sends, self._exchange)
        else:
            wanted[self._in] = (select.POLLIN, self._receive)
            if sends:
                wanted[self._out] = (sends, self._send)
        if worker := self._worker:
            events = (select.POLLIN if self._has_room() else 0) | (select.POLLOUT if worker.outgoing else 0)
            if worker.control and events:
                wanted[worker.control.fileno()] = (events, self._exchange_with_worker)
            if worker.text is not None and self._wants_text() and now >= self._text_at:
                wanted[worker.text] = (select.POLLIN, self._take_text)
        return wanted

    def _patience_ms(self, now: float) -> int | None:
        if self._answers and self._has_room():
            return 0
        next_at = min(self._interrupt_at, self._heard_at + self._silence_s)
        if self._wants_text() and now < self._text_at:
            next_at = min(next_at, self._text_at)
        return None if next_at == math.inf else max(0, math.ceil((next_at - now) * 1000))

    def _has_room(self) -> bool:
        return len(self._outgoing) < OUT_BYTES

    def _wants_text(self) -> bool:
        # Not between cells: there a thread that prints for ever is stopped by the full pipe.
        return self._cell is not None and self._has_room()

    # --- the server

    def _exchange(self, happened: int) -> None:
        if happened & select.POLLOUT:
            self._send(happened)
        if happened & ~select.POLLOUT:
            self._receive(happened)

    def _send(self, _happened: int = 0) -> None:
        try:
            sent = os.write(self._out, self._outgoing[:OUT_BYTES])
        except BlockingIOError:
            return
        except OSError:
            self._open = False
            return
        del self._outgoing[:sent]

    def _receive(self, _happened: int) -> None:
        try:
            data = os.read(self._in, READ_BYTES)
            self._open = self._open and bool(data)
            self._heard_at = time.monotonic()
            for header, body in self._frames.feed(data):
                self._carry_out(header, body)
        except BlockingIOError:
            return
        except (OSError, BadFrame):  # the connection ended, or it is the server's no more
            self._open = False

    def _carry_out(self, header: dict[str, Any], body: bytes) -> None:
        request = header.get("id")
        if type(request) is not int:
            return
        try:
            self._requests[header["t"]](request, header, body)
        except FileRefused as refused:
            self._puts.pop(request, None)
            self._fail(request, refused.reason)
        except (KeyError, TypeError, ValueError):
            self._fail(request, "other")

    def _tell(self, kind: str, request: int, body: bytes = b"", **fields: Any) -> None:
        self._outgoing += pack({"t": kind, "id": request, **fields}, body)

    def _fail(self, request: int, reason: str) -> None:
        self._tell("fail", request, reason=reason)

    def _beat(self, request: int, _header: dict[str, Any], _body: bytes) -> None:
        self._tell("beat", request)

    # --- cells

    def _hello(self, request: int, header: dict[str, Any], _body: bytes) -> None:
        self._memory_bytes = max(0, int(header["memory_bytes"]))
        if self._worker is None and not self._start_worker():
            self._fail(request, "other")
        else:
            self._tell("ready", request)

    def _start_worker(self) -> bool:
        try:
            self._worker = Worker(self._before_worker, self._folder, self._memory_bytes)
        except OSError:  # no process or file to be had
            return False
        return True

    def _exec(self, request: int, _header: dict[str, Any], code: bytes) -> None:
        if self._cell is not None:
            self._fail(request, "other")
            return
        if died := self._died:
            self._died = None
            self._tell("done", request, status="died", **died)
            return
        if self._worker is None and not self._start_worker():
            self._tell("done", request, status="died", exit=-signal.SIGKILL, broke=False)
            return
        assert self._worker is not None
        self._cell = request
        self._text_at = 0.0
        self._interrupt_at = math.inf
        self._give_worker({"t": "exec", "id": request}, code)

    def _interrupt(self, request: int, _header: dict[str, Any], _body: bytes) -> None:
        if request == self._cell:
            self._send_interrupt()

    def _send_interrupt(self) -> None:
        """Again and again, while the cell runs: one that comes just before a system call is not seen until its end."""
        self._interrupt_at = math.inf
        if self._worker and self._cell is not None:
            os.kill(self._worker.pid, signal.SIGINT)
            self._interrupt_at = time.monotonic() + INTERRUPT_PAUSE_S

    def _give_worker(self, header: dict[str, Any], body: bytes = b"") -> None:
        if self._worker and self._worker.control:
            self._worker.outgoing += pack(header, body)
            self._exchange_with_worker(select.POLLOUT)

    def _exchange_with_worker(self, happened: int) -> None:
        worker = self._worker
        if worker is None:
            return
        try:
            if worker.control and happened & select.POLLOUT:
                del worker.outgoing[: worker.control.send(worker.outgoing)]
            if worker.control and happened & ~select.POLLOUT:
                self._hear(worker, worker.control.recv(TEXT_BYTES))
        except BlockingIOError:
            return
        except (OSError, BadFrame):
            worker.break_off()

    def _hear(self, worker: Worker, data: bytes) -> None:
        if not data:
            if _dies(worker.pid):
                return  # `_bury` is about to hear of it, and says how
            raise BadFrame("it has closed the connection, and lives")
        for header, body in worker.frames.feed(data):
            if self._cell is None or header.get("id") != self._cell or worker.broke:
                raise BadFrame("it speaks of no cell that runs")
            if len(worker.outgoing) > UNHEARD_BYTES:
                raise BadFrame("it speaks, and does not listen")
            self._forward(header, body)

    def _forward(self, header: dict[str, Any], body: bytes) -> None:
        """Pass on what the worker says, rebuilt from the few things that it may say."""
        assert self._cell is not None
        kind, cell = header.get("t"), self._cell
        if kind == "done" and header.get("status") in ("ok", "error", "interrupted") and not body:
            self._end_leftovers()
            self._drain_text()
            self._cell = None
            self._tell("done", cell, status=header["status"])
            return
        self._drain_text()
        if kind == "picture" and header.get("mime") in ("image/png", "image/jpeg") and body:
            self._tell("image", cell, body, mime=header["mime"], last=header.get("last") is True)
        elif kind == "error" and body:
            self._tell("logs", cell, body, error=True)
        else:
            raise BadFrame("it says what cannot be said")
        self._give_worker({"t": "taken", "id": cell})

    def _take_text(self, _happened: int = 0) -> int:
        """Pass on what was printed, one piece. Returns its size in bytes."""
        worker = self._worker
        if worker is None or worker.text is None or self._cell is None:
            return 0
        self._text_at = time.monotonic() + TEXT_PAUSE_S
        try:
            text = os.read(worker.text, TEXT_BYTES)
        except BlockingIOError:
            return 0
        if text:
            self._tell("logs", self._cell, text)
        else:
            os.close(worker.text)
            worker.text = None
        return len(text)

    def _drain_text(self) -> None:
        """Pass on what is in the pipe, but not without end: a thread may go on printing."""
        taken, more = 0, 1
        while more and taken < PIPE_BYTES:
            more = self._take_text()
            taken += more

    # --- deaths

    def _bury(self, _happened: int) -> None:
        """Reap what has died. With the worker goes everything else, before its pid is free for another."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake, 4096):
                pass
        while (pid := _next_dead()) is not None:
            if self._worker and pid == self._worker.pid:
                self._lose_worker(self._worker)
            else:
                os.waitpid(pid, os.WNOHANG)

    def _lose_worker(self, worker: Worker) -> None:
        _kill_others(self._alone, keep=None)
        self._drain_text()
        ended = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        worker.close()
        self._worker = None
        died: dict[str, Any] = {"exit": ended, "broke": worker.broke}
        if self._cell is None:
            self._died = died
        else:
            self._tell("done", self._cell, status="died", **died)
            self._cell = None

    def _end_leftovers(self) -> None:
        """A cell has ended: what it has started must not go on burning. Its threads cannot be told apart."""
        if self._worker:
            _kill_others(self._alone, keep=self._worker.pid)

    def _end_all(self) -> None:
        for put in self._puts.values():
            put.drop()
        _kill_others(self._alone, keep=None)

    # --- files

    def _make_answer(self) -> None:
        """One more piece of the answer whose turn it is."""
        answer = self._answers.popleft()
        if (piece := next(answer, None)) is not None:
            self._outgoing += piece
            self._answers.append(answer)

    def _list(self, request: int, _header: dict[str, Any], _body: bytes) -> None:
        self._answer(request, self._files.list(request))

    def _get(self, request: int, header: dict[str, Any], _body: bytes) -> None:
        self._answer(request, self._files.get(request, header["name"], header["max"]))

    def _answer(self, request: int, answer: Iterator[bytes]) -> None:
        if len(self._answers) < MAX_ANSWERS:
            self._answers.append(answer)
        else:
            self._fail(request, "other")

    def _put(self, request: int, header: dict[str, Any], _body: bytes) -> None:
        if len(self._puts) >= MAX_ANSWERS or request in self._puts:
            raise FileRefused("other")
        self._puts[request] = self._files.put(header["name"], header["size"])

    # Of a put that has failed the rest may be on its way still: it is dropped.

    def _put_bytes(self, request: int, _header: dict[str, Any], body: bytes) -> None:
        if put := self._puts.get(request):
            put.write(body)

    def _put_end(self, request: int, _header: dict[str, Any], _body: bytes) -> None:
        if put := self._puts.pop(request, None):
            put.keep()
            self._tell("ok", request)

    def _put_drop(self, request: int, _header: dict[str, Any], _body: bytes) -> None:
        if put := self._puts.pop(request, None):
            put.drop()
            self._fail(request, "other")


def _wake_on_deaths() -> int:
    """A file that can be read when a child has died. What dies is not always what closes its files, or says so."""
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return wake


def _dies(pid: int) -> bool:
    """Whether a child that has let go of its connection is dead, or is so in a moment."""
    deadline = time.monotonic() + DYING_S
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _next_dead() -> int | None:
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found else None


def _kill_others(alone: bool, keep: int | None) -> None:
    """Kill all that came from this process, but `keep`.

    Alone in a namespace everything is stopped first, at one stroke, so that nothing can fork away while it is looked
    for: all that /proc names is ours then. More than the names cannot be had behind Landlock.
    """
    spared = {1, os.getpid(), keep}
    if not alone:
        for _ in range(3):  # without a namespace of our own there is no such stroke
            if not (others := _descendants() - spared):
                return
            _signal_each(others, signal.SIGSTOP)  # or a shell would tell of its child's death
            _signal_each(others, signal.SIGKILL)
    elif keep is None:
        _signal_all(signal.SIGKILL)
    elif _numbers_in_proc() - spared:
        _signal_all(signal.SIGSTOP)
        _signal_each(_numbers_in_proc() - spared, signal.SIGKILL)
        _signal_all(signal.SIGCONT)


def _signal_all(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, number)


def _signal_each(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _numbers_in_proc() -> set[int]:
    try:
        return {int(name) for name in os.listdir("/proc") if name.isdecimal()}
    except OSError:
        return set()


def _descendants() -> set[int]:
    """Those that live and came from this process, by /proc. Its entries are bytes: a process may have any name."""
    children: dict[int, list[int]] = {}
    for pid in _numbers_in_proc():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state != b"Z":
            children.setdefault(int(parent), []).append(pid)
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        new = [pid for pid in children.get(waiting.pop(), []) if pid not in found]
        found.update(new)
        waiting += new
    return found
