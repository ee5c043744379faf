"""The code_interpreter tool as callers and the model see it; what runs the code here is scripted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from openai.types.beta.threads import Run
from openai.types.beta.threads.runs import CodeInterpreterToolCall, RunStep

from afterglow.contracts import CellEnd, EngineStatus, Logs, Picture
from afterglow.errors import SandboxBusy
from afterglow.rows import files as file_rows
from afterglow.testing import SetClock, Write, calls, says
from tests.api.streams import names, read_events, streaming
from tests.api.wire import until
from tests.conftest import GET_WEATHER, Server, ServerFactory

PYTHON: Any = {"type": "code_interpreter"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
PRINTS = calls(("python", {"code": "print(6 * 7)"}))


async def ask(server: Server, **fields: Any) -> Run:
    return await server.run("Compute.", tools=[PYTHON], **fields)


async def steps_of(server: Server, run: Run) -> list[RunStep]:
    page = await server.client.beta.threads.runs.steps.list(run.id, thread_id=run.thread_id, order="asc")
    return page.data


async def code_calls(server: Server, run: Run) -> list[CodeInterpreterToolCall]:
    found = [step.step_details for step in await steps_of(server, run)]
    return [call for details in found if details.type == "tool_calls" for call in details.tool_calls]  # type: ignore[misc]


async def upload(server: Server, name: str, data: bytes) -> str:
    return (await server.client.files.create(file=(name, data), purpose="assistants")).id


async def thread_with(server: Server, *file_ids: str) -> str:
    resources: Any = {"code_interpreter": {"file_ids": list(file_ids)}}
    return (await server.client.beta.threads.create(tool_resources=resources)).id


def tool_output(server: Server) -> str:
    """What the newest tool message of the newest prompt says."""
    return [message["content"] for message in server.model.requests[-1].messages if message["role"] == "tool"][-1]


async def test_code_runs_and_the_model_sees_its_output(server: Server) -> None:
    """The code runs without a pause; step, output and next prompt hold what it printed."""
    server.model.will(PRINTS, says("It is 42."))
    server.code.will([Logs("4"), Logs("2\n")])
    run = await ask(server)
    assert run.status == "completed"
    assert server.code.ran == ["print(6 * 7)"]
    first, second = await steps_of(server, run)
    assert (first.type, first.status, second.type) == ("tool_calls", "completed", "message_creation")
    assert first.usage is not None
    [call] = await code_calls(server, run)
    assert call.code_interpreter.input == "print(6 * 7)"
    assert [output.to_dict() for output in call.code_interpreter.outputs] == [{"type": "logs", "logs": "42\n"}]
    assert tool_output(server) == "42\n"
    assert run.usage is not None
    assert run.usage.total_tokens == 30


async def test_the_stream_is_that_of_the_contract(server: Server) -> None:
    """Events come in the contract's order, and the deltas put together are the final call and message."""
    server.model.will(PRINTS, says("See the chart."))
    server.code.will([Logs("a"), Logs("b"), Picture(PNG), Logs("c")])
    assistant = await server.assistant(tools=[PYTHON])
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": "Go."}])
    body = {"assistant_id": assistant.id, "stream": True}
    async with streaming(server, f"/threads/{thread.id}/runs", body) as answer:
        events = read_events(await answer.aread())
    assert names(events) == [
        *("run.created", "run.queued", "run.in_progress"),
        *("run.step.created", "run.step.in_progress", "run.step.delta", "run.step.completed"),
        *("run.step.created", "run.step.in_progress", "message.created", "message.in_progress"),
        *("message.delta", "message.completed", "run.step.completed", "run.completed", "done"),
    ]
    deltas = [event.data["delta"] for event in events if event.name == "thread.run.step.delta"]
    pieces = [delta["step_details"]["tool_calls"][0] for delta in deltas]
    assert [set(piece) for piece in pieces] == [
        {"index", "id", "type", "code_interpreter"},
        *[{"index", "type", "code_interpreter"}] * (len(pieces) - 1),
    ]
    assert pieces[0]["code_interpreter"] == {"input": "", "outputs": []}
    assert "".join(piece["code_interpreter"].get("input", "") for piece in pieces) == "print(6 * 7)"
    outputs = [output for piece in pieces for output in piece["code_interpreter"].get("outputs", [])]
    assert [(output["index"], output["type"], output.get("logs")) for output in outputs] == [
        *((0, "logs", "a"), (0, "logs", "b"), (1, "image", None), (2, "logs", "c"))
    ]
    parts = [event.data["delta"]["content"][0] for event in events if event.name == "thread.message.delta"]
    assert [(part["index"], part["type"]) for part in parts][:2] == [(0, "image_file"), (1, "text")]
    final = next(event.data for event in events if event.name == "thread.message.completed")
    assert [part["type"] for part in final["content"]] == ["image_file", "text"]
    assert final["content"][0]["image_file"] == parts[0]["image_file"]


