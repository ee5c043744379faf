"""The wire's shapes are those of the official SDK, and of the published OpenAPI subset where that is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec
import pytest
import typing_extensions
from jsonschema import Draft202012Validator
from msgspec import NODEFAULT, UNSET, Struct
from openai.types import Model as SdkModel
from openai.types import Upload as SdkUpload
from openai.types import VectorStore as SdkVectorStore
from openai.types import VectorStoreDeleted as SdkVectorStoreDeleted
from openai.types import auto_file_chunking_strategy_param as sdk_auto_chunking
from openai.types import beta as sdk
from openai.types import (
    shared_params,
    static_file_chunking_strategy_object_param,
    static_file_chunking_strategy_param,
    upload_complete_params,
    upload_create_params,
    vector_store_create_params,
    vector_store_search_params,
    vector_store_search_response,
    vector_store_update_params,
)
from openai.types.beta import (
    assistant_create_params,
    assistant_tool_choice_function_param,
    assistant_tool_choice_param,
    assistant_update_params,
    code_interpreter_tool_param,
    file_search_tool_param,
    function_tool_param,
    thread_create_and_run_params,
    thread_create_params,
    thread_update_params,
)
from openai.types.beta import threads as sdk_threads
from openai.types.beta.threads import (
    image_file_content_block_param,
    image_file_param,
    image_url_content_block_param,
    image_url_param,
    message_create_params,
    message_update_params,
    run_create_params,
    run_submit_tool_outputs_params,
    run_update_params,
    text_content_block_param,
)
from openai.types.beta.threads import runs as sdk_runs
from openai.types.beta.threads.run import Usage as SdkUsage
from openai.types.beta.threads.runs.run_step import Usage as SdkStepUsage
from openai.types.beta.threads.runs.run_step_include import RunStepInclude
from openai.types.shared.reasoning_effort import ReasoningEffort as SdkReasoningEffort
from openai.types.shared_params import response_format_json_schema
from openai.types.uploads import UploadPart as SdkUploadPart
from openai.types.vector_stores import VectorStoreFile as SdkVectorStoreFile
from openai.types.vector_stores import VectorStoreFileBatch as SdkFileBatch
from openai.types.vector_stores import VectorStoreFileDeleted as SdkVectorStoreFileDeleted
from openai.types.vector_stores import (
    file_batch_create_params,
    file_content_response,
    file_create_params,
    file_update_params,
)
from pydantic import BaseModel, ValidationError

from afterglow import objects
from afterglow.objects import (
    Assistant,
    Deleted,
    FileCounts,
    FileError,
    IncompleteDetails,
    Json,
    LastError,
    Message,
    Model,
    Run,
    RunStep,
    SearchResult,
    StaticChunking,
    StaticChunkSizes,
    StoreExpiry,
    TextContent,
    Thread,
    Upload,
    UploadPart,
    Usage,
    VectorStore,
    VectorStoreFile,
    VectorStoreFileBatch,
)
from afterglow.rows.runs import RunRow
from afterglow.store.sqlite import SqliteStore

# --- samples ---------------------------------------------------------------------------------------------------

FUNCTION: Json = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": False}}
SEARCH: Json = {
    "type": "file_search",
    "file_search": {"max_num_results": 5, "ranking_options": {"ranker": "auto", "score_threshold": 0.5}},
}
RESOURCES: Json = {"code_interpreter": {"file_ids": ["file-1"]}, "file_search": {"vector_store_ids": ["vs_1"]}}
RUN: Json = {"id": "run_1", "created_at": 1, "assistant_id": "asst_1", "thread_id": "thread_1", "model": "m"}
STEP: Json = {"id": "step_1", "created_at": 1, "run_id": "run_1", "assistant_id": "asst_1", "thread_id": "thread_1"}
CHUNKING = StaticChunking(StaticChunkSizes(max_chunk_size_tokens=800, chunk_overlap_tokens=400))
STORE_FILE: Json = {"id": "file-1", "created_at": 1, "vector_store_id": "vs_1", "chunking_strategy": CHUNKING}
UPLOAD: Json = {"id": "upload_1", "bytes": 5, "created_at": 1, "filename": "a", "purpose": "assistants"}
CALL: Json = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED: Json = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}", "output": None}}


class Sample(NamedTuple):
    """A wire object; the SDK's model of it; the name of its schema in the OpenAPI subset."""

    ours: Struct
    theirs: type[BaseModel]
    schema: str


