"""What a backend must do: the plugs that `app.py` fills, and the shapes that pass through them.

The wing (`store/`, `events/`, `queue/`, `llm.py`, `offline.py`) implements these; everything above uses only these.
The bundle of chosen plugs is `House`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from afterglow.objects import Usage
from afterglow.settings import Settings

T = TypeVar("T")
SqlValue = str | int | float | bytes | None
SqlRow = tuple[Any, ...]


# --- time ------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Time that tests can set."""

    def now(self) -> float:
        """Unix seconds; never less than an earlier answer, so that `created_at` orders what was created."""
        ...


# --- store -----------------------------------------------------------------------------------------------------


class Transaction(Protocol):
    """One open transaction. The statements that run in it are the functions of `afterglow/rows/`."""

    async def fetch(self, sql: str, *values: SqlValue) -> list[SqlRow]:
        """Run one statement with `$1`, `$2`, … and return all its rows."""
        ...

    async def execute(self, sql: str, *values: SqlValue) -> int:
        """Run one statement and return how many rows it changed."""
        ...


Work = Callable[[Transaction], Awaitable[T]]


class Store(Protocol):
    """Runs work in transactions. Work awaits nothing but its transaction: under SQLite it is driven to its end
    inside the writer's thread, so it may touch neither the event loop nor state shared with it.

    Every call raises StoreFull or StoreUnavailable when the database fails; then nothing of the work was written.
    A statement that is itself wrong is a bug, raised as the driver raises it.
    """

    async def read(self, work: Work[T]) -> T:
        """Run `work` on a snapshot; it must not write."""
        ...

    async def write(self, work: Work[T]) -> T:
        """Run `work` alone, commit, and return its result. An exception of the work's rolls it back and is raised."""
        ...

    async def write_early(self, work: Work[T]) -> tuple[T, Awaitable[None]]:
        """As `write`, but return as soon as the work has run, with an awaitable that ends when it is committed.

        For work whose result may be acted on privately before it is durable, and announced only after.
        """
        ...

    async def close(self) -> None: ...


# --- events ----------------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """A place in a run's event log: after event `sequence` of `attempt`. (0, 0) is the start."""

    attempt: int
    sequence: int


START = Position(0, 0)
Stop = Literal["", "action", "end"]


class Segment(NamedTuple):
    """Some consecutive events of one attempt, as ready SSE bytes.

    first, last: their sequence numbers, from 1 in each attempt. stop: set when the last event is one that ends a
    POST stream: `action` for thread.run.requires_action, `end` for a terminal one.
    """

    attempt: int
    first: int
    last: int
    data: bytes
    stop: Stop = ""


class Events(Protocol):
    """Live delivery of run events to followers in this process. What is stored of them is in `rows/events.py`."""

    def announce(self, project: str, run_id: str, segment: Segment) -> None:
        """Give a segment to all followers at once. State events are announced only after their commit."""
        ...

    def keep(self, project: str, run_id: str, segment: Segment) -> None:
        """Announce a segment that no transaction has written, and write it with the next batch."""
        ...

    def take_unwritten(self, run_id: str) -> list[Segment]:
        """Take over what `keep` has not handed to the database yet, so that the caller's transaction writes it."""
        ...

    def forget(self, run_id: str) -> None:
        """Let go of a run that this process has nothing more to say of: it was deleted, or taken over elsewhere."""
        ...

    def follow(self, project: str, run_id: str, after: Position) -> AsyncGenerator[list[Segment], None]:
        """Yield what comes after `after`, first from the store and then live, without end.

        A batch holds nothing beyond its first stop. An empty one means that `keep_alive_s` passed in silence."""
        ...

    async def close(self) -> None: ...


# --- queue -----------------------------------------------------------------------------------------------------


