"""Finding threads, messages and runs again: by words, time, assistant and status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afterglow.finding import index_messages
from afterglow.rows import message_words, threads
from afterglow.testing import SetClock, calls, says
from tests.api.wire import Wire
from tests.conftest import GET_WEATHER, Server, ServerFactory

Say = Callable[..., Any]


async def say(server: Server, text: str, thread_id: str | None = None) -> tuple[str, str]:
    """A message, on a new thread unless one is named; the thread's id and its own."""
    thread_id = thread_id or (await server.client.beta.threads.create()).id
    message = await server.client.beta.threads.messages.create(thread_id, role="user", content=text)
    return thread_id, message.id


async def found(wire: Wire, server: Server, query: str, **more: Any) -> list[str]:
    """The texts of the messages that are found, in their order."""
    await index_messages(server.house)
    answer = await wire.get("/messages", params={"query": query, **more})
    assert answer.status == 200, answer.json
    return ["".join(part["text"]["value"] for part in one["content"]) for one in answer.json["data"]]


# --- words -----------------------------------------------------------------------------------------------------


async def test_messages_are_found_by_their_words(server: Server, wire: Wire):
    """All words must occur, in any order and case, accents aside; the answer is the message with its thread; the newest
    comes first; what a model has said is found as well."""
    thread_id, message_id = await say(server, "The quick brown fox jumps over the Café.")
    await say(server, "A quick answer", thread_id)
    server.model.will(says("Foxes are quick."))
    await server.run("Tell me of foxes.")
    assert await found(wire, server, "quick") == [
        "Foxes are quick.",
        "A quick answer",
        "The quick brown fox jumps over the Café.",
    ]
    assert await found(wire, server, "cafe BROWN") == ["The quick brown fox jumps over the Café."]
    assert await found(wire, server, "quick slow") == []
    answer = await wire.get("/messages", params={"query": "fox"})
    assert [(one["id"], one["thread_id"]) for one in answer.json["data"]] == [(message_id, thread_id)]
    assert await found(wire, server, "quick", thread_id=thread_id, order="asc") == [
        "The quick brown fox jumps over the Café.",
        "A quick answer",
    ]


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("東京都に住んでいます", ["東京", "京都", "東", "住んで"]),
        ("ภาษาไทยง่ายมาก", ["ไทย", "ภาษา", "ท"]),
        ("हिन्दी में लिखा", ["हिन्दी", "लिखा"]),
        ("OpenAI's getWeather(report.pdf) C++", ["OpenAI", "openai", "getweather", "weather", "report.pdf", "C++"]),
        ("naïve ÅNGSTRÖM straße", ["naive", "angstrom", "STRASSE"]),
    ],
)
async def test_words_of_many_scripts(server: Server, wire: Wire, text: str, queries: list[str]):
    """Scripts without spaces are found by any part; names by their parts; accents and case do not matter."""
    await say(server, text)
    for query in queries:
        assert await found(wire, server, query) == [text], query


async def test_pages_of_messages(server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch):
    """Cursors lead through all that is found, both ways, over the borders of blocks."""
    monkeypatch.setattr(message_words, "BLOCK", 4)
    monkeypatch.setattr(message_words, "BLOCKS_AT_ONCE", 2)
    thread_id = (await server.client.beta.threads.create()).id
    for number in range(23):
        await say(server, f"needle {number}" if number % 3 else f"hay {number}", thread_id)
    needles = [f"needle {number}" for number in range(23) if number % 3]
    assert await found(wire, server, "needle", limit=100, order="asc") == needles
    for order in ("desc", "asc"):
        expected = needles[::-1] if order == "desc" else needles
        seen: list[Any] = []
        after: dict[str, str] = {}
        while True:
            params = {"query": "needle", "limit": 4, "order": order, **after}
            page = (await wire.get("/messages", params=params)).json
            seen += page["data"]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert [one["content"][0]["text"]["value"] for one in seen] == expected
        before = await found(wire, server, "needle", order=order, before=seen[5]["id"], limit=3)
        assert before == expected[2:5]
        between = await found(wire, server, "needle", order=order, after=seen[1]["id"], before=seen[5]["id"])
        assert between == expected[2:5]
    answer = await wire.get("/messages", params={"query": "needle", "after": "msg_nothing"})
    assert (answer.status, answer.fault.param) == (404, "after")


