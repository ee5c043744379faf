"""The wire's shapes, by hand: what callers send (`Create…`, `Modify…`) and what they get.

Checked in tests against the types of the official SDK and against the published OpenAPI subset. A key that the
caller left out is UNSET, which is not the same as an explicit null. Times are Unix seconds. Limits are written here
as msgspec constraints; `api/faults.py` words a violation as the API does. Rows of the database are not here
(`afterglow/rows/`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

NonEmpty = Annotated[str, Meta(min_length=1)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
Instructions = Annotated[str, Meta(max_length=256_000)]
MessageText = Annotated[str, Meta(max_length=256_000)]
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$(?!\n)")]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(ge=0, le=1)]
TokenLimit = Annotated[int, Meta(ge=256)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
RunStatus = Literal[
    "queued",
    "in_progress",
    "requires_action",
    "cancelling",
    "cancelled",
    "failed",
    "completed",
    "incomplete",
    "expired",
]
# A run holds its thread while it is active; a worker has it, or had it when it died, while it is held.
ACTIVE_RUNS: frozenset[RunStatus] = frozenset({"queued", "in_progress", "requires_action", "cancelling"})
HELD_RUNS: frozenset[RunStatus] = frozenset({"in_progress", "cancelling"})
StepStatus = Literal["in_progress", "cancelled", "failed", "completed", "expired"]
MessageStatus = Literal["in_progress", "incomplete", "completed"]
Json = dict[str, Any]

# The one legal value of `include[]` on runs and run steps.
INCLUDE_FILE_SEARCH_CONTENT = "step_details.tool_calls[*].file_search.results[*].content"
EXTENSION = "x-afterglow"  # the key of tools under which our own extensions are
VENDOR_KEYS = "\x7fvendor"  # where keys beginning `x-` are kept; `api/bodies.py` refuses it from callers


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of everything a caller sends: unknown keys are refused."""


# --- tools -----------------------------------------------------------------------------------------------------

SearchWeight = Annotated[float, Meta(ge=0)]


class RankingOptions(Body):
    """How file search scores: `score_threshold` in 0–1; results below it are left out."""

    score_threshold: Annotated[float, Meta(ge=0, le=1)]
    ranker: Literal["auto", "default_2024_08_21"] = "auto"
    hybrid_search: dict[Literal["embedding_weight", "text_weight"], SearchWeight] | UnsetType | None = UNSET


class FileSearchOptions(Body):
    max_num_results: Annotated[int, Meta(ge=1, le=50)] | UnsetType = UNSET
    ranking_options: RankingOptions | UnsetType | None = UNSET


class FunctionDefinition(Body):
    """A function of the caller's. `parameters` is a JSON Schema; absent means no parameters."""

    name: FunctionName
    description: str | UnsetType | None = UNSET
    parameters: Json | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET


class _Tool(Body, tag_field="type", kw_only=True):
    vendor: Json | UnsetType = msgspec.field(default=UNSET, name=VENDOR_KEYS)  # keys beginning `x-`, as sent


class CodeInterpreterTool(_Tool, tag="code_interpreter"):
    pass


class FileSearchTool(_Tool, tag="file_search"):
    file_search: FileSearchOptions | UnsetType | None = UNSET


class FunctionTool(_Tool, tag="function", kw_only=True):
    function: FunctionDefinition


class McpTool(_Tool, tag="mcp", kw_only=True):
    """The tools of an MCP server, as in the Responses API. server_label: of the operator's configuration, or any name
    for `server_url`. allowed_tools: none but these. Nothing asks for approval here."""

    server_label: FunctionName
    server_url: NonEmpty | UnsetType | None = UNSET
    allowed_tools: Annotated[list[NonEmpty], Meta(max_length=128)] | UnsetType | None = UNSET
    require_approval: Literal["never"] | UnsetType | None = UNSET


DAY_S = 24 * 3600
TOOL_TIMEOUT_S = (0.1, 86_400.0)  # the least and the most that a caller may set


class FunctionCalling(Body):
    """What `x-afterglow` says of a function tool. url: whom this server calls itself; without it the caller gives the
    outputs. timeout_s: for one try, or for the caller. retries: tries more after 429, 5xx, timeouts and broken
    connections."""

    url: NonEmpty | None = None
    timeout_s: Annotated[float, Meta(ge=TOOL_TIMEOUT_S[0], le=TOOL_TIMEOUT_S[1])] | None = None
    retries: Annotated[int, Meta(ge=0, le=5)] | None = None


