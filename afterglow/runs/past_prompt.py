"""A prompt that a model was given, put together again from what is stored, and shown; and what was left out of it.

The rows of the call say where the history began and ended, what was left out between, and what beside the rows went
into it (`PromptMade`). The hash that is kept with the call tells whether the result is the same. What was deleted since
is shown as deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from msgspec import Struct

from afterglow.contracts import ChatRequest, Transaction
from afterglow.objects import Json, RunStep
from afterglow.rows import files as file_rows
from afterglow.rows import messages as message_rows
from afterglow.rows.model_calls import ModelCall
from afterglow.rows.runs import RunRow
from afterglow.rows.search_results import StoredResult, list_results
from afterglow.rows.steps import list_calls_between
from afterglow.runs.context import STORED_IMAGE, Turn, calls_turn, message_turn
from afterglow.runs.ledger import PromptParts, calibrated
from afterglow.runs.prompt import chat_request, request_hash
from afterglow.tools.file_search import output_of
from afterglow.tools.function import Offer, offer

GONE = "[deleted: {}]"


class Gone(Struct, kw_only=True, frozen=True):
    """Something that was deleted since. type: `message` or `file`."""

    id: str
    type: str


class DroppedMessage(Struct, kw_only=True, frozen=True):
    """A message that was not sent. deleted: since."""

    id: str
    deleted: bool = False


class Dropped(Struct, kw_only=True):
    """Messages that were left out, newest first. count: of all; data: a part of them."""

    count: int = 0
    data: list[DroppedMessage] = []
    has_more: bool = False


class Truncation(Struct, kw_only=True):
    """type: the run's strategy. budget_tokens: room for the whole prompt, null where none was asked for.
    estimated_tokens: of the prompt. kept: messages and steps of calls that were sent. dropped_steps: ids of steps of
    calls that were read and left out."""

    type: str
    budget_tokens: int | None
    estimated_tokens: int
    kept: int
    dropped: Dropped
    dropped_steps: list[str]


class StepPrompt(Struct, kw_only=True):
    """What the model was given for the call that made a step.

    request: in chat-completions form, as it was asked; images as references. sent, dropped_parameters: what went out
    beside messages and tools, and what did not, because the server refuses it. exact: the request is, byte for byte,
    what was sent; deleted: what is missing of it. prompt_hash: sha-256 of what was sent.
    """

    object: str = "thread.run.step.prompt"
    run_id: str
    step_id: str
    model_call_id: str
    attempt: int
    model: str
    model_answered: str
    upstream: str
    request: Json
    sent: Json
    dropped_parameters: list[str]
    exact: bool
    prompt_hash: str
    deleted: list[Gone]
    estimated: PromptParts
    truncation: Truncation


class Rebuilt(NamedTuple):
    """turns: what was sent of the history. left_out: (seq, id, whether it was deleted) of messages that were read and
    not sent; left_out_steps: ids of steps that were not."""

    request: ChatRequest
    turns: list[Turn]
    left_out: list[tuple[int, str, bool]]
    left_out_steps: list[str]
    gone: list[Gone]

    @property
    def hash(self) -> str:
        return request_hash(self.request)


# --- putting together ------------------------------------------------------------------------------------------


async def rebuild(tx: Transaction, row: RunRow, call: ModelCall, now: float) -> Rebuilt:
    """The request of a call of `row`'s."""
    run, made = row.run, call.made
    offered = offer(run.tools)
    if made.tools is not None:
        offered = offered._replace(tools=made.tools, names=made.names)
    gone: dict[str, Gone] = {}
    read = await _read_turns(tx, row, call, offered, gone)
    read.sort(key=lambda turn: turn.place)
    not_sent = set(call.left_out)
    turns = [turn for turn in read if turn.id not in not_sent]
    dropped = [turn for turn in read if turn.id in not_sent]
    left_out = [(turn.place[1], turn.id, gone.pop(turn.id, None) is not None) for turn in dropped if _is_said(turn)]
    steps = [turn.id for turn in dropped if not _is_said(turn)]
    instructions = run.instructions + made.files
    request = chat_request(row, made, instructions, turns, offered)
    for file_id in _stored_images(request):
        if await file_rows.get_file(tx, row.project, file_id, now) is None:
            gone[file_id] = Gone(id=file_id, type="file")
    return Rebuilt(request, turns, left_out, steps, list(gone.values()))


def _is_said(turn: Turn) -> bool:
    return turn.role != "calls"


