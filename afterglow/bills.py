"""What calls of models were made of and what they cost: ledgers, the prompts of steps, and bills. Extensions of
ours."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from afterglow.contracts import House, SqlValue, Transaction
from afterglow.errors import NotFound
from afterglow.objects import DAY_S
from afterglow.prices import money_text
from afterglow.rows import messages as message_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import steps as step_rows
from afterglow.rows.model_calls import ModelCall, list_model_calls
from afterglow.rows.runs import RunRow
from afterglow.rows.spend import COUNTS, METADATA, Bill, BillLine, list_bill
from afterglow.runs.ledger import Amount, Ledger, amount, ledger_of
from afterglow.runs.lifecycle import missing_run
from afterglow.runs.past_prompt import (
    Rebuilt,
    StepPrompt,
    Truncation,
    dropped_messages,
    estimated_parts,
    rebuild,
    shown_request,
)

CSV_LINES = 20_000  # read at once


# --- ledgers ---------------------------------------------------------------------------------------------------


async def run_ledger(house: House, project: str, thread_id: str, run_id: str) -> Ledger:
    """Raises NotFound."""

    async def look(tx: Transaction) -> Ledger:
        row = await _get_run(tx, project, thread_id, run_id)
        return ledger_of(run_id, thread_id, await list_model_calls(tx, project, run_id), row.spent)

    return await house.store.read(look)


async def step_ledger(house: House, project: str, thread_id: str, run_id: str, step_id: str) -> Ledger:
    """Of the call that made the step; its tokens are the step's usage. Text that came before calls counts with them.
    Raises NotFound."""

    async def look(tx: Transaction) -> Ledger:
        calls = await _calls_of_step(tx, project, thread_id, run_id, step_id)
        own = [call for call in calls if call.step_id == step_id]
        return ledger_of(run_id, thread_id, own, None, step_id)

    return await house.store.read(look)


async def _get_run(tx: Transaction, project: str, thread_id: str, run_id: str) -> RunRow:
    row = await run_rows.get_run(tx, project, thread_id, run_id)
    if row is None:
        raise await missing_run(tx, project, thread_id, run_id)
    return row


async def _calls_of_step(tx: Transaction, project: str, thread_id: str, run_id: str, step_id: str) -> list[ModelCall]:
    await _get_run(tx, project, thread_id, run_id)
    if await step_rows.get_step_object(tx, project, thread_id, run_id, step_id) is None:
        raise NotFound.of("run step", step_id)
    calls = await list_model_calls(tx, project, run_id)
    return [call for call in calls if step_id in (call.step_id, call.text_step_id)]


# --- prompts ---------------------------------------------------------------------------------------------------


async def step_prompt(
    house: House, project: str, thread_id: str, run_id: str, step_id: str, after: str | None, limit: int
) -> StepPrompt:
    """after, limit: of the messages that were dropped. Raises NotFound, also for a step whose call is not recorded:
    it is still at work, or was imported."""

    async def look(tx: Transaction) -> StepPrompt:
        calls = await _calls_of_step(tx, project, thread_id, run_id, step_id)
        if not calls:
            raise NotFound(f"No model call is recorded for run step '{step_id}'.")
        before_seq = None
        if after is not None:
            before_seq = await message_rows.get_seq(tx, project, thread_id, after)
            if before_seq is None:
                raise NotFound.of("message", after, param="after")
        row, call = await _get_run(tx, project, thread_id, run_id), calls[-1]
        rebuilt = await rebuild(tx, row, call, house.clock.now())
        dropped = await dropped_messages(tx, row, call.kept_from, rebuilt.left_out, limit, before_seq)
        estimated = estimated_parts(call.estimated, call.factor)
        truncation = Truncation(
            type=row.run.truncation_strategy.type,
            budget_tokens=call.budget_tokens or None,
            estimated_tokens=estimated.total,
            kept=len(rebuilt.turns),
            dropped=dropped,
            dropped_steps=rebuilt.left_out_steps,
        )
        return _step_prompt(step_id, call, rebuilt, truncation)

    return await house.store.read(look)


def _step_prompt(step_id: str, call: ModelCall, rebuilt: Rebuilt, truncation: Truncation) -> StepPrompt:
    return StepPrompt(
        run_id=call.run_id,
        step_id=step_id,
        model_call_id=call.id,
        attempt=call.attempt,
        model=call.model_asked,
        model_answered=call.model_answered,
        upstream=call.upstream,
        request=shown_request(rebuilt.request),
        sent=call.sent,
        dropped_parameters=call.dropped,
        exact=not rebuilt.gone and rebuilt.hash == call.prompt_hash,
        prompt_hash=call.prompt_hash,
        deleted=rebuilt.gone,
        estimated=estimated_parts(call.estimated, call.factor),
        truncation=truncation,
    )


# --- bills -----------------------------------------------------------------------------------------------------


class CostsResult(Struct, kw_only=True):
    """What was spent by one run, thread, … or all. Ids are null where it was not asked to tell them apart. metadata:
    the value of the key asked for, null where a run has none. amount: of what has a price; unpriced_tokens have none.
    """

    object: str = "organization.costs.result"
    amount: Amount
    line_item: str | None = None
    project_id: str | None = None
    run_id: str | None = None
    thread_id: str | None = None
    assistant_id: str | None = None
    model: str | None = None
    metadata: str | None = None
    calls: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    unpriced_tokens: int


class CostsBucket(Struct, kw_only=True):
    """start_time, end_time: Unix seconds; the end is not included."""

    object: str = "bucket"
    start_time: int
    end_time: int
    results: list[CostsResult]


class CostsPage(Struct, kw_only=True):
    """next_page: to be given as `page`."""

    object: str = "page"
    data: list[CostsBucket]
    has_more: bool
    next_page: str | None


async def read_bill(house: House, bill: Bill, after: Sequence[SqlValue], limit: int) -> list[BillLine]:
    async def look(tx: Transaction) -> list[BillLine]:
        return await list_bill(tx, bill, after, limit)

    return await house.store.read(look)


def buckets_of(bill: Bill, lines: Sequence[BillLine]) -> list[CostsBucket]:
    """Lines as buckets: one for each day when `day` is the bill's first group, else one for all."""
    by_day = bool(bill.groups) and bill.groups[0] == "day"
    buckets: list[CostsBucket] = []
    for line in lines:
        start, end = (line.keys[0], int(line.keys[0] or 0) + 1) if by_day else (bill.from_day, bill.before_day)
        start_time = int(start or 0) * DAY_S
        if not buckets or buckets[-1].start_time != start_time:
            buckets.append(CostsBucket(start_time=start_time, end_time=end * DAY_S, results=[]))
        buckets[-1].results.append(_result(bill, line))
    return buckets


