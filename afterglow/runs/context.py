"""What the model sees: turns of history in chat form, their estimated size, and what is left out when it is too much.

Pure. Reading the thread is in `prompt.py`, which feeds turns to `Window` newest first and stops when it has enough, so
that a long thread costs no more than what can fit.

Truncation `auto` keeps instructions, tools and the newest turns that fit the budget. A call is never cut from its
output (they are one turn), and neither the newest user message nor anything of the run itself is dropped. Old turns
go in blocks: when the budget is passed, the history is cut to KEEP_SHARE of it, and the next runs keep that start
until it is passed again, so that providers can cache the prefix. `last_messages` keeps exactly the n newest messages
and the calls among them.

Sizes are estimates: UTF-8 bytes per token by script, calibrated per model by what its server reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import compress
from types import MappingProxyType
from typing import Any

import msgspec

from afterglow.objects import Json, Message, RunStep, TruncationStrategy
from afterglow.rows.messages import SaidMessage
from afterglow.tools.file_search import NOT_SEARCHED, output_of

ASCII_BYTES_PER_TOKEN = 3.6
OTHER_BYTES_PER_TOKEN = 2.4
TOKENS_PER_MESSAGE = 4
STORED_IMAGE = "afterglow-file:"  # and a file's id: stands for its bytes, which `images.py` puts in its place
IMAGE_TOKENS = {"low": 85, "high": 1100, "auto": 800}
KEEP_SHARE = 0.7
EARLIER_OUTPUT_CHARS = 4000  # tool outputs of earlier runs are clipped to this
CODE_OUTPUT_CHARS = 16_000  # what code of the run itself has printed, to this
COMPLETION_RESERVE_TOKENS = 4096
LARGEST_PAGE = 512
NONE_FOUND: Mapping[str, str] = MappingProxyType({})

Place = tuple[int, int]  # (created_at, seq)
NEWEST: Place = (2**62, 2**62)


def estimate_tokens(text: str) -> int:
    """Tokens of a text, uncalibrated, rounded up."""
    if text.isascii():
        return math.ceil(len(text) / ASCII_BYTES_PER_TOKEN)
    ascii_bytes = len(text.encode("ascii", "ignore"))
    other_bytes = len(text.encode()) - ascii_bytes
    return math.ceil(ascii_bytes / ASCII_BYTES_PER_TOKEN + other_bytes / OTHER_BYTES_PER_TOKEN)


class Turn(msgspec.Struct):
    """A piece of history that is sent whole or not at all.

    id: of the message or step. chat: one message, or a call with its outputs. run_id: of the run that made it, if
    any did. own: that is the run in hand. images, results, retrieved: tokens of it that are images, outputs of tools,
    and passages that file search has found.
    """

    place: Place
    id: str
    role: str
    chat: list[Json]
    tokens: int
    own: bool = False
    run_id: str | None = None
    images: int = 0
    results: int = 0
    retrieved: int = 0


# --- turns of what is stored -----------------------------------------------------------------------------------


def message_turn(place: Place, message: Message | SaidMessage, run_id: str, *, vision: bool) -> Turn | None:
    """A message in chat form; None when it says nothing. vision: whether images can be sent."""
    parts = [part for stored in message.content if (part := _chat_part(stored, vision and message.role == "user"))]
    if not parts:
        return None
    content: Any = parts
    if all(part["type"] == "text" for part in parts):
        content = parts[0]["text"] if len(parts) == 1 else "\n".join(part["text"] for part in parts)
    tokens, images = TOKENS_PER_MESSAGE, 0
    for part in parts:
        size = _part_tokens(part)
        tokens += size
        if part["type"] != "text":
            images += size
    chat = [{"role": message.role, "content": content}]
    return Turn(place, message.id, message.role, chat, tokens, message.run_id == run_id, message.run_id, images)


def _chat_part(stored: Json, images: bool) -> Json | None:
    kind = stored["type"]
    if kind == "text":
        return {"type": "text", "text": stored["text"]["value"]} if stored["text"]["value"] else None
    if kind == "refusal":
        return {"type": "text", "text": stored["refusal"]}
    if kind == "image_url" and images:
        return {"type": "image_url", "image_url": stored["image_url"]}
    if kind == "image_file" and images:
        url, detail = STORED_IMAGE + stored["image_file"]["file_id"], stored["image_file"].get("detail", "auto")
        return {"type": "image_url", "image_url": {"url": url, "detail": detail}}
    name = stored[kind].get("url") or stored[kind].get("file_id") or ""
    return {"type": "text", "text": f"[image: {name if len(name) <= 200 else 'inline data'}]"}


def _part_tokens(part: Json) -> int:
    if part["type"] == "text":
        return estimate_tokens(part["text"])
    return IMAGE_TOKENS.get(part["image_url"].get("detail", "auto"), IMAGE_TOKENS["auto"])


def calls_turn(
    place: Place, step: RunStep, run_id: str, names: dict[str, str], found: Mapping[str, str] = NONE_FOUND
) -> Turn | None:
    """A tool-call step in chat form, with its outputs; None when a call has no output.

    names: under which name each server-side tool is offered now. Of file search, only the run's own calls are shown;
    found: what they gave, by call id.
    """
    own = step.run_id == run_id
    calls, outputs = [], []
    tokens = results = retrieved = 0
    for call in step.step_details["tool_calls"]:
        if call["type"] == "file_search" and not own:
            continue
        name, arguments, output = _call_texts(call, step, names, found)
        if output is None:
            return None
        if not own:
            output = clipped(output, EARLIER_OUTPUT_CHARS)
        calls.append({"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}})
        outputs.append({"role": "tool", "tool_call_id": call["id"], "content": output})
        size = estimate_tokens(output)
        tokens += 2 * TOKENS_PER_MESSAGE + estimate_tokens(name + arguments) + size
        if call["type"] == "file_search":
            retrieved += size
        else:
            results += size
    if not calls:
        return None
    chat: list[Json] = [{"role": "assistant", "content": None, "tool_calls": calls}, *outputs]
    return Turn(place, step.id, "calls", chat, tokens, own, step.run_id, results=results, retrieved=retrieved)


def _call_texts(
    call: Json, step: RunStep, names: dict[str, str], found: Mapping[str, str]
) -> tuple[str, str, str | None]:
    """Name, arguments and output of a stored call; the reason stands in for the output of one that failed."""
    kind: str = call["type"]
    failure = f"ERROR: {step.last_error.message}" if step.last_error else None
    if kind == "function":
        function: Json = call["function"]
        output: str | None = function["output"]
        return str(function["name"]), function["arguments"] or "{}", output
    if kind == "code_interpreter":
        ran = call["code_interpreter"]
        logs = "\n".join(_output_text(output) for output in ran["outputs"])
        arguments = msgspec.json.encode({"code": ran["input"]}).decode()
        return names.get(kind, "python"), arguments, clipped(logs, CODE_OUTPUT_CHARS) or failure or "(no output)"
    arguments = msgspec.json.encode({"queries": call["file_search"].get("x-queries", [])}).decode()
    nothing = output_of([]) if "results" in call["file_search"] else f"ERROR: {NOT_SEARCHED}"
    return names.get(kind, "file_search"), arguments, found.get(call["id"]) or nothing


def _output_text(output: Json) -> str:
    return str(output["logs"]) if output["type"] == "logs" else f"[image: {output['image']['file_id']}]"


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters of a text, from its start and its end, where errors stand; the gap is named."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    return f"{text[: limit - tail]}\n[{len(text) - limit} characters left out]\n{text[-tail:]}"


# --- the window ------------------------------------------------------------------------------------------------


def _is_earlier_message(turn: Turn) -> bool:
    return turn.role != "calls" and not turn.own


class Cut(msgspec.Struct, kw_only=True):
    """What was decided. turns: oldest first. kept_from: seq of the oldest one kept, 0 when nothing was left out.
    left_out: ids of turns that were read and not kept. tokens: estimate of what is kept, calibrated."""

    turns: list[Turn]
    kept_from: int
    left_out: list[str]
    tokens: int


class Window:
    """Takes turns newest first, says when it has enough, then cuts.

    budget_tokens: for history alone. factor: calibration of this model. kept_from: where the history of the thread's
    last call began (seq), if that call had as much room; else 0.
    """

    def __init__(
        self,
        strategy: TruncationStrategy,
        budget_tokens: int,
        factor: float = 1.0,
        kept_from: int = 0,
    ) -> None:
        self._strategy = strategy
        self._budget = budget_tokens
        self._factor = factor
        self._kept_from = kept_from
        self._turns: list[Turn] = []
        self._tokens = 0
        self._messages = 0
        self._has_user = False

    @property
    def full(self) -> bool:
        """Whether older turns would change nothing."""
        if self._strategy.type == "last_messages":
            return self._messages >= (self._strategy.last_messages or 1)
        return self._has_user and self._tokens > self._budget

    def turns_missing(self, read_before: int) -> int:
        """How many more turns would fill the window, by the size of those so far; a guess, between half and four
        times as many as were read at once before, and never more than LARGEST_PAGE."""
        average = max(self._tokens / max(len(self._turns), 1), 1)
        guess = math.ceil((self._budget - self._tokens) / average * 1.1)
        return min(max(guess, read_before // 2, 8), read_before * 4, LARGEST_PAGE)

    def add(self, turn: Turn) -> None:
        self._turns.append(turn)
        self._tokens += self._size(turn)
        self._messages += _is_earlier_message(turn)
        if turn.role == "user" and not self._has_user:
            self._has_user = True
            self._kept_from = min(self._kept_from, turn.place[1])

    def cut(self) -> Cut:
        """Decide. Call it when `full`, or when the thread has no more."""
        if self._strategy.type == "last_messages":
            kept = self._newest_messages()
        elif self._tokens <= self._budget:
            kept = self._since_previous_start()
        else:
            kept = self._newest_that_fit()
        chosen = set(map(id, kept))
        left_out = [turn.id for turn in reversed(self._turns) if id(turn) not in chosen]
        complete = len(kept) == len(self._turns) and not self.full
        kept_from = 0 if not kept or (complete and self._strategy.type == "auto") else kept[-1].place[1]
        return Cut(
            turns=kept[::-1],
            kept_from=kept_from,
            left_out=left_out,
            tokens=sum(self._size(turn) for turn in kept),
        )

    def _size(self, turn: Turn) -> int:
        return math.ceil(turn.tokens * self._factor)

    def _newest_messages(self) -> list[Turn]:
        kept, messages = [], 0
        for turn in self._turns:
            if messages == (self._strategy.last_messages or 1) and not turn.own:
                break
            kept.append(turn)
            messages += _is_earlier_message(turn)
        return kept

    def _since_previous_start(self) -> list[Turn]:
        """All that was read fits; keep the start of the last call, unless the thread has become short."""
        if self._tokens <= self._budget * KEEP_SHARE:
            return list(self._turns)
        return [turn for turn in self._turns if turn.place[1] >= self._kept_from or turn.own]

    def _newest_that_fit(self) -> list[Turn]:
        since = [turn for turn in self._turns if turn.place[1] >= self._kept_from]
        if self._kept_from and since and sum(self._size(turn) for turn in since) <= self._budget:
            return since
        newest_user = next((turn for turn in self._turns if turn.role == "user"), None)
        stays = [turn.own or turn is newest_user for turn in self._turns]
        tokens = sum(self._size(turn) for turn in compress(self._turns, stays))
        kept, limit = [], float(self._budget)
        for turn, needed in zip(self._turns, stays, strict=True):
            if turn is newest_user:
                limit *= KEEP_SHARE
            if not needed:
                tokens += self._size(turn)  # never taken back: what is older than a turn left out is left out too
            if needed or tokens <= limit:
                kept.append(turn)
        while kept and kept[-1].role != "user" and any(turn.role == "user" for turn in kept) and not kept[-1].own:
            kept.pop()
        return kept


def chat_messages(instructions: str, turns: list[Turn]) -> list[Json]:
    """The messages to send: instructions first, then the turns; a call directly after the text of its own turn
    shares one assistant message with it."""
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    for before, turn in zip([None, *turns], turns, strict=False):
        if before and before.role == "assistant" and turn.role == "calls" and before.run_id == turn.run_id:
            messages[-1] = {**messages[-1], "tool_calls": turn.chat[0]["tool_calls"]}
            messages += turn.chat[1:]
        else:
            messages += turn.chat
    return messages


def completion_reserve(window_tokens: int, max_completion_tokens: int | None, max_output_tokens: int | None) -> int:
    """Tokens of the window kept free for the answer."""
    wanted = max_completion_tokens or max_output_tokens or COMPLETION_RESERVE_TOKENS
    return min(wanted, window_tokens // 4)


def fixed_tokens(instructions: str, tools: list[Json], response_format: Any) -> dict[str, int]:
    """Estimated size of what is sent besides history, per part; uncalibrated."""
    return {
        "instructions": estimate_tokens(instructions) + TOKENS_PER_MESSAGE if instructions else 0,
        "tools": estimate_tokens(msgspec.json.encode(tools).decode()) if tools else 0,
        "response_format": estimate_tokens(msgspec.json.encode(response_format).decode()) if response_format else 0,
    }


def history_tokens(turns: list[Turn]) -> dict[str, int]:
    """Estimated size of the history that is sent, per part; uncalibrated."""
    images = results = retrieved = tokens = 0
    for turn in turns:
        tokens += turn.tokens
        images += turn.images
        results += turn.results
        retrieved += turn.retrieved
    return {
        "history": tokens - images - results - retrieved,
        "retrieved_chunks": retrieved,
        "tool_results": results,
        "images": images,
    }
