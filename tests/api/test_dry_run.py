"""`?dry_run=true`: what a run would send, without a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import openai
import pytest

from afterglow.contracts import EngineStatus, McpServer, McpTool, ModelInfo
from afterglow.errors import OutboundFailed
from afterglow.settings import ModelSettings
from afterglow.testing import calls, says
from tests.api.money import count_rows, prompt_of, set_budget, set_prices, steps_of
from tests.conftest import GET_WEATHER, Server


async def try_run(server: Server, path: str, query: Any = None, **body: Any) -> Any:
    params = {"dry_run": "true", **(query or {})}
    return await server.client.post(path, cast_to=object, body=body, options={"params": params})


async def thread_of(server: Server, *texts: str) -> str:
    said: Any = [{"role": "user", "content": text} for text in texts]
    return (await server.client.beta.threads.create(messages=said)).id


async def compare(server: Server, thread_id: str, **body: Any) -> Any:
    """Try a run, then make it: the same request goes out, with the same hash and the same numbers."""
    before = await count_rows(server)
    asked = len(server.model.requests)
    tried = await try_run(server, f"/threads/{thread_id}/runs", **body)
    assert await count_rows(server) == before
    assert len(server.model.requests) == asked
    run = await server.client.beta.threads.runs.create_and_poll(
        thread_id=thread_id, poll_interval_ms=5, **{"assistant_id": body.pop("assistant_id"), **body}
    )
    prompt = await prompt_of(server, run, (await steps_of(server, run))[0])
    assert tried["object"] == "thread.run.dry_run"
    assert tried["would"] == "run"
    assert tried["prompt"] == prompt["request"]
    assert tried["prompt_hash"] == prompt["prompt_hash"]
    parts = {**tried["estimated"], "remainder": 0}
    assert parts == prompt["estimated"]
    assert sum(tried["estimated"].values()) == tried["estimated_tokens"]
    assert tried["budget_tokens"] == prompt["truncation"]["budget_tokens"]
    assert tried["dropped"]["count"] == prompt["truncation"]["dropped"]["count"]
    return tried


async def test_a_dry_run_is_the_run(server: Server):
    """What is shown is what the run then sends, and nothing is written for it."""
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    assistant = await server.assistant(instructions="Be brief.", tools=[GET_WEATHER])
    thread_id = await thread_of(server, "Weather?")
    extra: Any = [{"role": "user", "content": "In Oslo."}]
    tried = await compare(
        server, thread_id, assistant_id=assistant.id, additional_messages=extra, max_completion_tokens=300,
        additional_instructions="Now.", temperature=0.5, tool_choice="required",
    )  # fmt: skip
    assert tried["completion_tokens"] == 300
    assert tried["cost"] == {"prompt": None, "completion": None}


async def test_a_dry_run_of_a_long_thread(server: Server):
    """Truncation is that of the run, and goes on from that of the thread's last one."""
    server.model.info_of_all = ModelInfo(window_tokens=1000)
    thread_id = await thread_of(server, *[f"{number} " + "word " * 60 for number in range(30)])
    assistant = await server.assistant()
    first = await compare(server, thread_id, assistant_id=assistant.id)
    assert first["dropped"]["count"] > 20
    await server.client.beta.threads.messages.create(thread_id, role="user", content="word " * 60)
    again = await compare(server, thread_id, assistant_id=assistant.id)
    assert [again["budget_tokens"], again["window_tokens"]] == [750, 1000]


class Weathermen:
    """MCP servers: one that has a tool, and others that cannot be asked."""

    def why_refused(self, server: McpServer) -> str | None:
        return None

    async def list_tools(self, project: str, server: McpServer) -> list[McpTool]:
        if server.label != "weather":
            raise OutboundFailed(f"There is no {server.label}.")
        return [McpTool("forecast", "The weather.", {"type": "object", "properties": {}})]

    async def call_tool(self, *args: Any, **options: Any) -> str:
        raise AssertionError("it is never called")

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("given_by", ["assistant", "run"])
async def test_a_dry_run_asks_mcp_servers(server: Server, given_by: str):
    """The tools that they have are in the prompt, and what is said of those that cannot be asked."""
    server.house.mcp = Weathermen()
    tools: Any = [{"type": "mcp", "server_label": "weather"}, {"type": "mcp", "server_label": "gone"}]
    assistant = await server.assistant(instructions="Be brief.", tools=tools if given_by == "assistant" else [])
    more = {"tools": tools} if given_by == "run" else {}
    tried = await compare(server, await thread_of(server, "Weather?"), assistant_id=assistant.id, **more)
    assert [tool["function"]["name"] for tool in tried["prompt"]["tools"]] == ["weather__forecast"]
    assert "The tools of gone cannot be used now" in tried["prompt"]["messages"][0]["content"]


async def test_a_dry_run_with_files_for_code(server: Server):
    """The list of the code interpreter's files is in the prompt, and the files are given no names for it."""
    file = await server.client.files.create(file=("sales.csv", b"a,b\n1,2\n"), purpose="assistants")
    interpreter: Any = {"type": "code_interpreter"}
    assistant = await server.assistant(
        tools=[interpreter], tool_resources={"code_interpreter": {"file_ids": [file.id]}}
    )
    tried = await compare(server, await thread_of(server, "Sum up."), assistant_id=assistant.id)
    assert "/mnt/data/sales.csv" in tried["prompt"]["messages"][0]["content"]


