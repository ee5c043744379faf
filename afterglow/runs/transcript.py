"""A run's events as the bytes that are stored and sent: names, framing and numbers.

Each event is `event: NAME`, `data: JSON`, `id: ATTEMPT.SEQUENCE`, in that order: with `id` before `data` a comment
between events makes the official Python client fail. Encoded once; the same bytes go to the log and to everyone.
Shapes and order: docs/runs.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from afterglow.contracts import Segment, Stop
from afterglow.objects import Message, Run, RunStep
from afterglow.runs.states import TERMINAL

DONE = b"event: done\ndata: [DONE]\n\n"
KEEP_ALIVE = b": ping\n"  # one newline: a blank line after it would end an event

encode = msgspec.json.encode
Event = tuple[str, bytes]


def run_event(run: Run, name: str = "") -> Event:
    """`thread.run.STATUS` with the run as it is now; name: another than the status, e.g. `created`."""
    return f"thread.run.{name or run.status}", encode(run)


def step_event(step: RunStep, name: str = "") -> Event:
    return f"thread.run.step.{name or step.status}", encode(step)


def message_event(message: Message, name: str = "") -> Event:
    return f"thread.message.{name or message.status}", encode(message)


def step_delta(step_id: str, tool_calls: list[dict[str, Any]]) -> Event:
    delta = {"step_details": {"type": "tool_calls", "tool_calls": tool_calls}}
    return "thread.run.step.delta", encode({"id": step_id, "object": "thread.run.step.delta", "delta": delta})


def message_delta(message_id: str, content: list[dict[str, Any]]) -> Event:
    return "thread.message.delta", encode(
        {"id": message_id, "object": "thread.message.delta", "delta": {"content": content}}
    )


def error_event(message: str, code: str | None = None) -> bytes:
    """For failures of the stream itself, never for a failed run. Both the flat and the nested form, since some
    clients read one and some the other; no `id`, since it is no part of the log."""
    four = {"message": message, "type": "server_error", "param": None, "code": code}
    return b"event: error\ndata: " + encode({**four, "error": four}) + b"\n\n"


class Transcript:
    """Numbers the events of one attempt.

    sequence: the number of the last event so far, 0 at the start of an attempt.
    """

    __slots__ = ("attempt", "sequence")

    def __init__(self, attempt: int, sequence: int = 0) -> None:
        self.attempt = attempt
        self.sequence = sequence

    def number(self, events: Sequence[Event], stop: Stop = "") -> Segment:
        """Turn events into the next segment."""
        parts = []
        first = self.sequence + 1
        for name, data in events:
            self.sequence += 1
            parts.append(b"event: %b\ndata: %b\nid: %d.%d\n\n" % (name.encode(), data, self.attempt, self.sequence))
        return Segment(self.attempt, first, self.sequence, b"".join(parts), stop)

    def text(self, head: bytes, pieces: Sequence[str]) -> Segment:
        """The next segment of message text: one delta per piece. head: of `text_delta_head`."""
        first = self.sequence + 1
        parts = []
        for piece in pieces:
            self.sequence += 1
            parts.append(b"%b%b}}]}}\nid: %d.%d\n\n" % (head, encode(piece), self.attempt, self.sequence))
        return Segment(self.attempt, first, self.sequence, b"".join(parts))


def text_delta_head(message_id: str, index: int) -> bytes:
    """What all text deltas of one content part begin with, up to the text itself."""
    return (
        b'event: thread.message.delta\ndata: {"id":"%b","object":"thread.message.delta","delta":'
        b'{"content":[{"index":%d,"type":"text","text":{"value":' % (message_id.encode(), index)
    )


def stop_of(run: Run) -> Stop:
    """How the newest event of `run` ends a stream."""
    if run.status in TERMINAL:
        return "end"
    return "action" if run.status == "requires_action" else ""