async def _read_turns(
    tx: Transaction, row: RunRow, call: ModelCall, offered: Offer, gone: dict[str, Gone]
) -> list[Turn]:
    """Everything that could have been sent from the start of the history on. gone: takes what was deleted since."""
    run, project, made = row.run, row.project, call.made
    where = (tx, project, run.thread_id, call.kept_from, call.cut_off)
    turns = []
    for placed in await message_rows.list_messages_between(*where):
        place = (placed.created_at, placed.seq)
        if turn := message_turn(place, placed.message, run.id, vision=made.vision):
            turns.append(turn)
    for message in await message_rows.list_deleted(*where):
        gone[message.id] = Gone(id=message.id, type="message")
        said = [{"role": message.role, "content": GONE.format(message.id)}]
        own = message.run_id == run.id
        turns.append(Turn((message.created_at, message.seq), message.id, message.role, said, 0, own, message.run_id))
    found = await list_results(tx, project, run.id)
    for step in await list_calls_between(*where):
        own = step.step.run_id == run.id
        if own or made.history == "calls":
            outputs = _outputs(step.step, found, gone) if own else {}
            if turn := calls_turn((step.created_at, step.seq), step.step, run.id, offered.names, outputs):
                turns.append(turn)
    return turns


def _outputs(step: RunStep, found: list[StoredResult], gone: dict[str, Gone]) -> Mapping[str, str]:
    """What the file searches of a step gave, by call id; what was quoted of files that are gone is marked."""
    outputs = {}
    for call in step.step_details["tool_calls"]:
        if call["type"] != "file_search" or not (shown := call["file_search"].get("results")):
            continue
        stored = [one for one in found if (one.step_id, one.call_id) == (step.id, call["id"])]
        there = {one.file_id for one in stored}
        missing = list(dict.fromkeys(one["file_id"] for one in shown if one["file_id"] not in there))
        gone |= {file_id: Gone(id=file_id, type="file") for file_id in missing}
        texts = [output_of([one.result for one in stored])] if stored else []
        outputs[call["id"]] = "\n\n".join([*texts, *map(GONE.format, missing)])
    return outputs


# --- showing ---------------------------------------------------------------------------------------------------


def shown_request(request: ChatRequest) -> Json:
    """A request as JSON, without what was not asked for; images as references."""
    fields: Json = {name: value for name, value in msgspec.to_builtins(request).items() if value not in (None, [])}
    for message in fields.get("messages", []):
        if isinstance(message["content"], list):
            message["content"] = [_shown_part(part) for part in message["content"]]
    return fields


def _shown_part(part: Json) -> Json:
    url = part["image_url"]["url"] if part["type"] == "image_url" else ""
    if file_id := _file_id(url):
        return {"type": "image_file", "image_file": {"file_id": file_id, "detail": part["image_url"]["detail"]}}
    if url.startswith("data:"):
        head = url.partition(",")[0]
        return {"type": "image_url", "image_url": {**part["image_url"], "url": f"{head},[{len(url)} characters]"}}
    return part


def _file_id(url: str) -> str:
    return url.removeprefix(STORED_IMAGE) if url.startswith(STORED_IMAGE) else ""


def _stored_images(request: ChatRequest) -> list[str]:
    contents = [message["content"] for message in request.messages if isinstance(message["content"], list)]
    urls = [part["image_url"]["url"] for parts in contents for part in parts if part["type"] == "image_url"]
    return list(filter(None, map(_file_id, urls)))


async def dropped_messages(
    tx: Transaction,
    row: RunRow,
    kept_from: int,
    left_out: list[tuple[int, str, bool]],
    limit: int,
    before_seq: int | None = None,
) -> Dropped:
    """What truncation has dropped. left_out: (seq, id, deleted) of the messages that were read and left out from
    `kept_from` on. before_seq: only what is below."""
    where = (tx, row.project, row.run.thread_id)
    below = await message_rows.count_before(*where, kept_from) if kept_from else 0
    end = kept_from if before_seq is None else min(before_seq, kept_from)
    found = sorted(one for one in left_out if before_seq is None or one[0] < before_seq)[::-1]
    if len(found) <= limit and end:
        found += await message_rows.list_ids_before(*where, end, limit + 1 - len(found))
    data = [DroppedMessage(id=message_id, deleted=deleted) for _, message_id, deleted in found[:limit]]
    return Dropped(count=below + len(left_out), data=data, has_more=len(found) > limit)


def estimated_parts(estimated: Mapping[str, int], factor: int, needed: int | None = None) -> PromptParts:
    """needed: what they were taken for together; the remainder is what rounding makes of it."""
    parts = calibrated(estimated, factor)
    total = sum(parts.values())
    return PromptParts(**parts, remainder=(total if needed is None else needed) - total)