async def test_the_official_stream_helper_follows(server: Server) -> None:
    """The SDK's accumulators take every delta, and its snapshots equal what is stored."""
    server.model.will(PRINTS, says("Done."))
    server.code.will([Logs("x"), Picture(PNG), Logs("y")])
    assistant = await server.assistant(tools=[PYTHON])
    thread = await server.client.beta.threads.create()
    async with server.client.beta.threads.runs.stream(thread_id=thread.id, assistant_id=assistant.id) as stream:
        await stream.until_done()
        [first, _] = await stream.get_final_run_steps()
        [message] = await stream.get_final_messages()
    run = await server.client.beta.threads.runs.list(thread.id)
    [stored] = await code_calls(server, run.data[0])
    assert first.step_details.type == "tool_calls"
    streamed = first.step_details.tool_calls[0].to_dict()
    assert _without_indices(streamed) == stored.to_dict()
    assert [part.type for part in message.content] == ["image_file", "text"]


def _without_indices(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_indices(inner) for key, inner in value.items() if key != "index"}
    return [_without_indices(inner) for inner in value] if isinstance(value, list) else value


async def test_pictures_become_files_and_begin_the_answer(server: Server) -> None:
    """A picture is an assistants_output file, an output of the step, and a part of the next message."""
    server.model.will(PRINTS, says("Look."))
    server.code.will([Picture(PNG)])
    run = await ask(server)
    [call] = await code_calls(server, run)
    output = call.code_interpreter.outputs[0]
    assert output.type == "image"
    assert output.image is not None
    message = (await server.client.beta.threads.messages.list(run.thread_id, limit=1)).data[0]
    assert message.content[0].type == "image_file"
    assert message.content[0].image_file.file_id == output.image.file_id
    file = await server.client.files.retrieve(output.image.file_id)
    assert (file.purpose, file.bytes) == ("assistants_output", len(PNG))
    assert (await server.client.files.content(file.id)).content == PNG
    assert tool_output(server) == f"[image: {file.id}]"


async def test_pictures_survive_a_pause_for_a_function(server: Server) -> None:
    """A picture made before requires_action is still shown by the message after it, once."""
    both = calls(("python", {"code": "plot()"}), ("get_weather", {"city": "Oslo"}))
    server.model.will(both, says("Here."), says("Again."))
    server.code.will([Picture(PNG)])
    run = await server.run("Plot the weather.", tools=[PYTHON, GET_WEATHER])
    assert run.status == "requires_action"
    assert run.required_action is not None
    assert [call.function.name for call in run.required_action.submit_tool_outputs.tool_calls] == ["get_weather"]
    [step] = await steps_of(server, run)
    assert step.step_details.type == "tool_calls"
    assert step.step_details.tool_calls[0].code_interpreter.outputs[0].type == "image"  # type: ignore[union-attr]
    run = await server.submit(run, {"get_weather": "rain"})
    assert run.status == "completed"
    assert [step.status for step in await steps_of(server, run)] == ["completed", "completed"]
    message = (await server.client.beta.threads.messages.list(run.thread_id, limit=1)).data[0]
    assert [part.type for part in message.content] == ["image_file", "text"]
    await server.run("Thanks.", thread_id=run.thread_id, tools=[PYTHON])
    newest = (await server.client.beta.threads.messages.list(run.thread_id, limit=1)).data[0]
    assert [part.type for part in newest.content] == ["text"]


async def test_written_files_are_kept_and_annotated(server: Server) -> None:
    """What code writes is a file at once; its path in the answer is a file_path annotation with exact indices."""
    answer = "Résumé 😀: [table](sandbox:/mnt/data/out/my table.csv) and sandbox:/mnt/data/none.txt."
    server.model.will(PRINTS, says(answer))
    server.code.will([Write("out/my table.csv", b"a,b\n")])
    run = await ask(server)
    message = (await server.client.beta.threads.messages.list(run.thread_id, limit=1)).data[0]
    [part] = message.content
    assert part.type == "text"
    [annotation] = part.text.annotations
    assert annotation.type == "file_path"
    assert annotation.text == "sandbox:/mnt/data/out/my table.csv"
    assert part.text.value == answer
    assert answer[annotation.start_index : annotation.end_index] == annotation.text
    file = await server.client.files.retrieve(annotation.file_path.file_id)
    assert (file.filename, file.purpose) == ("my table.csv", "assistants_output")
    assert (await server.client.files.content(file.id)).content == b"a,b\n"


