"""Requests that come twice: with an idempotency key, and as the SDKs send them again by themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import openai
import pytest

from afterglow.api import attempts, edge, idempotency
from afterglow.app import ROUTES
from afterglow.connection import Connection
from afterglow.contracts import Transaction
from afterglow.objects import WebhookEvent
from afterglow.rows import requests as request_rows
from afterglow.rows.webhooks import get_endpoint, insert_delivery
from afterglow.testing import SetClock, calls, says
from afterglow.webhooks import new_delivery
from tests.api.streams import stored
from tests.api.test_keys import ADMIN
from tests.api.wire import Answer, Json, Wire, until
from tests.conftest import GET_WEATHER, Server, ServerFactory

KEY = {"idempotency-key": "k-1"}
HELLO = {"role": "user", "content": "hello"}


def retry(count: int) -> dict[str, str]:
    return {"x-stainless-retry-count": str(count)}


async def sent(wire: Wire, path: str, body: Any = None, key: str = "k-1", **options: Any) -> Answer:
    """POST with an idempotency key."""
    return await wire.post(path, body, headers={"idempotency-key": key}, **options)


def replayed(answer: Answer) -> bool:
    return answer.headers.get("idempotent-replayed") == "true"


async def count(server: Server, table: str) -> int:
    rows = await server.house.store.read(lambda tx: tx.fetch(f"SELECT COUNT(*) FROM {table}"))
    return int(rows[0][0])


# --- idempotency keys ------------------------------------------------------------------------------------------


async def test_a_key_gives_the_same_answer_again(server: Server, wire: Wire):
    """Status and body as they were, though the object has changed since; nothing is made twice."""
    first = await sent(wire, "/threads", {"metadata": {"a": "b"}})
    await wire.post(f"/threads/{first.json['id']}", {"metadata": {"a": "c"}})
    again = await sent(wire, "/threads", {"metadata": {"a": "b"}})
    assert (again.status, again.content, replayed(again)) == (200, first.content, True)
    assert not replayed(first)
    assert await count(server, "threads") == 1


async def test_every_post_takes_a_key(server: Server, wire: Wire):
    """Cancel, modify, submit, uploads and their parts: done once, answered twice."""
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    assistant = (await sent(wire, "/assistants", {"model": "m", "tools": [GET_WEATHER]}, "a")).json
    run = await server.run("hi", assistant_id=assistant["id"])
    assert run.required_action is not None
    [call] = run.required_action.submit_tool_outputs.tool_calls
    path = f"/threads/{run.thread_id}/runs/{run.id}"
    server.model.will(says("rain"))
    outputs = {"tool_outputs": [{"tool_call_id": call.id, "output": "rain"}]}
    upload = (await sent(wire, "/uploads", UPLOAD, "u")).json
    part = await sent_form(wire, f"/uploads/{upload['id']}/parts", "p", {"data": b"abc"})
    await again_the_same(
        lambda: sent(wire, f"{path}/submit_tool_outputs", outputs, "s"),
        lambda: sent(wire, path, {"metadata": {"a": "b"}}, "m"),
        lambda: sent_form(wire, "/files", "f", {"file": b"abc"}, purpose="assistants"),
        lambda: sent_form(wire, f"/uploads/{upload['id']}/parts", "p", {"data": b"abc"}),
        lambda: sent(wire, f"/uploads/{upload['id']}/complete", {"part_ids": [part.json["id"]]}, "c"),
        lambda: sent(wire, "/vector_stores", {"name": "v"}, "v"),
    )
    assert await count(server, "files") == 2
    assert await count(server, "vector_stores") == 1


UPLOAD = {"filename": "a.txt", "purpose": "assistants", "bytes": 3, "mime_type": "text/plain"}


async def sent_form(wire: Wire, path: str, key: str, files: dict[str, bytes], **fields: str) -> Answer:
    """POST a form, with a boundary of its own each time."""
    named = {name: (f"{name}.txt", data) for name, data in files.items()}
    return await wire.post(path, headers={"idempotency-key": key}, files=named, data=fields)


async def again_the_same(*asks: Callable[[], Awaitable[Answer]]) -> None:
    for ask in asks:
        first, again = await ask(), await ask()
        assert first.status == 200, first.content
        assert (again.status, again.content, replayed(again)) == (200, first.content, True)


async def test_a_run_is_cancelled_once(server: Server, wire: Wire):
    """The second answer to a cancel is the first, not that the run is over."""
    server.model.will([asyncio.Event()])
    assistant = await server.assistant()
    run = await wire.made("/threads/runs", {"assistant_id": assistant.id})
    path = f"/threads/{run['thread_id']}/runs/{run['id']}"
    first = await sent(wire, f"{path}/cancel")
    await wire.stopped(run)
    assert (await sent(wire, f"{path}/cancel")).content == first.content
    assert (await wire.post(f"{path}/cancel")).status == 400


@pytest.mark.parametrize(
    ("path", "body"), [("/threads", {"metadata": {"a": "c"}}), ("/assistants", {"model": "m"}), ("/threads?x=1", {})]
)
async def test_a_key_is_for_one_request(wire: Wire, path: str, body: Json):
    """Another body, path or query under the same key is refused, and not carried out."""
    await sent(wire, "/threads", {})
    response = await wire.client.post(f"/v1{path}", json=body, headers=KEY)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("idempotency_error", "idempotency_key_reused")
    assert error["param"] == "Idempotency-Key"


async def test_keys_are_apart(server: Server, wire: Wire, connect: Any):
    """Another key of the header's, or none, is another request."""
    first = await sent(wire, "/threads", {})
    assert (await sent(wire, "/threads", {}, "k-2")).json["id"] != first.json["id"]
    assert (await wire.post("/threads", {})).json["id"] != first.json["id"]


