"""`…/steps/{step_id}/prompt`: what the model was given, put together again, and what was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow.contracts import EngineStatus, ModelInfo, TextDelta
from afterglow.testing import calls, says
from tests.api.money import get, prompt_of, steps_of
from tests.api.test_file_search import asks, librarian
from tests.conftest import GET_WEATHER, Server, ServerFactory

WEATHER = ("get_weather", {"city": "Oslo"})
INTERPRETER: Any = {"type": "code_interpreter"}


async def test_every_prompt_of_a_run(server: Server):
    """For each step the request that was sent, byte for byte, with its hash: tools, outputs and parameters."""
    server.model.will([TextDelta("Let me look."), *calls(WEATHER)], says("Rain."))
    format: Any = {"type": "json_object"}
    run = await server.run(
        "Weather?", tools=[GET_WEATHER], instructions="Be brief.", temperature=0.3, response_format=format,
        max_completion_tokens=500, tool_choice="required",
    )  # fmt: skip
    run = await server.submit(run, {"get_weather": "rain"})
    await server.client.beta.threads.runs.update(run.id, thread_id=run.thread_id, metadata={"a": "b"})
    prompts = [await prompt_of(server, run, step) for step in await steps_of(server, run)]
    assert [prompt["exact"] for prompt in prompts] == [True, True, True]
    assert prompts[0]["model_call_id"] == prompts[1]["model_call_id"] != prompts[2]["model_call_id"]
    for prompt, sent in zip(prompts, [server.model.requests[0], *server.model.requests], strict=True):
        asked = prompt["request"]
        assert asked["messages"] == sent.messages
        assert asked["tools"] == sent.tools
        assert [asked["temperature"], asked["max_tokens"]] == [0.3, sent.max_tokens]
        assert asked["response_format"] == format
        assert asked.get("tool_choice") == sent.tool_choice
        assert prompt["deleted"] == []
        assert prompt["truncation"]["kept"] >= 1


async def test_a_later_prompt_with_earlier_runs(server: Server):
    """Calls and messages of earlier runs are in it as they were sent, and what came later is not."""
    server.model.will(calls(WEATHER), says("Rain."), says("You asked."), says("Later."))
    run = await server.submit(await server.run("Weather?", tools=[GET_WEATHER]), {"get_weather": "x" * 9000})
    second = await server.run("What did I ask?", thread_id=run.thread_id)
    await server.run("And now?", thread_id=run.thread_id)
    [step] = await steps_of(server, second)
    prompt = await prompt_of(server, second, step)
    assert prompt["exact"]
    assert prompt["request"]["messages"] == server.model.requests[2].messages


async def test_code_and_tools_given_up(server: Server):
    """What the model was told of files, and that a tool was offered no more, is in the prompt."""
    file = await server.client.files.create(file=("sales.csv", b"a,b\n1,2\n"), purpose="assistants")
    server.code.status = EngineStatus("off", reason="The kernel is too old.")
    code = ("python", {"code": "1 + 1"})
    server.model.will(calls(code), calls(code), says("Then without."))
    assistant = await server.assistant(
        tools=[INTERPRETER, GET_WEATHER], tool_resources={"code_interpreter": {"file_ids": [file.id]}}
    )
    run = await server.run("Compute.", assistant_id=assistant.id)
    for step, sent in zip(await steps_of(server, run), server.model.requests, strict=True):
        prompt = await prompt_of(server, run, step)
        assert prompt["exact"]
        assert "sales.csv" in prompt["request"]["messages"][0]["content"] or "python" not in str(sent.tools)
        assert prompt["request"]["tools"] == sent.tools


async def test_a_model_that_takes_no_tools(server: Server):
    """A prompt without tools is shown without tools, whatever the run has."""
    server.model.info_of_all = ModelInfo(window_tokens=8192, tools=False)
    run = await server.run("Hello", tools=[GET_WEATHER])
    [step] = await steps_of(server, run)
    prompt = await prompt_of(server, run, step)
    assert prompt["exact"]
    assert "tools" not in prompt["request"]


async def test_a_deleted_message(server: Server):
    """A message that was deleted since is named and marked in its place; the prompt is not exact any more."""
    server.model.will(says("One."), says("Two."))
    first = await server.run("My secret is 42.")
    second = await server.run("Again?", thread_id=first.thread_id)
    messages = server.client.beta.threads.messages
    oldest = (await messages.list(first.thread_id, order="asc")).data[0]
    await messages.delete(oldest.id, thread_id=first.thread_id)
    [step] = await steps_of(server, second)
    prompt = await prompt_of(server, second, step)
    assert not prompt["exact"]
    assert prompt["deleted"] == [{"id": oldest.id, "type": "message"}]
    assert prompt["request"]["messages"][0] == {"role": "user", "content": f"[deleted: {oldest.id}]"}
    assert [said["role"] for said in prompt["request"]["messages"]] == ["user", "assistant", "user"]
    assert "secret" not in str(prompt)


async def test_a_deleted_file_that_was_quoted(server: Server):
    """Passages of a file that was deleted since are gone from the prompt, and the file is named."""
    assistant = await librarian(server)
    server.model.will(asks("holidays"), says("Thirty."))
    run = await server.run("Holidays?", assistant_id=assistant.id)
    step = (await steps_of(server, run))[-1]
    prompt = await prompt_of(server, run, step)
    assert prompt["exact"]
    assert "thirty days" in str(prompt["request"])
    ledger = await get(server, f"/threads/{run.thread_id}/runs/{run.id}/ledger")
    assert ledger["data"][1]["prompt"]["retrieved_chunks"] > 0
    file = (await server.client.files.list()).data[0]
    await server.client.files.delete(file.id)
    prompt = await prompt_of(server, run, step)
    assert not prompt["exact"]
    assert prompt["deleted"] == [{"id": file.id, "type": "file"}]
    assert "thirty days" not in str(prompt["request"])


async def test_images_are_shown_as_references(server: Server):
    """Stored images stand by their ids, and the prompt is exact until they are deleted."""
    png = b"\x89PNG\r\n\x1a\n" + b"0" * 50
    file = await server.client.files.create(file=("a.png", png), purpose="vision")
    parts: Any = [{"type": "text", "text": "What?"}, {"type": "image_file", "image_file": {"file_id": file.id}}]
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": parts}])
    run = await server.client.beta.threads.runs.create_and_poll(
        thread_id=thread.id, assistant_id=(await server.assistant()).id, poll_interval_ms=5
    )
    assert "base64" in str(server.model.requests[0].messages)
    [step] = await steps_of(server, run)
    prompt = await prompt_of(server, run, step)
    assert prompt["exact"]
    shown = prompt["request"]["messages"][0]["content"][1]
    assert shown == {"type": "image_file", "image_file": {"file_id": file.id, "detail": "auto"}}
    assert "base64" not in str(prompt)
    await server.client.files.delete(file.id)
    assert (await prompt_of(server, run, step))["deleted"] == [{"id": file.id, "type": "file"}]


async def test_what_truncation_dropped(server: Server):
    """All messages that were not sent are counted and listed by id, newest first, page by page, deleted ones too."""
    server.model.info_of_all = ModelInfo(window_tokens=1000)
    said: Any = [{"role": "user", "content": f"{number} " + "word " * 60} for number in range(60)]
    thread = await server.client.beta.threads.create(messages=said)
    run = await server.run("And now?", thread_id=thread.id)
    listed = [one async for one in server.client.beta.threads.messages.list(thread.id, order="desc", limit=100)]
    kept = len(server.model.requests[0].messages)
    dropped = [message.id for message in listed][kept + 1 :]  # the answer was not there yet
    await server.client.beta.threads.messages.delete(dropped[3], thread_id=thread.id)
    [step] = await steps_of(server, run)
    prompt = await prompt_of(server, run, step, limit=50)
    truncation = prompt["truncation"]
    assert prompt["exact"]
    assert truncation["kept"] == kept
    assert truncation["dropped"]["count"] == len(dropped) == 61 - kept
    assert truncation["dropped"]["has_more"]
    assert truncation["budget_tokens"] == 750 >= truncation["estimated_tokens"] > 0
    found = truncation["dropped"]["data"]
    rest = (await prompt_of(server, run, step, limit=50, after=found[-1]["id"]))["truncation"]["dropped"]
    assert not rest["has_more"]
    assert [one["id"] for one in found + rest["data"]] == dropped
    assert [one["id"] for one in found if one["deleted"]] == [dropped[3]]
    with pytest.raises(openai.NotFoundError, match="No message found"):
        await prompt_of(server, run, step, after="msg_none")


async def test_last_messages_drop_exactly_the_others(server: Server):
    """Under `last_messages` there is no budget, and all but the newest n are dropped."""
    said: Any = [{"role": "user", "content": f"Number {number}."} for number in range(9)]
    thread = await server.client.beta.threads.create(messages=said)
    strategy: Any = {"type": "last_messages", "last_messages": 3}
    run = await server.run("And now?", thread_id=thread.id, truncation_strategy=strategy)
    [step] = await steps_of(server, run)
    prompt = await prompt_of(server, run, step)
    assert prompt["exact"]
    assert prompt["truncation"]["type"] == "last_messages"
    assert prompt["truncation"]["budget_tokens"] is None
    assert (prompt["truncation"]["kept"], prompt["truncation"]["dropped"]["count"]) == (3, 7)


async def test_a_prompt_survives_a_restart_and_other_settings(start_server: ServerFactory, tmp_path: Path):
    """What the operator changes later changes nothing about a prompt of before."""
    async with start_server(tmp_path, history="messages") as server:
        server.model.will(calls(WEATHER), says("Rain."), says("Again."))
        run = await server.submit(await server.run("Weather?", tools=[GET_WEATHER]), {"get_weather": "rain"})
        run = await server.run("Again?", thread_id=run.thread_id)
        sent = server.model.requests[-1].messages
    async with start_server(tmp_path) as server:
        [step] = await steps_of(server, run)
        prompt = await prompt_of(server, run, step)
        assert prompt["exact"]
        assert prompt["request"]["messages"] == sent


async def test_a_step_whose_call_is_not_over(server: Server):
    """A prompt can be seen while the run waits for outputs."""
    server.model.will(calls(WEATHER))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    [step] = await steps_of(server, run)
    assert (await prompt_of(server, run, step))["exact"]
