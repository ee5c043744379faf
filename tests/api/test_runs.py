"""A run from its creation to its end, as its caller sees it by polling, and what the model is asked on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.beta.threads import Run
from openai.types.beta.threads.runs import RunStep

from afterglow.contracts import EngineStatus, ModelEnd, ModelInfo, RefusalDelta, TextDelta, ToolCallDelta
from afterglow.errors import (
    ContentFiltered,
    ContextOverflow,
    ModelBroke,
    ModelRateLimited,
    ModelRefused,
    ModelTimeout,
    ModelUnreachable,
)
from afterglow.objects import Usage
from afterglow.testing import SetClock, calls, ended, says
from tests.api.streams import answers, happened, polled, submit
from tests.conftest import GET_WEATHER, Server, ServerFactory

PYTHON = {"type": "code_interpreter"}
CODE_OFF = EngineStatus("off", reason="The code_interpreter tool is off:", remedy="this kernel is too old.")
SEARCH = {"type": "file_search"}
WEATHER_IN_OSLO = ("get_weather", {"city": "Oslo"})
HELLO: Any = [{"role": "user", "content": "Hello"}]


def used(prompt: int, completion: int) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def start(server: Server, text: str = "Hello", *, thread_id: str | None = None, **fields: Any) -> Run:
    """Start a run, and do not wait for it."""
    if thread_id is None:
        thread_id = (await server.client.beta.threads.create(messages=[{"role": "user", "content": text}])).id
    if "assistant_id" not in fields:
        fields["assistant_id"] = (await server.assistant()).id
    return await server.client.beta.threads.runs.create(thread_id, **fields)


async def get(server: Server, run: Run) -> Run:
    return await server.client.beta.threads.runs.retrieve(run.id, thread_id=run.thread_id)


async def steps_of(server: Server, run: Run) -> list[RunStep]:
    """All steps, oldest first."""
    page = await server.client.beta.threads.runs.steps.list(run.id, thread_id=run.thread_id, order="asc", limit=100)
    return page.data


async def messages_of(server: Server, thread_id: str) -> Any:
    """All messages, oldest first."""
    return (await server.client.beta.threads.messages.list(thread_id, order="asc", limit=100)).data


def tool_calls(step: RunStep) -> Any:
    assert step.step_details.type == "tool_calls"
    return step.step_details.tool_calls


def sent(server: Server, call: int = -1) -> list[dict[str, Any]]:
    """The chat messages of one model call; the newest unless told."""
    return server.model.requests[call].messages


def refusal_text(refused: pytest.ExceptionInfo[openai.BadRequestError]) -> str:
    """The message of a 400 that names neither param nor code."""
    body: Any = refused.value.body
    assert body["type"] == "invalid_request_error"
    assert body["param"] is None
    assert body["code"] is None
    return str(body["message"])


# --- the lifecycle, status by status ---------------------------------------------------------------------------


async def test_from_queued_to_completed(start_server: ServerFactory, tmp_path: Path) -> None:
    """queued → in_progress → completed, each with its own time; expires_at and usage change places at the end."""
    clock, go, finish = SetClock(), asyncio.Event(), asyncio.Event()
    async with start_server(tmp_path, clock=clock, max_running_runs=1, run_lease_s=1000) as server:
        created_at = int(clock.time)
        server.model.will([go, *says("First.")], [finish, *says("Second.")])
        first = await start(server)
        await happened(server, first.id, "thread.run.queued")
        run = await start(server)
        assert (run.status, run.created_at, run.expires_at) == ("queued", created_at, created_at + 600)
        assert run.started_at is None
        clock.time += 5
        go.set()
        await happened(server, first.id, "thread.run.completed")
        await until_asked(server, 2)
        await happened(server, run.id, "thread.run.in_progress")
        running = await get(server, run)
        assert (running.status, running.started_at) == ("in_progress", created_at + 5)
        assert running.expires_at == created_at + 600
        assert running.completed_at is None
        assert running.usage is None
        clock.time += 7
        finish.set()
        done = await polled(server, run)
        assert (done.status, done.started_at, done.completed_at) == ("completed", created_at + 5, created_at + 12)
        assert done.expires_at is None
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (10, 5, 15)
        for never in (done.failed_at, done.cancelled_at, done.last_error, done.incomplete_details):
            assert never is None


async def until_asked(server: Server, times: int) -> None:
    """Wait until the model has been asked so many times."""
    async with asyncio.timeout(10):
        while len(server.model.requests) < times:
            await asyncio.sleep(0.005)


async def test_from_requires_action_to_completed(start_server: ServerFactory, tmp_path: Path) -> None:
    """in_progress → requires_action → queued → in_progress → completed: the deadline stays, started_at is reset."""
    clock, finish = SetClock(), asyncio.Event()
    async with start_server(tmp_path, clock=clock, run_lease_s=1000) as server:
        created_at = int(clock.time)
        server.model.will(calls(WEATHER_IN_OSLO), [finish, *says("Rain.")])
        waiting = await server.run("Weather?", tools=[GET_WEATHER])
        assert waiting.status == "requires_action"
        assert waiting.usage is None
        assert waiting.required_action is not None
        assert waiting.required_action.type == "submit_tool_outputs"
        [asked] = waiting.required_action.submit_tool_outputs.tool_calls
        assert (asked.type, asked.function.name, asked.function.arguments) == (
            "function",
            "get_weather",
            '{"city":"Oslo"}',
        )
        [step] = await steps_of(server, waiting)
        assert (step.status, step.completed_at, step.usage) == ("in_progress", None, None)
        assert tool_calls(step)[0].function.output is None

        clock.time += 30
        answered = await server.client.beta.threads.runs.submit_tool_outputs(
            run_id=waiting.id, thread_id=waiting.thread_id, tool_outputs=[{"tool_call_id": asked.id, "output": "rain"}]
        )
        assert answered.status == "queued"
        assert answered.required_action is None
        assert (answered.started_at, answered.expires_at) == (created_at, created_at + 600)
        await until_asked(server, 2)
        running = await get(server, waiting)
        assert (running.status, running.started_at, running.expires_at) == (
            "in_progress",
            created_at + 30,
            created_at + 600,
        )
        [step] = await steps_of(server, waiting)
        assert (step.status, step.completed_at) == ("completed", created_at + 30)
        assert tool_calls(step)[0].function.output == "rain"
        finish.set()
        done = await polled(server, waiting)
        assert (done.status, done.started_at, done.expires_at) == ("completed", created_at + 30, None)
        assert done.usage is not None
        assert done.usage.total_tokens == 30


async def test_a_failed_run_says_when_and_why(start_server: ServerFactory, tmp_path: Path) -> None:
    """in_progress → failed: failed_at and last_error are set, expires_at is null, usage holds what was spent."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will([TextDelta("Half an ans"), ModelBroke("It broke.")])
        run = await server.run("Hello")
        assert (run.status, run.failed_at, run.completed_at) == ("failed", int(clock.time), None)
        assert run.last_error is not None
        assert (run.last_error.code, run.last_error.message) == ("server_error", "It broke.")
        assert run.expires_at is None
        assert run.usage is not None
        [step] = await steps_of(server, run)
        assert (step.status, step.failed_at) == ("failed", int(clock.time))
        assert step.last_error is not None
        assert step.last_error.code == "server_error"
        message = (await messages_of(server, run.thread_id))[-1]
        assert (message.status, message.incomplete_details.reason) == ("incomplete", "run_failed")
        assert message.incomplete_at == int(clock.time)
        assert message.content[0].text.value == "Half an ans"


