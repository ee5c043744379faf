"""Words between processes: the one connection of a process that listens and notifies (Postgres' LISTEN and NOTIFY).

A word is a hint that something is worth looking at, such as a run's id. It is lost when the connection is, so whoever
must not miss anything looks by itself when the connection is back, and now and then.

Words leave by statements of their own, never in a transaction that writes rows: Postgres lets one transaction notify
at a time, from its NOTIFY to the end of its commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable

import asyncpg
import msgspec

CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 5.0
QUIET_S = 5.0  # after so long a silence the connection is tried: a dead network says nothing
PAUSE_S = 0.005  # between two statements; what is said meanwhile goes out together
FIRST_BACK_OFF_S = 0.1
LONGEST_BACK_OFF_S = 5.0
CLOSE_TIMEOUT_S = 2.0
PAYLOAD_BYTES = 7999
WORDS_WAITING = 20_000  # while there is no connection; more are dropped
NOTIFY = "SELECT pg_notify(channel, payload) FROM unnest($1::text[], $2::text[]) AS said (channel, payload)"
SETTINGS = {
    "application_name": "afterglow",
    "synchronous_commit": "off",  # a notification is not worth waiting for the disk, least of all under a global lock
}
# The third is what the driver says when a server that shuts down has had the last word on a quiet connection.
FAULTS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)

Listener = Callable[[list[str]], None]

log = logging.getLogger("afterglow.store")


class Notifier:
    """Listens to channels, and says words on them, through any number of lost connections. No call waits for it."""

    def __init__(self, url: str) -> None:
        """url: a direct connection, since a pooler that hands out sessions by transaction takes LISTEN away again."""
        self._url = url
        self._listeners: dict[str, Listener] = {}
        self._returned: list[Callable[[], None]] = []
        self._waiting: dict[tuple[str, str], None] = {}
        self._stirred = asyncio.Event()
        self._connected = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def listen(self, channel: str, listener: Listener) -> None:
        """Call `listener` with the words that other processes say on `channel`. Before `start`; one for each."""
        self._listeners[channel] = listener

    def on_return(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each time a connection was made: whatever was said before may have been missed."""
        self._returned.append(listener)

    def start(self) -> None:
        """Begin to connect; what is said before there is a connection waits for it."""
        self._task = asyncio.create_task(self._stay_connected())

    async def connected(self) -> None:
        """Return when there is a connection that listens."""
        await self._connected.wait()

    def notify(self, channel: str, word: str) -> None:
        """Say `word` to all other processes that listen to `channel`, once if it is said several times together."""
        if len(self._waiting) < WORDS_WAITING:
            self._waiting[channel, word] = None
            self._stirred.set()

    async def close(self) -> None:
        """Say what still waits, if there is a connection, and let go of it."""
        self._closing = True
        self._stirred.set()
        if self._task is None:
            return
        if not self._connected.is_set():
            self._task.cancel()
        await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT_S)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _stay_connected(self) -> None:
        back_off_s = FIRST_BACK_OFF_S
        while not self._closing:
            try:
                connection = await asyncpg.connect(
                    self._url, timeout=CONNECT_TIMEOUT_S, command_timeout=STATEMENT_TIMEOUT_S, server_settings=SETTINGS
                )
                try:
                    await self._listen_on(connection)
                    back_off_s = FIRST_BACK_OFF_S
                    await self._say_on(connection)
                    await connection.close(timeout=CLOSE_TIMEOUT_S)
                finally:
                    self._connected.clear()
                    connection.terminate()
            except FAULTS as error:
                if back_off_s == FIRST_BACK_OFF_S:
                    log.warning("The connection that listens for other processes is made again: %s", error)
                await asyncio.sleep(back_off_s * random.uniform(0.5, 1.0))  # noqa: S311  not all at the same moment
                back_off_s = min(back_off_s * 2, LONGEST_BACK_OFF_S)

    async def _listen_on(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        connection.add_termination_listener(lambda _: self._stirred.set())
        own = connection.get_server_pid()

        def hear(_: object, process: int, channel: str, payload: object) -> None:
            if process != own:
                self._listeners[channel](msgspec.json.decode(str(payload), type=list[str]))

        for channel in self._listeners:
            await connection.add_listener(channel, hear)
        self._connected.set()
        for listener in self._returned:
            listener()

    async def _say_on(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Say what there is to say until the end, or until the connection is lost."""
        while self._waiting or not self._closing:
            if not self._waiting:
                await self._wait()
            self._stirred.clear()
            words, self._waiting = self._waiting, {}
            try:
                if words:
                    await connection.execute(NOTIFY, *packed(words))
                else:
                    await connection.execute("SELECT 1")
            except FAULTS:
                self._waiting = words | self._waiting
                raise
            await asyncio.sleep(PAUSE_S)

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUIET_S):
                await self._stirred.wait()


def packed(words: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(channel, word) pairs as channels and payloads: JSON lists, each as long as Postgres takes."""
    lists: list[tuple[str, bytearray]] = []
    open_lists: dict[str, bytearray] = {}
    for channel, word in words:
        item = msgspec.json.encode(word)
        payload = open_lists.get(channel)
        if payload is None or len(payload) + 1 + len(item) + 1 > PAYLOAD_BYTES:
            payload = open_lists[channel] = bytearray(b"[" + item)
            lists.append((channel, payload))
        else:
            payload += b"," + item
    return [channel for channel, _ in lists], [(payload + b"]").decode() for _, payload in lists]
