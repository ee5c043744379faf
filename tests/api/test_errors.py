"""Errors: their envelope, their words, which comes first, and what the official client makes of them."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from typing import Any

import openai
import pytest

from afterglow.app import OPEN_ROUTES, ROUTES, database_path
from afterglow.contracts import Work
from afterglow.errors import AfterglowError, ModelUnreachable, StoreFull, StoreUnavailable
from afterglow.testing import calls, says
from tests.api.wire import Fault, Json, Wire, not_found
from tests.conftest import GET_WEATHER, Server

SORRY = "The server had an error while processing your request. Sorry about that!"
NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON. If you have trouble "
    "figuring out how to fix this, please contact us through our help center at help.openai.com.)"
)
NO_BETA = (
    "You must provide the 'OpenAI-Beta' header to access the Assistants API. Please try again by setting the header "
    "'OpenAI-Beta: assistants=v2'."
)
# The smallest body that each route with a body takes.
BODIES: dict[str, Json] = {
    "create_assistant": {"model": "m"},
    "modify_assistant": {},
    "create_thread": {},
    "modify_thread": {},
    "create_message": {"role": "user", "content": "hi"},
    "modify_message": {},
    "create_run": {"assistant_id": "asst_x"},
    "create_thread_and_run": {"assistant_id": "asst_x"},
    "modify_run": {},
    "submit_tool_outputs": {"tool_outputs": []},
    "create_vector_store": {},
    "modify_vector_store": {},
    "search_vector_store": {"query": "q"},
    "explain_search": {"query": "q"},
    "create_vector_store_file": {"file_id": "file-x"},
    "modify_vector_store_file": {"attributes": {}},
    "create_file_batch": {"file_ids": ["file-x"]},
    "create_project": {"name": "n"},
    "modify_project": {},
    "create_key": {},
    "modify_key": {},
    "create_webhook_endpoint": {"name": "n", "url": "https://app.example/", "event_types": ["*"]},
    "modify_webhook_endpoint": {},
    "rotate_webhook_secret": {},
    "test_webhook_endpoint": {},
}
EMPTY_OK = ("create_thread", "create_vector_store", "rotate_webhook_secret", "test_webhook_endpoint")
# Those that an older validator reads, in words of its own.
OLDER_BODIES: dict[str, Json] = {
    "create_upload": {"filename": "a", "purpose": "assistants", "bytes": 1, "mime_type": "text/plain"},
    "complete_upload": {"part_ids": ["part_x"]},
}
FORMS = {"create_file", "create_upload_part"}
METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE")


def filled(path: str, **ids: str) -> str:
    """A path of the route table with ids in it: `thread_x` where none is given."""
    return re.sub(r"{(\w+?)(?:_id)?(?::path)?}", lambda found: ids.get(found[1], f"{found[1]}_x"), path)


# --- routes ----------------------------------------------------------------------------------------------------


async def test_what_is_not_served_is_an_invalid_url(wire: Wire):
    """Unknown paths, trailing slashes, empty ids and paths without `/v1` are 404 with method and path; no redirects."""
    for method, path in (
        ("GET", "/v1/x"),
        ("POST", "/v1/threads/thread_x/archive"),
        ("GET", "/v1/threads/thread_x/messages/msg_x/files"),
        ("GET", "/v1/assistants/"),
        ("POST", "/v1/threads/"),
        ("POST", "/v1//threads"),
        ("GET", "/v1/threads//messages"),
        ("GET", "/v1/Assistants"),
        ("GET", "/v2/assistants"),
        ("GET", "/v1"),
        ("GET", "/v1/"),
        ("GET", "/"),
        ("POST", "/threads"),
        ("GET", "/assistants"),
        ("GET", "/openai"),
        ("GET", "/v1/healthz"),
    ):
        answer = await wire.ask(method, f"/{path}")
        assert answer.fault == Fault(404, f"Invalid URL ({method} {path})")


async def test_a_method_that_is_not_served_is_an_invalid_url(wire: Wire):
    """Every path under every other method than its own is a 404 with method and path, never a 405."""
    served: dict[str, set[str]] = {}
    for method, path, _ in [(method, f"/v1{path}", act) for method, path, act in ROUTES] + OPEN_ROUTES:
        served.setdefault(filled(path), set()).add(method)
    served["/v1/threads/runs"] |= served["/v1/threads/thread_x"]
    for path, methods in served.items():
        for method in set(METHODS) - methods:
            answer = await wire.ask(method, f"/{path}")
            assert answer.fault == Fault(404, f"Invalid URL ({method} {path})")


async def test_what_is_missing_is_named(server: Server, wire: Wire):
    """Each route tells which object is not there, by its noun and the id asked for, the outer one first."""
    server.model.will(says("Hello."))
    run = await server.run("hi")
    store = await wire.made("/vector_stores")
    endpoint = await wire.made("/webhook_endpoints", BODIES["create_webhook_endpoint"])
    here = {"thread": run.thread_id, "run": run.id, "vector_store": store["id"], "project": "default"}
    here["endpoint"] = endpoint["id"]
    for method, path, act in ROUTES:
        wanted = re.findall(r"{(\w+)_id}", path) if act.__name__ not in FORMS else []
        for position, name in enumerate(wanted):
            given = {outer: here[outer] for outer in wanted[:position]}
            answer = await wire.ask(method, filled(path, **given), (BODIES | OLDER_BODIES).get(act.__name__))
            fault = not_found(name, f"{name}_x")
            if wanted == ["vector_store", "file"] and position:
                fault = Fault(404, f"No file found with id 'file_x' in vector store '{store['id']}'.")
            assert answer.fault == fault, (method, path)


# --- bodies ----------------------------------------------------------------------------------------------------


def test_every_route_with_a_body_is_known():
    """All POST routes but cancels, forms and uploads are tried with bad bodies below."""
    without = ("cancel_run", "cancel_upload", "cancel_file_batch", "archive_project", "resend_webhook_delivery")
    posts = {act.__name__ for method, _, act in ROUTES if method == "POST"}
    assert posts == {*BODIES, *OLDER_BODIES, *FORMS, *without}


async def test_every_body_is_read_alike(wire: Wire):
    """On each route a body that is no JSON or no object, or has an unknown key, is refused before any look-up."""
    for method, path, act in ROUTES:
        body = BODIES.get(act.__name__)
        if method != "POST" or body is None:
            continue
        place = filled(path)
        for broken in (b"{", b"not json", b'{"a":1}}', b"\xff", b'{"a": NaN}', b"'{}'", b" "):
            assert (await wire.post(place, broken)).fault == Fault(400, NOT_JSON), (place, broken)
        for plain, name in (([], "an array"), ("x", "a string"), (1, "an integer"), (1.5, "a decimal number")):
            message = f"Invalid type: expected an object, but got {name} instead."
            assert (await wire.post(place, plain)).fault == Fault(400, message, None, "invalid_type")
        message = "Unknown parameter: 'colour'."
        refusal = await wire.post(place, {**body, "colour": 1})
        assert refusal.fault == Fault(400, message, "colour", "unknown_parameter")
        if act.__name__ not in EMPTY_OK:
            assert (await wire.post(place, b"")).fault == Fault(400, NOT_JSON)


async def test_the_content_type_does_not_matter(wire: Wire):
    """A body is read as JSON whatever the header calls it."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "", "application/json; charset=latin-1"):
        made = await wire.post("/assistants", {"model": "m"}, headers={"content-type": content_type})
        assert made.status == 200


