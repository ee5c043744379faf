"""One call of the model: what it has produced so far, and the shapes in which that is stored and streamed. Pure."""

from __future__ import annotations

import hashlib
import time
from functools import cached_property
from typing import Any

import msgspec

from afterglow.contracts import ChatRequest, ModelEnd
from afterglow.objects import Message, RunStep, Usage
from afterglow.runs.prompt import Prompt
from afterglow.tools.function import ToolKind


class Call:
    """A tool call that the model is writing."""

    __slots__ = ("arguments", "id", "kind", "name")

    def __init__(self, call_id: str, name: str, kind: ToolKind) -> None:
        self.id = call_id
        self.name = name
        self.kind = kind
        self.arguments: list[str] = []


class ModelTurn:
    """One call of the model and what it has produced so far."""

    def __init__(self, prompt: Prompt, request: ChatRequest) -> None:
        self.prompt = prompt
        self.request = request
        self.started = time.monotonic()
        self.first_token_ms: int | None = None
        self.message: Message | None = None
        self.step: RunStep | None = None
        self.head = b""
        self.text: list[str] = []
        self.refusal: list[str] = []
        self.refusal_index = 0
        self.calls: list[Call] = []
        self.end: ModelEnd | None = None
        self.usage: Usage | None = None

    @cached_property
    def prompt_hash(self) -> str:
        """sha-256 of the request, in hex: enough to know whether a prompt that is put together again is the same."""
        return hashlib.sha256(msgspec.json.encode(self.request)).hexdigest()

    @property
    def content(self) -> list[dict[str, Any]]:
        """The message's content as far as it has come, in the order in which it was streamed."""
        parts: list[dict[str, Any]] = []
        if self.text:
            parts.append({"type": "text", "text": {"value": "".join(self.text), "annotations": []}})
        if self.refusal:
            parts.insert(self.refusal_index, {"type": "refusal", "refusal": "".join(self.refusal)})
        return parts

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        return [stored_call(call) for call in self.calls]


def stored_call(call: Call) -> dict[str, Any]:
    arguments = "".join(call.arguments)
    if call.kind == "function":
        return {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": arguments, "output": None},
        }
    if call.kind == "code_interpreter":
        return {"id": call.id, "type": call.kind, "code_interpreter": {"input": _code(arguments), "outputs": []}}
    return {"id": call.id, "type": call.kind, "file_search": {}}


def _code(arguments: str) -> str:
    """The `code` argument; the arguments as they are when the model sent no such object."""
    try:
        found = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return arguments
    return str(found["code"]) if isinstance(found, dict) and "code" in found else arguments


def first_delta(call: Call) -> dict[str, Any]:
    """The first delta of a call: everything that is sent once."""
    if call.kind == "function":
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": "", "output": None}}
    return stored_call(call)


def with_reason(call: dict[str, Any], reasons: dict[ToolKind, str]) -> dict[str, Any]:
    """A call as it is stored when the turn is over; one whose engine is off shows the reason as its output."""
    if call["type"] == "code_interpreter":
        call["code_interpreter"]["outputs"] = [{"type": "logs", "logs": reasons["code_interpreter"]}]
    return call


def required_action(calls: list[Call]) -> dict[str, Any]:
    asked = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": "".join(call.arguments)}}
        for call in calls
    ]
    return {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": asked}}
