"""Tools that the server calls itself, as the official Python client sees them: polled, and streamed.

    python client_tools.py BASE_URL URL_OF_A_TOOL

Works with every SDK from 1.40 on. Ends with an AssertionError where something is not as ever.
"""

from __future__ import annotations

import sys

import openai


def main(base_url: str, url: str) -> None:
    client = openai.OpenAI(base_url=base_url, api_key="sk-tools", max_retries=0)
    function = {"name": "get_weather", "parameters": {"type": "object"}, "strict": False}
    tools = [
        {"type": "mcp", "server_label": "example", "allowed_tools": ["a"]},
        {"type": "function", "function": function, "x-afterglow": {"url": url, "timeout_s": 5.0}},
        {"type": "function", "function": {"name": "book", "strict": False}},
    ]
    assistant = client.beta.assistants.create(model="m", tools=tools)
    assert [tool.to_dict() for tool in assistant.tools] == tools
    for stream in (False, True):
        thread = client.beta.threads.create(messages=[{"role": "user", "content": "Hello"}])
        tell(client, assistant.id, thread.id, stream=stream)


def tell(client: openai.OpenAI, assistant_id: str, thread_id: str, *, stream: bool) -> None:
    runs = client.beta.threads.runs
    if stream:
        with runs.stream(thread_id=thread_id, assistant_id=assistant_id) as events:
            run = events.get_final_run()
    else:
        run = runs.create_and_poll(thread_id=thread_id, assistant_id=assistant_id, poll_interval_ms=10)
    assert run.status == "requires_action", run.status
    calls = run.required_action.submit_tool_outputs.tool_calls
    assert [call.function.name for call in calls] == ["book", "book"]
    given = [{"tool_call_id": call.id, "output": "done"} for call in calls]
    part = {"run_id": run.id, "thread_id": thread_id, "extra_body": {"partial": True}}
    kept = runs.submit_tool_outputs(tool_outputs=given[:1], **part)
    assert kept.required_action.submit_tool_outputs.tool_calls == calls[1:]
    if stream:
        with runs.submit_tool_outputs_stream(tool_outputs=given[1:], **part) as events:
            events.until_done()
        run = runs.retrieve(run.id, thread_id=thread_id)
    else:
        run = runs.submit_tool_outputs_and_poll(tool_outputs=given[1:], poll_interval_ms=10, **part)
    assert run.status == "completed", run.last_error
    assert runs.submit_tool_outputs(tool_outputs=given, run_id=run.id, thread_id=thread_id) == run
    step = runs.steps.list(run.id, thread_id=thread_id, order="asc").data[0]
    assert [call.type for call in step.step_details.tool_calls] == ["function"] * 3
    assert [call.function.output for call in step.step_details.tool_calls] == ["rain", "done", "done"]
    print("came to its end")


if __name__ == "__main__":
    main(*sys.argv[1:])