def _result(bill: Bill, line: BillLine) -> CostsResult:
    counts: dict[str, Any] = dict(zip(COUNTS, line.counts, strict=True))
    result = CostsResult(amount=amount(counts.pop("cost"), line.currency), **counts)
    for group, key in zip(bill.groups, line.keys, strict=True):
        if group.startswith(METADATA):
            result.metadata = None if key == "" else str(key)
        elif group != "day":
            setattr(result, "model" if group == "model" else f"{group}_id", key)
    result.line_item = result.model
    return result


async def bill_as_csv(house: House, bill: Bill) -> AsyncGenerator[bytes, None]:
    """The whole bill, some lines at a time. Costs are exact decimals; `date` is that of the day, UTC."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*(_column(group) for group in bill.groups), "currency", *COUNTS])
    after: Sequence[SqlValue] = ()
    while True:
        lines = await read_bill(house, bill, after, CSV_LINES)
        for line in lines:
            writer.writerow(_csv_row(bill, line))
        yield out.getvalue().encode()
        out.seek(0)
        out.truncate()
        if len(lines) < CSV_LINES:
            return
        after = cursor_of(lines[-1])


def cursor_of(line: BillLine) -> list[SqlValue]:
    return [*line.keys, line.currency]


def _column(group: str) -> str:
    if group == "day":
        return "date"
    return group if group == "model" or group.startswith(METADATA) else f"{group}_id"


def _csv_row(bill: Bill, line: BillLine) -> list[str | int]:
    keys = [
        iso_date(int(key or 0)) if group == "day" else _harmless(str(key))
        for group, key in zip(bill.groups, line.keys, strict=True)
    ]
    counts = [money_text(count) if name == "cost" else count for name, count in zip(COUNTS, line.counts, strict=True)]
    return [*keys, line.currency.lower(), *counts]


def iso_date(day: int) -> str:
    return datetime.fromtimestamp(day * DAY_S, UTC).date().isoformat()


def _harmless(text: str) -> str:
    """Spreadsheets would run what begins like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