async def test_earlier_checks_come_first(server: Server, wire: Wire, connect: Any):
    """Key, beta header, route, JSON, validation, lookup and state are checked in this order."""
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    run = await server.run("hi", tools=[GET_WEATHER])
    busy = f"/threads/{run.thread_id}/runs"
    nobody = connect(server, "")
    beta = {"openai-beta": "assistants=v1"}
    for client, path, body, headers, fault in (
        (nobody, "/nowhere", b"{", beta, "You didn't provide an API key."),
        (wire, "/nowhere", b"{", beta, NO_BETA),
        (wire, "/nowhere", b"{", {}, "Invalid URL (POST /v1/nowhere)"),
        (wire, "/threads/thread_x/runs", b"{", {}, NOT_JSON),
        (wire, "/threads/thread_x/runs", {"assistant_id": 1}, {}, "Invalid type for 'assistant_id'"),
        (wire, "/threads/thread_x/runs", {"assistant_id": "asst_x"}, {}, "No thread found"),
        (wire, busy, {"assistant_id": 1}, {}, "Invalid type for 'assistant_id'"),
        (wire, busy, {"assistant_id": run.assistant_id}, {}, f"Thread {run.thread_id} already has an active run"),
    ):
        answer = await client.post(path, body, headers=headers)
        assert answer.fault.message.startswith(fault)


# --- state -----------------------------------------------------------------------------------------------------


async def test_a_run_needs_an_assistant(wire: Wire):
    """An assistant that is not there is a 404; what cannot be an assistant's id is a 400 that says so."""
    thread = await wire.made("/threads")
    for path in (f"/threads/{thread['id']}/runs", "/threads/runs"):
        missing = await wire.post(path, {"assistant_id": "asst_x"})
        assert missing.fault == Fault(404, "No assistant found with id 'asst_x'.")
        wrong = await wire.post(path, {"assistant_id": "x"})
        message = "Invalid 'assistant_id': 'x'. Expected an ID that begins with 'asst'."
        assert wrong.fault == Fault(400, message, "assistant_id", "invalid_value")
    assert (await wire.get("/threads")).ids == [thread["id"]]
    assert (await wire.read(f"/threads/{thread['id']}/runs"))["data"] == []


