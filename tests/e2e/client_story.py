"""What apps do with the official Python client, as one story played by both of its clients, the sync and the async.

    python client_story.py BASE_URL KEY

Works with every SDK from 1.40 on and needs nothing else. The server's model is that of `talking_model.py`.
Ends with an AssertionError where the story takes another turn.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import openai
from openai import AssistantEventHandler, AsyncAssistantEventHandler

GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WEATHER = {'{"city": "Oslo"}': "rain in Oslo", '{"city": "Rome"}': "sun in Rome"}
BOTH = "It is rain in Oslo and sun in Rome."
TEXT_RUN = [
    "thread.run.created",
    "thread.run.queued",
    "thread.run.in_progress",
    "thread.run.step.created",
    "thread.run.step.in_progress",
    "thread.message.created",
    "thread.message.in_progress",
    "thread.message.delta",
    "thread.message.completed",
    "thread.run.step.completed",
    "thread.run.completed",
]
CALLING_RUN = [*TEXT_RUN[:5], "thread.run.step.delta", "thread.run.requires_action"]
ANSWERED_RUN = ["thread.run.step.completed", *TEXT_RUN[1:]]


# --- both clients at once --------------------------------------------------------------------------------------


async def value(answer):
    """What a call of either client returns."""
    return await answer if inspect.isawaitable(answer) else answer


async def items(source):
    """All items of a stream, or of a list with all its pages."""
    if hasattr(source, "__aiter__"):
        return [item async for item in source]
    return list(source)


@asynccontextmanager
async def opened(manager):
    if hasattr(manager, "__aenter__"):
        async with manager as stream:
            yield stream
    else:
        with manager as stream:
            yield stream


async def refused(kind, call, *arguments, **fields):
    """The error of a call that must be refused."""
    try:
        await value(call(*arguments, **fields))
    except kind as error:
        return error
    raise AssertionError(f"{call.__name__} was not refused")


# --- following a stream ----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the handlers of one story were told."""

    events: list[str] = field(default_factory=list)
    text: str = ""
    arguments: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def calls(self, calls):
        self.arguments += [call.function.arguments for call in calls]


def answers(run):
    calls = run.required_action.submit_tool_outputs.tool_calls
    return [{"tool_call_id": call.id, "output": WEATHER[call.function.arguments]} for call in calls]


class Handler(AssistantEventHandler):
    def __init__(self, client, seen):
        super().__init__()
        self.client, self.seen = client, seen

    def on_event(self, event):
        self.seen.events.append(event.event)
        if event.event == "thread.run.requires_action":
            self.seen.calls(event.data.required_action.submit_tool_outputs.tool_calls)
            with self.client.beta.threads.runs.submit_tool_outputs_stream(
                thread_id=event.data.thread_id,
                run_id=event.data.id,
                tool_outputs=answers(event.data),
                event_handler=Handler(self.client, self.seen),
            ) as stream:
                stream.until_done()

    def on_text_delta(self, delta, snapshot):
        self.seen.text += delta.value or ""

    def on_message_done(self, message):
        self.seen.done.append(message.status)

    def on_exception(self, exception):
        raise AssertionError("the stream broke off") from exception


class AsyncHandler(AsyncAssistantEventHandler):
    def __init__(self, client, seen):
        super().__init__()
        self.client, self.seen = client, seen

    async def on_event(self, event):
        self.seen.events.append(event.event)
        if event.event == "thread.run.requires_action":
            self.seen.calls(event.data.required_action.submit_tool_outputs.tool_calls)
            async with self.client.beta.threads.runs.submit_tool_outputs_stream(
                thread_id=event.data.thread_id,
                run_id=event.data.id,
                tool_outputs=answers(event.data),
                event_handler=AsyncHandler(self.client, self.seen),
            ) as stream:
                await stream.until_done()

    async def on_text_delta(self, delta, snapshot):
        self.seen.text += delta.value or ""

    async def on_message_done(self, message):
        self.seen.done.append(message.status)

    async def on_exception(self, exception):
        raise AssertionError("the stream broke off") from exception


