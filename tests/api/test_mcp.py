"""Tools of MCP servers in runs: what the model is offered, what it gets back, and what happens when one is gone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import os
import signal
import sys
import tracemalloc
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from mcp import Client

from afterglow import mcp_servers
from afterglow.contracts import McpServer, McpTool
from afterglow.errors import ConfigError, OutboundFailed
from afterglow.mcp_servers import McpSessions
from afterglow.outbound import GuardedClient
from afterglow.settings import McpSettings, Settings, load
from afterglow.testing import calls, says
from afterglow.tools.function import offer
from tests.api.streams import answers, happened, names, polled, read_events, stored
from tests.api.test_runs import get, sent, start, steps_of, tool_calls
from tests.conftest import GET_WEATHER, Server
from tests.mcp_example import over_http

EXAMPLE: Any = {"type": "mcp", "server_label": "example"}
OSLO = ("example__weather", {"city": "Oslo"})
SERVER = McpServer("example")


@pytest.fixture
async def url() -> AsyncGenerator[str, None]:
    async with over_http(json_response=True) as made:
        yield made


@pytest.fixture
async def let() -> AsyncGenerator[Callable[..., McpSessions], None]:
    """Let a server, or a test, ask these MCP servers: `let(server, example=McpSettings(…))`."""
    async with AsyncExitStack() as opened:

        def made(
            server: Server | None = None, /, *, urls: bool = False, private: bool = True, **mcp: Any
        ) -> McpSessions:
            settings = server.house.settings if server else Settings()
            sessions = McpSessions(
                dataclasses.replace(settings, mcp=mcp, mcp_server_urls=urls, private_tools=private), GuardedClient()
            )
            opened.push_async_callback(sessions.close)
            if server:
                server.house.mcp = sessions
            return sessions

        yield made


def example(url: str, **more: Any) -> McpSettings:
    return McpSettings("example", url=url, **more)


def offered(server: Server) -> list[str]:
    return [tool["function"]["name"] for tool in server.model.requests[-1].tools]


def outputs_sent(server: Server) -> list[str]:
    return [message["content"] for message in sent(server) if message["role"] == "tool"]


# --- in a run --------------------------------------------------------------------------------------------------


async def test_a_run_calls_a_tool_of_an_mcp_server(server: Server, url: str, let: Callable[..., McpSessions]) -> None:
    """The model is offered the server's tools under names with its label; the output comes back as of any function,
    and no requires_action happens."""
    let(server, example=example(url))
    server.model.will(calls(OSLO), says("Rain."))
    run = await polled(server, await start(server, tools=[EXAMPLE]))
    assert run.status == "completed"
    assert "example__weather" in offered(server)
    definition = server.model.requests[0].tools[0]["function"]
    assert definition["description"] == "The weather in a city."
    assert definition["parameters"]["required"] == ["city"]
    assert outputs_sent(server) == ["rain in Oslo"]
    [call] = tool_calls((await steps_of(server, run))[0])
    assert (call.type, call.function.name, call.function.output) == ("function", "example__weather", "rain in Oslo")
    assert "run.requires_action" not in names(read_events(await stored(server, run.id)))


@pytest.mark.slow
async def test_only_what_is_allowed_is_offered(server: Server, url: str, let: Callable[..., McpSessions]) -> None:
    """What both the operator and the tool's own `allowed_tools` name is offered, beside the caller's functions."""
    let(server, example=example(url, allowed_tools=("weather", "fails")))
    allowed = EXAMPLE | {"allowed_tools": ["weather", "hangs"]}
    server.model.will(says("Well."))
    run = await polled(server, await start(server, tools=[GET_WEATHER, allowed]))
    assert run.status == "completed"
    assert offered(server) == ["get_weather", "example__weather"]


@pytest.mark.slow
async def test_calls_of_all_kinds_go_together(server: Server, url: str, let: Callable[..., McpSessions]) -> None:
    """In a turn that calls a tool of the server's and the caller's function, only the caller's is waited for."""
    let(server, example=example(url))
    server.model.will(calls(OSLO, ("get_weather", {"city": "Voss"})), says("Rain."))
    run = await polled(server, await start(server, tools=[GET_WEATHER, EXAMPLE]))
    outputs = answers(run, {"get_weather": "snow"})
    assert len(outputs) == 1
    await server.client.beta.threads.runs.submit_tool_outputs(run.id, thread_id=run.thread_id, tool_outputs=outputs)
    assert (await polled(server, run)).status == "completed"
    assert outputs_sent(server) == ["rain in Oslo", "snow"]