async def test_a_run_that_is_over_takes_nothing(server: Server, wire: Wire):
    """Cancelling it or giving it outputs is refused with its status."""
    server.model.will(says("Hello."))
    run = await server.run("hi")
    path = f"/threads/{run.thread_id}/runs/{run.id}"
    assert (await wire.post(f"{path}/cancel")).fault == Fault(400, "Cannot cancel run with status 'completed'.")
    outputs = {"tool_outputs": [{"tool_call_id": "call_x", "output": ""}]}
    refusal = Fault(400, 'Runs in status "completed" do not accept tool outputs.')
    assert (await wire.post(f"{path}/submit_tool_outputs", outputs)).fault == refusal
    assert (await wire.made(path, {"metadata": {"late": "yes"}}))["metadata"] == {"late": "yes"}


# --- the official client ---------------------------------------------------------------------------------------


async def test_the_official_client_raises_its_own_kind(server: Server):
    """Each status becomes the client's exception, with message, type, param, code and request id in their places."""
    api = server.client.beta
    with pytest.raises(openai.NotFoundError) as missing:
        await api.assistants.retrieve("asst_x")
    assert missing.value.body == {
        "message": "No assistant found with id 'asst_x'.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert re.fullmatch("req_[0-9a-f]{32}", missing.value.request_id or "")
    with pytest.raises(openai.BadRequestError) as refused:
        await api.assistants.create(model="m", temperature=3)
    assert (refused.value.code, refused.value.param) == ("decimal_above_max_value", "temperature")
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as model:
        await server.client.models.retrieve("nobody")
    assert (model.value.code, model.value.param) == ("model_not_found", "model")


# --- our own faults --------------------------------------------------------------------------------------------


class BrokenStore:
    """Answers everything with one error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def read(self, work: Work[Any]) -> Any:
        raise self._error

    write = read


FULL = "The server's disk is full; nothing of this request was stored."
BROKEN = "The server's database cannot be used just now; nothing of this request was stored."


async def test_faults_of_ours_tell_nothing(server: Server, wire: Wire):
    """A full disk, a broken database and a bug of ours are server errors without internals; then things go on."""
    house = server.house
    assert (await wire.get("/assistants")).status == 200  # the key is known from here on
    for error, status, retry_after, message in (
        (StoreFull("/secret/path"), 503, "30", FULL),
        (StoreUnavailable("/secret/path"), 503, "1", BROKEN),
        (KeyError("/secret/path"), 500, None, SORRY),
        (AfterglowError("/secret/path"), 500, None, SORRY),
    ):
        house.store, store = BrokenStore(error), house.store  # type: ignore[assignment]
        try:
            answers = [await wire.get("/assistants"), await wire.post("/threads")]
        finally:
            house.store = store
        for answer in answers:
            assert answer.fault == Fault(status, message)
            assert answer.headers.get("retry-after") == retry_after
            assert b"secret" not in answer.content
    assert (await wire.read("/threads"))["data"] == []


async def test_not_ready_while_the_database_is_broken(server: Server, wire: Wire):
    """/readyz says 503 while nothing can be written, /healthz goes on saying 200."""
    house = server.house
    house.store, store = BrokenStore(StoreFull("x")), house.store  # type: ignore[assignment]
    try:
        assert (await wire.get("//readyz")).fault == Fault(503, "The database cannot be written.")
        assert (await wire.get("//healthz")).json["status"] == "ok"
    finally:
        house.store = store
    assert (await wire.get("//readyz")).json == {"status": "ready"}


@pytest.mark.usefixtures("on_sqlite")
async def test_being_ready_is_tried_by_writing(server: Server, wire: Wire):
    """/readyz commits a change each time, which another connection sees; /healthz touches nothing."""
    with closing(sqlite3.connect(database_path(server.house.settings))) as beside:
        versions = []
        for path in ("//healthz", "//readyz", "//readyz"):
            assert (await wire.get(path)).status == 200
            versions.append(beside.execute("PRAGMA data_version").fetchone()[0])
    assert len(set(versions)) == 3


async def test_a_model_server_that_is_gone_is_unavailable(server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch):
    """A passed-on request whose upstream cannot be reached is a 503 that may be tried again."""

    async def forward(*_: object) -> None:
        raise ModelUnreachable("No connection to the model server.")

    monkeypatch.setattr(server.model, "forward", forward)
    answer = await wire.post("/embeddings", {"model": "m", "input": "x"})
    assert answer.fault == Fault(503, "No connection to the model server.")
    assert answer.headers["retry-after"] == "1"
