"""Every error of Afterglow, in one tree.

    AfterglowError
    ├── ApiError                 what a caller is told: an HTTP status and the API's error body
    │   ├── InvalidRequest       400
    │   │   ├── KeyReused
    │   │   ├── ThreadBusy
    │   │   └── BadToolOutputs
    │   ├── Unauthorized         401
    │   ├── Forbidden            403
    │   ├── NotFound             404
    │   ├── TooSlow              408
    │   ├── Conflict             409
    │   ├── BodyTooLarge         413
    │   ├── TooManyRequests      429
    │   ├── HeadTooLarge         431
    │   └── Unavailable          503
    ├── ModelError               what went wrong with a model server; ends a run, see `runs/loop.py`
    │   ├── ModelUnreachable
    │   ├── ModelTimeout
    │   ├── ModelRateLimited
    │   ├── ModelRefused
    │   ├── ModelBroke
    │   ├── ContextOverflow
    │   ├── ContentFiltered
    │   └── ImageUnavailable
    ├── StoreError               the database said no
    │   ├── StoreFull
    │   ├── StoreUnavailable
    │   ├── BlobMissing
    │   └── DimensionMismatch
    ├── SandboxError             the code interpreter could not do it; the model is told
    │   ├── SandboxOff
    │   ├── SandboxBusy
    │   ├── SandboxFull
    │   └── SessionLost
    ├── Unreadable               no text can be had from a file; the file's `last_error` in its vector store
    ├── OutboundFailed           a request that this server made for its owner did not get an answer
    ├── LostLease                another attempt of the run has taken over
    └── ConfigError              a setting is wrong; shown by the command line, never over HTTP

Raise where you know; catch at the HTTP edge (`api/edge.py`) and the worker edge (`runs/worker.py`).
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

UnreadableCode = Literal["unsupported_file", "invalid_file", "server_error"]


class AfterglowError(Exception):
    """The root. Never raised itself."""


class ApiError(AfterglowError):
    """Something a caller must hear of.

    message: the wire's `message`; param: path of the offending key (`tools[0].function.name`) or None.
    Wire: `{"error": {"message", "type", "param", "code"}}` with HTTP `status`.
    """

    status = 500
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}

    def body(self) -> bytes:
        """The error envelope as JSON bytes."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": fields})


class InvalidRequest(ApiError):
    """The request cannot be carried out as it stands. Wire: HTTP 400, type `invalid_request_error`."""

    status = 400
    type = "invalid_request_error"