DEFAULTS = [
    Sample(Assistant(id="asst_1", created_at=1, model="m"), sdk.Assistant, "AssistantObject"),
    Sample(Thread(id="thread_1", created_at=1), sdk.Thread, "ThreadObject"),
    Sample(Message(id="msg_1", created_at=1, thread_id="thread_1", role="user"), sdk_threads.Message, "MessageObject"),
    Sample(Run(**RUN), sdk_threads.Run, "RunObject"),
    Sample(
        RunStep(
            **STEP,
            type="message_creation",
            step_details={"type": "message_creation", "message_creation": {"message_id": "msg_1"}},
        ),
        sdk_runs.RunStep,
        "RunStepObject",
    ),
    Sample(Deleted(id="asst_1", object="assistant.deleted"), sdk.AssistantDeleted, "DeleteAssistantResponse"),
    Sample(Deleted(id="thread_1", object="thread.deleted"), sdk.ThreadDeleted, "DeleteThreadResponse"),
    Sample(Deleted(id="msg_1", object="thread.message.deleted"), sdk_threads.MessageDeleted, "DeleteMessageResponse"),
    Sample(Deleted(id="vs_1", object="vector_store.deleted"), SdkVectorStoreDeleted, "DeleteVectorStoreResponse"),
    Sample(
        Deleted(id="file-1", object="vector_store.file.deleted"),
        SdkVectorStoreFileDeleted,
        "DeleteVectorStoreFileResponse",
    ),
    Sample(
        VectorStore(
            id="vs_1",
            created_at=1,
            last_active_at=1,
            expires_after=StoreExpiry(anchor="last_active_at", days=7),
            expires_at=604801,
        ),
        SdkVectorStore,
        "VectorStoreObject",
    ),
    Sample(VectorStoreFile(**STORE_FILE), SdkVectorStoreFile, "VectorStoreFileObject"),
    Sample(
        VectorStoreFileBatch(id="vsfb_1", created_at=1, vector_store_id="vs_1", file_counts=FileCounts(2, total=2)),
        SdkFileBatch,
        "VectorStoreFileBatchObject",
    ),
    Sample(
        SearchResult("file-1", "a.md", 0.5, {"year": 2024, "draft": True}, [TextContent("text")]),
        vector_store_search_response.VectorStoreSearchResponse,
        "VectorStoreSearchResultItem",
    ),
    Sample(TextContent("text"), file_content_response.FileContentResponse, "VectorStoreSearchResultContentObject"),
    Sample(Upload(**UPLOAD, expires_at=3601), SdkUpload, "Upload"),
    Sample(UploadPart(id="part_1", created_at=1, upload_id="upload_1"), SdkUploadPart, "UploadPart"),
    Sample(Model(id="m"), SdkModel, "Model"),
    Sample(Usage(), SdkUsage, "RunCompletionUsage"),
    Sample(Usage(), SdkStepUsage, "RunStepCompletionUsage"),
]
FULL = [
    Sample(
        VectorStoreFile(
            **STORE_FILE,
            status="failed",
            last_error=FileError("invalid_file", "The file could not be parsed because it is empty."),
            attributes={"author": "ada", "year": 1843, "score": 0.5, "draft": False},
        ),
        SdkVectorStoreFile,
        "VectorStoreFileObject",
    ),
    Sample(
        Assistant(
            id="asst_1",
            created_at=1,
            name="n",
            description="d",
            model="m",
            instructions="i",
            tools=[{"type": "code_interpreter"}, SEARCH, FUNCTION],
            tool_resources=RESOURCES,
            metadata={"k": "v"},
            temperature=0.5,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
            reasoning_effort="low",
        ),
        sdk.Assistant,
        "AssistantObject",
    ),
    Sample(
        Message(
            id="msg_1",
            created_at=1,
            thread_id="thread_1",
            status="incomplete",
            incomplete_details=IncompleteDetails("max_tokens"),
            incomplete_at=2,
            role="assistant",
            content=[{"type": "text", "text": {"value": "Hello", "annotations": []}}],
            assistant_id="asst_1",
            run_id="run_1",
            attachments=[{"file_id": "file-1", "tools": [{"type": "file_search"}]}],
        ),
        sdk_threads.Message,
        "MessageObject",
    ),
    Sample(
        Run(
            **RUN,
            status="requires_action",
            started_at=2,
            expires_at=601,
            required_action={"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": [CALL]}},
            tools=[FUNCTION],
            tool_choice={"type": "function", "function": {"name": "f"}},
            max_prompt_tokens=256,
        ),
        sdk_threads.Run,
        "RunObject",
    ),
    Sample(
        Run(**RUN, status="failed", failed_at=2, last_error=LastError("invalid_prompt", "Too long."), usage=Usage()),
        sdk_threads.Run,
        "RunObject",
    ),
    Sample(
        Run(**RUN, status="incomplete", incomplete_details=IncompleteDetails("max_prompt_tokens"), usage=Usage()),
        sdk_threads.Run,
        "RunObject",
    ),
    Sample(
        RunStep(
            **STEP,
            type="tool_calls",
            status="failed",
            failed_at=2,
            last_error=LastError("server_error", "Sorry."),
            step_details={"type": "tool_calls", "tool_calls": [CALLED]},
            usage=Usage(),
        ),
        sdk_runs.RunStep,
        "RunStepObject",
    ),
]


