"""The OpenAPI document of `/openapi.json`, from the route table, SHAPES and the structs.

What a type cannot say (a message that is only white space, an id that nothing has) is not in it. Routes that are the
upstream's are not described.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow import __version__
from afterglow.api import (
    about,
    assistants,
    bills,
    files,
    finding,
    inspection,
    models,
    organization,
    runs,
    threads,
    uploads,
    vector_stores,
    webhooks,
)
from afterglow.api.edge import OPEN_PATHS
from afterglow.api.pages import FLAGS, MAX_LIMIT, ORDERS, Page
from afterglow.bills import CostsPage
from afterglow.dry_run import DryRun
from afterglow.inspection import Citation, SearchExplanation, VectorStoreChunk
from afterglow.objects import (
    INCLUDE_FILE_SEARCH_CONTENT,
    TOOL_TIMEOUT_S,
    VENDOR_KEYS,
    ApiKey,
    Assistant,
    Attachment,
    AuditLog,
    Body,
    CompleteUpload,
    CreateApiKey,
    CreateAssistant,
    CreatedApiKey,
    CreateFileBatch,
    CreateMessage,
    CreateProject,
    CreateRun,
    CreateThread,
    CreateThreadAndRun,
    CreateUpload,
    CreateVectorStore,
    CreateVectorStoreFile,
    CreateWebhookEndpoint,
    Deleted,
    File,
    FileContentPage,
    Json,
    Message,
    Model,
    ModifyApiKey,
    ModifyAssistant,
    ModifyMessage,
    ModifyProject,
    ModifyRun,
    ModifyThread,
    ModifyVectorStore,
    ModifyVectorStoreFile,
    ModifyWebhookEndpoint,
    Project,
    ResponseFormat,
    RotateWebhookSecret,
    Run,
    RunStep,
    SearchPage,
    SearchVectorStore,
    SendTestEvent,
    SubmitToolOutputs,
    Thread,
    ToolChoice,
    ToolResources,
    Tools,
    Upload,
    UploadPart,
    VectorStore,
    VectorStoreFile,
    VectorStoreFileBatch,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEndpointWithSecret,
    WebhookEventTypes,
    WebhookTestResult,
)
from afterglow.rows.audit import COMPARISONS
from afterglow.rows.spend import GROUPS, METADATA
from afterglow.runs.ledger import Ledger
from afterglow.runs.lifecycle import IfBusy
from afterglow.runs.past_prompt import StepPrompt

Endpoint = Callable[[Request], Awaitable[Response]]
REF = "#/components/schemas/{name}"
TEXT: Json = {"type": "string"}
TEXT_OR_NULL: Json = {"type": ["string", "null"]}


class Shape(NamedTuple):
    """What a route takes and gives.

    body: what callers send; with empty_ok they may send nothing. form: schema of the multipart form that they send.
    query: names in QUERY.
    What comes with 200: answer (`dict`: any object; `bytes`: no JSON), or list_of, or a Deleted whose `object` is
    deleted, or events. With none of the four, no call of the route ends well. tried: what comes instead when `dry_run`
    asks for it. csv: `format` may ask for CSV.
    """

    body: type[Body] | None = None
    answer: type[msgspec.Struct] | type[Json] | type[bytes] | None = None
    query: tuple[str, ...] = ()
    form: Json | None = None
    list_of: type[msgspec.Struct] | None = None
    deleted: str = ""
    events: bool = False
    empty_ok: bool = False
    tried: type[msgspec.Struct] | None = None
    csv: bool = False


SECONDS: Json = {"type": "integer", "minimum": 0, "maximum": bills.LATEST}
CURSOR = ("limit", "order", "after", "before")
INCLUDE = ("include[]",)
LIMITS = ("max_total_tokens", "max_cost", "dry_run")
COSTS = ("group_by", "start_time", "end_time", "bucket_width", "limit of costs", "page", "format")
ACTS = (
    *(f"effective_at[{name}]" for name in COMPARISONS),
    "event_types[]",
    "project_ids[]",
    "actor_ids[]",
    "resource_ids[]",
)
FOUND_THREADS = ("assistant_id", "run_status", "query", "created_at")
UPLOAD: Json = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"enum": list(files.PURPOSES)},
        files.ANCHOR: {"const": "created_at"},
        files.SECONDS: {"type": "integer", "minimum": files.SHORTEST_S, "maximum": files.LONGEST_S},
    },
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
PART: Json = {
    "type": "object",
    "properties": {"data": {"type": "string", "contentMediaType": "application/octet-stream"}},
    "required": ["data"],
    "additionalProperties": False,
}
SHAPES: dict[Endpoint, Shape] = {
    assistants.create_assistant: Shape(CreateAssistant, Assistant),
    assistants.list_assistants: Shape(query=CURSOR, list_of=Assistant),
    assistants.retrieve_assistant: Shape(answer=Assistant),
    assistants.modify_assistant: Shape(ModifyAssistant, Assistant),
    assistants.delete_assistant: Shape(deleted="assistant.deleted"),
    threads.create_thread: Shape(CreateThread, Thread, empty_ok=True),
    threads.list_threads: Shape(query=(*CURSOR, "metadata", *FOUND_THREADS), list_of=Thread),
    finding.search_messages: Shape(query=(*CURSOR, "required query", "thread_id", "created_at"), list_of=Message),
    finding.list_project_runs: Shape(
        query=(*CURSOR, "status", "assistant_id", "thread_id", "model", "created_at"), list_of=Run
    ),
    threads.retrieve_thread: Shape(answer=Thread),
    threads.modify_thread: Shape(ModifyThread, Thread),
    threads.delete_thread: Shape(deleted="thread.deleted"),
    threads.create_message: Shape(CreateMessage, Message, ("if_busy for messages",)),
    threads.list_messages: Shape(query=(*CURSOR, "run_id"), list_of=Message),
    threads.retrieve_message: Shape(answer=Message),
    threads.modify_message: Shape(ModifyMessage, Message),
    threads.delete_message: Shape(deleted="thread.message.deleted"),
    runs.create_thread_and_run: Shape(CreateThreadAndRun, Run, (*INCLUDE, "tool_timeout_s", *LIMITS), tried=DryRun),
    runs.create_run: Shape(CreateRun, Run, (*INCLUDE, "if_busy", "tool_timeout_s", *LIMITS), tried=DryRun),
    runs.list_runs: Shape(query=CURSOR, list_of=Run),
    runs.retrieve_run: Shape(answer=Run, query=("wait", "status of runs")),
    runs.follow_run_events: Shape(events=True, query=("after event", "until")),
    runs.modify_run: Shape(ModifyRun, Run),
    runs.cancel_run: Shape(answer=Run),
    runs.submit_tool_outputs: Shape(SubmitToolOutputs, Run),
    runs.list_run_steps: Shape(query=CURSOR + INCLUDE, list_of=RunStep),
    runs.retrieve_run_step: Shape(answer=RunStep, query=INCLUDE),
    bills.retrieve_run_ledger: Shape(answer=Ledger),
    bills.retrieve_run_step_ledger: Shape(answer=Ledger),
    bills.retrieve_run_step_prompt: Shape(answer=StepPrompt, query=("limit", "after")),
    bills.retrieve_costs: Shape(answer=CostsPage, query=COSTS, csv=True),
    bills.retrieve_organization_costs: Shape(answer=CostsPage, query=COSTS, csv=True),
    files.create_file: Shape(form=UPLOAD, answer=File),
    files.list_files: Shape(query=("purpose", "limit of files", "order", "after"), list_of=File),
    files.retrieve_file: Shape(answer=File),
    files.delete_file: Shape(deleted="file"),
    files.retrieve_file_content: Shape(answer=bytes),
    uploads.create_upload: Shape(CreateUpload, Upload),
    uploads.create_upload_part: Shape(form=PART, answer=UploadPart),
    uploads.complete_upload: Shape(CompleteUpload, Upload),
    uploads.cancel_upload: Shape(answer=Upload),
    vector_stores.create_vector_store: Shape(CreateVectorStore, VectorStore, empty_ok=True),
    vector_stores.list_vector_stores: Shape(query=CURSOR, list_of=VectorStore),
    vector_stores.retrieve_vector_store: Shape(answer=VectorStore),
    vector_stores.modify_vector_store: Shape(ModifyVectorStore, VectorStore),
    vector_stores.delete_vector_store: Shape(deleted="vector_store.deleted"),
    vector_stores.search_vector_store: Shape(SearchVectorStore, SearchPage),
    vector_stores.create_vector_store_file: Shape(CreateVectorStoreFile, VectorStoreFile),
    vector_stores.list_vector_store_files: Shape(query=(*CURSOR, "filter"), list_of=VectorStoreFile),
    vector_stores.retrieve_vector_store_file: Shape(answer=VectorStoreFile, query=("wait", "status of files")),
    vector_stores.modify_vector_store_file: Shape(ModifyVectorStoreFile, VectorStoreFile),
    vector_stores.delete_vector_store_file: Shape(deleted="vector_store.file.deleted"),
    vector_stores.retrieve_vector_store_file_content: Shape(answer=FileContentPage),
    vector_stores.create_file_batch: Shape(CreateFileBatch, VectorStoreFileBatch),
    vector_stores.retrieve_file_batch: Shape(answer=VectorStoreFileBatch, query=("wait", "status of batches")),
    vector_stores.cancel_file_batch: Shape(answer=VectorStoreFileBatch),
    vector_stores.list_files_of_batch: Shape(query=(*CURSOR, "filter"), list_of=VectorStoreFile),
    webhooks.create_webhook_endpoint: Shape(CreateWebhookEndpoint, WebhookEndpointWithSecret),
    webhooks.list_webhook_endpoints: Shape(query=CURSOR, list_of=WebhookEndpoint),
    webhooks.retrieve_webhook_endpoint: Shape(answer=WebhookEndpoint),
    webhooks.modify_webhook_endpoint: Shape(ModifyWebhookEndpoint, WebhookEndpoint),
    webhooks.delete_webhook_endpoint: Shape(deleted="webhook_endpoint.deleted"),
    webhooks.rotate_webhook_secret: Shape(RotateWebhookSecret, WebhookEndpointWithSecret, empty_ok=True),
    webhooks.test_webhook_endpoint: Shape(SendTestEvent, WebhookTestResult, empty_ok=True),
    webhooks.list_webhook_deliveries: Shape(query=(*CURSOR, "status of delivery"), list_of=WebhookDelivery),
    webhooks.retrieve_webhook_delivery: Shape(answer=WebhookDelivery),
    webhooks.resend_webhook_delivery: Shape(answer=WebhookDelivery),
    webhooks.list_webhook_event_types: Shape(answer=WebhookEventTypes),
    inspection.list_chunks: Shape(query=("limit", "after"), list_of=VectorStoreChunk),
    inspection.explain_search: Shape(SearchVectorStore, SearchExplanation),
    inspection.list_citations: Shape(list_of=Citation),
    organization.list_projects: Shape(query=(*CURSOR, "include_archived"), list_of=Project),
    organization.create_project: Shape(CreateProject, Project),
    organization.retrieve_project: Shape(answer=Project),
    organization.modify_project: Shape(ModifyProject, Project),
    organization.archive_project: Shape(answer=Project),
    organization.list_keys: Shape(query=CURSOR, list_of=ApiKey),
    organization.create_key: Shape(CreateApiKey, CreatedApiKey),
    organization.retrieve_key: Shape(answer=ApiKey),
    organization.modify_key: Shape(ModifyApiKey, ApiKey),
    organization.delete_key: Shape(deleted="organization.project.api_key.deleted"),
    organization.list_audit_logs: Shape(query=(*CURSOR, *ACTS), list_of=AuditLog),
    models.list_models: Shape(list_of=Model),
    models.retrieve_model: Shape(answer=Model),
    models.delete_model: Shape(),
    about.healthz: Shape(answer=dict),
    about.readyz: Shape(answer=dict),
    about.openapi: Shape(answer=dict),
}
QUERY: dict[str, Json] = {
    "limit": {"schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": Page().limit}},
    "limit of files": {
        "name": "limit",
        "schema": {"type": "integer", "minimum": 1, "maximum": files.MAX_FILES, "default": files.MAX_FILES},
    },
    "order": {"schema": {"enum": list(ORDERS), "default": Page().order}, "description": "By `created_at`."},
    "after": {"schema": TEXT, "description": "Id of an object; the list goes on behind it."},
    "before": {"schema": TEXT, "description": "Id of an object; the list ends in front of it."},
    "wait": {
        "schema": {"type": "number", "minimum": 0, "maximum": 10**9},
        "description": "Hold the answer until the status is one that lasts, for so many seconds at most.",
    },
    **{
        f"status of {what}": {
            "name": "status",
            "schema": {"enum": list(statuses)},
            "description": "With `wait`: until the status is another than this.",
        }
        for what, statuses in (
            ("runs", runs.RUN_STATUSES),
            ("files", vector_stores.FILE_STATUSES),
            ("batches", vector_stores.BATCH_STATUSES),
        )
    },
    "after event": {
        "name": "after",
        "schema": {"type": "string", "pattern": f"^{runs.EVENT_ID.pattern}$"},
        "description": "Id of an event; the stream begins behind it. The header `Last-Event-ID` goes before.",
    },
    "until": {"schema": {"enum": list(runs.UNTIL), "default": "end"}, "description": "Where the stream ends."},
    "run_id": {"schema": TEXT, "description": "Keep what this run wrote."},
    "if_busy": {
        "schema": {"enum": list(get_args(IfBusy)), "default": "reject"},
        "description": "What to do while another run is active on the thread.",
    },
    "if_busy for messages": {
        "name": "if_busy",
        "schema": {"enum": list(threads.IF_BUSY)},
        "description": "What to do while a run is active on the thread; without it, the server's setting says.",
    },
    "assistant_id": {
        "schema": TEXT,
        "description": "Keep what a run of this assistant was on, or the runs themselves.",
    },
    "thread_id": {"schema": TEXT, "description": "Keep what is on this thread."},
    "model": {"schema": TEXT, "description": "Keep the runs that ask for this model."},
    "status": {"schema": {"enum": list(finding.RUN_STATUSES)}, "description": "Keep the runs of this status."},
    "run_status": {
        "schema": {"enum": list(finding.RUN_STATUSES)},
        "description": "Keep the threads whose last run has this status.",
    },
    "query": {"schema": TEXT, "description": "Words that must all occur in one message."},
    "required query": {
        "name": "query",
        "required": True,
        "schema": TEXT,
        "description": "Words that must all occur in the message.",
    },
    "created_at": {
        "style": "deepObject",
        "explode": True,
        "schema": {"type": "object", "properties": {sign: {"type": "integer"} for sign in finding.CREATED_AT}},
        "description": "Keep what was created then, Unix seconds.",
    },
    "purpose": {"schema": TEXT, "description": "Keep the files of this purpose."},
    "filter": {"schema": {"enum": list(vector_stores.FILE_STATUSES)}, "description": "Keep the files of this status."},
    "status of delivery": {
        "name": "status",
        "schema": {"enum": list(webhooks.DELIVERY_STATUSES)},
        "description": "Keep the deliveries of this status.",
    },
    "include[]": {"schema": {"type": "array", "items": {"enum": [INCLUDE_FILE_SEARCH_CONTENT]}}},
    "tool_timeout_s": {
        "schema": {"type": "number", "minimum": TOOL_TIMEOUT_S[0], "maximum": TOOL_TIMEOUT_S[1]},
        "description": "Seconds that each function call waits for its output; then the model is told, and goes on.",
    },
    "max_total_tokens": {
        "schema": {"type": "integer", "minimum": 0, "maximum": runs.MAX_TOKENS},
        "description": "Tokens that the run may take, prompts and answers together.",
    },
    "max_cost": {
        "schema": {"type": "number", "minimum": 0},
        "description": "Money that the run may cost, in the operator's currency.",
    },
    "dry_run": {"schema": {"enum": list(FLAGS)}, "description": "Tell what would be done, and do nothing."},
    "group_by": {
        "schema": {"type": "array", "items": TEXT},
        "description": f"{', '.join(GROUPS)} or `{METADATA}KEY`.",
    },
    "start_time": {"schema": SECONDS, "description": "From the day (UTC) of this time on."},
    "end_time": {"schema": SECONDS, "description": "Up to the day (UTC) before which this time is over."},
    "bucket_width": {"schema": {"enum": list(bills.WIDTHS)}},
    "limit of costs": {
        "name": "limit",
        "schema": {"type": "integer", "minimum": 1, "maximum": bills.MAX_RESULTS, "default": bills.DEFAULT_RESULTS},
    },
    "page": {"schema": TEXT, "description": "The `next_page` of an earlier answer."},
    "format": {"schema": {"enum": list(bills.FORMATS), "default": bills.FORMATS[0]}},
    "include_archived": {"schema": {"enum": list(FLAGS), "default": "false"}},
    **{f"effective_at[{name}]": {"schema": {"type": "integer", "minimum": 0}} for name in COMPARISONS},
    **{
        f"{name}[]": {"schema": {"type": "array", "items": TEXT, "maxItems": organization.MAX_VALUES}}
        for name in ("event_types", "project_ids", "actor_ids", "resource_ids")
    },
    "metadata": {"style": "deepObject", "explode": True, "schema": {"type": "object", "additionalProperties": TEXT}},
}


class _Echoed(msgspec.Struct):
    """What answers hold as plain JSON and give back in the shape in which it was sent."""

    tools: Tools
    tool_resources: ToolResources
    tool_choice: ToolChoice
    response_format: ResponseFormat
    attachments: list[Attachment]


IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "With the same one, the same request is carried out once within 24 hours.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}


def describe(routes: Iterable[tuple[str, str, Endpoint]]) -> bytes:
    """The OpenAPI 3.1 document as JSON. routes: (method, whole path, what answers it); each has its row in SHAPES."""
    paths: dict[str, Json] = {}
    for method, path, act in routes:
        plain_path = re.sub(r":\w+}", "}", path)
        operation = paths.setdefault(plain_path, {})[method.lower()] = _operation(plain_path, act)
        if method == "POST":
            operation["parameters"].append(IDEMPOTENCY_KEY)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Afterglow", "version": __version__},
            "security": [{"key": []}],
            "paths": paths,
            "components": {
                "schemas": _schemas(),
                "responses": {"Error": _json_answer(_object(error=_error()), "What went wrong.")},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _operation(path: str, act: Endpoint) -> Json:
    shape = SHAPES[act]
    verb, *rest = act.__name__.split("_")
    operation = {
        "operationId": verb + "".join(map(str.capitalize, rest)),
        "summary": " ".join([verb, *rest]).capitalize(),
        "tags": [act.__module__.rpartition(".")[2]],
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": TEXT} for name in re.findall(r"{(\w+)}", path)),
            *({"name": name, "in": "query"} | QUERY[name] for name in shape.query),
        ],
        "responses": {**_answers(shape), "default": {"$ref": "#/components/responses/Error"}},
    }
    if said := _said_of(act):
        operation["description"] = said
    if shape.body is not None:
        content = {"application/json": {"schema": _schema_of(shape.body)}}
        operation["requestBody"] = {"required": not shape.empty_ok, "content": content}
    if shape.form is not None:
        content = {"multipart/form-data": {"schema": shape.form}}
        operation["requestBody"] = {"required": True, "content": content}
    if path in OPEN_PATHS:
        operation["security"] = []
    return operation


def _said_of(act: Endpoint) -> str:
    """The docstring without the method and path that it begins with."""
    _, _, said = (" ".join((act.__doc__ or "").split())).partition(" ")
    _, _, said = said.partition(" ")
    return said[:1].upper() + said[1:]


def _answers(shape: Shape) -> Json:
    if shape.deleted:
        deleted = {**_schema_of(Deleted), "properties": {"object": {"const": shape.deleted}}}
        return {"200": _json_answer(deleted)}
    if shape.list_of is not None:
        return {"200": _json_answer(_list_of(shape.list_of, paged="after" in shape.query))}
    if shape.events:
        stream = {"description": "OK", "content": {"text/event-stream": {"schema": {}}}}
        return {"200": stream, "204": {"description": "There is nothing more to come."}}
    if shape.answer is None:
        return {}
    if shape.answer is bytes:
        return {"200": {"description": "OK", "content": {"application/octet-stream": {"schema": {}}}}}
    schema = _schema_of(shape.answer)
    answer = _json_answer({"anyOf": [schema, _schema_of(shape.tried)]} if shape.tried else schema)
    if shape.body is not None and "stream" in shape.body.__struct_fields__:
        answer["content"]["text/event-stream"] = {"schema": {}}
    if shape.csv:
        answer["content"]["text/csv"] = {"schema": TEXT}
    return {"200": answer}


def _json_answer(schema: Json, description: str = "OK") -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _schema_of(kind: type) -> Json:
    return {"type": "object"} if kind is dict else {"$ref": REF.format(name=kind.__name__)}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list_of(kind: type, *, paged: bool) -> Json:
    """The list envelope; a list that has no pages comes without the cursor's keys."""
    cursor = {"first_id": TEXT_OR_NULL, "last_id": TEXT_OR_NULL, "has_more": {"type": "boolean"}}
    return _object(
        object={"const": "list"}, data={"type": "array", "items": _schema_of(kind)}, **(cursor if paged else {})
    )


