"""A model server that plays what the run's instructions say, so that what must come out of each run is known.

It knows nothing of who asks: the same run and round get the same answer, whichever process asks, and however often.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from typing import Any, Literal, NamedTuple

import msgspec

from tests.scripted_server import (
    DONE,
    DROP,
    HANG,
    NO_ANSWER,
    Answer,
    Received,
    ScriptedServer,
    Step,
    chunk,
    event,
    refusal,
    reply,
    says,
    stream,
    usage,
)

MODEL = "chaos-1"
MARK = "Play "  # what instructions begin with, before the script as JSON
WINDOW_TOKENS = 100_000
FUNCTION = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

Kind = Literal["answers", "hangs", "breaks", "refuses"]
Trouble = Literal["500", "429", "cut"]


class Script(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the model does in one run. key: one of a kind. rounds: of calls, before the text. words: of the text, with
    so many milliseconds before each. troubles: of the first requests, one each. after: messages that were there before
    the run, and must be in its prompts."""

    key: str
    kind: Kind = "answers"
    rounds: int = 0
    words: int = 5
    pause_ms: int = 0
    troubles: list[Trouble] = []
    after: list[str] = []

    @property
    def instructions(self) -> str:
        return MARK + msgspec.json.encode(self).decode()

    @property
    def pieces(self) -> list[str]:
        return [f"{' ' * bool(number)}{self.key}.{number}" for number in range(self.words)]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def cities(self, part: int) -> list[str]:
        """What is asked for in a round of calls, one call each."""
        return [f"{self.key}-{part}-{number}" for number in range(1 + part % 2)]

    def usage(self, part: int) -> dict[str, Any]:
        return usage(10 + part, len(self.cities(part)) if part < self.rounds else self.words)


def read_script(instructions: str) -> Script:
    return msgspec.json.decode(instructions.removeprefix(MARK), type=Script)


def output_for(city: str) -> str:
    """What the caller's function says."""
    return f"dry in {city}"


def random_script(rng: random.Random, key: str) -> Script:
    kind: Kind = rng.choices(["answers", "hangs", "breaks", "refuses"], [80, 10, 6, 4])[0]
    return Script(
        key=key,
        kind=kind,
        rounds=rng.choices([0, 1, 2], [60, 25, 15])[0],
        words=rng.choice([1, 4, 20, 40]),
        pause_ms=rng.choice([0, 0, 10, 30, 60]),
        troubles=[rng.choice(["500", "429", "cut"]) for _ in range(rng.choices([0, 1, 2], [75, 18, 7])[0])],
    )


class Asked(NamedTuple):
    """A request for one part of a script: a round of calls, or the text behind them all."""

    at: float
    part: int


class Player(ScriptedServer):
    """asked: of each script, by its key. faults: prompts that should not have been."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, list[Asked]] = defaultdict(list)
        self.faults: list[str] = []

    def _answer_to(self, request: Received) -> Answer:
        self.requests.clear()
        if request.path.endswith("/models"):
            return reply({"object": "list", "data": [{"id": MODEL, "max_model_len": WINDOW_TOKENS}]})
        if not request.path.endswith("/chat/completions"):
            return refusal(404, "no such route")
        messages = request.json["messages"]
        script = read_script(messages[0]["content"])
        outputs = self._outputs(script, messages)
        self._check_history(script, messages)
        part = self._part(script, outputs)
        before = len(self.asked[script.key])
        self.asked[script.key].append(Asked(time.monotonic(), part))
        if before < len(script.troubles):
            return _trouble(script.troubles[before])
        return _play(script, part)

    @staticmethod
    def _outputs(script: Script, messages: list[Any]) -> list[str]:
        """What the script's own calls have brought."""
        return [message["content"] for message in messages if message["role"] == "tool" and script.key in str(message)]

    def _part(self, script: Script, outputs: list[str]) -> int:
        part, expected = 0, list[str]()
        while len(expected) < len(outputs):
            expected += map(output_for, script.cities(part))
            part += 1
        if outputs != expected or part > script.rounds:
            self.faults.append(f"{script.key}: the prompt has the outputs {outputs}")
        return part

    def _check_history(self, script: Script, messages: list[Any]) -> None:
        """What was said before is there, in order; no answer is there twice, and none of this run's own."""
        said = [message["content"] for message in messages if message["role"] == "user"]
        if [text for text in said if text in script.after] != script.after:
            self.faults.append(f"{script.key}: the prompt has the messages {said}, and not {script.after}")
        texts = [message["content"] for message in messages if message["role"] == "assistant" and message["content"]]
        keys = [str(text).partition(".")[0] for text in texts]
        if len(set(keys)) < len(keys) or script.key in keys:
            self.faults.append(f"{script.key}: the prompt has the answers {keys}")


def _trouble(trouble: Trouble) -> Answer:
    if trouble == "cut":
        return NO_ANSWER
    answer = refusal(int(trouble), "The model is not well.")
    answer.headers["retry-after"] = "0"
    return answer


def _play(script: Script, part: int) -> Answer:
    if script.kind == "refuses":
        return _trouble("500")
    if part < script.rounds:
        calls = [
            {"index": index, "id": f"call_{city}", "type": "function", "function": _function(city)}
            for index, city in enumerate(script.cities(part))
        ]
        return says({"tool_calls": calls}, finish="tool_calls", reported=script.usage(part))
    steps: list[Step] = []
    for number, piece in enumerate(script.pieces):
        if script.pause_ms:
            steps.append(_later((number + 1) * script.pause_ms / 1000))
        steps.append(chunk({"content": piece}))
    if script.kind == "hangs":
        return stream(*steps[: len(steps) // 2], HANG)
    if script.kind == "breaks":
        return stream(chunk({"content": script.pieces[0]}), _later(0.05), DROP)
    last = event({"model": MODEL, "choices": [], "usage": script.usage(part)})
    return stream(*steps, chunk(finish="stop"), last, DONE)


def _function(city: str) -> dict[str, str]:
    return {"name": "get_weather", "arguments": msgspec.json.encode({"city": city}).decode()}


def _later(after_s: float) -> asyncio.Event:
    """An event that comes by itself."""
    come = asyncio.Event()
    asyncio.get_running_loop().call_later(after_s, come.set)
    return come
