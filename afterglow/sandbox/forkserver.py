"""One fork server with its launcher and guard, as the server sees them: two sockets and some process descriptors.

What sessions are made of it, and when it is replaced, is decided in `local.py`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from afterglow.errors import SandboxBusy, SandboxOff
from afterglow.sandbox.guest import guard, warm
from afterglow.telemetry import log

ABOVE_FIXED_FD = 10  # the launcher expects its sockets at 3 and 4, so what becomes them is moved out of the way
START_S = 60.0
FORK_S = 20.0
END_S = 3.0  # from closing the sockets to the end of the last process; then by force
TELL_AGAIN_S = 0.02
SAID_BYTES = 4096
LOOK_AT_LOG = "The server's log says more."
RESTARTING = "the fork server is being started again"
ENDED = "The interpreter's fork server was ended as it started."


class CannotStart(SandboxOff):
    """The fork server did not come up. reason, remedy: as in `EngineStatus`. detail: what else it said, for the log."""

    def __init__(self, reason: str, remedy: str, detail: str = "") -> None:
        super().__init__(f"{reason} {remedy}")
        self.reason = reason
        self.remedy = remedy
        self.detail = detail


class Watched:
    """A process by its descriptor: it cannot be mistaken for another, and we are told when it has ended.

    on_end: called once, on the event loop, when it and all of its pid namespace are gone.
    """

    def __init__(self, pidfd: int, on_end: Callable[[], None]) -> None:
        self._pidfd = pidfd
        self._on_end = on_end
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._end)

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def kill(self) -> None:
        """End it, and with it the namespace that it is the first of. Does nothing when it has ended."""
        if not self.ended:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def gone(self) -> None:
        await self._ended.wait()

    def host_pid(self) -> int:
        """Its pid in our own namespace. Raises ProcessLookupError."""
        with open(f"/proc/self/fdinfo/{self._pidfd}", encoding="ascii") as file:
            found = [int(line.split()[1]) for line in file if line.startswith("Pid:")]
        if not found or found[0] < 1:
            raise ProcessLookupError
        return found[0]

    def _end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set()
        self._on_end()


class Forked(NamedTuple):
    """A new session's first process. pid: by which the guard knows it; pidfd: to be closed by whoever takes it."""

    pid: int
    pidfd: int


