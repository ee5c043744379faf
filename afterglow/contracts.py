"""What a backend must do: the plugs that `app.py` fills, and the shapes that pass through them.

The wing (`store/`, `events/`, `queue/`, `search/`, `sandbox/`, `llm.py`, `embeddings.py`, `offline.py`) implements
these; everything above uses only these.
The bundle of chosen plugs is `House`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from afterglow.calibration import Calibration
from afterglow.limits import Limiter
from afterglow.metrics import Metrics
from afterglow.objects import AttributeValue, Filter, Usage
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
    inside the writer's thread, so it may touch neither the event loop nor state shared with it. Under Postgres it may
    be run again, from the start, when others wrote what it had read: it changes nothing but through its transaction.

    Every call raises StoreFull or StoreUnavailable when the database fails; then nothing of the work was written.
    A statement that is itself wrong is a bug, raised as the driver raises it.
    """

    async def read(self, work: Work[T]) -> T:
        """Run `work` on a snapshot; it must not write."""
        ...

    async def write(self, work: Work[T], *, rowwise: bool = False) -> T:
        """Run `work`, commit, and return its result. An exception of the work's rolls it back and is raised.

        Others who write to a row that this work writes to do so before or after it, never meanwhile; then `work` may
        be run again from its start. Hence it changes nothing but through its transaction and its return value, and
        two works that must not miss each other write to a row in common.
        rowwise: each of its statements minds rows one by one, such as renewing leases; it never has to be run again
        because of what others do to some of many rows.
        """
        ...

    async def write_early(self, work: Work[T]) -> tuple[T, Awaitable[None]]:
        """As `write`, but return as soon as the work has run, with an awaitable that ends when it is committed.

        For work whose result may be acted on privately before it is durable, and announced only after.
        """
        ...

    async def close(self) -> None: ...


class Locks(Protocol):
    """Locks by name, for what no transaction can hold together: one holder among all processes on the same data."""

    def hold(self, name: str) -> AbstractAsyncContextManager[None]:
        """Raises StoreUnavailable when it cannot be known whether another holds it."""
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


Watched = Literal["run", "file", "batch"]
DELETED = "deleted"


class News(NamedTuple):
    """What was heard of something that is watched.

    status: what it is now; DELETED, or "" when that is not known. text: its object as JSON, where this process has it.
    """

    status: str = ""
    text: bytes | None = None


class Watch(Protocol):
    """What is heard of one thing, from the beginning of its `with` to the end."""

    def __enter__(self) -> Watch: ...

    def __exit__(self, *raised: object) -> None: ...

    async def next(self, known: str, timeout_s: float) -> News | None:
        """Word of another status than `known`, as soon as there is some; None when nobody is to wait any longer.

        Raises TimeoutError."""
        ...


class Events(Protocol):
    """Live delivery of run events to followers in this process. What is stored of them is in `rows/events.py`.

    Besides, word of what has another status now: runs, by what is announced of them, and files and batches of vector
    stores, by `note`.
    """

    def announce(self, project: str, run_id: str, segment: Segment) -> None:
        """Give a segment to all followers at once. State events are announced only after their commit."""
        ...

    def keep(self, project: str, run_id: str, segment: Segment) -> None:
        """Announce a segment that no transaction has written, and write it with the next batch."""
        ...

    def take_unwritten(self, run_id: str) -> list[Segment]:
        """Take over what of `keep` is not known to be in the database, so that the caller's transaction writes it."""
        ...

    def forget(self, run_id: str) -> None:
        """Let go of a run that this process has nothing more to say of: it was deleted, or taken over elsewhere."""
        ...

    def follow(self, project: str, run_id: str, after: Position) -> AsyncGenerator[list[Segment], None]:
        """Yield what comes after `after`, first from the store and then live, without end.

        A batch holds nothing beyond its first stop. An empty one means that `keep_alive_s` passed in silence."""
        ...

    def watch(self, kind: Watched, project: str, key: str, inside: str = "") -> Watch:
        """Hear of a run, a file (of the store `inside`) or a batch (likewise) when it has another status.

        Word from other processes can be lost: then it is heard of about a second later. Waiting reads nothing."""
        ...

    def note(self, project: str, key: str, status: str = "") -> None:
        """After a commit: this run, batch or file (`vs_…/file-…`) has this status now. A store (`vs_…`): whoever
        watches something in it is to look again."""
        ...

    def end_watches(self) -> None:
        """Tell all who watch now that they are not to wait any longer."""
        ...

    async def close(self) -> None: ...


# --- memory ----------------------------------------------------------------------------------------------------


