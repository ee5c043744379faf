"""Server-sent events: a run's log, from a place to a stop, as it grows.

The stream owns nothing. A client that leaves changes nothing; several events that are ready together go out in one
write, as the bytes that were stored.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afterglow.api.holding import while_connected
from afterglow.contracts import House, Position, Stop
from afterglow.runs.transcript import DONE, KEEP_ALIVE, error_event

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or proxies would hold events back
]


class EventStream(Response):
    """What follows a place of a run's log, up to one of the stops that end it, then `done`."""

    def __init__(
        self,
        house: House,
        project: str,
        run_id: str,
        since: Position,
        *,
        first: bytes = b"",
        ends: Collection[Stop] = ("action", "end"),
    ) -> None:
        """first: events that are not in the log and come before it."""
        super().__init__()
        self._house = house
        self._project = project
        self._run_id = run_id
        self._since = since
        self._first = first
        self._ends = ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            async with while_connected(receive):
                with self._house.metrics.open_streams.track_inprogress():
                    await self._send_events(send)
        except ClientDisconnect:
            return

    async def _send_events(self, send: Send) -> None:
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async with aclosing(self._house.events.follow(self._project, self._run_id, self._since)) as batches:
            async for batch in batches:
                stopped = any(segment.stop in self._ends for segment in batch)
                body = b"".join([segment.data for segment in batch]) if batch else KEEP_ALIVE
                if stopped:
                    body += DONE
                await send({"type": "http.response.body", "body": body, "more_body": not stopped})
                if stopped:
                    return
        # Without it, a client would take what it has for the whole answer.
        gone = error_event("The server is stopping. The run goes on when it is back; read it then.")
        await send({"type": "http.response.body", "body": gone, "more_body": False})
