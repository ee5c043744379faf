"""What nobody should send: every answer is still the API's, nothing is a 5xx, and the server goes on answering."""

from __future__ import annotations

import asyncio
import copy
import json
import string
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afterglow.app import ROUTES
from afterglow.objects import INCLUDE_FILE_SEARCH_CONTENT
from afterglow.testing import ended
from tests.api.test_errors import BODIES, METHODS, NOT_JSON, filled
from tests.api.wire import Answer, Fault, Json, Wire
from tests.conftest import Server

pytestmark = pytest.mark.slow

TEN_MEGABYTES = 10_000_000
RACERS = 64
ODD_PARTS = (
    "%00",
    "%FF",
    "%ED%A0%80",
    "%0D%0A",
    "%20",
    "%2F",
    "%2E%2E",
    "a%00b",
    "';%20DROP%20TABLE%20threads;--",
    "%25s%7B0%7D",
    "$1",
    "%F0%9F%98%80",
    "a" * 40_000,
)


async def assert_alive(wire: Wire) -> None:
    assert (await wire.read("/assistants?limit=1"))["object"] == "list"
    assert (await wire.get("//healthz")).status == 200


def assert_refused(answer: Answer, *statuses: int) -> None:
    assert answer.status in (statuses or (400, 404)), answer.content[:500]


# --- bodies ----------------------------------------------------------------------------------------------------

FUNCTION: Json = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
}
FULL_ASSISTANT: Json = {
    "model": "m",
    "name": "n",
    "description": "d",
    "instructions": "i",
    "tools": [
        FUNCTION,
        {
            "type": "file_search",
            "file_search": {
                "max_num_results": 1,
                "ranking_options": {
                    "ranker": "auto",
                    "score_threshold": 0.5,
                    "hybrid_search": {"embedding_weight": 1, "text_weight": 1},
                },
            },
        },
        {"type": "code_interpreter", "x-mine": {"a": [1]}},
    ],
    "tool_resources": {
        "code_interpreter": {"file_ids": []},
        "file_search": {
            "vector_stores": [
                {
                    "file_ids": ["f"],
                    "chunking_strategy": {
                        "type": "static",
                        "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 1},
                    },
                    "metadata": {"k": "v"},
                }
            ]
        },
    },
    "metadata": {"k": "v"},
    "temperature": 1,
    "top_p": 1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}},
    "reasoning_effort": "low",
}
FULL_THREAD: Json = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "t"},
                {"type": "image_file", "image_file": {"file_id": "f", "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "u", "detail": "low"}},
            ],
            "attachments": [{"file_id": "f", "tools": [{"type": "file_search"}]}],
            "metadata": {"k": "v"},
        }
    ],
    "tool_resources": {"code_interpreter": {"file_ids": []}},
    "metadata": {},
}
FULL_RUN: Json = {
    "assistant_id": "asst_x",
    "thread": FULL_THREAD,
    "model": "m",
    "instructions": "i",
    "tools": [FUNCTION],
    "metadata": {},
    "stream": False,
    "max_prompt_tokens": 256,
    "max_completion_tokens": 256,
    "truncation_strategy": {"type": "last_messages", "last_messages": 1},
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "tool_resources": {"file_search": {"vector_store_ids": []}},
}
WRONG = (None, True, -1.5, "x", [[]], {"\ud800": "\x00"})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside of `value`."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(value: Json, path: tuple[Any, ...], replacement: Any) -> Json:
    """A copy of `value` with another value at `path`."""
    found = changed = copy.deepcopy(value)
    for key in path[:-1]:
        found = found[key]
    found[path[-1]] = replacement
    return changed


async def test_a_wrong_type_anywhere_is_told(wire: Wire):
    """Whatever stands in the place of any value of a full body, the answer is good or a refusal with a place in it."""
    for path, body in (("/assistants", FULL_ASSISTANT), ("/threads", FULL_THREAD), ("/threads/runs", FULL_RUN)):
        for place in places(body):
            for wrong in WRONG:
                answer = await wire.post(path, put(body, place, wrong))
                if answer.status != 200:
                    assert_refused(answer)
    await assert_alive(wire)


