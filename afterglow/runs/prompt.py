"""Reading a thread for the model: newest first, page by page, no further than what can fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from afterglow.calibration import Calibration
from afterglow.contracts import ChatRequest, ModelInfo, Transaction
from afterglow.objects import Json
from afterglow.rows.messages import list_messages_before
from afterglow.rows.model_calls import PromptMade, get_last_cut
from afterglow.rows.runs import RunRow
from afterglow.rows.search_results import StoredResult, list_results
from afterglow.rows.steps import list_calls_before
from afterglow.rows.threads import get_last_seq
from afterglow.runs.context import (
    NEWEST,
    Cut,
    Place,
    Turn,
    Window,
    calls_turn,
    chat_messages,
    completion_reserve,
    fixed_tokens,
    history_tokens,
    message_turn,
)
from afterglow.tools.file_search import output_of
from afterglow.tools.function import Offer, chat_tool_choice, offer

FIRST_PAGE = 32


class Prompt(NamedTuple):
    """What one call sends. instructions: with what is said of files. cut_off: the thread's sequence when it was read.
    budget_tokens: room for the whole prompt. estimated: tokens per part, uncalibrated. needed: calibrated tokens of
    the whole prompt. markers: file id by the marker with which the run's file searches showed it. factor: calibration.
    made: what is kept of it with the call."""

    instructions: str
    cut: Cut
    cut_off: int
    budget_tokens: int
    estimated: dict[str, int]
    needed_tokens: int
    markers: dict[str, str]
    factor: float
    made: PromptMade


class PromptRules(NamedTuple):
    """What a call's prompt depends on, besides the thread itself."""

    row: RunRow
    instructions: str
    offered: Offer
    info: ModelInfo
    calibration: Calibration
    history: str
    response_format: object
    budget_cap: int | None = None
    outputs: Mapping[str, Mapping[str, str]] = {}  # of the run's file searches, by step and call


def prompt_budget(rules: PromptRules) -> int:
    """Tokens that the prompt of the next call may have: the least of the window less the answer's reserve, what is
    left of max_prompt_tokens, and what an overflow has taught."""
    run, info = rules.row.run, rules.info
    budget = info.window_tokens - completion_reserve(
        info.window_tokens, run.max_completion_tokens, info.max_output_tokens
    )
    if run.max_prompt_tokens is not None:
        budget = min(budget, run.max_prompt_tokens - rules.row.spent.prompt_tokens)
    return budget if rules.budget_cap is None else min(budget, rules.budget_cap)


async def read_prompt(tx: Transaction, rules: PromptRules) -> Prompt:
    """Decide what of the thread goes to the model, reading no more of it than can matter."""
    row = rules.row
    run, project = row.run, row.project
    factor = rules.calibration.factor(run.model)
    parts = fixed_tokens(rules.instructions, rules.offered.tools, rules.response_format)
    fixed = round(sum(parts.values()) * factor)
    budget = prompt_budget(rules)
    last = await get_last_cut(tx, project, run.thread_id) if run.truncation_strategy.type == "auto" else None
    kept_from = last[0] if last and last[1] == budget else 0
    window = Window(run.truncation_strategy, max(budget - fixed, 0), factor, kept_from)
    cut_off = await get_last_seq(tx, project, run.thread_id)
    searches = any(tool["type"] == "file_search" for tool in run.tools)  # offered or, by now, not
    found = await list_results(tx, project, run.id) if searches else []
    await _fill(tx, window, rules._replace(outputs=_outputs(found)), cut_off)
    cut = window.cut()
    parts |= history_tokens(cut.turns)
    markers = {stored.marker: stored.file_id for stored in found}
    needed = fixed + cut.tokens
    return Prompt(rules.instructions, cut, cut_off, budget, parts, needed, markers, factor, _made(rules))


def _made(rules: PromptRules) -> PromptMade:
    run, offered = rules.row.run, rules.offered
    made = PromptMade(
        files=rules.instructions.removeprefix(run.instructions),
        vision=rules.info.vision is not False,
        history=rules.history,
        max_tokens=completion_left(rules.row),
    )
    if run.tools and offered.tools != offer(run.tools).tools:
        made.tools, made.names = offered.tools, offered.names
    return made


