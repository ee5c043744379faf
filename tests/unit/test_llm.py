"""The model client against a scripted server: what real servers do differently, each in one conversation."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from afterglow.chat.server import Remembered
from afterglow.chat.stream import MOST_TOKENS
from afterglow.contracts import (
    ChatRequest,
    Delta,
    ModelEnd,
    ModelInfo,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    ToolCallDelta,
)
from afterglow.errors import (
    ConfigError,
    ContentFiltered,
    ContextOverflow,
    ModelBroke,
    ModelError,
    ModelRateLimited,
    ModelRefused,
    ModelTimeout,
    ModelUnreachable,
    NotFound,
)
from afterglow.llm import Models
from afterglow.settings import ModelSettings, Settings, Upstream
from tests.scripted_server import (
    DONE,
    DROP,
    HANG,
    NO_ANSWER,
    Answer,
    ScriptedServer,
    chunk,
    event,
    refusal,
    reply,
    says,
    stream,
    usage,
)

KEY = "sk-very-secret"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as server:
        yield server


class Asker:
    """Models on scripted servers. waits: how long it waited between tries, instead of waiting."""

    def __init__(self, settings: Settings, offline: Any = None) -> None:
        self.waits: list[float] = []
        self.models = Models(settings, offline=offline, sleep=self._no_sleep)

    async def _no_sleep(self, wait_s: float) -> None:
        self.waits.append(wait_s)

    async def lists(self, model: str = "m", **fields: Any) -> list[list[Delta]]:
        fields.setdefault("messages", [{"role": "user", "content": "Hi"}])
        return [deltas async for deltas in self.models.stream(ChatRequest(model=model, **fields))]

    async def ask(self, model: str = "m", **fields: Any) -> Heard:
        return Heard([delta for deltas in await self.lists(model, **fields) for delta in deltas])


class Heard:
    """One answer, put together."""

    def __init__(self, deltas: list[Delta]) -> None:
        assert isinstance(deltas[-1], ModelEnd)
        self.end = deltas[-1]
        self.text = self._join(deltas, TextDelta)
        self.refusal = self._join(deltas, RefusalDelta)
        self.thoughts = self._join(deltas, ReasoningDelta)
        self.ids: list[str] = []
        self.calls: list[tuple[str, str]] = []
        for delta in deltas:
            if isinstance(delta, ToolCallDelta):
                self._take(delta)

    def _join(self, deltas: list[Delta], kind: Any) -> str:
        return "".join(delta.text for delta in deltas if isinstance(delta, kind))

    def _take(self, delta: ToolCallDelta) -> None:
        if delta.index == len(self.calls):
            assert delta.id
            assert delta.name
            self.ids.append(delta.id)
            self.calls.append((delta.name, delta.arguments))
        else:
            assert (delta.id, delta.name) == ("", "")
            name, arguments = self.calls[delta.index]
            self.calls[delta.index] = (name, arguments + delta.arguments)


MakeAsker = Callable[..., Asker]


@pytest.fixture
async def make() -> AsyncIterator[MakeAsker]:
    """Makes askers, and closes them."""
    made: list[Asker] = []

    def make_asker(*servers: ScriptedServer, offline: Any = None, **fields: Any) -> Asker:
        if servers:
            fields.setdefault("model_url", servers[0].url)
        made.append(Asker(Settings(**fields), offline))
        return made[-1]

    yield make_asker
    for asker in made:
        await asker.models.close()


@pytest.fixture
def asker(make: MakeAsker, upstream: ScriptedServer) -> Asker:
    return make(upstream, model_key=KEY)


def call(
    index: int | None = None, call_id: str | None = None, name: str | None = None, arguments: Any = None
) -> dict[str, Any]:
    """A delta with one fragment of a function call; what is None is left out."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    fields = {"index": index, "id": call_id, "function": function}
    return {"tool_calls": [{key: value for key, value in fields.items() if value is not None}]}


def named(server: ScriptedServer, name: str, **fields: Any) -> Upstream:
    return Upstream(name=name, url=server.url, **fields)


# --- the ordinary case -----------------------------------------------------------------------------------------


async def test_text_streams_with_usage(asker: Asker, upstream: ScriptedServer) -> None:
    """A plain answer comes as text deltas, then a ModelEnd with reason, usage, names and parameters."""
    upstream.says(says("Hel", "lo"))
    heard = await asker.ask("m", temperature=0.5, user="u1")
    assert heard.text == "Hello"
    assert heard.end.finish_reason == "stop"
    assert heard.end.usage is not None
    assert heard.end.usage.total_tokens == 10
    assert heard.end.raw_usage == usage()
    assert heard.end.model == "stub-1"
    assert heard.end.upstream == f"127.0.0.1:{upstream.port}"
    assert heard.end.sent == {"temperature": 0.5, "user": "u1"}
    assert heard.end.dropped == []


async def test_what_is_sent(asker: Asker, upstream: ScriptedServer) -> None:
    """A request streams, asks for usage, carries the key, and has no parameter that nobody set."""
    upstream.says(says("ok"))
    await asker.ask("m")
    request = upstream.chats[0]
    assert request.json == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["accept-encoding"] == "identity"


async def test_tool_parameters_go_with_tools_only(asker: Asker, upstream: ScriptedServer) -> None:
    """tool_choice and parallel_tool_calls are left out when there are no tools, as servers refuse them then."""
    upstream.says(says("ok"), says("ok"))
    await asker.ask(tool_choice="auto", parallel_tool_calls=False)
    await asker.ask(tool_choice="auto", parallel_tool_calls=False, tools=TOOLS)
    without, with_tools = (request.json for request in upstream.chats)
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & without.keys()
    assert with_tools["tools"] == TOOLS
    assert (with_tools["tool_choice"], with_tools["parallel_tool_calls"]) == ("auto", False)


async def test_what_arrives_together_is_one_list(asker: Asker, upstream: ScriptedServer) -> None:
    """Chunks that arrive in one read come as one list; those that arrive later, later."""
    later = asyncio.Event()
    first = chunk({"content": "a"}) + chunk({"content": "b"})
    upstream.says(stream(first, later, chunk({"content": "c"}) + chunk(finish="stop") + DONE))
    lists: list[list[Delta]] = []
    async for deltas in asker.models.stream(ChatRequest(model="m", messages=[])):
        lists.append(deltas)
        later.set()
    assert lists[0] == [TextDelta("a"), TextDelta("b")]
    assert lists[1][0] == TextDelta("c")
    assert isinstance(lists[1][1], ModelEnd)


async def test_the_connection_is_used_again(asker: Asker, upstream: ScriptedServer) -> None:
    """Calls one after the other share a connection."""
    upstream.says(*[says("ok") for _ in range(5)])
    for _ in range(5):
        await asker.ask()
    assert upstream.connections == 1


async def test_a_stale_connection_is_replaced(make: MakeAsker, upstream: ScriptedServer) -> None:
    """A kept connection that the server closes just then costs no try."""
    asker = make(upstream, model_retries=0)
    upstream.says(says("one"), NO_ANSWER, says("two"))
    await asker.ask()
    assert (await asker.ask()).text == "two"
    assert upstream.connections == 2


async def test_an_answer_that_ends_with_the_connection(asker: Asker, upstream: ScriptedServer) -> None:
    """A server that closes the connection instead of framing its answer is understood."""
    upstream.says(Answer(200, {"content-type": "text/event-stream"}, [HELLO], until_close=True), says("two"))
    assert (await asker.ask()).text == "Hello"
    assert (await asker.ask()).text == "two"
    assert upstream.connections == 2


async def test_informational_answers_are_passed_over(asker: Asker, upstream: ScriptedServer) -> None:
    """A `103 Early Hints` before the answer is not the answer."""
    answer = says("Hello")
    answer.hints = True
    upstream.says(answer)
    assert (await asker.ask()).text == "Hello"


