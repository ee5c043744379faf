"""Rows of `spend` and `spend_tags`: what model calls have used and cost, for bills and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from afterglow.contracts import SqlValue, Transaction
from afterglow.objects import DAY_S, Usage
from afterglow.rows.model_calls import ModelCall
from afterglow.rows.runs import RunRow

COUNTS = (
    "calls",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cost",
    "unpriced_tokens",
)
_INSERT = (
    "INSERT INTO spend (project_id, day, run_id, model, currency, thread_id, assistant_id, "
    + ", ".join(COUNTS)
    + ") VALUES ($1, $2, $3, $4, $5, $6, $7, 1, $8, $9, $10, $11, $12, $13)"
    " ON CONFLICT (project_id, day, run_id, model, currency) DO UPDATE SET "
    + ", ".join(f"{name} = spend.{name} + excluded.{name}" for name in COUNTS)
)


class Amount(NamedTuple):
    """Tokens, prompt and completion together, and money in billionths."""

    tokens: int
    nanos: int

    def plus(self, other: Amount) -> Amount:
        return Amount(self.tokens + other.tokens, self.nanos + other.nanos)


NOTHING = Amount(0, 0)


async def record_spend(tx: Transaction, row: RunRow, call: ModelCall, usage: Usage) -> None:
    """One more call of a run, and the run's metadata as it is now."""
    project, run = row.project, row.run
    await tx.execute(
        _INSERT,
        project,
        call.created_at // DAY_S,
        run.id,
        call.model_asked,
        call.currency,
        run.thread_id,
        run.assistant_id,
        usage.prompt_tokens,
        usage.prompt_token_details.cached_tokens,
        usage.completion_tokens,
        usage.completion_tokens_details.reasoning_tokens,
        call.cost or 0,
        call.unpriced_tokens,
    )
    if run.metadata:
        await tx.execute("DELETE FROM spend_tags WHERE project_id = $1 AND run_id = $2", project, run.id)
        for key, value in run.metadata.items():
            await tx.execute("INSERT INTO spend_tags VALUES ($1, $2, $3, $4)", project, run.id, key, value)


async def sum_spend(
    tx: Transaction, project: str, currency: str, *, from_day: int = 0, before_day: int | None = None
) -> Amount:
    """What a project has spent since the start of `from_day`, up to that of `before_day`; money of `currency` alone."""
    until = "" if before_day is None else " AND day < $4"
    rows = await tx.fetch(
        "SELECT SUM(prompt_tokens + completion_tokens), SUM(CASE WHEN currency = $2 THEN cost ELSE 0 END) FROM spend"
        f" WHERE project_id = $1 AND day >= $3{until}",
        project,
        currency,
        from_day,
        *([] if before_day is None else [before_day]),
    )
    return Amount(int(rows[0][0] or 0), int(rows[0][1] or 0))


# --- bills -----------------------------------------------------------------------------------------------------

GROUPS = {
    "day": "s.day",
    "project": "s.project_id",
    "run": "s.run_id",
    "thread": "s.thread_id",
    "assistant": "s.assistant_id",
    "model": "s.model",
}
METADATA = "metadata."


class Bill(NamedTuple):
    """What is asked of the spending. project: None takes all. groups: names in GROUPS, or `metadata.KEY` once.
    from_day, before_day: as in `sum_spend`."""

    project: str | None
    groups: Sequence[str]
    from_day: int
    before_day: int


class BillLine(NamedTuple):
    """keys: the value of each group, in their order; None where a run has no such metadata. counts: as COUNTS."""

    keys: tuple[str | int | None, ...]
    currency: str
    counts: tuple[int, ...]


async def list_bill(tx: Transaction, bill: Bill, after: Sequence[SqlValue], limit: int) -> list[BillLine]:
    """Up to `limit` lines in the order of their keys and currency. after: keys and currency of the line before them,
    or nothing."""
    values: list[SqlValue] = [bill.from_day, bill.before_day]
    keys, joins = [], ""
    for group in bill.groups:
        if group.startswith(METADATA):
            values.append(group.removeprefix(METADATA))
            joins = _tagged(len(values))
            keys.append("COALESCE(r.value, t.value, '')")
        else:
            keys.append(GROUPS[group])
    where = "s.day >= $1 AND s.day < $2"
    if bill.project is not None:
        values.append(bill.project)
        where += f" AND s.project_id = ${len(values)}"
    ordered = [*keys, "s.currency"]
    if after:
        numbers = [f"${len(values) + offset + 1}" for offset in range(len(ordered))]
        values += after
        where += f" AND ({', '.join(ordered)}) > ({', '.join(numbers)})"
    rows = await tx.fetch(
        f"SELECT {', '.join(ordered)}, {', '.join(f'SUM(s.{name})' for name in COUNTS)} FROM spend s{joins}"
        f" WHERE {where} GROUP BY {', '.join(ordered)} ORDER BY {', '.join(ordered)} LIMIT {limit}",
        *values,
    )
    width = len(keys)
    return [BillLine(row[:width], row[width], tuple(int(count) for count in row[width + 1 :])) for row in rows]


def _tagged(number: int) -> str:
    """The run's metadata, else its thread's."""
    return (
        f" LEFT JOIN spend_tags r ON r.project_id = s.project_id AND r.run_id = s.run_id AND r.key = ${number}"
        " LEFT JOIN thread_metadata t ON t.project_id = s.project_id AND t.thread_id = s.thread_id"
        f" AND t.key = ${number}"
    )
