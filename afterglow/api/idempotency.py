"""A POST that is sent again is answered again, and not carried out again.

`once` stands around every POST of ours. What is a repetition is decided in `attempts.py`; here is what it is told: the
answer as it was where that is kept, which it is for requests with an `Idempotency-Key`; else the object that was made,
as it is now; and of a stream, the run's log from where that stream began.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import wraps

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from afterglow.api import assistants, files, organization, threads, vector_stores, webhooks
from afterglow.api.answers import JSON, house_of, origin_of, project_of, reply, retry_headers
from afterglow.api.attempts import Repeated
from afterglow.api.bills import is_dry_run
from afterglow.api.sse import EventStream
from afterglow.contracts import Transaction
from afterglow.errors import InvalidRequest, NotFound, StoreError
from afterglow.objects import UploadPart
from afterglow.rows import requests as request_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows import uploads as upload_rows
from afterglow.rows.requests import Result
from afterglow.rows.runs import RunRow
from afterglow.runs import lifecycle

Act = Callable[[Request], Awaitable[Response]]

REPLAYED = "idempotent-replayed"
MAX_KEY_CHARS = 255
# They change nothing, so they are done again; what they find may be gone by then, and is not kept.
SEARCHES = ("search_vector_store", "explain_search")
# Dry runs are as searches: they quote a whole prompt.
RUNS = ("create_run", "create_thread_and_run")
# They are read piece by piece, and what they are is known at their end.
FORMS = ("create_file", "create_upload_part")
# Their answers hold a secret that is shown once: it is not kept, and where nobody saw it, another one takes its place.
SECRETS = ("create_key", "create_webhook_endpoint", "rotate_webhook_secret")
# What shows an object by the id that a creating POST has noted, and that id's name in the path.
SHOWN_BY: dict[str, tuple[Act, str]] = {
    "create_assistant": (assistants.retrieve_assistant, "assistant_id"),
    "create_thread": (threads.retrieve_thread, "thread_id"),
    "create_message": (threads.retrieve_message, "message_id"),
    "create_file": (files.retrieve_file, "file_id"),
    "create_vector_store": (vector_stores.retrieve_vector_store, "vector_store_id"),
    "create_vector_store_file": (vector_stores.retrieve_vector_store_file, "file_id"),
    "create_file_batch": (vector_stores.retrieve_file_batch, "batch_id"),
    "create_webhook_endpoint": (webhooks.renew_webhook_secret, "endpoint_id"),
    "rotate_webhook_secret": (webhooks.renew_webhook_secret, "endpoint_id"),
    "resend_webhook_delivery": (webhooks.retrieve_webhook_delivery, "delivery_id"),
    "create_project": (organization.retrieve_project, "project_id"),
    "create_key": (organization.renew_key, "key_id"),
}
UPLOADS = ("create_upload", "complete_upload", "cancel_upload")


class _Streams(msgspec.Struct):
    """The part of a body that says how it wants to be answered."""

    stream: bool | None = False


class _File(msgspec.Struct):
    id: str = ""


class _Quoted(msgspec.Struct):
    """The ids in an answer: of the object, and of what it is in. file: that an upload has become."""

    id: str = ""
    thread_id: str = ""
    vector_store_id: str = ""
    webhook_endpoint_id: str = ""
    file: _File | None = None

    @property
    def owner_id(self) -> str:
        within = self.thread_id or self.vector_store_id or self.webhook_endpoint_id
        return within or (self.file.id if self.file else self.id)


def once(act: Act) -> Act:
    """The same route, for requests that may come twice."""

    @wraps(act)
    async def acted(request: Request) -> Response:
        try:
            _, key = retry_headers(request)
            if key is None or act.__name__ in SEARCHES or (act.__name__ in RUNS and is_dry_run(request)):
                return await act(request)
            return await _with_key(request, key, act)
        except Repeated as repeated:
            return _Again(await _answer_again(request, repeated))

    return acted


async def _with_key(request: Request, key: str, act: Act) -> Response:
    """Carry a request out, and keep its answer. What was refused leaves the key free."""
    if not 0 < len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise InvalidRequest(
            f"The Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable ASCII characters.",
            param="Idempotency-Key",
            code="invalid_value",
        )
    if act.__name__ not in FORMS:
        await origin_of(request)
    response = None
    try:
        response = await act(request)
    finally:
        if request.state.attempt is not None and (response is None or response.status_code >= 400):
            await _release(request)
    await _keep(request, response)
    return response


async def _release(request: Request) -> None:
    async def work(tx: Transaction) -> None:
        await request_rows.release_key(tx, project_of(request), request.state.request_id)

    with suppress(StoreError):  # then the key stays taken for CLAIM_LIFE_S
        await house_of(request).store.write(work)


async def _keep(request: Request, response: Response) -> None:
    """A stream need not be kept: the run's log is."""
    if type(response) is not Response or request.state.attempt is None:
        return
    text = bytes(response.body).decode()
    kept = "" if request.scope["endpoint"].__name__ in SECRETS else text
    quoted = msgspec.json.decode(text, type=_Quoted)
    origin, now = await origin_of(request), int(house_of(request).clock.now())
    ids = (quoted.id, quoted.owner_id)

    async def work(tx: Transaction) -> None:
        await request_rows.insert_answer(tx, project_of(request), origin, ids, response.status_code, kept, now)

    with suppress(StoreError):  # what was done is done; a repetition will read the object
        await house_of(request).store.write(work)


