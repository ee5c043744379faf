"""Which status may follow which, for runs, run steps and messages; and what else changes along with it.

A run is *active* while it holds its thread: queued, in_progress, requires_action, cancelling. One that is queued may
also wait for its thread, behind the run that holds it; which of the two is no status. It is *stopped* for
those who wait when it needs the caller (requires_action) or is terminal. Nothing leaves a terminal status. Cancel is
an attempt: work that ends first wins, so `cancelling` may still become `completed`. A claim of a run that is already
in progress is a take-over after a crash.

Everything about transitions lives here and nowhere else. No I/O, no clock, no project: callers decide *when*, this
file decides *whether*. The diagram in docs/runs.md is drawn from RUN_MOVES.
Source: the public Assistants guide, "Run lifecycle", and recorded answers of the service.
"""

from __future__ import annotations

from typing import Literal

from afterglow.objects import (
    IncompleteDetails,
    LastError,
    Message,
    Run,
    RunStatus,
    RunStep,
    StepStatus,
    Usage,
)

RunEvent = Literal[
    "claimed",
    "calls_functions",
    "outputs_given",
    "cancel_asked",
    "stopped",
    "answered",
    "ran_out",
    "broke",
    "timed_out",
]

RUN_MOVES: dict[RunStatus, dict[RunEvent, RunStatus]] = {
    "queued": {
        "claimed": "in_progress",
        "cancel_asked": "cancelling",
        "broke": "failed",
        "timed_out": "expired",
    },
    "in_progress": {
        "claimed": "in_progress",
        "calls_functions": "requires_action",
        "cancel_asked": "cancelling",
        "answered": "completed",
        "ran_out": "incomplete",
        "broke": "failed",
        "timed_out": "expired",
    },
    "requires_action": {
        "outputs_given": "queued",
        "cancel_asked": "cancelling",
        "broke": "failed",
        "timed_out": "expired",
    },
    "cancelling": {
        "claimed": "cancelling",
        "cancel_asked": "cancelling",
        "stopped": "cancelled",
        "answered": "completed",
        "ran_out": "incomplete",
        "broke": "failed",
        "timed_out": "expired",
    },
    "completed": {},
    "failed": {},
    "cancelled": {},
    "incomplete": {},
    "expired": {},
}

TERMINAL: frozenset[RunStatus] = frozenset(status for status, moves in RUN_MOVES.items() if not moves)
ACTIVE: frozenset[RunStatus] = frozenset(RUN_MOVES) - TERMINAL

# What an end of the run means for a step that is still open, and for a half-written message.
OPEN_STEP_ENDS: dict[RunStatus, StepStatus] = {
    "completed": "completed",
    "incomplete": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "expired": "expired",
}
OPEN_MESSAGE_REASONS: dict[RunStatus, str] = {
    "incomplete": "max_tokens",
    "failed": "run_failed",
    "cancelled": "run_cancelled",
    "expired": "run_expired",
}


class IllegalMove(Exception):
    """Our own bug: this event cannot happen in this status. Never shown to a caller."""


def next_status(status: RunStatus, event: RunEvent) -> RunStatus:
    """Return the status after `event`. Raises IllegalMove; changes nothing."""
    try:
        return RUN_MOVES[status][event]
    except KeyError:
        raise IllegalMove(f"{event!r} while {status!r}") from None


def move_run(run: Run, event: RunEvent, now: int, *, usage: Usage | None = None) -> None:
    """Give `run` the status after `event`, and every field that goes with it.

    now: Unix seconds. usage: the tokens of the whole run, shown only once it is terminal.
    Raises IllegalMove and leaves the run as it was.
    """
    status = next_status(run.status, event)
    if status == "in_progress" and run.status == "queued":
        run.started_at = now
    run.status = status
    if status != "requires_action":
        run.required_action = None
    if status not in TERMINAL:
        return
    run.expires_at = None
    run.usage = usage
    if status in ("completed", "incomplete"):
        run.completed_at = now
    elif status == "failed":
        run.failed_at = now
    elif status == "cancelled":
        run.cancelled_at = now


def end_step(step: RunStep, status: StepStatus, now: int, *, error: LastError | None = None) -> None:
    """Close an open step. Raises IllegalMove when it is not open."""
    if step.status != "in_progress" or status == "in_progress":
        raise IllegalMove(f"step {status!r} while {step.status!r}")
    step.status = status
    step.last_error = error
    setattr(step, f"{status}_at", now)


def end_message(message: Message, now: int, *, incomplete: str | None = None) -> None:
    """Close a message that is being written: completed, or incomplete with a reason. Raises IllegalMove."""
    if message.status != "in_progress":
        raise IllegalMove(f"message ends while {message.status!r}")
    if incomplete is None:
        message.status = "completed"
        message.completed_at = now
    else:
        message.status = "incomplete"
        message.incomplete_at = now
        message.incomplete_details = IncompleteDetails(incomplete)
