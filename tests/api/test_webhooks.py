"""Webhooks: endpoints, the events that are sent to them, tries, and the log of deliveries."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow import deliveries, webhooks
from afterglow.deliveries import LONGEST_ASKED_S, WAITS_S, asked_wait_s
from afterglow.errors import ModelBroke, Unreadable
from afterglow.objects import WEBHOOK_EVENT_TYPES
from afterglow.testing import SetClock, calls, ended, says
from afterglow.webhooks import sample_data, tidy_deliveries, wants
from tests.api.stores import make_store, upload
from tests.api.wire import Wire, until
from tests.conftest import GET_WEATHER, Server, ServerFactory
from tests.scripted_server import Received, ScriptedServer, reply

ENDPOINTS = "/webhook_endpoints"
HOOK = {"url": "https://app.example/hook", "event_types": ["*"]}


class Target(ScriptedServer):
    """Takes webhooks at /hook. secret: of the endpoint that leads there."""

    secret = ""

    @property
    def hook(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def posts(self) -> list[Received]:
        return [request for request in self.requests if request.path.startswith("/hook")]

    @property
    def types(self) -> list[str]:
        return [post.json["type"] for post in self.posts]

    async def got(self, count: int) -> list[dict[str, Any]]:
        """The first events that were sent, once there are so many; each verified as a receiver does."""
        await until(lambda: len(self.posts) >= count)
        return [unwrapped(self.secret, post) for post in self.posts[:count]]


def unwrapped(secret: str, post: Received) -> dict[str, Any]:
    """The event as the official client reads it. Raises InvalidWebhookSignatureError."""
    client = openai.OpenAI(api_key="unused", webhook_secret=secret, http_client=openai.DefaultHttpxClient(verify=False))
    with client:
        return client.webhooks.unwrap(post.body, post.headers).to_dict(mode="json")


@pytest.fixture
async def target() -> AsyncGenerator[Target, None]:
    async with Target() as target:
        target.on("POST /hook", reply({}))
        yield target


@pytest.fixture
async def server(tmp_path: Path, start_server: ServerFactory) -> AsyncGenerator[Server, None]:
    async with start_server(tmp_path / "data", private_webhooks=True) as server:
        yield server


@pytest.fixture
def clock() -> SetClock:
    """Near the real time, which receivers compare with."""
    return SetClock(time.time())


@pytest.fixture
async def timed(tmp_path: Path, start_server: ServerFactory, clock: SetClock) -> AsyncGenerator[Server, None]:
    """A server whose clock is `clock`."""
    async with start_server(tmp_path / "data", clock=clock, private_webhooks=True) as server:
        yield server


@pytest.fixture
def timed_wire(timed: Server, connect: Any) -> Wire:
    wire: Wire = connect(timed)
    return wire


@asynccontextmanager
async def silent_target() -> AsyncGenerator[tuple[str, list[int]], None]:
    """Takes connections and says nothing; yields its URL and how many it has had."""
    taken = [0]

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken[0] += 1
        await reader.read()
        while await reader.read(1024):
            pass
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/hook", taken


async def register(wire: Wire, target: Target, *event_types: str, **fields: Any) -> str:
    """Make the target an endpoint; its id."""
    made = await wire.made(ENDPOINTS, {"url": target.hook, "event_types": list(event_types) or ["*"], **fields})
    target.secret = made["signing_secret"]
    return str(made["id"])


async def log_of(wire: Wire, endpoint_id: str) -> list[dict[str, Any]]:
    """Its deliveries, the oldest first."""
    return list((await wire.get(f"{ENDPOINTS}/{endpoint_id}/deliveries?order=asc")).json["data"])


async def logged(wire: Wire, endpoint_id: str, status: str, *, tries: int = 1) -> dict[str, Any]:
    """Its one delivery, once it has this status and so many tries."""
    async with asyncio.timeout(10):
        while True:
            [one] = await log_of(wire, endpoint_id)
            if one["status"] == status and len(one["tries"]) == tries:
                return one
            await asyncio.sleep(0.002)


# --- events ----------------------------------------------------------------------------------------------------


async def test_a_run_that_completes_is_told(server: Server, wire: Wire, target: Target) -> None:
    """The end of a run reaches the endpoint, signed as the SDK verifies it, with ids and facts and no text; a test
    event has the same keys."""
    endpoint_id = await register(wire, target)
    server.model.will(says("It is a secret."))
    run = await server.run("Tell nobody.")
    [event] = await target.got(1)
    assert re.fullmatch("evt_[0-9A-Za-z]{24}", event["id"])
    assert event == {
        "id": target.posts[0].headers["webhook-id"],
        "object": "event",
        "created_at": event["created_at"],
        "type": "thread.run.completed",
        "data": {
            "id": run.id,
            "thread_id": run.thread_id,
            "assistant_id": run.assistant_id,
            "status": "completed",
            "last_error_code": None,
            "incomplete_reason": None,
        },
    }
    assert sample_data(event["type"]).keys() == event["data"].keys() | {"test"}
    delivery = await logged(wire, endpoint_id, "delivered")
    assert delivery["event"] == event
    assert [one["status_code"] for one in delivery["tries"]] == [200]
    assert delivery["next_try_at"] is None


async def test_a_run_that_waits_and_is_cancelled_is_told_twice(server: Server, wire: Wire, target: Target) -> None:
    """requires_action is an event, and so is what a caller does to a run that nobody executes."""
    await register(wire, target)
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    await target.got(1)
    await server.client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)
    await target.got(2)
    assert target.types == ["thread.run.requires_action", "thread.run.cancelled"]
    assert b"Oslo" not in target.posts[0].body


async def test_runs_that_do_not_end_well_are_told(
    timed: Server, timed_wire: Wire, target: Target, clock: SetClock
) -> None:
    """Failed, incomplete and expired runs come with the code or the reason."""
    await register(timed_wire, target)
    timed.model.will([ModelBroke("The model is on fire.")], [*says("Half of")[:-1], ended("length")])
    await timed.run("One")
    await timed.run("Two")
    timed.model.will(calls(("get_weather", {"city": "Oslo"})))
    run = await timed.run("Three", tools=[GET_WEATHER])
    clock.time += 601
    await timed.client.beta.threads.runs.retrieve(run.id, thread_id=run.thread_id)
    await until(lambda: len(set(target.types)) == 4)  # one may come twice: its lease ends when the clock jumps
    told = {post.json["type"]: post.json["data"] for post in target.posts}
    assert told["thread.run.failed"]["last_error_code"] == "server_error"
    assert told["thread.run.incomplete"]["incomplete_reason"] == "max_completion_tokens"
    assert told["thread.run.expired"]["id"] == run.id
    assert not any(b"on fire" in post.body for post in target.posts)


async def test_files_of_vector_stores_are_told(server: Server, wire: Wire, target: Target) -> None:
    """Each file that is indexed, or cannot be, and each batch that waits for none any more."""
    await register(wire, target, "vector_store.*")
    store = await server.client.vector_stores.create()
    server.parser.fails["a.exe"] = Unreadable("unsupported_file", "It cannot be read.")
    good, bad = await upload(server), await upload(server, name="a.exe")
    batch = await server.client.vector_stores.file_batches.create(store.id, file_ids=[good, bad])
    await target.got(3)
    told = {post.json["type"]: post.json["data"] for post in target.posts}
    assert told["vector_store.file.completed"] == {
        "id": good,
        "vector_store_id": store.id,
        "status": "completed",
        "last_error_code": None,
    }
    assert told["vector_store.file.failed"]["last_error_code"] == "unsupported_file"
    over = told["vector_store.file_batch.completed"]
    assert (over["id"], over["vector_store_id"]) == (batch.id, store.id)
    assert all(sample_data(kind).keys() == data.keys() | {"test"} for kind, data in told.items())
    assert over["file_counts"] == {"in_progress": 0, "completed": 1, "failed": 1, "cancelled": 0, "total": 2}


async def test_a_batch_that_is_cancelled_is_told_with_its_files(server: Server, wire: Wire, target: Target) -> None:
    """Cancelling tells of each file that was in progress and, once, of the batch."""
    await register(wire, target, "vector_store.*")
    store = await server.client.vector_stores.create()
    server.parser.holds["cats.txt"] = asyncio.Event()
    batch = await server.client.vector_stores.file_batches.create(store.id, file_ids=[await upload(server)])
    await server.client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id)
    await server.client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id)
    await target.got(2)
    assert sorted(target.types) == ["vector_store.file.cancelled", "vector_store.file_batch.cancelled"]


async def test_a_batch_of_nothing_new_is_over_at_once(server: Server, wire: Wire, target: Target) -> None:
    """A batch of files that are indexed already is told of, too, and a file that is detached ends its batch."""
    store_id, ids = await make_store(server, b"one")
    await register(wire, target, "vector_store.file_batch.*")
    await server.client.vector_stores.file_batches.create(store_id, file_ids=ids)
    await target.got(1)
    server.parser.holds["cats.txt"] = asyncio.Event()
    file_id = await upload(server)
    await server.client.vector_stores.file_batches.create(store_id, file_ids=[file_id])
    await server.client.vector_stores.files.delete(file_id, vector_store_id=store_id)
    await target.got(2)
    assert target.types == ["vector_store.file_batch.completed"] * 2


async def test_an_endpoint_gets_what_it_asked_for(server: Server, wire: Wire, target: Target) -> None:
    """Other events, and those of the time when it was disabled, are not recorded for it."""
    other = await register(wire, target, "thread.run.failed", "vector_store.*")
    off = await register(wire, target, status="disabled")
    on = await register(wire, target, "thread.run.*")
    await server.run("Hello")
    await target.got(1)
    assert len(target.posts) == 1
    assert [len(await log_of(wire, one)) for one in (other, off, on)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["*"], 11),
        (["thread.*"], 6),
        (["thread.run.*"], 6),
        (["thread.run.completed"], 1),
        (["vector_store.file.*"], 3),
        (["vector_store.file_batch.cancelled", "thread.run.failed"], 2),
    ],
)
def test_what_patterns_stand_for(patterns: list[str], told: int) -> None:
    """A name stands for itself, and a beginning that ends with a dot for all that begin so."""
    assert sum(wants(patterns, event_type) for event_type in WEBHOOK_EVENT_TYPES) == told


# --- endpoints -------------------------------------------------------------------------------------------------


async def test_the_sdk_manages_endpoints(server: Server, wire: Wire, target: Target) -> None:
    """All that `client.webhooks` does works with this server."""
    hooks = server.client.webhooks
    made = await hooks.create(name="mine", url=target.hook, event_types=["thread.run.*"])  # type: ignore[list-item]
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
    second = await hooks.create(name="other", url=target.hook, event_types=["*"])  # type: ignore[list-item]
    assert [one.id async for one in hooks.list(limit=1)] == [second.id, made.id]
    changed = await hooks.update(made.id, name="ours", event_types=["*"])  # type: ignore[list-item]
    assert (changed.name, changed.url, changed.event_types) == ("ours", target.hook, ["*"])
    assert await hooks.retrieve(made.id) == changed
    assert (await hooks.event_types.list()).data == list(WEBHOOK_EVENT_TYPES)
    tested = await hooks.test(made.id, event_type="thread.run.failed")  # type: ignore[arg-type]
    assert (tested.status_code, tested.event_type) == (200, "thread.run.failed")
    target.secret = made.signing_secret
    [event] = await target.got(1)
    assert event["data"]["status"] == "failed"
    assert event["data"]["test"] is True
    assert (await hooks.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError, match="No webhook endpoint found"):
        await hooks.retrieve(made.id)


async def test_the_secret_is_shown_once(
    server: Server, wire: Wire, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """No other answer has it, and no log."""
    caplog.set_level(logging.DEBUG)
    endpoint_id = await register(wire, target)
    await server.run("Hello")
    await logged(wire, endpoint_id, "delivered")
    answers = [
        await wire.get(ENDPOINTS),
        await wire.get(f"{ENDPOINTS}/{endpoint_id}"),
        await wire.get(f"{ENDPOINTS}/{endpoint_id}/deliveries"),
        await wire.post(f"{ENDPOINTS}/{endpoint_id}", {"name": "new"}),
    ]
    secret = target.secret.removeprefix("whsec_")
    assert not any(secret in answer.content.decode() for answer in answers)
    assert secret not in caplog.text


async def test_an_old_secret_goes_on_for_a_day(
    timed: Server, timed_wire: Wire, target: Target, clock: SetClock
) -> None:
    """Asked to be kept, it signs beside the new one for 24 hours; otherwise it signs no more at once."""
    endpoint_id = await register(timed_wire, target)
    old, path = target.secret, f"{ENDPOINTS}/{endpoint_id}"
    keep = {"keep_old_secret_active_for_24_hours": True}
    new = (await timed_wire.made(f"{path}/rotate_secret", keep))["signing_secret"]
    await timed_wire.made(f"{path}/test")
    assert unwrapped(old, target.posts[0]) == unwrapped(new, target.posts[0])
    clock.time += 24 * 3600
    await timed_wire.made(f"{path}/test")
    assert len(target.posts[1].headers["webhook-signature"].split()) == 1
    newest = (await timed_wire.made(f"{path}/rotate_secret"))["signing_secret"]
    await timed_wire.made(f"{path}/test")
    clock.time -= 24 * 3600
    assert len(target.posts[2].headers["webhook-signature"].split()) == 1
    assert len({old, new, newest}) == 3


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"url": "http://app.example/hook"}, "url", "no https URL"),
        ({"url": "https://me:pw@app.example/"}, "url", "names a user"),
        ({"url": "https://10.0.0.8/"}, "url", "private address"),
        ({"url": "https://2130706433/"}, "url", "unusual form"),
        ({"url": "ftp://app.example/"}, "url", "no https URL"),
        ({"url": "https://app.example:22/"}, "url", "port 22"),
        ({"url": ""}, "url", "string too short"),
        ({"event_types": []}, "event_types", "empty array"),
        ({"event_types": ["thread.run.*", "batch.completed"]}, "event_types[1]", "Supported values are: '*'"),
        ({"event_types": ["thread.run*"]}, "event_types[0]", "'thread.run*'"),
        ({"secret": "mine"}, "secret", "Unknown parameter"),
    ],
)
async def test_what_cannot_be_an_endpoint_is_refused(
    tmp_path: Path, start_server: ServerFactory, connect: Any, fields: dict[str, Any], param: str, says: str
) -> None:
    """A URL that may not be asked, or an event that there is not, is a 400 that names the place, also on a change."""
    async with start_server(tmp_path / "data") as strict:
        wire = connect(strict)
        endpoint_id = (await wire.made(ENDPOINTS, HOOK))["id"]
        for path, body in ((ENDPOINTS, {**HOOK, **fields}), (f"{ENDPOINTS}/{endpoint_id}", fields)):
            fault = (await wire.post(path, body)).fault
            assert (fault.status, fault.param) == (400, param)
            assert says in fault.message


async def test_endpoints_are_bounded(server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project can have so many and no more."""
    monkeypatch.setattr(webhooks, "MAX_ENDPOINTS", 1)
    await wire.made(ENDPOINTS, HOOK)
    assert "can have 1 webhook endpoints" in (await wire.post(ENDPOINTS, HOOK)).fault.message


