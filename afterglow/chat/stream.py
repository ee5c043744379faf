"""From the bytes of a streamed chat completion to deltas: a state machine without I/O.

Servers that call themselves OpenAI-compatible differ in nearly every detail of the stream. What is read here:

    lines      any of \\n and \\r\\n; comments; `data:` with or without a space; events over several lines, or without
               the blank line between them; a bare JSON object; a whole JSON completion although a stream was asked for
    deltas     null or absent; text as a string or as parts; thoughts under `reasoning_content`, `reasoning` or
               `thinking`; a `message` where a `delta` belongs; `function_call` of old
    calls      whole or in fragments; without ids, indexes or both; several under one index; an id that repeats, or
               changes, with each fragment; arguments as an object
    ends       `finish_reason` of many dialects, or none before `[DONE]`; usage in any chunk, the last one counts

What is refused: text that is no JSON, JSON that is no completion, and an end without a reason. Half surrogates and NUL
become U+FFFD; two halves that arrive in two chunks become the character they are.
"""

from __future__ import annotations

import json
import secrets
from typing import Any, Literal

import msgspec
from msgspec import Struct

from afterglow.contracts import Delta, ModelEnd, ReasoningDelta, RefusalDelta, TextDelta, ToolCallDelta
from afterglow.objects import CompletionTokensDetails, PromptTokenDetails, Usage

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

ALPHANUMERIC = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Reasons under other names, seen with Mistral, Anthropic, Gemini, TGI and old OpenAI models. Others mean "stop".
FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "refusal": "content_filter",
    "safety": "content_filter",
    "sensitive": "content_filter",
}
# No prompt has as many. A server that says more is wrong, and sums of what it says would not fit into a database.
MOST_TOKENS = 1_000_000_000
# Reasons that stand for a failure of the server's.
BROKEN_OFF = {"error", "abort", "insufficient_system_resource", "network_error"}

SPOKEN: dict[str, type[TextDelta] | type[RefusalDelta] | type[ReasoningDelta]] = {
    "text": TextDelta,
    "refusal": RefusalDelta,
    "reasoning": ReasoningDelta,
}


class BadStream(Exception):
    """What arrived is no chat completion; the text says why. `llm.py` turns it into a ModelError."""