class KnownRun(NamedTuple):
    """A run as it was just read. text: its object as JSON. deadline: Unix seconds."""

    text: str
    status: str
    deadline: int


class RunMemory(Protocol):
    """Active runs that were lately asked for, never older than what was committed last."""

    def get(self, project: str, thread_id: str, run_id: str) -> KnownRun | None: ...

    def reading(self, project: str, run_id: str) -> object:
        """Say, before the run is read, that it will be. Returns a mark for `keep`."""
        ...

    def keep(self, project: str, thread_id: str, run_id: str, mark: object, run: KnownRun | None) -> None:
        """What was read, unless the run was changed since the mark; None when it could not be read."""
        ...


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

    def names(self, model: str) -> list[str]:
        """`model`, and the other names by which the operator may speak of what answers for it: the target of an alias,
        `UPSTREAM/model`, and the server's own. They are known once `info` was asked for the model."""
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


class Reply(NamedTuple):
    """What another server has answered. headers: by lower-case names. body: as much as was asked for at most."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Outbound(Protocol):
    """Requests to addresses that callers name: webhooks and tools."""

    async def post(
        self,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        timeout_s: float,
        max_bytes: int,
        allow_private: bool,
    ) -> Reply:
        """POST, and follow no redirect. Any status is a reply.

        timeout_s: for all of it. max_bytes: of the answer's body, the rest is not read. allow_private: also private,
        loopback and link-local addresses, and plain http. Raises OutboundFailed.
        """
        ...

    async def close(self) -> None: ...


class McpServer(NamedTuple):
    """url: as a caller named it; empty for one of the operator's, whom `label` names."""

    label: str
    url: str = ""