async def test_annotations_are_streamed_once(server: Server) -> None:
    """They come in a delta of their own, before the message is completed."""
    server.model.will(PRINTS, says("At sandbox:/mnt/data/a.txt now."))
    server.code.will([Write("a.txt", b"1")])
    assistant = await server.assistant(tools=[PYTHON])
    thread = await server.client.beta.threads.create()
    async with server.client.beta.threads.runs.stream(thread_id=thread.id, assistant_id=assistant.id) as stream:
        texts = [event.data.delta.content async for event in stream if event.event == "thread.message.delta"]
        [message] = await stream.get_final_messages()
    annotated = [part.text.annotations for parts in texts for part in parts or [] if part.type == "text" and part.text]
    assert [len(found or []) for found in annotated if found] == [1]
    assert message.content[0].type == "text"
    assert len(message.content[0].text.annotations) == 1


async def test_given_files_are_there_by_their_names(server: Server) -> None:
    """Files of assistant, thread and message appear under their names; equal names get numbers; the model is told."""
    one, two, three = [await upload(server, "sales.csv", text) for text in (b"1", b"22", b"333")]
    assistant = await server.assistant(tools=[PYTHON], tool_resources={"code_interpreter": {"file_ids": [one]}})
    thread = await thread_with(server, two)
    attachment: Any = {"file_id": three, "tools": [PYTHON]}
    await server.client.beta.threads.messages.create(thread, role="user", content="Here.", attachments=[attachment])
    server.model.will(PRINTS, says("Read."))
    await server.run("Sum them.", thread_id=thread, assistant_id=assistant.id)
    [session] = server.code.sessions
    held = {name: data for name, (data, _) in session.files.items()}
    assert held == {"sales.csv": b"1", "sales-2.csv": b"22", "sales-3.csv": b"333"}
    system = server.model.requests[0].messages[0]
    assert system["role"] == "system"
    assert system["content"].endswith(
        "Files for the python tool:\n- /mnt/data/sales.csv (1 bytes)\n- /mnt/data/sales-2.csv (2 bytes)\n"
        "- /mnt/data/sales-3.csv (3 bytes)"
    )
    files = (await server.client.files.list(purpose="assistants_output")).data
    assert files == [], "what was only read is no output"


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("../../etc/passwd", "passwd"),
        ("a\nb\u202e.csv", "a_b_.csv"),
        ("é 😀.txt", "é 😀.txt"),
        ("é" * 150 + ".csv", None),
    ],
)
async def test_hostile_file_names_become_plain_ones(server: Server, filename: str, name: str | None) -> None:
    """A caller's file name is one printable component of bounded length below /mnt/data."""
    thread = await thread_with(server, await upload(server, filename, b"1"))
    server.model.will(PRINTS, says("Read."))
    await ask(server, thread_id=thread)
    [found] = server.code.sessions[0].files
    assert found == name or (name is None and found.endswith(".csv") and len(found.encode()) <= 200)


async def test_what_does_not_fit_is_named_with_its_size(start_server: ServerFactory, tmp_path: Any) -> None:
    """A file larger than the session's disk is not put there; the model hears its name and size."""
    async with start_server(tmp_path / "data", sandbox_disk_mb="1") as server:
        thread = await thread_with(server, await upload(server, "big.bin", bytes(2_000_000)))
        server.model.will(PRINTS, says("Too large."))
        await ask(server, thread_id=thread)
        assert server.code.sessions[0].files == {}
        told = server.model.requests[0].messages[0]["content"]
        assert told.endswith("- /mnt/data/big.bin (2.0 MB, too large to be put there)")


