"""Stand-ins for tests, ours and those of apps: a model that says what it is told, and a clock that can be set."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import msgspec

from afterglow.contracts import ChatRequest, Delta, Forwarded, ModelEnd, ModelInfo, TextDelta, ToolCallDelta
from afterglow.errors import ModelError, NotFound
from afterglow.objects import Usage

Saying = list[Delta | ModelError | asyncio.Event]
_numbers = itertools.count(1)


def says(text: str, *, usage: Usage | None = None) -> Saying:
    """An answer in words, one delta a word."""
    words = [TextDelta(word if first else f" {word}") for first, word in _with_first(text.split(" "))]
    return [*words, ended("stop", usage)]


def calls(*functions: tuple[str, dict[str, Any]], usage: Usage | None = None) -> Saying:
    """Calls of functions, in parallel when there are several: `calls(("get_weather", {"city": "Oslo"}))`."""
    deltas: Saying = []
    for index, (name, arguments) in enumerate(functions):
        text = msgspec.json.encode(arguments).decode()
        deltas.append(ToolCallDelta(index, f"call_{next(_numbers):024d}", name))
        deltas += [ToolCallDelta(index, arguments=text[at : at + 5]) for at in range(0, len(text), 5)]
    return [*deltas, ended("tool_calls", usage)]


def ended(reason: Any, usage: Usage | None = None) -> ModelEnd:
    """The end of an answer; 10 tokens in and 5 out unless told otherwise."""
    usage = usage or Usage(prompt_tokens=10, completion_tokens=5, total_tokens=15)
    return ModelEnd(finish_reason=reason, usage=usage, raw_usage=msgspec.to_builtins(usage), model="scripted")


def _with_first(words: list[str]) -> list[tuple[bool, str]]:
    return [(number == 0, word) for number, word in enumerate(words)]


class ScriptedModels:
    """A `contracts.ChatModels` that answers each call with the next script.

    A script is a list of deltas, errors to raise, and asyncio events to wait for, in order. requests: what was asked.
    closed: how many calls were ended by the caller before their end.
    """

    def __init__(self) -> None:
        self.scripts: list[Saying] = []
        self.requests: list[ChatRequest] = []
        self.closed = 0
        self.inline_images = False
        self.info_of_all = ModelInfo(window_tokens=8192, learned="configuration")

    def will(self, *scripts: Saying) -> None:
        """Answer the next calls with these."""
        self.scripts += scripts

    async def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        self.requests.append(request)
        script = self.scripts.pop(0) if self.scripts else says("No script was left.")
        finished = False
        try:
            for item in script:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, ModelError):
                    raise item
                else:
                    await asyncio.sleep(0)
                    finished = isinstance(item, ModelEnd)
                    yield [item]
        finally:
            self.closed += not finished

    async def info(self, model: str) -> ModelInfo:
        return self.info_of_all

    def learn_window(self, model: str, window_tokens: int) -> None:
        self.info_of_all = ModelInfo(window_tokens=window_tokens, learned="server")

    def wants_inline_images(self, model: str) -> bool:
        return self.inline_images

    async def list_models(self) -> list[dict[str, Any]]:
        return [{"id": "scripted", "object": "model", "created": 0, "owned_by": "afterglow"}]

    async def forward(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> Forwarded:
        raise NotFound(f"Invalid URL ({method} {path})")

    async def close(self) -> None:
        """Nothing to let go of."""


class SetClock:
    """A `contracts.Clock` that stands still until it is set: `clock.time += 600`."""

    def __init__(self, time: float = 1_700_000_000.0) -> None:
        self.time = time

    def now(self) -> float:
        return self.time