def handler(client, seen):
    return (AsyncHandler if isinstance(client, openai.AsyncOpenAI) else Handler)(client, seen)


def without_repeats(names):
    return [name for before, name in zip([None, *names], names) if name != before]  # noqa: B905


# --- the story -------------------------------------------------------------------------------------------------


async def assistants(client):
    made = await value(
        client.beta.assistants.create(
            model="gpt-4o",
            name="Weather",
            instructions="Tell the weather.",
            tools=[GET_WEATHER],
            metadata={"team": "blue"},
            temperature=0.5,
        )
    )
    found = await value(client.beta.assistants.retrieve(made.id))
    assert found.to_dict() == made.to_dict()
    assert (found.object, found.temperature, found.metadata) == ("assistant", 0.5, {"team": "blue"})
    assert found.tools[0].function.name == "get_weather"
    changed = await value(client.beta.assistants.update(made.id, name="Other", metadata={}))
    assert (changed.name, changed.metadata, changed.instructions) == ("Other", {}, "Tell the weather.")
    assert made.id in [assistant.id for assistant in await items(client.beta.assistants.list(limit=2))]
    gone = await value(client.beta.assistants.delete(made.id))
    assert (gone.object, gone.deleted) == ("assistant.deleted", True)
    missing = await refused(openai.NotFoundError, client.beta.assistants.retrieve, made.id)
    assert missing.body["message"] == f"No assistant found with id '{made.id}'."
    assert missing.request_id.startswith("req_")


async def threads(client):
    said = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]
    thread = await value(client.beta.threads.create(messages=said, metadata={"a": "b"}))
    assert (await value(client.beta.threads.retrieve(thread.id))).metadata == {"a": "b"}
    assert (await value(client.beta.threads.update(thread.id, metadata={"c": "d"}))).metadata == {"c": "d"}
    texts = [m.content[0].text.value for m in await items(client.beta.threads.messages.list(thread.id))]
    assert texts == ["Two", "One"]
    assert (await value(client.beta.threads.delete(thread.id))).object == "thread.deleted"
    await refused(openai.NotFoundError, client.beta.threads.retrieve, thread.id)


async def messages(client):
    of = client.beta.threads.messages
    thread = await value(client.beta.threads.create())
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}
    parts = [{"type": "text", "text": "Look"}, image]
    made = await value(of.create(thread.id, role="user", content=parts, metadata={"n": "1"}))
    assert [part.type for part in made.content] == ["text", "image_url"]
    assert (made.status, made.run_id, made.attachments) == ("completed", None, [])
    changed = await value(of.update(thread_id=thread.id, message_id=made.id, metadata={"n": "2"}))
    assert changed.metadata == {"n": "2"}
    assert (await value(of.retrieve(thread_id=thread.id, message_id=made.id))).metadata == {"n": "2"}
    assert (await value(of.delete(thread_id=thread.id, message_id=made.id))).deleted
    assert await items(of.list(thread.id)) == []


async def bad_requests(client):
    thread = await value(client.beta.threads.create())
    wrong = await refused(
        openai.BadRequestError, client.beta.threads.messages.create, thread.id, role="system", content="x"
    )
    assert wrong.body["message"] == "Invalid value: 'system'. Supported values are: 'user' and 'assistant'."
    assert (wrong.type, wrong.param, wrong.code) == ("invalid_request_error", "role", "invalid_value")
    unknown = await refused(openai.BadRequestError, client.beta.threads.create, extra_body={"colour": "blue"})
    assert (unknown.body["message"], unknown.code) == ("Unknown parameter: 'colour'.", "unknown_parameter")
    limit = await refused(openai.BadRequestError, client.beta.threads.messages.list, thread.id, limit=101)
    assert limit.code == "integer_above_max_value"
    stranger = client.with_options(api_key="sk-stranger-0123456789")
    error = await refused(openai.AuthenticationError, stranger.beta.threads.retrieve, thread.id)
    assert error.code == "invalid_api_key"
    assert "sk-stranger-0123456789" not in str(error)


