"""Cursor lists: order, limits and cursors, the same on every list route."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afterglow.app import ROUTES
from afterglow.testing import SetClock, calls, says
from tests.api.wire import Answer, Fault, Json, Wire, until
from tests.conftest import GET_WEATHER, Server, ServerFactory

PROJECTS = 500
EMPTY: Json = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
USER: Json = {"role": "user", "content": "hi"}


async def page(wire: Wire, path: str, **query: Any) -> Answer:
    answer = await wire.get(path, params=query)
    assert answer.status == 200, answer.content
    return answer


async def walk(wire: Wire, path: str, *, order: str, limit: int) -> list[str]:
    """All ids, page by page with `after`. Every page but the last is full."""
    found: list[str] = []
    query: Json = {"order": order, "limit": limit}
    while True:
        answer = await page(wire, path, **query)
        found += answer.ids
        if not answer.json["has_more"]:
            return found
        assert len(answer.ids) == limit
        query["after"] = answer.ids[-1]


async def walk_back(wire: Wire, path: str, *, order: str, limit: int, last: str) -> list[str]:
    """All ids up to `last`, page by page with `before`; each page is in the order asked for."""
    found = [last]
    while True:
        answer = await page(wire, path, order=order, limit=limit, before=found[0])
        found = answer.ids + found
        if not answer.json["has_more"]:
            return found
        assert len(answer.ids) == limit


async def assert_pages_agree(wire: Wire, path: str, limit: int) -> list[str]:
    """Forwards and backwards, in both orders, the same items come once each; return their ids, oldest first."""
    oldest_first = await walk(wire, path, order="asc", limit=limit)
    newest_first = await walk(wire, path, order="desc", limit=limit)
    assert len(set(oldest_first)) == len(oldest_first)
    assert newest_first == oldest_first[::-1]
    if oldest_first:
        for order, expected in (("asc", oldest_first), ("desc", newest_first)):
            assert await walk_back(wire, path, order=order, limit=limit, last=expected[-1]) == expected
    return oldest_first


# --- every list ------------------------------------------------------------------------------------------------


class Lists:
    """One path for each list route, on a thread with a run of two steps."""

    def __init__(self, thread_id: str, run_id: str, store_id: str) -> None:
        self.by_noun = {
            "assistant": "/assistants",
            "thread": "/threads",
            "message": f"/threads/{thread_id}/messages",
            "run": f"/threads/{thread_id}/runs",
            "run step": f"/threads/{thread_id}/runs/{run_id}/steps",
            "vector store": "/vector_stores",
            "file": f"/vector_stores/{store_id}/files",
        }


@pytest.fixture
async def lists(server: Server) -> Lists:
    server.model.will(calls(("get_weather", {"city": "Oslo"})), says("Rain."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.required_action is not None
    [call] = run.required_action.submit_tool_outputs.tool_calls
    run = await server.client.beta.threads.runs.submit_tool_outputs_and_poll(
        run_id=run.id,
        thread_id=run.thread_id,
        tool_outputs=[{"tool_call_id": call.id, "output": "rain"}],
        poll_interval_ms=5,
    )
    store = await server.client.vector_stores.create()
    for name in "ab":
        uploaded = await server.client.files.create(file=(name, b"text"), purpose="assistants")
        await server.client.vector_stores.files.create_and_poll(uploaded.id, vector_store_id=store.id)
    return Lists(run.thread_id, run.id, store.id)


def test_no_list_is_forgotten():
    """The lists tested here are all there are, beside those of other sorts (files, chunks, citations), batches' files,
    which are read as those of their stores are, and what administrators read."""
    routes = [act.__name__ for method, _, act in ROUTES if act.__name__.startswith("list_")]
    nouns = [name.removeprefix("list_").removesuffix("s").replace("_", " ") for name in routes]
    others = {"model", "vector store file", "files of batch", "chunk", "citation", "project run"}
    others |= {"project", "key", "audit log"}
    others |= {"webhook endpoint", "webhook deliverie", "webhook event type"}
    assert {*nouns} == {*Lists("", "", "").by_noun, *others}


async def test_every_list_reads_its_query_alike(wire: Wire, lists: Lists):
    """Limit, order, cursors and their refusals are the same on each list route; unknown parameters are left alone."""
    integer = "Invalid 'limit': integer {} value. Expected a value {}, but got {} instead."
    not_integer = "Invalid type for 'limit': expected an integer, but got a string instead."
    refusals = {
        "limit=0": Fault(400, integer.format("below minimum", ">= 1", 0), "limit", "integer_below_min_value"),
        "limit=101": Fault(400, integer.format("above maximum", "<= 100", 101), "limit", "integer_above_max_value"),
        "limit=ten": Fault(400, not_integer, "limit", "invalid_type"),
        "limit=5.0": Fault(400, not_integer, "limit", "invalid_type"),
        "order=up": Fault(
            400, "Invalid value: 'up'. Supported values are: 'asc' and 'desc'.", "order", "invalid_value"
        ),
        "after=a%00": Fault(400, "Invalid 'after': string contains a NUL character.", "after", "invalid_value"),
    }
    for noun, path in lists.by_noun.items():
        for query, fault in refusals.items():
            assert (await wire.get(f"{path}?{query}")).fault == fault
        for name in ("limit", "order", "after", "before"):
            twice = (await wire.get(f"{path}?{name}=1&{name}=1")).fault
            assert (twice.status, twice.param, twice.code) == (400, name, "duplicate_parameter")
        for name in ("after", "before"):
            unknown = await wire.get(f"{path}?{name}=nobody")
            assert unknown.fault == Fault(404, f"No {noun} found with id 'nobody'.", name)
        whole = (await page(wire, path)).json
        for query in ("limit=100", "limit=20&order=desc", "after=&before=&limit=&order=", "x=1&x=2&project=p"):
            assert (await wire.get(f"{path}?{query}")).json == whole


async def test_every_list_is_newest_first(wire: Wire, lists: Lists):
    """Without an order, what was made last comes first, and pages of one walk every list both ways."""
    for path in lists.by_noun.values():
        newest_first = (await page(wire, path)).ids
        assert await assert_pages_agree(wire, path, 1) == newest_first[::-1]
    steps = (await page(wire, lists.by_noun["run step"])).json["data"]
    assert [step["type"] for step in steps] == ["message_creation", "tool_calls"]


async def test_empty_lists_have_no_ids(wire: Wire):
    """An empty list has null for both ids and no more to come."""
    thread = await wire.made("/threads")
    await wire.delete(f"/threads/{(await wire.made('/threads'))['id']}")
    for path in (
        "/assistants",
        "/threads?metadata[k]=v",
        f"/threads/{thread['id']}/messages",
        f"/threads/{thread['id']}/runs",
        f"/threads?after={thread['id']}",
        f"/threads?before={thread['id']}",
    ):
        assert await wire.read(path) == EMPTY


async def test_a_run_without_steps_lists_none(server: Server, wire: Wire):
    """A run that was cancelled before the model said anything has an empty list."""
    server.model.will([asyncio.Event()])
    assistant = await server.assistant()
    run = await wire.made("/threads/runs", {"assistant_id": assistant.id})
    await until(lambda: server.model.requests)
    path = f"/threads/{run['thread_id']}/runs/{run['id']}"
    assert (await wire.stopped(await wire.made(f"{path}/cancel")))["status"] == "cancelled"
    assert await wire.read(f"{path}/steps") == EMPTY


async def test_what_hangs_on_nothing_is_not_listed(wire: Wire, lists: Lists):
    """The lists of a thread or run that is not there are 404, and name the one that is missing."""
    thread_id = lists.by_noun["run"].split("/")[2]
    for path, message in (
        ("/threads/thread_x/messages", "No thread found with id 'thread_x'."),
        ("/threads/thread_x/runs", "No thread found with id 'thread_x'."),
        ("/threads/thread_x/runs/run_x/steps", "No thread found with id 'thread_x'."),
        (f"/threads/{thread_id}/runs/run_x/steps", "No run found with id 'run_x'."),
    ):
        assert (await wire.get(path)).fault == Fault(404, message)


# --- limits and cursors ----------------------------------------------------------------------------------------


async def test_a_page_holds_twenty_unless_told(wire: Wire):
    """The default is 20; has_more tells whether another item follows, to the one."""
    thread = await wire.made("/threads", {"messages": [USER] * 20})
    path = f"/threads/{thread['id']}/messages"
    whole = await page(wire, path)
    assert (len(whole.ids), whole.json["has_more"]) == (20, False)
    await wire.made(path, USER)
    whole = await page(wire, path)
    assert (len(whole.ids), whole.json["has_more"]) == (20, True)
    rest = await page(wire, path, after=whole.ids[-1])
    assert (len(rest.ids), rest.json["has_more"]) == (1, False)
    for limit, more in ((20, True), (21, False), (22, False)):
        assert (await page(wire, path, limit=limit)).json["has_more"] is more
    hundred = await wire.made("/threads", {"messages": [USER] * 101})
    full = await page(wire, f"/threads/{hundred['id']}/messages", limit=100)
    assert (len(full.ids), full.json["has_more"]) == (100, True)


async def test_the_official_client_turns_the_pages(server: Server, wire: Wire):
    """The client's own pager, with any page size, meets each item once and stops."""
    thread = await wire.made("/threads", {"messages": [USER] * 7})
    ids = (await page(wire, f"/threads/{thread['id']}/messages")).ids
    api = server.client.beta.threads.messages
    for limit in (1, 3, 7, 100):
        assert [one.id async for one in api.list(thread["id"], limit=limit)] == ids
        assert [one.id async for one in api.list(thread["id"], limit=limit, order="asc")] == ids[::-1]
    assert [one.id async for one in api.list(thread["id"], before=ids[-1], limit=100)] == ids[:-1]
    for number in range(3):
        await server.assistant(name=str(number))
    assert [one.name async for one in server.client.beta.assistants.list(limit=1, order="asc")] == ["0", "1", "2"]


