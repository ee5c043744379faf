"""Server-sent events: a run's log, from a place to the next stop, as it grows.

The stream owns nothing. A client that leaves changes nothing; several events that are ready together go out in one
write, as the bytes that were stored.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afterglow.contracts import House
from afterglow.runs.lifecycle import Happened
from afterglow.runs.transcript import DONE, KEEP_ALIVE, error_event

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or proxies would hold events back
]


class EventStream(Response):
    """What follows `happened.since` of a run's log, up to requires_action or a terminal status, then `done`."""

    def __init__(self, house: House, happened: Happened, first: bytes = b"") -> None:
        """first: events that are not in the log and come before it."""
        super().__init__()
        self._house = house
        self._happened = happened
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        task = asyncio.current_task()
        gone = asyncio.ensure_future(_disconnected(receive))
        if task is not None:
            gone.add_done_callback(lambda _: task.cancel() if not gone.cancelled() else None)
        try:
            with self._house.metrics.open_streams.track_inprogress():
                await self._send_events(send)
        except asyncio.CancelledError:
            if task is None or not gone.done() or task.uncancel():
                raise
        finally:
            gone.cancel()

    async def _send_events(self, send: Send) -> None:
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        project, run, since = self._happened[:3]
        async with aclosing(self._house.events.follow(project, run.id, since)) as batches:
            async for batch in batches:
                stopped = bool(batch) and any(segment.stop for segment in batch)
                body = b"".join([segment.data for segment in batch]) if batch else KEEP_ALIVE
                if stopped:
                    body += DONE
                await send({"type": "http.response.body", "body": body, "more_body": not stopped})
                if stopped:
                    return
        # Without it, a client would take what it has for the whole answer.
        gone = error_event("The server is stopping. The run goes on when it is back; read it then.")
        await send({"type": "http.response.body", "body": gone, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