async def pages(client):
    thread = await value(client.beta.threads.create())
    for number in range(45):
        await value(client.beta.threads.messages.create(thread.id, role="user", content=f"{number}"))
    numbers = [str(number) for number in range(45)]
    listed = client.beta.threads.messages.list

    def texts(found):
        return [message.content[0].text.value for message in found]

    assert texts(await items(listed(thread.id))) == numbers[::-1]
    assert texts(await items(listed(thread.id, order="asc", limit=7))) == numbers
    first = await value(listed(thread.id, order="asc", limit=20))
    assert (len(first.data), first.has_next_page()) == (20, True)
    second = await value(first.get_next_page())
    assert texts(second.data) == numbers[20:40]
    before = await value(listed(thread.id, order="asc", limit=2, before=second.data[0].id))
    assert texts(before.data) == numbers[18:20]


async def polled_run(client, assistant):
    runs = client.beta.threads.runs
    thread = await value(client.beta.threads.create(messages=[{"role": "user", "content": "Count."}]))
    run = await value(runs.create_and_poll(thread_id=thread.id, assistant_id=assistant.id, metadata={"k": "v"}))
    assert (run.status, run.instructions, run.metadata) == ("completed", "Tell the weather.", {"k": "v"})
    assert (run.usage.prompt_tokens, run.usage.completion_tokens, run.usage.total_tokens) == (7, 3, 10)
    newest = (await value(client.beta.threads.messages.list(thread.id))).data[0]
    assert (newest.role, newest.content[0].text.value) == ("assistant", "One two three.")
    assert (newest.run_id, newest.assistant_id) == (run.id, assistant.id)
    steps = await items(runs.steps.list(run_id=run.id, thread_id=thread.id))
    assert [step.type for step in steps] == ["message_creation"]
    assert steps[0].step_details.message_creation.message_id == newest.id
    step = await value(runs.steps.retrieve(steps[0].id, run_id=run.id, thread_id=thread.id))
    assert step.usage.total_tokens == 10
    assert (await value(runs.update(run.id, thread_id=thread.id, metadata={"k": "w"}))).metadata == {"k": "w"}
    assert [each.id for each in await items(runs.list(thread.id))] == [run.id]
    late = await refused(openai.BadRequestError, runs.cancel, run.id, thread_id=thread.id)
    assert late.body["message"] == "Cannot cancel run with status 'completed'."


async def functions_by_polling(client, assistant):
    runs = client.beta.threads.runs
    run = await value(
        client.beta.threads.create_and_run_poll(
            assistant_id=assistant.id,
            thread={"messages": [{"role": "user", "content": "Weather in Oslo, Rome?"}]},
        )
    )
    assert (run.status, run.required_action.type) == ("requires_action", "submit_tool_outputs")
    outputs = answers(run)
    await locked(client, run)
    ids = [each["tool_call_id"] for each in outputs]
    short = await refused(
        openai.BadRequestError, runs.submit_tool_outputs, run.id, thread_id=run.thread_id, tool_outputs=outputs[:1]
    )
    assert short.body["message"] == f"Expected tool outputs for call_ids {ids}, got {ids[:1]}"
    run = await value(runs.submit_tool_outputs_and_poll(run_id=run.id, thread_id=run.thread_id, tool_outputs=outputs))
    assert (run.status, run.required_action, run.usage.total_tokens) == ("completed", None, 20)
    newest = (await value(client.beta.threads.messages.list(run.thread_id, limit=1))).data[0]
    assert newest.content[0].text.value == BOTH
    steps = await items(runs.steps.list(run_id=run.id, thread_id=run.thread_id, order="asc"))
    assert [step.type for step in steps] == ["tool_calls", "message_creation"]
    assert [call.function.output for call in steps[0].step_details.tool_calls] == list(WEATHER.values())