async def test_two_cursors_name_what_lies_between(wire: Wire):
    """`after` and `before` together give what lies between them, from `after` on, in the order asked for."""
    thread = await wire.made("/threads", {"messages": [USER] * 6})
    path = f"/threads/{thread['id']}/messages"
    ids = (await page(wire, path, order="asc")).ids
    between = await page(wire, path, order="asc", after=ids[0], before=ids[5], limit=3)
    assert (between.ids, between.json["has_more"]) == (ids[1:4], True)
    between = await page(wire, path, order="desc", after=ids[5], before=ids[0])
    assert (between.ids, between.json["has_more"]) == (ids[4:0:-1], False)
    assert (await page(wire, path, order="asc", after=ids[4], before=ids[2])).json == EMPTY


async def test_a_page_is_not_shifted_by_what_comes(wire: Wire):
    """Items that are added or deleted while one turns pages neither repeat nor hide the others."""
    thread = await wire.made("/threads", {"messages": [USER] * 6})
    path = f"/threads/{thread['id']}/messages"
    ids = (await page(wire, path)).ids
    assert (await page(wire, path, limit=2)).ids == ids[:2]
    await wire.made(path, USER)
    await wire.delete(f"{path}/{ids[3]}")
    assert (await page(wire, path, limit=2, after=ids[1])).ids == [ids[2], ids[4]]