async def test_too_many_or_too_large_outputs_are_named_and_not_kept(start_server: ServerFactory, tmp_path: Any) -> None:
    """Of 150 files 100 are kept, and none that passes the disk's size; the model is told which are not."""
    async with start_server(tmp_path / "data", sandbox_disk_mb="1") as server:
        server.model.will(PRINTS, says("Done."))
        writes = [Write(f"f{number:03}.txt", b"1") for number in range(150)]
        server.code.will([Write("big.bin", bytes(2_000_000)), *writes])
        await ask(server)
        kept = (await server.client.files.list(purpose="assistants_output")).data
        assert len(kept) == 99
        assert "big.bin (2.0 MB)" in tool_output(server)
        assert "and 42 more" in tool_output(server)


async def test_a_session_lives_across_runs(server: Server) -> None:
    """The next run of the thread uses the same session; another thread gets its own."""
    server.model.will(PRINTS, says("1."), PRINTS, says("2."), PRINTS, says("3."))
    run = await ask(server)
    await ask(server, thread_id=run.thread_id)
    assert len(server.code.sessions) == 1
    await ask(server)
    assert len(server.code.sessions) == 2


async def test_a_dead_session_is_reopened_with_its_files(server: Server) -> None:
    """After a session ends, the next call gets a new one with given and written files, and the model is told."""
    thread = await thread_with(server, await upload(server, "in.csv", b"in"))
    server.model.will(PRINTS, PRINTS, says("Done."))
    server.code.will([Write("out.txt", b"out"), Write("in.csv", b"changed")], [CellEnd("lost", "Out of memory.")])
    await ask(server, thread_id=thread)
    assert "[The sandbox session is over: Out of memory." in tool_output(server)
    server.model.will(PRINTS, says("Done."))
    await ask(server, thread_id=thread)
    assert "variables and imports of earlier calls are gone" in tool_output(server)
    _, second = server.code.sessions
    assert {name: data for name, (data, _) in second.files.items()} == {"out.txt": b"out", "in.csv": b"changed"}
    outputs = (await server.client.files.list(purpose="assistants_output")).data
    assert {file.filename for file in outputs} == {"out.txt", "in.csv"}


async def test_what_the_code_removes_does_not_come_back(server: Server) -> None:
    """A file that code has written and removed is not put into a later session; the API file stays."""
    server.model.will(PRINTS, PRINTS, PRINTS, says("Done."), PRINTS, says("Done."))
    server.code.will([Write("tmp.txt", b"1")], [Write("tmp.txt", None)], [CellEnd("lost", "Exited.")])
    run = await ask(server)
    await ask(server, thread_id=run.thread_id)
    assert server.code.sessions[1].files == {}
    assert len((await server.client.files.list(purpose="assistants_output")).data) == 1


async def test_the_ends_of_a_cell_are_told(server: Server) -> None:
    """The model hears of clipped output and of the time limit."""
    server.model.will(PRINTS, says("Slow."))
    server.code.will([Logs("x"), CellEnd("timeout", "it ran for more than 120 seconds", 1_500_000)])
    await ask(server)
    assert "1.5 MB of output left out" in tool_output(server)
    assert "[Interrupted: it ran for more than 120 seconds. Variables are kept.]" in tool_output(server)


async def test_long_outputs_are_clipped_for_the_model_only(server: Server) -> None:
    """The step keeps all that was printed; the model gets start and end, and is told how much is missing."""
    server.model.will(PRINTS, says("Long."))
    server.code.will([Logs("a" * 30_000 + "END")])
    run = await ask(server)
    [call] = await code_calls(server, run)
    assert call.code_interpreter.outputs[0].to_dict()["logs"] == "a" * 30_000 + "END"
    seen = tool_output(server)
    assert "[14003 characters left out]" in seen
    assert seen.endswith("END")


async def test_cancel_stops_running_code(server: Server) -> None:
    """A cancel ends the code at once; what it had printed stays in the step."""
    never = asyncio.Event()
    server.model.will(PRINTS)
    server.code.will([Logs("so far"), never])
    thread = await server.client.beta.threads.create()
    assistant = await server.assistant(tools=[PYTHON])
    run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
    await until(lambda: server.code.ran)
    [step] = await steps_of(server, run)
    assert step.status == "in_progress"
    assert step.step_details.tool_calls[0].code_interpreter.input == "print(6 * 7)"  # type: ignore[union-attr]
    await server.client.beta.threads.runs.cancel(run.id, thread_id=thread.id)
    run = await server.poll(run)
    assert run.status == "cancelled"
    assert server.code.stopped == 1
    [step] = await steps_of(server, run)
    assert step.status == "cancelled"
    assert step.step_details.tool_calls[0].code_interpreter.outputs[0].logs == "so far"  # type: ignore[union-attr]
    assert run.usage is not None
    assert run.usage.total_tokens == 15, "the model call is counted once"


