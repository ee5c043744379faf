"""The engine `remote`: a session is a pod elsewhere, reached by one connection that lasts as long as it does.

In the pod `guest/door.py` waits, with the packages imported. `sandbox_url` holds one address or more, with commas
between; a name may resolve to many pods, as a headless Kubernetes service does, and they are tried in random order. A
pod that has a session refuses the next, so one that lets us in is ours alone. No session is made ahead: pods are warm,
and those we held would be missing elsewhere.

What is sent is not encrypted with `tcp://` or `http://`: enough where nobody else listens, as in a cluster's own
network. `https://` is the same within TLS, whose certificate is checked; a proxy beside the pod, as of a service mesh,
ends it there.

The pod's manifest is the wall (`pod.py` says of what). Before the first session the attacks of `attacks.py` are tried
on one of the pods, which is free again afterwards. Where none can be reached, it is looked for again until there is.

A session ends with its connection, and both sides notice within seconds when the other is gone: a sign of life is asked
for every BEAT_S. To end one we close our side and wait for the pod to close its own, which is the last thing it does.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from afterglow.contracts import CodeSession, EngineStatus
from afterglow.errors import ConfigError, SandboxBusy, SandboxOff, SessionLost
from afterglow.sandbox import attacks
from afterglow.sandbox.guest.door import CPUS, GREETING, MAGIC, MEMORY, OPEN, TRY, WELCOME, WIRE, key_of
from afterglow.sandbox.pod import check_token
from afterglow.sandbox.session import Session
from afterglow.sandbox.settling import Settling
from afterglow.settings import Settings
from afterglow.telemetry import log

T = TypeVar("T")
Probe = Callable[[CodeSession, int, int], Awaitable[list[str]]]  # as in `docker.py`

CONNECT_S = 2.0
WELCOME_S = 4.0
FIND_S = 10.0  # for a pod that is free, of all there are
AGAIN_S = 0.2  # before all are asked once more: one may have been taken just as we came
START_S = 20.0
BEAT_S = 3.0
END_S = 4.0  # for a pod to close its side
LOOK_S = 5.0  # between two looks for sessions that are too old, or for pods where none was found
MB = 1 << 20
MANIFEST = "see deploy/kubernetes/sandbox.yaml."
# Attacks that take what a pod's manifest may leave unbounded, but get nowhere else.
UNBOUNDED = {
    "start too many processes": "The pods do not bound the processes of a session: set podPidsLimit of the kubelet.",
    "fill the disk": "The pods do not bound the size and number of files: give their volumes a size in memory.",
}
UNSEEN = {
    MEMORY: "The pods show no limit on the memory of a session: set resources.limits.memory.",
    CPUS: "The pods show no limit on its processor time: set resources.limits.cpu.",
}


class Place(NamedTuple):
    """Where pods are: one of the addresses in `sandbox_url`."""

    host: str
    port: int
    tls: bool

    @property
    def tls_name(self) -> str | None:
        """What its certificate must be for."""
        return self.host if self.tls else None


class Unusable(Exception):
    """No session can be had. reason, remedy: as in `EngineStatus`. final: looking again would not help."""

    def __init__(self, reason: str, remedy: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.final = final


NOBODY = "No sandbox host is free, or none is there.", f"Start some, or more: {MANIFEST}"
WRONG_TOKEN = "A sandbox host did not accept sandbox_token.", "Give the server and the sandbox hosts the same one."
NO_HOST = (
    "What answers at sandbox_url is no sandbox host, or of another release.",
    "Run `afterglow sandbox serve` there, of the same release as here.",
)


class Pod:
    """A pod that has let us in, and the session in it. taken_at: when it was given away, on the event loop's clock.

    line: the connection; kept beside the streams, which hold a copy of it, to see its end. bounds: of WELCOME.
    """

    session: Session

    def __init__(self, line: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.taken_at: float | None = None
        self.bounds = 0
        self._line = line
        self._ending: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self._ending is not None and self._ending.done()

    def kill(self) -> None:
        if self._ending is None:
            with suppress(OSError):  # the other side was first
                self._line.shutdown(socket.SHUT_WR)
            self._ending = asyncio.create_task(self._see_it_end())

    async def gone(self) -> None:
        self.kill()
        assert self._ending is not None
        await asyncio.wait([self._ending])

    async def _see_it_end(self) -> None:
        """Wait until the pod has closed its side: then nothing of the session is left."""
        self.writer.transport.abort()
        loop = asyncio.get_running_loop()
        try:
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(END_S):
                    while await loop.sock_recv(self._line, 65_536):
                        pass
        finally:
            self._line.close()


class RemoteEngine(Settling):
    """A `contracts.CodeEngine`. Raises ConfigError for settings that cannot be used."""

    def __init__(self, settings: Settings, probe: Probe = attacks.probe) -> None:
        super().__init__("remote")
        check_token(settings.sandbox_token)
        self._settings = settings
        self._places = places(settings.sandbox_url)
        self._probe = probe
        self._pods: set[Pod] = set()
        self._opening = 0
        self._hopeless = False  # whether another look would find the same
        self._tls = ssl.create_default_context() if any(place.tls for place in self._places) else None

    async def open(self) -> CodeSession:
        status = await self.settled()
        if status.state != "on":
            raise SandboxOff(f"{status.reason} {status.remedy}".rstrip())
        self._pods = {pod for pod in self._pods if not pod.ended}
        if len(self._pods) + self._opening >= self._settings.sandbox_sessions:
            raise SandboxBusy(f"As many sessions are open as may be: {self._settings.sandbox_sessions}.")
        self._opening += 1
        try:
            pod = await self._take()
        except Unusable as no:
            raise SandboxBusy(no.reason) from None
        except SessionLost as lost:
            raise SandboxBusy(f"The session did not start: {lost}") from None
        finally:
            self._opening -= 1
        return pod.session

    async def close(self) -> None:
        await self._end_tasks()
        await asyncio.gather(*(pod.session.close() for pod in self._pods))

    # --- starting

    async def _settle(self) -> None:
        await self._try_a_pod()
        self._spawn(self._look_after())

    async def _try_a_pod(self) -> None:
        """Learn the status from one pod."""
        try:
            limits = await self._probe_one()
        except (Unusable, SessionLost) as no:
            self._refuse(no if isinstance(no, Unusable) else Unusable(str(no), "Its own log may say more."))
        else:
            self._status = EngineStatus("on", "remote", unenforced=limits)
            log.info("code interpreter: remote at %s", self._settings.sandbox_url)
            for limit in limits:
                log.warning("code interpreter: %s", limit)

    def _refuse(self, no: Unusable) -> None:
        if no.reason != self._status.reason:
            log.warning("code interpreter: remote engine is off: %s %s", no.reason, no.remedy)
        self._status = EngineStatus("off", "remote", no.reason, no.remedy)
        self._hopeless = no.final

    async def _probe_one(self) -> tuple[str, ...]:
        """Returns what pods do not bound, in words. Raises Unusable, SessionLost."""
        pod = await self._make(TRY)
        try:
            succeeded = await self._probe(pod.session, self._settings.sandbox_processes, self._settings.sandbox_disk_mb)
        finally:
            await pod.session.close()
        if holes := [attack for attack in succeeded if attack not in UNBOUNDED]:
            raise Unusable(
                f"The wall of the pods does not hold: {'; '.join(holes)}.",
                f"Mend their manifest: {MANIFEST}",
                final=True,
            )
        unseen = [words for bit, words in UNSEEN.items() if not pod.bounds & bit]
        return *unseen, *(UNBOUNDED[attack] for attack in succeeded)

    # --- pods

    async def _take(self) -> Pod:
        pod = await self._await(self._spawn(self._make(OPEN)))
        pod.taken_at = asyncio.get_running_loop().time()
        return pod

    async def _make(self, asks: int) -> Pod:
        """A pod with a session that is ready. Raises Unusable, SessionLost."""
        settings = self._settings
        pod = await self._find(asks)
        pod.session = Session(
            pod.reader, pod.writer, kill=pod.kill, gone=pod.gone, output_kb=settings.cell_output_kb, beat_s=BEAT_S
        )
        self._pods.add(pod)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(pod.session.close)
            await pod.session.start(settings.sandbox_memory_mb * MB, settings.sandbox_processes, START_S)
            undo.pop_all()
        return pod

    async def _find(self, asks: int) -> Pod:
        """A pod that lets us in. Raises Unusable."""
        refusals = []
        with suppress(TimeoutError):
            async with asyncio.timeout(FIND_S):
                for pause_s in (0, AGAIN_S):
                    await asyncio.sleep(pause_s)
                    for place, family, address in await self._addresses():
                        try:
                            return await self._knock(place, family, address, asks)
                        except Unusable as no:
                            refusals.append(no)
                        except OSError:  # it has a session, or is gone; a TimeoutError, too
                            continue
                    if refusals:
                        break
        raise next(iter(refusals), Unusable(*NOBODY))

    async def _addresses(self) -> list[tuple[Place, int, Any]]:
        """All that there are now, in random order, each with its family."""
        loop = asyncio.get_running_loop()
        found: set[tuple[Place, int, Any]] = set()
        for place in self._places:
            with suppress(socket.gaierror):  # a service whose pods are all busy has no addresses
                for family, *_, address in await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM):
                    found.add((place, family, address))
        return random.sample(list(found), len(found))

    async def _knock(self, place: Place, family: int, address: Any, asks: int) -> Pod:
        """Connect and be let in. Raises Unusable, or OSError where another pod may."""
        async with AsyncExitStack() as undo:
            line = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            line.setblocking(False)
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().sock_connect(line, address)
                reader, writer = await asyncio.open_connection(
                    sock=line.dup(), ssl=self._tls if place.tls else None, server_hostname=place.tls_name
                )
            undo.callback(writer.transport.abort)
            writer.write(GREETING.pack(MAGIC, WIRE, asks, key_of(self._settings.sandbox_token)))
            pod = Pod(line, reader, writer)
            pod.bounds = await _welcome(reader)
            undo.pop_all()
        return pod

    # --- old sessions

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for pod in self._pods:
                if pod.taken_at is not None:
                    pod.session.end_if_old(pod.taken_at, self._settings.sandbox_ttl_s, self._settings.sandbox_idle_s)
            if self._status.state == "off" and not self._hopeless:
                await self._try_a_pod()


async def _welcome(reader: asyncio.StreamReader) -> int:
    """Wait for WELCOME. Returns what the pod bounds."""
    try:
        async with asyncio.timeout(WELCOME_S):
            magic, wire, bounds = WELCOME.unpack(await reader.readexactly(WELCOME.size))
    except asyncio.IncompleteReadError as short:
        raise Unusable(*(NO_HOST if short.partial else WRONG_TOKEN)) from None
    if magic != MAGIC or wire != WIRE:
        raise Unusable(*NO_HOST)
    return int(bounds)


def places(addresses: str) -> list[Place]:
    """Read `sandbox_url`. Raises ConfigError."""
    return [_place(address.strip()) for address in addresses.split(",")]


def _place(address: str) -> Place:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme not in ("tcp", "http", "https"):
        raise ConfigError(f"sandbox_url: expected tcp://HOST:PORT, http://… or https://…, got {address!r}.")
    return Place(host, port, parts.scheme == "https")