Tool = CodeInterpreterTool | FileSearchTool | FunctionTool | McpTool
Tools = Annotated[list[Tool], Meta(max_length=128)]


class FunctionChoiceName(Body):
    name: FunctionName


class FunctionChoice(Body, tag_field="type", tag="function"):
    function: FunctionChoiceName


class CodeInterpreterChoice(Body, tag_field="type", tag="code_interpreter"):
    pass


class FileSearchChoice(Body, tag_field="type", tag="file_search"):
    pass


ToolChoice = Literal["none", "auto", "required"] | FunctionChoice | CodeInterpreterChoice | FileSearchChoice


class JsonSchemaFormat(Body):
    name: FunctionName
    description: str | UnsetType = UNSET
    schema: Json | UnsetType = UNSET
    strict: bool | UnsetType | None = UNSET


class TextFormat(Body, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Body, tag_field="type", tag="json_object"):
    pass


class JsonSchemaResponseFormat(Body, tag_field="type", tag="json_schema"):
    json_schema: JsonSchemaFormat


ResponseFormat = Literal["auto"] | TextFormat | JsonObjectFormat | JsonSchemaResponseFormat


# --- tool resources --------------------------------------------------------------------------------------------


class CodeInterpreterResources(Body):
    file_ids: Annotated[list[str], Meta(max_length=20)] | UnsetType = UNSET


class FileSearchResources(Body):
    vector_store_ids: Annotated[list[str], Meta(max_length=1)] | UnsetType = UNSET


class AutoChunking(Body, tag_field="type", tag="auto"):
    pass


class StaticChunkSizes(Body):
    max_chunk_size_tokens: Annotated[int, Meta(ge=100, le=4096)]
    chunk_overlap_tokens: Annotated[int, Meta(ge=0)]


class StaticChunking(Body, tag_field="type", tag="static"):
    static: StaticChunkSizes


class NewVectorStore(Body):
    """A vector store to be made along with an assistant or a thread."""

    file_ids: Annotated[list[str], Meta(max_length=10_000)] | UnsetType = UNSET
    chunking_strategy: AutoChunking | StaticChunking | UnsetType = UNSET
    metadata: Metadata | UnsetType | None = UNSET


class CreateFileSearchResources(Body):
    vector_store_ids: Annotated[list[str], Meta(max_length=1)] | UnsetType = UNSET
    vector_stores: Annotated[list[NewVectorStore], Meta(max_length=1)] | UnsetType = UNSET


class ToolResources(Body):
    """Files and stores by id; the form of modify and of thread-and-run."""

    code_interpreter: CodeInterpreterResources | UnsetType | None = UNSET
    file_search: FileSearchResources | UnsetType | None = UNSET


class CreateToolResources(Body):
    """As ToolResources; `file_search.vector_stores` makes a store on the way."""

    code_interpreter: CodeInterpreterResources | UnsetType | None = UNSET
    file_search: CreateFileSearchResources | UnsetType | None = UNSET


# --- projects --------------------------------------------------------------------------------------------------

Count = Annotated[int, Meta(ge=0)]
Days = Annotated[int, Meta(ge=1)]
ProjectName = Annotated[str, Meta(min_length=1, max_length=256)]
KeyName = Annotated[str, Meta(max_length=256)]
KeyScope = Literal["read", "write", "admin"]
MAX_KEY_LIFE_S = 100 * 365 * DAY_S
Money = Annotated[float, Meta(ge=0)]


class Limits(Body):
    """What a project, or a key, may use; None sets no limit.

    requests_per_minute: all but polls, which polls_per_minute counts. tokens_per_minute: of model calls, as reported.
    concurrent_runs: active at once. storage_mb: of files. sandbox_minutes_per_day: of code interpreter sessions.
    """

    requests_per_minute: Count | None = None
    polls_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent_runs: Count | None = None
    storage_mb: Count | None = None
    sandbox_minutes_per_day: Count | None = None


class Retention(Body):
    """After how many days what is not used any more is deleted for good; None keeps it.

    threads: since their last message or run. files: since they were uploaded or made, unless a store or an assistant
    has them. events: of runs that are over.
    """

    threads_days: Days | None = None
    files_days: Days | None = None
    events_days: Days | None = None


