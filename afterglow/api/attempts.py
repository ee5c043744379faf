"""Which POSTs are being carried out in this process, which of them were answered, and which one a retry repeats.

A client that saw no answer sends its request again. With an `Idempotency-Key`, the key's row says what came of the
first attempt. Without one, SDKs count (`x-stainless-retry-count`), and a retry is given the result of an earlier
request only if that is the same in key, route and body, has a count exactly one less, was given to no other retry, is
recent, and was not answered to a caller who was still there: two equal messages sent on purpose must both arrive.
Whether the caller was still there is known here first; the column `answered` follows within a second.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from afterglow.contracts import House, Transaction
from afterglow.errors import Conflict, KeyReused, StoreError
from afterglow.rows import requests as rows
from afterglow.rows.requests import Claim, Origin, Result

RETRIED_WITHIN_S = 900  # SDKs give up on an answer after 600 s by default, and then try again
MARKS_LAG_S = 2  # by when other processes have written which requests were answered
CLAIM_LIFE_S = 60  # how long another process may be at work for a key, if nothing is heard of it

Outcome = Literal["answered", "lost", "failed"]
Fingerprint = tuple[str, str, str, str, int]


class Repeated(Exception):
    """This request was carried out before. Raised before anything is done; caught by `idempotency.once`.

    answer: status and body as they were, where they are kept.
    """

    def __init__(self, result: Result, answer: tuple[int, str] | None = None) -> None:
        super().__init__(result.object_id)
        self.result = result
        self.answer = answer


class Attempt:
    """One POST on its way. `outcome` is None until its answer begins: `lost` when nobody was there to hear it."""

    __slots__ = ("_book", "_waiting", "fingerprint", "origin", "outcome", "project")

    def __init__(self, book: Attempts, project: str, origin: Origin) -> None:
        self._book = book
        self.project = project
        self.origin = origin
        self.fingerprint = _fingerprint(project, origin)
        self.outcome: Outcome | None = None
        self._waiting: list[asyncio.Future[None]] = []

    def begin_answer(self, status: int, gone: bool) -> None:
        """gone: the caller hung up."""
        self._decide("failed" if status >= 400 else "lost" if gone else "answered")

    def end(self, gone: bool) -> None:
        """Everything was sent, or nothing more will be. A stream that its caller left was not answered after all."""
        if self.outcome == "answered" and gone:
            self._book.mark(self, answered=False)
        self._decide("failed")
        self._book.close(self)

    def _decide(self, outcome: Outcome) -> None:
        if self.outcome is not None:
            return
        self.outcome = outcome
        if outcome == "answered":
            self._book.mark(self, answered=True)
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def decided(self) -> None:
        """Return when the outcome is known."""
        if self.outcome is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future


class Attempts:
    """All attempts of this process."""

    def __init__(self) -> None:
        self._open: dict[Fingerprint, set[Attempt]] = {}
        self._open_ids: set[tuple[str, str]] = set()
        # (project, request id) of what was answered, or not after all; not in the database yet.
        self._marks: dict[tuple[str, str], bool] = {}
        self._marks_in_hand: dict[tuple[str, str], bool] = {}

    def open(self, project: str, origin: Origin) -> Attempt:
        attempt = Attempt(self, project, origin)
        self._open.setdefault(attempt.fingerprint, set()).add(attempt)
        self._open_ids.add((project, origin.id))
        return attempt

    async def admit(self, house: House, attempt: Attempt) -> None:
        """Return when a request is to be carried out. Raises Repeated when it was before; KeyReused; or Conflict while
        another with its key is."""
        if attempt.origin.key is not None:
            await self._claim(house, attempt.project, attempt.origin)
        elif attempt.origin.retry_count:
            await self._match(house, attempt.project, attempt.origin)

    def close(self, attempt: Attempt) -> None:
        same = self._open[attempt.fingerprint]
        same.discard(attempt)
        if not same:
            del self._open[attempt.fingerprint]
        self._open_ids.discard((attempt.project, attempt.origin.id))

    def mark(self, attempt: Attempt, *, answered: bool) -> None:
        if attempt.origin.key is None:  # what has a key needs no matching
            self._marks[attempt.project, attempt.origin.id] = answered

    async def flush(self, house: House) -> None:
        """Write the marks. What cannot be written is kept for the next time."""
        if not self._marks:
            return
        marks, self._marks = self._marks, {}
        self._marks_in_hand.update(marks)

        async def work(tx: Transaction) -> None:
            for (project, request_id), answered in marks.items():
                await rows.mark_answered(tx, project, request_id, answered)

        try:
            await house.store.write(work, rowwise=True)
        except StoreError:
            self._marks = {**marks, **self._marks}
        for name in marks:
            self._marks_in_hand.pop(name, None)

    # --- retries without a key -----------------------------------------------------------------------------------

    async def _match(self, house: House, project: str, origin: Origin) -> None:
        """Raises Repeated when an earlier request's result is this retry's."""
        before = origin._replace(retry_count=origin.retry_count - 1)
        for attempt in list(self._open.get(_fingerprint(project, before), ())):
            await attempt.decided()  # it is still being carried out: the client was impatient
        now = int(house.clock.now())
        for result in await self._unanswered(house, project, origin, now):

            async def work(tx: Transaction, result: Result = result) -> bool:
                return await rows.match_retry(tx, project, origin, result, now)

            if await house.store.write(work):
                raise Repeated(result)

    async def _unanswered(self, house: House, project: str, origin: Origin, now: int) -> list[Result]:
        """Requests that this one may repeat. Other processes are given time to write what they have answered."""

        async def work(tx: Transaction) -> list[Result]:
            return await rows.list_unanswered(tx, project, origin, now - RETRIED_WITHIN_S)

        await self.flush(house)
        found = await house.store.read(work)
        if found and house.settings.database_url and found[-1].created_at > now - MARKS_LAG_S:
            await asyncio.sleep(MARKS_LAG_S)
            found = await house.store.read(work)
        before = origin._replace(retry_count=origin.retry_count - 1)
        undecided = {one.origin.id for one in self._open.get(_fingerprint(project, before), ()) if one.outcome is None}
        return [one for one in found if one.request_id not in undecided and not self._marked(project, one.request_id)]

    def _marked(self, project: str, request_id: str) -> bool:
        name = (project, request_id)
        return self._marks.get(name) or self._marks_in_hand.get(name) or False

    # --- idempotency keys ----------------------------------------------------------------------------------------

    async def _claim(self, house: House, project: str, origin: Origin) -> None:
        """Take the key. Raises Repeated, KeyReused, or Conflict."""
        now = int(house.clock.now())
        claim = await house.store.write(lambda tx: rows.claim_key(tx, project, origin, now))
        if claim is not None and self._is_dead(house, project, origin, claim, now):
            dead_id = claim.result.request_id

            async def take_over(tx: Transaction) -> Claim | None:
                await rows.release_key(tx, project, dead_id)
                return await rows.claim_key(tx, project, origin, now)

            claim = await house.store.write(take_over)
        if claim is not None:
            raise _taken(claim, origin)

    def _is_dead(self, house: House, project: str, origin: Origin, claim: Claim, now: int) -> bool:
        """Whether a server stopped while it had this request in hand, and nothing came of it."""
        lives_until = claim.result.created_at + (CLAIM_LIFE_S if house.settings.database_url else 0)
        return (
            claim.answer is None
            and not claim.result.object_id
            and now >= lives_until
            and (project, claim.result.request_id) not in self._open_ids
            and (claim.route, claim.body_hash) == (origin.route, origin.body_hash)
        )


def _taken(claim: Claim, origin: Origin) -> Exception:
    if (claim.route, claim.body_hash) != (origin.route, origin.body_hash):
        return KeyReused()
    if claim.answer is None and not claim.result.object_id:
        return Conflict("A request with this idempotency key is being executed.", code="idempotency_key_in_use")
    return Repeated(claim.result, claim.answer)


def _fingerprint(project: str, origin: Origin) -> Fingerprint:
    return project, origin.key_id, origin.route, origin.body_hash, origin.retry_count
