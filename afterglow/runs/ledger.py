"""Where the tokens of a run went: each model call's prompt and answer by parts, and their sums. Pure.

The parts of a prompt are estimates, calibrated by what the model's server had reported until then; `remainder` is what
is missing to the tokens that were counted, and may be negative. So of every line

    instructions + tool_schemas + response_format + history + retrieved_chunks + tool_results + images + remainder
        = usage.prompt_tokens
    output + reasoning = usage.completion_tokens

and the lines of the calls sum to the line of the run, whose usage is the run's. All numbers are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from afterglow.objects import Usage
from afterglow.prices import NANOS, money_text
from afterglow.rows.model_calls import MILLION, ModelCall

PARTS = (
    "instructions",
    "tool_schemas",
    "response_format",
    "history",
    "retrieved_chunks",
    "tool_results",
    "images",
)
_STORED_AS = {"tool_schemas": "tools"}


class Amount(Struct, kw_only=True):
    """Money. decimal: the same as an exact text."""

    value: float
    currency: str
    decimal: str


class PromptParts(Struct, kw_only=True):
    """Tokens of prompts. tool_results: outputs of tools but for `retrieved_chunks`, what file search has found.
    remainder: what the parts, which are estimates, miss of the tokens that were counted."""

    instructions: int = 0
    tool_schemas: int = 0
    response_format: int = 0
    history: int = 0
    retrieved_chunks: int = 0
    tool_results: int = 0
    images: int = 0
    remainder: int = 0

    @property
    def total(self) -> int:
        parts: list[int] = [getattr(self, part) for part in PARTS]
        return sum(parts) + self.remainder


class CompletionParts(Struct, kw_only=True):
    """Tokens of answers. output: text and tool calls; below 0 when a server counts its reasoning apart."""

    output: int = 0
    reasoning: int = 0


class LedgerLine(Struct, kw_only=True):
    """usage: as counted for the run. cached_tokens: of the prompt. estimated: the server has reported no usage, and it
    is our estimate. cost: null where no token has a price; unpriced_tokens: those that are not in it."""

    prompt: PromptParts
    completion: CompletionParts
    usage: Usage
    cached_tokens: int
    estimated: bool
    cost: Amount | None
    unpriced_tokens: int


class ModelCallLedger(LedgerLine, kw_only=True):
    """One call of a model. step_id: of the step that it made, null when it made none. upstream: the server's name.
    finish_reason: `interrupted` when the call did not come to its end."""

    id: str
    object: str = "thread.run.model_call"
    created_at: int
    step_id: str | None
    attempt: int
    model: str
    model_answered: str
    upstream: str
    finish_reason: str
    first_token_ms: int | None
    total_ms: int


class Ledger(Struct, kw_only=True):
    """total: of all calls; of the run, with `unrecorded`: what was counted for the run without a call, as for runs that
    were imported."""

    object: str = "thread.run.ledger"
    run_id: str
    thread_id: str
    step_id: str | None = None
    total: LedgerLine
    unrecorded: Usage | None = None
    data: list[ModelCallLedger]


def amount(nanos: int, currency: str) -> Amount:
    return Amount(value=nanos / NANOS, currency=currency.lower(), decimal=money_text(nanos))


def calibrated(estimated: Mapping[str, int], factor: int) -> dict[str, int]:
    """The parts of a prompt, each rounded by itself. factor: in millionths."""
    return {part: (estimated.get(_STORED_AS.get(part, part), 0) * factor + MILLION // 2) // MILLION for part in PARTS}


def ledger_of(
    run_id: str, thread_id: str, calls: Iterable[ModelCall], spent: Usage | None, step_id: str | None = None
) -> Ledger:
    """spent: what was counted for the run; None sums up the calls alone."""
    lines = [_line(call) for call in calls]
    total = _sum(lines)
    unrecorded = None
    if spent is not None and spent != total.usage:
        unrecorded = _less(spent, total.usage)
        total.usage = spent
        total.prompt.remainder += unrecorded.prompt_tokens
        reasoning = unrecorded.completion_tokens_details.reasoning_tokens
        total.completion.reasoning += reasoning
        total.completion.output += unrecorded.completion_tokens - reasoning
        total.cached_tokens = spent.prompt_token_details.cached_tokens
    return Ledger(run_id=run_id, thread_id=thread_id, step_id=step_id, total=total, unrecorded=unrecorded, data=lines)


def _line(call: ModelCall) -> ModelCallLedger:
    usage = call.counted or _reported(call.usage)
    parts = calibrated(call.estimated, call.factor)
    reasoning = usage.completion_tokens_details.reasoning_tokens
    return ModelCallLedger(
        id=call.id,
        created_at=call.created_at,
        step_id=call.step_id,
        attempt=call.attempt,
        model=call.model_asked,
        model_answered=call.model_answered,
        upstream=call.upstream,
        finish_reason=call.finish_reason,
        first_token_ms=call.first_token_ms,
        total_ms=call.total_ms,
        prompt=PromptParts(**parts, remainder=usage.prompt_tokens - sum(parts.values())),
        completion=CompletionParts(output=usage.completion_tokens - reasoning, reasoning=reasoning),
        usage=usage,
        cached_tokens=usage.prompt_token_details.cached_tokens,
        estimated=call.usage is None and usage != Usage(),
        cost=None if call.cost is None else amount(call.cost, call.currency),
        unpriced_tokens=call.unpriced_tokens,
    )


def _reported(raw: dict[str, Any] | None) -> Usage:
    """Of calls that were recorded before what was counted was kept."""
    known = {name: value for name, value in (raw or {}).items() if name.endswith("_tokens") and type(value) is int}
    return msgspec.convert(known, Usage)


def _sum(lines: list[ModelCallLedger]) -> LedgerLine:
    total = LedgerLine(
        prompt=PromptParts(),
        completion=CompletionParts(),
        usage=Usage(),
        cached_tokens=0,
        estimated=any(line.estimated for line in lines),
        cost=None,
        unpriced_tokens=0,
    )
    for line in lines:
        for part in (*PARTS, "remainder"):
            setattr(total.prompt, part, getattr(total.prompt, part) + getattr(line.prompt, part))
        total.completion.output += line.completion.output
        total.completion.reasoning += line.completion.reasoning
        total.usage = total.usage.plus(line.usage)
        total.cached_tokens += line.cached_tokens
        total.unpriced_tokens += line.unpriced_tokens
    total.cost = _sum_of_costs(lines)
    return total


def _sum_of_costs(lines: list[ModelCallLedger]) -> Amount | None:
    """None also when the operator has changed the currency meanwhile: such amounts have no sum."""
    costs = [line.cost for line in lines if line.cost is not None]
    if len({cost.currency for cost in costs}) != 1:
        return None
    return amount(sum(nanos_in(cost) for cost in costs), costs[0].currency)


def nanos_in(cost: Amount) -> int:
    """The whole number that an amount was made of."""
    whole, _, part = cost.decimal.partition(".")
    return int(whole) * NANOS + int(part.ljust(9, "0"))


def _less(more: Usage, less: Usage) -> Usage:
    minus = msgspec.convert(_negative(msgspec.to_builtins(less)), Usage)
    return more.plus(minus)


def _negative(counts: dict[str, Any]) -> dict[str, Any]:
    return {name: _negative(value) if isinstance(value, dict) else -value for name, value in counts.items()}
