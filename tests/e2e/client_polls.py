"""The polling helpers of the official Python client, and how many requests they take.

    python client_polls.py BASE_URL KEY ASSISTANT

The server's model calls `get_weather` once, then answers; each answer is held until a poll waits for it.
"""

from __future__ import annotations

import sys

import openai

BASE_URL, KEY, ASSISTANT = sys.argv[1:]
asked = []


def note(request):
    asked.append((request.method, request.url.path.rpartition("/")[2]))


def main():
    http_client = openai.DefaultHttpxClient(event_hooks={"request": [note]})
    with openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=30, http_client=http_client) as client:
        threads = client.beta.threads
        thread = {"messages": [{"role": "user", "content": "Weather?"}]}
        run = threads.create_and_run_poll(assistant_id=ASSISTANT, thread=thread)
        assert run.status == "requires_action", run.status
        [call] = run.required_action.submit_tool_outputs.tool_calls
        outputs = [{"tool_call_id": call.id, "output": "rain"}]
        run = threads.runs.submit_tool_outputs_and_poll(run_id=run.id, thread_id=run.thread_id, tool_outputs=outputs)
        assert run.status == "completed", run.status
        assert [method for method, _ in asked] == ["POST", "GET", "POST", "GET"], asked
        del asked[:]
        run = threads.runs.create_and_poll(thread_id=run.thread_id, assistant_id=ASSISTANT)
        assert run.status == "completed", run.status
        assert len(asked) == 2, asked
        assert threads.runs.poll(run.id, thread_id=run.thread_id).status == "completed"
    if tuple(map(int, openai.VERSION.split(".")[:2])) >= (1, 100):  # before, it did not say how long it waits
        http_client = openai.DefaultHttpxClient(event_hooks={"request": [note]})
        with openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=1, http_client=http_client) as client:
            thread = {"messages": [{"role": "user", "content": "Slowly."}]}
            run = client.beta.threads.create_and_run_poll(assistant_id=ASSISTANT, thread=thread)
            assert run.status == "completed", run.status


main()
