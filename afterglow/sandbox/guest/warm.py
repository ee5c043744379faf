"""The fork server: imports numpy, pandas and matplotlib once, then forks a session for each request.

It is the parent of every session's init and does nothing else. Requests and answers are numbers of a fixed size:
nothing of a tenant is ever in its memory, of which all sessions are copies. It has one thread, or its forks could hang.
"""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from . import agent, wall
from .launch import CACHE

CONTROL_FD = 3
CONFIG = struct.Struct("!I")  # how many sessions there may be at once
# Which request; memory, disk and other files of the session in MB; its processes. The session's socket comes with it.
REQUEST = struct.Struct("!IIIII")
# Which request (0: none), what came of it, errno, and the pid of the session's init in the outer jail. With FORKED
# comes a descriptor of that process. SHUT_OUT: the session could not be walled in, and has ended.
ANSWER = struct.Struct("!IBiI")
READY, FORKED, BUSY, SHUT_OUT = 1, 2, 3, 4
LONGEST_ANSWER = 512  # SHUT_OUT goes on in words
PRELOAD = ("numpy", "pandas", "matplotlib", "matplotlib.pyplot", "PIL.Image", "openpyxl")
MB = 1 << 20


class ForkServer:
    """What must be known to fork: the own pid namespace, and which users are free."""

    def __init__(self, control: socket.socket, uids: list[int]) -> None:
        self._control = control
        self._home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._free = deque(uids)
        self._living: dict[int, tuple[int, int]] = {}
        self._waiting = select.poll()
        self._waiting.register(control, select.POLLIN)

    def serve(self) -> None:
        """Answer requests until the server is gone."""
        while True:
            ready = {fd for fd, _event in self._waiting.poll()}
            for pidfd in ready & self._living.keys():  # first: what they free may be asked for
                self._bury(pidfd)
            if self._control.fileno() in ready and not self._answer():
                return

    def _bury(self, pidfd: int) -> None:
        """Only now may its user be another session's."""
        pid, uid = self._living.pop(pidfd)
        self._waiting.unregister(pidfd)
        os.close(pidfd)
        os.waitpid(pid, 0)
        self._free.append(uid)

    def _answer(self) -> bool:
        """Take one request. Whatever goes wrong with it is answered, and ends nothing but itself."""
        request, sockets, _flags, _address = socket.recv_fds(self._control, REQUEST.size, 1)
        if not request:
            return False
        number = int.from_bytes(request[:4], "big")
        try:
            if len(sockets) != 1 or len(request) != REQUEST.size:
                raise OSError(errno.EMFILE, "the request came without its socket")
            os.set_inheritable(sockets[0], False)
            pid, pidfd = self._fork(request, sockets[0])
            try:
                socket.send_fds(self._control, [ANSWER.pack(number, FORKED, 0, pid)], [pidfd])
            except OSError:
                os.kill(pid, signal.SIGKILL)
                raise
        except OSError as error:
            self._control.send(ANSWER.pack(number, BUSY, error.errno or 0, 0))
        finally:
            for fd in sockets:
                os.close(fd)
        return True

    def _fork(self, request: bytes, session_fd: int) -> tuple[int, int]:
        if not self._free:
            raise OSError(errno.EAGAIN, "no user is free")
        pid = wall.fork_as_init(self._home)
        if pid == 0:
            self._become_session(request, session_fd)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._living[pidfd] = (pid, self._free.popleft())
        self._waiting.register(pidfd, select.POLLIN)
        return pid, pidfd

    def _become_session(self, request: bytes, session_fd: int) -> NoReturn:
        """In the child: never returns to the fork server's work, whatever happens."""
        number, memory_mb, disk_mb, tmp_mb, processes = REQUEST.unpack(request)
        try:
            wall.keep_only(session_fd, CONTROL_FD)
            wall.enter_session(self._free[0], wall.Limits(memory_mb * MB, disk_mb * MB, processes, tmp_mb * MB))
            self._control.close()
            agent.run(session_fd, session_fd, before_worker=lambda: wall.restrict_calls(worker=True))
        except OSError as error:
            with suppress(OSError):
                self._control.send(ANSWER.pack(number, SHUT_OUT, error.errno or 0, 0) + str(error).encode()[:200])
        finally:
            os._exit(0)


def preload() -> None:
    """Import what cells begin with, and use each once, so that sessions share what a first use builds."""
    for name in PRELOAD:
        _best_effort(partial(importlib.import_module, name))
    _best_effort(_warm_pandas)
    _best_effort(_warm_matplotlib)


def _best_effort(step: Callable[[], Any]) -> None:
    """The guest's door: a package may raise anything while it is imported, and a session can do without it."""
    try:
        step()
    except ModuleNotFoundError:
        pass
    except Exception:  # noqa: BLE001
        traceback.print_exc(limit=-3)  # the server's log shows it


def _warm_pandas() -> None:
    pandas: Any = importlib.import_module("pandas")
    table = pandas.read_csv(io.StringIO("a,b\n1,x\n2,y\n"))
    table.groupby("b").sum().to_string()
    table.describe().to_string()


def _warm_matplotlib() -> None:
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    pyplot.plot([1, 2])
    pyplot.title("a")
    pyplot.savefig(io.BytesIO(), format="png")
    pyplot.close("all")


def session_uids(most: int) -> list[int]:
    """Users for that many sessions: each its own where the outer jail has many, else all the only one there is."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        there = sum(int(line.split()[2]) for line in file)
    return list(range(1, min(most, there - 1) + 1)) if there > 1 else [0] * most


def main() -> None:
    """Warm up and serve. The first message on the control socket is the configuration."""
    control = socket.socket(fileno=CONTROL_FD)
    [sessions] = CONFIG.unpack(control.recv(CONFIG.size))
    os.putenv("XDG_CACHE_HOME", CACHE)  # fontconfig's, which only now can be written
    preload()
    os.unsetenv("XDG_CACHE_HOME")
    wall.make_read_only(CACHE)
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a package has started a thread")
    gc.collect()
    gc.freeze()
    server = ForkServer(control, session_uids(sessions))
    control.send(ANSWER.pack(0, READY, 0, 0))
    server.serve()
    sys.exit(0)