def sample_name(sample: Sample) -> str:
    return f"{sample.schema}-{getattr(sample.ours, 'status', '')}".rstrip("-")


# --- types, read alike on both sides ---------------------------------------------------------------------------


def members(kind: Any) -> list[Any]:
    """The members of a union, without the wrappers that say how a key is sent."""
    origin = get_origin(kind)
    if origin in (typing.Annotated, typing_extensions.Required):
        return members(get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in get_args(kind) for member in members(part)]
    return [kind]


def choices(kind: Any) -> set[str]:
    """The texts that may be said; none when any text may."""
    found = members(kind)
    if str in found:
        return set()
    literals = [value for part in found if get_origin(part) is Literal for value in get_args(part)]
    return {value for value in literals if isinstance(value, str)}


class Key(NamedTuple):
    required: bool
    nullable: bool
    choices: set[str]


def our_keys(kind: type[Struct]) -> dict[str, Key]:
    """What a struct takes, by the name on the wire; vendor keys apart."""
    keys = {
        field.encode_name: Key(
            field.default is NODEFAULT and field.default_factory is NODEFAULT,
            type(None) in members(field.type),
            choices(field.type),
        )
        for field in msgspec.structs.fields(kind)
        if field.encode_name != objects.VENDOR_KEYS
    }
    config = kind.__struct_config__
    if isinstance(config.tag_field, str):
        keys[config.tag_field] = Key(True, False, {str(config.tag)})
    return keys


def params_keys(kind: Any) -> dict[str, Key]:
    """What a TypedDict of the SDK takes."""
    return {
        name: Key(get_origin(hint) is typing_extensions.Required, type(None) in members(hint), choices(hint))
        for name, hint in typing_extensions.get_type_hints(kind, include_extras=True).items()
    }


# --- what we answer --------------------------------------------------------------------------------------------

# Beyond the SDK's types, as the service itself sent them.
WIRE_EXTRAS: dict[type[Struct], set[str]] = {
    Assistant: {"reasoning_effort"},
    Run: {"tool_resources", "reasoning_effort"},
    RunStep: {"expires_at"},
    Usage: {"prompt_token_details", "completion_tokens_details"},
}