class Budget(Body):
    """What model calls may cost; None sets no limit. Tokens are prompt and completion together; money is in the
    operator's currency. run: of one run; day: of the project since midnight UTC; total: of the project, ever."""

    run_tokens: Count | None = None
    run_cost: Money | None = None
    day_tokens: Count | None = None
    day_cost: Money | None = None
    total_tokens: Count | None = None
    total_cost: Money | None = None


class ProjectSettings(Body):
    limits: Limits = msgspec.field(default_factory=Limits)
    retention: Retention = msgspec.field(default_factory=Retention)
    budget: Budget = msgspec.field(default_factory=Budget)


class ModifyProjectSettings(Body):
    """Each part that is given takes the place of the one that was there."""

    limits: Limits | UnsetType = UNSET
    retention: Retention | UnsetType = UNSET
    budget: Budget | UnsetType = UNSET


class CreateProject(Body):
    name: ProjectName
    settings: ProjectSettings = msgspec.field(default_factory=ProjectSettings)


class ModifyProject(Body):
    name: ProjectName | UnsetType = UNSET
    settings: ModifyProjectSettings | UnsetType = UNSET


class Project(Struct, kw_only=True):
    """settings: ours, beside what the original has."""

    id: str
    object: Literal["organization.project"] = "organization.project"
    name: str
    created_at: int
    archived_at: int | None = None
    status: Literal["active", "archived"] = "active"
    settings: ProjectSettings = msgspec.field(default_factory=ProjectSettings)


# --- keys and the audit log ------------------------------------------------------------------------------------


class CreateApiKey(Body):
    """expires_in_seconds: from now; None: never. limits: beside those of the project."""

    name: KeyName = ""
    scopes: Annotated[list[KeyScope], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["read", "write"])
    expires_in_seconds: Annotated[int, Meta(ge=1, le=MAX_KEY_LIFE_S)] | None = None
    limits: Limits = msgspec.field(default_factory=Limits)


class ModifyApiKey(Body):
    scopes: Annotated[list[KeyScope], Meta(min_length=1)] | UnsetType = UNSET
    expires_in_seconds: Annotated[int, Meta(ge=1, le=MAX_KEY_LIFE_S)] | UnsetType | None = UNSET
    limits: Limits | UnsetType = UNSET


class ApiKey(Struct, kw_only=True):
    """A key without its secret. scopes and limits: ours, beside what the original has."""

    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    id: str
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None = None
    expires_at: int | None = None
    owner: Json
    owner_project_access: Literal["active", "inactive"] = "active"
    scopes: list[KeyScope]
    limits: Limits


class CreatedApiKey(ApiKey, kw_only=True):
    """value: the key itself, shown this once."""

    value: str


class AuditLog(Struct, kw_only=True):
    """An administrative act. What was done is under a key that is named as its `type`."""

    id: str
    object: Literal["organization.audit_log"] = "organization.audit_log"
    type: str
    effective_at: int
    project: Json
    actor: Json


# --- assistants ------------------------------------------------------------------------------------------------


class CreateAssistant(Body):
    model: NonEmpty
    name: Annotated[str, Meta(max_length=256)] | None = None
    description: Annotated[str, Meta(max_length=512)] | None = None
    instructions: Instructions | None = None
    tools: Tools | None = None
    tool_resources: CreateToolResources | None = None
    metadata: Metadata | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None


class ModifyAssistant(Body):
    model: NonEmpty | UnsetType = UNSET
    name: Annotated[str, Meta(max_length=256)] | UnsetType | None = UNSET
    description: Annotated[str, Meta(max_length=512)] | UnsetType | None = UNSET
    instructions: Instructions | UnsetType | None = UNSET
    tools: Tools | UnsetType | None = UNSET
    tool_resources: ToolResources | UnsetType | None = UNSET
    metadata: Metadata | UnsetType | None = UNSET
    temperature: Temperature | UnsetType | None = UNSET
    top_p: TopP | UnsetType | None = UNSET
    response_format: ResponseFormat | UnsetType | None = UNSET
    reasoning_effort: ReasoningEffort | UnsetType | None = UNSET


class Assistant(Struct, kw_only=True):
    """`temperature`, `top_p` and `response_format` show their defaults when unset; the row knows what was set."""

    id: str
    object: str = "assistant"
    created_at: int
    name: str | None = None
    description: str | None = None
    model: str
    instructions: str | None = None
    tools: list[Json] = []
    tool_resources: Json = {}
    metadata: dict[str, str] = {}
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    response_format: Any = "auto"
    reasoning_effort: str | None = None


