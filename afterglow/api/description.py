"""The OpenAPI document of `/openapi.json`, from the route table, SHAPES and the structs.

What a type cannot say (a message that is only white space, an id that nothing has) is not in it. Routes that are the
upstream's are not described.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow import __version__
from afterglow.api import about, assistants, bills, files, inspection, models, runs, threads, uploads, vector_stores
from afterglow.api.edge import OPEN_PATHS
from afterglow.api.pages import MAX_LIMIT, ORDERS, Page
from afterglow.bills import CostsPage
from afterglow.dry_run import DryRun
from afterglow.inspection import Citation, SearchExplanation, VectorStoreChunk
from afterglow.objects import (
    INCLUDE_FILE_SEARCH_CONTENT,
    VENDOR_KEYS,
    Assistant,
    Attachment,
    Body,
    CompleteUpload,
    CreateAssistant,
    CreateFileBatch,
    CreateMessage,
    CreateRun,
    CreateThread,
    CreateThreadAndRun,
    CreateUpload,
    CreateVectorStore,
    CreateVectorStoreFile,
    Deleted,
    File,
    FileContentPage,
    Json,
    Message,
    Model,
    ModifyAssistant,
    ModifyMessage,
    ModifyRun,
    ModifyThread,
    ModifyVectorStore,
    ModifyVectorStoreFile,
    ResponseFormat,
    Run,
    RunStep,
    SearchPage,
    SearchVectorStore,
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
)
from afterglow.rows.spend import GROUPS, METADATA
from afterglow.runs.ledger import Ledger
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
    deleted. With none of the three, no call of the route ends well. tried: what comes instead when `dry_run` asks for
    it. csv: `format` may ask for CSV.
    """

    body: type[Body] | None = None
    answer: type[msgspec.Struct] | type[Json] | type[bytes] | None = None
    query: tuple[str, ...] = ()
    form: Json | None = None
    list_of: type[msgspec.Struct] | None = None
    deleted: str = ""
    empty_ok: bool = False
    tried: type[msgspec.Struct] | None = None
    csv: bool = False


SECONDS: Json = {"type": "integer", "minimum": 0, "maximum": bills.LATEST}
CURSOR = ("limit", "order", "after", "before")
INCLUDE = ("include[]",)
LIMITS = ("max_total_tokens", "max_cost", "dry_run")
COSTS = ("group_by", "start_time", "end_time", "bucket_width", "limit of costs", "page", "format")
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
    threads.list_threads: Shape(query=(*CURSOR, "metadata"), list_of=Thread),
    threads.retrieve_thread: Shape(answer=Thread),
    threads.modify_thread: Shape(ModifyThread, Thread),
    threads.delete_thread: Shape(deleted="thread.deleted"),
    threads.create_message: Shape(CreateMessage, Message),
    threads.list_messages: Shape(query=(*CURSOR, "run_id"), list_of=Message),
    threads.retrieve_message: Shape(answer=Message),
    threads.modify_message: Shape(ModifyMessage, Message),
    threads.delete_message: Shape(deleted="thread.message.deleted"),
    runs.create_thread_and_run: Shape(CreateThreadAndRun, Run, (*INCLUDE, *LIMITS), tried=DryRun),
    runs.create_run: Shape(CreateRun, Run, (*INCLUDE, *LIMITS), tried=DryRun),
    runs.list_runs: Shape(query=CURSOR, list_of=Run),
    runs.retrieve_run: Shape(answer=Run),
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
    vector_stores.retrieve_vector_store_file: Shape(answer=VectorStoreFile),
    vector_stores.modify_vector_store_file: Shape(ModifyVectorStoreFile, VectorStoreFile),
    vector_stores.delete_vector_store_file: Shape(deleted="vector_store.file.deleted"),
    vector_stores.retrieve_vector_store_file_content: Shape(answer=FileContentPage),
    vector_stores.create_file_batch: Shape(CreateFileBatch, VectorStoreFileBatch),
    vector_stores.retrieve_file_batch: Shape(answer=VectorStoreFileBatch),
    vector_stores.cancel_file_batch: Shape(answer=VectorStoreFileBatch),
    vector_stores.list_files_of_batch: Shape(query=(*CURSOR, "filter"), list_of=VectorStoreFile),
    inspection.list_chunks: Shape(query=("limit", "after"), list_of=VectorStoreChunk),
    inspection.explain_search: Shape(SearchVectorStore, SearchExplanation),
    inspection.list_citations: Shape(list_of=Citation),
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
    "run_id": {"schema": TEXT, "description": "Keep what this run wrote."},
    "purpose": {"schema": TEXT, "description": "Keep the files of this purpose."},
    "filter": {"schema": {"enum": list(vector_stores.FILE_STATUSES)}, "description": "Keep the files of this status."},
    "include[]": {"schema": {"type": "array", "items": {"enum": [INCLUDE_FILE_SEARCH_CONTENT]}}},
    "max_total_tokens": {
        "schema": {"type": "integer", "minimum": 0, "maximum": bills.MAX_TOKENS},
        "description": "Tokens that the run may take, prompts and answers together.",
    },
    "max_cost": {
        "schema": {"type": "number", "minimum": 0},
        "description": "Money that the run may cost, in the operator's currency.",
    },
    "dry_run": {"schema": {"enum": list(bills.SWITCH)}, "description": "Tell what would be done, and do nothing."},
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
    "metadata": {"style": "deepObject", "explode": True, "schema": {"type": "object", "additionalProperties": TEXT}},
}


class _Echoed(msgspec.Struct):
    """What answers hold as plain JSON and give back in the shape in which it was sent."""

    tools: Tools
    tool_resources: ToolResources
    tool_choice: ToolChoice
    response_format: ResponseFormat
    attachments: list[Attachment]


def describe(routes: Iterable[tuple[str, str, Endpoint]]) -> bytes:
    """The OpenAPI 3.1 document as JSON. routes: (method, whole path, what answers it); each has its row in SHAPES."""
    paths: dict[str, Json] = {}
    for method, path, act in routes:
        plain_path = re.sub(r":\w+}", "}", path)
        paths.setdefault(plain_path, {})[method.lower()] = _operation(plain_path, act)
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
    properties |= {name: echoed[name] for name in properties.keys() & echoed.keys()}
    if kind := properties.get("object", {}).get("default"):
        properties["object"] = {"const": kind}
    answer["required"] = list(properties)