async def test_a_refused_session_is_told_and_the_run_goes_on(server: Server) -> None:
    """When no session can be had the step fails with the reason, the model hears it, and the run completes."""
    server.code.refuses = SandboxBusy("All 4 sandbox sessions are in use.")
    server.model.will(PRINTS, says("I could not."))
    run = await ask(server)
    assert run.status == "completed"
    first, _ = await steps_of(server, run)
    assert first.status == "failed"
    assert first.last_error is not None
    assert first.last_error.message == "All 4 sandbox sessions are in use."
    assert "All 4 sandbox sessions" in tool_output(server)


async def test_a_run_that_demands_an_engine_that_is_off_fails_with_the_remedy(server: Server) -> None:
    """tool_choice code_interpreter without an engine: the run fails, and says what to do."""
    server.code.status = EngineStatus("off", reason="This kernel is too old.", remedy="Use the docker engine.")
    run = await ask(server, tool_choice=PYTHON)
    assert run.status == "failed"
    assert run.last_error is not None
    assert run.last_error.message == "This kernel is too old. Use the docker engine."


async def test_sessions_end_with_age_and_idleness(start_server: ServerFactory, tmp_path: Any) -> None:
    """A session that is idle for long enough is closed; the next call opens another."""
    clock = SetClock()
    async with start_server(tmp_path / "data", clock=clock) as server:
        server.model.will(PRINTS, says("1."))
        run = await ask(server)
        clock.time += 1201
        await until(lambda: not server.code.sessions[0].alive)
        server.model.will(PRINTS, says("2."))
        await ask(server, thread_id=run.thread_id)
        assert len(server.code.sessions) == 2


async def test_a_session_is_out_of_date_once_another_worker_had_one(server: Server) -> None:
    """When the thread's code has run elsewhere since, a new session is opened, and the model hears of it."""
    server.model.will(PRINTS, says("1."))
    run = await ask(server)
    store = server.house.store
    await store.write(lambda tx: file_rows.set_session_worker(tx, "default", run.thread_id, "worker_other"))
    server.model.will(PRINTS, says("2."))
    await ask(server, thread_id=run.thread_id)
    assert [session.alive for session in server.code.sessions] == [False, True]
    assert tool_output(server).startswith("[A new sandbox session")


@pytest.mark.parametrize("leaves", [Write("out.txt", b"stale"), Picture(PNG)])
async def test_code_of_an_attempt_that_was_taken_over_leaves_nothing(server: Server, leaves: Any) -> None:
    """A worker that was taken for dead while its code ran stores no file of it and shows no more of it."""
    paused = asyncio.Event()
    server.model.will(PRINTS)
    server.code.will([Logs("early"), paused, leaves, Logs("late")])
    assistant = await server.assistant(tools=[PYTHON])
    run = await server.client.beta.threads.create_and_run(assistant_id=assistant.id)
    await until(lambda: server.code.ran)
    store = server.house.store
    await store.write(lambda tx: tx.execute("UPDATE runs SET attempt = attempt + 1 WHERE id = $1", run.id))
    paused.set()
    await until(lambda: server.application.worker.running == 0)
    for table in ("files", "sandbox_files", "loose_blobs"):
        assert await store.read(lambda tx, table=table: tx.fetch(f"SELECT * FROM {table}")) == []  # type: ignore[misc]


async def test_a_deleted_thread_ends_its_session(server: Server) -> None:
    """Nothing of a deleted thread stays in a sandbox."""
    server.model.will(PRINTS, says("1."))
    run = await ask(server)
    assert server.code.sessions[0].alive
    await server.client.beta.threads.delete(run.thread_id)
    await until(lambda: not server.code.sessions[0].alive)


async def test_nul_characters_never_reach_the_store(server: Server) -> None:
    """NULs in code and in its output become U+FFFD."""
    server.model.will(calls(("python", {"code": "print('\0')"})), says("Done."))
    server.code.will([Logs("a\0b")])
    run = await ask(server)
    [call] = await code_calls(server, run)
    assert call.code_interpreter.input == "print('\ufffd')"
    assert call.code_interpreter.outputs[0].to_dict()["logs"] == "a\ufffdb"