# --- messages and threads --------------------------------------------------------------------------------------


class TextInput(Body, tag_field="type", tag="text"):
    text: MessageText


class ImageFileInputBody(Body):
    file_id: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImageFileInput(Body, tag_field="type", tag="image_file"):
    image_file: ImageFileInputBody


class ImageUrlInputBody(Body):
    url: NonEmpty
    detail: Literal["auto", "low", "high"] = "auto"


class ImageUrlInput(Body, tag_field="type", tag="image_url"):
    image_url: ImageUrlInputBody


ContentInput = TextInput | ImageFileInput | ImageUrlInput


class AttachedCodeInterpreter(Body, tag_field="type", tag="code_interpreter"):
    pass


class AttachedFileSearch(Body, tag_field="type", tag="file_search"):
    pass


class Attachment(Body):
    file_id: str
    tools: list[AttachedCodeInterpreter | AttachedFileSearch] | UnsetType = UNSET


class CreateMessage(Body):
    role: Literal["user", "assistant"]
    content: MessageText | Annotated[list[ContentInput], Meta(min_length=1)]
    attachments: list[Attachment] | None = None
    metadata: Metadata | None = None


class ModifyMessage(Body):
    metadata: Metadata | UnsetType | None = UNSET


class IncompleteDetails(Struct):
    """Why a message (content_filter, max_tokens, run_cancelled, run_expired, run_failed) or a run
    (max_completion_tokens, max_prompt_tokens) is incomplete."""

    reason: str


class Message(Struct, kw_only=True):
    id: str
    object: str = "thread.message"
    created_at: int
    thread_id: str
    status: MessageStatus = "completed"
    incomplete_details: IncompleteDetails | None = None
    completed_at: int | None = None
    incomplete_at: int | None = None
    role: Literal["user", "assistant"]
    content: list[Json] = []
    assistant_id: str | None = None
    run_id: str | None = None
    attachments: list[Json] = []
    metadata: dict[str, str] = {}


NewMessages = Annotated[list[CreateMessage], Meta(max_length=100_000)]


class CreateThread(Body):
    messages: NewMessages | None = None
    tool_resources: CreateToolResources | None = None
    metadata: Metadata | None = None


class ModifyThread(Body):
    tool_resources: ToolResources | UnsetType | None = UNSET
    metadata: Metadata | UnsetType | None = UNSET


class Thread(Struct, kw_only=True):
    id: str
    object: str = "thread"
    created_at: int
    metadata: dict[str, str] = {}
    tool_resources: Json = {}


# --- runs and steps --------------------------------------------------------------------------------------------


class TruncationStrategy(Body):
    """`auto` drops what is oldest until the prompt fits; `last_messages` keeps exactly the n newest messages."""

    type: Literal["auto", "last_messages"]
    last_messages: Annotated[int, Meta(ge=1)] | None = None


class _RunOptions(Body):
    assistant_id: str
    model: str | None = None
    instructions: Instructions | None = None
    tools: Tools | None = None
    metadata: Metadata | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    max_prompt_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    truncation_strategy: TruncationStrategy | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None


class CreateRun(_RunOptions):
    additional_instructions: Instructions | None = None
    additional_messages: NewMessages | None = None


class CreateThreadAndRun(_RunOptions):
    thread: CreateThread | None = None
    tool_resources: ToolResources | None = None


class ModifyRun(Body):
    metadata: Metadata | UnsetType | None = UNSET


class ToolOutput(Body):
    tool_call_id: str
    output: str = ""


class SubmitToolOutputs(Body):
    """partial: those that are missing are given later."""

    tool_outputs: list[ToolOutput]
    stream: bool | None = None
    partial: bool | None = None


class LastError(Struct):
    """code: server_error | rate_limit_exceeded | invalid_prompt (the last one on runs only)."""

    code: str
    message: str