async def locked(client, run):
    """A run that waits holds its thread; apps read the run's id from these texts."""
    thread = run.thread_id
    busy = await refused(
        openai.BadRequestError, client.beta.threads.messages.create, thread, role="user", content="And?"
    )
    assert busy.body["message"] == f"Can't add messages to {thread} while a run {run.id} is active."
    busy = await refused(openai.BadRequestError, client.beta.threads.runs.create, thread, assistant_id=run.assistant_id)
    assert busy.body["message"] == f"Thread {thread} already has an active run {run.id}."


async def streamed_run(client, assistant):
    """The helper by which a run is streamed, under each name that it ever had."""
    runs = client.beta.threads.runs
    for helper in (runs.stream, runs.create_and_stream):
        thread = await value(client.beta.threads.create(messages=[{"role": "user", "content": "Count."}]))
        async with opened(helper(thread_id=thread.id, assistant_id=assistant.id)) as stream:
            names = [event.event for event in await items(stream)]
            run = await value(stream.get_final_run())
            said = await value(stream.get_final_messages())
            steps = await value(stream.get_final_run_steps())
        assert without_repeats(names) == TEXT_RUN
        assert (run.status, said[0].content[0].text.value) == ("completed", "One two three.")
        assert [step.type for step in steps] == ["message_creation"]


async def streamed_texts(client, assistant):
    thread = await value(client.beta.threads.create(messages=[{"role": "user", "content": "Count."}]))
    async with opened(client.beta.threads.runs.stream(thread_id=thread.id, assistant_id=assistant.id)) as stream:
        assert await items(stream.text_deltas) == ["One", " two", " three."]


async def streamed_functions(client, assistant):
    """An event handler that submits outputs from within the stream that asked for them."""
    seen = Seen()
    thread = await value(client.beta.threads.create(messages=[{"role": "user", "content": "Weather in Oslo, Rome?"}]))
    async with opened(
        client.beta.threads.runs.stream(
            thread_id=thread.id, assistant_id=assistant.id, event_handler=handler(client, seen)
        )
    ) as stream:
        await value(stream.until_done())
    assert without_repeats(seen.events) == CALLING_RUN + ANSWERED_RUN
    assert seen.arguments == list(WEATHER)
    assert (seen.text, seen.done) == (BOTH, ["completed"])


async def raw_streams(client, assistant):
    """Streams without a helper: events one by one, and the outputs of functions by a second request."""
    created = await value(
        client.beta.threads.create_and_run(
            assistant_id=assistant.id,
            thread={"messages": [{"role": "user", "content": "Weather in Rome?"}]},
            stream=True,
        )
    )
    events = await items(created)
    assert without_repeats([event.event for event in events]) == ["thread.created", *CALLING_RUN]
    run = events[-1].data
    outputs = await value(
        client.beta.threads.runs.submit_tool_outputs(
            run.id, thread_id=run.thread_id, tool_outputs=answers(run), stream=True
        )
    )
    events = await items(outputs)
    assert without_repeats([event.event for event in events]) == ANSWERED_RUN
    deltas = [event.data.delta.content[0].text.value for event in events if event.event == "thread.message.delta"]
    assert "".join(deltas) == "It is sun in Rome."


async def cancelled(client, assistant):
    """Leaving a stream does not end the run; cancelling does, and frees the thread."""
    runs = client.beta.threads.runs
    thread = await value(client.beta.threads.create(messages=[{"role": "user", "content": "Think hard."}]))
    async with opened(runs.stream(thread_id=thread.id, assistant_id=assistant.id)) as stream:
        run = await first_run(stream)
    assert (await value(runs.retrieve(run.id, thread_id=thread.id))).status in ("queued", "in_progress")
    assert (await value(runs.cancel(run.id, thread_id=thread.id))).status in ("cancelling", "cancelled")
    run = await value(runs.poll(run_id=run.id, thread_id=thread.id))
    assert (run.status, run.required_action) == ("cancelled", None)
    await value(client.beta.threads.messages.create(thread.id, role="user", content="Count."))
    run = await value(runs.create_and_poll(thread_id=thread.id, assistant_id=assistant.id))
    assert run.status == "completed"


