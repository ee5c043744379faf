"""The first program of a pod (engine `remote`): waits at a port for a server with the token, and gives it a session.

    this, pid 1          lets one server in, and then only looks on: it reads nothing that a session says
      └─ agent           a fork: serves the session over the connection (`agent.py`), filtered
           └─ worker     runs the cells, filtered once more

The pod is the wall; `afterglow/sandbox/pod.py`, which starts this, says what it must hold. One process gives one
session: once a server is let in the port is closed, so that others are refused and the pod is not ready. When the
session has ended, the server is gone, or the time is up, this ends, and the kernel ends whatever else is in the pod.
Only a session that a server asks for to try its attacks on is followed by another. Before anybody is let in the folders
are emptied: they may outlive the container that somebody else has filled them in.

A server says GREETING: what it asks for, and its key. It is answered with WELCOME, or with nothing: the wrong key.
After that come the frames of `agent.py`. The key is a hash of the token, and what is known here is a hash of the key:
nobody in the pod can be a server with it. The key itself is wiped, since a worker is a copy of this memory.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from . import agent, contained, wall, warm

MAGIC, WIRE = b"afterglow", 1
ASKED = struct.Struct("!9sBB")  # MAGIC, WIRE, what is asked for
GREETING = struct.Struct("!9sBB32s")  # the same, and the key
WELCOME = struct.Struct("!9sBB")  # MAGIC, WIRE, what the pod bounds (bits)
TRY, OPEN = 1, 2  # a session to attack, and the one that is for a tenant
MEMORY, CPUS = 1, 2
MOST_VISITORS = 16  # that have not said who they are
GREETING_S = 3.0
REFUSAL_S = 0.5  # until a wrong key is answered, by the end of the connection
SILENCE_S = 10.0  # of a server; it gives a sign of life every few seconds
LEAVE_S = 2.0  # for the agent to end what it has started
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: closed with a reset
FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
CGROUP = Path("/sys/fs/cgroup")


def key_of(token: str) -> bytes:
    """What a server says in place of the token."""
    return hashlib.sha256(b"afterglow sandbox\0" + token.encode()).digest()


def digest_of(key: bytes | bytearray | memoryview) -> bytes:
    """What a pod knows the key by."""
    return hashlib.sha256(key).digest()


def main() -> NoReturn:
    """Serve until a session was given and has ended. stdin: the configuration, as JSON.

    host, port (0: any); digest, in hexadecimal; folder, which is /mnt/data, and others that can be written to, all of
    them emptied; fonts, matplotlib's cache of them or nothing; disk_bytes, processes: limits of the session, as
    `wall.Limits` has them; most_s: how long it may last.
    """
    config = json.loads(sys.stdin.buffer.read())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that none that has ended is left over
    wall.prctl(wall.PR_SET_CHILD_SUBREAPER, 1)  # the same where this is not the first process
    wall.set_dumpable(False)
    _prepare(config)
    warm.preload()
    while give_session(config) == TRY:
        _prepare(config)
    os._exit(0)


def give_session(config: dict[str, Any]) -> int:
    """Wait for somebody, and serve until the session has ended. Returns what it was wanted for."""
    with listen(config["host"], config["port"]) as listener:
        config["port"] = listener.getsockname()[1]
        signal.signal(signal.SIGTERM, _leave)  # by which a first process is not ended otherwise
        print(f"sandbox: free, at port {config['port']}", flush=True)
        guest, asked = Door(listener, bytes.fromhex(config["digest"])).let_in()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a session may go on for as long as the pod is let live
    with guest:
        serve(guest, config)
    return asked


def _leave(_number: int, _frame: object) -> NoReturn:
    os._exit(0)


# --- before a session ------------------------------------------------------------------------------------------


def _prepare(config: dict[str, Any]) -> None:
    for folder in [config["folder"], *config["others"]]:
        empty(folder)
    with suppress(OSError):
        shutil.copytree(config["fonts"], contained.WRITABLE_FONTS)


def empty(folder: str) -> None:
    """Delete what is in a folder, at any depth: it is walked step by step, so no path grows long and no stack deep."""
    at = os.open(folder, FOLDER)
    above: list[tuple[str, list[str]]] = []  # the way down, and what is left to see at each step
    left = _delete_files(at)
    while left or above:
        if left:
            name = left.pop()
            above.append((name, left))
            at = _step(at, name)
            left = _delete_files(at)
        else:
            at = _step(at, "..")
            name, left = above.pop()
            os.rmdir(name, dir_fd=at)
    os.close(at)


def _step(at: int, name: str) -> int:
    there = os.open(name, FOLDER, dir_fd=at)
    os.close(at)
    return there


def _delete_files(at: int) -> list[str]:
    """Delete all but folders. Returns the names of those, which can be looked into now."""
    folders = []
    for name in os.listdir(at):
        if stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            os.chmod(name, 0o700, dir_fd=at)
            folders.append(name)
        else:
            os.unlink(name, dir_fd=at)
    return folders


def listen(host: str, port: int) -> socket.socket:
    """Open the port. host: an address; `::` is all of both families."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    both = family == socket.AF_INET6 and host == "::"
    listener = socket.create_server(address, family=family, backlog=MOST_VISITORS, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


class Visitor:
    """Somebody at the door. leave_at: when it is sent away, on the monotonic clock; heard: whether it has said all."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.leave_at = time.monotonic() + GREETING_S
        self.heard = False
        self._said = bytearray(GREETING.size)
        self._size = 0

    def hear(self) -> bool:
        """Take what it says. Whether it is still there."""
        try:
            size = self.connection.recv_into(memoryview(self._said)[self._size :])
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._size += size
        self.heard = self._size == len(self._said)
        return size > 0

    def asks(self, digest: bytes) -> int | None:
        """What it asks for; None when its key is not the right one. The key is wiped."""
        magic, _wire, asked = ASKED.unpack_from(self._said)
        key = memoryview(self._said)[ASKED.size :]
        right = hmac.compare_digest(digest_of(key), digest)
        key[:] = bytes(len(key))
        return asked if right and magic == MAGIC else None

    def is_of_our_time(self) -> bool:
        """Whether it speaks as we do."""
        return self._said[len(MAGIC)] == WIRE


class Door:
    """Those who wait to be let in. digest: of the key that lets in."""

    def __init__(self, listener: socket.socket, digest: bytes) -> None:
        self._listener = listener
        self._digest = digest
        self._visitors: dict[int, Visitor] = {}

    def let_in(self) -> tuple[socket.socket, int]:
        """Wait for somebody who has the key and wants a session: its connection, and which it wants.

        The others are sent away with a reset: they were not refused, and may try the next pod at once.
        """
        while True:
            for fd, _ in self._poll().poll(self._patience_ms()):
                if fd == self._listener.fileno():
                    self._receive()
                elif guest := self._hear(self._visitors[fd]):
                    for visitor in list(self._visitors.values()):
                        visitor.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                        self._send_away(visitor)
                    return guest
            now = time.monotonic()
            for visitor in [visitor for visitor in self._visitors.values() if visitor.leave_at <= now]:
                self._send_away(visitor)

    def _poll(self) -> select.poll:
        poll = select.poll()
        if len(self._visitors) < MOST_VISITORS:
            poll.register(self._listener, select.POLLIN)
        for fd, visitor in self._visitors.items():
            if not visitor.heard:
                poll.register(fd, select.POLLIN)
        return poll

    def _patience_ms(self) -> int | None:
        if not self._visitors:
            return None
        next_at = min(visitor.leave_at for visitor in self._visitors.values())
        return max(0, math.ceil((next_at - time.monotonic()) * 1000))

    def _receive(self) -> None:
        with suppress(OSError):  # it has gone again
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._visitors[connection.fileno()] = Visitor(connection)

    def _hear(self, visitor: Visitor) -> tuple[socket.socket, int] | None:
        if not visitor.hear():
            self._send_away(visitor)
        elif visitor.heard:
            asked = visitor.asks(self._digest)
            if asked is None:
                visitor.leave_at = time.monotonic() + REFUSAL_S
                return None
            with suppress(OSError):
                visitor.connection.send(WELCOME.pack(MAGIC, WIRE, bounds()))
            if asked in (TRY, OPEN) and visitor.is_of_our_time():
                del self._visitors[visitor.connection.fileno()]
                return visitor.connection, asked
            self._send_away(visitor)
        return None

    def _send_away(self, visitor: Visitor) -> None:
        del self._visitors[visitor.connection.fileno()]
        visitor.connection.close()


def bounds(folder: Path = CGROUP) -> int:
    """What of the pod's limits can be seen from inside: MEMORY, CPUS, both or neither."""
    found = 0
    for bit, name, unbounded in (
        (MEMORY, "memory.max", "max"),
        (CPUS, "cpu.max", "max"),
        (MEMORY, "memory/memory.limit_in_bytes", "9223372036854771712"),
        (CPUS, "cpu/cpu.cfs_quota_us", "-1"),
    ):
        with suppress(OSError, IndexError):
            if (folder / name).read_text("ascii").split()[0] != unbounded:
                found |= bit
    return found


# --- a session -------------------------------------------------------------------------------------------------


def serve(guest: socket.socket, config: dict[str, Any]) -> None:
    """Give a session over this connection, and end it with it."""
    alive, lives = os.pipe()  # what the agent alone holds open tells of its end, whatever it dies of
    in_pod = os.getpid() == 1
    pid = os.fork()
    if pid == 0:
        _become_agent(guest.fileno(), lives, config, in_pod)
    os.close(lives)
    try:
        _look_on(guest, alive, time.monotonic() + config["most_s"])
        _end_all(pid)
    finally:
        os.close(alive)


def _become_agent(guest: int, lives: int, config: dict[str, Any], alone: bool) -> NoReturn:
    try:
        os.setsid()  # a signal to its process group must not reach beyond the pod
        wall.prctl(wall.PR_SET_PDEATHSIG, signal.SIGKILL)  # where there is no pod around it
        wall.keep_only(guest, lives)
        _limit_resources(config)
        wall.restrict_calls()
        filtered = partial(wall.restrict_calls, worker=True)
        agent.run(guest, guest, config["folder"], before_worker=filtered, silence_s=SILENCE_S, alone=alone)
    finally:
        os._exit(0)


def _limit_resources(config: dict[str, Any]) -> None:
    """What a container runtime gives without limits."""
    for kind, value in (
        (resource.RLIMIT_CORE, 1),  # 0 would not keep the machine's crash handler from being started
        (resource.RLIMIT_FSIZE, config["disk_bytes"]),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NICE, 0),
        (resource.RLIMIT_NOFILE, wall.OPEN_FILES),
        (resource.RLIMIT_NPROC, config["processes"]),
        (resource.RLIMIT_RTPRIO, 0),
        (resource.RLIMIT_SIGPENDING, 256),
    ):
        wall.lower_limit(kind, value)


def _look_on(guest: socket.socket, alive: int, end_at: float) -> None:
    """Until the agent has ended, or it is time to end it: the server has gone, or the session is too old."""
    poll = select.poll()
    poll.register(alive, 0)
    poll.register(guest, select.POLLRDHUP)
    happened = dict(poll.poll(max(0, end_at - time.monotonic()) * 1000))
    if guest.fileno() in happened and alive not in happened:
        poll.unregister(guest)
        poll.poll(LEAVE_S * 1000)


def _end_all(agent_pid: int) -> None:
    """Kill whatever is left in the pod, and wait until it is gone. Only its first process can do that at one stroke."""
    everything = -1 if os.getpid() == 1 else -agent_pid
    with suppress(ProcessLookupError):
        for _ in range(1000):
            os.kill(everything, signal.SIGKILL)
            time.sleep(0.002)