async def test_what_is_deleted_is_not_found(server: Server, wire: Wire):
    """From the delete on a message is found no more, nor are those of a thread; soon their words are gone from the
    index."""
    thread_id, message_id = await say(server, "xylophone one")
    await say(server, "xylophone two", thread_id)
    await say(server, "xylophone three")
    assert len(await found(wire, server, "xylophone")) == 3
    await server.client.beta.threads.messages.delete(message_id, thread_id=thread_id)
    answer = await wire.get("/messages", params={"query": "xylophone"})
    assert [one["content"][0]["text"]["value"] for one in answer.json["data"]] == ["xylophone three", "xylophone two"]
    await server.client.beta.threads.delete(thread_id)
    answer = await wire.get("/messages", params={"query": "xylophone"})
    assert [one["content"][0]["text"]["value"] for one in answer.json["data"]] == ["xylophone three"]
    await index_messages(server.house)
    terms = await server.house.store.read(lambda tx: tx.fetch("SELECT term FROM message_terms ORDER BY term"))
    assert [term for (term,) in terms] == ["three", "xylophone"]
    assert await found(wire, server, "xylophone") == ["xylophone three"]


async def test_what_was_deleted_before_it_was_indexed_never_is(server: Server, wire: Wire):
    """No word of it reaches the index."""
    thread_id, message_id = await say(server, "ephemeral")
    await server.client.beta.threads.messages.delete(message_id, thread_id=thread_id)
    other, _ = await say(server, "ephemeral too")
    await server.client.beta.threads.delete(other)
    assert await found(wire, server, "ephemeral") == []
    for table in ("unindexed_messages", "indexed_messages", "message_terms", "removed_messages"):
        assert await server.house.store.read(lambda tx, table=table: tx.fetch(f"SELECT * FROM {table}")) == []


async def test_other_projects_find_nothing(start_server: ServerFactory, tmp_path: Path, connect: Callable[..., Wire]):
    """Messages, threads and runs of another project are not found, whatever is asked for."""
    async with start_server(tmp_path, api_keys="test-key,sk-other:other") as server:
        thread_id, message_id = await say(server, "secret")
        run = await server.run("secret", thread_id=thread_id)
        await index_messages(server.house)
        other = connect(server, "sk-other")
        for path in (
            "/messages?query=secret",
            f"/messages?query=secret&thread_id={thread_id}",
            "/threads?query=secret",
            f"/threads?assistant_id={run.assistant_id}",
            "/threads?run_status=completed",
            "/runs",
            f"/runs?thread_id={thread_id}",
        ):
            answer = await other.get(path)
            assert (answer.status, answer.json["data"]) == (200, []), path
        answer = await other.get(f"/messages?query=secret&after={message_id}")
        assert answer.status == 404


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/messages", "query"),
        ("/messages?query=", "query"),
        ("/messages?query=...", "query"),
        ("/messages?query=" + "+".join(f"w{number}" for number in range(17)), "query"),
        ("/messages?query=" + "w" * 1001, "query"),
        ("/messages?query=a&created_at[gte]=soon", "created_at[gte]"),
        ("/threads?run_status=done", "run_status"),
        ("/runs?status=done", "status"),
        ("/runs?created_at[lt]=1.5", "created_at[lt]"),
    ],
)
async def test_what_cannot_be_asked(wire: Wire, path: str, param: str):
    """A 400 that names the parameter."""
    answer = await wire.get(path)
    assert (answer.status, answer.fault.param) == (400, param)