@pytest.mark.slow
async def test_large_bodies_are_refused_like_small_ones(wire: Wire):
    """Ten megabytes of text, brackets, numbers or keys get the refusal that a little of them would get."""
    thread = await wire.made("/threads")
    messages = f"/threads/{thread['id']}/messages"
    for path, body, code in (
        (messages, json.dumps({"role": "user", "content": "x" * TEN_MEGABYTES}).encode(), "string_above_max_length"),
        (messages, b'{"role":"user","content":[' + b"1," * (TEN_MEGABYTES // 2) + b"1]}", "invalid_type"),
        (messages, b'{"role":"user","content":"' + b"x" * TEN_MEGABYTES, None),
        (messages, b'{"role":' * (TEN_MEGABYTES // 8), None),
        ("/assistants", json.dumps({"model": "m", "x" * TEN_MEGABYTES: 1}).encode(), "unknown_parameter"),
        ("/assistants", b'{"model":"m","temperature":1' + b"0" * TEN_MEGABYTES + b"}", "decimal_above_max_value"),
        ("/assistants", json.dumps({"model": "m", "tools": ["x"] * 1_000_000}).encode(), "array_above_max_length"),
        (
            "/assistants",
            json.dumps({"model": "m", "metadata": {"x" * TEN_MEGABYTES: "v"}}).encode(),
            "property_name_above",
        ),
        ("/threads", json.dumps({"metadata": {str(n): "v" for n in range(500_000)}}).encode(), "object_above"),
    ):
        answer = await wire.post(path, body)
        assert_refused(answer, 400)
        assert len(answer.content) < 5000
        if code is None:
            assert answer.fault == Fault(400, NOT_JSON)
        else:
            assert (answer.fault.code or "").startswith(code)
    await assert_alive(wire)


async def test_text_that_cannot_be_stored_is_refused(wire: Wire):
    """NUL and lone surrogates are a 400 with their place, wherever a caller may write text; pairs and escapes pass."""
    thread = await wire.made("/threads")
    for bad, what in (
        (rb"\u0000", "a NUL character"),
        (rb"\ud800", "a lone surrogate"),
        (rb"\udfffx", "a lone surrogate"),
    ):
        for path, body, param in (
            ("/assistants", b'{"model":"m%b"}', "model"),
            ("/assistants", b'{"model":"m","name":"%b"}', "name"),
            ("/assistants", b'{"model":"m","instructions":"%b"}', "instructions"),
            ("/assistants", b'{"model":"m","metadata":{"k":"%b"}}', "metadata.k"),
            (
                "/assistants",
                b'{"model":"m","tools":[{"type":"function","function":{"name":"f","parameters":{"a":["%b"]}}}]}',
                "tools[0].function.parameters.a[0]",
            ),
            ("/assistants", b'{"model":"m","tools":[{"type":"code_interpreter","x-a":"%b"}]}', "tools[0].x-a"),
            ("/threads", b'{"messages":[{"role":"user","content":"%b"}]}', "messages[0].content"),
            (
                f"/threads/{thread['id']}/messages",
                b'{"role":"user","content":[{"type":"text","text":"a%b"}]}',
                "content[0].text",
            ),
            ("/threads/runs", b'{"assistant_id":"asst_%b"}', "assistant_id"),
            ("/threads/thread_x/runs/run_x", b'{"metadata":{"k":"%b"}}', "metadata.k"),
            (
                "/threads/thread_x/runs/run_x/submit_tool_outputs",
                b'{"tool_outputs":[{"tool_call_id":"c","output":"%b"}]}',
                "tool_outputs[0].output",
            ),
        ):
            refusal = await wire.post(path, body % bad)
            message = f"Invalid '{param}': string contains {what}."
            assert refusal.fault == Fault(400, message, param, "invalid_value")
        key = await wire.post("/threads", b'{"metadata":{"k%b":"v"}}' % bad)
        assert (key.status, key.fault.code) == (400, "invalid_value")
    good = rb'{"role":"user","content":"\ud83d\ude00 \\u0000 \\ud800 \u0001"}'
    made = await wire.made(f"/threads/{thread['id']}/messages", good)
    assert made["content"][0]["text"]["value"] == "\N{GRINNING FACE} \\u0000 \\ud800 \x01"


async def test_nesting_has_an_end(wire: Wire):
    """A schema may be nested a hundred deep and comes back whole; deeper is a 400, bottomless the JSON error."""

    def nested(depth: int) -> Json:
        schema: Json = {}
        for _ in range(depth - 1):
            schema = {"a": schema}
        return schema

    for place in ("parameters", "x-mine", "schema"):
        for depth, fits in ((100, True), (101, False), (400, False)):
            tool: Json = {"type": "function", "function": {"name": "f"}}
            body: Json = {"model": "m", "tools": [tool]}
            if place == "parameters":
                tool["function"]["parameters"] = nested(depth)
            elif place == "x-mine":
                tool["x-mine"] = nested(depth)
            else:
                body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": nested(depth)}}
            answer = await wire.post("/assistants", body)
            if fits:
                assert answer.status == 200
                assert await wire.read(f"/assistants/{answer.json['id']}") == answer.json
            else:
                assert answer.fault.message.endswith("nested too deeply. Expected at most 100 levels.")
    for opening in (b"[", b'{"a":'):
        deep = b'{"model":"m","tools":' + opening * 50_000
        assert (await wire.post("/assistants", deep)).fault == Fault(400, NOT_JSON)
    await assert_alive(wire)


# --- paths, queries, methods -----------------------------------------------------------------------------------


async def test_odd_ids_name_nothing(wire: Wire):
    """Whatever stands for an id, on every route, nothing is found by it, and nothing breaks."""
    for method, path, act in ROUTES:
        names = [name for name in ("assistant", "thread", "message", "run", "step", "model") if f"{{{name}" in path]
        for name in names:
            for part in ODD_PARTS:
                answer = await wire.ask(method, filled(path, **{name: part}), BODIES.get(act.__name__))
                assert_refused(answer, 400 if "%00" in part else 404)
    assert (await wire.read("/threads"))["data"] == []


async def test_odd_queries_are_refused_or_left_alone(wire: Wire):
    """Whatever a query holds, a list is answered or refused."""
    thread = await wire.made("/threads")
    for path in ("/assistants", "/threads", f"/threads/{thread['id']}/messages", f"/threads/{thread['id']}/runs"):
        for name in ("limit", "order", "after", "before", "run_id", "include[]", "metadata[k]", "metadata[", "x", ""):
            for part in ODD_PARTS:
                answer = await wire.get(f"{path}?{name}={part}")
                assert answer.status in (200, 400, 404)
        for query in ("&&&", "=", "limit", "%00", "limit=" + "9" * 5000, "limit=1" * 1000, "a=" * 20_000, "%FF=%FF"):
            assert (await wire.get(f"{path}?{query}")).status in (200, 400)


async def test_broken_http_does_no_harm(server: Server, wire: Wire):
    """Bytes that are no HTTP are answered with a 400 or not at all, and the next caller is served."""
    host, port = wire.client.base_url.host, wire.client.base_url.port
    head = b"host: localhost\r\nauthorization: Bearer x\r\n"
    for data in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET /v1/assistants/\xff HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /v1/assistants?a=\xff HTTP/1.1\r\n" + head + b"\r\n",
        b"FOO /v1/assistants HTTP/1.1\r\n" + head + b"\r\n",
        b"POST /v1/threads HTTP/1.1\r\n" + head + b"content-length: -1\r\n\r\n",
        b"POST /v1/threads HTTP/1.1\r\n" + head + b"content-length: 9" + b"9" * 50 + b"\r\n\r\n",
        b"POST /v1/threads HTTP/1.1\r\n" + head + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/threads HTTP/1.1\r\n" + head + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(data)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        writer.close()
        await writer.wait_closed()
    for cut in (b"POST /v1/threads HTTP/1.1\r\n" + head + b"content-length: 99\r\n\r\n{", b"GET /v1/assist", b""):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(cut)
        writer.close()
        await writer.wait_closed()
    await assert_alive(wire)
    assert (await wire.read("/threads"))["data"] == []


# --- races -----------------------------------------------------------------------------------------------------


async def test_one_of_many_runs_wins(server: Server, wire: Wire):
    """Of 64 runs created on one thread at once exactly one is; the others are told which holds the thread."""
    gate = asyncio.Event()
    server.model.will([gate, ended("stop")])
    assistant = await server.assistant()
    thread = await wire.made("/threads", {"messages": [{"role": "user", "content": "hi"}]})
    path = f"/threads/{thread['id']}/runs"
    body = {"assistant_id": assistant.id, "additional_messages": [{"role": "user", "content": "more"}]}
    answers = await asyncio.gather(*(wire.post(path, body) for _ in range(RACERS)))
    [winner] = [answer.json for answer in answers if answer.status == 200]
    busy = Fault(400, f"Thread {thread['id']} already has an active run {winner['id']}.")
    assert [answer.fault for answer in answers if answer.status != 200] == [busy] * (RACERS - 1)
    assert (await wire.get(path)).ids == [winner["id"]]
    assert len((await wire.get(f"/threads/{thread['id']}/messages")).ids) == 2
    gate.set()
    assert (await wire.stopped(winner))["status"] == "completed"
    assert len(server.model.requests) == 1


async def test_no_message_is_lost_or_doubled(wire: Wire):
    """Messages that many callers add at once are all there, once, in the order in which each caller sent its own."""
    thread = await wire.made("/threads")
    path = f"/threads/{thread['id']}/messages"

    async def talk(caller: int) -> list[str]:
        bodies = [{"role": "user", "content": f"{caller} {number}"} for number in range(6)]
        return [(await wire.made(path, body))["id"] for body in bodies]

    told = await asyncio.gather(*(talk(caller) for caller in range(16)))
    listed = (await wire.read(f"{path}?order=asc&limit=100"))["data"]
    ids = [message["id"] for message in listed]
    assert sorted(ids) == sorted(message_id for one in told for message_id in one)
    for caller, sent in enumerate(told):
        assert [message_id for message_id in ids if message_id in sent] == sent
        words = [message["content"][0]["text"]["value"] for message in listed if message["id"] in sent]
        assert words == [f"{caller} {number}" for number in range(6)]


async def test_messages_race_with_a_run(server: Server, wire: Wire):
    """A message is either on the thread before the run, and told to the model, or refused because of it."""
    gate = asyncio.Event()
    server.model.will([gate, ended("stop")])
    assistant = await server.assistant()
    thread = await wire.made("/threads", {"messages": [{"role": "user", "content": "first"}]})
    path = f"/threads/{thread['id']}"
    asked = [wire.post(f"{path}/messages", {"role": "user", "content": f"message {n}"}) for n in range(16)]
    asked.insert(8, wire.post(f"{path}/runs", {"assistant_id": assistant.id}))
    answers = await asyncio.gather(*asked)
    run = answers.pop(8).json
    for answer in answers:
        if answer.status != 200:
            message = f"Can't add messages to {thread['id']} while a run {run['id']} is active."
            assert answer.fault == Fault(400, message)
    gate.set()
    await wire.stopped(run)
    told = json.dumps(server.model.requests[0].messages)
    for number, answer in enumerate(answers):
        assert (f'message {number}"' in told) is (answer.status == 200)


async def test_only_one_delete_counts(wire: Wire):
    """Of many deletes of one object at once one is told so, the others 404; modifies beside it are whole or 404."""
    for path, body in (
        ("/assistants", {"model": "m"}),
        ("/threads", {}),
        ("messages", {"role": "user", "content": "x"}),
    ):
        parent = f"/threads/{(await wire.made('/threads'))['id']}/messages" if path == "messages" else path
        place = f"{parent}/{(await wire.made(parent, body))['id']}"
        asked = [wire.delete(place) for _ in range(8)] + [wire.post(place, {"metadata": {"n": "1"}}) for _ in range(8)]
        answers = await asyncio.gather(*asked)
        assert Counter(answer.status for answer in answers[:8]) == {200: 1, 404: 7}
        assert {answer.status for answer in answers[8:]} <= {200, 404}
        assert (await wire.get(place)).status == 404


async def test_the_last_modify_stays_whole(wire: Wire):
    """Modifies of one object at once do not mix: what is read afterwards is what one of them wrote."""
    thread = await wire.made("/threads")
    place = f"/threads/{thread['id']}"
    maps = [{f"k{n}": str(number) for n in range(16)} for number in range(16)]
    answers = await asyncio.gather(*(wire.made(place, {"metadata": metadata}) for metadata in maps))
    assert [answer["metadata"] for answer in answers] == maps
    assert (await wire.read(place))["metadata"] in maps
    found = [number for number in range(16) if (await wire.get(f"/threads?metadata[k0]={number}")).ids]
    assert [(await wire.read(place))["metadata"]["k0"]] == [str(number) for number in found]


# --- anything --------------------------------------------------------------------------------------------------


class Target:
    """A server with a little of everything in it. known: ids that exist, by the names in the route table."""

    def __init__(self, server: Server, wire: Wire) -> None:
        self.server = server
        self.wire = wire
        self.known: dict[str, str] = {}

    async def furnish(self) -> None:
        assistant = await self.server.assistant(name="known")
        run = await self.server.run("hi", assistant_id=assistant.id)
        thread = f"/threads/{run.thread_id}"
        self.known = {
            "assistant": run.assistant_id,
            "thread": run.thread_id,
            "run": run.id,
            "message": (await self.wire.get(f"{thread}/messages")).ids[0],
            "step": (await self.wire.get(f"{thread}/runs/{run.id}/steps")).ids[0],
        }


@pytest.fixture
async def target(server: Server, wire: Wire) -> AsyncGenerator[Target, None]:
    made = Target(server, wire)
    await made.furnish()
    yield made
    await assert_alive(wire)


class Ask(NamedTuple):
    method: str
    path: str
    names: dict[str, str | None]
    query: str
    body: Any
    headers: dict[str, str]


TEXT = st.text(max_size=20) | st.sampled_from(["", "\x00", "\ud800", "auto", "function", "user", "text", "x" * 600])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
# Full bodies with a value or two replaced, so that what is asked comes near to what is taken.
NEAR = st.sampled_from(
    [FULL_ASSISTANT, FULL_THREAD, FULL_RUN, FULL_THREAD["messages"][0], *BODIES.values(), {"metadata": {"k": "v"}}]
).flatmap(
    lambda body: st.lists(st.tuples(st.sampled_from([(), *places(body)]), PLAIN), max_size=2).map(
        lambda changes: _changed(body, changes)
    )
)
ENCODED = st.text(min_size=1, max_size=30).map(lambda text: quote(text, safe="", errors="replace"))
PARTS = st.none() | st.sampled_from(ODD_PARTS[:-1]) | ENCODED
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(
            ["limit", "order", "after", "before", "run_id", "include[]", "metadata[k]", "api-version", "x"]
        ),
        st.sampled_from(["", "1", "100", "asc", "desc", "v", INCLUDE_FILE_SEARCH_CONTENT, *ODD_PARTS[:-1]])
        | st.text(string.printable, max_size=10).map(quote),
    ),
    max_size=3,
).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs))