@pytest.mark.parametrize("sample", DEFAULTS + FULL, ids=sample_name)
def test_the_sdk_reads_what_we_send(sample: Sample):
    """The SDK's model, at its strictest, accepts our JSON, and reads our values out of it."""
    sent = msgspec.json.encode(sample.ours)
    read = sample.theirs.model_validate_json(sent, strict=True)
    assert read.model_dump(mode="json", exclude_unset=True, by_alias=True) == json.loads(sent)


def test_strict_reading_notices():
    """The check above would fail for a null where the SDK has none."""
    with pytest.raises(ValidationError):
        sdk_threads.Run.model_validate_json(msgspec.json.encode({**RUN, "instructions": None}), strict=True)


@pytest.mark.parametrize("sample", DEFAULTS, ids=sample_name)
def test_answers_have_the_keys_of_the_sdk(sample: Sample):
    """Every key that the SDK knows is always sent, and of others only those that the service sent too."""
    ours = set(json.loads(msgspec.json.encode(sample.ours)))
    # `shutdown_date` is for models that are about to go, which ours are not.
    theirs = set(sample.theirs.model_fields) - {"shutdown_date"}
    assert ours == theirs | WIRE_EXTRAS.get(type(sample.ours), set())


@pytest.mark.parametrize("sample", DEFAULTS, ids=sample_name)
def test_answers_have_the_choices_of_the_sdk(sample: Sample):
    """Statuses, roles and types are the SDK's, all of them, and `object` is what the SDK calls it."""
    ours = {name: key.choices for name, key in our_keys(type(sample.ours)).items() if key.choices}
    theirs = {name: choices(field.annotation) for name, field in sample.theirs.model_fields.items()}
    if "object" in theirs:
        assert theirs.pop("object") == {msgspec.structs.asdict(sample.ours)["object"]}
    theirs.pop("tool_choice", None)
    theirs.pop("response_format", None)
    assert ours == {name: said for name, said in theirs.items() if said}


@cache
def published() -> Json:
    folder = os.environ.get("AFTERGLOW_CONTRACT_DIR")
    if not folder:
        pytest.skip("AFTERGLOW_CONTRACT_DIR names no folder with assistants.openapi.json")
    document: Json = json.loads(Path(folder, "assistants.openapi.json").read_bytes())
    return document


@pytest.mark.parametrize("sample", DEFAULTS + FULL, ids=sample_name)
def test_the_published_schemas_admit_what_we_send(sample: Sample):
    """Our JSON is valid by the schema of its kind in the OpenAPI subset."""
    schema = {"$ref": f"#/components/schemas/{sample.schema}", "components": published()["components"]}
    Draft202012Validator(schema).validate(json.loads(msgspec.json.encode(sample.ours)))


# --- what callers send -----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A struct and the SDK's TypedDict of it. more: keys that only we take; elsewhere: keys of the SDK's that go into
    the path or the query; must: keys that we demand and the SDK's type does not."""

    ours: type[Struct]
    theirs: Any
    more: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    must: frozenset[str] = frozenset()


def pair(ours: type[Struct], theirs: Any, **exceptions: str) -> Pair:
    return Pair(ours, theirs, **{name: frozenset(keys.split()) for name, keys in exceptions.items()})


