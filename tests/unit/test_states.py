"""Runs, steps and messages move as the reference says, whatever happens in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from afterglow.objects import (
    ACTIVE_RUNS,
    HELD_RUNS,
    LastError,
    Message,
    MessageStatus,
    Run,
    RunStatus,
    RunStep,
    StepStatus,
    Usage,
)
from afterglow.runs.states import (
    ACTIVE,
    OPEN_MESSAGE_REASONS,
    OPEN_STEP_ENDS,
    RUN_MOVES,
    TERMINAL,
    IllegalMove,
    RunEvent,
    end_message,
    end_step,
    move_run,
    next_status,
)

STATUSES: tuple[RunStatus, ...] = get_args(RunStatus)
EVENTS: tuple[RunEvent, ...] = get_args(RunEvent)
NOW = 1_700_000_000
USAGE = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
WAITING = {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": []}}
ENDED_AT = {
    "completed": "completed_at",
    "incomplete": "completed_at",
    "failed": "failed_at",
    "cancelled": "cancelled_at",
    "expired": None,
}

# The reference's transitions, and a take-over or a second cancel, which change no status.
TRANSITIONS: set[tuple[RunStatus, RunStatus]] = {
    ("queued", "in_progress"),
    ("queued", "cancelling"),
    ("queued", "failed"),
    ("queued", "expired"),
    ("in_progress", "in_progress"),
    ("in_progress", "requires_action"),
    ("in_progress", "completed"),
    ("in_progress", "incomplete"),
    ("in_progress", "failed"),
    ("in_progress", "cancelling"),
    ("in_progress", "expired"),
    ("requires_action", "queued"),
    ("requires_action", "cancelling"),
    ("requires_action", "failed"),
    ("requires_action", "expired"),
    ("cancelling", "cancelling"),
    ("cancelling", "cancelled"),
    ("cancelling", "completed"),
    ("cancelling", "incomplete"),
    ("cancelling", "failed"),
    ("cancelling", "expired"),
}


def run_in(status: RunStatus) -> Run:
    return Run(
        id="run_1",
        created_at=NOW,
        assistant_id="asst_1",
        thread_id="thread_1",
        model="m",
        status=status,
        expires_at=None if status in TERMINAL else NOW + 600,
        required_action=WAITING if status == "requires_action" else None,
    )


def open_step() -> RunStep:
    return RunStep(
        id="step_1",
        created_at=NOW,
        run_id="run_1",
        assistant_id="asst_1",
        thread_id="thread_1",
        type="tool_calls",
        step_details={"type": "tool_calls", "tool_calls": []},
    )


def message_in(status: MessageStatus) -> Message:
    return Message(id="msg_1", created_at=NOW, thread_id="thread_1", role="assistant", status=status)


def assert_refused(act: Callable[[], None], unchanged: msgspec.Struct) -> None:
    """`act` is an illegal move, after which `unchanged` is as it was."""
    before = msgspec.json.encode(unchanged)
    with pytest.raises(IllegalMove):
        act()
    assert msgspec.json.encode(unchanged) == before


# --- the table -------------------------------------------------------------------------------------------------


def test_the_table_is_the_references():
    """From each status a run may go where the reference lets it go, and nowhere else."""
    assert {(before, after) for before, moves in RUN_MOVES.items() for after in moves.values()} == TRANSITIONS


def test_the_table_is_whole():
    """Every status has its row, and every event happens somewhere."""
    assert set(RUN_MOVES) == set(STATUSES)
    assert {event for moves in RUN_MOVES.values() for event in moves} == set(EVENTS)


def test_every_status_can_be_reached():
    """From queued, events lead to each status."""
    reached: set[RunStatus] = set()
    ahead: list[RunStatus] = ["queued"]
    while ahead:
        status = ahead.pop()
        if status not in reached:
            reached.add(status)
            ahead += RUN_MOVES[status].values()
    assert reached == set(STATUSES)


def test_every_active_run_can_expire_fail_and_be_cancelled():
    """Nothing that holds a thread is without a way to let it go."""
    for status in ACTIVE:
        assert next_status(status, "timed_out") == "expired"
        assert next_status(status, "broke") == "failed"
        assert next_status(status, "cancel_asked") == "cancelling"


def test_the_sets_are_the_references():
    """Terminal, thread-holding and worker-held are the statuses that the reference and the header say."""
    assert {"completed", "failed", "cancelled", "incomplete", "expired"} == TERMINAL
    assert {"queued", "in_progress", "requires_action", "cancelling"} == ACTIVE
    assert {status for status in ACTIVE if RUN_MOVES[status].get("claimed") == status} == HELD_RUNS


def test_what_is_left_open_has_an_end_for_every_end_of_the_run():
    """Each terminal status says how an open step ends, and, unless the run completed, why a message is incomplete."""
    assert set(OPEN_STEP_ENDS) == TERMINAL
    assert set(OPEN_MESSAGE_REASONS) == TERMINAL - {"completed"}
    for status in OPEN_STEP_ENDS.values():
        end_step(open_step(), status, NOW)


# --- runs ------------------------------------------------------------------------------------------------------


class RunWalk(RuleBasedStateMachine):
    """Any events, in any order, legal or not."""

    @initialize()
    def start(self) -> None:
        self.run = run_in("queued")
        self.now = NOW
        self.claimed_at: int | None = None
        self.ended: bytes | None = None

    @rule(event=st.sampled_from(EVENTS), after_s=st.integers(0, 60))
    def happen(self, event: RunEvent, after_s: int) -> None:
        self.now += after_s
        before = self.run.status
        if (before, event) not in {(status, event) for status in ACTIVE for event in RUN_MOVES[status]}:
            assert_refused(lambda: move_run(self.run, event, self.now, usage=USAGE), self.run)
            return
        move_run(self.run, event, self.now, usage=USAGE)
        if before == "queued" and event == "claimed":
            self.claimed_at = self.now
        if event == "calls_functions":
            self.run.required_action = WAITING

    @invariant()
    def what_is_terminal_stays_so(self) -> None:
        if self.ended is None and self.run.status in TERMINAL:
            self.ended = msgspec.json.encode(self.run)
        assert self.ended is None or msgspec.json.encode(self.run) == self.ended

    @invariant()
    def only_a_live_run_can_expire(self) -> None:
        assert self.run.expires_at == (None if self.run.status in TERMINAL else NOW + 600)

    @invariant()
    def usage_waits_for_the_end(self) -> None:
        assert self.run.usage == (USAGE if self.run.status in TERMINAL else None)

    @invariant()
    def only_a_run_that_waits_requires_action(self) -> None:
        assert (self.run.required_action is not None) == (self.run.status == "requires_action")

    @invariant()
    def it_started_when_it_was_last_taken_from_the_queue(self) -> None:
        assert self.run.started_at == self.claimed_at

    @invariant()
    def one_end_has_one_time(self) -> None:
        times = {name for name in ("completed_at", "failed_at", "cancelled_at") if getattr(self.run, name) is not None}
        name = ENDED_AT.get(self.run.status)
        assert times == ({name} if name else set())
        assert name is None or self.run.created_at <= getattr(self.run, name) <= self.now


class TestRunWalk(RunWalk.TestCase):
    """A run keeps its invariants on any walk."""

    settings = settings(max_examples=100, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("event", EVENTS)
def test_an_illegal_move_changes_nothing(status: RunStatus, event: RunEvent):
    """What is not in the table raises, and the run stays as it was."""
    run = run_in(status)
    if event in RUN_MOVES[status]:
        move_run(run, event, NOW)
        assert run.status == RUN_MOVES[status][event]
    else:
        assert_refused(lambda: move_run(run, event, NOW), run)


def test_the_start_is_reset_after_tool_outputs():
    """A run that is taken from the queue again starts again; a take-over after a crash leaves its start alone."""
    run = run_in("queued")
    for event, now in (("claimed", NOW + 1), ("claimed", NOW + 2)):
        move_run(run, event, now)
        assert run.started_at == NOW + 1
    for event in ("calls_functions", "outputs_given"):
        move_run(run, event, NOW + 3)
        assert run.started_at == NOW + 1
    move_run(run, "claimed", NOW + 4)
    assert run.started_at == NOW + 4


def test_work_that_ends_first_wins_over_a_cancel():
    """A run that is being cancelled may still complete; it was then not cancelled."""
    run = run_in("in_progress")
    move_run(run, "cancel_asked", NOW)
    assert run.expires_at is not None
    move_run(run, "answered", NOW + 1)
    assert (run.status, run.completed_at, run.cancelled_at) == ("completed", NOW + 1, None)


# --- steps and messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [status for status in get_args(StepStatus) if status != "in_progress"])
def test_a_step_ends_once(status: StepStatus):
    """An open step takes its status, the time of that status alone, and its error; then it is closed."""
    step = open_step()
    error = LastError("server_error", "Sorry.") if status == "failed" else None
    end_step(step, status, NOW, error=error)
    assert (step.status, step.last_error) == (status, error)
    times = ("cancelled_at", "completed_at", "expired_at", "failed_at")
    assert {name: getattr(step, name) for name in times} == {**dict.fromkeys(times), f"{status}_at": NOW}
    for again in get_args(StepStatus):
        assert_refused(lambda again=again: end_step(step, again, NOW + 1), step)


def test_a_step_does_not_end_in_progress():
    """In progress is no end."""
    step = open_step()
    assert_refused(lambda: end_step(step, "in_progress", NOW), step)


@pytest.mark.parametrize(
    ("reason", "status", "completed_at", "incomplete_at"),
    [
        (None, "completed", NOW, None),
        *((reason, "incomplete", None, NOW) for reason in (*OPEN_MESSAGE_REASONS.values(), "content_filter")),
    ],
)
def test_a_message_ends_once(
    reason: str | None, status: MessageStatus, completed_at: int | None, incomplete_at: int | None
):
    """A message that is being written becomes completed, or incomplete with its reason; then it is closed."""
    message = message_in("in_progress")
    end_message(message, NOW, incomplete=reason)
    assert (message.status, message.completed_at, message.incomplete_at) == (status, completed_at, incomplete_at)
    assert (message.incomplete_details and message.incomplete_details.reason) == reason
    assert_refused(lambda: end_message(message, NOW + 1), message)
    assert_refused(lambda: end_message(message, NOW + 1, incomplete="run_failed"), message)


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_a_message_that_is_not_being_written_does_not_end(status: MessageStatus):
    """Messages of callers are complete from the start."""
    message = message_in(status)
    assert_refused(lambda: end_message(message, NOW), message)


def test_the_statuses_that_rows_know_are_those_of_the_table():
    """Active is whatever has a way on; what a worker holds is active."""
    assert ACTIVE_RUNS == ACTIVE
    assert HELD_RUNS < ACTIVE_RUNS