# --- tries -----------------------------------------------------------------------------------------------------


async def test_a_failure_is_tried_again_with_the_same_id(
    timed: Server, timed_wire: Wire, target: Target, clock: SetClock
) -> None:
    """After a 500 the event comes again some seconds later, byte for byte, under the same id."""
    endpoint_id = await register(timed_wire, target)
    target.on("POST /hook", reply({}, 500))
    await timed.run("Hello")
    waits = await logged(timed_wire, endpoint_id, "pending")
    assert waits["tries"][0]["error"] == "It answered 500."
    assert 5 <= waits["next_try_at"] - int(clock.time) <= 6
    target.on("POST /hook", reply({}))
    clock.time += 7
    timed.house.webhook_queue.wake()
    done = await logged(timed_wire, endpoint_id, "delivered", tries=2)
    assert [one["status_code"] for one in done["tries"]] == [500, 200]
    assert target.posts[0].body == target.posts[1].body
    assert target.posts[0].headers["webhook-id"] == target.posts[1].headers["webhook-id"]


async def test_tries_have_an_end_and_can_begin_anew(
    timed: Server, timed_wire: Wire, target: Target, clock: SetClock
) -> None:
    """Ten tries in about three days, then it has failed; a resend begins anew."""
    endpoint_id = await register(timed_wire, target)
    target.on("POST /hook", reply({}, 503))
    await timed.run("Hello")
    for number, wait_s in enumerate(WAITS_S, 1):
        waits = await logged(timed_wire, endpoint_id, "pending", tries=number)
        assert wait_s <= waits["next_try_at"] - int(clock.time) <= wait_s * 1.2 + 1
        clock.time = waits["next_try_at"] + 1
        timed.house.webhook_queue.wake()
    failed = await logged(timed_wire, endpoint_id, "failed", tries=10)
    assert failed["next_try_at"] is None
    assert 3 * 86400 < sum(WAITS_S) < 4 * 86400
    await timed_wire.made(f"{ENDPOINTS}/{endpoint_id}/deliveries/{failed['id']}/resend")
    waits = await logged(timed_wire, endpoint_id, "pending", tries=11)
    assert waits["next_try_at"] - int(clock.time) <= 7


