"""Threads: created with and without messages, found by metadata, modified, deleted with all that hangs on them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

from afterglow.testing import SetClock, ended, says
from tests.api.wire import Fault, Json, Wire, until
from tests.conftest import Server, ServerFactory

THREAD_ID = re.compile(r"thread_[A-Za-z0-9]{24}")
NOW = 1_700_000_000
CODE_FILES: Json = {"code_interpreter": {"file_ids": []}}
STORES: Json = {"file_search": {"vector_store_ids": []}}


def message(text: str = "hi", **more: Any) -> Json:
    return {"role": "user", "content": text, **more}


def no_thread(thread_id: str) -> Fault:
    return Fault(404, f"No thread found with id '{thread_id}'.")


# --- creating --------------------------------------------------------------------------------------------------


async def test_nothing_makes_an_empty_thread(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """No body, an empty body with a JSON content type, `{}` and nulls all make the same empty thread."""
    async with start_server(tmp_path, clock=SetClock(NOW)) as server:
        wire = connect(server)
        for body in (None, b"", {}, {"messages": None, "tool_resources": None, "metadata": None}, {"messages": []}):
            made = await wire.made("/threads", body)
            assert THREAD_ID.fullmatch(made["id"])
            assert made == {
                "id": made["id"],
                "object": "thread",
                "created_at": NOW,
                "metadata": {},
                "tool_resources": {},
            }
            assert await wire.read(f"/threads/{made['id']}") == made
            assert (await wire.read(f"/threads/{made['id']}/messages"))["data"] == []
        assert (await server.client.beta.threads.create()).metadata == {}


async def test_messages_come_with_the_thread(server: Server):
    """The messages of a create are on the thread in their order, each with an id of its own."""
    api = server.client.beta.threads
    thread = await api.create(
        messages=[
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": [{"type": "text", "text": "three"}], "metadata": {"k": "v"}},
        ],
        metadata={"who": "Ada"},
    )
    listed = (await api.messages.list(thread.id, order="asc")).data
    assert [(one.role, one.content[0].text.value) for one in listed] == [
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
    ]
    assert len({one.id for one in listed}) == 3
    assert {one.thread_id for one in listed} == {thread.id}
    assert [one.metadata for one in listed] == [{}, {}, {"k": "v"}]
    assert thread.metadata == {"who": "Ada"}


async def test_a_hundred_messages_keep_their_order(wire: Wire):
    """More messages than a page holds come back in exactly the order given."""
    texts = [str(number) for number in range(120)]
    thread = await wire.made("/threads", {"messages": [message(text) for text in texts]})
    first = await wire.get(f"/threads/{thread['id']}/messages?order=asc&limit=100")
    rest = await wire.get(f"/threads/{thread['id']}/messages?order=asc&limit=100&after={first.ids[-1]}")
    found = [item["content"][0]["text"]["value"] for page in (first, rest) for item in page.json["data"]]
    assert found == texts


async def test_a_refused_create_leaves_nothing(wire: Wire):
    """When one message, file or store is refused, there is no thread and no message."""
    for body, status, param in (
        ({"messages": [message(), message("")]}, 400, "messages[1].content"),
        ({"messages": [message(), message(role="system")]}, 400, "messages[1].role"),
        ({"messages": [message(), message(attachments=[{"file_id": "file-x"}])]}, 404, "id"),
        ({"tool_resources": {"code_interpreter": {"file_ids": ["file-x"]}}}, 404, "id"),
        ({"tool_resources": {"file_search": {"vector_store_ids": ["vs_x"]}}}, 404, None),
        ({"tool_resources": {"file_search": {"vector_stores": [{"file_ids": ["file-x"]}]}}}, 404, None),
        ({"metadata": {"n": 1}}, 400, "metadata.n"),
        ({"x": 1}, 400, "x"),
        ({"messages": [message(x=1)]}, 400, "messages[0].x"),
        ({"messages": {}}, 400, "messages"),
    ):
        refusal = await wire.post("/threads", body)
        assert (refusal.status, refusal.fault.param) == (status, param)
    assert (await wire.read("/threads"))["data"] == []


async def test_tool_resources_are_shown(wire: Wire):
    """What is set is shown; what is not, is not."""
    nulls = {"code_interpreter": None, "file_search": None}
    for given, shown in (({}, {}), (nulls, {}), (CODE_FILES, CODE_FILES), (CODE_FILES | STORES, CODE_FILES | STORES)):
        assert (await wire.made("/threads", {"tool_resources": given}))["tool_resources"] == shown


# --- modifying -------------------------------------------------------------------------------------------------


async def test_modify_replaces_what_it_names(wire: Wire):
    """Left out stays, null clears, metadata and resources are replaced and not merged."""
    made = await wire.made("/threads", {"metadata": {"a": "1"}, "tool_resources": CODE_FILES})
    path = f"/threads/{made['id']}"
    assert await wire.made(path, {}) == made
    for body, changed in (
        ({"metadata": {"b": "2"}}, {"metadata": {"b": "2"}}),
        ({"tool_resources": STORES}, {"tool_resources": STORES}),
        ({"metadata": None}, {"metadata": {}}),
        ({"tool_resources": None}, {"tool_resources": {}}),
    ):
        made |= changed
        assert await wire.made(path, body) == made
        assert await wire.read(path) == made


async def test_modify_takes_two_keys_alone(wire: Wire):
    """`messages` belongs to create; what modify does not know is refused, and nothing changes."""
    made = await wire.made("/threads")
    path = f"/threads/{made['id']}"
    for name in ("messages", "id", "created_at"):
        refusal = await wire.post(path, {"metadata": {"a": "1"}, name: []})
        assert refusal.fault == Fault(400, f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    gone = await wire.post(path, {"metadata": {"a": "1"}, "tool_resources": {"code_interpreter": {"file_ids": ["f"]}}})
    assert gone.fault == Fault(404, "No such File object: f", "id")
    assert await wire.read(path) == made


# --- finding ---------------------------------------------------------------------------------------------------


async def found(wire: Wire, **pairs: str) -> list[str]:
    answer = await wire.get("/threads", params={"order": "asc", **{f"metadata[{k}]": v for k, v in pairs.items()}})
    return answer.ids


async def test_threads_are_found_by_metadata(wire: Wire):
    """A filter keeps the threads that have the pair, several those that have all; modify and delete count at once."""
    odd = {"k[0]": "a&b=c", "": "nameless", "empty": ""}
    ids = [
        (await wire.made("/threads", {"metadata": metadata}))["id"]
        for metadata in ({"user": "ada", "team": "x"}, {"user": "bob", "team": "x"}, odd, {})
    ]
    assert await found(wire) == ids
    assert await found(wire, user="ada") == ids[:1]
    assert await found(wire, team="x") == ids[:2]
    assert await found(wire, team="x", user="bob") == ids[1:2]
    assert await found(wire, team="x", user="eve") == []
    assert await found(wire, **{"k[0]": "a&b=c"}) == ids[2:3]
    assert await found(wire, empty="") == ids[2:3]
    await wire.made(f"/threads/{ids[0]}", {"metadata": {"user": "bob"}})
    assert await found(wire, user="ada") == []
    assert await found(wire, user="bob") == ids[:2]
    await wire.delete(f"/threads/{ids[1]}")
    assert await found(wire, user="bob") == ids[:1]


async def test_filtered_threads_come_in_pages(wire: Wire):
    """Limit and cursors count what the filter keeps; a cursor outside of it is unknown."""
    ids = [(await wire.made("/threads", {"metadata": {"parity": str(n % 2)}}))["id"] for n in range(6)]
    page = await wire.get("/threads?metadata[parity]=0&limit=2")
    assert (page.ids, page.json["has_more"]) == ([ids[4], ids[2]], True)
    page = await wire.get(f"/threads?metadata[parity]=0&limit=2&after={ids[2]}")
    assert (page.ids, page.json["has_more"]) == ([ids[0]], False)
    outside = await wire.get(f"/threads?metadata[parity]=0&after={ids[1]}")
    assert outside.fault == Fault(404, f"No thread found with id '{ids[1]}'.", "after")


async def test_a_filter_is_bounded(wire: Wire):
    """No more pairs than a thread can have, each key once, and no NUL."""
    pairs = [f"metadata[k{n}]=v" for n in range(17)]
    assert (await wire.get("/threads?" + "&".join(pairs[:16]))).status == 200
    for number in (17, 3000):
        many = await wire.get("/threads?" + "&".join(f"metadata[k{n}]=v" for n in range(number)))
        assert (many.status, many.fault.code) == (400, "object_above_max_properties")
    twice = await wire.get("/threads?metadata[a]=1&metadata[a]=2")
    assert (twice.status, twice.fault.param, twice.fault.code) == (400, "metadata[a]", "duplicate_parameter")
    for query in ("metadata[a]=%00", "metadata[%00]=a"):
        assert (await wire.get(f"/threads?{query}")).fault.code == "invalid_value"


# --- deleting --------------------------------------------------------------------------------------------------


async def test_a_thread_goes_with_all_that_hangs_on_it(server: Server, wire: Wire):
    """After the delete, thread, messages, runs and steps are 404 by the thread's name, on every method."""
    server.model.will(says("Hello."))
    run = await server.run("hi")
    thread = f"/threads/{run.thread_id}"
    [step] = (await wire.read(f"{thread}/runs/{run.id}/steps"))["data"]
    newest = (await wire.read(f"{thread}/messages"))["data"][0]
    deleted = await wire.delete(thread, headers={"content-type": "application/json"})
    assert deleted.json == {"id": run.thread_id, "object": "thread.deleted", "deleted": True}
    for method, path, body in (
        ("GET", "", None),
        ("POST", "", {}),
        ("DELETE", "", None),
        ("GET", "/messages", None),
        ("POST", "/messages", message()),
        ("GET", f"/messages/{newest['id']}", None),
        ("POST", f"/messages/{newest['id']}", {}),
        ("DELETE", f"/messages/{newest['id']}", None),
        ("GET", "/runs", None),
        ("POST", "/runs", {"assistant_id": run.assistant_id}),
        ("GET", f"/runs/{run.id}", None),
        ("POST", f"/runs/{run.id}", {}),
        ("POST", f"/runs/{run.id}/cancel", None),
        ("POST", f"/runs/{run.id}/submit_tool_outputs", {"tool_outputs": []}),
        ("GET", f"/runs/{run.id}/steps", None),
        ("GET", f"/runs/{run.id}/steps/{step['id']}", None),
    ):
        gone = await wire.ask(method, thread + path, body)
        assert gone.fault == no_thread(run.thread_id), (method, path)
    assert (await wire.read("/threads"))["data"] == []


async def test_deleting_a_thread_stops_its_run(server: Server, wire: Wire):
    """A run that is under way is stopped with its thread, and the model call is given up."""
    hanging = asyncio.Event()
    server.model.will([hanging, ended("stop")])
    assistant = await server.assistant()
    thread = await wire.made("/threads", {"messages": [message()]})
    path = f"/threads/{thread['id']}"
    run = await wire.made(f"{path}/runs", {"assistant_id": assistant.id})
    await until(lambda: server.model.requests)
    assert (await wire.delete(path)).status == 200
    assert (await wire.get(f"{path}/runs/{run['id']}")).fault == no_thread(thread["id"])
    await until(lambda: not server.application.worker.running)
    assert server.model.closed == 1
