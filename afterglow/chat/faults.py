"""What a model server means when it refuses: pure reading of error answers, no I/O.

Servers agree on HTTP statuses at best. Which texts were seen where stands beside each table.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

import msgspec
from msgspec import Struct

from afterglow.errors import (
    ContentFiltered,
    ContextOverflow,
    ModelBroke,
    ModelError,
    ModelRateLimited,
    ModelRefused,
    ModelTimeout,
)

CLIP_CHARS = 500

# How servers say that a prompt is too long; the named group is the window, where the text has it.
OVERFLOWS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # OpenAI, vLLM, DeepSeek, OpenRouter, SGLang; LM Studio ("context length of only")
        r"(?:maximum )?context length (?:is|of)(?: only)? (?P<window>\d[\d,]*)",
        r"context length \((?P<window>\d[\d,]*)",
        r"exceed the configured limit of (?P<window>\d[\d,]*) tokens",
        r"maximum model length of (?P<window>\d[\d,]*)",
        r"with (?P<window>\d[\d,]*) maximum context length",  # Mistral
        r"exceeds the available context size \((?P<window>\d[\d,]*)",  # llama.cpp
        r"prompt is too long: [\d,]+ tokens > (?P<window>\d[\d,]*) maximum",  # Anthropic
        r"exceed context limit: [\d,]+ \+ [\d,]+ > (?P<window>\d[\d,]*)",  # Anthropic, with max_tokens
        r"exceeds the maximum number of tokens allowed \(?(?P<window>\d[\d,]*)",  # Gemini
        r"maximum prompt length is (?P<window>\d[\d,]*)",  # xAI
        r"tokens` \+ `max_new_tokens` must be <= (?P<window>\d[\d,]*)",  # TGI
        r"maximum context length",
        r"context[ _](?:length|window|size)[ _]exceeded|exceed_context_size",
        r"exceeds? the (?:model's )?(?:available )?context|exceeds? .{0,20}context (?:window|length|size)",
        r"larger than the max context size|greater than the context length|context the overflows",
        r"prompt is too long|input is too long|reduce the length of the messages",
    )
]
OVERFLOW_CODES = {"context_length_exceeded", "exceed_context_size_error"}
FILTER_CODES = {
    "content_filter",  # Azure
    "content_policy_violation",
    "invalid_prompt",
    "data_inspection_failed",  # DashScope
    "ResponsibleAIPolicyViolation",
}
OUT_OF_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"}
# Errors inside a stream come after HTTP 200; their type has to stand for the status.
STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "BadRequestError": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "overloaded_error": 503,
}
# What can be left out of a request without changing what is asked. Where two are named together ("`temperature` and
# `top_p` cannot both be specified", Anthropic), the first here goes.
DROPPABLE = (
    "stream_options",
    "parallel_tool_calls",
    "reasoning_effort",
    "response_format",
    "max_completion_tokens",
    "max_tokens",
    "tool_choice",
    "top_p",
    "temperature",
    "user",
)
REFUSALS = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|extra_forbidden|not permitted|not allowed|only allowed"
    r"|unavailable|not available|cannot find field|cannot both|deprecated|not implemented|does not accept",
    re.IGNORECASE,
)


class Fault(Struct, frozen=True, kw_only=True):
    """An error answer, read. status: HTTP's, or the one that the error's type stands for; code: any of the names given
    to the error; own_words: the server's message, clipped; window_tokens: the window, where the server told it."""

    status: int
    own_words: str = ""
    codes: frozenset[str] = frozenset()
    param: str = ""
    window_tokens: int | None = None

    @property
    def is_overflow(self) -> bool:
        if self.status in (401, 403, 404, 429):
            return False
        return bool(self.codes & OVERFLOW_CODES) or any(pattern.search(self.own_words) for pattern in OVERFLOWS)

    @property
    def is_filter(self) -> bool:
        return bool(self.codes & FILTER_CODES)

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed a little later."""
        if self.is_overflow or self.is_filter or self.codes & OUT_OF_QUOTA:
            return False
        return self.status in (408, 409, 429) or self.status >= 500


def read_fault(status: int, body: bytes) -> Fault:
    """Read an error answer of any server. status: 200 for an error inside a stream."""
    try:
        said = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        said = body.decode("utf-8", "replace") if not body.lstrip().startswith(b"<") else ""
    error = _innermost(said)
    codes = frozenset(str(error[key]) for key in ("code", "type", "status", "innercode") if error.get(key))
    words = " ".join(str(error.get("message") or "").replace("\0", "\ufffd").split())
    words = words.encode("utf-8", "replace").decode()
    return Fault(
        status=status if status >= 300 else _status_of(codes),
        own_words=words if len(words) <= CLIP_CHARS else words[: CLIP_CHARS - 1] + "…",
        codes=codes,
        param=str(error.get("param") or ""),
        window_tokens=_window_of(error, words),
    )


def _innermost(said: Any) -> dict[str, Any]:
    """The part of an error answer that has the message: `{"error": {…}}`, `{"error": "…"}`, `[{"error": …}]`,
    `{"detail": …}`, `{"message": …}` or bare text."""
    if isinstance(said, list) and said:
        return _innermost(said[0])
    if not isinstance(said, dict):
        return {"message": said}
    inner = said.get("error") or said.get("detail")
    if isinstance(inner, dict):
        deeper = inner.get("innererror")
        return {**inner, "innercode": deeper.get("code")} if isinstance(deeper, dict) else inner
    if inner:
        return {**said, "message": said.get("message") or (inner if isinstance(inner, str) else _as_text(inner))}
    message = said.get("message")
    return said if isinstance(message, str | None) else {**said, "message": _as_text(message)}


def _as_text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _status_of(codes: frozenset[str]) -> int:
    for code in codes:
        if code.isdecimal() and 400 <= int(code) <= 599:
            return int(code)
    known = [STATUS_OF_TYPE[code] for code in codes if code in STATUS_OF_TYPE]
    return known[0] if known else 500


def _window_of(error: dict[str, Any], words: str) -> int | None:
    told = error.get("n_ctx")  # llama.cpp
    if isinstance(told, int) and told > 0:
        return told
    for pattern in OVERFLOWS:
        found = pattern.search(words)
        if found and "window" in pattern.groupindex:
            return int(found["window"].replace(",", "")) or None
    return None


def refused_parameter(fault: Fault, sent: Container[str]) -> str | None:
    """Return which parameter of those sent this server does not take, or None if that is not what it complains of."""
    if fault.status not in (400, 404, 422, 500, 501):
        return None
    words = fault.own_words
    if "does not support thinking" in words and "reasoning_effort" in sent:  # Ollama
        return "reasoning_effort"
    if not (REFUSALS.search(words) or REFUSALS.search(" ".join(fault.codes))):
        return None
    param = re.split(r"[.\[]", fault.param)[0]
    if param in sent and param in DROPPABLE:
        return param
    return next((name for name in DROPPABLE if name in sent and _names(words, name)), None)


def _names(words: str, name: str) -> bool:
    if name == "user":  # too common a word to be taken for the parameter, unless quoted or listed
        return bool(re.search(r"[\"'`]user[\"'`]|supplied:.*\buser\b", words))
    return bool(re.search(rf"(?<!\w){name.replace('_', '[_ ]')}(?!\w)", words))


def model_error(fault: Fault, who: str) -> ModelError:
    """The error that ends the run. who: model and server, e.g. `model 'qwen3:32b' at gpu (10.0.0.5:8000)`."""
    own = f": {fault.own_words}" if fault.own_words else "."
    if fault.is_filter:
        return ContentFiltered(f"The content filter of {who} refused the prompt{own}")
    if fault.is_overflow:
        return ContextOverflow(f"The prompt is too long for {who}{own}", fault.window_tokens)
    if fault.status == 429 or fault.status == 402 or fault.codes & OUT_OF_QUOTA:
        return ModelRateLimited(f"The rate limit or quota of {who} is used up{own}")
    if fault.status == 408:
        return ModelTimeout(f"The model server gave up waiting, {who} (HTTP 408){own}")
    if fault.status == 409 or fault.status >= 500:
        return ModelBroke(f"The model server failed, {who} (HTTP {fault.status}){own}")
    return ModelRefused(f"{_refusal(fault.status)} {who} (HTTP {fault.status}){own}")


def _refusal(status: int) -> str:
    if status in (401, 403):
        return "The model server refused the key, or the use of this model with it, for"
    if status == 404:
        return "The model server has no such model, or no chat completions at this URL:"
    if 300 <= status < 400:
        return "The model server answers at another URL; set that one for"
    return "The model server refused the request to"