async def test_a_dry_run_after_calibration(server: Server):
    """Estimates are calibrated as the run's will be."""
    assistant = await server.assistant()
    thread_id = await thread_of(server, "word " * 900)
    server.house.calibration.learn("gpt-4o", 1000, 2000)
    tried = await compare(server, thread_id, assistant_id=assistant.id)
    assert tried["estimated_tokens"] > 2000


async def test_a_dry_run_of_thread_and_run(server: Server):
    """A thread that would come with the run is not made either."""
    assistant = await server.assistant()
    before = await count_rows(server)
    thread: Any = {"messages": [{"role": "user", "content": "Hello"}]}
    tried = await try_run(server, "/threads/runs", assistant_id=assistant.id, thread=thread, stream=True)
    assert tried["prompt"]["messages"] == [{"role": "user", "content": "Hello"}]
    assert await count_rows(server) == before


async def test_the_cost_of_a_dry_run(server: Server):
    """With a price, the prompt's cost is told, and that of the longest answer."""
    set_prices(server)
    thread_id = await thread_of(server, "word " * 70)
    tried = await compare(server, thread_id, assistant_id=(await server.assistant()).id, max_completion_tokens=1000)
    assert tried["cost"]["completion"] == {"value": 0.01, "currency": "usd", "decimal": "0.01"}
    assert tried["cost"]["prompt"]["value"] == pytest.approx(tried["estimated_tokens"] * 2.5e-6)


async def test_what_would_not_run(server: Server):
    """A dry run says when the run would stop before its first call, and why."""
    assistant = await server.assistant()
    thread_id = await thread_of(server, "word " * 900)
    path = f"/threads/{thread_id}/runs"
    tried = await try_run(server, path, assistant_id=assistant.id, max_prompt_tokens=300)
    assert tried["would"] == "incomplete: max_prompt_tokens"
    tried = await try_run(server, path, {"max_total_tokens": 100}, assistant_id=assistant.id)
    assert tried["would"] == "failed: budget"
    assert "it is 100 tokens" in tried["reason"]
    tried = await try_run(server, path, {"max_cost": "0.5"}, assistant_id=assistant.id)
    assert "has no price" in tried["reason"]
    await set_budget(server, day_tokens=10)
    assert (await try_run(server, path, assistant_id=assistant.id))["would"] == "failed: budget"
    await set_budget(server)
    server.code.status = EngineStatus("off", reason="The kernel is too old.")
    interpreter: Any = {"type": "code_interpreter"}
    tried = await try_run(server, path, assistant_id=assistant.id, tools=[interpreter], tool_choice=interpreter)
    assert (tried["would"], tried["reason"]) == ("failed: tool_off", "The kernel is too old.")


async def test_a_dry_run_refuses_what_a_run_refuses(server: Server):
    """Whatever is wrong with a run is wrong with its dry run, in the same words."""
    assistant = await server.assistant()
    busy = await thread_of(server, "Weather?")
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    await server.client.beta.threads.runs.create_and_poll(
        thread_id=busy, assistant_id=assistant.id, tools=[GET_WEATHER], poll_interval_ms=5
    )
    free = await thread_of(server, "Hello")
    choice = {"type": "function", "function": {"name": "none"}}
    bodies: list[tuple[str, Any]] = [
        (busy, {"assistant_id": assistant.id}),
        ("thread_none", {"assistant_id": assistant.id}),
        (free, {"assistant_id": "asst_none"}),
        (free, {"assistant_id": assistant.id, "tool_choice": choice}),
        (free, {"assistant_id": assistant.id, "temperature": 7}),
        (free, {"assistant_id": assistant.id, "additional_messages": [{"role": "user", "content": ""}]}),
        (free, {}),
    ]
    for thread_id, body in bodies:
        told = []
        for dry in ("true", "false"):
            with pytest.raises(openai.APIStatusError) as refused:
                await try_run(server, f"/threads/{thread_id}/runs", {"dry_run": dry}, **body)
            told.append((refused.value.status_code, refused.value.body))
        assert told[0] == told[1]


async def test_what_is_wrong_with_the_query(server: Server):
    """A limit or switch that cannot be read is a 400 that names it."""
    for query, param in (
        ({"dry_run": "maybe"}, "dry_run"),
        ({"max_total_tokens": "-1"}, "max_total_tokens"),
        ({"max_total_tokens": "many"}, "max_total_tokens"),
        ({"max_total_tokens": "9" * 99}, "max_total_tokens"),
        ({"max_cost": "1e5"}, "max_cost"),
        ({"max_cost": "-1"}, "max_cost"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await try_run(server, "/threads/runs", query, assistant_id="asst_none")
        assert refused.value.param == param, query


async def test_a_price_under_another_name(server: Server):
    """The price is found by any name of what answers."""
    server.house.settings = dataclasses.replace(
        server.house.settings, models={"qwen": ModelSettings(prompt_price=1, completion_price=1)}
    )
    server.model.names = lambda model: [model, "gpu/qwen", "qwen"]  # type: ignore[method-assign]
    server.model.will(says("Hello."))
    thread_id = await thread_of(server, "Hello")
    tried = await try_run(server, f"/threads/{thread_id}/runs", assistant_id=(await server.assistant()).id)
    assert tried["cost"]["prompt"]["value"] > 0
