"""What callers and the clock do to runs: create, modify, cancel, give outputs, expire.

Each is one transaction over row, events and steps; who waits is told after its commit. What the worker does to a run
that it holds is in `loop.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET

from afterglow.contracts import START, House, KnownRun, Position, Segment, Stop, Transaction
from afterglow.errors import ApiError, Gone, InvalidRequest, NotFound, ThreadBusy
from afterglow.ids import new_id
from afterglow.messages import attach_for_search, insert_messages
from afterglow.objects import (
    HELD_RUNS,
    INCLUDE_FILE_SEARCH_CONTENT,
    CreateMessage,
    CreateRun,
    CreateThreadAndRun,
    Json,
    LastError,
    ModifyRun,
    Run,
    RunStep,
    SubmitToolOutputs,
    TruncationStrategy,
    Usage,
)
from afterglow.rows import events as event_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import steps as step_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.assistants import AssistantRow, get_assistant
from afterglow.rows.requests import Origin, insert_request
from afterglow.rows.runs import RunAsked, RunRow
from afterglow.rows.search_results import fill_in_content
from afterglow.rows.steps import PlacedStep
from afterglow.rows.tool_calls import Deadline, delete_deadlines, list_due, take_due
from afterglow.runs import report
from afterglow.runs.closing import close_open_steps, close_step
from afterglow.runs.outputs import Submission, give, timed_out
from afterglow.runs.states import TERMINAL, move_run
from afterglow.runs.transcript import Event, Transcript, run_event, step_event, stop_of
from afterglow.tools.function import stored_form
from afterglow.tools.mcp import check_mcp_tools
from afterglow.webhooks import record_run

ROUNDS_REMEMBERED = 32  # newest steps among which outputs that come again are looked for
NOTHING_NEW = Segment(0, 0, 0, b"")
STEP_ENDS = (b"completed", b"failed")

IfBusy = Literal["reject", "queue", "interrupt"]
MAX_WAITING = 100  # runs behind the one that holds a thread


class Happened(NamedTuple):
    """What a transaction did to a run, for those who wait. run: as the caller is to see it. since: the place in the
    event log just before `segment`. webhooks: somebody is to be told. passed: what became of the thread that it held.
    """

    project: str
    run: Run
    since: Position
    segment: Segment
    webhooks: bool = False
    passed: Passed | None = None


class Passed(NamedTuple):
    """A thread went to a run that waited for it. failed: the one that was first, if it could not have it. attaches:
    there are files to be indexed."""

    project: str
    run_id: str
    failed: Happened | None = None
    attaches: bool = False


def tell(house: House, happened: Happened | None) -> None:
    """After the commit: wake followers, and workers when there is something to do."""
    if happened is None:
        return
    house.events.announce(happened.project, happened.run.id, happened.segment)
    report.happened(house, happened.project, happened.run, happened.segment.attempt, happened.since)
    if happened.webhooks:
        house.webhook_queue.wake()
    if happened.run.status == "queued":
        house.queue.wake()
    tell_passed(house, happened.passed)


def tell_passed(house: House, passed: Passed | None) -> None:
    """As `tell`, of a thread that was passed on."""
    if passed is None:
        return
    if passed.failed is not None:
        tell(house, passed.failed)
        return
    house.events.note(passed.project, passed.run_id, "queued")  # its row alone was changed
    house.queue.wake()
    if passed.attaches:
        house.ingest_queue.wake()


# --- creating --------------------------------------------------------------------------------------------------


class RunQuery(NamedTuple):
    """What a request says of the run that it creates, beside the body.

    key_id: of whoever asks. tool_timeout_s: how long each call waits for its output. max_total_tokens, max_cost: what
    the run may take of the model, prompts and answers together; money in the operator's currency.
    """

    include: list[str]
    key_id: str = ""
    tool_timeout_s: float | None = None
    max_total_tokens: int | None = None
    max_cost: float | None = None
    if_busy: IfBusy = "reject"


def new_run(
    house: House,
    thread_id: str,
    row: AssistantRow,
    body: CreateRun | CreateThreadAndRun,
    query: RunQuery,
) -> tuple[Run, RunAsked]:
    """The run that `body` asks of an assistant: each value is the body's, else the assistant's, else the default."""
    assistant = row.assistant
    now = int(house.clock.now())
    asked = RunAsked(
        temperature=_first(body.temperature, row.asked.temperature),
        top_p=_first(body.top_p, row.asked.top_p),
        reasoning_effort=_first(body.reasoning_effort, row.asked.reasoning_effort),
        response_format=_first(plain(body.response_format), row.asked.response_format),
        tool_choice=plain(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        include=query.include,
        tool_timeout_s=query.tool_timeout_s,
        max_total_tokens=query.max_total_tokens,
        max_cost=query.max_cost,
    )
    run = Run(
        id=new_id("run"),
        created_at=now,
        assistant_id=assistant.id,
        thread_id=thread_id,
        expires_at=now + house.settings.run_expires_s,
        model=body.model or assistant.model,
        instructions=_instructions(assistant.instructions, body),
        tools=assistant.tools if body.tools is None else [stored_form(tool) for tool in body.tools],
        metadata=body.metadata or {},
        temperature=_first(asked.temperature, 1.0),
        top_p=_first(asked.top_p, 1.0),
        reasoning_effort=asked.reasoning_effort,
        max_prompt_tokens=body.max_prompt_tokens,
        max_completion_tokens=body.max_completion_tokens,
        truncation_strategy=body.truncation_strategy or TruncationStrategy(type="auto"),
        tool_choice=_first(asked.tool_choice, "auto"),
        parallel_tool_calls=_first(body.parallel_tool_calls, True),
        response_format=_first(asked.response_format, "auto"),
    )
    check_mcp_tools(house, run.tools if body.tools is not None else [])
    _check_tool_choice(run)
    strategy = run.truncation_strategy
    if strategy.type == "last_messages" and strategy.last_messages is None:
        path = "truncation_strategy.last_messages"
        raise InvalidRequest(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    return run, asked


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def plain(value: Any) -> Any:
    """A parsed part of a body as plain JSON data."""
    return None if value is None or value is UNSET else msgspec.to_builtins(value)


def _instructions(assistants: str | None, body: CreateRun | CreateThreadAndRun) -> str:
    base = _first(body.instructions, assistants or "")
    additional = body.additional_instructions if isinstance(body, CreateRun) else None
    return f"{base}\n{additional}" if base and additional else base or additional or ""


def _check_tool_choice(run: Run) -> None:
    choice = run.tool_choice
    if not isinstance(choice, dict):
        return
    kind = choice["type"]
    wanted = choice["function"]["name"] if kind == "function" else kind
    have = {tool["function"]["name"] if kind == "function" else kind for tool in run.tools if tool["type"] == kind}
    if wanted not in have:
        raise InvalidRequest(
            f"Invalid value: '{wanted}'. 'tool_choice' names a tool that is not among the run's tools.",
            param="tool_choice",
            code="invalid_value",
        )


async def insert_run(
    tx: Transaction,
    house: House,
    project: str,
    thread_id: str,
    body: CreateRun | CreateThreadAndRun,
    query: RunQuery,
    tool_resources: dict[str, Any] | None = None,
) -> Happened:
    """Queue a run on a thread that is known to be free."""
    row = await _new_row(tx, house, project, thread_id, body, query)
    row.run.tool_resources = tool_resources or {}
    return await _insert(tx, row)


async def _new_row(
    tx: Transaction,
    house: House,
    project: str,
    thread_id: str,
    body: CreateRun | CreateThreadAndRun,
    query: RunQuery,
) -> RunRow:
    """A run with its place in the thread."""
    assistant = await get_assistant(tx, project, body.assistant_id)
    if assistant is None:
        raise _no_assistant(body.assistant_id)
    run, asked = new_run(house, thread_id, assistant, body, query)
    place = await thread_rows.take_place(tx, project, thread_id, run.created_at)
    assert place is not None
    deadline = run.created_at + house.settings.run_expires_s
    run.created_at = place.created_at
    return RunRow(
        project=project,
        run=run,
        asked=asked,
        spent=Usage(),
        attempt=0,
        deadline=deadline,
        seq=place.seq,
        key_id=query.key_id,
    )


async def _insert(tx: Transaction, row: RunRow) -> Happened:
    await run_rows.insert_run(tx, row)
    segment = Transcript(0).number([run_event(row.run, "created"), run_event(row.run)])
    await event_rows.insert_segment(tx, row.project, row.run.id, segment, row.run.created_at)
    return Happened(row.project, row.run, START, segment)


def _no_assistant(assistant_id: str) -> NotFound | InvalidRequest:
    if not assistant_id.startswith("asst"):
        return InvalidRequest(
            f"Invalid 'assistant_id': '{assistant_id}'. Expected an ID that begins with 'asst'.",
            param="assistant_id",
            code="invalid_value",
        )
    return NotFound.of("assistant", assistant_id)


# --- a busy thread ---------------------------------------------------------------------------------------------


async def make_room(
    tx: Transaction, house: House, project: str, thread_id: str, if_busy: IfBusy
) -> tuple[RunRow | None, Happened | None]:
    """The run that holds the thread, if one does; and one that was overdue and has been expired on the way.

    Raises NotFound or ThreadBusy.
    """
    if await thread_rows.get_thread_object(tx, project, thread_id) is None:
        raise NotFound.of("thread", thread_id)
    active = await run_rows.get_active_run(tx, project, thread_id)
    expired = await expire_if_due(tx, house, active) if active else None
    if expired:  # the thread may be another's now
        active = await run_rows.get_active_run(tx, project, thread_id)
    if active and if_busy == "reject":
        raise ThreadBusy.for_run(thread_id, active.run.id)
    return active, expired


async def insert_waiting_run(
    tx: Transaction, house: House, active: RunRow, body: CreateRun, query: RunQuery, *, urgent: bool
) -> Happened:
    """Queue a run behind the one that holds the thread. urgent: ahead of others that wait.

    Nothing waits for ever: it expires when all that are ahead of it would have expired, and its own time after that
    is over. Its time begins anew when it gets the thread. Raises ThreadBusy when too many wait.
    """
    project, thread_id = active.project, active.run.thread_id
    await run_rows.touch_active_run(tx, active)
    queue = await run_rows.get_queue(tx, project, thread_id)
    if queue.runs >= MAX_WAITING:
        raise ThreadBusy.for_queue(thread_id, queue.runs)
    row = await _new_row(tx, house, project, thread_id, body, query)
    row.waits, row.urgent = True, urgent
    row.asked.additional_messages = msgspec.to_builtins(body.additional_messages or [])
    row.deadline = row.run.expires_at = max(active.deadline, queue.deadline) + house.settings.run_expires_s
    return await _insert(tx, row)


async def interrupt_active_run(
    tx: Transaction, house: House, active: RunRow, waiting: Happened
) -> tuple[Happened, Happened | None]:
    """Cancel the run that `waiting` waits for; return `waiting` as it is after that, and what happened to the other
    if nobody executed it. The caller tells whoever does."""
    stopped = None
    if active.run.status not in HELD_RUNS:
        _, stopped = await _cancel_unheld(tx, house, active)
    elif active.run.status != "cancelling":
        move_run(active.run, "cancel_asked", int(house.clock.now()))
        await run_rows.update_run(tx, active)
    row = await _get_run(tx, active.project, active.run.thread_id, waiting.run.id)
    return waiting._replace(run=row.run), stopped


async def pass_on(tx: Transaction, house: House, row: RunRow, next_id: str | None) -> Passed | None:
    """Let the run that waited first have the thread that `row` has just let go, in the same transaction; its
    additional messages come into the thread now. If they cannot any more, it fails, and the thread goes further."""
    if next_id is None:
        return None
    waiting = await run_rows.get_run(tx, row.project, row.run.thread_id, next_id)
    assert waiting is not None
    now = int(house.clock.now())
    messages = msgspec.convert(waiting.asked.additional_messages, list[CreateMessage])
    try:
        await insert_messages(tx, house, row.project, row.run.thread_id, messages, now)
    except ApiError as error:
        waiting.run.last_error = LastError("server_error", f"Its messages could not be added: {error.message}")
        move_run(waiting.run, "broke", now, usage=waiting.spent)
        return Passed(row.project, next_id, await _write(tx, house, waiting, [run_event(waiting.run)]))
    waiting.asked.additional_messages = []
    waiting.deadline = waiting.run.expires_at = now + house.settings.run_expires_s
    await run_rows.give_thread(tx, waiting)
    return Passed(row.project, next_id, attaches=attach_for_search(messages))


async def pass_on_stranded(house: House, limit: int) -> int:
    """Give threads that nobody holds to those who wait for them; return how many. There should be none."""

    async def work(tx: Transaction) -> list[Passed]:
        passed = []
        for project, thread_id, run_id in await run_rows.list_stranded(tx, limit):
            row = await run_rows.get_run(tx, project, thread_id, run_id)
            if row and row.waits and await run_rows.get_active_run(tx, project, thread_id) is None:
                passed.append(await pass_on(tx, house, row, run_id))
        return [one for one in passed if one]

    if not await house.store.read(lambda tx: run_rows.list_stranded(tx, 1)):
        return 0
    passed = await house.store.write(work)
    for one in passed:
        tell_passed(house, one)
    return len(passed)


# --- reading ---------------------------------------------------------------------------------------------------


async def retrieve_run(house: House, project: str, thread_id: str, run_id: str) -> KnownRun:
    """The run as it is; one that is overdue is expired first. Raises NotFound."""
    known = house.run_memory.get(project, thread_id, run_id) if house.run_memory is not None else None
    if known is None:
        known = await _read_run(house, project, thread_id, run_id)
    if known.status not in ("queued", "requires_action") or house.clock.now() < known.deadline:
        return known

    async def expire(tx: Transaction) -> tuple[RunRow, Happened | None]:
        row = await _get_run(tx, project, thread_id, run_id)
        return row, await expire_if_due(tx, house, row)

    row, expired = await house.store.write(expire)
    tell(house, expired)
    return KnownRun(msgspec.json.encode(row.run).decode(), row.run.status, row.deadline)


async def _read_run(house: House, project: str, thread_id: str, run_id: str) -> KnownRun:
    async def look(tx: Transaction) -> KnownRun:
        found = await run_rows.get_run_object(tx, project, thread_id, run_id)
        if found is None:
            raise await missing_run(tx, project, thread_id, run_id)
        return KnownRun(*found)

    if house.run_memory is None:
        return await house.store.read(look)
    mark, known = house.run_memory.reading(project, run_id), None
    try:
        known = await house.store.read(look)
        return known
    finally:
        house.run_memory.keep(project, thread_id, run_id, mark, known)


async def has_nothing_behind(
    house: House, project: str, thread_id: str, run_id: str, after: Position, ends: Collection[Stop]
) -> bool:
    """Whether a stream of the run's events that goes on behind a place, and ends with `ends`, is over.

    Raises NotFound, and Gone when events behind the place are no longer kept.
    """
    run = await retrieve_run(house, project, thread_id, run_id)

    async def look(tx: Transaction) -> event_rows.Kept | None:
        return await event_rows.get_kept(tx, project, run_id)

    kept = await house.store.read(look)
    if run.status in TERMINAL and (kept is None or kept.stop != "end" or after < kept.start):
        raise Gone(
            f"The events of run '{run_id}' are no longer kept. Read the run, its steps and the messages of its thread."
        )
    return kept is not None and after >= kept.end and kept.stop in ends


# --- changing --------------------------------------------------------------------------------------------------


async def modify_run(house: House, project: str, thread_id: str, run_id: str, body: ModifyRun) -> Run:
    async def work(tx: Transaction) -> Run:
        row = await _get_run(tx, project, thread_id, run_id)
        if body.metadata is not UNSET:
            row.run.metadata = body.metadata or {}
        await run_rows.update_run(tx, row)
        return row.run

    return await house.store.write(work)


async def cancel_run(house: House, project: str, thread_id: str, run_id: str, origin: Origin) -> Run:
    """Ask a run to stop. A run that nobody executes is cancelled at once; its answer still says `cancelling`.

    Raises InvalidRequest when the run is over.
    """

    async def work(tx: Transaction) -> tuple[Run, Happened | None]:
        row = await _get_run(tx, project, thread_id, run_id)
        if expired := await expire_if_due(tx, house, row):
            return expired.run, expired
        if row.run.status in TERMINAL:
            return row.run, None
        await insert_request(tx, project, origin, run_id, int(house.clock.now()))
        if row.run.status == "cancelling":
            return row.run, None
        if row.run.status in HELD_RUNS:
            move_run(row.run, "cancel_asked", int(house.clock.now()))
            await run_rows.update_run(tx, row)
            return row.run, None
        return await _cancel_unheld(tx, house, row)

    run, happened = await house.store.write(work)
    if run.status in TERMINAL:
        tell(house, happened)
        raise InvalidRequest(f"Cannot cancel run with status '{run.status}'.")
    tell(house, happened)
    if happened is None:  # the row alone was changed
        house.events.note(project, run_id, run.status)
    house.queue.cancel(run_id)
    return run


async def _cancel_unheld(tx: Transaction, house: House, row: RunRow) -> tuple[Run, Happened]:
    now = int(house.clock.now())
    move_run(row.run, "cancel_asked", now)
    answer = msgspec.structs.replace(row.run)
    events = [run_event(row.run)]
    move_run(row.run, "stopped", now, usage=row.spent)
    events += await close_open_steps(tx, row.project, row.run, now)
    return answer, await _write(tx, house, row, [*events, run_event(row.run)])


async def submit_tool_outputs(
    house: House, project: str, thread_id: str, run_id: str, body: SubmitToolOutputs, origin: Origin
) -> Happened:
    """Answer calls that a run waits for, and queue it again once all are answered.

    What was given before is given again without effect, whatever has become of the run. Raises BadToolOutputs, and the
    run goes on waiting, unless the other ids are exactly those expected, in any order, or with `partial` some of
    them; InvalidRequest when the run does not wait, or a call has timed out.
    """

    async def work(tx: Transaction) -> Happened:
        row = await _get_run(tx, project, thread_id, run_id)
        if expired := await expire_if_due(tx, house, row):
            return expired
        expected = _awaited(row.run) if row.run.status == "requires_action" else []
        as_expected = {output.tool_call_id for output in body.tool_outputs} == set(expected)
        rounds = [] if as_expected else await step_rows.list_newest_calls(tx, project, run_id, ROUNDS_REMEMBERED)
        submission = Submission(body, expected, [placed.step for placed in rounds])
        if submission.repeats is not None:
            since = await _since_submission(tx, row, submission.repeats, stream=bool(body.stream))
            happened = Happened(project, row.run, since, NOTHING_NEW)
        elif row.run.status != "requires_action":
            raise submission.too_late() or _no_outputs_in(row.run.status)
        else:
            submission.check()
            happened = await _take_outputs(tx, house, row, submission.new)
        await insert_request(tx, project, origin, run_id, int(house.clock.now()), happened.since)
        return happened

    happened = await house.store.write(work)
    if happened.segment.data:
        tell(house, happened)
        if happened.run.status != "queued":
            raise _no_outputs_in(happened.run.status)
    return happened


async def _take_outputs(tx: Transaction, house: House, row: RunRow, given: Mapping[str, str]) -> Happened:
    """Put outputs into the step of a run that waits for them. The run goes on when it was the last; else it waits on,
    which is no event."""
    now = int(house.clock.now())
    missing = [call for call in _asked(row.run) if call["id"] not in given]
    events: list[Event] = []
    for placed in await step_rows.list_open_steps(tx, row.project, row.run.id):
        give(placed.step, given)
        if not missing:
            _close_answered(house, placed, now)
        await step_rows.update_step(tx, row.project, placed.step, usage=placed.usage if missing else None)
        with_content = INCLUDE_FILE_SEARCH_CONTENT in row.asked.include
        events.append(step_event(await fill_in_content(tx, row.project, placed.step) if with_content else placed.step))
    if missing:
        row.run.required_action = {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": missing}}
        await run_rows.update_run(tx, row)
        since = await event_rows.get_last_position(tx, row.project, row.run.id)
        return Happened(row.project, row.run, since, NOTHING_NEW)
    await delete_deadlines(tx, row.project, row.run.id)
    move_run(row.run, "outputs_given", now)
    return await _write(tx, house, row, [*events, run_event(row.run)])


def _close_answered(house: House, placed: PlacedStep, now: int) -> None:
    """Close a step whose calls are all answered; it failed when it also called a tool whose engine is off."""
    kinds = dict.fromkeys(call["type"] for call in placed.step.step_details["tool_calls"])
    reasons = [reason for kind in kinds if (reason := house.why_off(kind))]
    error = LastError("server_error", " ".join(reasons)) if reasons else None
    close_step(placed.step, "failed" if error else "completed", now, placed.usage, error)


async def _since_submission(tx: Transaction, row: RunRow, step: RunStep, *, stream: bool) -> Position:
    """The place in the run's log before the end of a step whose outputs were given: there, the stream of that
    submission began. Raises InvalidRequest when that is kept no more, and a stream is asked for."""
    if step.status == "in_progress" or not stream:
        return await event_rows.get_last_position(tx, row.project, row.run.id)
    ends = tuple(b'event: thread.run.step.%b\ndata: {"id":"%b"' % (end, step.id.encode()) for end in STEP_ENDS)
    for segment in await event_rows.list_segments(tx, row.project, row.run.id, START):
        if segment.data.startswith(ends):
            return Position(segment.attempt, segment.first - 1)
    raise InvalidRequest("These outputs were given before, and the events since then are not kept any more.")


def _no_outputs_in(status: str) -> InvalidRequest:
    return InvalidRequest(f'Runs in status "{status}" do not accept tool outputs.')


def _asked(run: Run) -> list[Json]:
    """The calls that the run waits for."""
    assert run.required_action is not None
    asked: list[Json] = run.required_action["submit_tool_outputs"]["tool_calls"]
    return asked


def _awaited(run: Run) -> list[str]:
    return [call["id"] for call in _asked(run)]


async def _get_run(tx: Transaction, project: str, thread_id: str, run_id: str) -> RunRow:
    """To be changed. Raises NotFound."""
    row = await run_rows.get_run(tx, project, thread_id, run_id, locked=True)
    if row is None:
        raise await missing_run(tx, project, thread_id, run_id)
    return row


async def missing_run(tx: Transaction, project: str, thread_id: str, run_id: str) -> NotFound:
    """Which of the two is missing, thread or run."""
    if await thread_rows.get_thread_object(tx, project, thread_id) is None:
        return NotFound.of("thread", thread_id)
    return NotFound.of("run", run_id)


# --- expiring --------------------------------------------------------------------------------------------------


async def expire_if_due(tx: Transaction, house: House, row: RunRow) -> Happened | None:
    """Expire a run that is past its deadline and held by nobody; the worker sees to those that it holds."""
    if row.run.status not in ("queued", "requires_action") or house.clock.now() < row.deadline:
        return None
    return await _expire(tx, house, row)


async def expire_overdue(house: House, limit: int, executing: Collection[str] = ()) -> int:
    """Expire what is past its deadline and held by nobody, or by a worker that died; return how many.

    executing: ids of runs that this process has in hand, and ends itself.
    """

    async def work(tx: Transaction) -> list[Happened]:
        overdue = await run_rows.list_overdue(tx, house.clock.now(), limit)
        return [await _expire(tx, house, row) for row in overdue if row.run.id not in executing]

    happened = await house.store.write(work)
    for one in happened:
        tell(house, one)
    return len(happened)


async def time_out_calls(house: House, limit: int) -> int:
    """Answer calls whose time is over in the caller's place, so that their runs go on; return how many there were."""
    now = house.clock.now()

    async def look(tx: Transaction) -> list[Deadline]:
        return await list_due(tx, now, limit)

    due = await house.store.read(look)
    for project, thread_id, run_id in dict.fromkeys((one.project, one.thread_id, one.run_id) for one in due):
        tell(house, await house.store.write(partial(_time_out, house, project, thread_id, run_id, now)))
    return len(due)