async def first_run(stream):
    if hasattr(stream, "__aiter__"):
        return (await anext(aiter(stream))).data
    return next(iter(stream)).data


async def files(client):
    """Uploaded, listed, attached, downloaded and deleted."""
    name, data = "naïve 日本.csv", bytes(range(256)) * 2000
    file = await value(client.files.create(file=(name, data), purpose="assistants"))
    assert (file.filename, file.bytes, file.purpose, file.status) == (name, len(data), "assistants", "processed")
    assert await value(client.files.retrieve(file.id)) == file
    assert file.id in [listed.id for listed in await items(client.files.list(purpose="assistants"))]
    assert (await value(client.files.content(file.id))).content == data
    attachment = {"file_id": file.id, "tools": [{"type": "code_interpreter"}]}
    said = {"role": "user", "content": "Look.", "attachments": [attachment]}
    thread = await value(client.beta.threads.create(messages=[said]))
    assert thread.tool_resources.code_interpreter.file_ids == [file.id]
    assert (await value(client.files.delete(file.id))).deleted
    error = await refused(openai.NotFoundError, client.files.retrieve, file.id)
    assert error.param == "id"
    error = await refused(openai.BadRequestError, client.files.create, file=b"x", purpose="bogus")
    assert error.param == "purpose"


def vector_stores_of(client):
    """They left the beta in 1.66."""
    return client.vector_stores if hasattr(client, "vector_stores") else client.beta.vector_stores


async def vector_stores(client):
    """Made, filled one by one and in a batch, searched, modified and deleted."""
    stores = vector_stores_of(client)
    store = await value(stores.create(name="Handbook", expires_after={"anchor": "last_active_at", "days": 2}))
    assert (store.object, store.name, store.status, store.file_counts.total) == (
        "vector_store",
        "Handbook",
        "completed",
        0,
    )
    assert store.expires_at == store.last_active_at + 2 * 86400
    leave = ("leave.md", b"# Leave\n\nEveryone has 30 days of leave a year.\n")
    file = await value(stores.files.upload_and_poll(vector_store_id=store.id, file=leave))
    assert (file.status, file.last_error, file.vector_store_id) == ("completed", None, store.id)
    assert file.chunking_strategy.static.max_chunk_size_tokens == 800
    more = [("tea.txt", b"Tea is at four."), ("broken.pdf", b"%PDF-1.4 broken")]
    batch = await value(stores.file_batches.upload_and_poll(store.id, files=more))
    assert (batch.status, batch.file_counts.completed, batch.file_counts.failed) == ("completed", 1, 1)
    failed = await items(stores.files.list(vector_store_id=store.id, filter="failed"))
    assert [each.last_error.code for each in failed] == ["invalid_file"]
    assert len(await items(stores.file_batches.list_files(batch.id, vector_store_id=store.id))) == 2
    if hasattr(stores, "search"):
        found = await items(stores.search(store.id, query="how many days of leave"))
        assert (found[0].file_id, found[0].filename, found[0].content[0].type) == (file.id, "leave.md", "text")
        assert 0 < found[0].score <= 1
        changed = await value(stores.files.update(file.id, vector_store_id=store.id, attributes={"year": 2026}))
        assert changed.attributes == {"year": 2026}
        where = {"type": "gt", "key": "year", "value": 2025}
        assert [each.file_id for each in await items(stores.search(store.id, query="tea, leave", filters=where))] == [
            file.id
        ]
        text = await items(stores.files.content(file.id, vector_store_id=store.id))
        assert "30 days of leave" in text[0].text
    assert (await value(stores.update(store.id, name="Other"))).name == "Other"
    assert (await value(stores.files.delete(file.id, vector_store_id=store.id))).deleted
    assert store.id in [each.id for each in await items(stores.list(limit=1))]
    assert (await value(stores.delete(store.id))).object == "vector_store.deleted"
    error = await refused(openai.NotFoundError, stores.retrieve, store.id)
    assert error.body["message"] == f"Vector store with id '{store.id}' not found."


