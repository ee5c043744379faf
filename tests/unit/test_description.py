"""`/openapi.json` is a sound OpenAPI 3.1 document, and says of each route what the route does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator, ValidationError

from afterglow.api import bodies
from afterglow.api.description import SHAPES, describe
from afterglow.app import OPEN_ROUTES, ROUTES
from afterglow.errors import InvalidRequest, NotFound
from afterglow.objects import (
    INCLUDE_FILE_SEARCH_CONTENT,
    VENDOR_KEYS,
    Assistant,
    Body,
    CreateAssistant,
    CreateMessage,
    CreateRun,
    CreateThread,
    Deleted,
    File,
    LastError,
    Message,
    ModifyAssistant,
    Run,
    RunStep,
    Thread,
    Usage,
)
from afterglow.runs.ledger import CompletionParts, Ledger, LedgerLine, PromptParts

DOCUMENT = json.loads(describe([(method, f"/v1{path}", act) for method, path, act in ROUTES] + OPEN_ROUTES))
OPERATIONS = {
    (method.upper(), path): operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
# What the specification demands of a document, as far as ours uses it.
CONTENT = {"type": "object", "minProperties": 1, "additionalProperties": {"required": ["schema"]}}
PARAMETER = {
    "required": ["name", "in", "schema"],
    "properties": {"in": {"enum": ["path", "query", "header"]}, "style": {"const": "deepObject"}},
    "if": {"properties": {"in": {"const": "path"}}},
    "then": {"required": ["required"], "properties": {"required": {"const": True}}},
}
ANSWER = {
    "anyOf": [{"required": ["$ref"]}, {"required": ["description"], "properties": {"content": CONTENT}}],
}
OPERATION = {
    "required": ["operationId", "summary", "responses"],
    "properties": {
        "operationId": {"pattern": "^[a-z][a-zA-Z]*$"},
        "parameters": {"type": "array", "items": PARAMETER, "uniqueItems": True},
        "requestBody": {"required": ["content"], "properties": {"content": CONTENT}},
        "responses": {"propertyNames": {"pattern": "^([1-5][0-9][0-9]|default)$"}, "additionalProperties": ANSWER},
    },
}
SKELETON = {
    "required": ["openapi", "info", "paths", "components"],
    "properties": {
        "openapi": {"pattern": r"^3\.1\.\d+$"},
        "info": {"required": ["title", "version"]},
        "paths": {
            "propertyNames": {"pattern": "^/[^:]*$"},
            "additionalProperties": {
                "propertyNames": {"enum": ["get", "post", "delete"]},
                "additionalProperties": OPERATION,
            },
        },
        "components": {
            "propertyNames": {"enum": ["schemas", "responses", "securitySchemes"]},
            "additionalProperties": {"propertyNames": {"pattern": r"^[a-zA-Z0-9._-]+$"}},
        },
    },
}


def walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(part)


def resolve(ref: str) -> Any:
    node = DOCUMENT
    for key in ref.removeprefix("#/").split("/"):
        node = node[key]
    return node


def check(schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def answer(method: str, path: str) -> dict[str, Any]:
    schema: dict[str, Any] = OPERATIONS[method, path]["responses"]["200"]["content"]["application/json"]["schema"]
    return schema


def as_sent(wire_object: Any) -> Any:
    return json.loads(msgspec.json.encode(wire_object))


# --- the document ----------------------------------------------------------------------------------------------


def test_every_route_has_a_shape():
    """The table of shapes has a row for each route, and no other rows."""
    assert {act for _, _, act in ROUTES + OPEN_ROUTES} == set(SHAPES)


def test_the_document_has_the_form_of_openapi_3_1():
    """Keys that the specification demands are there, and have its form."""
    Draft202012Validator(SKELETON).validate(DOCUMENT)


def test_every_route_is_described_once():
    """Each route is in the document under its whole path, and operation ids are unique."""
    routes = [(method, f"/v1{path.replace(':path', '')}") for method, path, _ in ROUTES]
    routes += [(method, path) for method, path, _ in OPEN_ROUTES]
    assert OPERATIONS.keys() == set(routes)
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(names)) == len(names) == len(routes)


def test_path_parameters_are_those_of_the_path():
    """Each name in braces is declared, and nothing else is."""
    for (_, path), operation in OPERATIONS.items():
        declared = [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"]
        assert declared == re.findall(r"{(\w+)}", path)


def test_every_reference_leads_somewhere():
    """Each `$ref`, and each reference of a discriminator, can be followed."""
    for node in walk(DOCUMENT):
        if "$ref" in node:
            assert resolve(node["$ref"])
        for ref in node.get("discriminator", {}).get("mapping", {}).values():
            assert resolve(ref)


def test_no_schema_is_left_over():
    """Every schema under components is used."""
    used = {node["$ref"] for node in walk(DOCUMENT) if "$ref" in node}
    assert {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]} <= used


def test_every_schema_is_json_schema():
    """Components and inline schemas alike are valid JSON Schema 2020-12."""
    inline = [node["schema"] for node in walk(DOCUMENT["paths"]) if isinstance(node.get("schema"), dict)]
    for schema in [*DOCUMENT["components"]["schemas"].values(), *inline]:
        Draft202012Validator.check_schema(schema)


def test_nothing_internal_shows():
    """The name under which vendor keys are kept is in no schema, and docstrings come without line breaks."""
    names = {name for node in walk(DOCUMENT) for name in node}
    assert VENDOR_KEYS not in names
    said = [node["description"] for node in walk(DOCUMENT) if isinstance(node.get("description"), str)]
    assert not [text for text in said if "\n" in text or "  " in text]


# --- single routes ---------------------------------------------------------------------------------------------


def test_an_operation_is_named_after_its_function_and_says_what_its_docstring_says():
    """operationId and summary come from the function's name, the description from its docstring less the address."""
    operation = OPERATIONS["POST", "/v1/threads/runs"]
    assert operation["operationId"] == "createThreadAndRun"
    assert operation["summary"] == "Create thread and run"
    assert operation["description"] == "A stream begins with the thread."
    assert operation["tags"] == ["runs"]
    assert "description" not in OPERATIONS["GET", "/v1/assistants"]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/v1/assistants", {"limit", "order", "after", "before"}),
        (
            "/v1/threads",
            {"limit", "order", "after", "before", "metadata", "assistant_id", "run_status", "query", "created_at"},
        ),
        ("/v1/messages", {"limit", "order", "after", "before", "query", "thread_id", "created_at"}),
        (
            "/v1/runs",
            {"limit", "order", "after", "before", "status", "assistant_id", "thread_id", "model", "created_at"},
        ),
        ("/v1/threads/{thread_id}/messages", {"limit", "order", "after", "before", "run_id"}),
        ("/v1/threads/{thread_id}/runs/{run_id}/steps", {"limit", "order", "after", "before", "include[]"}),
        ("/v1/threads/{thread_id}/runs/{run_id}/steps/{step_id}", {"include[]"}),
        ("/v1/files", {"limit", "order", "after", "purpose"}),
        ("/v1/models", set()),
    ],
)
def test_query_parameters(path: str, names: set[str]):
    """Lists take the cursor's parameters, and some routes their own."""
    parameters = OPERATIONS["GET", path]["parameters"]
    assert {parameter["name"] for parameter in parameters if parameter["in"] == "query"} == names


