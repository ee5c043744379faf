"""Who sends webhooks: claims, tries, waits, as `runs/worker.py` does it for runs.

A delivery's row that is pending is the job. A claim gives it to one worker for as long as a try can take, and counts;
only the newest claim may write how its try went. A worker that dies in between is not heard of, and the delivery is
due again: it may have been sent, so receivers tell by its id whether they know it already. Order is not promised.

A target that hangs holds up nobody else: few deliveries to one endpoint are in hand at a time, and many in all.
Waits are those that the Standard Webhooks specification recommends, about three days together.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NamedTuple

import msgspec

from afterglow import telemetry
from afterglow.contracts import House, Transaction
from afterglow.errors import InvalidRequest, OutboundFailed, StoreError
from afterglow.ids import new_id
from afterglow.objects import DAY_S, WebhookDelivery, WebhookEvent, WebhookTestResult, WebhookTry
from afterglow.rows import webhooks as rows
from afterglow.rows.webhooks import Claim, EndpointRow
from afterglow.signing import signed_headers
from afterglow.telemetry import log
from afterglow.webhooks import new_delivery, no_endpoint, sample_data

MAX_AT_ONCE = 512
MAX_OF_ONE = 8
CLAIM_LIMIT = 64
POLL_S = 1.0  # how long a lost wake-up, or a delivery whose wait is over, can go unnoticed
STORE_RETRY_S = 1.0
GRACE_S = 20.0  # beyond a try's time, before the delivery is taken for abandoned
WAITS_S = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
JITTER = 0.2
LONGEST_ASKED_S = DAY_S  # a target may ask for a longer wait than its turn's, and for no longer one
IS_DISABLED = "The endpoint is disabled."
SORRY = "Sorry, something went wrong."


class Outcome(NamedTuple):
    """How a try went. final: another one would go no better. gone: the target wants no more, ever. wait_s: what it
    asked for."""

    tried: WebhookTry
    final: bool = False
    gone: bool = False
    wait_s: float = 0


class Job(NamedTuple):
    """A delivery in hand. row: None when the endpoint is gone."""

    claim: Claim
    row: EndpointRow | None


class Deliveries:
    """Sends what is due, to up to MAX_AT_ONCE targets at a time."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._id = new_id("worker")
        self._tasks: dict[asyncio.Task[None], Claim] = {}
        self._draining = False
        self._claiming: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._claiming = asyncio.create_task(self._claim_forever())

    async def drain(self) -> None:
        """Claim nothing more, and wait until nothing is in hand here."""
        self._draining = True
        self._house.webhook_queue.wake()
        if self._claiming is not None:
            await self._claiming
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Let go of everything; it is sent elsewhere at once, or at the next start."""
        claims = list(self._tasks.values())
        tasks = [*self._tasks, *([self._claiming] if self._claiming else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not claims:
            return

        async def work(tx: Transaction) -> None:
            await rows.put_back(tx, claims, self._house.clock.now())

        with contextlib.suppress(StoreError):
            await self._house.store.write(work, rowwise=True)

    async def _claim_forever(self) -> None:
        while not self._draining:
            try:
                claimed = await self._claim()
            except StoreError as error:
                log.error("No webhook can be delivered: %s", error)
                await asyncio.sleep(STORE_RETRY_S)
                continue
            if not claimed:
                await self._house.webhook_queue.wait(POLL_S)

    async def _claim(self) -> bool:
        free = min(MAX_AT_ONCE - len(self._tasks), CLAIM_LIMIT)
        if free <= 0:
            return False
        now = self._house.clock.now()
        until = now + self._house.settings.webhook_timeout_s + GRACE_S
        in_hand = Counter(claim.delivery.webhook_endpoint_id for claim in self._tasks.values())

        async def work(tx: Transaction) -> list[Job]:
            claims = await rows.claim_deliveries(tx, self._id, now, until, free, in_hand, MAX_OF_ONE)
            places = dict.fromkeys((claim.project, claim.delivery.webhook_endpoint_id) for claim in claims)
            endpoints = {place: await rows.get_endpoint(tx, *place) for place in places}
            return [Job(claim, endpoints[claim.project, claim.delivery.webhook_endpoint_id]) for claim in claims]

        jobs = await self._house.store.write(work)
        for job in jobs:
            task = asyncio.create_task(self._deliver(job))
            self._tasks[task] = job.claim
            task.add_done_callback(self._forget)
        return bool(jobs)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._house.webhook_queue.wake()  # there is room again

    async def _deliver(self, job: Job) -> None:
        """The edge: whatever goes wrong with a delivery ends here, with the delivery written or left to its lease."""
        telemetry.subject.set(job.claim.delivery.id)
        try:
            outcome = await self._try(job)
            await close(self._house, job.claim, outcome)
        except StoreError as error:
            log.error("How delivery %s went was not written: %s", job.claim.delivery.id, error)
        except Exception:  # noqa: BLE001  this is the edge: others must go on, whatever it was
            log.exception("Delivery %s failed by a fault of ours.", job.claim.delivery.id)

    async def _try(self, job: Job) -> Outcome | None:
        """None when there is nobody to be told any more."""
        event = job.claim.delivery.event
        if job.row is None or event is None:
            return None
        if job.row.endpoint.status == "disabled":
            now = int(self._house.clock.now())
            return Outcome(WebhookTry(at=now, duration_ms=0, error=IS_DISABLED), final=True)
        return await send(self._house, job.row, event)


async def send(house: House, row: EndpointRow, event: WebhookEvent) -> Outcome:
    """Send an event to an endpoint, once."""
    now, began = int(house.clock.now()), time.monotonic()
    body = msgspec.json.encode(event)
    old_secret = row.old_secret if (row.old_secret_until or 0) > now else None
    headers = {
        "content-type": "application/json",
        **signed_headers(row.secret, event.id, now, body, old_secret=old_secret),
    }
    try:
        reply = await house.outbound.post(
            row.endpoint.url,
            headers,
            body,
            timeout_s=house.settings.webhook_timeout_s,
            max_bytes=0,
            allow_private=house.settings.private_webhooks,
        )
    except OutboundFailed as error:
        return Outcome(WebhookTry(at=now, duration_ms=_since(began), error=str(error)), final=error.forbidden)
    tried = WebhookTry(
        at=now, duration_ms=_since(began), status_code=reply.status, error=_what_is_wrong_with(reply.status)
    )
    gone = reply.status == HTTPStatus.GONE
    return Outcome(tried, final=gone, gone=gone, wait_s=asked_wait_s(reply.headers.get("retry-after", ""), now))


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)


def _what_is_wrong_with(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"It answered {status}, a redirect, and those are not followed."
    return f"It answered {status}."


def asked_wait_s(retry_after: str, now: float) -> float:
    """What a Retry-After header asks for, seconds or a date; 0 when it makes no sense."""
    if retry_after.isascii() and retry_after.isdigit():
        return min(int(retry_after[:9]), LONGEST_ASKED_S)
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0
    return min(max(until.replace(tzinfo=until.tzinfo or UTC).timestamp() - now, 0), LONGEST_ASKED_S)


def settle(delivery: WebhookDelivery, failures: int, outcome: Outcome, now: float) -> float | None:
    """Write a try into its delivery; return when the next is due, if there is to be one. failures: of earlier ones."""
    delivery.tries = [*delivery.tries, outcome.tried]
    delivery.next_try_at = None
    if outcome.tried.error is None:
        delivery.status = "delivered"
        return None
    if outcome.final or failures >= len(WAITS_S):
        delivery.status = "failed"
        return None
    wait_s = max(WAITS_S[failures], outcome.wait_s) * random.uniform(1, 1 + JITTER)  # noqa: S311  no two at a time
    delivery.next_try_at = int(now + wait_s)
    return now + wait_s


async def close(house: House, claim: Claim, outcome: Outcome | None) -> None:
    """Write how the try of a claim went, unless the delivery is no longer the claim's."""
    now = house.clock.now()
    endpoint_id = claim.delivery.webhook_endpoint_id
    delivery = msgspec.structs.replace(claim.delivery)
    due_at = settle(delivery, claim.failures, outcome, now) if outcome else None

    async def work(tx: Transaction) -> None:
        if outcome is None:
            await rows.delete_delivery(tx, claim)
        elif await rows.close_claim(tx, claim, delivery, due_at) and outcome.gone:
            await _disable(tx, claim.project, endpoint_id, int(now))

    await house.store.write(work)
    if outcome is not None:
        house.metrics.webhook_tries.labels("again" if delivery.status == "pending" else delivery.status).inc()
        log.info("Delivery %s to %s: %s.", delivery.id, endpoint_id, outcome.tried.status_code or "no answer")


