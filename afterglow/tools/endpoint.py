"""What is posted to the endpoint of a function tool, and what its answer says. Pure.

Posting is in `runs/calling.py`.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import msgspec

from afterglow.contracts import Reply

MAX_OUTPUT_BYTES = 512 * 1024
_SAFE = re.compile(r"[A-Za-z0-9_-]{1,100}")


class CalledFor(NamedTuple):
    """Who calls. created_at: Unix seconds, of the call's step."""

    call_id: str
    run_id: str
    thread_id: str
    assistant_id: str
    step_id: str
    created_at: int

    @property
    def key(self) -> str:
        """What tells this call from all others, as a header may have it. Ids of calls alone do not: some model servers
        give those of every turn the same ones."""
        safe = _SAFE.fullmatch(self.call_id)
        return f"{self.step_id}_{self.call_id if safe else hashlib.sha256(self.call_id.encode()).hexdigest()}"


def request_body(called: CalledFor, name: str, arguments: str) -> bytes:
    return msgspec.json.encode(
        {
            "id": called.call_id,
            "type": "function_call",
            "run_id": called.run_id,
            "thread_id": called.thread_id,
            "assistant_id": called.assistant_id,
            "function": {"name": name, "arguments": arguments or "{}"},
            "created_at": called.created_at,
        }
    )


def headers_of(key: str) -> dict[str, str]:
    return {"content-type": "application/json", "idempotency-key": key}


def output_of(reply: Reply) -> str:
    """The text of an answer: `output`, when it is a JSON object whose `output` is text; else all of it."""
    if len(reply.body) > MAX_OUTPUT_BYTES:
        kept = reply.body[:MAX_OUTPUT_BYTES].decode(errors="ignore")
        return f"{kept}\n[the rest of the answer was left out: it has more than {MAX_OUTPUT_BYTES // 1024} KB]"
    try:
        said = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return reply.body.decode(errors="replace")
    if isinstance(said, dict) and isinstance(said.get("output"), str):
        return str(said["output"])
    return said if isinstance(said, str) else reply.body.decode(errors="replace")


def tries_again(status: int) -> bool:
    """Whether another try may be answered otherwise."""
    return status == 429 or status >= 500