async def test_a_target_that_is_gone_disables_its_endpoint(server: Server, wire: Wire, target: Target) -> None:
    """410 ends the delivery and disables the endpoint, which says why; enabled again, it can be resent."""
    endpoint_id = await register(wire, target)
    target.on("POST /hook", reply({}, 410))
    await server.run("Hello")
    failed = await logged(wire, endpoint_id, "failed")
    shown = await wire.read(f"{ENDPOINTS}/{endpoint_id}")
    assert (shown["status"], shown["disabled_reason"]) == ("disabled", "It answered 410: it is gone.")
    resend = f"{ENDPOINTS}/{endpoint_id}/deliveries/{failed['id']}/resend"
    assert "is disabled" in (await wire.post(resend)).fault.message
    shown = await wire.made(f"{ENDPOINTS}/{endpoint_id}", {"status": "enabled"})
    assert shown["disabled_reason"] is None
    target.on("POST /hook", reply({}))
    await wire.made(resend)
    await logged(wire, endpoint_id, "delivered", tries=2)


async def test_a_redirect_is_not_followed(server: Server, wire: Wire, target: Target) -> None:
    """It is a failure, wherever it leads."""
    endpoint_id = await register(wire, target)
    target.on("POST /hook", reply({}, 307, location="/hook/elsewhere"))
    await server.run("Hello")
    waits = await logged(wire, endpoint_id, "pending")
    assert waits["tries"][0]["error"] == "It answered 307, a redirect, and those are not followed."
    assert len(target.requests) == 1


