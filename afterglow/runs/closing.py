"""Closing what a run has open when it ends, is given up by a dead worker, or gets its tool outputs.

Part of a larger transaction, always: the caller moves the run and writes the events.
"""

from __future__ import annotations

from typing import Any

import msgspec

from afterglow.contracts import START, Segment, Transaction
from afterglow.objects import LastError, Message, Run, RunStep, StepStatus, Usage
from afterglow.rows.events import list_segments
from afterglow.rows.messages import get_message, update_message
from afterglow.rows.steps import PlacedStep, leave_behind_text_before, list_open_steps, update_step
from afterglow.runs.states import OPEN_MESSAGE_REASONS, OPEN_STEP_ENDS, end_message, end_step
from afterglow.runs.transcript import Event, message_event, step_event
from afterglow.tools.function import CALLED_BY

WORKER_DIED = LastError("server_error", "The server stopped while this step was being made; it was made again.")
NOT_CALLED = "The server stopped before this tool was called."
NOT_KNOWN = (
    "The server stopped while this tool was being called: whether it has done what it was called for is not known."
)


class InHand(msgspec.Struct):
    """What a worker knows of the open step and the database does not. usage: of the model call, when it was told.

    content: the message's so far; tool_calls: the step's so far. message_reason: why the message is incomplete, when
    that does not follow from the run's end.
    """

    content: list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    usage: Usage | None = None
    message_reason: str | None = None


class _Ending(msgspec.Struct):
    """How open steps are to end. reason: why a message that is open is incomplete."""

    status: StepStatus
    reason: str | None
    error: LastError | None
    in_hand: InHand = msgspec.field(default_factory=InHand)
    left_behind: bool = False


async def close_open_steps(
    tx: Transaction, project: str, run: Run, now: int, in_hand: InHand | None = None
) -> list[Event]:
    """Close every open step of a run that has just reached a terminal status, as that status demands."""
    in_hand = in_hand or InHand()
    reason = in_hand.message_reason or OPEN_MESSAGE_REASONS.get(run.status)
    ending = _Ending(OPEN_STEP_ENDS[run.status], reason, _step_error(run), in_hand)
    events: list[Event] = []
    for placed in await list_open_steps(tx, project, run.id):
        events += await _close(tx, project, placed, now, ending)
    return events


async def leave_behind_open_steps(tx: Transaction, project: str, run: Run, now: int) -> list[Event]:
    """Close what a dead attempt left open; it is kept from prompts, and from lists once it is replaced.

    Calls that went out to others are not: they may have had their effect, so the model is told of them instead.
    """
    ending = _Ending("failed", "run_failed", WORKER_DIED, left_behind=True)
    events: list[Event] = []
    for placed in await list_open_steps(tx, project, run.id):
        if _went_out(placed.step):
            events += await _close_unknown(tx, project, placed, now)
            continue
        if placed.step.type == "tool_calls":
            await leave_behind_text_before(tx, project, placed)
        events += await _close(tx, project, placed, now, ending)
    return events


def _went_out(step: RunStep) -> bool:
    """Whether the step has calls that the server was making. They stand in it from before the first is made."""
    return step.type == "tool_calls" and any(CALLED_BY in call for call in step.step_details["tool_calls"])


async def _close_unknown(tx: Transaction, project: str, placed: PlacedStep, now: int) -> list[Event]:
    step = placed.step
    for call in step.step_details["tool_calls"]:
        if call["type"] == "function":
            call["function"]["output"] = f"ERROR: {NOT_KNOWN}" if CALLED_BY in call else f"ERROR: {NOT_CALLED}"
    close_step(step, "failed", now, placed.usage, LastError("server_error", NOT_KNOWN))
    await update_step(tx, project, step)
    return [step_event(step)]


async def _close(tx: Transaction, project: str, placed: PlacedStep, now: int, ending: _Ending) -> list[Event]:
    step, in_hand = placed.step, ending.in_hand
    events: list[Event] = []
    if step.type == "message_creation":
        message_id = step.step_details["message_creation"]["message_id"]
        message = await get_message(tx, project, step.thread_id, message_id)
        if message is not None and message.status == "in_progress":
            message.content = await _content(tx, project, message) if in_hand.content is None else in_hand.content
            end_message(message, now, incomplete=ending.reason)
            await update_message(tx, project, message, left_behind=ending.left_behind)
            events.append(message_event(message))
    elif in_hand.tool_calls is not None:
        step.step_details["tool_calls"] = in_hand.tool_calls
    close_step(step, ending.status, now, placed.usage or in_hand.usage, ending.error)
    await update_step(tx, project, step, left_behind=ending.left_behind)
    return [*events, step_event(step)]


def close_step(
    step: RunStep, status: StepStatus, now: int, usage: Usage | None, error: LastError | None = None
) -> None:
    """End a step, with the usage that it shows from now on."""
    end_step(step, status, now, error=error if status == "failed" else None)
    step.expires_at = None
    step.usage = usage or Usage()


def _step_error(run: Run) -> LastError | None:
    """A step's error knows no `invalid_prompt`."""
    if run.last_error is None or run.last_error.code != "invalid_prompt":
        return run.last_error
    return LastError("server_error", run.last_error.message)


async def _content(tx: Transaction, project: str, message: Message) -> list[dict[str, Any]]:
    assert message.run_id is not None
    return content_so_far(await list_segments(tx, project, message.run_id, START), message.id)


def content_so_far(segments: list[Segment], message_id: str) -> list[dict[str, Any]]:
    """Put a half-written message together from its run's events."""
    parts: dict[int, dict[str, Any]] = {}
    mark = f'"id":"{message_id}","object":"thread.message.delta"'.encode()
    for segment in segments:
        for line in segment.data.split(b"\n"):
            if line.startswith(b"data: ") and mark in line:
                for piece in msgspec.json.decode(line[6:])["delta"]["content"]:
                    _add(parts, piece)
    return [parts[index] for index in sorted(parts)]


def _add(parts: dict[int, dict[str, Any]], piece: dict[str, Any]) -> None:
    index = piece.pop("index")
    if index not in parts:
        parts[index] = piece
    elif piece["type"] == "text":
        parts[index]["text"]["value"] += piece["text"].get("value", "")
    elif piece["type"] == "refusal":
        parts[index]["refusal"] += piece["refusal"]
