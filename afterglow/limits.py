"""How much may be done in a minute: token buckets for projects and keys, and what callers are told of them.

A bucket holds a minute's worth when it is full, and fills evenly: after a pause a whole minute's worth may come at
once. Requests and polls are paid for before they are answered. Tokens are paid for when the model server has reported
them, so a bucket of tokens may be overdrawn; then no run is created until it has recovered. Pure: whoever asks says
what time it is. How processes share their counts, and what may be there at once, is in `quotas.py`.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

from afterglow.errors import TooManyRequests
from afterglow.objects import Limits

RateKind = Literal["requests", "polls", "tokens"]
Rate = tuple[str, str, RateKind]  # (project, key id or "", what is counted)
MINUTE_S = 60.0
LONGEST_WAIT_S = 24 * 3600.0
MAX_BUCKETS = 100_000
PER_MINUTE: dict[RateKind, str] = {"requests": "RPM", "polls": "polls", "tokens": "TPM"}
# Asked again and again until something is over; `X-Stainless-Poll-Helper` would miss loops written by hand.
POLL = re.compile(r"/(?:threads/[^/]+/runs|vector_stores|files|file_batches)/[^/]+$")
NEW_RUN = re.compile(r"/threads/(?:[^/]+/)?runs$")


class Holder(NamedTuple):
    """Whom limits are set for: a project, or one key in it. key_id: empty for the project as a whole."""

    project: str
    key_id: str
    limits: Limits


class _Bucket:
    """level: what is left, at the time `at`."""

    __slots__ = ("at", "level", "limit")

    def __init__(self, limit: float, now: float) -> None:
        self.limit = self.level = float(limit)
        self.at = now

    def refill(self, limit: float, now: float) -> None:
        self.limit = limit
        self.level = filled(self.level, limit, now - self.at)
        self.at = max(self.at, now)

    def is_full(self, now: float) -> bool:
        return filled(self.level, self.limit, now - self.at) >= self.limit

    def wait_s(self, amount: float) -> float:
        """How long until so much is in it."""
        if amount <= self.level:
            return 0.0
        return min((amount - self.level) * MINUTE_S / self.limit, LONGEST_WAIT_S) if self.limit else LONGEST_WAIT_S


def filled(level: float, limit: float, passed_s: float) -> float:
    """What is in a bucket after a while in which nothing was taken."""
    return min(limit, level + max(passed_s, 0.0) * limit / MINUTE_S)


class Limiter:
    """All buckets of this process."""

    def __init__(self, *, shared: bool = False) -> None:
        """shared: other processes serve the same projects; what is taken is noted for them."""
        self._shared = shared
        self._holders: dict[tuple[str, str], tuple[Holder, ...]] = {}
        self._buckets: dict[Rate, _Bucket] = {}
        self._unshared: dict[Rate, float] = {}

    def believe(self, project: str, key_id: str, *holders: Holder) -> None:
        """What has limits where this key is used in this project; from now on these hold."""
        limited = tuple(holder for holder in holders if holder.limits != Limits())
        if limited:
            if len(self._holders) >= MAX_BUCKETS:
                self._holders.clear()
            self._holders[project, key_id] = limited
        else:
            self._holders.pop((project, key_id), None)

    def holders(self, project: str, key_id: str) -> tuple[Holder, ...]:
        """Those with limits, as last believed."""
        return self._holders.get((project, key_id), ())

    def admit(self, project: str, key_id: str, method: str, path: str, now: float) -> dict[str, str]:
        """Let a request pass and pay for it; return the headers that tell what is left. Raises TooManyRequests, and
        then nothing is paid. Nothing is looked at where there are no limits."""
        holders = self._holders.get((project, key_id))
        if not holders:
            return {}
        kind: RateKind = "polls" if method == "GET" and POLL.search(path) else "requests"
        counted = self._in_use(holders, kind, now)
        tokens = self._in_use(holders, "tokens", now)
        for rate, bucket in counted:
            if bucket.level < 1:
                raise _refusal(rate, bucket, 1, _headers(counted, tokens))
        if method == "POST" and tokens and NEW_RUN.search(path):
            for rate, bucket in tokens:
                if bucket.level <= 0:
                    raise _refusal(rate, bucket, 1, _headers(counted, tokens))
        for rate, bucket in counted:
            bucket.level -= 1
            self._note(rate, 1)
        return _headers(counted, tokens)

    def _in_use(self, holders: tuple[Holder, ...], kind: RateKind, now: float) -> list[tuple[Rate, _Bucket]]:
        found = []
        for holder in holders:
            limit = getattr(holder.limits, f"{kind}_per_minute")
            if limit is None:
                continue
            rate: Rate = (holder.project, holder.key_id, kind)
            bucket = self._buckets.get(rate)
            if bucket is None:
                bucket = self._add(rate, limit, now)
            bucket.refill(limit, now)
            self._note(rate, 0)
            found.append((rate, bucket))
        return found

    def _add(self, rate: Rate, limit: float, now: float) -> _Bucket:
        if len(self._buckets) >= MAX_BUCKETS:
            self._buckets = {other: bucket for other, bucket in self._buckets.items() if not bucket.is_full(now)}
        bucket = self._buckets[rate] = _Bucket(limit, now)
        return bucket

    def spend(self, project: str, key_id: str, tokens: float, now: float) -> None:
        """Pay for tokens that a model server has reported."""
        for holder in dict.fromkeys(("", key_id)):
            rate: Rate = (project, holder, "tokens")
            if bucket := self._buckets.get(rate):
                bucket.refill(bucket.limit, now)
                bucket.level -= tokens
            self._note(rate, tokens)

    # --- with other processes ----------------------------------------------------------------------------------

    def _note(self, rate: Rate, amount: float) -> None:
        if self._shared:
            self._unshared[rate] = self._unshared.get(rate, 0) + amount

    def take_unshared(self) -> dict[Rate, float]:
        """What was taken, or only looked at (0), since this was last asked."""
        unshared, self._unshared = self._unshared, {}
        return unshared

    def put_back(self, unshared: dict[Rate, float]) -> None:
        """It could not be told to the others."""
        for rate, amount in unshared.items():
            self._note(rate, amount)

    def adopt(self, rate: Rate, level: float, at: float) -> None:
        """What all processes together have left in a bucket, if it is in use here."""
        if bucket := self._buckets.get(rate):
            bucket.level, bucket.at = level - self._unshared.get(rate, 0), at


def _refusal(rate: Rate, bucket: _Bucket, amount: float, headers: dict[str, str]) -> TooManyRequests:
    project, key_id, kind = rate
    wait_s = bucket.wait_s(amount)
    where = f"for the key {key_id} in project {project}" if key_id else f"in project {project}"
    error = TooManyRequests(
        f"Rate limit reached {where} on {kind} per min ({PER_MINUTE[kind]}): Limit {bucket.limit:.0f}, "
        f"Used {bucket.limit - bucket.level:.0f}. Please try again in {duration(wait_s)}.",
        "tokens" if kind == "tokens" else "requests",
        retry_after_s=wait_s,
    )
    error.headers |= headers
    return error


def _headers(counted: list[tuple[Rate, _Bucket]], tokens: list[tuple[Rate, _Bucket]]) -> dict[str, str]:
    """Of several limits the one is told of which least is left."""
    headers: dict[str, str] = {}
    for name, buckets in (("requests", counted), ("tokens", tokens)):
        if buckets:
            bucket = min((bucket for _, bucket in buckets), key=lambda bucket: bucket.level)
            headers[f"x-ratelimit-limit-{name}"] = f"{bucket.limit:.0f}"
            headers[f"x-ratelimit-remaining-{name}"] = str(max(math.floor(bucket.level), 0))
            headers[f"x-ratelimit-reset-{name}"] = duration(bucket.wait_s(bucket.limit))
    return headers


def duration(seconds: float) -> str:
    """As the original writes times in its headers: `12ms`, `1.5s`, `6m0s`, `1h0m0s`. Rounded up."""
    ms = math.ceil(round(seconds * 1000, 6))
    if ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text