async def test_runs_of_one_second_keep_their_order(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Messages and runs that were made while the clock stood still are listed in the order they were made."""
    async with start_server(tmp_path, clock=SetClock()) as server:
        wire, made = connect(server), []
        thread_id = (await wire.made("/threads"))["id"]
        for number in range(5):
            server.model.will(says(f"answer {number}"))
            made.append((await server.run(f"question {number}", thread_id=thread_id)).id)
        assert await assert_pages_agree(wire, f"/threads/{thread_id}/runs", 2) == made
        await assert_pages_agree(wire, f"/threads/{thread_id}/messages", 3)
        messages = (await page(wire, f"/threads/{thread_id}/messages", order="asc")).json["data"]
        said = [message["content"][0]["text"]["value"] for message in messages]
        assert said == [f"{kind} {number}" for number in range(5) for kind in ("question", "answer")]


# --- any list --------------------------------------------------------------------------------------------------


class Crowd:
    """A server with a clock that can be set, and many projects, so that each example has lists of its own."""

    def __init__(self, server: Server, wire: Wire, clock: SetClock) -> None:
        self.server = server
        self.wire = wire
        self.clock = clock
        self.numbers = itertools.count()

    def enter_new_project(self) -> None:
        self.wire.client.headers["authorization"] = f"Bearer sk-{next(self.numbers)}"


@pytest.fixture
async def crowd(start_server: ServerFactory, connect: Any, tmp_path: Path) -> AsyncGenerator[Crowd, None]:
    clock = SetClock()
    keys = tuple(f"sk-{number}:project-{number}" for number in range(PROJECTS))
    async with start_server(tmp_path, clock=clock, api_keys=keys) as server:
        yield Crowd(server, connect(server), clock)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(waits=st.lists(st.sampled_from([0, 0, 0.3, 1]), max_size=7), limit=st.integers(1, 4))
async def test_pages_are_the_whole_list_once(crowd: Crowd, waits: list[float], limit: int):
    """However many items share a second, walking pages of any size, forwards or backwards, in either order, meets each
    item exactly once; messages in the order they were made, the rest in the order of their times."""
    wire = crowd.wire
    crowd.enter_new_project()
    thread = await wire.made("/threads")
    made: dict[str, list[Json]] = {"/assistants": [], "/threads": [thread], f"/threads/{thread['id']}/messages": []}
    messages = f"/threads/{thread['id']}/messages"
    for wait in waits:
        crowd.clock.time += wait
        for path, body in (("/assistants", {"model": "m"}), ("/threads", None), (messages, USER)):
            made[path].append(await wire.made(path, body))
    for path, items in made.items():
        ids = await assert_pages_agree(wire, path, limit)
        assert sorted(ids) == sorted(item["id"] for item in items)
        created = {item["id"]: item["created_at"] for item in items}
        assert [created[item_id] for item_id in ids] == sorted(created.values())
    assert ids == [item["id"] for item in made[messages]]
