"""One call of the model: what it has produced so far, and the shapes in which that is stored and streamed. Pure."""

from __future__ import annotations

import json
import re
import time
from functools import cached_property
from typing import Any

from afterglow.contracts import ChatRequest, ModelEnd
from afterglow.objects import Message, RunStep, Usage
from afterglow.runs.prompt import Prompt, request_hash
from afterglow.tools.annotations import Markers
from afterglow.tools.function import CALLED_BY, CALLED_OUT, FUNCTIONS, ToolKind


class CodeText:
    """The `code` of a call's JSON arguments, read while they are being written.

    text: what has come of it. Arguments of another form (some models send the bare code) are taken at their end.
    """

    _START = re.compile(r'\s*\{\s*"code"\s*:\s*"')
    # As far as no escape, and no pair of them that makes one character, is still incomplete.
    _WHOLE_CHARS = re.compile(
        r'(?:[^"\\]|\\[^u]|\\u(?!d[89ab])[0-9a-f]{4}|\\ud[89ab][0-9a-f]{2}(?:\\u[0-9a-f]{4}|(?=[^\\]|\\[^u])))*',
        re.IGNORECASE | re.DOTALL,
    )

    __slots__ = ("_at", "_raw", "text")

    def __init__(self) -> None:
        self._raw = ""
        self._at: int | None = None  # how far it was read, once the start has come
        self.text = ""

    def feed(self, piece: str) -> str:
        """Take more of the arguments; return what it adds to the text."""
        self._raw += piece
        if self._at is None:
            start = self._START.match(self._raw)
            if start is None:
                return ""
            self._at = start.end()
        chars = self._WHOLE_CHARS.match(self._raw, self._at)
        assert chars is not None
        self._at = chars.end()
        return self._add(_json_text(chars[0]))

    def end(self) -> str:
        """The arguments are complete; return what is still missing of the text."""
        return self._add(_code(self._raw)) if self._at is None else ""

    def _add(self, text: str) -> str:
        text = text.replace("\0", "\ufffd")
        self.text += text
        return text


_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPED = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _json_text(escaped: str) -> str:
    """The inside of a JSON string, read leniently: models forget to escape newlines and backslashes."""
    text = _ESCAPE.sub(lambda at: chr(int(at[1], 16)) if at[1] else _ESCAPED.get(at[2], at[0]), escaped)
    return _well_formed(text)


def _well_formed(text: str) -> str:
    """With U+FFFD for half surrogate pairs, which no encoder takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Call:
    """A tool call that the model is writing. code, outputs: of a code_interpreter call. search, results: of a
    file_search call, what its step shows and what it has found. output: of a function that this server has called.
    failure: why it was not run."""

    __slots__ = ("arguments", "code", "failure", "id", "kind", "name", "output", "outputs", "results", "search")

    def __init__(self, call_id: str, name: str, kind: ToolKind) -> None:
        self.id = call_id
        self.name = name
        self.kind = kind
        self.arguments: list[str] = []
        self.code = CodeText()
        self.outputs: list[dict[str, Any]] = []
        self.search: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []
        self.output: str | None = None
        self.failure = ""

    def print(self, text: str) -> dict[str, Any]:
        """Add to the call's output; return the delta that says so."""
        if self.outputs and self.outputs[-1]["type"] == "logs":
            self.outputs[-1]["logs"] += text
        else:
            self.outputs.append({"type": "logs", "logs": text})
        return {"outputs": [{"index": len(self.outputs) - 1, "type": "logs", "logs": text}]}

    def show(self, file_id: str) -> dict[str, Any]:
        """Add an image to the call's output; return the delta that says so."""
        self.outputs.append({"type": "image", "image": {"file_id": file_id}})
        return {"outputs": [{"index": len(self.outputs) - 1, **self.outputs[-1]}]}


class ModelTurn:
    """One call of the model and what it has produced so far."""

    def __init__(self, prompt: Prompt, request: ChatRequest, prompt_hash: str | None = None) -> None:
        """prompt_hash: of the request as it was before images were put into it; else it is taken when it is asked
        for."""
        if prompt_hash is not None:
            self.prompt_hash = prompt_hash
        self.prompt = prompt
        self.request = request
        self.recorded = False  # whether the model call has its row
        self.markers = Markers(prompt.markers)
        self.pictures: list[str] = []  # file ids that the message begins with
        self.started = time.monotonic()
        self.first_token_ms: int | None = None
        self.message: Message | None = None
        self.step: RunStep | None = None
        self.text_step_id: str | None = None  # of the text that came before calls
        self.head = b""
        self.text: list[str] = []
        self.refusal: list[str] = []
        self.refusal_index = 0
        self.calls: list[Call] = []
        self.end: ModelEnd | None = None
        self.usage: Usage | None = None

    @cached_property
    def prompt_hash(self) -> str:
        return request_hash(self.request)

    @property
    def content(self) -> list[dict[str, Any]]:
        """The message's content as far as it has come, in the order in which it was streamed."""
        parts = [image_part(file_id) for file_id in self.pictures]
        if self.text:
            parts.append({"type": "text", "text": {"value": "".join(self.text), "annotations": []}})
        if self.refusal:
            parts.insert(self.refusal_index, {"type": "refusal", "refusal": "".join(self.refusal)})
        return parts

    @property
    def next_index(self) -> int:
        """Where the next part of the message's content goes."""
        return len(self.pictures) + bool(self.text) + bool(self.refusal)

    @property
    def details(self) -> dict[str, Any]:
        """The step's `step_details`, with the calls as far as they have come."""
        return {"type": "tool_calls", "tool_calls": self.tool_calls}

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        return [stored_call(call) for call in self.calls]


def stored_call(call: Call) -> dict[str, Any]:
    arguments = "".join(call.arguments)
    if call.kind in FUNCTIONS:
        function = {"name": call.name, "arguments": arguments, "output": call.output}
        ours = {CALLED_BY: "server"} if call.kind in CALLED_OUT else {}
        return {"id": call.id, "type": "function", "function": function, **ours}
    if call.kind == "code_interpreter":
        return {
            "id": call.id,
            "type": call.kind,
            "code_interpreter": {"input": call.code.text, "outputs": call.outputs},
        }
    return {"id": call.id, "type": call.kind, "file_search": call.search}


def _code(arguments: str) -> str:
    """The `code` argument; the arguments as they are when the model sent no such object."""
    try:
        found = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    return _well_formed(str(found["code"])) if isinstance(found, dict) and "code" in found else arguments


def first_delta(call: Call) -> dict[str, Any]:
    """The first delta of a call: everything that is sent once."""
    if call.kind in FUNCTIONS:
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": "", "output": None}}
    return stored_call(call)


def image_part(file_id: str) -> dict[str, Any]:
    return {"type": "image_file", "image_file": {"file_id": file_id, "detail": "auto"}}


def required_action(calls: list[Call]) -> dict[str, Any]:
    asked = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": "".join(call.arguments)}}
        for call in calls
    ]
    return {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": asked}}