def test_limits_of_query_parameters():
    """The bounds, defaults and choices of the reference are told."""
    listing = OPERATIONS["GET", "/v1/threads/{thread_id}/runs/{run_id}/steps"]["parameters"]
    schemas = {parameter["name"]: parameter["schema"] for parameter in listing}
    assert schemas["limit"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}
    assert schemas["order"] == {"enum": ["asc", "desc"], "default": "desc"}
    assert schemas["include[]"]["items"] == {"enum": [INCLUDE_FILE_SEARCH_CONTENT]}
    [limit] = [row for row in OPERATIONS["GET", "/v1/files"]["parameters"] if row["name"] == "limit"]
    assert limit["schema"] == {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 10_000}


def test_bodies_are_described_where_they_are_read():
    """Creating, modifying and a few more take a body, which few can do without."""
    required = {
        operation["operationId"]: operation["requestBody"]["required"]
        for operation in OPERATIONS.values()
        if "requestBody" in operation
    }
    for name in ("createThread", "createVectorStore", "rotateWebhookSecret", "testWebhookEndpoint"):
        assert required.pop(name) is False
    assert set(required.values()) == {True}
    assert set(required) == {
        *("createAssistant", "modifyAssistant", "modifyThread", "createMessage", "modifyMessage"),
        *("createRun", "createThreadAndRun", "modifyRun", "submitToolOutputs", "createFile"),
        *("createUpload", "createUploadPart", "completeUpload", "modifyVectorStore", "searchVectorStore"),
        "explainSearch",
        *("createVectorStoreFile", "modifyVectorStoreFile", "createFileBatch"),
        *("createWebhookEndpoint", "modifyWebhookEndpoint"),
        *("createProject", "modifyProject", "createKey", "modifyKey"),
    }