PAIRS = [
    pair(objects.CreateAssistant, assistant_create_params.AssistantCreateParams),
    pair(objects.ModifyAssistant, assistant_update_params.AssistantUpdateParams),
    pair(objects.CreateThread, thread_create_params.ThreadCreateParams),
    pair(objects.CreateThread, thread_create_and_run_params.Thread),
    pair(objects.ModifyThread, thread_update_params.ThreadUpdateParams),
    pair(objects.CreateMessage, message_create_params.MessageCreateParams),
    pair(objects.CreateMessage, thread_create_params.Message),
    pair(objects.CreateMessage, run_create_params.AdditionalMessage),
    pair(objects.ModifyMessage, message_update_params.MessageUpdateParams, elsewhere="thread_id"),
    pair(objects.CreateRun, run_create_params.RunCreateParamsNonStreaming, elsewhere="include"),
    pair(
        objects.CreateThreadAndRun,
        thread_create_and_run_params.ThreadCreateAndRunParamsNonStreaming,
        more="reasoning_effort",
    ),
    pair(objects.ModifyRun, run_update_params.RunUpdateParams, elsewhere="thread_id"),
    pair(
        objects.SubmitToolOutputs,
        run_submit_tool_outputs_params.RunSubmitToolOutputsParamsNonStreaming,
        elsewhere="thread_id",
        more="partial",
    ),
    pair(objects.ToolOutput, run_submit_tool_outputs_params.ToolOutput, must="tool_call_id"),
    pair(objects.TruncationStrategy, run_create_params.TruncationStrategy),
    pair(objects.TruncationStrategy, thread_create_and_run_params.TruncationStrategy),
    # tools
    pair(objects.CodeInterpreterTool, code_interpreter_tool_param.CodeInterpreterToolParam),
    pair(objects.FileSearchTool, file_search_tool_param.FileSearchToolParam),
    pair(objects.FileSearchOptions, file_search_tool_param.FileSearch),
    pair(objects.RankingOptions, file_search_tool_param.FileSearchRankingOptions, more="hybrid_search"),
    pair(objects.FunctionTool, function_tool_param.FunctionToolParam),
    pair(objects.FunctionDefinition, shared_params.FunctionDefinition),
    pair(objects.FunctionChoiceName, assistant_tool_choice_function_param.AssistantToolChoiceFunctionParam),
    # formats of the answer
    pair(objects.TextFormat, shared_params.ResponseFormatText),
    pair(objects.JsonObjectFormat, shared_params.ResponseFormatJSONObject),
    pair(objects.JsonSchemaResponseFormat, shared_params.ResponseFormatJSONSchema),
    pair(objects.JsonSchemaFormat, response_format_json_schema.JSONSchema),
    # content
    pair(objects.TextInput, text_content_block_param.TextContentBlockParam),
    pair(objects.ImageFileInput, image_file_content_block_param.ImageFileContentBlockParam),
    pair(objects.ImageFileInputBody, image_file_param.ImageFileParam),
    pair(objects.ImageUrlInput, image_url_content_block_param.ImageURLContentBlockParam),
    pair(objects.ImageUrlInputBody, image_url_param.ImageURLParam),
    pair(objects.Attachment, message_create_params.Attachment, must="file_id"),
    pair(objects.AttachedCodeInterpreter, code_interpreter_tool_param.CodeInterpreterToolParam),
    pair(objects.AttachedFileSearch, message_create_params.AttachmentToolFileSearch),
    # tool resources
    pair(objects.CreateToolResources, assistant_create_params.ToolResources),
    pair(objects.CreateToolResources, thread_create_params.ToolResources),
    pair(objects.ToolResources, assistant_update_params.ToolResources),
    pair(objects.ToolResources, thread_update_params.ToolResources),
    pair(objects.ToolResources, thread_create_and_run_params.ToolResources),
    pair(objects.CodeInterpreterResources, assistant_create_params.ToolResourcesCodeInterpreter),
    pair(objects.FileSearchResources, assistant_update_params.ToolResourcesFileSearch),
    pair(objects.CreateFileSearchResources, assistant_create_params.ToolResourcesFileSearch),
    pair(objects.NewVectorStore, assistant_create_params.ToolResourcesFileSearchVectorStore),
    pair(objects.AutoChunking, assistant_create_params.ToolResourcesFileSearchVectorStoreChunkingStrategyAuto),
    pair(objects.StaticChunking, assistant_create_params.ToolResourcesFileSearchVectorStoreChunkingStrategyStatic),
    # vector stores
    pair(objects.CreateVectorStore, vector_store_create_params.VectorStoreCreateParams),
    pair(objects.ModifyVectorStore, vector_store_update_params.VectorStoreUpdateParams),
    pair(objects.StoreExpiry, vector_store_create_params.ExpiresAfter),
    pair(objects.StoreExpiry, vector_store_update_params.ExpiresAfter),
    pair(objects.SearchVectorStore, vector_store_search_params.VectorStoreSearchParams),
    pair(objects.SearchRanking, vector_store_search_params.RankingOptions),
    pair(objects.CreateVectorStoreFile, file_create_params.FileCreateParams),
    pair(objects.CreateVectorStoreFile, file_batch_create_params.File),
    pair(objects.ModifyVectorStoreFile, file_update_params.FileUpdateParams, elsewhere="vector_store_id"),
    pair(objects.CreateFileBatch, file_batch_create_params.FileBatchCreateParams),
    pair(objects.AutoChunking, sdk_auto_chunking.AutoFileChunkingStrategyParam),
    pair(objects.StaticChunking, static_file_chunking_strategy_object_param.StaticFileChunkingStrategyObjectParam),
    pair(objects.StaticChunkSizes, static_file_chunking_strategy_param.StaticFileChunkingStrategyParam),
    # uploads
    pair(objects.CreateUpload, upload_create_params.UploadCreateParams),
    pair(objects.FileExpiry, upload_create_params.ExpiresAfter),
    pair(objects.CompleteUpload, upload_complete_params.UploadCompleteParams),
    pair(
        objects.StaticChunkSizes,
        assistant_create_params.ToolResourcesFileSearchVectorStoreChunkingStrategyStaticStatic,
    ),
]