class RunQueue(Protocol):
    """Wakes workers. The run row itself says what is queued; a lost wake-up costs at most one poll."""

    def wake(self) -> None:
        """Something was queued. Called after the commit."""
        ...

    def cancel(self, run_id: str) -> None:
        """Tell the worker that holds this run to look at its row again."""
        ...

    async def wait(self, timeout_s: float) -> None:
        """Return when something was queued since the last call, or after `timeout_s`."""
        ...

    def on_cancel(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the run id of each cancel."""
        ...


# --- models ----------------------------------------------------------------------------------------------------


class ChatRequest(msgspec.Struct, kw_only=True):
    """One call of a model. messages, tools, tool_choice, response_format: in chat-completions form, ready to send.

    Sampling values are None unless the caller or the assistant set them. max_tokens: completion tokens at most.
    """

    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning_effort: str | None = None
    max_tokens: int | None = None
    user: str | None = None


class TextDelta(msgspec.Struct):
    """More of the answer's text."""

    text: str


class RefusalDelta(msgspec.Struct):
    """More of a refusal's text."""

    text: str


class ReasoningDelta(msgspec.Struct):
    """More of what the model thought. It is counted, never shown: the API has no place for it."""

    text: str


class ToolCallDelta(msgspec.Struct):
    """More of one function call.

    index: which call of this turn, contiguous from 0. id and name are given once, in the first delta of a call
    (the id is made by us when the server gave none); arguments: the next piece of the JSON text.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ModelEnd(msgspec.Struct, kw_only=True):
    """The last thing of a stream that ended well.

    finish_reason: `tool_calls` whenever calls were made, whatever the server said. usage: as reported, or None when
    the server reported none. model: the name that the server gave itself. sent, dropped: names and values of the
    parameters that went out, and of those left out because this upstream refuses them. raw_usage: as reported.
    """

    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]
    usage: Usage | None = None
    raw_usage: dict[str, Any] | None = None
    model: str = ""
    upstream: str = ""
    sent: dict[str, Any] = {}
    dropped: list[str] = []


Delta = TextDelta | RefusalDelta | ReasoningDelta | ToolCallDelta | ModelEnd


class ModelInfo(msgspec.Struct, kw_only=True):
    """What is known of a model. window_tokens: prompt and completion together; learned: from whom."""

    window_tokens: int
    learned: Literal["configuration", "server", "default"] = "default"
    max_output_tokens: int | None = None
    vision: bool | None = None
    tools: bool | None = None


class ChatModels(Protocol):
    """All models that this server can call, by the names that callers use."""

    def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        """Call `request.model` and yield its deltas, those that arrived together in one list; ModelEnd comes last.

        Closing the iterator aborts the call. Raises a ModelError (errors.py) at any point. Retries happen only
        before the first token. No two calls share anything that a slow one could block.
        """
        ...

    async def info(self, model: str) -> ModelInfo:
        """What is known of `model` (a caller's name). Asks its server once and remembers; never raises."""
        ...

    def learn_window(self, model: str, window_tokens: int) -> None:
        """Remember a limit that an upstream named when it refused a prompt."""
        ...

    def wants_inline_images(self, model: str) -> bool:
        """Whether the server of `model` takes images only as data, so that URLs must be fetched for it."""
        ...

    async def list_models(self) -> list[dict[str, Any]]:
        """The wire's model objects: what the upstreams list, and the aliases. Never raises."""
        ...

    async def forward(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> Forwarded:
        """Pass a request that is not ours on to the upstream, as bytes, with the upstream's key.

        path: without prefix, e.g. `/chat/completions`. Raises ModelUnreachable or ModelTimeout.
        """
        ...

    async def close(self) -> None: ...


class ClosableBytes(Protocol):
    """Bytes as they come; `aclose` lets go of whatever brings them."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None: ...


@dataclass(slots=True)
class Forwarded:
    """An upstream's answer on its way through. `body` must be read to its end or closed."""

    status: int
    headers: dict[str, str]
    body: ClosableBytes


class ImageFetcher(Protocol):
    """Fetches images for model servers that do not fetch them."""

    async def data_url(self, url: str) -> str:
        """`data:image/…;base64,…` of an http(s) URL. Raises ImageUnavailable, also for addresses not allowed."""
        ...

    async def close(self) -> None: ...


# --- the bundle ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class House:
    """The plugs that `app.py` chose, handed to whoever needs them.

    engines_off: for each tool kind whose engine is off, why, in words for the model and the operator.
    """

    settings: Settings
    clock: Clock
    store: Store
    events: Events
    queue: RunQueue
    models: ChatModels
    images: ImageFetcher
    engines_off: dict[str, str] = field(default_factory=dict)
