"""Rows of `model_calls`: one per call of a model, the ground of the ledger."""

from __future__ import annotations

from typing import Any

import msgspec

from afterglow.contracts import Transaction


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


_JSON = ("sent", "dropped", "left_out", "estimated")
_FIELDS = ModelCall.__struct_fields__
_INSERT = (
    f"INSERT INTO model_calls (project_id, {', '.join(_FIELDS)})"
    f" VALUES ({', '.join(f'${number}' for number in range(1, len(_FIELDS) + 2))})"
)


async def insert_model_call(tx: Transaction, project: str, call: ModelCall) -> None:
    values: list[Any] = [project]
    for name in _FIELDS:
        value = getattr(call, name)
        if name in _JSON or (name == "usage" and value is not None):
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