COMPARISONS = {objects.Eq, objects.Ne, objects.Gt, objects.Gte, objects.Lt, objects.Lte, objects.In, objects.Nin}
COMPOUNDS = {objects.And, objects.Or}
FILTERS = {*COMPARISONS, *COMPOUNDS, objects.Comparison, objects.Compound}
# Extensions of ours, which the SDK has no types for.
EXTENSIONS = {objects.FunctionCalling, objects.McpTool}
EXTENSIONS |= {objects.ProjectSettings, objects.ModifyProjectSettings, objects.Limits, objects.Retention}
EXTENSIONS |= {objects.Budget, objects.CreateProject, objects.ModifyProject, objects.CreateApiKey, objects.ModifyApiKey}
# The SDK has types for these, of other events; a test has the SDK send them.
EXTENSIONS |= {objects.CreateWebhookEndpoint, objects.ModifyWebhookEndpoint, objects.RotateWebhookSecret}
EXTENSIONS |= {objects.SendTestEvent}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.ours.__name__}-{pair.theirs.__name__}")
def test_bodies_have_the_keys_of_the_sdk(pair: Pair):
    """We take the keys that the SDK can send, demand those that it demands, and take null wherever it may send it."""
    ours, theirs = our_keys(pair.ours), params_keys(pair.theirs)
    assert ours.keys() - pair.more == theirs.keys() - pair.elsewhere
    required = {name for name, key in ours.items() if key.required}
    assert required == {name for name, key in theirs.items() if key.required} - pair.elsewhere | pair.must
    nullable = {name for name, key in theirs.items() if key.nullable}
    assert nullable <= {name for name, key in ours.items() if key.nullable}
    for name in ours.keys() & theirs.keys():
        assert ours[name].choices == theirs[name].choices, name


def test_every_body_is_compared():
    """No struct that callers send is missing above, but for the halves of a named tool choice, and filters."""
    compared = {pair.ours for pair in PAIRS}
    bodies = {
        kind
        for kind in vars(objects).values()
        if isinstance(kind, type) and issubclass(kind, objects.Body) and not kind.__name__.startswith("_")
    }
    choices_of_tools = {objects.FunctionChoice, objects.CodeInterpreterChoice, objects.FileSearchChoice}
    assert bodies - compared - {objects.Body} == choices_of_tools | FILTERS | EXTENSIONS