async def test_a_model_error_fails_the_run(server: Server) -> None:
    """An error of the model server ends the run as failed, with its code and words; there is no step to show."""
    for error, code in (
        (ModelUnreachable("no connection"), "server_error"),
        (ModelTimeout("no answer"), "server_error"),
        (ModelRateLimited("slow down"), "rate_limit_exceeded"),
        (ModelRefused("no such model"), "server_error"),
        (ModelBroke("HTTP 500"), "server_error"),
        (ContentFiltered("not that"), "invalid_prompt"),
    ):
        server.model.will([error])
        run = await server.run("Hello")
        assert run.status == "failed"
        assert run.last_error is not None
        assert (run.last_error.code, run.last_error.message) == (code, str(error))
        assert await steps_of(server, run) == []
        assert await server.last_text(run.thread_id) == "Hello"


async def test_a_steps_error_knows_no_invalid_prompt(server: Server) -> None:
    """When a run fails as invalid_prompt, its open step says server_error: a step's error has no such code."""
    server.model.will([TextDelta("Well"), ContentFiltered("not that")])
    run = await server.run("Hello")
    assert run.last_error is not None
    assert run.last_error.code == "invalid_prompt"
    [step] = await steps_of(server, run)
    assert step.last_error is not None
    assert (step.last_error.code, step.last_error.message) == ("server_error", "not that")


async def test_an_overflow_is_cut_and_tried_once_more(server: Server) -> None:
    """Under `auto`, a prompt that the server finds too long is cut to the limit it names; the run completes."""
    thread = await server.client.beta.threads.create(
        messages=[{"role": "user", "content": f"{number} " + "word " * 300} for number in range(8)]
    )
    server.model.will([ContextOverflow("too long", 2000)], says("Now it fits."))
    run = await polled(server, await start(server, thread_id=thread.id))
    assert run.status == "completed"
    assert len(sent(server, 0)) == 8
    assert 1 <= len(sent(server, 1)) < 8
    assert sent(server, 1)[-1] == sent(server, 0)[-1]


async def test_an_overflow_that_stays_fails_the_run(server: Server) -> None:
    """A second overflow ends the run as invalid_prompt, and so does the first one under `last_messages`."""
    server.model.will([ContextOverflow("too long", 1000)], [ContextOverflow("still too long", 1000)])
    run = await server.run("Hello")
    assert run.last_error is not None
    assert (run.status, run.last_error.code) == ("failed", "invalid_prompt")
    server.model.will([ContextOverflow("too long", 1000)])
    strategy = {"type": "last_messages", "last_messages": 1}
    run = await server.run("Hello", truncation_strategy=strategy)
    assert run.status == "failed"
    assert len(server.model.requests) == 3


async def test_a_stream_that_ends_without_an_end_fails_the_run(server: Server) -> None:
    """A model stream that stops in the middle is no answer."""
    server.model.will([TextDelta("I was about to")])
    run = await server.run("Hello")
    assert run.status == "failed"
    assert run.last_error is not None
    assert run.last_error.code == "server_error"