class McpTool(NamedTuple):
    """parameters: the JSON Schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]


class McpServers(Protocol):
    """The tools of other programs, by the Model Context Protocol."""

    def why_refused(self, server: McpServer) -> str | None:
        """Why it is none that may be asked, in words for the caller; None when it may."""
        ...

    async def list_tools(self, project: str, server: McpServer) -> list[McpTool]:
        """Its tools, a bounded number, as the operator allows them. Raises OutboundFailed."""
        ...

    async def call_tool(
        self, project: str, server: McpServer, name: str, arguments: dict[str, Any], *, timeout_s: float
    ) -> str:
        """The output as text, of bounded size. No two projects share a session. Raises OutboundFailed, also when the
        tool says that it failed."""
        ...

    async def close(self) -> None:
        """End every session, and every program that was started for one."""
        ...


# --- bytes of files --------------------------------------------------------------------------------------------


class Blobs(Protocol):
    """The bytes of files, by keys of ours (`fi/file-…`), never by a caller's words.

    Raises StoreFull or StoreUnavailable when the place that holds them fails.
    """

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Store what `chunks` gives and return its size in bytes. What `chunks` raises is raised, and nothing kept."""
        ...

    def get(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` up to `end` (not included). Raises BlobMissing before the first."""
        ...

    async def delete(self, keys: list[str]) -> None:
        """Delete them; one that is not there counts as deleted."""
        ...

    async def close(self) -> None: ...


# --- search ----------------------------------------------------------------------------------------------------


class Chunk(msgspec.Struct, frozen=True):
    """A passage of a file.

    index: 0… in the file. start, end: code points in the extracted text, end not included. page: 1…, or None where
    the file has none. tokens: by the tokenizer of the splitter.
    """

    index: int
    text: str
    start: int
    end: int
    page: int | None
    tokens: int


class Hit(msgspec.Struct, frozen=True):
    """A chunk that was found, and why.

    score: in [0, 1]; `search/ranking.py` says what it means. lexical_rank, vector_rank: 1…, equals share a rank, None
    where that side did not find it. lexical_score: BM25. similarity: cosine.
    """

    store_id: str
    file_id: str
    chunk: Chunk
    score: float
    lexical_rank: int | None
    vector_rank: int | None
    lexical_score: float | None
    similarity: float | None


class Weights(msgspec.Struct, frozen=True):
    """How much each side counts when ranks are fused: not negative, and not both 0. A side of weight 0 is not asked;
    where there is no embedding, words are, whatever they weigh."""

    embedding: float = 1.0
    text: float = 1.0


IndexedFile = tuple[dict[str, AttributeValue], list[Chunk], list[bytes] | None, str]  # as `put_file` takes it


class SearchIndex(Protocol):
    """The chunks of vector stores, by words and by vectors. A store comes to be with its first file.

    Whether stores and files may be there is the caller's business: reading one that is not gives nothing, deleting it
    does nothing, and another project's is not there. Raises StoreFull or StoreUnavailable when the place that holds
    them fails; then nothing was written. A write that has returned has been synced.
    """

    async def put_file(
        self,
        project: str,
        store_id: str,
        file_id: str,
        attributes: Mapping[str, AttributeValue],
        chunks: Sequence[Chunk],
        embeddings: Sequence[bytes] | None,
        text: str | None = None,
    ) -> int:
        """Write a file's chunks in one transaction, in place of those that were there; return its size in bytes.

        chunks: numbered 0…, in order of their starts. embeddings: one for each chunk, as `ranking.pack_vector` makes
        them, or None. text: the extracted text, `text[chunk.start:chunk.end] == chunk.text`; without it blanks stand
        where no chunk is. The size is that of the text in UTF-8 and of the embeddings.
        Raises DimensionMismatch when other files of the store have embeddings of another length.
        """
        ...

    async def set_attributes(
        self, project: str, store_id: str, file_id: str, attributes: Mapping[str, AttributeValue]
    ) -> None:
        """Put these attributes in the place of the file's."""
        ...

    async def delete_file(self, project: str, store_id: str, file_id: str) -> None:
        """Delete a file's chunks; their text is removed from the disk with them, from a large store soon after."""
        ...

    async def delete_store(self, project: str, store_id: str) -> None:
        """Delete a store with everything in it."""
        ...

    async def search(
        self,
        project: str,
        store_ids: Sequence[str],
        query: str,
        embedding: Sequence[float] | None,
        limit: int,
        where: Filter | None = None,
        threshold: float = 0.0,
        weights: Weights | None = None,
    ) -> list[Hit]:
        """Find the chunks that best match, best first; the stores count as one.

        query: any text; nothing in it is syntax. embedding: of the query, by the model of the stores' embeddings; None
        searches words alone. where: only files whose attributes it is true of are searched. threshold: hits that score
        less are left out. A hit's score depends on neither limit nor threshold.
        Raises DimensionMismatch when a store has embeddings of another length.
        """
        ...

    async def list_chunks(self, project: str, store_id: str, file_id: str, after: int, limit: int) -> list[Chunk]:
        """A file's chunks in order, those after index `after` (-1: from the first)."""
        ...

    async def read_file(self, project: str, store_id: str, file_id: str) -> IndexedFile | None:
        """All of a file, as `put_file` was given it, vectors bit for bit; None when it is not there."""
        ...

    async def text(self, project: str, store_id: str, file_id: str) -> str:
        """The extracted text of a file, whole."""
        ...

    async def usage_bytes(self, project: str, store_id: str) -> int:
        """The sizes of a store's files, as `put_file` returned them, together."""
        ...

    async def backup(self, target: Path) -> None:
        """Copy every store into the folder `target`, each as it is at one moment, while serving."""
        ...

    async def close(self) -> None: ...


# --- embeddings ------------------------------------------------------------------------------------------------


class Embedder(Protocol):
    """Turns texts into vectors that lie close together where texts mean alike."""

    @property
    def model(self) -> str:
        """The name of the embedding model. Vectors of two models cannot be compared."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector for each text, in their order, all of one length; in one request, whatever their number.

        Raises a ModelError; ModelRefused and ContextOverflow say that trying again does not help.
        """
        ...

    async def close(self) -> None: ...


# --- code interpreter ------------------------------------------------------------------------------------------


class Logs(msgspec.Struct):
    """More of what a cell prints: stdout, stderr, the last expression's value and tracebacks, in order."""

    text: str


class Picture(msgspec.Struct):
    """An image that a cell shows."""

    data: bytes
    mime: Literal["image/png", "image/jpeg"] = "image/png"


class CellEnd(msgspec.Struct):
    """How a cell ended; the last thing that `run` gives.

    status: `ok`; `error`, it raised; `timeout`, it was interrupted and its variables are kept; `lost`, the session is
    over, with `why` in words: out of memory, would not be interrupted, exited, was ended from outside.
    clipped_bytes: how much of its output was dropped because it was too much.
    """

    status: Literal["ok", "error", "timeout", "lost"]
    why: str = ""
    clipped_bytes: int = 0


CellOutput = Logs | Picture | CellEnd


class SandboxFile(NamedTuple):
    """A regular file of a session. name: its path below /mnt/data, checked: clean, printable, no `..`."""

    name: str
    size_bytes: int
    mtime_ns: int


class CodeSession(Protocol):
    """A Python program in the sandbox, with its variables and its /mnt/data. Whatever it says is hostile input."""

    @property
    def alive(self) -> bool:
        """Whether it can run another cell."""
        ...

    def run(self, code: str, timeout_s: float) -> AsyncGenerator[CellOutput, None]:
        """Run a cell and give what it shows as it comes; CellEnd comes last. One cell at a time.

        The time is absolute: at its end the cell is interrupted, and a moment later the session killed. Closing the
        generator does the same at once. Raises nothing: a session that breaks ends the cell as `lost`.
        """
        ...

    async def put(self, name: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> None:
        """Write a file below /mnt/data. Raises SandboxFull when it does not fit, SessionLost."""
        ...

    async def list_files(self) -> list[SandboxFile]:
        """The regular files below /mnt/data, at most 10,000 of them. Raises SessionLost."""
        ...

    def get(self, name: str, max_bytes: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a file, no more than `max_bytes`. Raises FileNotFoundError, SessionLost."""
        ...

    async def close(self) -> None:
        """Kill everything in it. When this returns no process of it is left."""
        ...


class EngineStatus(msgspec.Struct, frozen=True):
    """engine: `native`, `docker` or `none`. reason: why it is off; remedy: what to do about it; both in words for the
    operator. unenforced: limits that cannot be held on this machine, in words."""

    state: Literal["starting", "on", "off"]
    engine: str = "none"
    reason: str = ""
    remedy: str = ""
    unenforced: tuple[str, ...] = ()


class CodeEngine(Protocol):
    """Runs model-written Python behind a wall, or not at all."""

    @property
    def status(self) -> EngineStatus: ...

    def start(self) -> None:
        """Begin to build and try the wall, in the background."""
        ...

    async def settled(self) -> EngineStatus:
        """The status, once it is no longer `starting`."""
        ...

    async def open(self) -> CodeSession:
        """A fresh session. Waits while the engine starts. Raises SandboxOff, or SandboxBusy when there are too many."""
        ...

    async def close(self) -> None:
        """End every session and process. Idempotent."""
        ...


# --- traces ----------------------------------------------------------------------------------------------------

SpanKind = Literal["created", "run", "attempt", "model", "tool"]
SpanAttributes = dict[str, str | int]


class Span(NamedTuple):
    """A part of a run's trace that is over. began, ended: Unix seconds. failure: empty when it ended well.

    `run` is the root, `attempt` is in it, `model` and `tool` are in the attempt of that number; the parts of a run
    find each other though different processes tell of them. `created` is in the trace of whoever created the run:
    caller, a W3C `traceparent`.
    """

    kind: SpanKind
    name: str
    run_id: str
    began: float
    ended: float
    attributes: SpanAttributes
    attempt: int = 0
    failure: str = ""
    caller: str = ""


class Traces(Protocol):
    """Takes the traces of runs to whoever keeps them."""

    def add(self, span: Span) -> None:
        """Send it along with others, some time soon. Raises nothing: what cannot be sent is dropped."""
        ...

    async def close(self) -> None:
        """Send what is left, within seconds."""
        ...


# --- the bundle ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class House:
    """The plugs that `app.py` chose, handed to whoever needs them.

    ingest_queue: as `queue`, for files of vector stores; its `cancel` takes `vs_…/file-…`, or `vs_…` for all of a
    store's. webhook_queue: wakes who delivers webhooks. locks: whoever writes to the index of a store holds that of
    its id, see `ingest/upkeep.py`. embedder: None searches words alone. metrics: what `/metrics` shows of this process.
    traces: None keeps none. mcp: None when no MCP server may be asked. run_memory: only where no other process can
    change a run. calibration: of what runs of this process estimate. limits: what callers may still do in this minute.
    """

    settings: Settings
    clock: Clock
    store: Store
    events: Events
    queue: RunQueue
    models: ChatModels
    images: ImageFetcher
    outbound: Outbound
    blobs: Blobs
    code_engine: CodeEngine
    ingest_queue: RunQueue
    webhook_queue: RunQueue
    index: SearchIndex
    locks: Locks
    embedder: Embedder | None = None
    limits: Limiter = field(default_factory=Limiter)
    metrics: Metrics = field(default_factory=Metrics)
    traces: Traces | None = None
    mcp: McpServers | None = None
    run_memory: RunMemory | None = None
    calibration: Calibration = field(default_factory=Calibration)

    def why_off(self, kind: str) -> str | None:
        """Why a server-side tool cannot be had, in words for the model and the operator; None when it can, or when
        its engine is still starting."""
        status = self.code_engine.status
        if kind == "code_interpreter" and status.state == "off":
            return f"{status.reason} {status.remedy}".strip()
        return None
