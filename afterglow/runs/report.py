"""What operators are told of runs: lines in the log, counts, and the spans of each run's trace; a fact once it is so.

Never the text of a message. Told once per run, attempt, model call and tool call; nothing here is done per token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from afterglow import telemetry
from afterglow.contracts import START, House, Position, Span, SpanAttributes, SpanKind
from afterglow.errors import LostLease, ModelError
from afterglow.ids import made_at
from afterglow.objects import Run, Usage
from afterglow.rows.runs import RunRow
from afterglow.runs.interrupt import Interrupted
from afterglow.runs.states import TERMINAL
from afterglow.runs.turn import Call, ModelTurn

LOUD = ("failed", "expired")
FAILED = "failed"
INTERRUPTED = "interrupted"  # by a cancel, the deadline, or the end of the process

log = logging.getLogger("afterglow.runs")


# --- a run -----------------------------------------------------------------------------------------------------


def happened(house: House, project: str, run: Run, attempt: int, since: Position) -> None:
    """Something was done to a run that nobody executes. since: the place in its event log before that."""
    if run.status in TERMINAL:
        ended(house, project, run, attempt)
    elif since == START and house.traces is not None and (caller := telemetry.traceparent.get()):
        attributes: SpanAttributes = {"afterglow.run.id": run.id, "gen_ai.conversation.id": run.thread_id}
        house.traces.add(Span("created", "create run", run.id, made_at(run.id), time.time(), attributes, caller=caller))


def ended(house: House, project: str, run: Run, attempt: int) -> None:
    """The run has reached its last status."""
    now = time.time()
    took_s = max(now - made_at(run.id), 0)
    house.metrics.runs_ended.labels(run.status).inc()
    house.metrics.run_duration.observe(took_s)
    _log_end(project, run, attempt, took_s)
    if house.traces is not None:
        failure = run.last_error.code if run.status == "failed" and run.last_error else ""
        attributes = _end_attributes(project, run, attempt)
        house.traces.add(Span("run", "run", run.id, now - took_s, now, attributes, failure=failure))


def _log_end(project: str, run: Run, attempt: int, took_s: float) -> None:
    usage = run.usage or Usage()
    fields = {
        "run_id": run.id,
        "thread_id": run.thread_id,
        "assistant_id": run.assistant_id,
        "project": project,
        "model": run.model,
        "status": run.status,
        "error": run.last_error.code if run.last_error else None,
        "attempt": attempt,
        "duration_s": round(took_s, 3),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    log.log(
        logging.WARNING if run.status in LOUD else logging.INFO,
        "Run %s ended: %s after %.1f s, attempt %d, %d tokens in, %d out.",
        run.id,
        run.status,
        took_s,
        attempt,
        usage.prompt_tokens,
        usage.completion_tokens,
        extra={"fields": fields},
    )


def _end_attributes(project: str, run: Run, attempt: int) -> SpanAttributes:
    usage = run.usage or Usage()
    return {
        "afterglow.run.id": run.id,
        "afterglow.run.status": run.status,
        "afterglow.attempt": attempt,
        "afterglow.assistant.id": run.assistant_id,
        "afterglow.project": project,
        "gen_ai.conversation.id": run.thread_id,
        "gen_ai.request.model": run.model,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
    }


# --- in a run --------------------------------------------------------------------------------------------------


class _Part:
    """A part of a run while it lasts. failure: why it did not end well; empty when it did."""

    __slots__ = ("_started", "attributes", "began", "failure")

    def __init__(self, attributes: SpanAttributes) -> None:
        self.attributes = attributes
        self.failure = ""
        self.began = time.time()
        self._started = time.monotonic()

    @property
    def took_s(self) -> float:
        return time.monotonic() - self._started


@contextmanager
def _part(house: House, row: RunRow, kind: SpanKind, name: str) -> Iterator[_Part]:
    part = _Part({"afterglow.run.id": row.run.id, "gen_ai.conversation.id": row.run.thread_id})
    try:
        yield part
    except BaseException as error:
        from_outside = isinstance(error, Interrupted) or not isinstance(error, Exception)
        part.failure = INTERRUPTED if from_outside else type(error).__name__
        raise
    finally:
        if house.traces is not None:
            times = part.began, part.began + part.took_s
            house.traces.add(Span(kind, name, row.run.id, *times, part.attributes, row.attempt, part.failure))


@contextmanager
def attempt(house: House, row: RunRow, worker: str, *, taken_over: bool) -> Iterator[None]:
    """Around the execution of one attempt. row: as claimed. taken_over: from a worker that fell silent."""
    with _part(house, row, "attempt", f"attempt {row.attempt}") as part:
        part.attributes |= {"afterglow.attempt": row.attempt, "afterglow.worker.id": worker}
        if taken_over:
            house.metrics.runs_taken_over.inc()
            fields = {"run_id": row.run.id, "attempt": row.attempt}
            said = "Run %s was left by a worker; it goes on as attempt %d."
            log.warning(said, row.run.id, row.attempt, extra={"fields": fields})
        elif row.attempt == 1:
            queued_s = max(part.began - made_at(row.run.id), 0)
            house.metrics.run_queued.observe(queued_s)
            part.attributes["afterglow.queued_ms"] = round(queued_s * 1000)
        try:
            with house.metrics.runs_executing.track_inprogress():
                yield
        except LostLease:
            house.metrics.leases_lost.inc()
            raise


@contextmanager
def model_call(house: House, row: RunRow, turn: ModelTurn) -> Iterator[None]:
    """Around one call of the model. When it ends well, `turn` has the call's usage."""
    with _part(house, row, "model", f"chat {turn.request.model}") as part:
        try:
            yield
        except ModelError as error:
            house.metrics.model_errors.labels(type(error).__name__).inc()
            raise
        finally:
            part.attributes |= _call_attributes(turn)
        assert turn.usage is not None
        first_token_s = None if turn.first_token_ms is None else turn.first_token_ms / 1000
        house.metrics.model_answered(_answered_by(turn), turn.usage, first_token_s, part.took_s)


def _answered_by(turn: ModelTurn) -> str:
    """The model as its server calls it: what callers ask for may be any name."""
    return (turn.end and turn.end.model) or turn.request.model


def _call_attributes(turn: ModelTurn) -> SpanAttributes:
    attributes: SpanAttributes = {"gen_ai.operation.name": "chat", "gen_ai.request.model": turn.request.model}
    if turn.usage is not None:
        attributes["gen_ai.response.model"] = _answered_by(turn)
        attributes["gen_ai.usage.input_tokens"] = turn.usage.prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = turn.usage.completion_tokens
    if turn.first_token_ms is not None:
        attributes["afterglow.first_token_ms"] = turn.first_token_ms
    if turn.step is not None:
        attributes["afterglow.step.id"] = turn.step.id
    return attributes


@contextmanager
def tool_call(house: House, row: RunRow, turn: ModelTurn, call: Call) -> Iterator[None]:
    """Around one call of a tool that is ours to run."""
    with _part(house, row, "tool", f"execute_tool {call.kind}") as part:
        part.attributes |= {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": call.kind}
        part.attributes |= {"gen_ai.tool.call.id": call.id}
        if turn.step is not None:
            part.attributes["afterglow.step.id"] = turn.step.id
        outcome = "failed"
        try:
            yield
            part.failure = FAILED if call.failure else ""
            outcome = part.failure or "ok"
        except (Interrupted, asyncio.CancelledError):
            outcome = INTERRUPTED
            raise
        finally:
            house.metrics.tool_answered(call.kind, outcome, part.took_s)