class ErrorInStream(Exception):
    """The server reported an error inside the stream. body: the JSON it sent."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.body = body


# --- what servers send -----------------------------------------------------------------------------------------


class _Function(Struct, gc=False):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _CallPiece(Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(Struct):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    thinking: Any = None
    tool_calls: list[_CallPiece] | None = None
    function_call: _Function | None = None


class _Choice(Struct):
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: dict[str, Any] | None = None
    model: str | None = None
    error: Any = None
    object: str | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


# --- the machine -----------------------------------------------------------------------------------------------


class ChatStream:
    """One answer. Give it the bytes as they come (`feed`), then say that no more will (`finish`).

    done: `[DONE]` was read, so `finish` may be called without waiting for the end of the connection.
    """

    def __init__(self) -> None:
        self.done = False
        self._rest = b""
        self._json: list[bytes] | None = None
        self._begun = False
        self._partial = b""
        self._event = b""
        self._out: list[Delta] = []
        self._chunks = 0
        self._said_something = False
        self._odd = False
        self._halves: dict[str, str] = {}
        self._calls = _Calls()
        self._reason = ""
        self._usage: dict[str, Any] | None = None
        self._model = ""

    def feed(self, data: bytes) -> list[Delta]:
        """Return what these bytes complete. Raises BadStream or ErrorInStream; what came just before such an end is
        not given then, so that a call of which nothing was shown can be made again."""
        if not self._begun:
            data = self._begin(data)
        if self._json is not None:
            self._json.append(data)
            return []
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take_payload(line[5:])
            elif not line or line == b"\r":
                self._end_event()
            elif line.startswith(b"{"):
                self._take_payload(line)
            elif line.startswith(b"event:"):
                self._event = line[6:].strip()
        return self._give()

    def finish(self) -> list[Delta]:
        """Return what was held back, and the ModelEnd. Raises BadStream or ErrorInStream."""
        if self._json is not None:
            self._take_payload(b"".join(self._json))
        elif self._rest:
            self.feed(b"\n")
        self._end_event()
        self._mend_halves()
        end = self._end()
        return [*self._give(), end]

    def _begin(self, data: bytes) -> bytes:
        data = (self._rest + data).lstrip(b"\xef\xbb\xbf \t\r\n")
        if data:
            self._begun = True
            self._json = [] if data[:1] in b"{[" else None
        self._rest = b""
        return data

    def _give(self) -> list[Delta]:
        given, self._out = self._out, []
        self._said_something = self._said_something or bool(given)
        return given

    # Events

    def _take_payload(self, payload: bytes) -> None:
        if self.done:
            return
        if self._partial:
            payload = self._partial + b"\n" + payload
        try:
            chunk = _decode(payload)
        except msgspec.ValidationError as error:
            self._take_no_chunk(payload, error)
        except RecursionError:
            raise BadStream("it sent JSON that is nested too deeply") from None
        except ValueError:
            self._take_odd(payload)
        else:
            self._partial = b""
            self._take(chunk, payload)

    def _take_no_chunk(self, payload: bytes, error: msgspec.ValidationError) -> None:
        text = payload.strip()
        if text == b"[DONE]":
            self.done = True
            return
        if text.startswith(b'[{"error"') or self._event == b"error":
            raise ErrorInStream(payload)
        raise BadStream(f"it sent a chunk that is no chat completion ({error})")

    def _take_odd(self, payload: bytes) -> None:
        """Half surrogates and broken UTF-8, which msgspec refuses; or the first lines of a longer event."""
        try:
            plain = json.loads(payload.decode("utf-8", "replace"), strict=False)
            chunk = msgspec.convert(plain, _Chunk)
        except msgspec.ValidationError as error:
            raise BadStream(f"it sent a chunk that is no chat completion ({error})") from None
        except (ValueError, RecursionError):
            self._partial = payload
            return
        self._partial = b""
        self._odd = True
        self._take(chunk, payload)
        self._odd = False

    def _end_event(self) -> None:
        if self._partial.strip():
            raise BadStream("it sent something that is no JSON")
        self._partial = b""
        self._event = b""

    # Chunks

    def _take(self, chunk: _Chunk, payload: bytes) -> None:
        if chunk.error or chunk.object == "error" or self._event == b"error":
            raise ErrorInStream(payload)
        self._chunks += 1
        if chunk.usage:
            self._usage = chunk.usage
        if chunk.model:
            self._model = self._clean("", chunk.model)
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.usage:
            self._usage = choice.usage
        if choice.delta:
            self._take_delta(choice.delta)
        elif choice.message and not (self._said_something or self._out):
            self._take_delta(choice.message)
        if choice.finish_reason:
            self._reason = choice.finish_reason.lower()

    def _take_delta(self, delta: _Delta) -> None:
        if delta.content:
            self._take_content(delta.content)
        thought = delta.reasoning_content or delta.reasoning or delta.thinking
        if thought:
            self._think(thought)
        if delta.refusal:
            self._say("refusal", delta.refusal)
        for piece in delta.tool_calls or ():
            self._take_call(piece)
        if delta.function_call:
            self._take_call(_CallPiece(index=0, function=delta.function_call))

    def _take_content(self, content: str | list[dict[str, Any]]) -> None:
        if isinstance(content, str):
            self._say("text", content)
            return
        for part in content:
            if part.get("type") in ("thinking", "reasoning"):
                self._think(part.get("thinking") or part.get("reasoning") or part.get("text"))
            elif part.get("type") == "refusal":
                self._say("refusal", _text_of(part.get("refusal")))
            else:
                self._say("text", _text_of(part.get("text")))

    def _think(self, thought: Any) -> None:
        self._say("reasoning", _text_of(thought))

    def _say(self, channel: str, text: str) -> None:
        if text := self._clean(channel, text):
            self._out.append(SPOKEN[channel](text))

    def _take_call(self, piece: _CallPiece) -> None:
        function = piece.function or _Function()
        arguments = "" if function.arguments is None else function.arguments
        if isinstance(arguments, dict):
            arguments = _as_json(arguments)
        call = self._calls.call_for(piece.index, piece.id or "", function.name or "", arguments)
        arguments = self._clean(f"call {call.index}", arguments)
        if delta := call.add(self._clean("", function.name or ""), arguments):
            self._out.append(delta)

    # Text

    def _clean(self, channel: str, text: str) -> str:
        half = self._halves.pop(channel, "") if self._halves else ""
        if half or self._odd:
            text = self._whole_characters(channel, half + text)
        return text.replace("\0", "\ufffd") if "\0" in text else text

    def _whole_characters(self, channel: str, text: str) -> str:
        if channel and "\ud800" <= text[-1:] <= "\udbff":
            self._halves[channel] = text[-1]
            text = text[:-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def _mend_halves(self) -> None:
        halves, self._halves = self._halves, {}
        for channel in halves:
            if channel in SPOKEN:
                self._out.append(SPOKEN[channel]("\ufffd"))
            else:
                self._out.append(ToolCallDelta(index=int(channel.removeprefix("call ")), arguments="\ufffd"))

    # The end

    def _end(self) -> ModelEnd:
        if self._reason in BROKEN_OFF:
            raise BadStream(f"it broke the answer off with finish_reason {self._reason!r}")
        if not self._chunks:
            raise BadStream("it sent nothing that is a chat completion")
        if not self._reason and not (self.done and (self._said_something or self._out)):
            raise BadStream("its answer ended without a finish_reason")
        self._calls.check()
        return ModelEnd(
            finish_reason=self._finish_reason(),
            usage=read_usage(self._usage) if self._usage else None,
            raw_usage=self._usage,
            model=self._model,
        )

    def _finish_reason(self) -> FinishReason:
        reason = FINISH_REASONS.get(self._reason, "stop")
        if not self._calls.made:
            return "stop" if reason == "tool_calls" else reason
        # A call that the limit cut in half was not made: nobody could carry it out.
        if reason in ("length", "content_filter") and not self._calls.made[-1].is_whole():
            return reason
        return "tool_calls"


# --- function calls --------------------------------------------------------------------------------------------


class _Call:
    """One function call as it grows. id: ours if the server gave none, or one that another call of the turn has."""

    def __init__(self, index: int, their_id: str, call_id: str) -> None:
        self.index = index
        self.their_id = their_id
        self.id = call_id
        self.name = ""
        self._arguments: list[str] = []
        self._announced = False

    def add(self, name: str, arguments: str) -> ToolCallDelta | None:
        """Take a piece; return what to tell of it. Nothing is told before the name is known."""
        if not self._announced:
            self.name = self.name or name
        if arguments:
            self._arguments.append(arguments)
        if self._announced:
            return ToolCallDelta(index=self.index, arguments=arguments) if arguments else None
        if not self.name:
            return None
        self._announced = True
        return ToolCallDelta(index=self.index, id=self.id, name=self.name, arguments="".join(self._arguments))

    def is_whole(self) -> bool:
        try:
            json.loads("".join(self._arguments))
        except (ValueError, RecursionError):
            return False
        return True


class _Calls:
    """Decides which call a fragment belongs to."""

    def __init__(self) -> None:
        self.made: list[_Call] = []
        self._by_index: dict[int, _Call] = {}

    def call_for(self, index: int | None, call_id: str, name: str, arguments: str) -> _Call:
        current = self._current(index, call_id)
        if current is None or _starts_anew(current, call_id, name, arguments):
            current = self._new(call_id)
            if index is not None:
                self._by_index[index] = current
        return current

    def _current(self, index: int | None, call_id: str) -> _Call | None:
        if index is not None:
            return self._by_index.get(index)
        same = [call for call in self.made if call_id and call.their_id == call_id]
        return same[-1] if same else self.made[-1] if self.made else None

    def _new(self, their_id: str) -> _Call:
        taken = {call.id for call in self.made}
        call_id = their_id.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
        call = _Call(len(self.made), their_id, call_id if call_id and call_id not in taken else new_call_id())
        self.made.append(call)
        return call

    def check(self) -> None:
        if any(not call.name for call in self.made):
            raise BadStream("it made a function call without a name")


def _starts_anew(current: _Call, call_id: str, name: str, arguments: str) -> bool:
    """Whether a fragment that points to `current` begins another call.

    Only one with a name can: some servers (vLLM for a time, Poolside) invent a new id for every fragment. One with a
    name does when its id or name is another; or, where ids are missing, when `current` has all its arguments already.
    """
    if not name or not current.name:
        return False
    if call_id:
        return call_id != current.their_id
    return name != current.name or (bool(arguments) and current.is_whole())


def new_call_id() -> str:
    return "call_" + "".join(secrets.choice(ALPHANUMERIC) for _ in range(24))


# --- small readers ---------------------------------------------------------------------------------------------


def _text_of(value: Any) -> str:
    """The text in a string, a part, or a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return _text_of(value.get("text"))
    return "".join(map(_text_of, value)) if isinstance(value, list) else ""


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_usage(raw: dict[str, Any]) -> Usage:
    """Usage in the names of OpenAI, Anthropic, DeepSeek or Moonshot. The total stands as reported, if it was. No count
    is above MOST_TOKENS."""
    prompt = _count(raw, "prompt_tokens", "input_tokens")
    completion = _count(raw, "completion_tokens", "output_tokens")
    cached = _count(_dict(raw, "prompt_tokens_details"), "cached_tokens") or _count(
        raw, "prompt_cache_hit_tokens", "cache_read_input_tokens", "cached_tokens"
    )
    reasoning = _count(_dict(raw, "completion_tokens_details"), "reasoning_tokens") or _count(raw, "reasoning_tokens")
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=_count(raw, "total_tokens") or prompt + completion,
        prompt_token_details=PromptTokenDetails(cached),
        completion_tokens_details=CompletionTokensDetails(reasoning),
    )


def _dict(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _count(raw: dict[str, Any], *names: str) -> int:
    for name in names:
        value = raw.get(name)
        if isinstance(value, int | float) and value > 0:
            return int(min(value, MOST_TOKENS))
    return 0