def completion_left(row: RunRow) -> int | None:
    """Tokens that are left of the run's max_completion_tokens."""
    limit = row.run.max_completion_tokens
    return None if limit is None else limit - row.spent.completion_tokens


def chat_request(row: RunRow, made: PromptMade, instructions: str, turns: list[Turn], offered: Offer) -> ChatRequest:
    """The request of one call. turns: the history that is sent, oldest first."""
    run, asked = row.run, row.asked
    first = not any(turn.own for turn in turns)
    choice = asked.tool_choice if first or asked.tool_choice == "none" else None
    return ChatRequest(
        model=run.model,
        messages=chat_messages(instructions, turns),
        tools=offered.tools,
        tool_choice=chat_tool_choice(choice, offered),
        parallel_tool_calls=asked.parallel_tool_calls if offered.tools else None,
        response_format=chat_response_format(asked.response_format),
        temperature=asked.temperature,
        top_p=asked.top_p,
        reasoning_effort=asked.reasoning_effort,
        max_tokens=made.max_tokens,
    )


def request_hash(request: ChatRequest) -> str:
    """sha-256 of a request, in hex: enough to know whether a prompt that is put together again is the same. Images
    that are stored or fetched count as what stands for them."""
    return hashlib.sha256(msgspec.json.encode(request)).hexdigest()


def _outputs(found: list[StoredResult]) -> dict[str, dict[str, str]]:
    """By step first: some servers give the calls of every turn the same ids."""
    by_call: dict[tuple[str, str], list[Json]] = {}
    for stored in found:
        by_call.setdefault((stored.step_id, stored.call_id), []).append(stored.result)
    outputs: dict[str, dict[str, str]] = {}
    for (step_id, call_id), results in by_call.items():
        outputs.setdefault(step_id, {})[call_id] = output_of(results)
    return outputs


async def _fill(tx: Transaction, window: Window, rules: PromptRules, cut_off: int) -> None:
    """Merge messages and calls, newest first, into the window until it is full or the thread is at its start."""
    place, limit = NEWEST, FIRST_PAGE
    while not window.full:
        turns, place = await _page(tx, rules, cut_off, place, limit)
        for turn in turns:
            if window.full:
                return
            window.add(turn)
        if place == (0, 0):
            return
        limit = window.turns_missing(limit)


async def _page(
    tx: Transaction, rules: PromptRules, cut_off: int, before: Place, limit: int
) -> tuple[list[Turn], Place]:
    """The turns of the next `limit` places before `before`, newest first, and the place that was read down to;
    (0, 0) when there is no more."""
    run, project = rules.row.run, rules.row.project
    vision = rules.info.vision is not False
    messages = await list_messages_before(tx, project, run.thread_id, cut_off, before, limit)
    end = (messages[-1].created_at, messages[-1].seq) if len(messages) == limit else (0, 0)
    turns = [
        turn
        for placed in messages
        if (turn := message_turn((placed.created_at, placed.seq), placed.message, run.id, vision=vision))
    ]
    calls = await list_calls_before(tx, project, run.thread_id, cut_off, before, end, limit)
    for step in calls:
        own = step.step.run_id == run.id
        if own or rules.history == "calls":
            found = rules.outputs.get(step.step.id, {})
            turn = calls_turn((step.created_at, step.seq), step.step, run.id, rules.offered.names, found)
            if turn:
                turns.append(turn)
    if len(calls) == limit:
        end = max(end, (calls[-1].created_at, calls[-1].seq))
        turns = [turn for turn in turns if turn.place >= end]
    turns.sort(key=lambda turn: turn.place, reverse=True)
    return turns, end


def chat_response_format(response_format: object) -> Json | None:
    """A stored response_format as it is sent to the model; None for text, which needs no saying."""
    if isinstance(response_format, dict) and response_format.get("type") != "text":
        return response_format
    return None
