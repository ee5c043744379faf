"""HTTP as it is: what the official client would not send, and every answer held against the published shapes."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx2
from jsonschema import Draft202012Validator
from openai.types import (
    FileDeleted,
    FileObject,
    Model,
    Upload,
    VectorStore,
    VectorStoreDeleted,
    VectorStoreSearchResponse,
)
from openai.types import beta as sdk
from openai.types.admin.organization import AuditLogListResponse, Project
from openai.types.admin.organization.projects import APIKeyDeleteResponse, ProjectAPIKey
from openai.types.beta import threads as sdk_threads
from openai.types.beta.threads import runs as sdk_runs
from openai.types.uploads import UploadPart
from openai.types.vector_stores import (
    FileContentResponse,
    VectorStoreFile,
    VectorStoreFileBatch,
    VectorStoreFileDeleted,
)
from openai.types.webhooks import DeletedWebhookEndpoint, WebhookEndpoint, WebhookEndpointTestResult
from pydantic import BaseModel

Json = dict[str, Any]
REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")
# The schemas of these do not allow the nulls that the service sends, or the SDK expects.
NOT_PUBLISHED = ""  # a schema that the document at hand does not have
NULLS = {"file", "upload", "vector_store"}


class SearchPage(BaseModel):
    """As the SDK's pager reads it."""

    object: str
    search_query: list[str]
    data: list[VectorStoreSearchResponse]
    has_more: bool
    next_page: None


class ContentPage(BaseModel):
    object: str
    data: list[FileContentResponse]
    has_more: bool
    next_page: None


class AuditLog(AuditLogListResponse):
    """With types of our own, beside those that the SDK knows."""

    type: str  # type: ignore[assignment]


class WebhookDelivery(BaseModel):
    """Of our own. The SDK has no log of deliveries."""

    id: str
    created_at: int
    webhook_endpoint_id: str
    event: dict[str, Any] | None
    status: Literal["pending", "delivered", "failed", "cancelled"]
    next_try_at: int | None
    tries: list[dict[str, Any]]


# By `object`: the SDK's model, and the schema's name in the contract; "" where the contract has none.
SHAPES: dict[str, tuple[type[BaseModel], str]] = {
    "assistant": (sdk.Assistant, "AssistantObject"),
    "assistant.deleted": (sdk.AssistantDeleted, "DeleteAssistantResponse"),
    "thread": (sdk.Thread, "ThreadObject"),
    "thread.deleted": (sdk.ThreadDeleted, "DeleteThreadResponse"),
    "thread.message": (sdk_threads.Message, "MessageObject"),
    "thread.message.deleted": (sdk_threads.MessageDeleted, "DeleteMessageResponse"),
    "thread.run": (sdk_threads.Run, "RunObject"),
    "thread.run.step": (sdk_runs.RunStep, "RunStepObject"),
    "file": (FileObject, "OpenAIFile"),
    "file.deleted": (FileDeleted, "DeleteFileResponse"),
    "upload": (Upload, "Upload"),
    "upload.part": (UploadPart, "UploadPart"),
    "vector_store": (VectorStore, "VectorStoreObject"),
    "vector_store.deleted": (VectorStoreDeleted, "DeleteVectorStoreResponse"),
    "vector_store.file": (VectorStoreFile, "VectorStoreFileObject"),
    "vector_store.file.deleted": (VectorStoreFileDeleted, "DeleteVectorStoreFileResponse"),
    "vector_store.files_batch": (VectorStoreFileBatch, "VectorStoreFileBatchObject"),
    "vector_store.search_results.page": (SearchPage, "VectorStoreSearchResultsPage"),
    "vector_store.file_content.page": (ContentPage, "VectorStoreFileContentResponse"),
    "webhook_endpoint": (WebhookEndpoint, NOT_PUBLISHED),
    "webhook_endpoint.deleted": (DeletedWebhookEndpoint, NOT_PUBLISHED),
    "webhook_endpoint.test": (WebhookEndpointTestResult, NOT_PUBLISHED),
    "webhook_endpoint.delivery": (WebhookDelivery, NOT_PUBLISHED),
    "model": (Model, "Model"),
    "organization.project": (Project, ""),
    "organization.project.api_key": (ProjectAPIKey, ""),
    "organization.project.api_key.deleted": (APIKeyDeleteResponse, ""),
    "organization.audit_log": (AuditLog, ""),
}
# Objects of ours, which no SDK and no contract knows; tests of their own read them.
OWN = ("thread.run.ledger", "thread.run.step.prompt", "thread.run.dry_run", "page")
ENVELOPE = {"object", "data", "first_id", "last_id", "has_more"}
OPEN_PATHS = ("/healthz", "/readyz", "/openapi.json")