async def test_tls_to_a_server_without_it(make: MakeAsker) -> None:
    """`https` where the server speaks `http` is no connection, and says so."""

    def speak_plainly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(speak_plainly, "127.0.0.1", 0) as plain:
        port = plain.sockets[0].getsockname()[1]
        asker = make(model_url=f"https://127.0.0.1:{port}/v1", model_retries=0)
        with pytest.raises(ModelUnreachable, match="cannot be reached"):
            await asker.ask()


async def test_a_proxy_is_used_as_usual(
    make: MakeAsker, upstream: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual variables name a proxy for model servers elsewhere, not for those on this machine."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{upstream.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    upstream.says(says("by proxy"), says("direct"))
    assert (await make(model_url="http://models.example/v1").ask()).text == "by proxy"
    assert (await make(upstream).ask()).text == "direct"
    assert [request.path for request in upstream.chats] == [
        "http://models.example/v1/chat/completions",
        "/v1/chat/completions",
    ]


async def test_many_streams_at_once(asker: Asker, upstream: ScriptedServer) -> None:
    """A hundred and fifty open streams do not wait for each other."""
    all_open = asyncio.Event()
    upstream.says(*[stream(chunk({"content": "a"}), all_open, chunk(finish="stop"), DONE) for _ in range(150)])
    asking = [asyncio.create_task(asker.ask()) for _ in range(150)]
    await upstream.asked(150)
    all_open.set()
    assert [heard.text for heard in await asyncio.gather(*asking)] == ["a"] * 150


async def test_closing_aborts_the_call(asker: Asker, upstream: ScriptedServer) -> None:
    """When the iterator is closed, the server sees the connection go."""
    upstream.says(stream(chunk({"content": "a"}), HANG))
    async with aclosing(asker.models.stream(ChatRequest(model="m", messages=[]))) as lists:
        assert await anext(lists) == [TextDelta("a")]
    await upstream.chats[0].gone.wait()


async def test_cancelling_aborts_a_call_that_has_not_answered(asker: Asker, upstream: ScriptedServer) -> None:
    """Cancelling the task that waits for the first token closes the connection."""
    upstream.says(stream(HANG))
    asking = asyncio.create_task(asker.ask())
    request = await upstream.asked()
    asking.cancel()
    await request.gone.wait()
    with pytest.raises(asyncio.CancelledError):
        await asking


# --- lines -----------------------------------------------------------------------------------------------------

HELLO = chunk({"content": "Hello"}) + chunk(finish="stop") + DONE


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([HELLO.replace(b"\n", b"\r\n")], id="crlf"),
        pytest.param([HELLO.replace(b"data: ", b"data:")], id="no space"),
        pytest.param([b": OPENROUTER PROCESSING\n\n", b":\n", HELLO], id="comments"),
        pytest.param([b"event: message\nid: 1\nretry: 5\n" + HELLO], id="other fields"),
        pytest.param([HELLO.replace(b"\n\n", b"\n")], id="no blank lines"),
        pytest.param([b"\xef\xbb\xbf" + HELLO], id="byte order mark"),
        pytest.param([HELLO[i : i + 1] for i in range(len(HELLO))], id="byte by byte"),
        pytest.param([HELLO.rstrip(b"\n")], id="no last line end"),
        pytest.param([HELLO.replace(b'"choices"', b'\ndata: "choices"')], id="event over two lines"),
        pytest.param([chunk({"content": "Hello"}), chunk(finish="stop")], id="no DONE"),
    ],
)
async def test_lines_of_all_kinds(asker: Asker, upstream: ScriptedServer, sent: list[bytes]) -> None:
    """However a server writes its lines, the answer is the same."""
    upstream.says(stream(*sent))
    assert (await asker.ask()).text == "Hello"


async def test_a_whole_json_answer(asker: Asker, upstream: ScriptedServer) -> None:
    """A server that ignores `stream` and sends one JSON completion is understood, function calls included."""
    message = {"role": "assistant", "content": "Hi", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    upstream.says(reply({"object": "chat.completion", "model": "x", "choices": [choice], "usage": usage()}))
    heard = await asker.ask()
    assert (heard.text, heard.calls, heard.end.finish_reason) == ("Hi", [("f", "")], "tool_calls")
    assert heard.end.usage is not None


async def test_a_message_where_a_delta_belongs(asker: Asker, upstream: ScriptedServer) -> None:
    """A stream of one chunk with a `message` is understood; a `message` that repeats the deltas is not said twice."""
    whole = {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}
    upstream.says(stream(event(whole), DONE), stream(chunk({"content": "Hello"}), event(whole), DONE))
    assert (await asker.ask()).text == "Hello"
    assert (await asker.ask()).text == "Hello"


# --- deltas ----------------------------------------------------------------------------------------------------


async def test_empty_things_are_nothing(asker: Asker, upstream: ScriptedServer) -> None:
    """Null or absent deltas, contents, choices and calls say nothing."""
    empty = [{"content": None}, {"content": ""}, {"role": "assistant"}, {"tool_calls": None}, {"tool_calls": []}]
    upstream.says(
        stream(
            event({"choices": [], "prompt_filter_results": []}),
            event({"choices": None}),
            event({"choices": [{"index": 0, "delta": None, "finish_reason": ""}]}),
            event({"choices": [{}]}),
            *[chunk(delta) for delta in empty],
            HELLO,
        )
    )
    lists = await asker.lists()
    assert [delta for deltas in lists for delta in deltas][:-1] == [TextDelta("Hello")]


async def test_content_in_parts(asker: Asker, upstream: ScriptedServer) -> None:
    """Content as a list of parts is text, and thoughts inside it are thoughts (Mistral)."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    upstream.says(says({"content": [thinking, {"type": "text", "text": "Hello"}]}))
    heard = await asker.ask()
    assert (heard.text, heard.thoughts) == ("Hello", "Hm.")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
async def test_thoughts(asker: Asker, upstream: ScriptedServer, field: str) -> None:
    """What a model thinks is told apart from what it says."""
    upstream.says(says({field: "Hm."}, "Hello"))
    heard = await asker.ask()
    assert (heard.text, heard.thoughts) == ("Hello", "Hm.")


async def test_thoughts_under_two_names_count_once(asker: Asker, upstream: ScriptedServer) -> None:
    """A server that sends its thoughts under an old and a new name is heard once."""
    upstream.says(says({"reasoning": "Hm.", "reasoning_content": "Hm."}))
    assert (await asker.ask()).thoughts == "Hm."


async def test_refusal(asker: Asker, upstream: ScriptedServer) -> None:
    """A refusal is no text."""
    upstream.says(says({"refusal": "I will"}, {"refusal": " not."}))
    heard = await asker.ask()
    assert (heard.text, heard.refusal) == ("", "I will not.")


async def test_nul_becomes_a_replacement_character(asker: Asker, upstream: ScriptedServer) -> None:
    """NUL never gets in, in text or arguments."""
    upstream.says(says("a\0b", call(0, "c", "f", "{\0}")))
    heard = await asker.ask()
    assert (heard.text, heard.calls) == ("a\ufffdb", [("f", "{\ufffd}")])


async def test_a_lone_half_becomes_a_replacement_character(asker: Asker, upstream: ScriptedServer) -> None:
    """Half surrogates, in the middle or at the end, become U+FFFD."""
    upstream.says(says("a\ud83db", "c\ud83d"))
    assert (await asker.ask()).text == "a\ufffdbc\ufffd"


async def test_two_halves_become_their_character(asker: Asker, upstream: ScriptedServer) -> None:
    """A character cut in two by the chunks is put together, in text, thoughts and arguments."""
    upstream.says(
        says("a\ud83d", "\ude00b", {"reasoning": "\ud83d"}, "c", {"reasoning": "\ude00"}),
        says(call(0, "c", "f", '"\ud83d'), call(0, arguments='\ude00"')),
    )
    heard = await asker.ask()
    assert (heard.text, heard.thoughts) == ("a😀bc", "😀")
    assert (await asker.ask()).calls == [("f", '"😀"')]


async def test_broken_utf8_becomes_replacement_characters(asker: Asker, upstream: ScriptedServer) -> None:
    """Bytes that are no UTF-8 do not break the answer."""
    upstream.says(stream(HELLO.replace(b"ell", b"e\xff\xfe")))
    assert (await asker.ask()).text == "He\ufffd\ufffdo"


# --- function calls --------------------------------------------------------------------------------------------


async def test_fragmented_calls(asker: Asker, upstream: ScriptedServer) -> None:
    """OpenAI's way: id and name first, then the arguments piece by piece; two calls in parallel."""
    upstream.says(
        says(
            call(0, "a", "f", ""),
            call(0, arguments='{"x"'),
            call(0, arguments=":1}"),
            call(1, "b", "g", ""),
            call(1, arguments="{}"),
            finish="tool_calls",
        )
    )
    heard = await asker.ask(tools=TOOLS)
    assert heard.calls == [("f", '{"x":1}'), ("g", "{}")]
    assert heard.ids == ["a", "b"]
    assert heard.end.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "deltas",
    [
        pytest.param([call(0, "a", "f", '{"x":1}'), call(1, "b", "f", "{}")], id="whole"),
        pytest.param([call(0, "a", "f", '{"x":1}'), call(0, "b", "f", "{}")], id="one index, two ids"),
        pytest.param([call(None, "a", "f", '{"x":1}'), call(None, "b", "f", "{}")], id="no index"),
        pytest.param([call(0, None, "f", '{"x":1}'), call(1, None, "f", "{}")], id="no ids"),
        pytest.param([call(0, None, "f", '{"x":1}'), call(0, None, "f", "{}")], id="one index, no ids"),
        pytest.param([call(None, None, "f", '{"x":1}'), call(None, None, "f", "{}")], id="neither index nor ids"),
        pytest.param([call(0, "", "f", '{"x":1}'), call(0, "", "f", "{}")], id="empty ids"),
        pytest.param([call(0, "a", "f", {"x": 1}), call(1, "b", "f", {})], id="arguments as an object"),
        pytest.param(
            [{"tool_calls": call(0, "a", "f", '{"x":1}')["tool_calls"] + call(0, "b", "f", "{}")["tool_calls"]}],
            id="both in one chunk under one index",
        ),
        pytest.param(
            [call(0, "a", "f", '{"x"'), call(0, "a", "f", ":1}"), call(1, "b", "f", "{}"), call(1, "b", None, "")],
            id="id and name on every fragment",
        ),
        pytest.param(
            [call(0, "a", "f", '{"x"'), call(0, "zz", None, ":1}"), call(1, "b", "f", "{"), call(1, "yy", None, "}")],
            id="another id on every fragment",
        ),
        pytest.param(
            [call(None, "a", "f", '{"x"'), call(None, None, None, ":1}"), call(None, "b", "f", "{}")],
            id="fragments without index",
        ),
        pytest.param(
            [call(0, "a", None, ""), call(0, None, "f", '{"x":1}'), call(1, "b", "f", "{}")], id="name after id"
        ),
        pytest.param(
            [call(0, "a", "f", ""), call(1, "b", "f", ""), call(0, arguments='{"x":1}'), call(1, arguments="{}")],
            id="interleaved",
        ),
    ],
)
async def test_two_calls_however_told(asker: Asker, upstream: ScriptedServer, deltas: list[Any]) -> None:
    """Two calls are two calls, whole or in pieces, with or without ids and indexes."""
    upstream.says(says(*deltas, finish="tool_calls"))
    heard = await asker.ask(tools=TOOLS)
    assert [(name, json.loads(arguments)) for name, arguments in heard.calls] == [("f", {"x": 1}), ("f", {})]
    assert len(set(heard.ids)) == 2