async def test_what_a_tool_says_is_the_output(server: Server, url: str, let: Callable[..., McpSessions]) -> None:
    """Errors of a tool, wrong arguments, content that is no text and answers of any size are outputs in words."""
    let(server, example=example(url))
    asked = [("example__fails", {}), ("example__weather", {}), ("example__odd_name", {}), ("example__long", {})]
    server.model.will(calls(*asked), says("Well."))
    run = await polled(server, await start(server, tools=[EXAMPLE]))
    assert run.status == "completed"
    failed, wrong, odd, long = outputs_sent(server)
    assert failed == "ERROR: Error executing tool fails"
    assert wrong.startswith("ERROR: ")
    assert "city" in wrong
    assert odd == "odd\n[image: image/png]"
    assert len(long) < 20_000
    assert "characters left out]" in long


@pytest.mark.slow
async def test_a_call_has_its_time(server: Server, url: str, let: Callable[..., McpSessions]) -> None:
    """A tool that does not answer in time is an output that says so; the run goes on."""
    let(server, example=example(url))
    server.model.will(calls(("example__hangs", {})), says("It hangs."))
    run = await polled(server, await start(server, tools=[EXAMPLE], extra_query={"tool_timeout_s": "0.2"}))
    assert run.status == "completed"
    assert outputs_sent(server) == ["ERROR: The MCP server example gave no answer within 0.2 s."]


async def test_a_cancel_ends_a_call(server: Server, url: str, let: Callable[..., McpSessions]) -> None:
    """Cancelling wins over a tool that hangs."""
    let(server, example=example(url))
    server.model.will(calls(("example__hangs", {})))
    run = await start(server, tools=[EXAMPLE])
    async with asyncio.timeout(10):
        while not (await steps_of(server, run)) or not tool_calls((await steps_of(server, run))[0]):
            await asyncio.sleep(0.01)
    await server.client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)
    await happened(server, run.id, "thread.run.cancelled")
    assert (await get(server, run)).status == "cancelled"


async def test_the_model_is_told_of_a_dead_server(server: Server, let: Callable[..., McpSessions]) -> None:
    """A server that cannot be asked takes no run down: its tools are missing, and the model is told why."""
    let(server, example=example("http://127.0.0.1:9/mcp"))
    server.model.will(says("I cannot look."))
    run = await polled(server, await start(server, tools=[EXAMPLE], instructions="Be brief."))
    assert run.status == "completed"
    system = sent(server)[0]["content"]
    assert system.startswith("Be brief.\n\nThe tools of example cannot be used now: The MCP server example cannot be")
    assert not server.model.requests[0].tools


async def test_an_assistant_keeps_its_servers_when_the_operator_lets_go(
    server: Server, url: str, let: Callable[..., McpSessions]
) -> None:
    """An assistant whose server is configured no more runs on without it."""
    let(server, example=example(url))
    assistant = await server.client.beta.assistants.create(model="m", tools=[EXAMPLE])
    assert assistant.tools[0].to_dict() == EXAMPLE
    assert (await server.client.beta.assistants.retrieve(assistant.id)) == assistant
    server.house.mcp = None
    server.model.will(says("Well."))
    run = await polled(server, await start(server, assistant_id=assistant.id))
    assert run.status == "completed"
    assert "No MCP server can be asked here" in sent(server)[0]["content"]