class PromptTokenDetails(Struct, frozen=True):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class Usage(Struct, kw_only=True):
    """Tokens of one model call (on a step) or of all calls of a run. `prompt_token_details` is spelled as the
    service spelled it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_token_details: PromptTokenDetails = PromptTokenDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()

    def plus(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            total_tokens=self.total_tokens + other.total_tokens,
            prompt_token_details=PromptTokenDetails(
                self.prompt_token_details.cached_tokens + other.prompt_token_details.cached_tokens
            ),
            completion_tokens_details=CompletionTokensDetails(
                self.completion_tokens_details.reasoning_tokens + other.completion_tokens_details.reasoning_tokens
            ),
        )


class Run(Struct, kw_only=True):
    """`expires_at` is null once terminal; `usage` is null until then; `instructions` is never null."""

    id: str
    object: str = "thread.run"
    created_at: int
    assistant_id: str
    thread_id: str
    status: RunStatus = "queued"
    started_at: int | None = None
    expires_at: int | None = None
    cancelled_at: int | None = None
    failed_at: int | None = None
    completed_at: int | None = None
    required_action: Json | None = None
    last_error: LastError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    instructions: str = ""
    tools: list[Json] = []
    tool_resources: Json = {}
    metadata: dict[str, str] = {}
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    reasoning_effort: str | None = None
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    truncation_strategy: TruncationStrategy = msgspec.field(default_factory=lambda: TruncationStrategy(type="auto"))
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    response_format: Any = "auto"
    usage: Usage | None = None


class RunStep(Struct, kw_only=True):
    id: str
    object: str = "thread.run.step"
    created_at: int
    run_id: str
    assistant_id: str
    thread_id: str
    type: Literal["message_creation", "tool_calls"]
    status: StepStatus = "in_progress"
    cancelled_at: int | None = None
    completed_at: int | None = None
    expired_at: int | None = None
    failed_at: int | None = None
    expires_at: int | None = None
    last_error: LastError | None = None
    step_details: Json
    metadata: dict[str, str] | None = None
    usage: Usage | None = None


# --- files -----------------------------------------------------------------------------------------------------

FilePurpose = Literal["fine-tune", "assistants", "batch", "user_data", "vision", "evals"]


class File(Struct, kw_only=True):
    """purpose: as uploaded, or `assistants_output` for what the code interpreter wrote. `status` is deprecated in the
    original and always there."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


# --- attributes and filters of file search ---------------------------------------------------------------------

AttributeKey = Annotated[str, Meta(max_length=64)]
AttributeValue = Annotated[str, Meta(max_length=512)] | int | float | bool
Attributes = Annotated[dict[AttributeKey, AttributeValue], Meta(max_length=16)]


class Comparison(Body, tag_field="type"):
    """One attribute of a file held against a value; `search/filters.py` says when it is true."""

    key: AttributeKey


class _WithValue(Comparison):
    value: AttributeValue


class _WithValues(Comparison):
    value: list[AttributeValue]


class Eq(_WithValue, tag="eq"):
    pass


class Ne(_WithValue, tag="ne"):
    pass


class Gt(_WithValue, tag="gt"):
    pass


class Gte(_WithValue, tag="gte"):
    pass


class Lt(_WithValue, tag="lt"):
    pass


class Lte(_WithValue, tag="lte"):
    pass


class In(_WithValues, tag="in"):
    pass


class Nin(_WithValues, tag="nin"):
    pass


class Compound(Body, tag_field="type"):
    """Several filters in one. How deep they may be nested is checked where they come in."""

    filters: Annotated[list[Filter], Meta(min_length=1)]


class And(Compound, tag="and"):
    pass


class Or(Compound, tag="or"):
    pass


Filter = Eq | Ne | Gt | Gte | Lt | Lte | In | Nin | And | Or


# --- vector stores ---------------------------------------------------------------------------------------------

FileStatus = Literal["in_progress", "completed", "failed", "cancelled"]
StoreStatus = Literal["expired", "in_progress", "completed"]
BatchStatus = Literal["in_progress", "completed", "cancelled", "failed"]
StoreName = Annotated[str, Meta(max_length=256)]


class StoreExpiry(Body):
    """A vector store expires so many days after its last use."""

    anchor: Literal["last_active_at"]
    days: Annotated[int, Meta(ge=1, le=365)]


class CreateVectorStore(Body):
    name: StoreName | UnsetType | None = UNSET
    description: Annotated[str, Meta(max_length=512)] | UnsetType | None = UNSET  # answered nowhere, so not kept
    file_ids: Annotated[list[str], Meta(max_length=500)] | UnsetType = UNSET
    expires_after: StoreExpiry | UnsetType | None = UNSET
    chunking_strategy: AutoChunking | StaticChunking | UnsetType = UNSET
    metadata: Metadata | UnsetType | None = UNSET


