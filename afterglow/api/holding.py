"""Held requests: an answer that waits until something has another status, or until the caller's time is over.

A request that waits owns a future and nothing else: it is woken by `House.events`, and what it then answers comes from
the announcement itself where the run was executed here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from afterglow.api.answers import house_of, reply
from afterglow.api.pages import query_choice, query_decimal
from afterglow.contracts import DELETED, Watch

SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,20})?")
PREFERRED = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?([0-9]{1,9})\"?\s*(?=$|[,;])", re.IGNORECASE)
# How long a client waits for an answer. The oldest Python releases do not say, nor do newer ones of openai-node when it
# was set for the whole client; a poll of theirs, or of one that says what cannot be read, is held for less than people
# set.
TIMEOUT_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
UNTOLD_HOLD_S = 8.0
AGAIN_MS = 5  # after a poll that was held: the next one is held as well


class Wait(NamedTuple):
    """How long, in seconds, and for what. known: until the status is another than this; else, until it is a stop.

    preferred: the `Prefer: wait=` that is honoured. held: whether the next poll may come at once.
    """

    seconds: float
    known: str | None = None
    preferred: int | None = None
    held: bool = False


class Seen(NamedTuple):
    """What was read. overdue_in_s: when it is to be read again, since time alone will have changed it by then."""

    answer: object
    status: str
    overdue_in_s: float = float("inf")


def read_wait(request: Request, statuses: Sequence[str]) -> Wait:
    """What a GET asks for by `wait` and `status`, by `Prefer`, or as a poll of an SDK's helper; else no waiting.

    statuses: those that may be named. Raises InvalidRequest.
    """
    settings, headers = house_of(request).settings, request.headers
    preferred = PREFERRED.search(",".join(headers.getlist("prefer")))
    patience_s = [float(text) / 2 for name in TIMEOUT_HEADERS if SECONDS.fullmatch(text := headers.get(name, ""))]
    if "wait" in request.query_params:
        preferred = None
        asked = query_decimal(request, "wait")
        seconds = min(settings.poll_hold_s if asked is None else asked, settings.poll_hold_max_s)
    elif preferred:
        seconds = min(float(preferred[1]), settings.poll_hold_max_s)
    elif headers.get("x-stainless-poll-helper", "").lower() == "true" and not _tried_before(headers):
        seconds = settings.poll_hold_s if patience_s else min(settings.poll_hold_s, UNTOLD_HOLD_S)
    else:
        return Wait(0)
    known = query_choice(request, "status", statuses)
    seconds = min([seconds, *patience_s])
    held = seconds > 0
    if request.app.draining:  # the run may end in what is left, but whoever asks is to go elsewhere soon
        seconds, held = min(seconds, settings.poll_after_ms / 1000), False
    return Wait(seconds, known, int(seconds) if preferred else None, held)


def _tried_before(headers: Mapping[str, str]) -> bool:
    """Whether the poll before this one was cut off: by something in between, perhaps, that has less patience."""
    return headers.get("x-stainless-retry-count", "0") != "0"


async def held(
    request: Request, wait: Wait, final: Collection[str], watch: Watch, read: Callable[[], Awaitable[Seen]]
) -> Response:
    """The answer once it is to be given. final: the statuses that no wait goes beyond."""
    seen = await _wait(request, wait, final, watch, read) if wait.seconds else await read()
    after_ms = AGAIN_MS if wait.held else house_of(request).settings.poll_after_ms
    headers = {"openai-poll-after-ms": str(after_ms)}
    if wait.preferred is not None:
        headers["preference-applied"] = f"wait={wait.preferred}"
    return reply(seen.answer, headers)


async def _wait(
    request: Request, wait: Wait, final: Collection[str], watch: Watch, read: Callable[[], Awaitable[Seen]]
) -> Seen:
    loop = asyncio.get_running_loop()
    end = loop.time() + wait.seconds

    def goes_on(status: str) -> bool:
        return status not in final and (status != "requires_action" if wait.known is None else status == wait.known)

    with house_of(request).metrics.held_polls.track_inprogress(), watch:
        seen = await read()  # after the watch began: what happens meanwhile is heard of
        async with while_connected(request.receive):
            while goes_on(seen.status):
                try:
                    left_s = max(end - loop.time(), 0)
                    news = await watch.next(seen.status, min(left_s, seen.overdue_in_s))
                except TimeoutError:
                    seen = await read()
                    if loop.time() >= end:
                        return seen
                    continue
                if news is None:
                    return await read()
                if news.status not in ("", DELETED) and goes_on(news.status):
                    seen = Seen(seen.answer, news.status)  # read again before it is answered
                elif news.text is not None:
                    return Seen(news.text, news.status)
                else:
                    seen = await read()
    return seen


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Ends what is done inside when the client leaves, with ClientDisconnect, or sends too much, with BodyTooLarge."""
    task = asyncio.current_task()
    assert task is not None
    gone = asyncio.ensure_future(_disconnected(receive))
    inside = True
    gone.add_done_callback(lambda _: task.cancel() if inside and not gone.cancelled() else None)
    try:
        yield
    except asyncio.CancelledError:
        if gone.done() and not task.uncancel():
            raise gone.exception() or ClientDisconnect from None
        raise
    finally:
        inside = False
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