def test_filters_are_the_sdks():
    """A comparison is one type there and eight structs here, one for each way of comparing; so is a compound."""
    for ours, theirs in (
        (COMPARISONS, shared_params.ComparisonFilter),
        (COMPOUNDS, shared_params.CompoundFilter),
    ):
        keys, wanted = [our_keys(kind) for kind in ours], params_keys(theirs)
        assert {said for one in keys for said in one["type"].choices} == wanted["type"].choices
        assert all(one.keys() == wanted.keys() and all(key.required for key in one.values()) for one in keys)


def test_a_named_tool_choice_is_of_the_sdks_kinds():
    """The SDK's one type with three kinds is three structs here; only that of functions has a name."""
    theirs = params_keys(assistant_tool_choice_param.AssistantToolChoiceParam)
    kinds = [our_keys(kind) for kind in members(objects.ToolChoice) if isinstance(kind, type)]
    assert {said for keys in kinds for said in keys["type"].choices} == theirs["type"].choices
    assert {name for keys in kinds for name in keys} == theirs.keys()
    named = [keys for keys in kinds if "function" in keys]
    assert [keys["type"].choices for keys in named] == [{"function"}]


def test_shared_choices_are_the_sdks():
    """Efforts and includable values are the SDK's."""
    assert choices(objects.ReasoningEffort) == choices(SdkReasoningEffort)
    assert {objects.INCLUDE_FILE_SEARCH_CONTENT} == choices(RunStepInclude)


def test_keys_left_out_of_a_modify_stay_apart_from_null():
    """Absent is UNSET and null is None, for every key that can be modified."""
    for kind in (objects.ModifyAssistant, objects.ModifyThread, objects.ModifyMessage, objects.ModifyRun):
        absent = msgspec.json.decode(b"{}", type=kind)
        for field in msgspec.structs.fields(kind):
            assert getattr(absent, field.name) is UNSET
            if type(None) in members(field.type):
                null = msgspec.json.decode(msgspec.json.encode({field.name: None}), type=kind)
                assert getattr(null, field.name) is None


# --- adding up -------------------------------------------------------------------------------------------------


def test_usage_adds_up():
    """Each count of a sum is the sum of the counts."""
    one = Usage(
        prompt_tokens=1,
        completion_tokens=2,
        total_tokens=3,
        prompt_token_details=objects.PromptTokenDetails(4),
        completion_tokens_details=objects.CompletionTokensDetails(5),
    )
    two = one.plus(one)
    assert msgspec.to_builtins(two) == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_token_details": {"cached_tokens": 8},
        "completion_tokens_details": {"reasoning_tokens": 10},
    }
    assert one.plus(Usage()) == one


CROWD = """
import sys, threading, types
import msgspec
from afterglow.objects import learn_structs

sys.setswitchinterval(1e-6)
for number in range(100):
    module = sys.modules[f"m{number}"] = types.ModuleType(f"m{number}")
    for depth in range(12):
        fields = [("more", dict[str, dict[str, int]], {}), ("some", dict[str, list[int | str | None]], {})]
        if depth:
            fields.append(("before", struct | None, None))
        struct = msgspec.defstruct(f"S{depth}", fields, module=module.__name__)
        setattr(module, f"S{depth}", struct)
    learn_structs()
    start = threading.Barrier(4)

    def decode():
        start.wait()
        msgspec.json.decode(b'{"before": {"some": {"a": [1]}}}', type=struct)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


def test_structs_that_were_learnt_are_safe_among_threads():
    """Threads that decode a struct for the first time, all in the same moment, do not crash the process."""
    ended = subprocess.run([sys.executable, "-c", CROWD], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


async def test_a_store_learns_all_structs_before_its_threads_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every struct of the package is known when the database's threads first decode one."""
    learnt: list[Any] = []
    monkeypatch.setattr("msgspec.json.Decoder", learnt.append)
    await SqliteStore(tmp_path / "afterglow.db").close()
    assert {objects.Run, objects.Message, RunRow} <= set(learnt)