class KeyReused(InvalidRequest):
    """This idempotency key was used for another request within 24 hours: another path, query or body.

    Wire: HTTP 400, type `idempotency_error`, code `idempotency_key_reused`.
    """

    type = "idempotency_error"

    def __init__(self) -> None:
        super().__init__(
            "This Idempotency-Key was used for another request, with another path or body. Use a key of its own for "
            "each request; the same key is for the same request sent again.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )


class ThreadBusy(InvalidRequest):
    """A run is still active on this thread; wait for it or cancel it.

    Wire: HTTP 400, type `invalid_request_error`, code and param null, wording as recorded from the public API.
    Clients read both ids out of the text.
    """

    @classmethod
    def for_message(cls, thread_id: str, run_id: str) -> ThreadBusy:
        return cls(f"Can't add messages to {thread_id} while a run {run_id} is active.")

    @classmethod
    def for_run(cls, thread_id: str, run_id: str) -> ThreadBusy:
        return cls(f"Thread {thread_id} already has an active run {run_id}.")

    @classmethod
    def for_queue(cls, thread_id: str, waiting: int) -> ThreadBusy:
        return cls(f"Thread {thread_id} already has {waiting} runs that wait for it.")


class BadToolOutputs(InvalidRequest):
    """The outputs do not answer exactly the calls that wait; the run goes on waiting.

    Wire: HTTP 400, type `invalid_request_error`; names the call ids expected and those received.
    """

    def __init__(self, expected: list[str], got: list[str]) -> None:
        super().__init__(f"Expected tool outputs for call_ids {expected}, got {got}")


class Unauthorized(ApiError):
    """No key, one that is not known here, or one of another project or an archived one.

    Wire: HTTP 401, type `invalid_request_error`.
    """

    status = 401
    type = "invalid_request_error"


class Forbidden(ApiError):
    """The request came from an origin or for a host that is not allowed, or its key lacks a scope. Wire: HTTP 403."""

    status = 403
    type = "invalid_request_error"


class NotFound(ApiError):
    """No such object in the caller's project, or no such route. Wire: HTTP 404, type `invalid_request_error`."""

    status = 404
    type = "invalid_request_error"

    @classmethod
    def of(cls, noun: str, object_id: str, *, param: str | None = None) -> NotFound:
        """noun: `assistant`, `thread`, `message`, `run` or `run step`."""
        return cls(f"No {noun} found with id '{object_id}'.", param=param)


class Gone(ApiError):
    """What is asked for was kept for a time, and that is over. Wire: HTTP 410, type `invalid_request_error`."""

    status = 410
    type = "invalid_request_error"


class TooSlow(ApiError):
    """The request did not arrive in time; the connection is closed. Wire: HTTP 408, type `invalid_request_error`."""

    status = 408
    type = "invalid_request_error"


class Conflict(ApiError):
    """Another request with the same idempotency key is being executed. Wire: HTTP 409, type `invalid_request_error`;
    the SDKs try again."""

    status = 409
    type = "invalid_request_error"


class TooManyRequests(ApiError):
    """A limit of the project or the key is used up. Wire: HTTP 429 with `Retry-After`.

    type: `requests`, `tokens`, or `insufficient_quota` for what no waiting cures; then SDKs are told not to retry.
    """

    status = 429

    def __init__(self, message: str, kind: str, *, code: str = "rate_limit_exceeded", retry_after_s: float = 1) -> None:
        super().__init__(message, code=code)
        self.type = kind
        if kind == "insufficient_quota":
            self.headers = {"x-should-retry": "false"}
        else:
            self.headers = {
                "retry-after": str(math.ceil(retry_after_s)),
                "retry-after-ms": str(math.ceil(retry_after_s * 1000)),
            }


class HeadTooLarge(ApiError):
    """Request line and headers are larger than `max_header_kb`, or the headers too many; the connection is closed.

    Wire: HTTP 431, type `invalid_request_error`.
    """

    status = 431
    type = "invalid_request_error"


class BodyTooLarge(ApiError):
    """The body is larger than `max_body_mb`, or a file than `max_file_mb`.

    Wire: HTTP 413, type `invalid_request_error`.
    """

    status = 413
    type = "invalid_request_error"


class Unavailable(ApiError):
    """The server cannot do it now, and nothing was written; try again. Wire: HTTP 503, with Retry-After."""

    status = 503
    type = "server_error"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.headers["retry-after"] = str(retry_after_s)


class ModelError(AfterglowError):
    """A model call that did not end well.

    code: the run's `last_error.code`. The text is for the run's owner: it names model and upstream, never a key.
    """

    code = "server_error"


class ModelUnreachable(ModelError):
    """No connection, or it broke. Run: failed, `server_error`."""


class ModelTimeout(ModelError):
    """Connecting, the first token or the whole answer took too long. Run: failed, `server_error`."""


class ModelRateLimited(ModelError):
    """The upstream answered 429, or its quota is used up. Run: failed, `rate_limit_exceeded`."""

    code = "rate_limit_exceeded"


class ModelRefused(ModelError):
    """The upstream refused the request: key, model name or an argument. Run: failed, `server_error`."""


class ModelBroke(ModelError):
    """The upstream answered 5xx, or with something that is no chat completion. Run: failed, `server_error`."""


class ContextOverflow(ModelError):
    """The prompt is longer than the model's window. Under truncation `auto` it is cut and tried once more.

    window_tokens: the limit that the upstream named, or None when it named none. Run: failed, `invalid_prompt`.
    """

    code = "invalid_prompt"

    def __init__(self, message: str, window_tokens: int | None = None) -> None:
        super().__init__(message)
        self.window_tokens = window_tokens


class ContentFiltered(ModelError):
    """The upstream's filter refused the prompt. Run: failed, `invalid_prompt`."""

    code = "invalid_prompt"


class ImageUnavailable(ModelError):
    """An image URL had to be fetched for the model, and could not be. Run: failed, `invalid_prompt`."""

    code = "invalid_prompt"


class StoreError(AfterglowError):
    """The database did not do what it was asked; the transaction was rolled back whole."""


class StoreFull(StoreError):
    """No space left for a write. Wire: HTTP 503; what was acknowledged before is safe."""


class StoreUnavailable(StoreError):
    """The database cannot be read or written just now. Wire: HTTP 503."""


class BlobMissing(StoreError):
    """The bytes of a file are not where they were put. Wire: HTTP 503."""


class DimensionMismatch(StoreError):
    """Embeddings of another length than those of the vector store: they come from another model.

    store_id: the vector store; expected, got: floats in a vector. Nothing was written or searched.
    """

    def __init__(self, store_id: str, expected: int, got: int) -> None:
        super().__init__(
            f"The vector store {store_id} holds embeddings of {expected} dimensions, and these have {got}: they come "
            "from another embedding model. Configure the model it was made with, or run `afterglow reindex`."
        )
        self.store_id = store_id
        self.expected = expected
        self.got = got


class SandboxError(AfterglowError):
    """The code interpreter could not do what it was asked; the text is for the model and the run's owner."""


class SandboxOff(SandboxError):
    """No engine can be had here; the text says why, and what to do about it."""


class SandboxBusy(SandboxError):
    """As many sessions are open as may be, or the machine has no room for another just now."""


class SandboxFull(SandboxError):
    """A file does not fit into the session."""


class SessionLost(SandboxError):
    """The session is over: its variables are gone. A new one can be opened."""


class Unreadable(AfterglowError):
    """No text can be had from this file. code, message: its `last_error` in a vector store, in words for its owner."""

    def __init__(self, code: UnreadableCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class OutboundFailed(AfterglowError):
    """A webhook, a tool or an image could not be reached; the text says why, for its owner.

    forbidden: the address is none that may be asked, so trying again does not help.
    """

    def __init__(self, message: str, *, forbidden: bool = False) -> None:
        super().__init__(message)
        self.forbidden = forbidden


class LostLease(AfterglowError):
    """Another attempt of the run has taken over; this one must stop and write nothing more."""


class ConfigError(AfterglowError):
    """A setting is wrong or missing; the message says which, and what to write instead."""