class Fault(NamedTuple):
    """An error as the caller reads it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None


def not_found(noun: str, object_id: str) -> Fault:
    """Files and vector stores have words of their own."""
    if noun == "file":
        return Fault(404, f"No such File object: {object_id}", "id")
    if noun == "vector_store":
        return Fault(404, f"Vector store with id '{object_id}' not found.")
    noun = {"step": "run step", "batch": "file batch", "endpoint": "webhook endpoint"}.get(noun, noun)
    return Fault(404, f"No {noun} found with id '{object_id}'.")


class Answer(NamedTuple):
    status: int
    headers: httpx2.Headers
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def fault(self) -> Fault:
        error = self.json["error"]
        return Fault(self.status, error["message"], error["param"], error["code"])

    @property
    def ids(self) -> list[str]:
        return [item["id"] for item in self.json["data"]]


class Wire:
    """A plain client. Every answer is checked: an object of the API has its published shape, an error its envelope.

    key: "" sends none.
    """

    def __init__(self, url: str, key: str = "sk-wire") -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.client = httpx2.AsyncClient(base_url=url, headers=headers, verify=False, timeout=30)

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """body: bytes as they are, anything else as JSON; None sends none. path: below /v1, unless it begins with
        a second slash."""
        path = path[1:] if path.startswith("//") else f"/v1{path}"
        if body is not None:
            options["content"] = body if isinstance(body, bytes) else json.dumps(body).encode()
            options.setdefault("headers", {}).setdefault("content-type", "application/json")
        response = await self.client.request(method, path, **options)
        answer = Answer(response.status_code, response.headers, response.content)
        check(method, path, answer)
        return answer

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return await self.ask("POST", path, body, **options)

    async def delete(self, path: str, **options: Any) -> Answer:
        return await self.ask("DELETE", path, **options)

    async def made(self, path: str, body: Any = None) -> Json:
        """What a POST that goes well answers."""
        answer = await self.post(path, body)
        assert answer.status == 200, answer.content
        body = answer.json
        assert isinstance(body, dict)
        return body

    async def stopped(self, run: Json) -> Json:
        """Poll until the run stops, whether it is over or waits for outputs."""
        while run["status"] in ("queued", "in_progress", "cancelling"):
            run = await self.read(f"/threads/{run['thread_id']}/runs/{run['id']}")
        return run

    async def read(self, path: str) -> Json:
        """What a GET that goes well answers."""
        answer = await self.get(path)
        assert answer.status == 200, answer.content
        body = answer.json
        assert isinstance(body, dict)
        return body


async def until(condition: Callable[[], object]) -> None:
    """Wait for what sets no event."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


# --- checks ----------------------------------------------------------------------------------------------------


def check(method: str, path: str, answer: Answer) -> None:
    """What holds for every answer."""
    assert REQUEST_ID.fullmatch(answer.headers["x-request-id"])
    assert answer.headers["openai-version"] == "2020-10-01"
    assert answer.headers["openai-organization"] == "afterglow"
    assert answer.headers["openai-processing-ms"].isdigit()
    if answer.headers["content-type"] in ("text/event-stream; charset=utf-8", "application/octet-stream"):
        return
    assert answer.headers["content-type"] == "application/json"
    if answer.status != 200:
        check_error(answer)
    elif answer.content and not path.endswith(OPEN_PATHS):
        check_object(answer.content)
    else:
        assert answer.content or method == "HEAD"


def check_error(answer: Answer) -> None:
    assert set(answer.json) == {"error"}
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    if answer.status == 429:
        assert error["type"] in ("requests", "tokens", "insufficient_quota")
    else:
        assert error["type"] == ("server_error" if answer.status >= 500 else "invalid_request_error")
    assert isinstance(error["param"], str | None)
    assert isinstance(error["code"], str | None)


def check_object(content: bytes) -> None:
    body = json.loads(content)
    if body["object"] != "list":
        check_shape(body, content)
        return
    assert set(body) in (ENVELOPE, {"object", "data"})  # models are not paginated
    for item in body["data"]:
        if isinstance(item, str):  # names of event types
            continue
        check_shape(item, json.dumps(item).encode())
    if set(body) == ENVELOPE:
        ids = [item["id"] for item in body["data"]]
        assert [body["first_id"], body["last_id"]] == ([ids[0], ids[-1]] if ids else [None, None])
        assert body["has_more"] in (True, False)


def check_shape(body: Json, content: bytes) -> None:
    """At its strictest, the SDK's model accepts it, and so does the schema, where the contract is at hand."""
    if body["object"] in OWN:
        return
    deleted_file = body["object"] == "file" and "deleted" in body  # the one kind whose `object` does not tell
    model, schema = SHAPES["file.deleted" if deleted_file else body["object"]]
    model.model_validate_json(content, strict=True)
    if schema and (validator := _validator(schema)):
        kept = {key: value for key, value in body.items() if body["object"] not in NULLS or value is not None}
        if kept.get("file"):
            kept["file"] = {key: value for key, value in kept["file"].items() if value is not None}
        validator.validate(kept)


@cache
def _validator(schema: str) -> Draft202012Validator | None:
    folder = os.environ.get("AFTERGLOW_CONTRACT_DIR")
    if not folder or not schema:
        return None
    document = json.loads(Path(folder, "assistants.openapi.json").read_bytes())
    return Draft202012Validator({"$ref": f"#/components/schemas/{schema}", "components": document["components"]})