@pytest.mark.parametrize("key", ["", "k" * 256, "a\tb", "ä"])
async def test_a_key_is_short_and_printable(wire: Wire, key: str):
    """1 to 255 printable ASCII characters."""
    answer = await wire.post("/threads", {}, headers={b"idempotency-key": key.encode()})
    assert (answer.status, answer.fault.param) == (400, "Idempotency-Key")


async def test_what_was_refused_is_not_kept(server: Server, wire: Wire):
    """After a 400 or 404 the key is free for the same request, or another."""
    assert (await sent(wire, "/threads", b"{")).status == 400
    assert (await sent(wire, "/threads/thread_none/messages", HELLO)).status == 404
    assert (await sent(wire, "/threads", {})).status == 200
    assert await count(server, "requests") == 1


async def test_a_key_is_kept_for_a_day(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """After 24 hours the same key makes another object."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        wire = connect(server)
        first = await sent(wire, "/threads", {})
        clock.time += request_rows.KEYS_KEPT_S - 1
        assert (await sent(wire, "/threads", {})).content == first.content
        clock.time += 1
        assert (await sent(wire, "/threads", {})).json["id"] != first.json["id"]


async def test_while_the_first_is_executed_the_second_is_told_to_wait(
    server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch
):
    """409, which the SDKs try again, as long as nothing is committed."""
    going, go = asyncio.Event(), asyncio.Event()
    create = idempotency.threads.threads.create_thread

    async def slow(*arguments: Any) -> str:
        going.set()
        await go.wait()
        return await create(*arguments)

    monkeypatch.setattr(idempotency.threads.threads, "create_thread", slow)
    first = asyncio.create_task(sent(wire, "/threads", {}))
    await going.wait()
    second = await sent(wire, "/threads", {})
    assert (second.status, second.fault.code) == (409, "idempotency_key_in_use")
    go.set()
    assert (await first).status == 200
    assert (await sent(wire, "/threads", {})).content == (await first).content


async def test_a_crash_before_the_answer_was_kept(
    start_server: ServerFactory, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What was committed is answered from the objects themselves; nothing is made a second time."""

    async def lost(*_: Any) -> None:
        """The server stops here."""

    async with start_server(tmp_path, api_keys=(ADMIN,)) as server:
        with monkeypatch.context() as patched:
            patched.setattr(idempotency, "_keep", lost)
            first = await all_kinds(server, connect(server, "sk-admin"), under_its_name)
    async with start_server(tmp_path, api_keys=(ADMIN,)) as server:
        again = await all_kinds(server, connect(server, "sk-admin"), under_its_name, first)
        assert set(again) == CREATING
        for name, answer in again.items():
            if name in idempotency.SECRETS:
                assert (answer.status, answer.fault.code) == (400, "secret_shown_once")
            else:
                assert answer.json.get("id") == first[name].json["id"], (name, answer.content)
                assert replayed(answer)
        assert await counts(server) == EACH_ONCE


# What changes or finds something, and makes nothing: done again, it comes to the same.
DONE_AGAIN = {
    *("modify_assistant", "modify_thread", "modify_message", "modify_run", "modify_vector_store"),
    *("modify_vector_store_file", "modify_webhook_endpoint", "modify_project", "modify_key"),
    *("cancel_file_batch", "archive_project"),
    *("search_vector_store", "explain_search", "test_webhook_endpoint"),
}
CREATING = {act.__name__ for method, _, act in ROUTES if method == "POST"} - DONE_AGAIN
EACH_ONCE = {
    "assistants": 1,
    "threads": 2,
    "messages WHERE object LIKE '%\"user\"%'": 1,
    "runs": 2,
    "files": 2,
    "uploads": 2,
    "vector_stores": 1,
    "webhook_endpoints": 1,
    "projects": 2,
    "api_keys": 1,
}
# (name of the route, path, body) → its answer
Send = Callable[..., Awaitable[Answer]]


async def counts(server: Server) -> dict[str, int]:
    return {table: await count(server, table) for table in EACH_ONCE}


async def under_its_name(wire: Wire, name: str, path: str, body: Any = None, **options: Any) -> Answer:
    return await sent(wire, path, body, name, **options)


async def all_kinds(server: Server, wire: Wire, send: Send, made: dict[str, Answer] | None = None) -> dict[str, Answer]:
    """One of everything that can be created, by name of the route. made: what was made before is used."""
    await server.application.deliveries.drain()  # nothing is sent to app.example
    server.model.will(calls(("get_weather", {"city": "Oslo"})), says("Rain."), calls(("get_weather", {"city": "Rome"})))
    found: dict[str, Answer] = {}

    async def post(name: str, path: str, body: Any = None, **options: Any) -> str:
        found[name] = await send(wire, name, path, body, **options)
        object_id: str = (made or found)[name].json["id"]
        return object_id

    asked: Json = {
        "assistant_id": await post("create_assistant", "/assistants", {"model": "m", "tools": [GET_WEATHER]})
    }
    thread = f"/threads/{await post('create_thread', '/threads', {})}"
    await post("create_message", f"{thread}/messages", HELLO)
    path = f"{thread}/runs/{await post('create_run', f'{thread}/runs', asked)}"
    outputs = {"tool_outputs": [{"tool_call_id": await first_call(wire, path), "output": "rain"}]}
    await post("submit_tool_outputs", f"{path}/submit_tool_outputs", outputs)
    await wire.stopped(await wire.read(path))
    await post("create_thread_and_run", "/threads/runs", asked)
    run = (made or found)["create_thread_and_run"].json
    await wire.stopped(run)
    await post("cancel_run", f"/threads/{run['thread_id']}/runs/{run['id']}/cancel")
    form = {"files": {"file": ("a.txt", b"abc")}, "data": {"purpose": "assistants"}}
    file_id = await post("create_file", "/files", **form)
    upload = f"/uploads/{await post('create_upload', '/uploads', UPLOAD)}"
    to_cancel = (made["cancel_upload"].json if made else await wire.made("/uploads", UPLOAD))["id"]
    await post("cancel_upload", f"/uploads/{to_cancel}/cancel")
    part = await post("create_upload_part", f"{upload}/parts", files={"data": ("a", b"abc")})
    await post("complete_upload", f"{upload}/complete", {"part_ids": [part]})
    store = f"/vector_stores/{await post('create_vector_store', '/vector_stores', {'name': 'v'})}"
    await post("create_vector_store_file", f"{store}/files", {"file_id": file_id})
    await post("create_file_batch", f"{store}/file_batches", {"file_ids": [file_id]})
    hook = {"url": "https://app.example/hook", "event_types": ["*"]}
    endpoint_id = await post("create_webhook_endpoint", "/webhook_endpoints", hook)
    if made is None:
        await add_delivery(server, endpoint_id)
    endpoint = f"/webhook_endpoints/{endpoint_id}"
    await post("resend_webhook_delivery", f"{endpoint}/deliveries/whd_1/resend")
    await post("rotate_webhook_secret", f"{endpoint}/rotate_secret")
    await post("create_project", "/organization/projects", {"name": "Blue"})
    await post("create_key", "/organization/projects/default/api_keys", {"name": "a key"})
    return found


async def add_delivery(server: Server, endpoint_id: str) -> None:
    event = WebhookEvent(id="evt_1", created_at=1, type="thread.run.completed", data={})
    delivery = msgspec.structs.replace(new_delivery(endpoint_id, event, 1), id="whd_1")
    await server.house.store.write(lambda tx: insert_delivery(tx, "default", delivery, "", 1, 2.0**40))


async def first_call(wire: Wire, run: str) -> str:
    await wire.stopped(await wire.read(run))
    first = (await wire.read(f"{run}/steps?order=asc"))["data"][0]
    call_id: str = first["step_details"]["tool_calls"][0]["id"]
    return call_id


async def test_every_creating_post_whose_answer_was_lost_is_retried_without_harm(
    start_server: ServerFactory, connect: Any, tmp_path: Path, lose: Any
):
    """Each kind of object is there once, the retry's answer is of it, and a secret that it is told counts."""

    async def lost(wire: Wire, name: str, path: str, body: Any = None, **options: Any) -> Answer:
        lose(1)
        with pytest.raises(httpx2.TransportError):
            await wire.post(path, body, **options)
        again = await wire.post(path, body, headers=retry(1), **options)
        assert (again.status, replayed(again)) == (200, True), (name, again.content)
        return again

    async with start_server(tmp_path, api_keys=(ADMIN,)) as server:
        wire = connect(server, "sk-admin")
        found = await all_kinds(server, wire, lost)
        assert set(found) == CREATING
        assert await counts(server) == EACH_ONCE
        await usable(server, wire, found)


async def usable(server: Server, wire: Wire, found: dict[str, Answer]) -> None:
    """Secrets that a retry was given are the ones that count."""
    endpoint_id = found["create_webhook_endpoint"].json["id"]
    row = await server.house.store.read(lambda tx: get_endpoint(tx, "default", endpoint_id))
    assert row is not None
    assert row.secret == found["rotate_webhook_secret"].json["signing_secret"]
    key = found["create_key"].json["value"]
    assert (await wire.get("/threads", headers={"authorization": f"Bearer {key}"})).status == 200


async def test_a_crash_before_the_commit(server: Server, wire: Wire):
    """A key that a stopped server held, and made nothing with, is free."""
    await sent(wire, "/threads", {})

    async def forget(tx: Transaction) -> None:
        await tx.execute("DELETE FROM answers")
        await tx.execute("UPDATE requests SET object_id = '', created_at = created_at - 3600")

    await server.house.store.write(forget)
    assert not replayed(await sent(wire, "/threads", {}))
    assert await count(server, "threads") == 2


async def test_who_lost_its_key_makes_nothing(server: Server, wire: Wire):
    """A slow server whose key another request was given meanwhile rolls back."""
    origin = request_rows.Origin("req_gone", "key_any", "create_thread", "00", 0, "k-9")
    with pytest.raises(attempts.Conflict):
        await server.house.store.write(lambda tx: request_rows.insert_request(tx, "default", origin, "thread_1", 1))


@pytest.mark.parametrize("deleted", ["object", "thread"])
async def test_answers_go_with_what_they_quote(server: Server, wire: Wire, deleted: str):
    """Once a message or its thread is deleted, its kept answer is gone, too."""
    thread = (await sent(wire, "/threads", {}, "t")).json
    path = f"/threads/{thread['id']}/messages"
    message = (await sent(wire, path, HELLO)).json
    await wire.delete(path.removesuffix("/messages") if deleted == "thread" else f"{path}/{message['id']}")
    kept = await server.house.store.read(lambda tx: tx.fetch("SELECT body FROM answers"))
    assert not [body for (body,) in kept if "hello" in body]
    assert (await sent(wire, path, HELLO)).status == 404


async def test_a_stream_is_joined(server: Server, wire: Wire):
    """A repeated streaming request gets the same bytes, while the first still runs and after it."""
    go = asyncio.Event()
    server.model.will([*says("Hello "), go, *says("you.")][:-1] + says("you."))
    assistant = await server.assistant()
    body = {"assistant_id": assistant.id, "stream": True, "thread": {"messages": [HELLO]}}
    first = asyncio.create_task(sent(wire, "/threads/runs", body))
    await until(lambda: server.model.requests)
    second = asyncio.create_task(sent(wire, "/threads/runs", body))
    await asyncio.sleep(0.05)
    go.set()
    third = await sent(wire, "/threads/runs", body)
    assert (await first).content == (await second).content == third.content
    assert replayed(third)
    assert third.content.startswith(b"event: thread.created")
    assert await count(server, "runs") == 1


# --- retries of the SDKs ---------------------------------------------------------------------------------------


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> openai.AsyncOpenAI:
    """The official client with its own retries, without their pauses."""
    client = server.client.with_options(max_retries=2)
    monkeypatch.setattr(type(client), "_calculate_retry_timeout", lambda *_: 0.001)
    return client


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`lose(2)`: the connections of the next two POSTs break when their answers begin."""
    left = 0
    send = edge._Exchange.send

    async def broken(exchange: Any, message: Any) -> None:
        nonlocal left
        if left and message["type"] == "http.response.start" and exchange._scope["method"] == "POST":
            left -= 1
            exchange._scope[edge.GONE].args[0].transport.abort()
        await send(exchange, message)

    def lose_next(number: int) -> None:
        nonlocal left
        left = number

    monkeypatch.setattr(edge._Exchange, "send", broken)
    return lose_next


@pytest.mark.parametrize("lost", [1, 2])
async def test_an_sdk_that_lost_the_answer_makes_one_object(server: Server, client: Any, lose: Any, lost: int):
    """Once or twice: threads, messages, runs and files are there once, and the SDK has them."""
    server.model.will(says("Hello."), says("Hello."))
    assistant = await server.assistant()
    lose(lost)
    thread = await client.beta.threads.create()
    lose(lost)
    message = await client.beta.threads.messages.create(thread.id, role="user", content="hi")
    lose(lost)
    run = await client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
    assert (await server.poll(run)).status == "completed"
    lose(lost)
    file = await client.files.create(file=b"abc", purpose="assistants")
    assert [thread.id] == [one.id async for one in all_threads(server)]
    assert (await client.beta.threads.messages.list(thread.id, order="asc")).data[0].id == message.id
    assert [one.id for one in (await client.beta.threads.runs.list(thread.id)).data] == [run.id]
    assert [one.id for one in (await client.files.list()).data] == [file.id]


async def all_threads(server: Server) -> Any:
    for (thread_id,) in await server.house.store.read(lambda tx: tx.fetch("SELECT id FROM threads")):
        yield await server.client.beta.threads.retrieve(thread_id)


async def test_a_lost_stream_is_joined_from_its_start(server: Server, client: Any, lose: Any):
    """The SDK's retry of a streaming request reads the first run's whole log."""
    server.model.will(says("Hello you."))
    assistant = await server.assistant()
    thread = await client.beta.threads.create()
    lose(1)
    stream = await client.beta.threads.runs.create(thread.id, assistant_id=assistant.id, stream=True)
    events = [event async for event in stream]
    assert events[0].event == "thread.run.created"
    assert events[-1].event in ("thread.run.completed", "done")
    assert await count(server, "runs") == 1


async def test_outputs_that_were_lost_are_not_given_twice(server: Server, client: Any, lose: Any):
    """The retry of a submission gets the run, and as a stream what followed the outputs."""
    for streaming in (False, True):
        server.model.will(calls(("get_weather", {"city": "Oslo"})), says("rain"))
        run = await server.run("hi", tools=[GET_WEATHER])
        [call] = run.required_action.submit_tool_outputs.tool_calls  # type: ignore[union-attr]
        outputs = [{"tool_call_id": call.id, "output": "rain"}]
        lose(1)
        answer = await client.beta.threads.runs.submit_tool_outputs(
            run.id, thread_id=run.thread_id, tool_outputs=outputs, stream=streaming
        )
        if streaming:
            events = [event async for event in answer]
            assert events[0].event == "thread.run.step.completed"
            assert events[-1].event in ("thread.run.completed", "done")
        assert (await server.poll(run)).status == "completed"


async def test_equal_messages_that_were_answered_both_arrive(server: Server, wire: Wire):
    """A retry of a request that never came is carried out, however many equal ones were answered before."""
    thread = await wire.made("/threads")
    path = f"/threads/{thread['id']}/messages"
    for flushed in (False, True):
        await wire.made(path, HELLO)
        if flushed:
            await server.application._attempts.flush(server.house)
        assert not replayed(await wire.post(path, HELLO, headers=retry(1)))
    assert len((await wire.get(path)).ids) == 4


async def test_a_lost_result_is_given_to_one_retry(server: Server, wire: Wire, lose: Any):
    """A second retry of the same count is carried out: it is another's; so is one of a wrong count, key or body."""
    thread = await wire.made("/threads")
    path = f"/threads/{thread['id']}/messages"
    lose(1)
    with pytest.raises(httpx2.TransportError):
        await wire.post(path, HELLO)
    [first] = (await wire.get(path)).ids
    assert (await wire.post(path, HELLO, headers=retry(2))).json["id"] != first
    assert (await wire.post(path, {**HELLO, "metadata": {"a": "b"}}, headers=retry(1))).json["id"] != first
    assert (await wire.post(path, HELLO, headers=retry(0))).json["id"] != first
    matched = await wire.post(path, HELLO, headers=retry(1))
    assert (matched.json["id"], replayed(matched)) == (first, True)
    assert (await wire.post(path, HELLO, headers=retry(1))).json["id"] != first


async def test_an_old_result_is_nobodys(start_server: ServerFactory, connect: Any, tmp_path: Path, lose: Any):
    """After a quarter of an hour nobody is waiting any more."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        wire = connect(server)
        lose(1)
        with pytest.raises(httpx2.TransportError):
            await wire.post("/threads", {})
        clock.time += attempts.RETRIED_WITHIN_S + 1
        assert not replayed(await wire.post("/threads", {}, headers=retry(1)))


async def test_an_impatient_client_waits_for_its_first_request(
    server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch
):
    """A retry that comes while the first is carried out gets its result; but if that was heard, it is another's."""
    create, hung_up, lost = idempotency.threads.threads.create_thread, asyncio.Event(), Connection.connection_lost

    def noted(connection: Connection, error: Exception | None) -> None:
        lost(connection, error)
        hung_up.set()

    monkeypatch.setattr(Connection, "connection_lost", noted)
    for left in (True, False):
        going, go = asyncio.Event(), asyncio.Event()

        async def slow(*arguments: Any, going: asyncio.Event = going, go: asyncio.Event = go) -> str:
            going.set()
            await go.wait()
            return await create(*arguments)

        body = {"metadata": {"left": str(left)}}
        monkeypatch.setattr(idempotency.threads.threads, "create_thread", slow)
        first = asyncio.create_task(wire.post("/threads", body))
        await going.wait()
        if left:
            first.cancel()
            await hung_up.wait()
        second = asyncio.create_task(wire.post("/threads", body, headers=retry(1)))
        await asyncio.sleep(0.05)
        assert not second.done()
        go.set()
        assert replayed(await second) == left
    assert await count(server, "threads") == 3


async def test_a_stream_that_was_left_can_be_joined(server: Server, wire: Wire):
    """Whoever lost a stream in its middle gets all of it."""
    go = asyncio.Event()
    server.model.will([*says("Hello")[:-1], go, *says("you.")])
    body = {"assistant_id": (await server.assistant()).id, "stream": True}
    async with wire.client.stream("POST", "/v1/threads/runs", content=json.dumps(body)) as response:
        async for chunk in response.aiter_bytes():
            if b"message.delta" in chunk:
                break
    await until(lambda: not server.application._attempts._open)
    go.set()
    joined = await wire.post("/threads/runs", body, headers=retry(1))
    assert replayed(joined)
    assert await count(server, "runs") == 1
    [run_id] = (await server.house.store.read(lambda tx: tx.fetch("SELECT id FROM runs")))[0]
    assert await stored(server, run_id) in joined.content