async def test_another_name_under_one_index_is_another_call(asker: Asker, upstream: ScriptedServer) -> None:
    """Without ids, a new name starts a new call, arguments or not."""
    upstream.says(says(call(0, None, "f", ""), call(0, None, "g", "{}")))
    assert (await asker.ask()).calls == [("f", ""), ("g", "{}")]


async def test_missing_ids_are_made(asker: Asker, upstream: ScriptedServer) -> None:
    """A call without an id gets `call_` and 24 letters and digits, and keeps it."""
    upstream.says(says(call(0, None, "f", "{"), call(0, None, None, "}")))
    heard = await asker.ask()
    assert heard.calls == [("f", "{}")]
    assert re.fullmatch(r"call_[A-Za-z0-9]{24}", heard.ids[0])


async def test_one_id_for_two_calls_is_not_kept_for_both(asker: Asker, upstream: ScriptedServer) -> None:
    """Ids are unique within a turn even if the server's are not."""
    upstream.says(says(call(0, "a", "f", "{}"), call(1, "a", "g", "{}")))
    heard = await asker.ask()
    assert heard.calls == [("f", "{}"), ("g", "{}")]
    assert heard.ids[0] == "a" != heard.ids[1]


async def test_legacy_function_call(asker: Asker, upstream: ScriptedServer) -> None:
    """`function_call` of old is a call."""
    pieces = [{"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{}"}}]
    upstream.says(says(*pieces, finish="function_call"))
    heard = await asker.ask()
    assert (heard.calls, heard.end.finish_reason) == ([("f", "{}")], "tool_calls")


async def test_a_call_without_a_name_breaks_the_answer(asker: Asker, upstream: ScriptedServer) -> None:
    """Arguments for nothing cannot be carried out."""
    upstream.says(says(call(0, "a", None, "{}")))
    with pytest.raises(ModelBroke, match="without a name"):
        await asker.ask()


# --- ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("stop", "stop"),
        ("end_turn", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("content_filter", "content_filter"),
        ("SAFETY", "content_filter"),
        ("tool_calls", "stop"),  # none were made
    ],
)
async def test_finish_reasons(asker: Asker, upstream: ScriptedServer, said: str, meant: str) -> None:
    """Finish reasons of all dialects become one of four."""
    upstream.says(says("Hello", finish=said))
    assert (await asker.ask()).end.finish_reason == meant


async def test_calls_under_stop_are_calls(asker: Asker, upstream: ScriptedServer) -> None:
    """A server that ends a turn of calls with `stop` (Gemini, streaming) made calls all the same."""
    upstream.says(says(call(0, "a", "f", "{}"), finish="stop"))
    assert (await asker.ask()).end.finish_reason == "tool_calls"


async def test_a_call_cut_by_the_limit_was_not_made(asker: Asker, upstream: ScriptedServer) -> None:
    """Half of a call's arguments under `length` stay `length`; whole ones are a call."""
    upstream.says(says(call(0, "a", "f", '{"x": "ha'), finish="length"), says(call(0, "a", "f", "{}"), finish="length"))
    assert (await asker.ask()).end.finish_reason == "length"
    assert (await asker.ask()).end.finish_reason == "tool_calls"


async def test_done_without_a_reason(asker: Asker, upstream: ScriptedServer) -> None:
    """An answer that `[DONE]` ends without a finish_reason is a whole one."""
    upstream.says(stream(chunk({"content": "Hello"}), DONE))
    heard = await asker.ask()
    assert (heard.text, heard.end.finish_reason) == ("Hello", "stop")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        pytest.param(stream(chunk({"content": "Hel"})), "without a finish_reason", id="cut off"),
        pytest.param(stream(DONE), "nothing that is a chat completion", id="nothing but DONE"),
        pytest.param(stream(), "nothing that is a chat completion", id="empty"),
        pytest.param(reply(b"<html>Hi</html>", content_type="text/html"), "nothing that is", id="a web page"),
        pytest.param(stream(b"data: {not json}\n\n"), "no JSON", id="no JSON"),
        pytest.param(reply(b"{broken"), "no JSON", id="half of a JSON body"),
        pytest.param(stream(event({"choices": "x"})), "no chat completion", id="another shape"),
        pytest.param(stream(event([1, 2])), "no chat completion", id="a list"),
        pytest.param(stream(event(b"[" * 100_000)), "no|JSON", id="too deep"),
        pytest.param(says("Hel", finish="error"), "broke the answer off", id="the server gave up"),
    ],
)
async def test_what_is_no_completion(asker: Asker, upstream: ScriptedServer, answer: Answer, complaint: str) -> None:
    """An answer that is none, or is not whole, breaks the call, names model and server, and is not tried again."""
    upstream.says(answer, says("not asked"))
    with pytest.raises(ModelBroke, match=complaint) as caught:
        await asker.ask("qwen3")
    assert "model 'qwen3'" in str(caught.value)
    assert str(upstream.port) not in str(caught.value)
    assert len(upstream.chats) == 1


# --- usage -----------------------------------------------------------------------------------------------------


async def test_no_usage(asker: Asker, upstream: ScriptedServer) -> None:
    """Where the server reports no usage there is none, not zero."""
    upstream.says(stream(HELLO))
    end = (await asker.ask()).end
    assert (end.usage, end.raw_usage) == (None, None)


async def test_usage_with_the_last_content(asker: Asker, upstream: ScriptedServer) -> None:
    """Usage may come in a chunk that has content, too."""
    upstream.says(stream(chunk({"content": "Hello"}, "stop", usage=usage(4, 2)), DONE))
    end = (await asker.ask()).end
    assert end.usage is not None
    assert end.usage.total_tokens == 6


async def test_usage_in_every_chunk(asker: Asker, upstream: ScriptedServer) -> None:
    """Where every chunk reports usage, the last one counts; null does not."""
    growing = [chunk({"content": "x"}, usage=usage(4, number)) for number in range(1, 4)]
    upstream.says(stream(*growing, chunk(finish="stop", usage=None), DONE))
    end = (await asker.ask()).end
    assert end.usage is not None
    assert end.usage.completion_tokens == 3


async def test_usage_inside_the_choice(asker: Asker, upstream: ScriptedServer) -> None:
    """Moonshot reports it inside the choice."""
    choice = {"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop", "usage": usage(4, 2)}
    upstream.says(stream(event({"choices": [choice]}), DONE))
    end = (await asker.ask()).end
    assert end.raw_usage == usage(4, 2)


@pytest.mark.parametrize(
    ("reported", "meant"),
    [
        pytest.param(
            usage(9, 5, prompt_tokens_details={"cached_tokens": 4}, completion_tokens_details={"reasoning_tokens": 2}),
            (9, 5, 14, 4, 2),
            id="openai",
        ),
        pytest.param(usage(9, 5, prompt_cache_hit_tokens=4), (9, 5, 14, 4, 0), id="deepseek"),
        pytest.param({"input_tokens": 9, "output_tokens": 5}, (9, 5, 14, 0, 0), id="anthropic"),
        pytest.param({"prompt_tokens": 9, "completion_tokens": 5}, (9, 5, 14, 0, 0), id="no total"),
        pytest.param(
            {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 20}, (9, 5, 20, 0, 0), id="thoughts in total"
        ),
        pytest.param(
            {**usage(9, 5), "prompt_tokens_details": None, "completion_tokens_details": {"reasoning_tokens": None}},
            (9, 5, 14, 0, 0),
            id="nulls",
        ),
        # A count that fits into no database would leave the run, or every bill of its project, stuck.
        pytest.param(
            {"prompt_tokens": 10**20, "completion_tokens": 1e300, "total_tokens": -1},
            (MOST_TOKENS, MOST_TOKENS, 2 * MOST_TOKENS, 0, 0),
            id="lies",
        ),
    ],
)
async def test_usage_in_all_dialects(
    asker: Asker, upstream: ScriptedServer, reported: Any, meant: tuple[int, ...]
) -> None:
    """Prompt, completion, total, cached and reasoning tokens are found under whatever name."""
    upstream.says(says("Hello", reported=reported))
    end = (await asker.ask()).end
    assert end.usage is not None
    assert end.raw_usage == reported
    assert meant == (
        end.usage.prompt_tokens,
        end.usage.completion_tokens,
        end.usage.total_tokens,
        end.usage.prompt_token_details.cached_tokens,
        end.usage.completion_tokens_details.reasoning_tokens,
    )


# --- failures --------------------------------------------------------------------------------------------------

OVERFLOWS = [
    (
        refusal(
            400,
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
            code="context_length_exceeded",
        ),
        8192,
    ),
    (refusal(400, "Your input exceeds the context window of this model.", code="context_length_exceeded"), None),
    (refusal(400, "Input tokens exceed the configured limit of 272000 tokens. Your messages…"), 272000),
    (
        reply(
            {
                "object": "error",
                "message": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
                "type": "BadRequestError",
                "code": 400,
            },
            400,
        ),
        4096,
    ),
    (refusal(400, "The decoder prompt (length 5000) is longer than the maximum model length of 4096."), 4096),
    (
        reply(
            {
                "error": {
                    "code": 400,
                    "message": "request (9412 tokens) exceeds the available context size, try increasing it",
                    "type": "exceed_context_size_error",
                    "n_prompt_tokens": 9412,
                    "n_ctx": 8192,
                }
            },
            400,
        ),
        8192,
    ),
    (refusal(500, "the input length exceeds the context length"), None),
    (
        reply(
            {
                "error": "Trying to keep the first 111490 tokens when context the overflows. However, the model is "
                "loaded with context length of only 32768 tokens, which is not enough."
            },
            400,
        ),
        32768,
    ),
    (refusal(400, "prompt is too long: 213462 tokens > 200000 maximum"), 200000),
    (
        reply(
            [
                {
                    "error": {
                        "code": 400,
                        "message": "The input token count (1196265) exceeds the maximum number of tokens allowed "
                        "(1048575).",
                        "status": "INVALID_ARGUMENT",
                    }
                }
            ],
            400,
        ),
        1048575,
    ),
    (refusal(400, "This model's maximum prompt length is 131072 but the request contains 537812 tokens."), 131072),
    (stream(event({"error": {"message": "prompt is too long: 9 tokens > 5 maximum", "code": 400}})), 5),
]


@pytest.mark.parametrize(("answer", "window_tokens"), OVERFLOWS)
async def test_overflow(asker: Asker, upstream: ScriptedServer, answer: Answer, window_tokens: int | None) -> None:
    """A prompt that is too long is recognised in every server's words, with the window where it is named."""
    upstream.says(answer)
    with pytest.raises(ContextOverflow) as caught:
        await asker.ask()
    assert caught.value.window_tokens == window_tokens
    assert len(upstream.chats) == 1


AZURE_FILTER = {
    "message": "The response was filtered due to the prompt triggering the content management policy.",
    "type": None,
    "param": "prompt",
    "code": "content_filter",
    "status": 400,
    "innererror": {"code": "ResponsibleAIPolicyViolation"},
}


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (refusal(401, "Incorrect API key provided", code="invalid_api_key"), ModelRefused, "refused the key"),
        (refusal(403, "Country not supported"), ModelRefused, "refused the key"),
        (refusal(404, "The model `m` does not exist", code="model_not_found"), ModelRefused, "no such model"),
        (reply({"error": 'model "m" not found, try pulling it first'}, 404), ModelRefused, "try pulling it first"),
        (refusal(400, "messages: at least one is needed"), ModelRefused, "at least one is needed"),
        (reply({"detail": [{"loc": ["body"], "msg": "bad"}]}, 422), ModelRefused, '"msg":"bad"'),
        (reply(b"no route", 405, "text/plain"), ModelRefused, "no route"),
        (Answer(301, {"location": "https://x/"}, [], sized=True), ModelRefused, "another URL"),
        (reply({"error": AZURE_FILTER}, 400), ContentFiltered, "filtered due to"),
        (refusal(400, "Rejected", code="content_policy_violation"), ContentFiltered, "Rejected"),
        (refusal(429, "You exceeded your quota", code="insufficient_quota"), ModelRateLimited, "your quota"),
        (refusal(402, "Insufficient Balance"), ModelRateLimited, "Insufficient Balance"),
        (stream(event({"error": {"message": "bad key", "type": "authentication_error"}})), ModelRefused, "bad key"),
        (stream(b"event: error\n" + event({"message": "bad", "code": 400})), ModelRefused, "bad"),
        (reply({"error": {"message": "bad", "code": 400}}), ModelRefused, "bad"),
    ],
)
async def test_refusals(
    asker: Asker, upstream: ScriptedServer, answer: Answer, kind: type[ModelError], words: str
) -> None:
    """What will not get better is not tried again, and ends as the right error in the server's own words."""
    upstream.says(answer)
    with pytest.raises(kind, match=re.escape(words)) as caught:
        await asker.ask("m")
    assert "model 'm'" in str(caught.value)
    assert str(upstream.port) not in str(caught.value)
    assert len(upstream.chats) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        pytest.param(refusal(429, "Rate limit reached for m"), ModelRateLimited, id="429"),
        pytest.param(refusal(500, "Oops"), ModelBroke, id="500"),
        pytest.param(reply(b"<html>Bad gateway</html>", 502, "text/html"), ModelBroke, id="502"),
        pytest.param(refusal(503, "Loading model"), ModelBroke, id="503"),
        pytest.param(refusal(408, "Timeout"), ModelTimeout, id="408"),
        pytest.param(refusal(409, "Conflict"), ModelBroke, id="409"),
        pytest.param(stream(DROP), ModelUnreachable, id="dropped before the first token"),
        pytest.param(stream(b": hold on\n\n", DROP), ModelUnreachable, id="dropped after a comment"),
        pytest.param(
            stream(event({"error": {"message": "Overloaded", "type": "overloaded_error"}})), ModelBroke, id="503 inside"
        ),
        pytest.param(
            stream(event({"error": {"message": "Slow down", "code": 429}})), ModelRateLimited, id="429 inside"
        ),
    ],
)
async def test_passing_trouble_is_tried_again(
    make: MakeAsker, upstream: ScriptedServer, answer: Answer, kind: type[ModelError]
) -> None:
    """What may get better is tried again, and gives the right error when it does not."""
    asker = make(upstream, model_retries=2)
    upstream.says(answer, says("Hello"))
    assert (await asker.ask()).text == "Hello"
    assert len(asker.waits) == 1
    upstream.says(answer, answer, answer)
    with pytest.raises(kind):
        await asker.ask()
    assert len(asker.waits) == 3


async def test_waits_grow(make: MakeAsker, upstream: ScriptedServer) -> None:
    """Without a word from the server, waits double, with some chance in them."""
    asker = make(upstream, model_retries=6)
    upstream.says(*[refusal(500, "Oops") for _ in range(6)], says("Hello"))
    await asker.ask()
    for wait_s, most in zip(asker.waits, [0.5, 1, 2, 4, 8, 8], strict=True):
        assert most * 0.75 <= wait_s <= most


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [({"retry_after": "7"}, 7), ({"retry_after_ms": "250", "retry_after": "9"}, 0.25), ({"retry_after": "soon"}, None)],
)
async def test_retry_after(asker: Asker, upstream: ScriptedServer, headers: Any, wait_s: float | None) -> None:
    """The wait that the server names is kept to; nonsense is ignored."""
    upstream.says(reply({"error": {"message": "slow down"}}, 429, **headers), says("Hello"))
    await asker.ask()
    assert asker.waits == [wait_s] if wait_s is not None else 0 < asker.waits[0] <= 0.5


async def test_a_date_to_retry_after(asker: Asker, upstream: ScriptedServer) -> None:
    """Retry-After may be a date; one that has passed means now."""
    upstream.says(reply({}, 429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), says("Hello"))
    await asker.ask()
    assert asker.waits == [0]


async def test_a_long_retry_after_is_not_waited_for(asker: Asker, upstream: ScriptedServer) -> None:
    """A server that wants an hour gets no second try."""
    upstream.says(reply({"error": {"message": "tomorrow"}}, 429, retry_after="3600"))
    with pytest.raises(ModelRateLimited, match="tomorrow"):
        await asker.ask()
    assert asker.waits == []


async def test_nothing_is_repeated_after_the_first_token(asker: Asker, upstream: ScriptedServer) -> None:
    """A connection that drops in the middle of an answer is not asked again."""
    upstream.says(stream(chunk({"content": "Hel"}), DROP), says("not asked"))
    with pytest.raises(ModelUnreachable, match="in the middle of its answer"):
        await asker.ask()
    assert len(upstream.chats) == 1


async def test_an_error_in_the_middle_of_the_stream(asker: Asker, upstream: ScriptedServer) -> None:
    """What was said stays said, then the error comes."""
    later = asyncio.Event()
    upstream.says(stream(chunk({"content": "Hel"}), later, event({"error": {"message": "out of memory"}})))
    lists = asker.models.stream(ChatRequest(model="m", messages=[]))
    assert await anext(lists) == [TextDelta("Hel")]
    later.set()
    with pytest.raises(ModelBroke, match="out of memory"):
        await anext(lists)


async def test_no_first_token(make: MakeAsker, upstream: ScriptedServer) -> None:
    """A server that sends nothing but comments runs into the first-token timeout, and is let go."""
    asker = make(upstream, first_token_timeout_s=0.05)
    upstream.says(stream(b": hold on\n\n", HANG))
    with pytest.raises(ModelTimeout, match=r"No first token within 0\.05 s"):
        await asker.ask()
    await upstream.chats[0].gone.wait()
    assert len(upstream.chats) == 1


async def test_a_slow_answer_is_not_late(make: MakeAsker, upstream: ScriptedServer) -> None:
    """After the first token there is no timeout but the caller's."""
    asker = make(upstream, first_token_timeout_s=0.05)
    later = asyncio.Event()
    upstream.says(stream(chunk({"content": "Hel"}), later, chunk({"content": "lo"}, "stop"), DONE))
    asyncio.get_running_loop().call_later(0.1, later.set)
    assert (await asker.ask()).text == "Hello"


async def test_nobody_listens(make: MakeAsker, upstream: ScriptedServer) -> None:
    """A refused connection is tried again, then said with the address."""
    async with ScriptedServer() as gone:
        url = gone.url
    asker = make(model_url=url, model_retries=1)
    with pytest.raises(ModelUnreachable, match="cannot be reached"):
        await asker.ask()
    assert len(asker.waits) == 1


async def test_the_key_is_never_told(asker: Asker, upstream: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    """A server that repeats the key in its error does not get it into ours, nor into the log."""
    caplog.set_level(logging.DEBUG)
    upstream.says(refusal(500, f"oops {KEY}"), refusal(401, f"Incorrect API key: {KEY}"))
    with pytest.raises(ModelRefused) as caught:
        await asker.ask(messages=[{"role": "user", "content": "my prompt"}])
    assert KEY not in str(caught.value) + caplog.text
    assert "my prompt" not in caplog.text


async def test_long_errors_are_clipped(asker: Asker, upstream: ScriptedServer) -> None:
    """Of the server's own words, 500 characters are kept, on one line, without NUL."""
    upstream.says(refusal(400, "bad\0\n" * 1000))
    with pytest.raises(ModelRefused) as caught:
        await asker.ask()
    assert 500 < len(str(caught.value)) < 700
    assert not set("\0\n") & set(str(caught.value))


# --- refused parameters ----------------------------------------------------------------------------------------

SET = {
    "temperature": 0.2,
    "top_p": 0.9,
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "tool_choice": "required",
    "user": "u1",
}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (
            "temperature",
            refusal(
                400,
                "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value.",
                param="temperature",
                code="unsupported_value",
            ),
        ),
        ("top_p", refusal(400, "`temperature` and `top_p` cannot both be specified for this model.")),
        (
            "parallel_tool_calls",
            refusal(
                400, "[{'type': 'extra_forbidden', 'loc': ('body', 'parallel_tool_calls'), 'msg': 'Extra inputs'}]"
            ),
        ),
        ("reasoning_effort", refusal(400, "Unrecognized request argument supplied: reasoning_effort")),
        ("reasoning_effort", refusal(400, '"gemma3" does not support thinking')),
        ("response_format", refusal(400, "This response_format type is unavailable now")),
        ("tool_choice", refusal(400, "deepseek-reasoner does not support this tool_choice")),
        ("user", refusal(400, 'Invalid JSON payload received. Unknown name "user": Cannot find field.')),
        (
            "stream_options",
            reply(
                {"object": "error", "message": {"detail": [{"type": "extra_forbidden", "loc": ["stream_options"]}]}},
                422,
            ),
        ),
    ],
)
async def test_a_refused_parameter_is_left_out(
    asker: Asker, upstream: ScriptedServer, caplog: pytest.LogCaptureFixture, name: str, answer: Answer
) -> None:
    """A parameter that the model refuses is left out at once, is remembered for that model, and is logged once."""
    upstream.says(answer, says("one"), says("two"), says("other"))
    first = await asker.ask(tools=TOOLS, **SET)
    second = await asker.ask(tools=TOOLS, **SET)
    await asker.ask("other", tools=TOOLS, **SET)
    sent = [request.json for request in upstream.chats]
    assert [name in body for body in sent] == [True, False, False, True]
    assert first.end.dropped == second.end.dropped == [name]
    assert name not in first.end.sent
    assert asker.waits == []
    assert len([record for record in caplog.records if "refuses" in record.message]) == 1