async def test_a_target_may_ask_for_patience(timed: Server, timed_wire: Wire, target: Target, clock: SetClock) -> None:
    """Retry-After makes a wait longer."""
    endpoint_id = await register(timed_wire, target)
    target.on("POST /hook", reply({}, 429, retry_after="3600"))
    await timed.run("Hello")
    waits = await logged(timed_wire, endpoint_id, "pending")
    assert 3600 <= waits["next_try_at"] - int(clock.time) <= 3600 * 1.2


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        ("", 0),
        ("120", 120),
        ("-5", 0),
        ("soon", 0),
        ("9" * 5000, LONGEST_ASKED_S),
        ("Thu, 01 Jan 1970 00:20:00 GMT", 200),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0),
        ("Thu, 01 Jan 9999 00:00:01 GMT", LONGEST_ASKED_S),
        ("٣", 0),
    ],
)
def test_what_retry_after_means(header: str, wait_s: float) -> None:
    """Seconds or a date; nonsense and the past are no wait, and no wait is longer than a day."""
    assert asked_wait_s(header, 1000) == wait_s


async def test_a_private_address_fails_for_good(
    tmp_path: Path, start_server: ServerFactory, connect: Any, target: Target
) -> None:
    """A name that leads to this machine is not asked and not tried again, and the log says why."""
    async with start_server(tmp_path / "data") as strict:
        wire = connect(strict)
        url = f"https://localhost:{target.port}/hook"
        endpoint_id = (await wire.made(ENDPOINTS, {**HOOK, "url": url}))["id"]
        await strict.run("Hello")
        failed = await logged(wire, endpoint_id, "failed")
        assert failed["tries"][0]["error"] == (
            f"https://localhost:{target.port} may not be asked: localhost is at a private address."
        )
        assert target.connections == 0
        fault = (await wire.post(f"{ENDPOINTS}/{endpoint_id}/test")).fault
        assert (fault.status, "private address" in fault.message) == (400, True)