async def cited_run(client):
    """An assistant that searches a store of its own and a message's attachment, and cites what it found."""
    stores = vector_stores_of(client)
    store = await value(stores.create())
    leave = ("leave.md", b"Everyone has 30 days of leave a year.")
    await value(stores.files.upload_and_poll(vector_store_id=store.id, file=leave))
    assistant = await value(
        client.beta.assistants.create(
            model="gpt-4o",
            tools=[{"type": "file_search", "file_search": {"max_num_results": 5}}],
            tool_resources={"file_search": {"vector_store_ids": [store.id]}},
        )
    )
    extra = await value(
        client.files.create(file=("extra.txt", b"Parents have ten days of leave more."), purpose="assistants")
    )
    attachment = {"file_id": extra.id, "tools": [{"type": "file_search"}]}
    said = {"role": "user", "content": "Search: days of leave", "attachments": [attachment]}
    thread = await value(client.beta.threads.create(messages=[said]))
    runs = client.beta.threads.runs
    async with opened(runs.stream(thread_id=thread.id, assistant_id=assistant.id)) as stream:
        names = without_repeats([event.event for event in await items(stream)])
        run = await value(stream.get_final_run())
        message = (await value(stream.get_final_messages()))[0]
    assert (run.status, names[-1]) == ("completed", "thread.run.completed")
    text = message.content[0].text
    [citation] = text.annotations
    assert (citation.type, text.value) == ("file_citation", f"It stands there{citation.text}.")
    assert text.value[citation.start_index : citation.end_index] == citation.text
    assert citation.file_citation.file_id
    search, _ = await items(runs.steps.list(run_id=run.id, thread_id=thread.id, order="asc"))
    [call] = search.step_details.tool_calls
    assert call.type == "file_search"
    thread = await value(client.beta.threads.retrieve(thread.id))
    assert len(thread.tool_resources.file_search.vector_store_ids) == 1


async def uploads(client):
    """A file in two parts that arrive the wrong way round."""
    if not hasattr(client, "uploads"):
        return
    data = bytes(range(256)) * 1000
    upload = await value(
        client.uploads.create(bytes=len(data), filename="a.bin", mime_type="text/plain", purpose="assistants")
    )
    second = await value(client.uploads.parts.create(upload.id, data=data[100_000:]))
    first = await value(client.uploads.parts.create(upload.id, data=data[:100_000]))
    short = await refused(openai.BadRequestError, client.uploads.complete, upload.id, part_ids=[first.id])
    assert short.status_code == 400
    done = await value(client.uploads.complete(upload.id, part_ids=[first.id, second.id]))
    assert (done.status, done.file.bytes) == ("completed", len(data))
    assert (await value(client.files.content(done.file.id))).content == data
    other = await value(client.uploads.create(bytes=1, filename="b", mime_type="text/plain", purpose="assistants"))
    assert (await value(client.uploads.cancel(other.id))).status == "cancelled"


async def models(client):
    assert [model.id for model in await items(client.models.list())] == ["talker"]


async def story(client):
    for chapter in (
        assistants,
        threads,
        messages,
        bad_requests,
        pages,
        files,
        vector_stores,
        cited_run,
        uploads,
        models,
    ):
        await chapter(client)
    weather = await value(
        client.beta.assistants.create(model="gpt-4o", instructions="Tell the weather.", tools=[GET_WEATHER])
    )
    for chapter in (
        polled_run,
        functions_by_polling,
        streamed_run,
        streamed_texts,
        streamed_functions,
        raw_streams,
        cancelled,
    ):
        await chapter(client, weather)
    await value(client.close())


if __name__ == "__main__":
    for kind in (openai.OpenAI, openai.AsyncOpenAI):
        asyncio.run(story(kind(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0, timeout=20)))
        print(f"{kind.__name__} {openai.__version__}: the story came to its end.")
