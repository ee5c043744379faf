"""`afterglow demo`: a server, the official client, and one whole story told as it happens.

An assistant with a function tool is asked about a real file. The run is followed by polling, pauses for the function,
and goes on with its output; a second question is streamed. Nothing leaves this machine unless a model server is named.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Generator, Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI

OLLAMA = "http://127.0.0.1:11434"
FILE_FACTS = {
    "type": "function",
    "function": {
        "name": "get_file_facts",
        "description": "Get the size of a file on the user's computer: bytes, lines and words.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string", "description": "The file's name."}},
            "required": ["path"],
        },
    },
}


def run_demo(model_url: str | None, model_key: str | None, model: str) -> int:
    """Tell the story; return 0 when it ended well."""
    try:
        import openai  # noqa: F401  the demo's one dependency beyond the server's
    except ImportError:
        print("The demo talks to the server with the official client: pip install 'afterglow[demo]'", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # the client warns of this API at every call
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")  # told as it happens, also into a pipe
    with tempfile.TemporaryDirectory(prefix="afterglow-demo-") as folder, _server(folder, model_url, model_key) as url:
        _heading("A server is up")
        print(f"  {url}   data in {folder}, deleted afterwards")
        print(f"  model: {model_url or 'the built-in offline model, a stand-in that needs no key and no network'}")
        _story(url, model, Path(folder))
    _how_to_go_on(model_url)
    return 0


def _story(url: str, model: str, folder: Path) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="any-key-will-do-on-this-machine")
    readme = folder / "README.md"
    readme.write_text(_readme_text(), "utf-8")

    _heading("An assistant with a function tool, a thread, a message about a real file")
    assistant = client.beta.assistants.create(
        model=model,
        name="File reader",
        instructions="Answer from the file the user shows. Use get_file_facts for its size.",
        tools=[FILE_FACTS],  # type: ignore[list-item]
    )
    thread = client.beta.threads.create()
    client.beta.threads.messages.create(thread.id, role="user", content="What is the size of the file README.md?")
    print(f"  assistant {assistant.id}\n  thread    {thread.id}")
    print("  you       What is the size of the file README.md?")

    _heading("The run, followed by polling")
    _follow_by_polling(client, thread.id, assistant.id, folder)

    _heading("A second question, streamed event by event")
    question = "What does this file say about tool outputs?"
    client.beta.threads.messages.create(thread.id, role="user", content=f"{question}\n\n{readme.read_text('utf-8')}")
    print(f"  you       {question}")
    _follow_by_streaming(client, thread.id, assistant.id, folder)

    _heading("The conversation, as any client reads it")
    for message in client.beta.threads.messages.list(thread.id, order="asc"):
        text = "".join(_texts(message.content))
        first, *rest = text.strip().splitlines() or [""]
        more = f"  … and {len(rest)} more lines" if rest else ""
        print(f"  {message.role:<9} {first}{more}")


def _follow_by_polling(client: OpenAI, thread_id: str, assistant_id: str, folder: Path) -> None:
    run = client.beta.threads.runs.create(thread_id=thread_id, assistant_id=assistant_id)
    started, seen = time.monotonic(), ""
    while True:
        if run.status != seen:
            seen = run.status
            print(f"  {(time.monotonic() - started) * 1000:6.0f} ms  {seen}")
        if run.status == "requires_action" and run.required_action:
            outputs = _answer_calls(run.required_action.submit_tool_outputs.tool_calls, folder)
            run = client.beta.threads.runs.submit_tool_outputs(run.id, thread_id=thread_id, tool_outputs=outputs)
            continue
        if run.status not in ("queued", "in_progress"):
            break
        time.sleep(0.02)
        run = client.beta.threads.runs.retrieve(run.id, thread_id=thread_id)
    if run.status != "completed":
        raise SystemExit(f"The run ended as {run.status}: {run.last_error}")
    newest = next(iter(client.beta.threads.messages.list(thread_id, limit=1)))
    print(f"  assistant  {''.join(_texts(newest.content))}")
    if run.usage:
        print(f"  tokens     {run.usage.prompt_tokens} in, {run.usage.completion_tokens} out")


def _answer_calls(calls: list[Any], folder: Path) -> list[Any]:
    outputs = []
    for call in calls:
        print(f"             the model calls {call.function.name}({call.function.arguments})")
        output = json.dumps(_file_facts(folder, call.function.arguments))
        print(f"             we answer       {output}")
        outputs.append({"tool_call_id": call.id, "output": output})
    return outputs


def _file_facts(folder: Path, arguments: str) -> dict[str, Any]:
    name = Path(str(json.loads(arguments).get("path", ""))).name
    path = folder / name
    if not path.is_file():
        return {"error": f"there is no file {name!r}"}
    text = path.read_text("utf-8")
    return {"bytes": path.stat().st_size, "lines": len(text.splitlines()), "words": len(text.split())}


def _follow_by_streaming(client: OpenAI, thread_id: str, assistant_id: str, folder: Path) -> None:
    runs = client.beta.threads.runs
    run = _tell(runs.create(thread_id=thread_id, assistant_id=assistant_id, stream=True))
    while run.status == "requires_action":
        outputs = _answer_calls(run.required_action.submit_tool_outputs.tool_calls, folder)
        run = _tell(runs.submit_tool_outputs(run.id, thread_id=thread_id, tool_outputs=outputs, stream=True))
    if run.status != "completed":
        raise SystemExit(f"The streamed run ended as {run.status}: {run.last_error}")


def _tell(events: Iterable[Any]) -> Any:
    """Print the events as they come, and the text of the deltas; return the run as the last of them shows it."""
    run = None
    for event in events:
        if event.event == "thread.message.delta":
            print("".join(_texts(event.data.delta.content or [])), end="", flush=True)
        elif event.event == "thread.message.in_progress":
            print(f"  {event.event}\n  assistant  ", end="")
        elif event.event == "thread.message.completed":
            print(f"\n  {event.event}")
        elif event.event != "thread.run.step.delta":
            print(f"  {event.event}")
        if event.data.object == "thread.run":
            run = event.data
    if run is None:
        raise SystemExit("The stream broke off.")
    return run


def _texts(content: Iterable[Any]) -> list[str]:
    return [part.text.value or "" for part in content if part.type == "text" and part.text]


@contextlib.contextmanager
def _server(folder: str, model_url: str | None, model_key: str | None) -> Generator[str, None, None]:
    """`afterglow serve` on a free port, as anyone would start it; yields its base URL."""
    command = [sys.executable, "-m", "afterglow.cli", "serve", "--port", "0", "--data", f"{folder}/data"]
    command += ["--log-level", "warning"]
    if model_url:
        command += ["--model-url", model_url]
    own = {name: value for name, value in os.environ.items() if not name.startswith("AFTERGLOW_")}
    if model_key:
        own["AFTERGLOW_MODEL_KEY"] = model_key
    process = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own program
    try:
        yield _base_url(process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _base_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Base URL"):
            return line.split()[-1]
    raise SystemExit("The server did not start; its log above says why.")


def _readme_text() -> str:
    """This project's README, as it came with the package."""
    return str(metadata.metadata("afterglow").json["description"])


def _heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def _how_to_go_on(model_url: str | None) -> None:
    _heading("Your turn")
    print("  make serve                       keeps a server running at http://127.0.0.1:8000/v1")
    print('  OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="anything")')
    print("                                   is the only line your app changes")
    if model_url:
        return
    if os.environ.get("OPENAI_API_KEY"):
        print("  There is an OPENAI_API_KEY here. This uses it, as the model server:")
        print("    AFTERGLOW_MODEL_KEY=$OPENAI_API_KEY afterglow serve --model-url https://api.openai.com/v1")
    if _ollama_answers():
        print("  Ollama is running here. This uses it:")
        print("    afterglow serve --model-url http://127.0.0.1:11434/v1 --default-model MODEL")
    else:
        print("  afterglow serve --model-url URL  uses any OpenAI-compatible model server: Ollama, vLLM, llama.cpp, …")


def _ollama_answers() -> bool:
    try:
        with urllib.request.urlopen(f"{OLLAMA}/api/version", timeout=0.3) as answer:  # noqa: S310  a fixed http URL
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