REFUSED: list[tuple[Any, str, str]] = [
    (EXAMPLE | {"server_label": "other"}, "tools[1].server_label", "no MCP server 'other' here. .* are: example"),
    (EXAMPLE | {"server_url": "https://a.example/mcp"}, "tools[1].server_url", "mcp_server_urls"),
    (EXAMPLE | {"server_url": "mailto:a"}, "tools[1].server_url", "Expected a URL"),
    (EXAMPLE | {"server_label": "two words"}, "tools[1].server_label", "pattern"),
    (EXAMPLE | {"headers": {"authorization": "secret"}}, "tools[1].headers", "Unknown parameter"),
    (EXAMPLE | {"require_approval": "always"}, "tools[1].require_approval", "'never'"),
    ({"type": "mcp"}, "tools[1].server_label", "Missing"),
]


async def test_what_cannot_be_asked_is_refused(server: Server, let: Callable[..., McpSessions]) -> None:
    """Servers that are not configured, URLs that are not allowed, and secrets are a 400 that names the path."""
    let(server, example=example("http://127.0.0.1:9/mcp"))
    assistant = await server.client.beta.assistants.create(model="m")
    for tool, param, reason in REFUSED:
        tools: Any = [GET_WEATHER, tool]
        with pytest.raises(openai.BadRequestError, match=reason) as refused:
            await server.client.beta.assistants.create(model="m", tools=tools)
        assert refused.value.param == param
        with pytest.raises(openai.BadRequestError, match=reason):
            await start(server, tools=tools)
        with pytest.raises(openai.BadRequestError, match=reason):
            await server.client.beta.assistants.update(assistant.id, tools=tools)


async def test_without_servers_the_way_is_shown(server: Server) -> None:
    """Where no MCP server is configured, the answer says what the operator would do."""
    with pytest.raises(openai.BadRequestError, match=r"pip install 'afterglow\[mcp\]'"):
        await server.client.beta.assistants.create(model="m", tools=[EXAMPLE])


# --- sessions --------------------------------------------------------------------------------------------------


async def test_projects_share_no_session(url: str, let: Callable[..., McpSessions]) -> None:
    """Each project has a session of its own with a server, which its calls share."""
    sessions = let(example=example(url))
    for project in ("a", "b", "a"):
        assert await sessions.call_tool(project, SERVER, "weather", {"city": "Oslo"}, timeout_s=5) == "rain in Oslo"
    assert {project for project, _ in sessions._sessions} == {"a", "b"}


@pytest.mark.slow
async def test_a_server_that_comes_back_is_found(let: Callable[..., McpSessions]) -> None:
    """After a server was restarted, or was not there at first, its tools can be called again."""
    sessions = let(example=example(""))
    for _ in range(2):
        async with over_http() as url:
            sessions._settings = dataclasses.replace(sessions._settings, mcp={"example": example(url)})
            with pytest.raises(OutboundFailed, match="Unknown tool"):
                await sessions.call_tool("a", SERVER, "nope", {}, timeout_s=5)
            assert "weather" in [tool.name for tool in await sessions.list_tools("a", SERVER)]
        with pytest.raises(OutboundFailed, match="example"):
            await sessions.call_tool("a", SERVER, "weather", {"city": "Oslo"}, timeout_s=5)


