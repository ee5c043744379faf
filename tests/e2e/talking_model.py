"""A model server that answers by what was said last, so that a client's story needs no script beside it.

Said last, and the answer:

    Weather in Oslo, Rome?      calls get_weather once for each city, in parallel
    the functions' outputs      "It is OUTPUT and OUTPUT."
    Search: leave               calls file_search for `leave`
    what was found              "It stands there【…】.", with the marker of the first passage
    … Use the function.         calls the first of its functions, without arguments, as `afterglow doctor` asks for it
    Think …                     begins to answer, and never goes on
    anything else               "One two three."
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from tests.scripted_server import HANG, Answer, Received, ScriptedServer, Step, chunk, reply, says

GAP_S = 0.03


class TalkingModel(ScriptedServer):
    """As ScriptedServer, but nothing has to be scripted. Tokens come `GAP_S` apart."""

    def __init__(self) -> None:
        super().__init__()
        talker = {"id": "talker", "object": "model", "max_model_len": 8192}
        self.on("GET /v1/models", reply({"object": "list", "data": [talker]}))
        self._ids = (f"call_{number:024d}" for number in itertools.count(1))

    def _answer_to(self, request: Received) -> Answer:
        if request.path.endswith("/chat/completions"):
            answer = self._reply_to(**request.json)
            answer.steps = _paced(answer.steps)
            return answer
        return super()._answer_to(request)

    def _reply_to(self, messages: list[Any], tools: Sequence[Any] = (), **_: Any) -> Answer:
        outputs = [m["content"] for m in itertools.takewhile(lambda m: m["role"] == "tool", reversed(messages))]
        if outputs and (marker := re.search(r"【.+?】", outputs[0])):
            return says("It stands", " there", marker[0][:3], marker[0][3:], ".")
        if outputs:
            return says("It", " is", f" {' and '.join(reversed(outputs))}.")
        text = _text(messages[-1])
        if asked := re.match(r"Weather in (.+)\?", text):
            return self._calls("get_weather", *({"city": city} for city in asked[1].split(", ")))
        if text.startswith("Search: "):
            return self._calls("file_search", {"queries": [text.removeprefix("Search: ")]})
        if text.endswith("Use the function."):
            return self._calls(tools[0]["function"]["name"], {})
        if text.startswith("Think"):
            return Answer(200, {"content-type": "text/event-stream"}, [chunk({"content": "Let me"}), HANG])
        return says("One", " two", " three.")

    def _calls(self, name: str, *arguments: Any) -> Answer:
        """As servers stream them: id and name first, the arguments in pieces."""
        deltas: list[Any] = []
        for index, each in enumerate(arguments):
            deltas.append({"index": index, "id": next(self._ids), "type": "function", "function": {"name": name}})
            text = json.dumps(each)
            deltas += [{"index": index, "function": {"arguments": piece}} for piece in (text[:6], text[6:])]
        return says(*({"tool_calls": [delta]} for delta in deltas), finish="tool_calls")


def _text(message: Any) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _paced(steps: list[Step]) -> list[Step]:
    loop = asyncio.get_running_loop()
    paced: list[Step] = []
    for number, step in enumerate(steps):
        due = asyncio.Event()
        loop.call_later(number * GAP_S, due.set)
        paced += [due, step]
    return paced