class ForkServer:
    """A running fork server.

    on_report: told what the guard did: pid of a session's init, one of the guard's reasons, and how much of it.
    on_end: called once, when it has ended, unless it was closed; no session of it is left, or will be in a moment.
    usable: it takes requests. forks: how many it has taken. shut_out: why the last session that failed could not be
    walled in. Raises OSError when there are no descriptors left for it.
    """

    def __init__(self, on_report: Callable[[int, int, int], None], on_end: Callable[[], None]) -> None:
        self._on_report = on_report
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._untold: dict[int, bool] = {}
        self._telling: asyncio.TimerHandle | None = None
        self._asked: dict[int, asyncio.Future[Forked]] = {}
        with ExitStack() as undo:
            self._control, self._their_control = map(undo.enter_context, _pair())
            self._orders, self._their_orders = map(undo.enter_context, _pair())
            # For what breaks unforeseen: kept to the end, for the guard's last words.
            said, tells = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._said, self._tells = os.fdopen(said, "rb", 0), os.fdopen(tells, "wb", 0)
            undo.pop_all()
        self._heard_at = self._loop.time()
        self._launcher: Watched | None = None
        self.pid = 0
        self.forks = 0
        self.usable = False
        self.shut_out = ""

    async def start(self, command: list[str], config: Mapping[str, Any], sessions: int) -> None:
        """Bring it up. Raises CannotStart, and then nothing of it is left.

        command: what runs the launcher; config: what the launcher reads; sessions: how many there may be at once.
        """
        try:
            self._control.send(json.dumps(config).encode())
            self._control.send(warm.CONFIG.pack(sessions))
            self._spawn(command)
            async with asyncio.timeout(START_S):
                await self._ready
        except (OSError, TimeoutError) as error:
            what = "took too long to start" if isinstance(error, TimeoutError) else f"cannot be started: {error}"
            refused = CannotStart(f"The interpreter's fork server {what}.", LOOK_AT_LOG, self._words())
            await self.close()
            raise refused from None
        except CannotStart as error:
            error.detail = error.detail or self._words()
            await self.close()
            raise
        except asyncio.CancelledError:
            await self.close()
            raise
        self.usable = True
        self._heard_at = self._loop.time()
        if complaint := self._words():
            log.info("code interpreter: as the fork server started: %s", complaint)

    def _spawn(self, command: list[str]) -> None:
        """Start the launcher: nothing of ours goes along but two sockets and a pipe."""
        theirs = ((self._tells, 2), (self._their_control, 3), (self._their_orders, 4))
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (0, 1)]
        with ExitStack() as closing:
            for end, number in theirs:
                closing.enter_context(end)
                moved = fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, ABOVE_FIXED_FD)
                closing.callback(os.close, moved)
                actions.append((os.POSIX_SPAWN_DUP2, moved, number))
            self.pid = os.posix_spawn(
                command[0],
                command,
                {},
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
            )
        try:
            self._launcher = Watched(os.pidfd_open(self.pid), self._ended)
        except OSError:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise
        self._loop.add_reader(self._control, self._hear)
        self._loop.add_reader(self._orders, self.hear_guard)

    async def fork(self, request: tuple[int, int, int, int], session: socket.socket) -> Forked:
        """Have a session forked on the other end of `session`. Raises SandboxBusy, also when it ends meanwhile.

        request: memory, disk and other files in MB; processes.
        """
        if not self.usable:
            raise SandboxBusy(RESTARTING)
        self.forks += 1
        answer: asyncio.Future[Forked] = self._loop.create_future()
        self._asked[self.forks] = answer
        try:
            socket.send_fds(self._control, [warm.REQUEST.pack(self.forks, *request)], [session.fileno()])
            async with asyncio.timeout(FORK_S):
                return await answer
        except (OSError, TimeoutError):
            raise SandboxBusy("the fork server does not answer") from None

    def tell(self, pid: int, busy: bool) -> None:
        """Tell the guard whether a cell runs in the session of that init."""
        self._untold[pid] = busy
        self._tell()

    @property
    def silent_s(self) -> float:
        """For how long the guard has given no sign of life."""
        self.hear_guard()
        return self._loop.time() - self._heard_at

    def kill(self) -> None:
        """End it by force, and all its sessions; `on_end` is told."""
        if self._launcher is not None:
            self._launcher.kill()

    def _tell(self) -> None:
        """What the guard has no room for now is told a moment later: it would take a cell for idle work."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        try:
            for pid, busy in list(self._untold.items()):
                self._orders.send(guard.ORDER.pack(pid, busy))
                del self._untold[pid]
        except BlockingIOError:
            self._telling = self._loop.call_later(TELL_AGAIN_S, self._tell)
        except OSError:  # it has ended
            self._untold.clear()

    def _hear(self) -> None:
        while self._control.fileno() >= 0:
            try:
                message, fds, _flags, _address = socket.recv_fds(self._control, warm.LONGEST_ANSWER, 1)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            for fd in fds:
                os.set_inheritable(fd, False)
            if not message:
                self.usable = False  # the guard ends with the fork server, and then the launcher tells
                self._loop.remove_reader(self._control)
                return
            if not self._ready.done():
                self._take_first(message)
            else:
                self._take_answer(message, fds)

    def _take_first(self, message: bytes) -> None:
        """Either the fork server is ready, or the launcher says in JSON what was refused."""
        if message[:1] != b"{":
            self._ready.set_result(None)
            return
        told = json.loads(message)
        self._ready.set_exception(CannotStart(told["reason"], told["remedy"], told["error"]))

    def _take_answer(self, message: bytes, fds: list[int]) -> None:
        number, what, error, pid = warm.ANSWER.unpack_from(message)
        if what == warm.SHUT_OUT:
            self.shut_out = message[warm.ANSWER.size :].decode(errors="replace")
            log.error("code interpreter: a session could not be walled in: %s", self.shut_out)
            return
        answer = self._asked.pop(number, None)
        if what == warm.FORKED and fds and answer is not None and not answer.done():
            answer.set_result(Forked(pid, fds[0]))
            return
        for fd in fds:  # nobody waits for it any more
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)
        if answer is not None and not answer.done():
            # Without its descriptor: we had no room for it. The session ends with its connection.
            answer.set_exception(SandboxBusy(os.strerror(errno.EMFILE if what == warm.FORKED else error)))

    def hear_guard(self) -> None:
        """Take what the guard has reported, up to now."""
        while self._orders.fileno() >= 0:
            try:
                report = self._orders.recv(guard.REPORT.size)
            except BlockingIOError:
                return
            except OSError:
                report = b""
            if not report:
                self._loop.remove_reader(self._orders)
                return
            self._heard_at = self._loop.time()
            pid, why, amount = guard.REPORT.unpack(report)
            if why != guard.ALIVE:
                self._on_report(pid, why, amount)

    def _ended(self) -> None:
        """The launcher has ended, and before it, if all went well, the guard with its namespace."""
        _pid, status = os.waitpid(self.pid, 0)
        self._hear()
        was_usable, self.usable = self.usable or self._ready.done(), False
        if not self._ready.done():
            code = os.waitstatus_to_exitcode(status)
            self._ready.set_exception(
                CannotStart(
                    f"The interpreter's fork server ended as it started (status {code}).", LOOK_AT_LOG, self._words()
                )
            )
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(SandboxBusy(RESTARTING))
        self._asked.clear()
        if was_usable and (words := self._words()):
            log.warning("code interpreter: fork server %d said at its end: %s", self.pid, words)
        self._hang_up()
        if was_usable:
            self._on_end()

    def _hang_up(self) -> None:
        """Close the sockets: fork server and guard end when theirs say so."""
        for ours in (self._control, self._orders):
            if ours.fileno() >= 0:
                self._loop.remove_reader(ours)
                ours.close()
        self._said.close()
        if self._telling is not None:
            self._telling.cancel()

    async def close(self) -> None:
        """End it, and all sessions of it. Returns when the launcher has ended."""
        self._on_end = lambda: None
        self.usable = False
        if not self._ready.done():  # and whoever waits for it is not cancelled
            self._ready.set_exception(CannotStart(ENDED, LOOK_AT_LOG))
            self._ready.exception()  # if nobody does, nobody need hear it
        self._hang_up()
        if self._launcher is None:
            for theirs in (self._their_control, self._their_orders, self._tells):
                theirs.close()
            return
        try:
            async with asyncio.timeout(END_S):
                await self._launcher.gone()
        except TimeoutError:
            self._launcher.kill()
            await self._launcher.gone()

    def _words(self) -> str:
        """What it has said on its standard error, up to now."""
        said = None if self._said.closed else self._said.read(SAID_BYTES)
        return (said or b"").decode(errors="replace").strip()


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs
