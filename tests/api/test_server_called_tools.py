"""Function tools with an endpoint: the server calls them itself, and no client need be alive."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow.contracts import Reply
from afterglow.rows.tool_calls import get_tool_secret
from afterglow.runs import calling
from afterglow.testing import calls, says
from tests.api.streams import PROJECT, answers, happened, names, polled, read_events, stored
from tests.api.test_runs import get, sent, start, steps_of, tool_calls
from tests.conftest import GET_WEATHER, Server, ServerFactory
from tests.endpoints import Answer, Endpoint, endpoint

OSLO = ("get_weather", {"city": "Oslo"})
BOOK: Any = {"type": "function", "function": {"name": "book", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "PAUSE_S", 0.001)


@pytest.fixture
async def tool() -> AsyncGenerator[Endpoint, None]:
    async with endpoint() as made:
        yield made


@pytest.fixture
async def server(start_server: ServerFactory, tmp_path: Path) -> AsyncGenerator[Server, None]:
    async with start_server(tmp_path / "data", private_tools=True) as running:
        yield running


def weather(tool: Endpoint, **more: Any) -> Any:
    return GET_WEATHER | {"x-afterglow": {"url": f"{tool.url}/weather", **more}}


def documented(name: str) -> Any:
    """A function as docs/tools.md shows it."""
    page = (Path(__file__).parent.parent.parent / "docs" / "tools.md").read_text("utf-8")
    [block] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if name in block]
    found: dict[str, Any] = {}
    exec(block, found)
    return found[name]


def outputs_sent(server: Server) -> list[str]:
    return [message["content"] for message in sent(server) if message["role"] == "tool"]


async def test_the_server_calls_a_tool_that_has_a_url(server: Server, tool: Endpoint) -> None:
    """It posts the call, and the answer's `output` goes to the model; no requires_action happens, and the step shows
    an ordinary function call."""
    tool.will(Answer(b'{"output": "rain"}'))
    server.model.will(calls(OSLO), says("Rain."))
    run = await polled(server, await start(server, tools=[weather(tool)]))
    assert run.status == "completed"
    assert outputs_sent(server) == ["rain"]
    [asked] = tool.asked
    step = (await steps_of(server, run))[0]
    [call] = tool_calls(step)
    assert (step.status, call.type, call.function.output) == ("completed", "function", "rain")
    assert asked.path == "/weather"
    assert asked.json == {
        "id": call.id,
        "type": "function_call",
        "run_id": run.id,
        "thread_id": run.thread_id,
        "assistant_id": run.assistant_id,
        "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
        "created_at": step.created_at,
    }
    events = names(read_events(await stored(server, run.id)))
    assert "run.requires_action" not in events
    assert events[3:7] == ["run.step.created", "run.step.in_progress", "run.step.delta", "run.step.completed"]
    assert run.tools[0].model_extra == {"x-afterglow": {"url": f"{tool.url}/weather"}}


async def test_calls_are_signed_with_the_projects_secret(server: Server, tool: Endpoint) -> None:
    """The signature is that of Standard Webhooks, and its id and the idempotency key stay the same over tries."""
    tool.will(Answer(status=503), Answer(b"rain"))
    server.model.will(calls(OSLO), says("Rain."))
    await polled(server, await start(server, tools=[weather(tool)]))
    first, second = tool.asked
    verify = documented("is_from_afterglow")
    secret = await server.house.store.read(lambda tx: get_tool_secret(tx, PROJECT))
    assert secret is not None
    for asked in (first, second):
        assert verify(secret, asked.headers, asked.body)
        assert not verify(secret, asked.headers, asked.body + b" ")
        server.client.webhooks.verify_signature(asked.body.decode(), asked.headers, secret=secret)
    assert first.headers["user-agent"].startswith("Afterglow/")
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == first.headers["idempotency-key"]
    assert first.json["id"] in first.headers["webhook-id"]


async def test_an_answer_may_be_any_text(server: Server, tool: Endpoint) -> None:
    """What is no object with a text `output` is the output itself."""
    said = {
        b"rain": "rain",
        b'"rain"': "rain",
        b'{"output": {"now": "rain"}}': '{"output": {"now": "rain"}}',
        b'{"sky": "grey"}': '{"sky": "grey"}',
        b"[1, 2]": "[1, 2]",
        b"": "",
        b"\xff\x00": "\ufffd\ufffd",
    }
    tool.will(*map(Answer, said))
    server.model.will(*(calls(OSLO) for _ in said), says("Well."))
    await polled(server, await start(server, tools=[weather(tool)]))
    assert outputs_sent(server) == list(said.values())


async def test_an_answer_is_bounded(server: Server, tool: Endpoint) -> None:
    """An answer of any size leaves room for the model's; the gap is named, and the run completes."""
    tool.will(Answer(b"x" * 2_000_000))
    server.model.will(calls(OSLO), says("Long."))
    run = await polled(server, await start(server, tools=[weather(tool)]))
    assert run.status == "completed"
    [output] = outputs_sent(server)
    assert 2000 < len(output) < 30_000
    assert "characters left out]" in output


@pytest.mark.parametrize(
    ("status", "tries", "told"), [(500, 2, "answered 500. broken"), (429, 2, "answered 429"), (404, 1, "answered 404")]
)
async def test_a_tool_that_fails_is_an_output(
    server: Server, tool: Endpoint, status: int, tries: int, told: str
) -> None:
    """5xx and 429 are tried again, as often as the tool says; then, as for other statuses, the model is told."""
    tool.will(Answer(b"broken", status))
    server.model.will(calls(OSLO), says("It is broken."))
    run = await polled(server, await start(server, tools=[weather(tool, retries=1)]))
    assert run.status == "completed"
    [output] = outputs_sent(server)
    assert output.startswith("ERROR: The tool's server")
    assert told in output
    assert len(tool.asked) == tries
    assert (await steps_of(server, run))[0].status == "completed"


async def test_a_tool_that_hangs_is_an_output(server: Server, tool: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """One try has `timeout_s`; after the last the model is told that the tool gave no answer."""
    tries = []
    post = server.house.outbound.post

    async def counted(*request: Any, **limits: Any) -> Reply:
        tries.append(limits["timeout_s"])
        return await post(*request, **limits)

    monkeypatch.setattr(server.house.outbound, "post", counted)
    tool.will(Answer(waits=asyncio.Event()))
    server.model.will(calls(OSLO), says("It hangs."))
    run = await polled(server, await start(server, tools=[weather(tool, retries=1, timeout_s=0.1)]))
    assert run.status == "completed"
    assert "gave no answer within 0.1 s." in outputs_sent(server)[0]
    assert tries == [0.1, 0.1]


async def test_private_addresses_are_not_called(start_server: ServerFactory, tmp_path: Path, tool: Endpoint) -> None:
    """Unless the operator allows it, a tool on this machine or network is not called, and the model is told so."""
    async with start_server(tmp_path) as server:
        server.model.will(calls(OSLO), says("I may not."))
        run = await polled(server, await start(server, tools=[weather(tool)]))
        assert run.status == "completed"
        assert outputs_sent(server)[0].startswith(f"ERROR: {tool.url} may not be asked")
        assert not tool.asked


async def test_several_calls_are_made_at_the_same_time(server: Server, tool: Endpoint) -> None:
    """The calls of one turn do not wait for one another, and each gets its own output."""
    go = asyncio.Event()
    tool.will(Answer(b"rain", waits=go))
    server.model.will(calls(OSLO, ("get_weather", {"city": "Voss"}), OSLO), says("Rain."))
    run = await start(server, tools=[weather(tool)])
    await tool.until_asked(3)
    go.set()
    assert (await polled(server, run)).status == "completed"
    assert outputs_sent(server) == ["rain"] * 3
    assert len({asked.headers["idempotency-key"] for asked in tool.asked}) == 3


async def test_the_callers_functions_are_waited_for_besides(server: Server, tool: Endpoint) -> None:
    """In a turn that calls both, the server's are called first, and required_action lists the caller's alone."""
    tool.will(Answer(b"rain"))
    server.model.will(calls(OSLO, ("book", {})), says("Booked."))
    run = await polled(server, await start(server, tools=[weather(tool), BOOK]))
    assert run.status == "requires_action"
    [asked] = answers(run, {"book": "done"})
    assert [call.function.output for call in tool_calls((await steps_of(server, run))[0])] == ["rain", None]
    await server.client.beta.threads.runs.submit_tool_outputs(run.id, thread_id=run.thread_id, tool_outputs=[asked])
    assert (await polled(server, run)).status == "completed"
    assert outputs_sent(server) == ["rain", "done"]


async def test_a_cancel_ends_a_call(server: Server, tool: Endpoint) -> None:
    """Cancelling wins over a tool that hangs, and hangs up on it."""
    tool.will(Answer(waits=asyncio.Event()))
    server.model.will(calls(OSLO))
    run = await start(server, tools=[weather(tool)])
    await tool.until_asked(1)
    await server.client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)
    await happened(server, run.id, "thread.run.cancelled")
    async with asyncio.timeout(5):
        while not tool.left:
            await asyncio.sleep(0.005)
    assert (await get(server, run)).status == "cancelled"


BROKEN: list[tuple[Any, str]] = [
    ({"url": "ftp://a.example/x"}, "tools[0].x-afterglow.url"),
    ({"url": "https://user:pass@a.example/"}, "tools[0].x-afterglow.url"),
    ({"url": "https://"}, "tools[0].x-afterglow.url"),
    ({"url": 5}, "tools[0].x-afterglow.url"),
    ({"url": "https://a.example/", "timeout_s": 0}, "tools[0].x-afterglow.timeout_s"),
    ({"url": "https://a.example/", "retries": 6}, "tools[0].x-afterglow.retries"),
    ({"url": "https://a.example/", "secret": "s"}, "tools[0].x-afterglow.secret"),
    ({"retries": 1}, "tools[0].x-afterglow.url"),
    ("https://a.example/", "tools[0].x-afterglow"),
]


async def test_what_cannot_be_called_is_refused(server: Server) -> None:
    """A fault in `x-afterglow` is a 400 that names its path, on assistants and on runs."""
    for told, param in BROKEN:
        broken: Any = [GET_WEATHER | {"x-afterglow": told}]
        with pytest.raises(openai.BadRequestError) as refused:
            await server.client.beta.assistants.create(model="m", tools=broken)
        assert refused.value.param == param
        with pytest.raises(openai.BadRequestError) as refused:
            await start(server, tools=broken)
        assert refused.value.param == param


async def test_only_functions_are_called(server: Server) -> None:
    """`x-afterglow` on a tool of another type is refused; other keys beginning `x-` are kept as ever."""
    broken: Any = [{"type": "file_search", "x-afterglow": {"url": "https://a.example/"}}]
    with pytest.raises(openai.BadRequestError) as refused:
        await server.client.beta.assistants.create(model="m", tools=broken)
    assert refused.value.param == "tools[0].x-afterglow"
    kept: Any = [GET_WEATHER | {"x-other": {"url": 5}}]
    made = await server.client.beta.assistants.create(model="m", tools=kept)
    assert made.tools[0].model_extra == {"x-other": {"url": 5}}