class ModifyVectorStore(Body):
    name: StoreName | UnsetType | None = UNSET
    expires_after: StoreExpiry | UnsetType | None = UNSET
    metadata: Metadata | UnsetType | None = UNSET


class CreateVectorStoreFile(Body):
    file_id: str
    attributes: Attributes | UnsetType | None = UNSET
    chunking_strategy: AutoChunking | StaticChunking | UnsetType = UNSET


class ModifyVectorStoreFile(Body):
    attributes: Attributes | None


class CreateFileBatch(Body):
    """`file_ids`, to which the other two apply, or `files`, which say each their own."""

    file_ids: Annotated[list[str], Meta(min_length=1, max_length=2000)] | UnsetType = UNSET
    files: Annotated[list[CreateVectorStoreFile], Meta(min_length=1, max_length=2000)] | UnsetType = UNSET
    attributes: Attributes | UnsetType | None = UNSET
    chunking_strategy: AutoChunking | StaticChunking | UnsetType = UNSET


class SearchRanking(Body):
    """As RankingOptions of the tool, but for the names of the rankers."""

    ranker: Literal["none", "auto", "default-2024-11-15"] = "auto"
    score_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.0


class SearchVectorStore(Body):
    query: NonEmpty | Annotated[list[NonEmpty], Meta(min_length=1, max_length=64)]
    rewrite_query: bool = False
    max_num_results: Annotated[int, Meta(ge=1, le=50)] = 10
    filters: Filter | UnsetType | None = UNSET
    ranking_options: SearchRanking | UnsetType | None = UNSET


class FileCounts(Struct):
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    total: int = 0


class VectorStore(Struct, kw_only=True):
    """`name` is never null: clients that validate strictly would fail."""

    id: str
    object: str = "vector_store"
    created_at: int
    name: str = ""
    usage_bytes: int = 0
    file_counts: FileCounts = msgspec.field(default_factory=FileCounts)
    status: StoreStatus = "completed"
    expires_after: StoreExpiry | None = None
    expires_at: int | None = None
    last_active_at: int | None
    metadata: dict[str, str] = {}


class FileError(Struct):
    """code: server_error | unsupported_file | invalid_file; message: why, in words for the file's owner."""

    code: str
    message: str


class VectorStoreFile(Struct, kw_only=True):
    """id: that of the file. chunking_strategy: always shown as `static`, also where `auto` was asked for."""

    id: str
    object: str = "vector_store.file"
    created_at: int
    usage_bytes: int = 0
    vector_store_id: str
    status: FileStatus = "in_progress"
    last_error: FileError | None = None
    chunking_strategy: StaticChunking
    attributes: dict[str, AttributeValue] = {}


class VectorStoreFileBatch(Struct, kw_only=True):
    id: str
    object: str = "vector_store.files_batch"
    created_at: int
    vector_store_id: str
    status: BatchStatus = "in_progress"
    file_counts: FileCounts


class TextContent(Struct):
    text: str
    type: str = "text"


class FileContentPage(Struct):
    object: str = "vector_store.file_content.page"
    data: list[TextContent] = []
    has_more: bool = False
    next_page: str | None = None