async def test_a_fault_of_ours_fails_the_run_without_internals(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What we did not foresee ends the run too, before a message or in it; its caller is told no more than that."""

    async def break_down(request: Any) -> Any:
        if request.model == "later":
            yield [TextDelta("Once")]
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.model, "stream", break_down)
    for model in ("at once", "later"):
        run = await server.run("Hello", model=model)
        assert run.status == "failed"
        assert run.last_error is not None
        assert (run.last_error.code, run.last_error.message) == ("server_error", "Sorry, something went wrong.")
    assert await server.last_text(run.thread_id) == "Once"
    assert [step.status for step in await steps_of(server, run)] == ["failed"]


# --- what the run takes from assistant and caller ---------------------------------------------------------------


async def test_the_run_overrides_its_assistant_for_this_run_alone(server: Server) -> None:
    """model, instructions and tools of the run replace the assistant's in the run; the assistant stays as it was."""
    assistant = await server.assistant(model="big", instructions="Be brief.", tools=[GET_WEATHER], name="Ann")
    other = {"type": "function", "function": {"name": "other"}}
    server.model.will(says("Hi."), says("Hi again."))
    run = await server.run("Hello", assistant_id=assistant.id, model="small", instructions="Rhyme.", tools=[other])
    assert (run.model, run.instructions) == ("small", "Rhyme.")
    assert [tool.function.name for tool in run.tools] == ["other"]  # type: ignore[union-attr]
    request = server.model.requests[0]
    assert request.model == "small"
    assert request.messages[0] == {"role": "system", "content": "Rhyme."}
    assert [tool["function"]["name"] for tool in request.tools] == ["other"]

    assert await server.client.beta.assistants.retrieve(assistant.id) == assistant
    run = await server.run("Hello", assistant_id=assistant.id)
    assert (run.model, run.instructions) == ("big", "Be brief.")
    assert server.model.requests[1].model == "big"
    assert server.model.requests[1].tools == [
        {"type": "function", "function": {**GET_WEATHER["function"]}}  # type: ignore[dict-item]
    ]


async def test_no_tools_is_not_the_same_as_none_named(server: Server) -> None:
    """`tools: []` takes all tools away from the run."""
    assistant = await server.assistant(tools=[GET_WEATHER])
    server.model.will(says("Hi."))
    run = await server.run("Hello", assistant_id=assistant.id, tools=[])
    assert run.tools == []
    assert server.model.requests[0].tools == []


async def test_instructions(server: Server) -> None:
    """Additional instructions follow on a new line; the run shows what the model gets, "" when there is nothing."""
    for assistants, fields, shown in (
        ("Be brief.", {"additional_instructions": "Rhyme."}, "Be brief.\nRhyme."),
        ("Be brief.", {"instructions": "Be long.", "additional_instructions": "Rhyme."}, "Be long.\nRhyme."),
        (None, {"additional_instructions": "Rhyme."}, "Rhyme."),
        ("Be brief.", {"instructions": ""}, ""),
        (None, {}, ""),
    ):
        assistant = await server.assistant(instructions=assistants)
        server.model.will(says("Hi."))
        run = await server.run("Hello", assistant_id=assistant.id, **fields)
        assert run.instructions == shown
        system = [message["content"] for message in sent(server) if message["role"] == "system"]
        assert system == ([shown] if shown else [])


async def test_additional_messages_stay_on_the_thread(server: Server) -> None:
    """additional_messages are appended before the run, in order, and stay."""
    more: Any = [
        {"role": "assistant", "content": "Ask me anything."},
        {"role": "user", "content": "What is new?", "metadata": {"from": "app"}},
    ]
    server.model.will(says("Nothing."))
    run = await server.run("Hello", additional_messages=more)
    assert [(message["role"], message["content"]) for message in sent(server)] == [
        ("user", "Hello"),
        ("assistant", "Ask me anything."),
        ("user", "What is new?"),
    ]
    messages = await messages_of(server, run.thread_id)
    assert [message.content[0].text.value for message in messages] == [
        "Hello",
        "Ask me anything.",
        "What is new?",
        "Nothing.",
    ]
    assert messages[2].metadata == {"from": "app"}
    assert (messages[2].run_id, messages[2].assistant_id) == (None, None)
    assert (messages[3].run_id, messages[3].assistant_id) == (run.id, run.assistant_id)


async def test_sampling_that_nobody_set_is_not_sent(server: Server) -> None:
    """Defaults are shown on the run, and the model is asked without them."""
    server.model.will(says("Hi."))
    run = await server.run("Hello")
    assert (run.temperature, run.top_p, run.response_format) == (1.0, 1.0, "auto")
    assert (run.tool_choice, run.parallel_tool_calls) == ("auto", True)
    assert run.truncation_strategy is not None
    assert (run.truncation_strategy.type, run.truncation_strategy.last_messages) == ("auto", None)
    request = server.model.requests[0]
    for unset in ("temperature", "top_p", "reasoning_effort", "response_format", "tool_choice", "max_tokens"):
        assert getattr(request, unset) is None
    assert request.parallel_tool_calls is None


async def test_sampling_that_was_set_is_sent(server: Server) -> None:
    """The assistant's values go to the model, and the run's before them; also those equal to the defaults."""
    assistant = await server.assistant(temperature=0.2, top_p=0.5, reasoning_effort="low")
    server.model.will(says("Hi."), says("Hi."))
    run = await server.run("Hello", assistant_id=assistant.id)
    assert (run.temperature, run.top_p) == (0.2, 0.5)
    request = server.model.requests[0]
    assert (request.temperature, request.top_p, request.reasoning_effort) == (0.2, 0.5, "low")
    run = await server.run("Hello", assistant_id=assistant.id, temperature=1, top_p=0, reasoning_effort="none")
    assert (run.temperature, run.top_p) == (1, 0)
    request = server.model.requests[1]
    assert (request.temperature, request.top_p, request.reasoning_effort) == (1, 0, "none")


NAMED = {"type": "function", "function": {"name": "get_weather"}}


async def test_tool_choice_is_for_the_first_turn(server: Server) -> None:
    """A demand for tools goes with the first model call of the run only, or the run would loop."""
    choices: list[tuple[Any, Any, Any]] = [
        (None, None, None),
        ("auto", "auto", None),
        ("required", "required", None),
        (NAMED, NAMED, None),
    ]
    for choice, first, later in choices:
        server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
        run = await server.run("Weather?", tools=[GET_WEATHER], **({} if choice is None else {"tool_choice": choice}))
        shown: Any = run.tool_choice
        assert (shown if isinstance(shown, str) else shown.model_dump(exclude_none=True)) == (choice or "auto")
        run = await submit(server, run, {"get_weather": "rain"})
        assert run.status == "completed"
        assert [request.tool_choice for request in server.model.requests[-2:]] == [first, later]


async def test_tool_choice_of_an_earlier_run_does_not_matter(server: Server) -> None:
    """The first-turn rule counts the run's own turns, not those of runs before it on the thread."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."), says("Rain again."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    run = await submit(server, run, {"get_weather": "rain"})
    await server.run("And now?", thread_id=run.thread_id, tools=[GET_WEATHER], tool_choice="required")
    assert [request.tool_choice for request in server.model.requests] == [None, None, "required"]


async def test_a_tool_choice_that_is_not_offered_is_refused(server: Server) -> None:
    """tool_choice cannot name a tool that the run does not have."""
    with pytest.raises(openai.BadRequestError) as refused:
        await start(server, tools=[PYTHON], tool_choice=NAMED)
    assert (refused.value.param, refused.value.code) == ("tool_choice", "invalid_value")
    with pytest.raises(openai.BadRequestError):
        await start(server, tool_choice={"type": "code_interpreter"})


async def test_parallel_tool_calls_is_sent_with_tools(server: Server) -> None:
    """parallel_tool_calls goes to the model as set, but not to one that has no tools to call."""
    for value in (True, False):
        server.model.will(says("Hi."), says("Hi."))
        run = await server.run("Hello", tools=[GET_WEATHER], parallel_tool_calls=value)
        assert run.parallel_tool_calls is value
        await server.run("Hello", parallel_tool_calls=value)
        assert [request.parallel_tool_calls for request in server.model.requests[-2:]] == [value, None]


SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": {"type": "object", "properties": {}}, "strict": True},
}


async def test_response_format(server: Server) -> None:
    """JSON formats are sent as they were given, by run or assistant; text needs no saying. All are echoed."""
    formats: list[tuple[Any, Any]] = [
        ("auto", None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "json_object"}),
        (SCHEMA, SCHEMA),
    ]
    for given, asked in formats:
        server.model.will(says("{}"), says("{}"))
        assistant = await server.assistant(response_format=given)
        for run in (
            await server.run("JSON, please", response_format=given),
            await server.run("JSON, please", assistant_id=assistant.id),
        ):
            shown: Any = run.response_format
            echoed = shown if isinstance(shown, str) else shown.model_dump(exclude_unset=True, by_alias=True)
            assert echoed == given
        assert [request.response_format for request in server.model.requests[-2:]] == [asked, asked]


async def test_image_urls_are_passed_on(server: Server) -> None:
    """A user's image_url goes to the model with its detail; texts beside it keep their order."""
    content: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png", "detail": "low"}},
    ]
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": content}])
    server.model.will(says("A cat."))
    await polled(server, await start(server, thread_id=thread.id))
    assert sent(server) == [{"role": "user", "content": content}]