@pytest.mark.slow
async def test_a_session_that_its_server_has_forgotten_is_opened_anew(
    let: Callable[..., McpSessions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of the older protocol that was restarted knows no session: the call is made once more, in a new one."""
    monkeypatch.setattr("afterglow.mcp_servers.Client", partial(Client, mode="legacy"))
    async with over_http() as url:
        sessions = let(example=example(url))
        assert await sessions.call_tool("a", SERVER, "weather", {"city": "Oslo"}, timeout_s=5) == "rain in Oslo"
    async with over_http(port=int(url.split(":")[2].removesuffix("/mcp"))):
        assert await sessions.call_tool("a", SERVER, "weather", {"city": "Voss"}, timeout_s=5) == "rain in Voss"


async def test_a_callers_url_is_guarded(url: str, let: Callable[..., McpSessions]) -> None:
    """A URL of a caller's must be public and https, unless the operator says otherwise."""
    sessions = let(urls=True, private=False)
    with pytest.raises(OutboundFailed, match="https://"):
        await sessions.list_tools("a", McpServer("x", url))
    with pytest.raises(OutboundFailed, match="is a private address"):
        await sessions.list_tools("a", McpServer("x", url.replace("http:", "https:")))
    assert await let(urls=True).list_tools("a", McpServer("x", url))


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("Content-Type: Application/JSON", b" " * 2**26),
        ("Content-Type: application/json\r\nContent-Encoding: gzip", gzip.compress(b" " * 2**26, 1)),
    ],
)
async def test_a_huge_answer_is_not_read(let: Callable[..., McpSessions], head: str, body: bytes) -> None:
    """However it is named, and also when it is packed: a server cannot fill the memory."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(body), 65536):
                writer.write(body[at : at + 65536])
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        sessions = let(example=example(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/mcp"))
        tracemalloc.start()
        try:
            with pytest.raises(OutboundFailed):
                await sessions.list_tools("default", SERVER)
            assert tracemalloc.get_traced_memory()[1] < 2**25
        finally:
            tracemalloc.stop()


async def test_what_is_listed_while_it_is_forgotten(let: Callable[..., McpSessions], monkeypatch: pytest.MonkeyPatch):
    """A list that is just being asked for when many others push it out disturbs none that comes later."""
    monkeypatch.setattr("afterglow.mcp_servers.MAX_LISTS", 1)
    monkeypatch.setattr("afterglow.mcp_servers.LISTED_S", -1)
    sessions, waiting = let(), asyncio.Event()

    async def list_slowly(project: str, server: McpServer) -> mcp_servers._Listed:
        if server.label == "slow":
            await waiting.wait()
        return mcp_servers._Listed(-1.0, [], "")

    monkeypatch.setattr(sessions, "_list", list_slowly)
    waiting.set()
    await sessions.list_tools("default", McpServer("slow"))
    waiting.clear()
    slow = asyncio.create_task(sessions.list_tools("default", McpServer("slow")))
    await asyncio.sleep(0)
    await sessions.list_tools("default", McpServer("second"))
    waiting.set()
    await slow
    for label in ("third", "fourth"):
        await sessions.list_tools("default", McpServer(label))


@pytest.mark.slow
async def test_sessions_are_bounded(url: str, let: Callable[..., McpSessions], monkeypatch: pytest.MonkeyPatch) -> None:
    """The session that was used longest ago makes room for a new one."""
    monkeypatch.setattr("afterglow.mcp_servers.MAX_SESSIONS", 2)
    sessions = let(example=example(url))
    for project in ("a", "b", "c"):
        await sessions.call_tool(project, SERVER, "weather", {"city": "Oslo"}, timeout_s=5)
    assert {project for project, _ in sessions._sessions} == {"b", "c"}


# --- names -----------------------------------------------------------------------------------------------------


def test_names_do_not_collide() -> None:
    """Names are legal and unique, whatever a server calls its tools, and whatever the caller's functions are."""
    server = McpServer("s")
    listed = [McpTool(name, "", {}) for name in ("a.b", "a/b", "x" * 100, "x" * 101)]
    function = {"type": "function", "function": {"name": "s__a_b"}}
    mcp = {"type": "mcp", "server_label": "s"}
    made = offer([mcp, function, mcp], {server: listed})
    found = [tool["function"]["name"] for tool in made.tools]
    assert found[:4] == ["s__a_b_2", "s__a_b_3", f"s__{'x' * 61}", f"s__{'x' * 55}_2"]
    assert len(set(found)) == len(found)
    assert all(len(name) <= 64 for name in found)
    assert made.mcp["s__a_b_3"] == (server, "a/b")


# --- configuration ---------------------------------------------------------------------------------------------