async def test_a_refused_value_is_not_a_refused_parameter(asker: Asker, upstream: ScriptedServer) -> None:
    """A model that refuses one reasoning effort still gets another."""
    no_minimal = refusal(
        400,
        "Unsupported value: 'reasoning_effort' does not support 'minimal' with this model.",
        param="reasoning_effort",
        code="unsupported_value",
    )
    upstream.says(no_minimal, says("one"), says("two"))
    assert (await asker.ask(reasoning_effort="minimal")).end.dropped == ["reasoning_effort"]
    assert (await asker.ask(reasoning_effort="high")).end.sent == {"reasoning_effort": "high"}


async def test_a_wrong_value_is_the_callers(asker: Asker, upstream: ScriptedServer) -> None:
    """A value out of range is no reason to drop a parameter: the caller is told."""
    upstream.says(refusal(400, "temperature: range is 0 to 1", param="temperature"))
    with pytest.raises(ModelRefused, match="range is 0 to 1"):
        await asker.ask(temperature=1.5)


async def test_a_refusal_that_dropping_does_not_cure(asker: Asker, upstream: ScriptedServer) -> None:
    """A server that goes on refusing what it was not sent gets no third try."""
    upstream.says(refusal(400, "top_p is not supported"), refusal(400, "top_p is not supported"))
    with pytest.raises(ModelRefused, match="top_p is not supported"):
        await asker.ask(top_p=0.5)


async def test_max_tokens_is_renamed_when_refused(asker: Asker, upstream: ScriptedServer) -> None:
    """`max_tokens` becomes `max_completion_tokens` for models that want it, and is dropped when both are refused."""
    wants_other = refusal(
        400,
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        param="max_tokens",
        code="unsupported_parameter",
    )
    upstream.says(wants_other, says("one"), says("two"))
    assert (await asker.ask(max_tokens=300)).end.sent == {"max_completion_tokens": 300}
    await asker.ask(max_tokens=300)
    upstream.says(wants_other, refusal(400, "unknown field max_completion_tokens"), says("three"))
    assert (await asker.ask("other", max_tokens=300)).end.dropped == ["max_tokens"]
    sent = [set(request.json) & {"max_tokens", "max_completion_tokens"} for request in upstream.chats]
    assert sent[:3] == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]
    assert sent[3:] == [{"max_tokens"}, {"max_completion_tokens"}, set()]


# --- which server ----------------------------------------------------------------------------------------------


async def test_aliases(make: MakeAsker, upstream: ScriptedServer) -> None:
    """An alias is asked for under its target's name, on the upstream it names."""
    async with ScriptedServer() as gpu:
        asker = make(
            upstream, aliases={"gpt-4o": "qwen3:32b", "fast": "gpu/org/llama"}, upstreams={"gpu": named(gpu, "gpu")}
        )
        upstream.says(says("default"))
        gpu.says(says("gpu"), says("gpu"))
        assert (await asker.ask("gpt-4o")).text == "default"
        heard = await asker.ask("fast")
        assert (heard.text, heard.end.upstream) == ("gpu", "gpu")
        assert (await asker.ask("gpu/org/llama")).text == "gpu"
        assert upstream.chats[0].json["model"] == "qwen3:32b"
        assert gpu.chats[0].json["model"] == gpu.chats[1].json["model"] == "org/llama"


async def test_names_of_what_answers(make: MakeAsker, upstream: ScriptedServer) -> None:
    """The operator may speak of a model by the name asked for, the alias's target, its upstream and its own name."""
    async with ScriptedServer() as gpu:
        aliases = {"gpt-4o": "qwen3:32b", "fast": "gpu/org/llama", "tuned-too": "tuned"}
        upstreams = {"gpu": named(gpu, "gpu", models=("tuned",))}
        models = make(upstream, aliases=aliases, upstreams=upstreams).models
        assert models.names("gpt-4o") == ["gpt-4o", "qwen3:32b"]
        assert models.names("fast") == ["fast", "gpu/org/llama", "org/llama"]
        assert models.names("tuned-too") == ["tuned-too", "tuned", "gpu/tuned"]
        assert models.names("other") == ["other"]
        upstream.on("GET /v1/models", reply({"data": [{"id": "qwen3:32b"}]}))
        gpu.on("GET /v1/models", reply({"data": []}))
        mapping = make(upstream, default_model="gpu/tuned", upstreams=upstreams).models
        await mapping.info("unknown")
        assert mapping.names("unknown") == ["unknown", "gpu/tuned", "tuned"]
    assert make(offline=OfflineStub()).models.names("anything") == ["anything", "offline"]


async def test_configured_and_listed_models_choose_their_upstream(make: MakeAsker, upstream: ScriptedServer) -> None:
    """A model goes to the upstream that is configured for it, or that lists it; any other to the default one."""
    async with ScriptedServer() as gpu:
        asker = make(upstream, upstreams={"gpu": named(gpu, "gpu", models=("tuned",))})
        gpu.on("GET /v1/models", reply({"data": [{"id": "llama3:latest"}]}))
        gpu.says(says("gpu"), says("gpu"))
        upstream.says(says("default"))
        assert [(await asker.ask(name)).text for name in ("tuned", "llama3", "x")] == ["gpu", "gpu", "default"]


async def test_unknown_names_go_to_the_default_model(make: MakeAsker, upstream: ScriptedServer) -> None:
    """A name that no upstream lists becomes the default model; a listed one stays; the list is fetched once."""
    asker = make(upstream, default_model="qwen3")
    upstream.on("GET /v1/models", reply({"data": [{"id": "qwen3"}, {"id": "gemma"}]}))
    upstream.says(says("a"), says("b"), says("c"))
    for name in ("gpt-4o", "gemma", "qwen3"):
        await asker.ask(name)
    assert [request.json["model"] for request in upstream.chats] == ["qwen3", "gemma", "qwen3"]
    assert len([request for request in upstream.requests if request.path == "/v1/models"]) == 1


@pytest.mark.parametrize("answer", [refusal(404, "no list"), refusal(500, "oops"), reply(b"no json")])
async def test_without_a_list_names_are_passed_on(make: MakeAsker, upstream: ScriptedServer, answer: Answer) -> None:
    """When the list cannot be had, nothing is known to be unknown."""
    asker = make(upstream, default_model="qwen3")
    upstream.on("GET /v1/models", answer)
    upstream.says(says("ok"))
    await asker.ask("gpt-4o")
    assert upstream.chats[0].json["model"] == "gpt-4o"


async def test_what_a_server_does_not_tell_is_waited_for_once() -> None:
    """After a first failure nobody waits for a server's word unless they want to; what is known is refreshed later."""
    answers = iter([None, 5, 6])
    tells = asyncio.Event()
    tells.set()

    async def ask() -> int | None:
        await tells.wait()
        return next(answers)

    remembered = Remembered(ask, lambda had: 0)
    assert await remembered.get() is None
    tells.clear()
    assert await remembered.get() is None
    tells.set()
    assert await remembered.get(wait_again=True) == 5
    assert await remembered.get() == 5
    await asyncio.sleep(0)
    assert await remembered.get() == 6
    remembered.close()


async def test_one_server_without_default_needs_no_list(asker: Asker, upstream: ScriptedServer) -> None:
    """Where the list could change nothing it is not fetched."""
    upstream.says(says("ok"))
    await asker.ask("anything")
    assert [request.path for request in upstream.requests] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://localhost:8000/v1"),
        ("localhost", "http://[::1]:8000/v1"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("10.0.0.5", "http://10.0.0.5:8000/v1"),
    ],
)
def test_the_own_address_is_refused(host: str, url: str) -> None:
    """An upstream that is this server itself is a setting that cannot work."""
    with pytest.raises(ConfigError, match="own address"):
        Models(Settings(host=host, port=8000, model_url=url))
    Models(Settings(host=host, port=8001, model_url=url))


@pytest.mark.parametrize("url", ["localhost:11434", "ftp://x/v1", "http://", "http://x:port/"])
def test_what_is_no_url_is_refused(url: str) -> None:
    """A URL that cannot be asked is named before the first call."""
    with pytest.raises(ConfigError, match=r"\[upstreams\.gpu\] url"):
        Models(Settings(upstreams={"gpu": Upstream(name="gpu", url=url)}))


async def test_a_bare_host_gets_v1_and_a_query_stays(make: MakeAsker, upstream: ScriptedServer) -> None:
    """`http://host:port` means `/v1` there; Azure's `?api-version=…` stays behind the path."""
    bare = f"http://127.0.0.1:{upstream.port}"
    upstream.says(says("ok"), says("ok"))
    await make(model_url=bare).ask()
    await make(model_url=f"{bare}/openai/deployments/d?api-version=1").ask()
    assert [request.path for request in upstream.chats] == ["/v1/chat/completions"]
    assert upstream.requests[-1].path == "/openai/deployments/d/chat/completions?api-version=1"


async def test_max_concurrency(make: MakeAsker, upstream: ScriptedServer) -> None:
    """An upstream with room for one is asked for one at a time, from the request to the end of the stream."""
    first_ends = asyncio.Event()
    asker = make(upstreams={"gpu": named(upstream, "gpu", max_concurrency=1)})
    upstream.says(stream(chunk({"content": "a"}), first_ends, chunk(finish="stop"), DONE), says("b"))
    lists = asker.models.stream(ChatRequest(model="m", messages=[]))
    await anext(lists)
    second = asyncio.create_task(asker.ask())
    await asyncio.sleep(0.01)
    assert len(upstream.chats) == 1
    first_ends.set()
    assert isinstance([deltas async for deltas in lists][-1][-1], ModelEnd)
    assert (await second).text == "b"


class OfflineStub:
    info = ModelInfo(window_tokens=5)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        yield [ModelEnd(finish_reason="stop", model="offline")]


async def test_the_offline_model_answers_when_there_is_no_upstream(make: MakeAsker) -> None:
    """With nothing configured the offline model answers for every name, and is what is listed."""
    asker = make(offline=OfflineStub(), aliases={"gpt-4o": "offline"})
    assert (await asker.ask("anything")).end.model == "offline"
    assert (await asker.models.info("anything")).window_tokens == 5
    asker.models.learn_window("anything", 3)
    assert [model["id"] for model in await asker.models.list_models()] == ["offline", "gpt-4o"]
    with pytest.raises(NotFound, match="none is configured"):
        await asker.models.forward("POST", "/embeddings", "", {}, parts())


# --- listing ---------------------------------------------------------------------------------------------------


async def test_list_models(make: MakeAsker, upstream: ScriptedServer) -> None:
    """All upstreams' models and the aliases are listed in the wire's form; an upstream that is down is left out."""
    async with ScriptedServer() as gpu, ScriptedServer() as gone:
        down = named(gone, "down", models=("unseen",))
        upstreams = {"gpu": named(gpu, "gpu", models=("tuned",)), "down": down}
        asker = make(upstream, aliases={"gpt-4o": "qwen3"}, upstreams=upstreams)
        upstream.on("GET /v1/models", reply({"data": [{"id": "qwen3", "created": 5, "owned_by": "q", "meta": {}}]}))
        gpu.on("GET /v1/models", reply([{"id": "qwen3"}, {"id": "llama"}, "junk"]))
        gone.on("GET /v1/models", stream(DROP))
        listed = await asker.models.list_models()
    assert listed[0] == {"id": "qwen3", "object": "model", "created": 5, "owned_by": "q"}
    assert [model["id"] for model in listed] == ["qwen3", "llama", "tuned", "gpt-4o"]


# --- what is known of a model ----------------------------------------------------------------------------------


async def test_window_from_the_configuration(make: MakeAsker, upstream: ScriptedServer) -> None:
    """What the operator says goes first, under the name asked for or the model's own."""
    told = {"gpt-4o": ModelSettings(window_tokens=100), "qwen3": ModelSettings(window_tokens=200, vision=True)}
    asker = make(upstream, aliases={"gpt-4o": "qwen3", "x": "qwen3"}, models=told)
    upstream.on("GET /props", reply({"default_generation_settings": {"n_ctx": 4096}}))
    info = await asker.models.info("gpt-4o")
    assert (info.window_tokens, info.learned) == (100, "configuration")
    info = await asker.models.info("x")
    assert (info.window_tokens, info.vision) == (200, True)


OLLAMA = {"model_info": {"general.architecture": "qwen3", "qwen3.context_length": 40960}, "capabilities": ["tools"]}


@pytest.mark.parametrize(
    ("routes", "window_tokens", "inlines"),
    [
        pytest.param(
            {"GET /v1/models": {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 32768}]}},
            32768,
            False,
            id="vllm",
        ),
        pytest.param(
            {
                "GET /props": {"default_generation_settings": {"n_ctx": 4096}, "modalities": {"vision": False}},
                "GET /v1/models": {"data": [{"id": "m", "meta": {"n_ctx_train": 131072}}]},
            },
            4096,
            True,
            id="llama.cpp",
        ),
        pytest.param({"POST /api/show": OLLAMA}, 4096, True, id="ollama"),
        pytest.param(
            {"POST /api/show": {**OLLAMA, "parameters": "stop x\nnum_ctx    16384"}}, 16384, True, id="num_ctx"
        ),
        pytest.param(
            {"POST /api/show": OLLAMA, "GET /api/ps": {"models": [{"name": "m:latest", "context_length": 20000}]}},
            20000,
            True,
            id="ollama, loaded",
        ),
        pytest.param(
            {"GET /api/v0/models": {"data": [{"id": "m", "loaded_context_length": 5000, "max_context_length": 9000}]}},
            5000,
            True,
            id="lm studio, loaded",
        ),
        pytest.param(
            {"GET /api/v0/models": {"data": [{"id": "m", "max_context_length": 9000}]}}, 9000, True, id="lm studio"
        ),
        pytest.param(
            {"GET /v1/models": {"data": [{"id": "m", "context_length": 131072}]}}, 131072, False, id="openrouter"
        ),
        pytest.param({"GET /v1/models": {"data": [{"id": "m", "context_window": 8000}]}}, 8000, False, id="groq"),
        pytest.param({"GET /props": {"error": "Unexpected endpoint"}}, 8192, False, id="nobody tells"),
    ],
)
async def test_window_from_the_server(
    asker: Asker, upstream: ScriptedServer, routes: dict[str, Any], window_tokens: int, inlines: bool
) -> None:
    """Each kind of server tells the window in its own way; which kind it is decides about image URLs."""
    for route, body in routes.items():
        upstream.on(route, reply(body))
    info = await asker.models.info("m")
    assert info.window_tokens == window_tokens
    assert asker.models.wants_inline_images("m") is inlines