class _Again(Response):
    """Another answer, marked as one that was given before."""

    def __init__(self, answer: Response) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REPLAYED.encode(), b"true")]
            await send(message)

        await self._answer(scope, receive, marked)


async def _answer_again(request: Request, repeated: Repeated) -> Response:
    result, route = repeated.result, request.scope["endpoint"].__name__
    _, key = retry_headers(request)
    if route in SECRETS and key is not None:  # it may have been seen
        raise InvalidRequest(
            "This was done, and its answer held a secret that is shown once. Make a new one, with another "
            "Idempotency-Key.",
            param="Idempotency-Key",
            code="secret_shown_once",
        )
    if repeated.answer is not None:
        status, body = repeated.answer
        return Response(body, status, media_type=JSON)
    if route in SHOWN_BY:
        show, name = SHOWN_BY[route]
        request.path_params[name] = result.object_id
        return await show(request)
    if route in UPLOADS:
        return await _upload(request, result)
    if route == "create_upload_part":
        upload_id = request.path_params["upload_id"]
        return reply(UploadPart(id=result.object_id, created_at=result.created_at, upload_id=upload_id))
    return await _run(request, result)


async def _upload(request: Request, result: Result) -> Response:
    upload_id = request.path_params.get("upload_id", result.object_id)
    row = await house_of(request).store.read(lambda tx: upload_rows.get_upload(tx, project_of(request), upload_id))
    if row is None:
        raise NotFound.of("upload", upload_id)
    return reply(row.upload)


async def _run(request: Request, result: Result) -> Response:
    """A run as it is now; or, if the body asks for a stream, its log from where that stream began."""
    house, project, run_id = house_of(request), project_of(request), result.object_id

    async def work(tx: Transaction) -> tuple[RunRow, str]:
        thread_id = await run_rows.get_thread_of_run(tx, project, run_id)
        row = await run_rows.get_run(tx, project, thread_id or "", run_id)
        thread = await thread_rows.get_thread_object(tx, project, thread_id or "")
        if row is None or thread is None:
            raise NotFound.of("run", run_id)
        return row, thread

    row, thread = await house.store.read(work)
    body = await request.body()
    if not (body and msgspec.json.decode(body, type=_Streams).stream):
        return reply((await lifecycle.retrieve_run(house, project, row.run.thread_id, run_id)).text)
    first = f"event: thread.created\ndata: {thread}\n\n" if "thread_id" not in request.path_params else ""
    return EventStream(house, project, run_id, result.since, first=first.encode())