class SearchResult(Struct):
    """A passage of a file. score in 0–1; `search/ranking.py` says what it means."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, AttributeValue]
    content: list[TextContent]


class SearchPage(Struct):
    search_query: list[str]
    data: list[SearchResult]
    object: str = "vector_store.search_results.page"
    has_more: bool = False
    next_page: str | None = None


# --- uploads ---------------------------------------------------------------------------------------------------

UploadStatus = Literal["pending", "completed", "cancelled", "expired"]
UploadSize = Annotated[int, Meta(ge=1, le=8 * 1024**3)]
FileLife = Annotated[int, Meta(ge=3600, le=2_592_000)]


class FileExpiry(Body):
    anchor: Literal["created_at"]
    seconds: FileLife


class CreateUpload(Body):
    """What is wrong with one is worded by `api/schema_faults.py`, as for files."""

    filename: NonEmpty
    purpose: FilePurpose
    bytes: UploadSize
    mime_type: str
    expires_after: FileExpiry | UnsetType = UNSET


class CompleteUpload(Body):
    """part_ids: in the order in which the parts make the file. md5: of the whole file, in hex."""

    part_ids: Annotated[list[str], Meta(min_length=1, max_length=100_000)]
    md5: str | UnsetType | None = UNSET


class Upload(Struct, kw_only=True):
    id: str
    object: str = "upload"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: UploadStatus = "pending"
    expires_at: int
    file: File | None = None


class UploadPart(Struct, kw_only=True):
    id: str
    object: str = "upload.part"
    created_at: int
    upload_id: str


# --- webhooks --------------------------------------------------------------------------------------------------

WebhookEventType = Literal[
    "thread.run.requires_action",
    "thread.run.completed",
    "thread.run.incomplete",
    "thread.run.failed",
    "thread.run.cancelled",
    "thread.run.expired",
    "vector_store.file.completed",
    "vector_store.file.failed",
    "vector_store.file.cancelled",
    "vector_store.file_batch.completed",
    "vector_store.file_batch.cancelled",
]
WEBHOOK_EVENT_TYPES: tuple[WebhookEventType, ...] = get_args(WebhookEventType)
WebhookUrl = Annotated[str, Meta(min_length=1, max_length=2048)]
EventPatterns = Annotated[list[str], Meta(min_length=1, max_length=64)]
EndpointName = Annotated[str, Meta(max_length=256)]
EndpointStatus = Literal["enabled", "disabled"]
DeliveryStatus = Literal["pending", "delivered", "failed", "cancelled"]


class CreateWebhookEndpoint(Body):
    """event_types: of WEBHOOK_EVENT_TYPES, or beginnings of them followed by `*`."""

    url: WebhookUrl
    event_types: EventPatterns
    name: EndpointName = ""
    metadata: Metadata | None = None
    status: EndpointStatus = "enabled"


class ModifyWebhookEndpoint(Body):
    url: WebhookUrl | UnsetType = UNSET
    event_types: EventPatterns | UnsetType = UNSET
    name: EndpointName | UnsetType = UNSET
    metadata: Metadata | UnsetType | None = UNSET
    status: EndpointStatus | UnsetType = UNSET


class RotateWebhookSecret(Body):
    keep_old_secret_active_for_24_hours: bool = False


class SendTestEvent(Body):
    event_type: WebhookEventType = "thread.run.completed"


class WebhookEndpoint(Struct, kw_only=True):
    """disabled_reason: why it was disabled, when it was not its owner who did it."""

    id: str
    object: str = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    status: EndpointStatus = "enabled"
    disabled_reason: str | None = None
    metadata: dict[str, str] = {}


class WebhookEndpointWithSecret(WebhookEndpoint, kw_only=True):
    """Answered once, when the secret is made."""

    signing_secret: str


class WebhookEventTypes(Struct, kw_only=True):
    object: str = "list"
    data: list[str]


class WebhookEvent(Struct, kw_only=True):
    """What is sent. data: `id` and the facts that are told; never the text of a message."""

    id: str
    object: str = "event"
    created_at: int
    type: str
    data: Json


class WebhookTry(Struct, kw_only=True):
    """status_code: None when there was no answer. error: None when it went well."""

    at: int
    duration_ms: int
    status_code: int | None = None
    error: str | None = None


class WebhookDelivery(Struct, kw_only=True):
    """event: None once what it told of was deleted."""

    id: str
    object: str = "webhook_endpoint.delivery"
    created_at: int
    webhook_endpoint_id: str
    event_id: str
    event_type: str
    event: WebhookEvent | None
    status: DeliveryStatus = "pending"
    next_try_at: int | None = None
    tries: list[WebhookTry] = []


class WebhookTestResult(Struct, kw_only=True):
    """success: an answer came; status_code says which."""

    object: str = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: bool = True


# --- the rest --------------------------------------------------------------------------------------------------


class Deleted(Struct, kw_only=True):
    """object: assistant.deleted, thread.deleted, thread.message.deleted, vector_store.deleted,
    vector_store.file.deleted, organization.project.api_key.deleted or file."""

    id: str
    object: str
    deleted: bool = True


class Model(Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "afterglow"


# --- before threads begin --------------------------------------------------------------------------------------


def learn_structs() -> None:
    """Have msgspec look at every struct there is, now. It does so when one is first decoded, and two threads that come
    to it in the same moment crash the process."""
    waiting: list[type[Struct]] = [Struct]
    while waiting:
        kinds = waiting.pop().__subclasses__()
        waiting += kinds
        for kind in kinds:
            msgspec.json.Decoder(kind)