async def _time_out(
    house: House, project: str, thread_id: str, run_id: str, now: float, tx: Transaction
) -> Happened | None:
    row = await run_rows.get_run(tx, project, thread_id, run_id, locked=True)
    over = await take_due(tx, project, run_id, now)
    if row is None or row.run.status != "requires_action":
        return None
    if expired := await expire_if_due(tx, house, row):
        return expired
    waiting = {step.step.id for step in await step_rows.list_open_steps(tx, project, run_id)}
    asked = set(_awaited(row.run))
    given = {one.call_id: timed_out(one.timeout_s) for one in over if one.step_id in waiting and one.call_id in asked}
    happened = await _take_outputs(tx, house, row, given) if given else None
    return happened if happened and happened.segment.data else None


async def _expire(tx: Transaction, house: House, row: RunRow) -> Happened:
    now = int(house.clock.now())
    move_run(row.run, "timed_out", now, usage=row.spent)
    events = await close_open_steps(tx, row.project, row.run, now)
    return await _write(tx, house, row, [*events, run_event(row.run)])


async def _write(tx: Transaction, house: House, row: RunRow, events: list[Event]) -> Happened:
    """Write a run that no worker holds, with the events of what happened to it."""
    since = await event_rows.get_last_position(tx, row.project, row.run.id)
    transcript = Transcript(row.attempt, since.sequence if since.attempt == row.attempt else 0)
    segment = transcript.number(events, stop_of(row.run))
    next_id = await run_rows.update_run(tx, row)
    await event_rows.insert_segment(tx, row.project, row.run.id, segment, int(house.clock.now()))
    webhooks = await record_run(tx, row.project, row.run, house.clock.now())
    return Happened(
        row.project,
        msgspec.structs.replace(row.run),
        Position(segment.attempt, segment.first - 1),
        segment,
        webhooks,
        await pass_on(tx, house, row, next_id),
    )