async def _disable(tx: Transaction, project: str, endpoint_id: str, now: int) -> None:
    row = await rows.get_endpoint(tx, project, endpoint_id)
    if row is not None and row.endpoint.status == "enabled":
        row.endpoint.status, row.endpoint.updated_at = "disabled", now
        row.endpoint.disabled_reason = "It answered 410: it is gone."
        await rows.update_endpoint(tx, project, row)


# --- tests -----------------------------------------------------------------------------------------------------


async def send_test(house: House, project: str, endpoint_id: str, event_type: str) -> WebhookTestResult:
    """Send an event that tells of nothing, now and once, also to an endpoint that is disabled; the log shows it.

    Raises InvalidRequest, saying why, when there was no answer.
    """
    now = house.clock.now()
    event = WebhookEvent(id=new_id("evt"), created_at=int(now), type=event_type, data=sample_data(event_type))
    claim = Claim(project, 1, 0, new_delivery(endpoint_id, event, now))
    until = now + house.settings.webhook_timeout_s + GRACE_S

    async def work(tx: Transaction) -> EndpointRow:
        row = await rows.get_endpoint(tx, project, endpoint_id)
        if row is None:
            raise no_endpoint(endpoint_id)
        await rows.insert_delivery(tx, project, claim.delivery, "", round(now * 1_000_000), until)
        await rows.take_delivery(tx, claim, new_id("test"), until)
        return row

    outcome = await send(house, await house.store.write(work), event)
    await close(house, claim, outcome._replace(final=True))
    if outcome.tried.status_code is None:
        raise InvalidRequest(outcome.tried.error or SORRY)
    return WebhookTestResult(
        webhook_endpoint_id=endpoint_id, event_type=event_type, status_code=outcome.tried.status_code
    )