def test_servers_come_from_the_file(tmp_path: Path) -> None:
    """Tables [mcp.NAME] name a URL with headers from the environment, or a program with its variables."""
    config = tmp_path / "a.toml"
    config.write_text(
        '[mcp.web]\nurl = "https://a.example/mcp"\nkey_env = "KEY"\nheaders_env = { x-team = "TEAM" }\n'
        '[mcp.files]\ncommand = ["files", "--root", "/srv"]\nenv = ["TEAM"]\nallowed_tools = ["read"]\n'
    )
    found = load(environ={"KEY": "k", "TEAM": "t", "OTHER": "o"}, config=config).mcp
    assert found["web"].headers == {"authorization": "Bearer k", "x-team": "t"}
    assert (found["files"].command, found["files"].env) == (("files", "--root", "/srv"), {"TEAM": "t"})
    assert found["files"].allowed_tools == ("read",)
    assert "Bearer" not in repr(found)


@pytest.mark.parametrize(
    "text",
    [
        'url = "https://a.example/"\ncommand = ["a"]',
        "allowed_tools = []",
        'command = ["a"]\nkey_env = "KEY"',
        'url = "https://a.example/"\nenv = ["KEY"]',
        'url = "ftp://a.example/"',
        'url = "https://a.example/"\nkey_env = "UNSET"',
        'url = "https://a.example/"\nheaders_env = { a = 5 }',
        'command = ["a", 5]',
        'url = "https://a.example/"\ncolour = "red"',
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    """The error names the table."""
    config = tmp_path / "a.toml"
    config.write_text(f"[mcp.one]\n{text}\n")
    with pytest.raises(ConfigError, match=r"\[mcp.one\]"):
        load(environ={"KEY": "k"}, config=config)


# --- programs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_program_speaks_on_stdin_and_stdout(
    let: Callable[..., McpSessions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of the operator's is started once, sees no variable that is not named, is started anew when it has
    died, and is gone when the server is."""
    monkeypatch.setenv("SECRET", "s")
    here = str(Path(__file__).parent.parent.parent)
    command = (sys.executable, "-m", "tests.mcp_example")
    sessions = let(example=McpSettings("example", command=command, env={"TEAM": "t", "PYTHONPATH": here}))

    async def ask(name: str) -> str:
        return await sessions.call_tool("a", SERVER, name, {}, timeout_s=20)

    seen = (await ask("environment")).split()
    assert "TEAM" in seen
    assert "SECRET" not in seen
    process = int(await ask("process"))
    assert int(await ask("process")) == process
    os.kill(process, signal.SIGKILL)
    await _until_gone(process)
    with pytest.raises(OutboundFailed):
        await ask("process")
    again = int(await ask("process"))
    assert again != process
    await sessions.close()
    await _until_gone(again)


@pytest.mark.slow
async def test_a_program_that_hangs_is_replaced(
    let: Callable[..., McpSessions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not even say what it has is ended, and the next who asks gets another."""
    monkeypatch.setattr("afterglow.mcp_servers.LISTED_S", -1)
    monkeypatch.setattr("afterglow.mcp_servers.REFUSED_S", -1)
    here = str(Path(__file__).parent.parent.parent)
    command = (sys.executable, "-m", "tests.mcp_example")
    sessions = let(example=McpSettings("example", command=command, env={"PYTHONPATH": here}))
    process = int(await sessions.call_tool("a", SERVER, "process", {}, timeout_s=20))
    os.kill(process, signal.SIGSTOP)
    with monkeypatch.context() as impatient:
        impatient.setattr("afterglow.mcp_servers.CONNECT_S", 0.2)
        with pytest.raises(OutboundFailed):
            await sessions.list_tools("a", SERVER)
    assert await sessions.list_tools("a", SERVER)
    await _until_gone(process)


async def _until_gone(process: int) -> None:
    async with asyncio.timeout(10):
        while Path(f"/proc/{process}").exists():
            await asyncio.sleep(0.01)
