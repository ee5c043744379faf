"""What a project or a key may have at once or in a day: active runs, bytes of files, minutes of the sandbox. And how
processes that share a Postgres share what is left of a minute (`limits.py`).

What is counted and then added to is so in one transaction that writes the project's row; where nothing is limited,
nothing is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Literal

from afterglow.contracts import House, Transaction
from afterglow.errors import SandboxOff, StoreError, TooManyRequests
from afterglow.limits import Holder, Rate, filled
from afterglow.objects import DAY_S
from afterglow.rows import quotas
from afterglow.rows.keys import get_key_limits
from afterglow.rows.projects import get_project_settings, touch_project
from afterglow.rows.runs import RunRow

MEGABYTE = 1024 * 1024
RUN_RETRY_S = 1.0


def _named(holder: Holder) -> str:
    return f"the key {holder.key_id}" if holder.key_id else f"project {holder.project}"


def _limited(
    house: House, project: str, key_id: str, name: Literal["concurrent_runs", "storage_mb"]
) -> list[tuple[Holder, int]]:
    """Who has this limit, and how much it is."""
    holders = house.limits.holders(project, key_id)
    return [(holder, limit) for holder in holders if (limit := getattr(holder.limits, name)) is not None]


# --- runs ------------------------------------------------------------------------------------------------------


async def check_active_runs(tx: Transaction, house: House, project: str, key_id: str) -> None:
    """In the transaction that creates a run. Raises TooManyRequests."""
    limited = _limited(house, project, key_id, "concurrent_runs")
    if limited:
        await touch_project(tx, project)
    for holder, limit in limited:
        active = await quotas.count_active_runs(tx, project, holder.key_id)
        if active >= limit:
            raise TooManyRequests(
                f"Rate limit reached for {_named(holder)} on runs active at once: Limit {limit}, Used {active}. "
                "Please try again when one has ended.",
                "requests",
                retry_after_s=RUN_RETRY_S,
            )


# --- files -----------------------------------------------------------------------------------------------------


async def check_storage(tx: Transaction, house: House, project: str, key_id: str, added_bytes: int) -> None:
    """In the transaction that stores a file or a part. Raises TooManyRequests, which tells SDKs not to try again."""
    limited = _limited(house, project, key_id, "storage_mb")
    if limited:
        await touch_project(tx, project)
        await quotas.fill_in_sizes(tx, project)
    for holder, limit in limited:
        if await quotas.sum_file_bytes(tx, project, holder.key_id) + added_bytes > limit * MEGABYTE:
            raise TooManyRequests(
                f"You exceeded your current quota: the files of {_named(holder)} may have {limit} MB together. Delete "
                "some, or ask the operator for more.",
                "insufficient_quota",
                code="insufficient_quota",
            )


async def storage_left(house: House, row: RunRow) -> int | None:
    """Bytes of files that the code of a run may still leave in its project; None: nobody counts them."""

    async def work(tx: Transaction) -> int | None:
        limit = (await get_project_settings(tx, row.project)).limits.storage_mb
        if limit is None:
            return None
        return max(limit * MEGABYTE - await quotas.sum_file_bytes(tx, row.project), 0)

    return await house.store.read(work)


# --- the code interpreter --------------------------------------------------------------------------------------


async def _limits_of(tx: Transaction, project: str, key_id: str) -> list[Holder]:
    """As the database has them: workers know no callers."""
    holders = [Holder(project, "", (await get_project_settings(tx, project)).limits)]
    return [*holders, Holder(project, key_id, await get_key_limits(tx, key_id))] if key_id else holders


async def check_sandbox(house: House, row: RunRow) -> None:
    """Before code is run. Raises SandboxOff, which the model is told; the run goes on."""
    day = _today(house)

    async def work(tx: Transaction) -> tuple[Holder, int] | None:
        for holder in await _limits_of(tx, row.project, row.key_id):
            limit = holder.limits.sandbox_minutes_per_day
            if limit is None:
                continue
            if await quotas.get_sandbox_seconds(tx, row.project, holder.key_id, day) >= limit * 60:
                return holder, limit
        return None

    if used_up := await house.store.read(work):
        holder, limit = used_up
        raise SandboxOff(
            f"The {limit} minutes of code that {_named(holder)} may run in a day are used up; there are more from "
            "midnight UTC on."
        )


async def note_sandbox(house: House, row: RunRow, seconds: float) -> None:
    """After code has run for so long."""
    day = _today(house)

    async def limited(tx: Transaction) -> list[str]:
        holders = await _limits_of(tx, row.project, row.key_id)
        return [holder.key_id for holder in holders if holder.limits.sandbox_minutes_per_day is not None]

    async def add(tx: Transaction) -> None:
        for key_id in key_ids:
            await quotas.add_sandbox_seconds(tx, row.project, key_id, day, seconds)

    with contextlib.suppress(StoreError):  # a call that is not counted harms nobody
        if key_ids := await house.store.read(limited):
            await house.store.write(add)


def _today(house: House) -> int:
    return int(house.clock.now() // DAY_S)


# --- between processes -----------------------------------------------------------------------------------------


async def share_rates(house: House) -> None:
    """Add what was taken here from buckets to what all have taken, and learn what is left. Called every second: in it,
    each process can let pass what it had left."""
    unshared = house.limits.take_unshared()
    if not unshared:
        return
    try:
        limits = await house.store.read(lambda tx: _limits_by_rate(tx, unshared))
        if not limits:
            return
        now = house.clock.now()
        levels = await house.store.write(lambda tx: _settle(tx, limits, unshared, now))
    except StoreError:
        house.limits.put_back(unshared)
        return
    for rate, level in levels.items():
        house.limits.adopt(rate, level, now)


async def _limits_by_rate(tx: Transaction, rates: Iterable[Rate]) -> dict[Rate, int]:
    """Of those rates that have one."""
    found: dict[Rate, int] = {}
    for rate in sorted(rates):
        project, key_id, kind = rate
        own = await get_key_limits(tx, key_id) if key_id else (await get_project_settings(tx, project)).limits
        limit = getattr(own, f"{kind}_per_minute")
        if limit is not None:
            found[rate] = limit
    return found


async def _settle(tx: Transaction, limits: dict[Rate, int], taken: dict[Rate, float], now: float) -> dict[Rate, float]:
    levels: dict[Rate, float] = {}
    for rate, limit in limits.items():
        known = await quotas.get_rate(tx, *rate)
        level = filled(known[0], limit, now - known[1]) if known else float(limit)
        levels[rate] = level - taken[rate]
        if known is None or taken[rate]:
            await quotas.set_rate(tx, *rate, levels[rate], max(now, known[1]) if known else now)
    return levels
