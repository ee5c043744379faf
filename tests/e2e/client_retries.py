"""What an app does with the official Python client, while the answer to each first attempt of a POST gets lost.

python client_retries.py BASE_URL
"""

from __future__ import annotations

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="any", max_retries=2, timeout=20)
assistant = client.beta.assistants.create(model="gpt-4o")
thread = client.beta.threads.create()
client.beta.threads.messages.create(thread.id, role="user", content="hi")
run = client.beta.threads.runs.create_and_poll(thread_id=thread.id, assistant_id=assistant.id, poll_interval_ms=10)
assert run.status == "completed", run
stream = client.beta.threads.runs.create(thread.id, assistant_id=assistant.id, stream=True)
events = [event.event for event in stream]
assert events[0] == "thread.run.created", events
assert "thread.run.completed" in events, events
client.files.create(file=("a.txt", b"abc"), purpose="assistants")
print("all there")