async def test_a_model_without_eyes_gets_the_images_name(server: Server) -> None:
    """A model that is known to see no images is told that there was one."""
    server.model.info_of_all = ModelInfo(window_tokens=8192, vision=False)
    content: Any = [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": content}])
    server.model.will(says("I cannot see."))
    await polled(server, await start(server, thread_id=thread.id))
    assert sent(server) == [{"role": "user", "content": "[image: https://example.com/cat.png]"}]


# --- budgets ---------------------------------------------------------------------------------------------------


async def test_max_completion_tokens_counts_the_whole_run(server: Server) -> None:
    """Each call may use what the earlier ones left; the one that goes beyond it makes the run incomplete."""
    server.model.will(
        calls(WEATHER_IN_OSLO, usage=used(50, 200)),
        calls(WEATHER_IN_OSLO, usage=used(60, 30)),
        says("It is raining in", usage=used(70, 100)),
    )
    run = await server.run("Weather?", tools=[GET_WEATHER], max_completion_tokens=256)
    run = await submit(server, run, {"get_weather": "rain"})
    run = await submit(server, run, {"get_weather": "rain"})
    assert [request.max_tokens for request in server.model.requests] == [256, 56, 26]
    assert run.status == "incomplete"
    assert run.incomplete_details is not None
    assert run.incomplete_details.reason == "max_completion_tokens"
    assert run.completed_at is not None
    assert run.expires_at is None
    assert run.usage is not None
    assert (run.usage.prompt_tokens, run.usage.completion_tokens, run.usage.total_tokens) == (180, 330, 510)
    message = (await messages_of(server, run.thread_id))[-1]
    assert (message.status, message.incomplete_details.reason) == ("incomplete", "max_tokens")
    assert message.content[0].text.value == "It is raining in"
    steps = await steps_of(server, run)
    assert [step.status for step in steps] == ["completed"] * 3
    assert [step.usage.completion_tokens for step in steps if step.usage] == [200, 30, 100]


async def test_a_completion_budget_used_up_exactly_asks_no_more(server: Server) -> None:
    """With nothing left of max_completion_tokens the run ends before another model call."""
    server.model.will(calls(WEATHER_IN_OSLO, usage=used(50, 256)))
    run = await server.run("Weather?", tools=[GET_WEATHER], max_completion_tokens=256)
    assert run.status == "requires_action"
    run = await submit(server, run, {"get_weather": "rain"})
    assert run.status == "incomplete"
    assert run.incomplete_details is not None
    assert run.incomplete_details.reason == "max_completion_tokens"
    assert len(server.model.requests) == 1


async def test_calls_beyond_the_budget_do_not_wait_for_the_caller(server: Server) -> None:
    """A turn of calls that breaks the budget ends the run; its step shows the calls, without outputs."""
    server.model.will(calls(WEATHER_IN_OSLO, usage=used(50, 300)))
    run = await server.run("Weather?", tools=[GET_WEATHER], max_completion_tokens=256)
    assert run.status == "incomplete"
    assert run.required_action is None
    [step] = await steps_of(server, run)
    assert step.status == "completed"
    [call] = tool_calls(step)
    assert (call.function.name, call.function.output) == ("get_weather", None)


async def test_max_prompt_tokens_counts_the_whole_run(server: Server) -> None:
    """When the prompts together would pass max_prompt_tokens, the run ends before the call that would do it."""
    server.model.will(calls(WEATHER_IN_OSLO, usage=used(140, 5)), calls(WEATHER_IN_OSLO, usage=used(110, 5)))
    run = await server.run("Weather?", tools=[GET_WEATHER], max_prompt_tokens=256)
    run = await submit(server, run, {"get_weather": "rain"})
    assert run.status == "requires_action"
    run = await submit(server, run, {"get_weather": "rain"})
    assert run.status == "incomplete"
    assert run.incomplete_details is not None
    assert run.incomplete_details.reason == "max_prompt_tokens"
    assert run.usage is not None
    assert run.usage.prompt_tokens == 250
    assert len(server.model.requests) == 2


async def test_a_prompt_that_was_longer_than_thought_ends_the_run(server: Server) -> None:
    """When the server counts more prompt tokens than allowed, what was written is kept as incomplete."""
    server.model.will(says("It is raining", usage=used(300, 5)))
    run = await server.run("Weather?", max_prompt_tokens=256)
    assert run.status == "incomplete"
    assert run.incomplete_details is not None
    assert run.incomplete_details.reason == "max_prompt_tokens"
    message = (await messages_of(server, run.thread_id))[-1]
    assert (message.status, message.incomplete_details.reason) == ("incomplete", "max_tokens")


async def test_max_prompt_tokens_cuts_the_history_first(server: Server) -> None:
    """A long thread is cut to fit max_prompt_tokens rather than ending the run."""
    thread = await server.client.beta.threads.create(
        messages=[{"role": "user", "content": f"{number} " + "word " * 60} for number in range(10)]
    )
    server.model.will(says("Fine."))
    run = await polled(server, await start(server, thread_id=thread.id, max_prompt_tokens=300))
    assert run.status == "completed"
    assert 1 <= len(sent(server)) < 10
    assert sent(server)[-1]["content"].startswith("9 ")


async def test_what_cannot_be_cut_to_fit_ends_the_run(server: Server) -> None:
    """When the newest message alone is longer than max_prompt_tokens, the model is not called at all."""
    run = await server.run("word " * 1000, max_prompt_tokens=256)
    assert run.status == "incomplete"
    assert run.incomplete_details is not None
    assert run.incomplete_details.reason == "max_prompt_tokens"
    assert server.model.requests == []
    assert run.usage is not None
    assert run.usage.total_tokens == 0


async def test_an_answer_cut_by_the_model_is_incomplete(server: Server) -> None:
    """finish_reason `length` makes run and message incomplete, with the text that came."""
    server.model.will([TextDelta("Once upon a"), ended("length")])
    run = await server.run("A story")
    assert run.status == "incomplete"
    assert run.incomplete_details is not None
    assert run.incomplete_details.reason == "max_completion_tokens"
    message = (await messages_of(server, run.thread_id))[-1]
    assert (message.status, message.incomplete_details.reason) == ("incomplete", "max_tokens")
    assert message.content[0].text.value == "Once upon a"
    [step] = await steps_of(server, run)
    assert step.status == "completed"


async def test_calls_cut_by_the_model_are_not_asked_of_the_caller(server: Server) -> None:
    """finish_reason `length` in the middle of a call's arguments ends the run, instead of passing half of them on."""
    server.model.will([ToolCallDelta(0, "call_1", "get_weather"), ToolCallDelta(0, arguments='{"ci'), ended("length")])
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.status == "incomplete"
    [step] = await steps_of(server, run)
    assert tool_calls(step)[0].function.arguments == '{"ci'


async def test_an_answer_stopped_by_a_filter(server: Server) -> None:
    """finish_reason `content_filter` fails the run; its message is incomplete for that reason."""
    server.model.will([TextDelta("The secret is"), ended("content_filter")])
    run = await server.run("Tell me")
    assert run.status == "failed"
    assert run.last_error is not None
    assert run.last_error.code == "invalid_prompt"
    message = (await messages_of(server, run.thread_id))[-1]
    assert (message.status, message.incomplete_details.reason) == ("incomplete", "content_filter")
    [step] = await steps_of(server, run)
    assert step.status == "failed"
    assert step.last_error is not None
    assert step.last_error.code == "server_error"
    assert step.usage is not None
    assert step.usage.total_tokens == 15


# --- truncation ------------------------------------------------------------------------------------------------


async def test_last_messages_keeps_exactly_the_newest(server: Server) -> None:
    """`last_messages: 2` sends the two newest messages, whatever their role."""
    thread = await server.client.beta.threads.create(
        messages=[{"role": "user" if n % 2 else "assistant", "content": str(n)} for n in range(5)]
    )
    strategy: Any = {"type": "last_messages", "last_messages": 2}
    server.model.will(says("Fine."))
    run = await polled(server, await start(server, thread_id=thread.id, truncation_strategy=strategy))
    assert run.truncation_strategy is not None
    assert run.truncation_strategy.model_dump() == strategy
    assert [message["content"] for message in sent(server)] == ["3", "4"]


async def test_last_messages_keeps_what_the_run_itself_did(server: Server) -> None:
    """The run's own calls and their outputs are sent on top of the n newest messages."""
    strategy = {"type": "last_messages", "last_messages": 1}
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    run = await server.run("Weather?", tools=[GET_WEATHER], truncation_strategy=strategy)
    await submit(server, run, {"get_weather": "rain"})
    assert [message["role"] for message in sent(server)] == ["user", "assistant", "tool"]


async def test_last_messages_needs_a_number(server: Server) -> None:
    """`last_messages` without the number is refused; `auto` with one is not, since SDKs send it."""
    with pytest.raises(openai.BadRequestError) as refused:
        await start(server, truncation_strategy={"type": "last_messages"})
    body: Any = refused.value.body
    assert body["message"] == "Missing required parameter: 'truncation_strategy.last_messages'."
    server.model.will(says("Hi."))
    run = await server.run("Hello", truncation_strategy={"type": "auto", "last_messages": 1})
    assert run.status == "completed"


async def test_auto_keeps_the_newest_that_fit(server: Server) -> None:
    """`auto` drops the oldest messages until the prompt fits the model's window; instructions stay."""
    server.model.info_of_all = ModelInfo(window_tokens=400, learned="configuration")
    assistant = await server.assistant(instructions="Be brief.")
    thread = await server.client.beta.threads.create(
        messages=[{"role": "user", "content": f"{number} " + "word " * 30} for number in range(12)]
    )
    server.model.will(says("Fine."))
    run = await polled(server, await start(server, thread_id=thread.id, assistant_id=assistant.id))
    assert run.status == "completed"
    kept = [message["content"].split()[0] for message in sent(server)]
    assert kept[0] == "Be"
    assert 1 <= len(kept[1:]) < 12
    assert kept[1:] == [str(number) for number in range(12 - len(kept[1:]), 12)]


# --- tools -----------------------------------------------------------------------------------------------------


async def test_a_call_and_its_output_reach_the_model(server: Server) -> None:
    """After the outputs, the model sees the call as it made it, and the output under the same id."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.required_action is not None
    [call] = run.required_action.submit_tool_outputs.tool_calls
    run = await submit(server, run, {"get_weather": "rain"})
    assert sent(server) == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    assert await server.last_text(run.thread_id) == "Rain."


async def test_many_rounds(server: Server) -> None:
    """A run may call functions again and again; each round is a step, and the sums are those of all rounds."""
    rounds = 8
    server.model.will(*[calls(WEATHER_IN_OSLO, usage=used(10 + n, n)) for n in range(rounds)], says("Enough."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    for number in range(rounds):
        assert run.status == "requires_action"
        run = await submit(server, run, {"get_weather": f"rain {number}"})
    assert run.status == "completed"
    steps = await steps_of(server, run)
    assert [step.type for step in steps] == ["tool_calls"] * rounds + ["message_creation"]
    assert [tool_calls(step)[0].function.output for step in steps[:-1]] == [f"rain {n}" for n in range(rounds)]
    assert len({tool_calls(step)[0].id for step in steps[:-1]}) == rounds
    outputs = [message["content"] for message in sent(server) if message["role"] == "tool"]
    assert outputs == [f"rain {n}" for n in range(rounds)]
    assert run.usage is not None
    assert run.usage.prompt_tokens == sum(step.usage.prompt_tokens for step in steps if step.usage)
    assert run.usage.completion_tokens == sum(step.usage.completion_tokens for step in steps if step.usage)
    assert run.usage.prompt_tokens == sum(10 + n for n in range(rounds)) + 10


async def test_parallel_calls_are_one_step(server: Server) -> None:
    """All calls of one turn are in one step and one required_action, and are answered in one request, in any order."""
    server.model.will(calls(WEATHER_IN_OSLO, ("get_weather", {"city": "Bergen"}), ("get_time", {})), says("Rain."))
    get_time = {"type": "function", "function": {"name": "get_time"}}
    run = await server.run("Weather and time?", tools=[GET_WEATHER, get_time])
    assert run.required_action is not None
    asked = run.required_action.submit_tool_outputs.tool_calls
    assert [(call.function.name, call.function.arguments) for call in asked] == [
        ("get_weather", '{"city":"Oslo"}'),
        ("get_weather", '{"city":"Bergen"}'),
        ("get_time", "{}"),
    ]
    answers: Any = [{"tool_call_id": call.id, "output": f"answer {n}"} for n, call in enumerate(asked)]
    run = await server.client.beta.threads.runs.submit_tool_outputs_and_poll(
        run_id=run.id, thread_id=run.thread_id, tool_outputs=answers[::-1], poll_interval_ms=5
    )
    assert run.status == "completed"
    tools, message = await steps_of(server, run)
    assert [call.function.output for call in tool_calls(tools)] == ["answer 0", "answer 1", "answer 2"]
    assert message.type == "message_creation"
    assert [message["content"] for message in sent(server)[-3:]] == ["answer 0", "answer 1", "answer 2"]


async def test_a_tool_whose_engine_is_off(server: Server) -> None:
    """The step fails with the reason, the model is told it, and the run goes on to its answer."""
    server.code.status = CODE_OFF
    server.model.will(calls(("python", {"code": "print(1)"})), says("I had to do without."))
    run = await server.run("Try it", tools=[PYTHON])
    assert run.status == "completed"
    tools, message = await steps_of(server, run)
    assert tools.status == "failed"
    assert tools.last_error is not None
    assert tools.last_error.code == "server_error"
    assert "code_interpreter" in tools.last_error.message
    assert tools.usage is not None
    [shown] = tool_calls(tools)
    assert shown.type == "code_interpreter"
    assert shown.code_interpreter.input == "print(1)"
    assert message.status == "completed"
    told = sent(server)[-1]
    assert (told["role"], told["tool_call_id"]) == ("tool", shown.id)
    assert tools.last_error.message in told["content"]


async def test_demanding_a_tool_whose_engine_is_off_fails_the_run(server: Server) -> None:
    """When tool_choice demands what cannot be had, the run fails with the reason and asks no model."""
    server.code.status = CODE_OFF
    run = await server.run("Try it", tools=[PYTHON], tool_choice=PYTHON)
    assert run.status == "failed"
    assert run.last_error is not None
    assert run.last_error.code == "server_error"
    assert "code_interpreter" in run.last_error.message
    assert server.model.requests == []


async def test_a_function_that_the_model_made_up(server: Server) -> None:
    """A call of a function that nobody offered is the caller's to answer, as the model made it."""
    server.model.will(calls(("get_wether", {"city": "Oslo"})), says("Never mind."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    run = await submit(server, run, {"get_wether": "ERROR: no such function"})
    assert run.status == "completed"
    assert sent(server)[-1]["content"] == "ERROR: no such function"


async def test_a_callers_function_may_be_named_python(server: Server) -> None:
    """A function of the caller's keeps its name beside code_interpreter, which is offered under another one."""
    own = {"type": "function", "function": {"name": "python", "parameters": {"type": "object", "properties": {}}}}
    server.model.will(calls(("python", {})), calls(("code_interpreter", {"code": "1"})), says("Done."))
    run = await server.run("Run it", tools=[PYTHON, own])
    offered = [tool["function"]["name"] for tool in server.model.requests[0].tools]
    assert offered == ["code_interpreter", "python"]
    assert run.status == "requires_action"
    run = await submit(server, run, {"python": "ran"})
    assert run.status == "completed"
    first, second, _ = await steps_of(server, run)
    assert [tool_calls(step)[0].type for step in (first, second)] == ["function", "code_interpreter"]


async def test_functions_and_server_tools_in_one_turn(server: Server) -> None:
    """Of a mixed turn only the function calls are asked of the caller; the model hears of all of them."""
    server.code.status = CODE_OFF
    server.model.will(calls(("python", {"code": "1"}), WEATHER_IN_OSLO), says("Rain."))
    run = await server.run("Both", tools=[PYTHON, GET_WEATHER])
    assert run.required_action is not None
    [asked] = run.required_action.submit_tool_outputs.tool_calls
    assert asked.function.name == "get_weather"
    [step] = await steps_of(server, run)
    assert step.status == "in_progress"
    assert [call.type for call in tool_calls(step)] == ["code_interpreter", "function"]
    run = await submit(server, run, {"get_weather": "rain"})
    assert run.status == "completed"
    python, weather = sent(server)[-2:]
    assert "code_interpreter" in python["content"]
    assert weather["content"] == "rain"
    step, _ = await steps_of(server, run)
    assert step.status == "failed"
    assert step.last_error is not None
    assert "code_interpreter" in step.last_error.message
    assert tool_calls(step)[1].function.output == "rain"


async def test_a_mixed_turn_tells_the_model_that_nothing_was_found(server: Server) -> None:
    """Beside a function call a file search is made at once, and the model hears of both."""
    server.model.will(calls(("file_search", {"queries": ["rain"]}), WEATHER_IN_OSLO), says("Rain."))
    run = await server.run("Both", tools=[SEARCH, GET_WEATHER])
    await submit(server, run, {"get_weather": "rain"})
    search, weather = sent(server)[-2:]
    assert search["content"] == "No passage of the files matches."
    assert weather["content"] == "rain"


async def test_text_before_calls(server: Server) -> None:
    """Text that comes before calls in one turn is a message and a step of its own, completed before the calls'."""
    server.model.will([TextDelta("Let me "), TextDelta("look."), *calls(WEATHER_IN_OSLO)], says("Rain."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.status == "requires_action"
    message, tools = await steps_of(server, run)
    assert [(message.type, message.status), (tools.type, tools.status)] == [
        ("message_creation", "completed"),
        ("tool_calls", "in_progress"),
    ]
    assert await server.last_text(run.thread_id) == "Let me look."
    run = await submit(server, run, {"get_weather": "rain"})
    assert [message["role"] for message in sent(server)] == ["user", "assistant", "tool"]
    assert sent(server)[1]["content"] == "Let me look."
    assert await server.last_text(run.thread_id) == "Rain."
    steps = await steps_of(server, run)
    assert run.usage is not None
    assert run.usage.total_tokens == sum(step.usage.total_tokens for step in steps if step.usage) == 30


async def test_an_empty_answer_is_a_message(server: Server) -> None:
    """A model that says nothing leaves a completed message with one empty text."""
    server.model.will([ended("stop")])
    run = await server.run("Hello")
    assert run.status == "completed"
    message = (await messages_of(server, run.thread_id))[-1]
    assert (message.role, message.status) == ("assistant", "completed")
    assert [part.text.value for part in message.content] == [""]


async def test_a_refusal_is_a_part_of_its_own(server: Server) -> None:
    """What the model refuses is a refusal part; the next run shows it to the model as text."""
    server.model.will([RefusalDelta("I can"), RefusalDelta("not."), ended("stop")], says("Sorry."))
    run = await server.run("Do it")
    assert run.status == "completed"
    message = (await messages_of(server, run.thread_id))[-1]
    assert [(part.type, part.refusal) for part in message.content] == [("refusal", "I cannot.")]
    await server.run("Please", thread_id=run.thread_id)
    assert sent(server)[1] == {"role": "assistant", "content": "I cannot."}


async def test_a_server_that_reports_no_usage(server: Server) -> None:
    """Tokens that the model server does not count are estimated, so that budgets still hold."""
    server.model.will([TextDelta("word " * 400), ModelEnd(finish_reason="stop")])
    run = await server.run("Hello", max_completion_tokens=256)
    assert run.status == "incomplete"
    assert run.usage is not None
    assert run.usage.completion_tokens > 256
    assert run.usage.total_tokens == run.usage.prompt_tokens + run.usage.completion_tokens
    [step] = await steps_of(server, run)
    assert step.usage is not None
    assert step.usage.total_tokens == run.usage.total_tokens


async def test_later_runs_see_the_calls_of_earlier_ones(server: Server) -> None:
    """History holds messages and calls with their outputs, in the thread's order."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."), says("You asked about Oslo."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    run = await submit(server, run, {"get_weather": "rain"})
    await server.run("What did I ask?", thread_id=run.thread_id)
    assert [message["role"] for message in sent(server)] == ["user", "assistant", "tool", "assistant", "user"]


# --- submitting outputs ----------------------------------------------------------------------------------------


async def test_outputs_must_answer_exactly_what_waits(server: Server) -> None:
    """Missing, unknown and doubled ids get one wording; the run goes on waiting, and the right outputs still count."""
    server.model.will(calls(WEATHER_IN_OSLO, ("get_weather", {"city": "Bergen"})), says("Rain."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.required_action is not None
    a, b = (call.id for call in run.required_action.submit_tool_outputs.tool_calls)
    for given in ([a], [], [a, b, "call_other"], [a, "call_other"], [a, b, b], [a, a]):
        with pytest.raises(openai.BadRequestError) as refused:
            await server.client.beta.threads.runs.submit_tool_outputs(
                run_id=run.id,
                thread_id=run.thread_id,
                tool_outputs=[{"tool_call_id": call_id, "output": "x"} for call_id in given],
            )
        got = ", ".join(f"'{call_id}'" for call_id in given)
        assert refusal_text(refused) == f"Expected tool outputs for call_ids ['{a}', '{b}'], got [{got}]"
        assert (await get(server, run)).status == "requires_action"
    assert (await submit(server, run, {"get_weather": "rain"})).status == "completed"


async def test_outputs_must_be_strings(server: Server) -> None:
    """An output that is no string is refused with its path; one that is left out counts as empty."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.required_action is not None
    [call] = run.required_action.submit_tool_outputs.tool_calls
    outputs: Any
    for output, kind in ((21, "an integer"), ({"rain": True}, "an object"), (None, "null")):
        outputs = [{"tool_call_id": call.id, "output": output}]
        with pytest.raises(openai.BadRequestError) as refused:
            await server.client.beta.threads.runs.submit_tool_outputs(
                run_id=run.id, thread_id=run.thread_id, tool_outputs=outputs
            )
        body: Any = refused.value.body
        assert body["message"] == (
            f"Invalid type for 'tool_outputs[0].output': expected a string, but got {kind} instead."
        )
        assert (body["code"], body["param"]) == ("invalid_type", "tool_outputs[0].output")
    outputs = [{"tool_call_id": call.id}]
    await server.client.beta.threads.runs.submit_tool_outputs(
        run_id=run.id, thread_id=run.thread_id, tool_outputs=outputs
    )
    assert (await polled(server, run)).status == "completed"
    assert sent(server)[-1]["content"] == ""


async def test_outputs_in_the_wrong_state_are_refused(server: Server) -> None:
    """A run that does not wait takes no outputs, and says in which status it is."""
    hold = asyncio.Event()
    server.model.will([hold, *calls(WEATHER_IN_OSLO)], [hold, *says("Rain.")])
    run = await start(server, tools=[GET_WEATHER])
    await until_asked(server, 1)

    async def refused_in(status: str) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await server.client.beta.threads.runs.submit_tool_outputs(
                run_id=run.id, thread_id=run.thread_id, tool_outputs=[{"tool_call_id": "call_1", "output": "x"}]
            )
        assert refusal_text(refused) == f'Runs in status "{status}" do not accept tool outputs.'

    await refused_in("in_progress")
    hold.set()
    run = await polled(server, run)
    run = await submit(server, run, {"get_weather": "rain"})
    await refused_in("completed")


async def test_outputs_count_once(server: Server) -> None:
    """Of two submits at the same time one wins; the other is told that the run does not wait any more."""
    hold = asyncio.Event()
    server.model.will(calls(WEATHER_IN_OSLO), [hold, *says("Rain.")])
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.required_action is not None
    [call] = run.required_action.submit_tool_outputs.tool_calls
    answers = await asyncio.gather(
        *(
            server.client.beta.threads.runs.submit_tool_outputs(
                run_id=run.id,
                thread_id=run.thread_id,
                tool_outputs=[{"tool_call_id": call.id, "output": f"rain {number}"}],
            )
            for number in range(3)
        ),
        return_exceptions=True,
    )
    assert sorted(isinstance(answer, Run) for answer in answers) == [False, False, True]
    assert all(isinstance(answer, Run | openai.BadRequestError) for answer in answers)
    hold.set()
    assert (await polled(server, run)).status == "completed"
    assert len(server.model.requests) == 2


# --- what else may happen to a run -----------------------------------------------------------------------------


async def test_metadata_changed_during_a_run_stays(server: Server) -> None:
    """Metadata can be changed while the run is at work; neither side undoes what the other wrote."""
    hold = asyncio.Event()
    server.model.will([TextDelta("Hal"), hold, TextDelta("lo"), ended("stop")])
    run = await start(server, metadata={"a": "1"})
    await happened(server, run.id, "thread.message.delta")
    changed = await server.client.beta.threads.runs.update(run.id, thread_id=run.thread_id, metadata={"b": "2"})
    assert (changed.status, changed.metadata) == ("in_progress", {"b": "2"})
    assert changed.started_at is not None
    hold.set()
    done = await polled(server, run)
    assert (done.status, done.metadata) == ("completed", {"b": "2"})
    assert done.usage is not None
    changed = await server.client.beta.threads.runs.update(run.id, thread_id=run.thread_id, metadata={"c": "3"})
    assert (changed.status, changed.metadata, changed.usage) == ("completed", {"c": "3"}, done.usage)


async def test_metadata_changed_while_the_run_waits(server: Server) -> None:
    """Modifying a run in requires_action leaves it waiting, and able to go on."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    changed = await server.client.beta.threads.runs.update(run.id, thread_id=run.thread_id, metadata={"b": "2"})
    assert (changed.status, changed.required_action) == ("requires_action", run.required_action)
    done = await submit(server, run, {"get_weather": "rain"})
    assert (done.status, done.metadata) == ("completed", {"b": "2"})


async def test_deleting_the_assistant_does_not_stop_its_run(server: Server) -> None:
    """A run has what it needs of its assistant from its creation on."""
    assistant = await server.assistant(instructions="Be brief.", tools=[GET_WEATHER])
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    run = await server.run("Weather?", assistant_id=assistant.id)
    await server.client.beta.assistants.delete(assistant.id)
    assert (await submit(server, run, {"get_weather": "rain"})).status == "completed"
    assert sent(server)[0] == {"role": "system", "content": "Be brief."}


async def test_messages_and_threads_can_be_modified_during_a_run(server: Server) -> None:
    """The lock is on appending alone: metadata of thread and messages can be changed at any time."""
    hold = asyncio.Event()
    server.model.will([TextDelta("Hal"), hold, TextDelta("lo"), ended("stop")])
    run = await start(server)
    await happened(server, run.id, "thread.message.delta")
    threads = server.client.beta.threads
    await threads.update(run.thread_id, metadata={"a": "1"})
    for message in await messages_of(server, run.thread_id):
        await threads.messages.update(message.id, thread_id=run.thread_id, metadata={"b": message.role})
    hold.set()
    await polled(server, run)
    assert (await threads.retrieve(run.thread_id)).metadata == {"a": "1"}
    user, assistant = await messages_of(server, run.thread_id)
    assert user.metadata == {"b": "user"}
    assert assistant.status == "completed"
    assert assistant.content[0].text.value == "Hallo"
    assert assistant.metadata == {"b": "assistant"}


async def test_deleting_the_thread_stops_its_run(server: Server) -> None:
    """With the thread goes its run: the model call is aborted, and nothing of the run is left."""
    server.model.will([TextDelta("Hal"), asyncio.Event()])
    run = await start(server)
    await happened(server, run.id, "thread.message.delta")
    await server.client.beta.threads.delete(run.thread_id)
    async with asyncio.timeout(5):
        while not server.model.closed:
            await asyncio.sleep(0.005)
    with pytest.raises(openai.NotFoundError) as missing:
        await get(server, run)
    body: Any = missing.value.body
    assert body["message"] == f"No thread found with id '{run.thread_id}'."
    await nothing_runs(server)


async def nothing_runs(server: Server) -> None:
    """Wait until the worker has let go of everything."""
    async with asyncio.timeout(5):
        while server.application.worker.running:
            await asyncio.sleep(0.005)


async def test_deleting_a_message_during_a_run(server: Server) -> None:
    """A message may be deleted while a run is at work, also the one being written; the run still ends."""
    hold = asyncio.Event()
    server.model.will([TextDelta("Hal"), hold, TextDelta("lo"), ended("stop")])
    run = await start(server)
    await happened(server, run.id, "thread.message.delta")
    for message in await messages_of(server, run.thread_id):
        await server.client.beta.threads.messages.delete(message.id, thread_id=run.thread_id)
    hold.set()
    run = await polled(server, run)
    assert run.status == "completed"
    assert await messages_of(server, run.thread_id) == []


async def test_text_so_far_can_be_read(start_server: ServerFactory, tmp_path: Path) -> None:
    """A message that is being written is listed as in_progress, and retrieved with what has come of it."""
    hold = asyncio.Event()
    async with start_server(tmp_path, event_flush_ms=1) as server:
        server.model.will([TextDelta("Hal"), TextDelta("lo"), hold, TextDelta("!"), ended("stop")])
        run = await start(server)
        await happened(server, run.id, "thread.message.delta", 2)
        [_, listed] = await messages_of(server, run.thread_id)
        assert (listed.status, listed.completed_at) == ("in_progress", None)
        async with asyncio.timeout(5):
            while True:
                message: Any = await server.client.beta.threads.messages.retrieve(listed.id, thread_id=run.thread_id)
                if message.content and message.content[0].text.value == "Hallo":
                    break
        hold.set()
        await polled(server, run)
        assert await server.last_text(run.thread_id) == "Hallo!"


# --- the thread's lock -----------------------------------------------------------------------------------------


async def refused_by_lock(server: Server, run: Run) -> None:
    threads, thread_id = server.client.beta.threads, run.thread_id
    with pytest.raises(openai.BadRequestError) as refused:
        await threads.messages.create(thread_id, role="user", content="And?")
    assert refusal_text(refused) == f"Can't add messages to {thread_id} while a run {run.id} is active."
    for fields in ({}, {"additional_messages": HELLO}, {"stream": True}):
        with pytest.raises(openai.BadRequestError) as refused:
            await threads.runs.create(thread_id, assistant_id=run.assistant_id, **fields)  # type: ignore[call-overload]
        assert refusal_text(refused) == f"Thread {thread_id} already has an active run {run.id}."


async def test_an_active_run_locks_its_thread(start_server: ServerFactory, tmp_path: Path) -> None:
    """Queued, in progress or waiting, a run keeps messages and runs off its thread, in words that clients parse."""
    hold, other = asyncio.Event(), asyncio.Event()
    async with start_server(tmp_path, max_running_runs=1) as server:
        server.model.will([other, *says("Other.")], [hold, *calls(WEATHER_IN_OSLO)], says("Rain."))
        await start(server)
        await until_asked(server, 1)
        run = await start(server, tools=[GET_WEATHER])
        await refused_by_lock(server, run)
        other.set()
        await until_asked(server, 2)
        await refused_by_lock(server, run)
        hold.set()
        run = await polled(server, run)
        assert run.status == "requires_action"
        await refused_by_lock(server, run)
        await submit(server, run, {"get_weather": "rain"})
        assert len(await messages_of(server, run.thread_id)) == 2
        server.model.will(says("Hi."))
        await server.run("And?", thread_id=run.thread_id)


async def test_other_threads_are_not_locked(server: Server) -> None:
    """A lock is the thread's own."""
    hold = asyncio.Event()
    server.model.will([hold, *says("Slow.")], says("Quick."))
    slow = await start(server)
    await until_asked(server, 1)
    assert (await server.run("Hello")).status == "completed"
    hold.set()
    assert (await polled(server, slow)).status == "completed"


async def test_one_of_many_runs_gets_the_thread(server: Server) -> None:
    """Of runs that are created on one thread at the same time exactly one is."""
    hold = asyncio.Event()
    server.model.will([hold, *says("Only one.")])
    thread = await server.client.beta.threads.create(messages=HELLO)
    tries = await asyncio.gather(*(start(server, thread_id=thread.id) for _ in range(8)), return_exceptions=True)
    [run] = [answer for answer in tries if isinstance(answer, Run)]
    assert sum(isinstance(answer, openai.BadRequestError) for answer in tries) == 7
    hold.set()
    await polled(server, run)
    assert len((await server.client.beta.threads.runs.list(thread.id)).data) == 1


async def test_the_lock_is_free_when_the_end_can_be_seen(server: Server) -> None:
    """Whoever reads a terminal status, or its event, can append and run at once."""
    thread = await server.client.beta.threads.create()
    assistant = await server.assistant()
    server.model.will(*[says(str(number)) for number in range(6)])
    for number in range(3):
        await server.client.beta.threads.messages.create(thread.id, role="user", content=f"poll {number}")
        await polled(server, await start(server, thread_id=thread.id))
        await server.client.beta.threads.messages.create(thread.id, role="user", content=f"stream {number}")
        events = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id, stream=True)
        async for event in events:
            if event.event == "thread.run.completed":
                break
    assert await server.last_text(thread.id) == "5"


async def test_a_failed_run_frees_its_thread(server: Server) -> None:
    """Also a run that failed or came out incomplete lets go of its thread."""
    server.model.will([ModelBroke("no")], [TextDelta("Onc"), ended("length")], says("Hi."))
    run = await server.run("Hello")
    run = await server.run("Hello?", thread_id=run.thread_id)
    assert run.status == "incomplete"
    run = await server.run("Hello??", thread_id=run.thread_id)
    assert run.status == "completed"


# --- create and run --------------------------------------------------------------------------------------------


async def test_create_thread_and_run(server: Server) -> None:
    """POST /threads/runs makes thread, messages and run at once, with the run's overrides."""
    server.model.will(says("Hi."))
    run = await server.client.beta.threads.create_and_run(
        assistant_id=(await server.assistant()).id,
        thread={"messages": HELLO, "metadata": {"a": "1"}},
        instructions="Rhyme.",
        metadata={"b": "2"},
    )
    assert (run.status, run.instructions, run.metadata) == ("queued", "Rhyme.", {"b": "2"})
    run = await polled(server, run)
    assert run.status == "completed"
    assert (await server.client.beta.threads.retrieve(run.thread_id)).metadata == {"a": "1"}
    assert sent(server) == [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hello"}]


async def test_nothing_is_left_of_a_run_that_was_refused(server: Server) -> None:
    """A run that cannot be made leaves neither its additional messages nor a lock behind."""
    thread = await server.client.beta.threads.create()
    with pytest.raises(openai.NotFoundError):
        await server.client.beta.threads.runs.create(thread.id, assistant_id="asst_missing", additional_messages=HELLO)
    assert await messages_of(server, thread.id) == []
    server.model.will(says("Hi."))
    assert (await server.run("Hello", thread_id=thread.id)).status == "completed"


async def test_no_more_than_max_running_runs_are_executed(start_server: ServerFactory, tmp_path: Path) -> None:
    """Runs beyond `max_running_runs` stay queued, oldest first, and are executed as soon as there is room."""
    holds = [asyncio.Event() for _ in range(4)]
    async with start_server(tmp_path, max_running_runs=2) as server:
        server.model.will(*[[hold, *says(str(number))] for number, hold in enumerate(holds)])
        runs = []
        for number in range(4):
            runs.append(await start(server))
            await until_asked(server, min(number + 1, 2))
        for run, status in zip(runs, ["in_progress", "in_progress", "queued", "queued"], strict=True):
            await happened(server, run.id, f"thread.run.{status}")
            assert (await get(server, run)).status == status
        holds[1].set()
        await until_asked(server, 3)
        # The model is asked before the claim is durable.
        await happened(server, runs[2].id, "thread.run.in_progress")
        assert [(await get(server, run)).status for run in runs[1:]] == ["completed", "in_progress", "queued"]
        assert server.application.worker.running == 2
        for hold in holds:
            hold.set()
        assert [(await polled(server, run)).status for run in runs] == ["completed"] * 4


async def test_a_renewal_that_comes_late_stops_nobody_else(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are renewed while a run waits for its caller and goes on: its next attempt is left alone."""
    first, second, begin, end = (asyncio.Event() for _ in range(4))
    server.model.will([first, *calls(WEATHER_IN_OSLO)], [second, *says("Rain.")])
    run = await start(server, tools=[GET_WEATHER])
    await until_asked(server, 1)
    write = server.house.store.write

    async def slow_write(work: Any, **options: Any) -> Any:
        if "_renew" not in work.__qualname__:
            return await write(work, **options)
        await begin.wait()
        renewed = await write(work, **options)
        await end.wait()
        return renewed

    monkeypatch.setattr(server.house.store, "write", slow_write)
    renewal = asyncio.create_task(server.application.worker._renew())
    await asyncio.sleep(0)
    first.set()
    run = await polled(server, run)
    begin.set()
    run = await server.client.beta.threads.runs.submit_tool_outputs(
        run_id=run.id, thread_id=run.thread_id, tool_outputs=answers(run, {"get_weather": "rain"})
    )
    await until_asked(server, 2)
    end.set()
    await renewal
    second.set()
    assert (await polled(server, run)).status == "completed"
    assert len(server.model.requests) == 2