def _changed(body: Any, changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
    for place, value in changes:
        try:
            body = put(body, place, value) if place else body
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    return body


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    method, path, act = draw(st.sampled_from(ROUTES))
    if draw(st.integers(0, 9)) == 0:
        method = draw(st.sampled_from(METHODS))
    names = {name: draw(PARTS) for name in ("assistant", "thread", "run", "message", "step", "model")}
    body = draw(st.none() | st.binary(max_size=50) | PLAIN | NEAR | st.just(BODIES.get(act.__name__)))
    headers = draw(
        st.dictionaries(
            st.sampled_from(["openai-beta", "content-type", "accept", "x-stainless-lang", "last-event-id", "range"]),
            st.text(string.ascii_letters + string.digits + "=/;,-", max_size=20),
            max_size=2,
        )
    )
    prefix = draw(st.sampled_from(["/v1", "/openai", "/openai/v1"]))
    return Ask(method, f"/{prefix}{path}", names, draw(QUERIES), body, headers)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(ask=asks())
async def test_nothing_breaks_it(target: Target, ask: Ask):
    """Any method, path, ids, query, headers and body, on any route, is answered with an object or the error envelope,
    and never with a 5xx."""
    ids = {name: value or target.known.get(name, "scripted") for name, value in ask.names.items()}
    answer = await target.wire.ask(
        ask.method, f"{filled(ask.path, **ids)}?{ask.query}", ask.body, headers=dict(ask.headers)
    )
    assert answer.status in (200, 400, 404), answer.content
    if ask.method == "DELETE" and answer.status == 200:
        await target.furnish()