async def test_inlining_as_configured(make: MakeAsker, upstream: ScriptedServer) -> None:
    """What the operator says about image URLs stands, whatever the server is."""
    asker = make(upstreams={"gpu": named(upstream, "gpu", inline_images=False)})
    upstream.on("POST /api/show", reply(OLLAMA))
    await asker.models.info("m")
    assert asker.models.wants_inline_images("m") is False


async def test_the_window_is_asked_for_once(asker: Asker, upstream: ScriptedServer) -> None:
    """Servers are not asked again for every run, nor by runs that start together."""
    upstream.on("GET /v1/models", reply({"data": [{"id": "m", "max_model_len": 4096}]}))
    await asyncio.gather(*(asker.models.info("m") for _ in range(5)))
    await asker.models.info("m")
    assert len(upstream.requests) == 5


async def test_the_default_window_is_said_once(
    asker: Asker, upstream: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """When nobody tells the window, 8,192 tokens are assumed, and the log says so, once."""
    for _ in range(3):
        info = await asker.models.info("m")
    assert (info.window_tokens, info.learned) == (8192, "default")
    assert [record.message for record in caplog.records if "assuming 8192 tokens" in record.message] == [
        "nobody tells the context window of model 'm'; assuming 8192 tokens ([models.\"m\"] window_tokens sets it)"
    ]


async def test_a_learned_window(asker: Asker, upstream: ScriptedServer) -> None:
    """What a refusal taught replaces the default, and lowers what the server says, but does not raise it."""
    asker.models.learn_window("m", 16384)
    assert (await asker.models.info("m")).window_tokens == 16384
    upstream.on("GET /v1/models", reply({"data": [{"id": "v", "max_model_len": 4096}]}))
    other = Asker(Settings(model_url=upstream.url))
    for learned, window_tokens in ((9999, 4096), (2048, 2048)):
        other.models.learn_window("v", learned)
        info = await other.models.info("v")
        assert (info.window_tokens, info.learned) == (window_tokens, "server")
    await other.models.close()


async def test_a_server_that_is_down_has_a_default_window(make: MakeAsker) -> None:
    """Asking for the window never fails."""
    async with ScriptedServer() as gone:
        url = gone.url
    assert (await make(model_url=url).models.info("m")).learned == "default"


# --- passing through -------------------------------------------------------------------------------------------


async def parts(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def forward(asker: Asker, path: str, body: Any, query: str = "", **headers: str) -> tuple[Any, bytes]:
    named_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await asker.models.forward("POST", path, query, named_headers, body)
    return answer, b"".join([part async for part in answer.body])


async def test_forward_replaces_key_and_model(make: MakeAsker, upstream: ScriptedServer) -> None:
    """A passed-on request goes with the upstream's key and model name; the rest of its body stays byte for byte."""
    asker = make(upstream, model_key=KEY, aliases={"ada": "nomic"})
    upstream.on("POST /v1/embeddings", reply(b'{"data": []}', x_request_id="r1", set_cookie="a=b"))
    body = rb'{"input":"a\u0041","model":"ada","n":1.50,"inner":{"model":"ada"}}'
    answer, said = await forward(
        asker,
        "/embeddings",
        parts(body[:9], body[9:]),
        "x=1",
        content_type="application/json",
        content_length=str(len(body)),
        authorization="Bearer caller",
        api_key="caller",
        cookie="c",
        openai_organization="org",
        connection="close, x-hop",
        x_hop="1",
        x_kept="1",
    )
    request = upstream.requests[0]
    assert request.path == "/v1/embeddings?x=1"
    assert request.body == body.replace(b'"model":"ada","n"', b'"model":"nomic","n"')
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["x-kept"] == "1"
    assert not {"api-key", "cookie", "openai-organization", "connection", "x-hop"} & request.headers.keys()
    assert "caller" not in str(request.headers)
    assert (answer.status, said, answer.headers["x-request-id"]) == (200, b'{"data": []}', "r1")
    assert "set-cookie" not in answer.headers


async def test_forward_streams_both_ways(asker: Asker, upstream: ScriptedServer) -> None:
    """A body that is no JSON goes up in pieces, and an answer comes down in pieces, errors included."""
    upstream.on("POST /v1/audio/transcriptions", stream(b"one", b"two", status=418))
    answer, said = await forward(
        asker, "/audio/transcriptions", parts(b"--b\r\n", b"", b"..."), content_type="multipart/form-data"
    )
    assert upstream.requests[0].body == b"--b\r\n..."
    assert (answer.status, said) == (418, b"onetwo")


async def test_a_known_length_is_kept(asker: Asker, upstream: ScriptedServer) -> None:
    """An upload with a length goes on with that length, not chunked."""
    upstream.on("POST /v1/images/edits", reply({}))
    await forward(asker, "/images/edits", parts(b"abc", b"def"), content_type="image/png", content_length="6")
    assert upstream.requests[0].headers["content-length"] == "6"
    assert upstream.requests[0].body == b"abcdef"


async def test_forwarded_calls_are_aborted_when_closed(asker: Asker, upstream: ScriptedServer) -> None:
    """Closing the body of a passed-on stream ends the upstream's work."""
    upstream.says(stream(chunk({"content": "a"}), HANG))
    answer = await asker.models.forward(
        "POST", "/chat/completions", "", {"content-type": "application/json"}, parts(b'{"model":"m"}')
    )
    await answer.body.aclose()
    await upstream.chats[0].gone.wait()


async def test_a_cancelled_reader_ends_the_forwarded_call(asker: Asker, upstream: ScriptedServer) -> None:
    """A reader that is cancelled while it waits leaves nothing open behind it."""
    upstream.says(stream(chunk({"content": "a"}), HANG))
    answer = await asker.models.forward("POST", "/chat/completions", "", {}, parts(b"{}"))
    await anext(answer.body)
    reading = asyncio.ensure_future(anext(answer.body))
    await asyncio.sleep(0)
    reading.cancel()
    await upstream.chats[0].gone.wait()


async def test_large_bodies_pass_both_ways(asker: Asker, upstream: ScriptedServer) -> None:
    """Megabytes go through, up and down, with a reader that takes its time."""
    big = b"x" * 4_000_000
    upstream.on("POST /v1/audio/speech", reply(big, content_type="audio/mpeg"))
    upload = parts(*[big[:100_000]] * 40)
    answer = await asker.models.forward("POST", "/audio/speech", "", {"content-type": "audio/wav"}, upload)
    await asyncio.sleep(0.05)
    assert b"".join([part async for part in answer.body]) == big
    assert upstream.requests[0].body == big


@pytest.mark.parametrize("path", ["/../admin", "/audio/%2e%2e/%2E%2E/api/delete"])
async def test_forward_stays_below_the_upstreams_path(asker: Asker, upstream: ScriptedServer, path: str) -> None:
    """No path climbs out of the upstream's base URL, where its key would open other doors."""
    with pytest.raises(NotFound):
        await asker.models.forward("POST", path, "", {}, parts())
    assert upstream.requests == []


async def test_forward_says_when_nobody_listens(make: MakeAsker) -> None:
    """A dead upstream is a ModelError on passed-on routes too, and gives its place back."""
    async with ScriptedServer() as gone:
        url = gone.url
    asker = make(upstreams={"gpu": Upstream(name="gpu", url=url, max_concurrency=1)})
    for _ in range(2):
        with pytest.raises(ModelUnreachable, match="gpu"):
            await asker.models.forward("GET", "/embeddings", "", {}, parts())


# --- doctor ----------------------------------------------------------------------------------------------------


async def test_check(make: MakeAsker, upstream: ScriptedServer) -> None:
    """The doctor's checks tell what a server can do, and what it says when it cannot."""
    asker = make(upstream, default_model="m")
    upstream.on("GET /v1/models", reply({"data": [{"id": "m"}]}))
    upstream.says(says("ready."), says(call(0, "a", "get_time", "{}")))
    assert [check.ok for check in await asker.models.check()] == [True, True, True]
    upstream.says(refusal(401, "bad key"), says("no idea"))
    _, streams, calls = await asker.models.check()
    assert "bad key" in streams.detail
    assert (streams.ok, calls.ok) == (False, False)