# --- threads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few_runs", [0, 5_000])
async def test_threads_by_what_happened_on_them(
    server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch, few_runs: int
):
    """By assistant, by the status of the last run, by words and by metadata, alone and together."""
    monkeypatch.setattr(threads, "FEW_RUNS", few_runs)
    other = await server.assistant(name="Other")
    first = await server.run("apples")
    second = await server.run("pears", assistant_id=other.id)
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    third = await server.run("plums", thread_id=first.thread_id, tools=[GET_WEATHER])
    fourth = (await server.client.beta.threads.create(metadata={"a": "b"})).id
    await index_messages(server.house)
    for query, expected in (
        ({}, [fourth, second.thread_id, first.thread_id]),
        ({"assistant_id": other.id}, [second.thread_id]),
        ({"assistant_id": first.assistant_id}, [first.thread_id]),
        ({"assistant_id": "asst_nobody"}, []),
        ({"run_status": "completed"}, [second.thread_id]),
        ({"run_status": "requires_action"}, [first.thread_id]),
        ({"run_status": "failed"}, []),
        ({"query": "apples"}, [first.thread_id]),
        ({"query": "bananas"}, []),
        ({"query": "script"}, [second.thread_id, first.thread_id]),
        ({"query": "script", "assistant_id": other.id, "run_status": "completed"}, [second.thread_id]),
        ({"query": "script", "run_status": "failed"}, []),
        ({"metadata[a]": "b"}, [fourth]),
        ({"metadata[a]": "b", "query": "apples"}, []),
    ):
        answer = await wire.get("/threads", params=query)
        assert [one["id"] for one in answer.json["data"]] == expected, query
    assert third.status == "requires_action"


async def test_threads_and_runs_by_time(start_server: ServerFactory, tmp_path: Path, connect: Callable[..., Wire]):
    """Each of the four bounds means what it says; messages obey them, too."""
    clock = SetClock(1_000)
    async with start_server(tmp_path, clock=clock) as server:
        wire = connect(server)
        times = {}
        for second in (1_000, 1_001, 1_002, 1_003):
            clock.time = second
            run = await server.run("word")
            times |= {run.thread_id: second, run.id: second}
        await index_messages(server.house)
        for bounds, expected in (
            ({"gte": 1_001, "lt": 1_003}, [1_002, 1_001]),
            ({"gt": 1_001}, [1_003, 1_002]),
            ({"lte": 1_000}, [1_000]),
            ({"gt": 1_000, "gte": 1_000, "lte": 1_001, "lt": 9_999}, [1_001]),
            ({"gt": 9_999}, []),
            ({"gt": "9" * 30, "lt": -5}, []),
        ):
            query = {f"created_at[{sign}]": value for sign, value in bounds.items()}
            for path in ("/threads", "/runs"):
                answer = await wire.get(path, params=query)
                assert [times[one["id"]] for one in answer.json["data"]] == expected, (path, bounds)
            answer = await wire.get("/messages", params={"query": "word", **query})
            assert [one["created_at"] for one in answer.json["data"]] == expected


# --- runs ------------------------------------------------------------------------------------------------------


async def test_runs_of_all_threads(server: Server, wire: Wire):
    """The list has the runs of the project, newest first, by status, assistant, thread and model, with cursors."""
    other = await server.assistant(name="Other")
    runs = [await server.run("Hi", assistant_id=other.id) for _ in range(2)]
    runs.append(await server.run("Hi", model="gpt-4o-mini"))
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    runs.append(await server.run("Hi", tools=[GET_WEATHER], thread_id=runs[0].thread_id))
    ids = [run.id for run in runs[::-1]]
    for query, expected in (
        ({}, ids),
        ({"order": "asc"}, ids[::-1]),
        ({"limit": 2}, ids[:2]),
        ({"limit": 2, "after": ids[1]}, ids[2:]),
        ({"status": "completed"}, ids[1:]),
        ({"status": "completed", "after": ids[0]}, ids[1:]),
        ({"status": "requires_action"}, ids[:1]),
        ({"status": "queued"}, []),
        ({"assistant_id": other.id}, ids[2:]),
        ({"thread_id": runs[0].thread_id}, [ids[0], ids[3]]),
        ({"model": "gpt-4o-mini"}, [ids[1]]),
        ({"model": "gpt-4o-mini", "status": "failed"}, []),
    ):
        answer = await wire.get("/runs", params=query)
        assert [one["id"] for one in answer.json["data"]] == expected, query
    assert {one["object"] for one in (await wire.get("/runs")).json["data"]} == {"thread.run"}