async def test_a_target_that_hangs_holds_up_no_other(
    tmp_path: Path, start_server: ServerFactory, connect: Any, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few deliveries wait at one endpoint, and others go out meanwhile."""
    monkeypatch.setattr(deliveries, "MAX_OF_ONE", 2)
    monkeypatch.setattr(deliveries, "CLAIM_LIMIT", 4)
    async with (
        start_server(tmp_path / "data", private_webhooks=True, webhook_timeout_s=60) as server,
        silent_target() as (url, taken),
    ):
        wire = connect(server)
        await wire.made(ENDPOINTS, {"url": url, "event_types": ["*"]})
        await register(wire, target)
        for _ in range(6):
            await server.run("Hello")
        await target.got(6)
        assert 1 <= taken[0] <= 2


async def test_a_target_has_its_time(tmp_path: Path, start_server: ServerFactory, connect: Any) -> None:
    """Who says nothing for `webhook_timeout_s` has not been told."""
    async with (
        start_server(tmp_path / "data", private_webhooks=True, webhook_timeout_s=0.1) as server,
        silent_target() as (url, _),
    ):
        wire = connect(server)
        hanging = (await wire.made(ENDPOINTS, {"url": url, "event_types": ["*"]}))["id"]
        fault = (await wire.post(f"{ENDPOINTS}/{hanging}/test")).fault
        assert fault.message.endswith("gave no answer within 0.1 s.")


async def test_an_endless_answer_is_not_read(server: Server, wire: Wire, target: Target) -> None:
    """The status counts; however much comes after it, in whatever encoding, nobody waits for it."""
    endpoint_id = await register(wire, target)
    answer = reply(b"x" * 5_000_000)
    answer.headers["content-encoding"] = "gzip"
    target.on("POST /hook", answer)
    await server.run("Hello")
    await logged(wire, endpoint_id, "delivered")


async def test_what_waits_for_a_disabled_endpoint_fails(
    timed: Server, timed_wire: Wire, target: Target, clock: SetClock
) -> None:
    """When its turn comes, nothing is sent."""
    endpoint_id = await register(timed_wire, target)
    target.on("POST /hook", reply({}, 500))
    await timed.run("Hello")
    await logged(timed_wire, endpoint_id, "pending")
    await timed_wire.made(f"{ENDPOINTS}/{endpoint_id}", {"status": "disabled"})
    clock.time += 7
    timed.house.webhook_queue.wake()
    failed = await logged(timed_wire, endpoint_id, "failed", tries=2)
    assert failed["tries"][1]["error"] == "The endpoint is disabled."
    assert len(target.posts) == 1


# --- the log ---------------------------------------------------------------------------------------------------


async def test_a_deleted_thread_leaves_the_log(timed: Server, timed_wire: Wire, target: Target) -> None:
    """The log does not say any more what it was told, and what was pending is not sent."""
    endpoint_id = await register(timed_wire, target)
    target.on("POST /hook", reply({}, 500))
    run = await timed.run("Hello")
    waits = await logged(timed_wire, endpoint_id, "pending")
    await timed.client.beta.threads.delete(run.thread_id)
    left = await logged(timed_wire, endpoint_id, "cancelled")
    assert (left["event"], left["next_try_at"]) == (None, None)
    assert run.id not in json.dumps(left)
    fault = (await timed_wire.post(f"{ENDPOINTS}/{endpoint_id}/deliveries/{waits['id']}/resend")).fault
    assert "was deleted" in fault.message


async def test_a_deleted_vector_store_leaves_the_log(server: Server, wire: Wire, target: Target) -> None:
    """As a thread does."""
    endpoint_id = await register(wire, target)
    store_id, _ = await make_store(server, b"one")
    await logged(wire, endpoint_id, "delivered")
    await server.client.vector_stores.delete(store_id)
    assert (await logged(wire, endpoint_id, "delivered"))["event"] is None


async def test_the_log_is_kept_for_some_days(timed: Server, timed_wire: Wire, target: Target, clock: SetClock) -> None:
    """What is over goes after `webhook_retention_d`; what still waits stays."""
    done = await register(timed_wire, target)
    await timed.run("Hello")
    await logged(timed_wire, done, "delivered")
    waiting = await register(timed_wire, target)
    target.on("POST /hook", reply({}, 500, retry_after="86400"))
    await timed_wire.made(f"{ENDPOINTS}/{done}", {"status": "disabled"})
    await timed.run("Hello")
    await logged(timed_wire, waiting, "pending")
    clock.time += 7 * 86400 - 60
    await tidy_deliveries(timed.house)
    assert len(await log_of(timed_wire, done)) == 1
    clock.time += 61
    await tidy_deliveries(timed.house)
    assert await log_of(timed_wire, done) == []
    assert len(await log_of(timed_wire, waiting)) == 1


async def test_the_log_can_be_searched(server: Server, wire: Wire, target: Target) -> None:
    """By status, page by page, and one by one; what is not there is a 404."""
    endpoint_id = await register(wire, target)
    await server.run("Hello")
    delivery = await logged(wire, endpoint_id, "delivered")
    path = f"{ENDPOINTS}/{endpoint_id}/deliveries"
    assert (await wire.get(f"{path}?status=failed")).ids == []
    assert (await wire.get(f"{path}?status=delivered&limit=1")).ids == [delivery["id"]]
    assert await wire.read(f"{path}/{delivery['id']}") == delivery
    assert (await wire.get(f"{path}?status=lost")).fault.param == "status"
    for missing in (f"{ENDPOINTS}/whe_x/deliveries", f"{path}/whd_x", f"{ENDPOINTS}/whe_x/deliveries/{delivery['id']}"):
        assert (await wire.get(missing)).status == 404
    for missing in (f"{path}/whd_x/resend", f"{ENDPOINTS}/whe_x/test", f"{ENDPOINTS}/whe_x/rotate_secret"):
        assert (await wire.post(missing)).status == 404


async def test_a_deleted_endpoint_is_told_nothing(timed: Server, timed_wire: Wire, target: Target) -> None:
    """What was to be sent to it is gone with it."""
    endpoint_id = await register(timed_wire, target)
    target.on("POST /hook", reply({}, 500))
    await timed.run("Hello")
    await logged(timed_wire, endpoint_id, "pending")
    await timed_wire.delete(f"{ENDPOINTS}/{endpoint_id}")
    left = await timed.house.store.read(lambda tx: tx.fetch("SELECT COUNT(*) FROM webhook_deliveries"))
    assert left == [(0,)]