def test_an_upload_is_a_form():
    """It is described as multipart, with the purposes of the reference; a download is no JSON."""
    form = OPERATIONS["POST", "/v1/files"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "purpose"]
    assert form["properties"]["purpose"]["enum"][:2] == ["fine-tune", "assistants"]
    download = OPERATIONS["GET", "/v1/files/{file_id}/content"]["responses"]["200"]
    assert list(download["content"]) == ["application/octet-stream"]


def test_streams_are_told_of():
    """Exactly the routes whose body has `stream`, and that of a run's events, may answer with events."""
    streaming = {
        operation["operationId"]
        for operation in OPERATIONS.values()
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    }
    assert streaming == {"createRun", "createThreadAndRun", "submitToolOutputs", "followRunEvents"}


def test_only_the_open_routes_need_no_key():
    """A bearer key is the rule; the server's own three routes are exempt."""
    assert DOCUMENT["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert DOCUMENT["security"] == [{"key": []}]
    open_paths = {path for (_, path), operation in OPERATIONS.items() if operation.get("security") == []}
    assert open_paths == {path for _, path, _ in OPEN_ROUTES}


def test_errors_have_the_envelope():
    """Every route may answer with the error body, of which all four keys are there."""
    refs = {operation["responses"]["default"]["$ref"] for operation in OPERATIONS.values()}
    assert len(refs) == 1
    schema = resolve(refs.pop())["content"]["application/json"]["schema"]
    check(schema, json.loads(NotFound("No such thing.").body()))
    with pytest.raises(ValidationError):
        check(schema, {"error": {"message": "m", "type": "t", "param": None}})


# --- what is sent and answered ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "wire_object"),
    [
        ("/v1/assistants/{assistant_id}", Assistant(id="asst_1", created_at=1, model="m")),
        (
            "/v1/assistants/{assistant_id}",
            Assistant(
                id="asst_1",
                created_at=1,
                model="m",
                tools=[
                    {"type": "function", "function": {"name": "f", "strict": False}, "x-mine": 1},
                    {"type": "file_search", "file_search": {"max_num_results": 3}},
                ],
                tool_resources={"file_search": {"vector_store_ids": ["vs_1"]}},
                response_format={"type": "json_object"},
            ),
        ),
        ("/v1/threads/{thread_id}", Thread(id="thread_1", created_at=1)),
        ("/v1/files/{file_id}", File(id="file-1", bytes=1, created_at=1, filename="a", purpose="vision")),
        (
            "/v1/threads/{thread_id}/messages/{message_id}",
            Message(id="msg_1", created_at=1, thread_id="thread_1", role="user"),
        ),
        (
            "/v1/threads/{thread_id}/runs/{run_id}",
            Run(
                id="run_1",
                created_at=1,
                assistant_id="asst_1",
                thread_id="thread_1",
                model="m",
                status="failed",
                tool_choice={"type": "function", "function": {"name": "f"}},
                last_error=LastError("server_error", "Sorry."),
                usage=Usage(),
            ),
        ),
        (
            "/v1/threads/{thread_id}/runs/{run_id}/steps/{step_id}",
            RunStep(
                id="step_1",
                created_at=1,
                run_id="run_1",
                assistant_id="asst_1",
                thread_id="thread_1",
                type="tool_calls",
                step_details={"type": "tool_calls", "tool_calls": []},
            ),
        ),
        (
            "/v1/threads/{thread_id}/runs/{run_id}/ledger",
            Ledger(
                run_id="run_1",
                thread_id="thread_1",
                total=LedgerLine(
                    prompt=PromptParts(response_format=7),
                    completion=CompletionParts(),
                    usage=Usage(),
                    cached_tokens=0,
                    estimated=False,
                    cost=None,
                    unpriced_tokens=0,
                ),
                data=[],
            ),
        ),
    ],
)
def test_answers_are_as_described(path: str, wire_object: Any):
    """What we send fits its schema, and a key fewer or another `object` does not."""
    sent = as_sent(wire_object)
    check(answer("GET", path), sent)
    for name in sent:
        with pytest.raises(ValidationError):
            check(answer("GET", path), {key: value for key, value in sent.items() if key != name})
    with pytest.raises(ValidationError):
        check(answer("GET", path), {**sent, "object": "else"})