async def test_bare_code_is_run_as_it_is(server: Server) -> None:
    """A model that sends code instead of JSON arguments is understood."""
    bare = calls(("python", {}))
    bare[1:-1] = [type(bare[1])(0, arguments="print(1)")]
    server.model.will(bare, says("1."))
    run = await ask(server)
    assert server.code.ran == ["print(1)"]
    [call] = await code_calls(server, run)
    assert call.code_interpreter.input == "print(1)"


async def test_another_project_cannot_attach_or_read_the_files(start_server: ServerFactory, tmp_path: Any) -> None:
    """Files that code writes belong to the run's project alone."""
    async with start_server(tmp_path / "data", api_keys="key-a:a,key-b:b") as server:
        mine, theirs = (server.client.with_options(api_key=key) for key in ("key-a", "key-b"))
        server.client = mine
        server.model.will(PRINTS, says("Done."))
        server.code.will([Write("a.txt", b"1")])
        await ask(server)
        [file] = (await mine.files.list()).data
        assert (await theirs.files.list()).data == []
        with pytest.raises(Exception, match="No such File object"):
            await theirs.files.content(file.id)


async def test_the_sweep_leaves_what_was_opened_meanwhile(server: Server) -> None:
    """A session that is opened while the sweep reads the threads is not taken for one without a thread."""
    interpreter = server.application.worker._interpreter
    read, opened = server.house.store.read, asyncio.Event()

    async def slow_read(work: Any) -> Any:
        found = await read(work)
        if work.__name__ == "living":
            await opened.wait()
        return found

    server.model.will(PRINTS, says("1."), PRINTS, says("2."))
    await ask(server)
    server.house.store.read = slow_read  # type: ignore[method-assign]
    sweep = asyncio.create_task(interpreter.sweep())
    await ask(server)
    opened.set()
    await sweep
    assert [session.alive for session in server.code.sessions] == [True, True]


async def test_a_thread_cannot_fill_the_disk(start_server: ServerFactory, tmp_path: Any) -> None:
    """What one thread's code leaves behind is bounded over all its calls, also when it ends its session each time."""
    async with start_server(tmp_path / "data", sandbox_disk_mb="1") as server:
        server.model.will(*[PRINTS] * 7, says("Done."))
        writes: list[Any] = [Write("zeros.bin", bytes(900_000)), CellEnd("ok")]
        again: list[Any] = [CellEnd("lost", "it has ended")]
        server.code.will(writes, again, writes, writes, writes, writes, writes)
        await ask(server)
        kept = (await server.client.files.list(purpose="assistants_output")).data
        assert len(kept) == 4
        assert "Not kept, because it is too much: zeros.bin" in tool_output(server)


async def test_bare_code_that_could_not_be_run_is_shown_once(server: Server) -> None:
    """When no session can be had, the step's input is the code as the model sent it, and so are the deltas."""
    server.code.refuses = SandboxBusy("All sandbox sessions are in use.")
    bare = calls(("python", {}))
    bare[1:-1] = [type(bare[1])(0, arguments="print(1)")]
    server.model.will(bare, says("I could not."))
    assistant = await server.assistant(tools=[PYTHON])
    thread = await server.client.beta.threads.create()
    body = {"assistant_id": assistant.id, "stream": True}
    async with streaming(server, f"/threads/{thread.id}/runs", body) as answer:
        events = read_events(await answer.aread())
    deltas = [event.data["delta"]["step_details"] for event in events if event.name == "thread.run.step.delta"]
    pieces = [details["tool_calls"][0]["code_interpreter"] for details in deltas]
    assert "".join(piece.get("input", "") for piece in pieces) == "print(1)"
    assert all(pieces)
    failed = next(event.data for event in events if event.name == "thread.run.step.failed")
    assert failed["step_details"]["tool_calls"][0]["code_interpreter"]["input"] == "print(1)"


async def test_whoever_stops_listening_has_stopped_the_code(server: Server) -> None:
    """When the outputs of a call are closed, its code has been ended, and the session is free for the next call."""
    interpreter = server.application.worker._interpreter
    server.model.will(says("Hello."))
    run = await ask(server)
    server.code.will([Logs("first"), asyncio.Event()])
    await server.house.store.write(lambda tx: tx.execute("UPDATE runs SET holds_thread = 1, worker = 'this test'"))
    row = SimpleNamespace(project="default", run=run, attempt=1, key_id="")
    outputs = interpreter.run(row, [], "while True: pass", seen=False)  # type: ignore[arg-type]
    assert await anext(outputs) == "first"
    await outputs.aclose()
    assert server.code.stopped == 1
