"""Rows of `model_calls`: one per call of a model, the ground of the ledger."""

from __future__ import annotations

from typing import Any

import msgspec

from afterglow.contracts import SqlRow, Transaction
from afterglow.objects import Usage

MILLION = 1_000_000


class PromptMade(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a prompt depended on beside the rows of its run and thread, so that it can be put together again.

    files: what the instructions said of files, after the run's own. tools, names: as offered, where that is not what
    the run's tools give. vision: whether images were sent. history: the setting. max_tokens: of the answer.
    """

    files: str = ""
    tools: list[dict[str, Any]] | None = None
    names: dict[str, str] = {}
    vision: bool = True
    history: str = "calls"
    max_tokens: int | None = None


class ModelCall(msgspec.Struct, kw_only=True):
    """What was sent, what it was estimated at, what was reported. See the schema for each column."""

    id: str
    thread_id: str
    run_id: str
    step_id: str | None = None
    attempt: int
    created_at: int
    upstream: str = ""
    model_asked: str
    model_answered: str = ""
    sent: dict[str, Any] = {}
    dropped: list[str] = []
    cut_off: int
    kept_from: int
    budget_tokens: int
    left_out: list[str] = []
    estimated: dict[str, int] = {}
    usage: dict[str, Any] | None = None
    prompt_hash: str
    first_token_ms: int | None = None
    total_ms: int = 0
    finish_reason: str = ""
    text_step_id: str | None = None
    factor: int = MILLION
    counted: Usage | None = None
    cost: int | None = None
    currency: str = ""
    unpriced_tokens: int = 0
    made: PromptMade = msgspec.field(default_factory=PromptMade)


_JSON = ("sent", "dropped", "left_out", "estimated", "made")
_JSON_OR_NULL = ("usage", "counted")
_FIELDS = ModelCall.__struct_fields__
_INSERT = (
    f"INSERT INTO model_calls (project_id, {', '.join(_FIELDS)})"
    f" VALUES ({', '.join(f'${number}' for number in range(1, len(_FIELDS) + 2))})"
)


async def insert_model_call(tx: Transaction, project: str, call: ModelCall) -> None:
    values: list[Any] = [project]
    for name in _FIELDS:
        value = getattr(call, name)
        if name in _JSON or (name in _JSON_OR_NULL and value is not None):
            value = msgspec.json.encode(value).decode()
        values.append(value)
    await tx.execute(_INSERT, *values)


async def get_last_cut(tx: Transaction, project: str, thread_id: str) -> tuple[int, int] | None:
    """(kept_from, budget_tokens) of the thread's newest model call, so that the next one keeps the same prefix."""
    rows = await tx.fetch(
        "SELECT kept_from, budget_tokens FROM model_calls WHERE project_id = $1 AND thread_id = $2"
        " ORDER BY created_at DESC, cut_off DESC LIMIT 1",
        project,
        thread_id,
    )
    return (rows[0][0], rows[0][1]) if rows else None


async def list_model_calls(tx: Transaction, project: str, run_id: str) -> list[ModelCall]:
    """The calls that a run has made, oldest first."""
    rows = await tx.fetch(
        f"SELECT {', '.join(_FIELDS)} FROM model_calls WHERE project_id = $1 AND run_id = $2"
        " ORDER BY created_at, cut_off, id",
        project,
        run_id,
    )
    return [_call(row) for row in rows]


async def get_run_cost(tx: Transaction, project: str, run_id: str, currency: str) -> int:
    """What a run has cost so far, in billionths."""
    rows = await tx.fetch(
        "SELECT SUM(cost) FROM model_calls WHERE project_id = $1 AND run_id = $2 AND currency = $3",
        project,
        run_id,
        currency,
    )
    return int(rows[0][0] or 0)


def _call(row: SqlRow) -> ModelCall:
    values = dict(zip(_FIELDS, row, strict=True))
    for name in (*_JSON, *_JSON_OR_NULL):
        if values[name] is not None:
            values[name] = msgspec.json.decode(values[name])
    return msgspec.convert(values, ModelCall)