def _error() -> Json:
    return _object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL)


def _schemas() -> dict[str, Json]:
    """The structs that routes name, and those inside them, by name."""
    kinds: set[Any] = {_Echoed, Deleted}
    for shape in SHAPES.values():
        kinds |= {shape.body, shape.answer, shape.list_of, shape.tried} - {None, dict, bytes}
    _, schemas = msgspec.json.schema_components(sorted(kinds, key=lambda kind: kind.__name__), ref_template=REF)
    echoed = schemas.pop(_Echoed.__name__)["properties"]
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
        if schema.get("additionalProperties") is False:
            _allow_vendor_keys(schema)
        else:
            _complete_answer(schema, echoed)
    return schemas


def _allow_vendor_keys(body: Json) -> None:
    if body["properties"].pop(VENDOR_KEYS, None):
        body["patternProperties"] = {"^x-": {}}


def _complete_answer(answer: Json, echoed: Json) -> None:
    """What we send has every key, and `object` names what it is."""
    properties = answer["properties"]
    for name in properties.keys() & echoed.keys():
        if properties[name].get("type") != "integer":  # which counts the tokens of what was sent
            properties[name] = echoed[name]
    if kind := properties.get("object", {}).get("default"):
        properties["object"] = {"const": kind}
    answer["required"] = list(properties)
