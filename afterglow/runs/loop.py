"""Executing one attempt of one run: context → model → tool calls → … → a stop.

A step is opened in one transaction and closed in one: step, message, usage, status and events together. Each such
transaction first makes sure that this attempt still holds the run (fencing), and its events are announced when it is
committed. Text goes to followers as it comes and to the database in batches.

What interrupts an attempt (a cancel, the deadline, a lost lease) is asked for from outside with `interrupt`, and takes
effect while the model or the code interpreter is awaited, never in the middle of a transaction of the run's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from operator import itemgetter
from typing import Any, Literal, TypeVar

import msgspec

from afterglow.calibration import Calibration
from afterglow.contracts import (
    ChatRequest,
    Delta,
    House,
    ModelEnd,
    RefusalDelta,
    Segment,
    TextDelta,
    ToolCallDelta,
    Transaction,
)
from afterglow.errors import (
    ContextOverflow,
    InvalidRequest,
    LostLease,
    ModelBroke,
    ModelError,
    ModelRefused,
    SandboxError,
    StoreError,
)
from afterglow.ids import new_id
from afterglow.objects import (
    INCLUDE_FILE_SEARCH_CONTENT,
    Budget,
    IncompleteDetails,
    LastError,
    Message,
    RunStep,
    Usage,
)
from afterglow.prices import Price, cost_of, price_of
from afterglow.rows import events as event_rows
from afterglow.rows import messages as message_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import steps as step_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.files import list_sandbox_files
from afterglow.rows.model_calls import MILLION, ModelCall, insert_model_call
from afterglow.rows.projects import get_project_settings
from afterglow.rows.runs import RunRow
from afterglow.rows.search_results import FoundBy, fill_in_content, insert_results
from afterglow.rows.spend import record_spend
from afterglow.rows.threads import Place
from afterglow.rows.tool_calls import Deadline, insert_deadline
from afterglow.runs import report
from afterglow.runs.budgets import Budgets, NextCall
from afterglow.runs.calling import OutgoingCalls
from afterglow.runs.closing import InHand, close_open_steps, close_step
from afterglow.runs.context import estimate_tokens
from afterglow.runs.images import inline_stored_images
from afterglow.runs.interrupt import Interrupt, Interrupted
from afterglow.runs.lifecycle import Passed, pass_on, tell_passed
from afterglow.runs.prompt import (
    Prompt,
    PromptRules,
    chat_request,
    chat_response_format,
    read_prompt,
    request_hash,
)
from afterglow.runs.search import search_for_run
from afterglow.runs.states import TERMINAL, RunEvent, end_message, move_run
from afterglow.runs.transcript import (
    Event,
    Transcript,
    message_delta,
    message_event,
    run_event,
    step_delta,
    step_event,
    stop_of,
    text_delta_head,
)
from afterglow.runs.turn import Call, ModelTurn, first_delta, image_part, required_action
from afterglow.telemetry import log
from afterglow.tools.annotations import SANDBOX_PATH, citations, file_paths
from afterglow.tools.code_interpreter import CodeInterpreter, SandboxListing
from afterglow.tools.file_search import (
    NOT_SEARCHED,
    context_tokens,
    output_of,
    queries_of,
    results_of,
    search_options,
    within,
    without_content,
)
from afterglow.tools.function import CALLED_OUT, FUNCTIONS, ToolKind, offer
from afterglow.tools.mcp import ListedServers, list_mcp_tools
from afterglow.vector_stores import wait_for_thread_store
from afterglow.webhooks import record_run

T = TypeVar("T")
STORE_RETRY_S = 1.0
FILES_WAIT_S = 60.0
TURNS_FOR_NOTHING = 2  # after as many turns of calls to tools whose engine is off or broken, these are offered no more
FILTERED = "The model's answer was stopped by its server's content filter."


class Execution:
    """One attempt. Made by the worker, which also renews its lease and calls `interrupt.ask`."""

    def __init__(
        self,
        house: House,
        row: RunRow,
        transcript: Transcript,
        calibration: Calibration,
        started: list[Segment],
        task: asyncio.Task[None],
        interpreter: CodeInterpreter,
        budgets: Budgets,
    ) -> None:
        """row: as claimed. transcript: after the claim's events, which are `started` and not yet announced.
        task: the one that will call `run`. interpreter, budgets: the worker's, for all its runs."""
        self.house = house
        self.row = row
        self.interrupt = Interrupt(task)
        self._transcript = transcript
        self._calibration = calibration
        self._started = started
        self._unwritten: list[Segment] = []
        self._offered = offer(row.run.tools)
        self._mcp = ListedServers()
        self._turn: ModelTurn | None = None
        self._budget_cap: int | None = None  # what an overflow without a number has taught this attempt
        self._overflowed = False
        self._turns_for_nothing = 0
        self._given_up: set[ToolKind] = set()
        self._interpreter = interpreter
        self._budgets = budgets
        self._budget: Budget | None = None  # of the project, once looked up
        self._price = Price()
        self._files: SandboxListing | None = None  # of the code interpreter, once looked up

    # --- the way through a run ---------------------------------------------------------------------------------

    async def run(self, committed: Awaitable[None]) -> None:
        """Execute until the run stops. committed: ends when the claim is durable.

        Raises LostLease when another attempt has taken over; then nothing more was written.
        """
        # Followers hear of the start as soon as it is durable, however long the model keeps silent.
        asyncio.ensure_future(committed).add_done_callback(self._claim_committed)
        if self.row.run.status == "cancelling":
            self.interrupt.ask("cancelled")
        try:
            if reason := await self._demanded_engine_off():
                return await self._stop("broke", LastError("server_error", reason))
            await self._ask_mcp_servers()
            await self._wait_for_files()
            while await self._take_turn(committed):
                pass
        except Interrupted as interrupted:
            if interrupted.why == "lost":
                raise LostLease(self.row.run.id) from None
            await self._stop("stopped" if interrupted.why == "cancelled" else "timed_out")
        except InvalidRequest as error:  # of what the run was given, such as a vector store that has expired
            await self._stop("broke", LastError("server_error", error.message))
        except ModelError as error:
            # The server's own words may quote the prompt: they are for the run's owner, not for the log.
            log.warning("Run %s failed: %s of %s.", self.row.run.id, type(error).__name__, self.row.run.model)
            await self._stop("broke", LastError(error.code, str(error)))

    async def _wait_for_files(self) -> None:
        """Files that came with the thread's messages may still be read in."""
        if "file_search" in self._offered.names:
            run = self.row.run
            waiting = partial(wait_for_thread_store, self.house, self.row.project, run.thread_id, FILES_WAIT_S)
            if not await self.interrupt.wait(waiting):
                log.info("Run %s goes on without files that are still being read in.", run.id)

    async def _ask_mcp_servers(self) -> None:
        """What their tools are is found out once, so that the prompt's start stays the same from turn to turn."""
        if any(tool["type"] == "mcp" for tool in self.row.run.tools):
            self._mcp = await self.interrupt.wait(
                partial(list_mcp_tools, self.house, self.row.project, self.row.run.tools)
            )
            self._offered = offer(self.row.run.tools, self._mcp.tools)

    async def fail(self, message: str) -> None:
        """End the run because of a fault of ours."""
        await self._stop("broke", LastError("server_error", message))

    async def _take_turn(self, committed: Awaitable[None]) -> bool:
        """Call the model once and do what it says; return whether it must be called again."""
        run = self.row.run
        prompt = await self._read_prompt()
        prompt_left = None if run.max_prompt_tokens is None else run.max_prompt_tokens - self.row.spent.prompt_tokens
        if prompt_left is not None and prompt.needed_tokens > prompt_left:
            await self._stop("ran_out", incomplete="max_prompt_tokens")
            return False
        completion_left = prompt.made.max_tokens
        if completion_left is not None and completion_left <= 0:
            await self._stop("ran_out", incomplete="max_completion_tokens")
            return False
        assert self._budget is not None
        if why := await self._budgets.why_not(self.row, self._budget, NextCall(prompt.needed_tokens, self._price)):
            await self._stop("broke", LastError("rate_limit_exceeded", why))
            return False
        try:
            return await self._call_model(prompt, committed)
        finally:
            self._budgets.release(self.row)

    async def _call_model(self, prompt: Prompt, committed: Awaitable[None]) -> bool:
        run = self.row.run
        request = chat_request(self.row, prompt.made, prompt.instructions, prompt.cut.turns, self._offered)
        has_parts = any(isinstance(message["content"], list) for message in request.messages)
        prompt_hash = request_hash(request) if has_parts else None  # of what stands for images, not of their bytes
        await self.interrupt.wait(partial(inline_stored_images, self.house, self.row.project, request))
        if self.house.models.wants_inline_images(run.model):
            await self._inline_images(request)
        self.interrupt.check()  # or a call that was never made would be recorded
        self._turn = turn = ModelTurn(prompt, request, prompt_hash)
        try:
            with report.model_call(self.house, self.row, turn):
                await self._listen(turn, committed)
                turn.usage = (turn.end and turn.end.usage) or self._estimated_usage(turn)
                spent = turn.usage.total_tokens
                self.house.limits.spend(self.row.project, self.row.key_id, spent, self.house.clock.now())
        except ContextOverflow as overflow:
            if not self._can_truncate_again(overflow):
                raise
            return True
        return await self._finish_turn(turn)

    async def _read_prompt(self) -> Prompt:
        # A server that is asked for the first time may keep silent as well as its model.
        info = await self.interrupt.wait(lambda: self.house.models.info(self.row.run.model))
        self._price = price_of(self.house.settings.models, self.house.models.names(self.row.run.model))
        if info.tools is False:
            self._offer_nothing()
        rules = PromptRules(
            self.row,
            await self._instructions(),
            self._offered,
            info,
            self._calibration,
            self.house.settings.history,
            chat_response_format(self.row.asked.response_format),
            self._budget_cap,
        )

        known = self._budget

        async def work(tx: Transaction) -> tuple[Prompt, Budget]:
            budget = known or (await get_project_settings(tx, self.row.project)).budget
            return await read_prompt(tx, rules), budget

        prompt, self._budget = await self.house.store.read(work)
        return prompt

    async def _instructions(self) -> str:
        """The run's, and what files the code interpreter has: looked up once, so that the prompt's start stays the
        same from turn to turn."""
        instructions = "\n\n".join(filter(None, [self.row.run.instructions, self._mcp.paragraph()]))
        if "code_interpreter" not in self._offered.names:
            return instructions
        if self._files is None:
            self._files = await self._interpreter.place_files(self.row)
        return "\n\n".join(filter(None, [instructions, self._files.paragraph()]))

    def _offer_nothing(self) -> None:
        """The operator says that the model takes no tools. Raises ModelRefused when the caller demands one."""
        if self.row.asked.tool_choice not in (None, "auto", "none"):
            raise ModelRefused(f"The model {self.row.run.model!r} takes no tools, and tool_choice demands one.")
        self._offered = offer([])

    def _can_truncate_again(self, overflow: ContextOverflow) -> bool:
        """Once per attempt: believe the limit that the server named, or half of what we took it for."""
        if self._overflowed or self.row.run.truncation_strategy.type != "auto" or self._turn is None:
            return False
        self._overflowed = True
        prompt, self._turn = self._turn.prompt, None
        if overflow.window_tokens is None:
            self._budget_cap = prompt.budget_tokens // 2
        else:
            self.house.models.learn_window(self.row.run.model, overflow.window_tokens)
            if prompt.needed_tokens < overflow.window_tokens:
                self._calibration.overflowed(self.row.run.model)
        log.info("Run %s was longer than the model's window; it is cut further and tried again.", self.row.run.id)
        return True

    async def _inline_images(self, request: ChatRequest) -> None:
        """Put fetched images in the place of their URLs."""
        for message in request.messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image_url" and not part["image_url"]["url"].startswith("data:"):
                    fetching = partial(self.house.images.data_url, part["image_url"]["url"])
                    part["image_url"] = {**part["image_url"], "url": await self.interrupt.wait(fetching)}

    async def _demanded_engine_off(self) -> str | None:
        """Why the run cannot be: its tool_choice demands a tool whose engine is off."""
        choice = self.row.asked.tool_choice
        kind = choice.get("type") if isinstance(choice, dict) else None
        if kind == "code_interpreter":
            await self.interrupt.wait(self.house.code_engine.settled)
        return self.house.why_off(kind) if kind else None

    # --- listening to the model --------------------------------------------------------------------------------

    async def _listen(self, turn: ModelTurn, committed: Awaitable[None]) -> None:
        """Stream one model call. The call is made at once; only announcing waits for the claim's commit."""
        async with aclosing(self.house.models.stream(turn.request)) as stream:
            batch = await self.interrupt.next(stream)
            turn.first_token_ms = round((time.monotonic() - turn.started) * 1000)
            await self._announce_start(committed)
            while batch:
                await self._take(turn, batch)
                if turn.end is not None:
                    return
                batch = await self.interrupt.next(stream)
        raise ModelBroke(f"The stream of {self.row.run.model} ended without saying why.")

    async def _announce_start(self, committed: Awaitable[None]) -> None:
        if self._started:
            await asyncio.shield(asyncio.ensure_future(committed))
            self._announce()

    def _claim_committed(self, committed: asyncio.Future[None]) -> None:
        if not committed.cancelled() and committed.exception() is None:
            self._announce()

    async def _take(self, turn: ModelTurn, batch: list[Delta]) -> None:
        """Act on deltas that arrived together; runs of text become one segment."""
        pieces: list[str] = []
        for delta in batch:
            if isinstance(delta, TextDelta) and not turn.calls:
                pieces.append(delta.text)
                continue
            if pieces:
                await self._take_text(turn, pieces)
                pieces = []
            if isinstance(delta, ToolCallDelta):
                await self._take_call(turn, delta)
            elif isinstance(delta, RefusalDelta) and not turn.calls:
                await self._take_refusal(turn, delta.text)
            elif isinstance(delta, ModelEnd):
                turn.end = delta
        if pieces:
            await self._take_text(turn, pieces)

    async def _take_text(self, turn: ModelTurn, pieces: list[str]) -> None:
        """Show text, but for what may still become a marker of a result, and for markers that name none."""
        if shown := [piece for piece in map(turn.markers.feed, pieces) if piece]:
            await self._show_text(turn, shown)

    async def _end_text(self, turn: ModelTurn) -> None:
        if held := turn.markers.end():
            await self._show_text(turn, [held])

    async def _show_text(self, turn: ModelTurn, pieces: list[str]) -> None:
        if turn.message is None:
            await self._open_message(turn)
        if not turn.text:
            # The first delta of a part names its (empty) annotations.
            assert turn.message is not None
            first: dict[str, Any] = {"value": pieces[0], "annotations": []}
            index = turn.next_index
            turn.head = text_delta_head(turn.message.id, index)
            self._keep([message_delta(turn.message.id, [{"index": index, "type": "text", "text": first}])])
            turn.text.append(pieces[0])
            pieces = pieces[1:]
        if pieces:
            turn.text += pieces
            segment = self._transcript.text(turn.head, pieces)
            self.house.events.keep(self.row.project, self.row.run.id, segment)

    async def _take_refusal(self, turn: ModelTurn, piece: str) -> None:
        if turn.message is None:
            await self._open_message(turn)
        assert turn.message is not None
        if not turn.refusal:
            turn.refusal_index = turn.next_index
        turn.refusal.append(piece)
        delta = {"index": turn.refusal_index, "type": "refusal", "refusal": piece}
        self._keep([message_delta(turn.message.id, [delta])])

    async def _take_call(self, turn: ModelTurn, delta: ToolCallDelta) -> None:
        if not turn.calls:
            await self._open_calls(turn)
        assert turn.step is not None
        asked = self.row.asked
        if asked.tool_choice == "none" or (delta.index and asked.parallel_tool_calls is False):
            return  # a server that does not do as it was asked
        if delta.index >= len(turn.calls):
            kind = self._offered.kinds.get(delta.name, "function")
            turn.calls.append(Call(delta.id, delta.name, kind))
            self._keep([step_delta(turn.step.id, [{"index": delta.index, **first_delta(turn.calls[-1])}])])
        call = turn.calls[delta.index]
        if not delta.arguments:
            return
        call.arguments.append(delta.arguments)
        if call.kind in FUNCTIONS:
            piece = {"index": delta.index, "type": "function", "function": {"arguments": delta.arguments}}
            self._keep([step_delta(turn.step.id, [piece])])
        elif call.kind == "code_interpreter" and (code := call.code.feed(delta.arguments)):
            self._keep_code(turn, call, {"input": code})

    # --- opening and closing steps -----------------------------------------------------------------------------

    async def _open_message(self, turn: ModelTurn) -> None:
        """One transaction: the step and its message, both in progress."""
        now = int(self.house.clock.now())
        run = self.row.run
        message = Message(
            id=new_id("msg"),
            created_at=now,
            thread_id=run.thread_id,
            status="in_progress",
            role="assistant",
            assistant_id=run.assistant_id,
            run_id=run.id,
        )
        details = {"type": "message_creation", "message_creation": {"message_id": message.id}}
        step = self._new_step("message_creation", details, now)
        ran_code = any(tool["type"] == "code_interpreter" for tool in run.tools)

        async def work(tx: Transaction, row: RunRow) -> list[Event]:
            place = await self._take_place(tx, now, 2)
            step.created_at = message.created_at = place.created_at
            await step_rows.insert_step(tx, row.project, step, place.seq, row.attempt)
            await message_rows.insert_message(tx, row.project, message, place.seq + 1)
            await self._hide_left_behind(tx)
            turn.pictures = await step_rows.list_pictures_to_show(tx, row.project, run.id) if ran_code else []
            return [
                step_event(step, "created"),
                step_event(step, "in_progress"),
                message_event(message, "created"),
                message_event(message, "in_progress"),
                *(
                    message_delta(message.id, [{"index": index, **image_part(file_id)}])
                    for index, file_id in enumerate(turn.pictures)
                ),
            ]

        await self._commit(work)
        turn.message, turn.step = message, step

    async def _open_calls(self, turn: ModelTurn) -> None:
        """One transaction: close the text that came first, if any, and open the step of this turn's calls."""
        await self._end_text(turn)
        now = int(self.house.clock.now())
        step = self._new_step("tool_calls", {"type": "tool_calls", "tool_calls": []}, now)

        async def work(tx: Transaction, row: RunRow) -> list[Event]:
            events: list[Event] = []
            if turn.message is not None:
                # The whole usage of this model call goes to the step of its tool calls.
                events += await self._close_text(tx, row, turn, now, Usage())
                turn.text_step_id = turn.step.id if turn.step else None
            place = await self._take_place(tx, now, 1)
            step.created_at = place.created_at
            await step_rows.insert_step(tx, row.project, step, place.seq, row.attempt)
            await self._hide_left_behind(tx)
            return [*events, step_event(step, "created"), step_event(step, "in_progress")]

        await self._commit(work)
        turn.message, turn.step = None, step

    def _new_step(self, kind: Literal["message_creation", "tool_calls"], details: dict[str, Any], now: int) -> RunStep:
        run = self.row.run
        return RunStep(
            id=new_id("step"),
            created_at=now,
            run_id=run.id,
            assistant_id=run.assistant_id,
            thread_id=run.thread_id,
            type=kind,
            expires_at=run.expires_at,
            step_details=details,
        )

    async def _hide_left_behind(self, tx: Transaction) -> None:
        """What dead attempts left open; before the first there was none."""
        if self.row.attempt > 1:
            await message_rows.hide_left_behind(tx, self.row.project, self.row.run.id)

    async def _take_place(self, tx: Transaction, now: int, count: int) -> Place:
        place = await thread_rows.take_place(tx, self.row.project, self.row.run.thread_id, now, count)
        if place is None:
            raise LostLease(self.row.run.id)
        return place

    async def _close_text(self, tx: Transaction, row: RunRow, turn: ModelTurn, now: int, usage: Usage) -> list[Event]:
        assert turn.message is not None
        assert turn.step is not None
        # Copies: should the commit fail, this is done again.
        message = msgspec.structs.replace(turn.message, content=turn.content)
        events = await self._annotate(tx, row, message, turn.prompt.markers)
        stored = await message_rows.get_message(tx, row.project, message.thread_id, message.id)
        message.metadata = stored.metadata if stored else {}  # a caller may have set it since
        step = msgspec.structs.replace(turn.step)
        end_message(message, now)
        await message_rows.update_message(tx, row.project, message)
        close_step(step, "completed", now, usage)
        await step_rows.update_step(tx, row.project, step)
        return [*events, message_event(message), step_event(step)]

    async def _annotate(
        self, tx: Transaction, row: RunRow, message: Message, markers: Mapping[str, str]
    ) -> list[Event]:
        """Put annotations to the files that the text cites or names, and tell those who stream."""
        events = []
        for index, part in enumerate(message.content):
            if part["type"] == "text":
                text = part["text"]["value"]
                found = citations(text, markers)
                if SANDBOX_PATH in text:
                    files = await list_sandbox_files(tx, row.project, message.thread_id)
                    found += file_paths(text, {file.name: file.file_id for file in files})
                    found.sort(key=itemgetter("start_index"))
                part["text"]["annotations"] = found
                numbered = [{"index": number, **annotation} for number, annotation in enumerate(found)]
                piece = {"index": index, "type": "text", "text": {"value": "", "annotations": numbered}}
                events += [message_delta(message.id, [piece])] if found else []
        return events

    async def _finish_turn(self, turn: ModelTurn) -> bool:
        """The model is done: close its step and move the run. Return whether another turn follows."""
        end, usage = turn.end, turn.usage
        assert end is not None
        assert usage is not None
        self._calibrate(turn, end.usage)
        if end.finish_reason == "content_filter":
            await self._stop("broke", LastError("invalid_prompt", FILTERED), message_reason="content_filter")
            return False
        if reason := self._ran_out(turn, usage):
            await self._stop("ran_out", incomplete=reason)
            return False
        if turn.calls:
            return await self._close_calls(turn, usage)
        await self._end_text(turn)
        if turn.message is None:
            await self._show_text(turn, [""])
        await self._answer(turn, usage)
        return False

    def _ran_out(self, turn: ModelTurn, usage: Usage) -> str | None:
        run, end = self.row.run, turn.end
        spent = self.row.spent.plus(usage)
        if run.max_prompt_tokens is not None and spent.prompt_tokens > run.max_prompt_tokens:
            return "max_prompt_tokens"
        limit = run.max_completion_tokens
        if (end and end.finish_reason == "length") or (limit is not None and spent.completion_tokens > limit):
            return "max_completion_tokens"
        return None

    def _estimated_usage(self, turn: ModelTurn) -> Usage:
        """For servers that report none; the model-call row then holds no usage, and so tells the two apart."""
        texts = [*turn.text, *turn.refusal, *(piece for call in turn.calls for piece in (call.name, *call.arguments))]
        completion = estimate_tokens("".join(texts))
        prompt = turn.prompt.needed_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _calibrate(self, turn: ModelTurn, reported: Usage | None) -> None:
        if reported is None:
            return
        estimated = sum(turn.prompt.estimated.values())
        if estimated > 2000 and reported.prompt_tokens < estimated / 3:
            log.warning(
                "The server of %s counted %d tokens of a prompt that we estimate at %d: it may have cut it.",
                self.row.run.model,
                reported.prompt_tokens,
                estimated,
            )
            return
        self._calibration.learn(self.row.run.model, estimated, reported.prompt_tokens)

    async def _answer(self, turn: ModelTurn, usage: Usage) -> None:
        """One transaction: message, step, model call and run, all completed."""
        now = int(self.house.clock.now())

        async def work(tx: Transaction, row: RunRow) -> list[Event]:
            events = await self._close_text(tx, row, turn, now, usage)
            await self._record_call(tx, row, turn, usage)
            move_run(row.run, "answered", now, usage=row.spent)
            return [*events, run_event(row.run)]

        await self._commit(work)

    async def _close_calls(self, turn: ModelTurn, usage: Usage) -> bool:
        """Run what is ours to run; then, in one transaction, wait for the caller's outputs, or go on without."""
        waiting = [call for call in turn.calls if call.kind == "function"]
        await self._run_server_side(turn, usage)
        with_content = INCLUDE_FILE_SEARCH_CONTENT in self.row.asked.include
        failures = [call.failure for call in turn.calls if call.failure and call.output is None]
        now = int(self.house.clock.now())
        opened = turn.step
        assert opened is not None

        async def work(tx: Transaction, row: RunRow) -> list[Event]:
            if row.run.status == "cancelling":
                raise Interrupted("cancelled")
            step = msgspec.structs.replace(opened, step_details=turn.details)
            if not turn.recorded:
                await self._record_call(tx, row, turn, usage)
            await self._keep_results(tx, row, turn)
            if waiting:
                await step_rows.update_step(tx, row.project, step, usage=usage)
                move_run(row.run, "calls_functions", now)
                row.run.required_action = required_action(waiting)
                await self._set_deadlines(tx, row, step.id, waiting)
                return [run_event(row.run)]
            error = LastError("server_error", " ".join(failures)) if failures else None
            close_step(step, "failed" if failures else "completed", now, usage, error)
            await step_rows.update_step(tx, row.project, step)
            return [step_event(await fill_in_content(tx, row.project, step) if with_content else step)]

        await self._commit(work)
        self._turn = None
        if len(failures) == len(turn.calls):
            self._stop_offering({call.kind for call in turn.calls})
        return not waiting

    async def _set_deadlines(self, tx: Transaction, row: RunRow, step_id: str, waiting: list[Call]) -> None:
        """Of those calls that do not wait for as long as the run does."""
        now = self.house.clock.now()
        for call in waiting:
            calling = self._offered.callings.get(call.name)
            timeout_s = (calling and calling.timeout_s) or row.asked.tool_timeout_s
            if timeout_s is not None:
                place = row.project, row.run.thread_id, row.run.id, step_id, call.id
                await insert_deadline(tx, Deadline(*place, timeout_s, now + timeout_s))

    async def _keep_results(self, tx: Transaction, row: RunRow, turn: ModelTurn) -> None:
        """What the turn's searches have found."""
        for call in turn.calls:
            assert turn.step is not None
            found_by = FoundBy(row.run.thread_id, row.run.id, turn.step.id, call.id)
            await insert_results(tx, row.project, found_by, call.results)

    async def _run_server_side(self, turn: ModelTurn, usage: Usage) -> None:
        """Make the calls that go out, at the same time; then run those whose engine is ours, one after the other."""
        if going_out := [call for call in turn.calls if call.kind in CALLED_OUT]:
            await self._call_out(turn, going_out, usage)
        for call in turn.calls:
            if call.kind in FUNCTIONS:
                continue
            if call.kind == "code_interpreter" and (missing := call.code.end()):
                self._keep_code(turn, call, {"input": missing})
            with report.tool_call(self.house, self.row, turn, call):
                if call.kind == "file_search":
                    await self._search_files(turn, call)
                elif off := self.house.why_off(call.kind):
                    self._fail(turn, call, off)
                else:
                    await self._run_code(turn, call, usage)

    async def _call_out(self, turn: ModelTurn, calls: list[Call], usage: Usage) -> None:
        """Whoever takes over from here on finds the calls in their step, and does not make them again."""
        if not turn.recorded:
            await self._show_calls(turn, usage)
        outgoing = OutgoingCalls(self.house, self.row, turn, self._offered)
        await self.interrupt.wait(partial(outgoing.make, calls, self._room_for_results(turn)))

    async def _search_files(self, turn: ModelTurn, call: Call) -> None:
        """Raises InvalidRequest when a store cannot be searched: it has expired, or needs another embedding model."""
        run, house = self.row.run, self.house
        options = search_options(run.tools, run.model)
        queries = queries_of("".join(call.arguments))
        search = partial(search_for_run, house, self.row, queries, options)
        try:
            found = await self.interrupt.wait(search)
        except StoreError as error:
            # Not a reason to let the run go: the model would be asked anew by each attempt.
            log.error("A search of run %s failed: %s", run.id, error)
            self._fail(turn, call, NOT_SEARCHED)
            return
        earlier = sum(bool(other.results) for other in turn.calls)
        hits = within(found.hits, context_tokens(run.model, self._room_for_results(turn)))
        names = {file_id: file.filename for file_id, file in found.files.items()}
        call.results = results_of(hits, names, found.number + earlier)
        call.search = {
            "ranking_options": options.ranking_options,
            "results": [without_content(result) for result in call.results],
            "x-queries": queries,
        }

    def _room_for_results(self, turn: ModelTurn) -> int:
        """Tokens of the window that are not taken by what every prompt to come has: the run's own calls cannot be
        left out, so the results of many searches would leave no room for an answer."""
        prompt = turn.prompt
        own = sum(each.tokens for each in prompt.cut.turns if each.own)
        asked = next((each.tokens for each in reversed(prompt.cut.turns) if each.role == "user"), 0)
        now = sum(estimate_tokens(output_of(call.results)) for call in turn.calls if call.results)
        return prompt.budget_tokens - (prompt.needed_tokens - prompt.cut.tokens) - own - asked - now

    async def _run_code(self, turn: ModelTurn, call: Call, usage: Usage) -> None:
        if not turn.recorded:
            await self._show_calls(turn, usage)
        assert self._files is not None
        seen = any(self._is_code_call(called) for before in turn.prompt.cut.turns for called in before.chat)
        outputs = self._interpreter.run(self.row, self._files.placed, call.code.text, seen=seen)
        try:
            async with aclosing(outputs):
                while (output := await self.interrupt.next(outputs)) is not None:
                    delta = call.print(output) if isinstance(output, str) else call.show(output.id)
                    self._keep_code(turn, call, delta)
        except SandboxError as error:
            self._fail(turn, call, str(error))

    async def _show_calls(self, turn: ModelTurn, usage: Usage) -> None:
        """One transaction: what the model has called, for those who read the step while it runs, and what it cost."""
        opened = turn.step
        assert opened is not None

        async def work(tx: Transaction, row: RunRow) -> list[Event]:
            if row.run.status == "cancelling":
                raise Interrupted("cancelled")
            await self._record_call(tx, row, turn, usage)
            step = msgspec.structs.replace(opened, step_details=turn.details)
            await step_rows.update_step(tx, row.project, step, usage=usage)
            return []

        await self._commit(work)
        turn.recorded = True
        self._budgets.release(self.row)

    def _fail(self, turn: ModelTurn, call: Call, reason: str) -> None:
        """A call that was not run; its output says why."""
        call.failure = reason
        if call.kind == "code_interpreter":
            self._keep_code(turn, call, call.print(reason))

    def _keep_code(self, turn: ModelTurn, call: Call, delta: dict[str, Any]) -> None:
        assert turn.step is not None
        piece = {"index": turn.calls.index(call), "type": "code_interpreter", "code_interpreter": delta}
        self._keep([step_delta(turn.step.id, [piece])])

    def _is_code_call(self, message: dict[str, Any]) -> bool:
        name = self._offered.names["code_interpreter"]
        return any(called["function"]["name"] == name for called in message.get("tool_calls", []))

    def _stop_offering(self, kinds: set[ToolKind]) -> None:
        """A model that keeps calling what cannot be had is not asked for ever."""
        self._turns_for_nothing += 1
        if self._turns_for_nothing >= TURNS_FOR_NOTHING:
            self._given_up |= kinds
            kept = [tool for tool in self.row.run.tools if tool["type"] not in self._given_up]
            self._offered = offer(kept, self._mcp.tools)

    async def _record_call(self, tx: Transaction, row: RunRow, turn: ModelTurn, usage: Usage) -> None:
        """Add the tokens to the run, and one row for the ledger."""
        row.spent = row.spent.plus(usage)
        call = self._model_call(row, turn, turn.end, usage)
        await insert_model_call(tx, row.project, call)
        await record_spend(tx, row, call, usage)

    def _model_call(self, row: RunRow, turn: ModelTurn, end: ModelEnd | None, usage: Usage) -> ModelCall:
        prompt, cost = turn.prompt, cost_of(self._price, usage)
        return ModelCall(
            id=new_id("mcall"),
            thread_id=row.run.thread_id,
            run_id=row.run.id,
            step_id=turn.step.id if turn.step else None,
            attempt=row.attempt,
            created_at=int(self.house.clock.now()),
            upstream=end.upstream if end else "",
            model_asked=row.run.model,
            model_answered=end.model if end else "",
            sent=end.sent if end else {},
            dropped=end.dropped if end else [],
            cut_off=prompt.cut_off,
            kept_from=prompt.cut.kept_from,
            budget_tokens=prompt.budget_tokens if row.run.truncation_strategy.type == "auto" else 0,
            left_out=prompt.cut.left_out,
            estimated=prompt.estimated,
            usage=end.raw_usage if end else None,
            prompt_hash=turn.prompt_hash,
            first_token_ms=turn.first_token_ms,
            total_ms=round((time.monotonic() - turn.started) * 1000),
            finish_reason=end.finish_reason if end else "interrupted",
            text_step_id=turn.text_step_id,
            factor=round(prompt.factor * MILLION),
            counted=usage,
            cost=cost.nanos,
            currency=self.house.settings.currency,
            unpriced_tokens=cost.unpriced_tokens,
            made=prompt.made,
        )

    async def _stop(
        self,
        event: RunEvent,
        error: LastError | None = None,
        *,
        incomplete: str | None = None,
        message_reason: str | None = None,
    ) -> None:
        """One transaction: close what is open, and end the run with `event`.

        incomplete: the run's reason. message_reason: the message's, when it differs from what the run's end implies.
        """
        now = int(self.house.clock.now())
        turn = self._turn
        usage = turn.usage if turn is not None else None
        in_hand = InHand(usage=usage, message_reason=message_reason)
        if turn is not None and turn.step is not None:
            in_hand.tool_calls = turn.tool_calls

        async def work(tx: Transaction, row: RunRow) -> list[Event]:
            events = [run_event(row.run)] if row.run.status == "cancelling" else []
            if turn is not None and turn.message is not None:
                message = msgspec.structs.replace(turn.message, content=turn.content)
                events += await self._annotate(tx, row, message, turn.prompt.markers)
                in_hand.content = message.content
            if turn is not None:
                await self._keep_results(tx, row, turn)
            if turn is not None and not turn.recorded:
                await self._record_call(tx, row, turn, usage or Usage())
            row.run.last_error = error
            row.run.incomplete_details = IncompleteDetails(incomplete) if incomplete else None
            move_run(row.run, event, now, usage=row.spent)
            events += await close_open_steps(tx, row.project, row.run, now, in_hand)
            return [*events, run_event(row.run)]

        await self._commit(work)

    # --- committing and announcing -----------------------------------------------------------------------------

    async def _commit(self, work: Callable[[Transaction, RunRow], Awaitable[list[Event]]]) -> None:
        """Do `work` on the run as it is now, write its events with it, and announce them once committed.

        Raises LostLease when this attempt does not hold the run any more. A database that fails is asked again until
        the run's deadline: what the model has said must not be lost to a moment's full disk.
        """
        # Kept until it is written: `work` may still refuse.
        self._unwritten += self.house.events.take_unwritten(self.row.run.id)
        sequence = self._transcript.sequence

        async def fenced(tx: Transaction) -> tuple[RunRow, Segment, bool, Passed | None]:
            self._transcript.sequence = sequence  # it may be run again
            row = await run_rows.get_held_run(tx, self.row.project, self.row.run.id, self.row.attempt)
            if row is None:
                raise LostLease(self.row.run.id)
            segment = self._transcript.number(await work(tx, row), stop_of(row.run))
            next_id = await run_rows.update_run(tx, row)
            parts = [*self._unwritten, segment] if segment.data else self._unwritten
            if await self._message_is_gone(tx):
                parts = [part._replace(data=b"") for part in parts]
                await event_rows.blank_run_events(tx, row.project, row.run.id)
            for part in parts:
                await event_rows.insert_segment(tx, row.project, row.run.id, part, int(self.house.clock.now()))
            webhooks = await record_run(tx, row.project, row.run, self.house.clock.now())
            return row, segment, webhooks, await pass_on(tx, self.house, row, next_id)

        while True:
            try:
                self.row, segment, webhooks, passed = await self.house.store.write(fenced)
                break
            except StoreError:
                if self.house.clock.now() > self.row.deadline:
                    raise
                await asyncio.sleep(STORE_RETRY_S)
        self._unwritten = []
        self._announce(*[segment] if segment.data else [])
        if webhooks:
            self.house.webhook_queue.wake()
        if self.row.run.status in TERMINAL:
            report.ended(self.house, self.row.project, self.row.run, self.row.attempt)
        tell_passed(self.house, passed)

    async def _message_is_gone(self, tx: Transaction) -> bool:
        """Whether a caller deleted the message that is being written: then its text must not stay in the log."""
        message = self._turn.message if self._turn else None
        if message is None:
            return False
        return await message_rows.get_message_object(tx, self.row.project, message.thread_id, message.id) is None

    def _announce(self, *segments: Segment) -> None:
        """After the claim's own events, when those still wait: what is committed now was committed after the claim."""
        started, self._started = self._started, []
        for segment in [*started, *segments]:
            self.house.events.announce(self.row.project, self.row.run.id, segment)

    def _keep(self, deltas: list[Event]) -> None:
        self.house.events.keep(self.row.project, self.row.run.id, self._transcript.number(deltas))