def test_lists_are_in_their_envelope():
    """A list holds objects of its kind and the cursor's keys; that of the models has no cursor."""
    threads = {"object": "list", "data": [as_sent(Thread(id="thread_1", created_at=1))]}
    cursor = {"first_id": "thread_1", "last_id": "thread_1", "has_more": False}
    check(answer("GET", "/v1/threads"), threads | cursor)
    check(answer("GET", "/v1/threads"), {"object": "list", "data": [], **dict.fromkeys(cursor), "has_more": False})
    with pytest.raises(ValidationError):
        check(answer("GET", "/v1/threads"), threads)
    with pytest.raises(ValidationError):
        check(answer("GET", "/v1/assistants"), threads | cursor)
    check(answer("GET", "/v1/models"), {"object": "list", "data": []})


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/assistants/{assistant_id}", "assistant.deleted"),
        ("/v1/threads/{thread_id}", "thread.deleted"),
        ("/v1/threads/{thread_id}/messages/{message_id}", "thread.message.deleted"),
        ("/v1/files/{file_id}", "file"),
    ],
)
def test_deletes_name_what_is_gone(path: str, kind: str):
    """The `object` of a delete's answer is that of its route."""
    check(answer("DELETE", path), as_sent(Deleted(id="x", object=kind)))
    with pytest.raises(ValidationError):
        check(answer("DELETE", path), as_sent(Deleted(id="x", object="else")))


def test_a_model_is_never_deleted():
    """The route has no answer but an error."""
    assert list(OPERATIONS["DELETE", "/v1/models/{model}"]["responses"]) == ["default"]


FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SENT: list[tuple[type[Body], Any, bool]] = [
    (CreateAssistant, {"model": "m"}, True),
    (CreateAssistant, {}, False),
    (CreateAssistant, {"model": "m", "tools": [{**FUNCTION, "x-mine": {"a": 1}}]}, True),
    (CreateAssistant, {"model": "m", "tools": [{**FUNCTION, "mine": 1}]}, False),
    (CreateAssistant, {"model": "m", "tools": [{"type": "retrieval"}]}, False),
    (CreateAssistant, {"model": "m", "temperature": 2.5}, False),
    (CreateAssistant, {"model": "m", "metadata": {"k" * 65: "v"}}, False),
    (CreateAssistant, {"model": "m", "metadata": {"k": "v"}}, True),
    (ModifyAssistant, {}, True),
    (ModifyAssistant, {"name": None, "temperature": None}, True),
    (ModifyAssistant, {"model": None}, False),
    (CreateThread, {"messages": [{"role": "user", "content": "hi"}]}, True),
    (CreateMessage, {"role": "user", "content": [{"type": "text", "text": "hi"}]}, True),
    (CreateMessage, {"role": "user", "content": []}, False),
    (CreateMessage, {"role": "system", "content": "hi"}, False),
    (CreateRun, {"assistant_id": "a", "tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
    (CreateRun, {"assistant_id": "a", "tool_choice": "maybe"}, False),
    (CreateRun, {"assistant_id": "a", "max_prompt_tokens": 255}, False),
    (CreateRun, {"assistant_id": "a", "truncation_strategy": {"type": "auto", "last_messages": 1}}, True),
    (CreateRun, {"assistant_id": "a", "tools": [{"type": "function", "function": {"name": "a b"}}]}, False),
    (CreateRun, {"assistant_id": "a", "reasoning_effort": "none", "response_format": "auto"}, True),
]


@pytest.mark.parametrize(("kind", "body", "good"), SENT)
def test_bodies_are_as_described(kind: type[Body], body: Any, good: bool):
    """The document and the parser agree on what may be sent."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    if good:
        check(schema, body)
        bodies.decode(json.dumps(body).encode(), kind)
        return
    with pytest.raises(ValidationError):
        check(schema, body)
    with pytest.raises(InvalidRequest):
        bodies.decode(json.dumps(body).encode(), kind)
