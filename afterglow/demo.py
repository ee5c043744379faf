"""`afterglow demo`: a server, the official client, and one whole story told as it happens.

An assistant with the code interpreter and a function is asked about a table. The run is followed by polling, pauses
for the function, and goes on: the model writes Python, which runs in the sandbox, and what it made is downloaded. A
second question is streamed. Where no sandbox can be had the demo says so and tells the rest. A second assistant
searches a page of our documentation, and what its answer cites is looked up in the file. Nothing leaves this machine
unless a model server is named. The table, `demo_data/sales.csv`, is made up.
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
import textwrap
import time
import warnings
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import ProxyHandler, build_opener

if TYPE_CHECKING:
    from openai import OpenAI

OLLAMA = "http://127.0.0.1:11434"
SALES = Path(__file__).parent / "demo_data" / "sales.csv"
DOCUMENT = Path(__file__).parent / "demo_data" / "runs.md"  # a link to the page in docs/, a copy in the wheel
ENGINE_SETTLES_S = 30  # longer only when docker builds its image; the run then waits for it
SHOWN_LINES = 24  # of a cell's code
PRINTED_LINES = 6  # of what it printed
QUOTED_LINES = 10  # of a passage that is cited
PASSAGE_TOKENS = 150  # short ones, which can be read here at a glance
WIDTH = 110
KEPT_SETTINGS = ("AFTERGLOW_CODE_INTERPRETER", "AFTERGLOW_SANDBOX_ENV")  # of the environment; the story sets the rest

QUESTION = "Analyze sales.csv: how did revenue develop in 2025, and did each region reach its sales target?"
SECOND_QUESTION = "Which product sold the most units?"
SECOND_WITHOUT_CODE = "What was the sales target of the North in 2025?"
DOCUMENT_QUESTION = "When does a run expire, and do tool outputs give it more time?"
INSTRUCTIONS = (
    "You are the analyst of a small lamp shop. Use Python for figures, draw a chart when it helps, and save the main"
    " table as /mnt/data/summary.csv and link to it. Targets come from get_sales_targets."
)
GET_SALES_TARGETS = {
    "type": "function",
    "function": {
        "name": "get_sales_targets",
        "description": "Get the sales target of each region for a year, in euros.",
        "parameters": {
            "type": "object",
            "properties": {"year": {"type": "integer"}},
            "required": ["year"],
        },
    },
}
# What only the caller knows: last year's revenue, on which this year's targets rest.
REVENUE_2024 = {"North": 70_000, "South": 31_500, "East": 32_000, "West": 41_000}
GROWTH = 1.05


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
        print(f"  address           {url}")
        print(f"  data              {folder}, deleted at the end")
        print(f"  model             {model_url or 'the built-in offline model: fixed rules, no key, no network'}")
        _story(url, model, runs_code=_await_engine(url))
    _how_to_go_on(model_url)
    return 0


def _await_engine(url: str) -> bool:
    """Wait until the code interpreter is on or off, say so, and return whether Python can run."""
    deadline = time.monotonic() + ENGINE_SETTLES_S
    health = _health(url)
    while health["engines"]["code_interpreter"] == "starting" and time.monotonic() < deadline:
        time.sleep(0.05)
        health = _health(url)
    state = health["engines"]["code_interpreter"]
    details = health.get("details", {}).get("code_interpreter", {})
    if state == "off":
        print(f"  code interpreter  off. {details.get('reason', '')}")
        print(f"                    {details.get('remedy', '')} The demo goes on without.")
    elif state == "starting":
        print("  code interpreter  still starting; the run will wait for it")
    else:
        print("  code interpreter  on: Python that the model writes runs in a sandbox on this machine")
        for limit in details.get("unenforced", ()):
            print(f"                    not enforced on this machine: {limit}")
    return bool(state != "off")


def _health(url: str) -> Any:
    with build_opener(ProxyHandler({})).open(f"{url.removesuffix('/v1')}/healthz", timeout=10) as answer:
        return json.load(answer)


def _story(url: str, model: str, *, runs_code: bool) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="any-key-will-do-on-this-machine")

    _heading("A file, an assistant with two tools, and a question")
    file = client.files.create(file=SALES, purpose="assistants")
    assistant = client.beta.assistants.create(
        model=model,
        name="Sales analyst",
        instructions=INSTRUCTIONS,
        tools=[{"type": "code_interpreter"}, GET_SALES_TARGETS],  # type: ignore[list-item]
    )
    thread = client.beta.threads.create()
    client.beta.threads.messages.create(
        thread.id,
        role="user",
        content=QUESTION,
        attachments=[{"file_id": file.id, "tools": [{"type": "code_interpreter"}]}],
    )
    print(f"  file       {file.id}: {file.filename}, {_size(file.bytes)}, a year of a lamp shop, made up")
    print(f"  assistant  {assistant.id}: may run Python, and call get_sales_targets, which is ours")
    print(f"  thread     {thread.id}")
    print(f"  you        {QUESTION}")

    _heading("The run, followed by polling")
    run = _follow_by_polling(client, thread.id, assistant.id)
    _show_steps(client, run)
    _show_answer(client, run)

    question = SECOND_QUESTION if runs_code else SECOND_WITHOUT_CODE
    _heading("A second question, streamed")
    client.beta.threads.messages.create(thread.id, role="user", content=question)
    print(f"  you        {question}")
    _follow_by_streaming(client, thread.id, assistant.id)
    _search_a_document(client, model)


# --- the run ---------------------------------------------------------------------------------------------------


def _follow_by_polling(client: OpenAI, thread_id: str, assistant_id: str) -> Any:
    """Print each status as it comes, answer the calls, and return the completed run."""
    run = client.beta.threads.runs.create(thread_id=thread_id, assistant_id=assistant_id)
    started, seen = time.monotonic(), ""
    while True:
        if run.status != seen:
            seen = run.status
            print(f"  {(time.monotonic() - started) * 1000:6.0f} ms  {seen}")
        if run.status == "requires_action" and run.required_action:
            outputs = _answer_calls(run.required_action.submit_tool_outputs.tool_calls)
            run = client.beta.threads.runs.submit_tool_outputs(run.id, thread_id=thread_id, tool_outputs=outputs)
            continue
        if run.status not in ("queued", "in_progress"):
            break
        time.sleep(0.02)
        run = client.beta.threads.runs.retrieve(run.id, thread_id=thread_id)
    if run.status != "completed":
        raise SystemExit(f"The run ended as {run.status}: {_reason(run)}")
    return run


def _reason(run: Any) -> str:
    return str(run.last_error.message if run.last_error else run.incomplete_details)


def _answer_calls(calls: Iterable[Any]) -> list[Any]:
    outputs = []
    for call in calls:
        print(f"             the model calls {call.function.name}({call.function.arguments})")
        output = json.dumps(_sales_targets(call.function.arguments))
        print(f"             we answer       {output}")
        outputs.append({"tool_call_id": call.id, "output": output})
    return outputs


def _sales_targets(arguments: str) -> dict[str, Any]:
    """What the caller's own function does: a model of another make may send anything."""
    try:
        year = int(json.loads(arguments)["year"])
    except (ValueError, TypeError, KeyError):
        return {"error": "year: expected a whole number"}
    if year != 2025:
        return {"error": f"there are no targets for {year}, only for 2025"}
    return {"year": year, "targets": {region: round(euros * GROWTH) for region, euros in REVENUE_2024.items()}}


def _show_steps(client: OpenAI, run: Any) -> None:
    _heading("What it did, step by step")
    steps = client.beta.threads.runs.steps.list(run.id, thread_id=run.thread_id, order="asc")
    for number, step in enumerate(steps, 1):
        if step.step_details.type == "message_creation":
            print(f"  {number}. wrote the answer")
        else:
            for call in step.step_details.tool_calls:
                _show_call(number, call, step.last_error)


def _show_call(number: int, call: Any, error: Any) -> None:
    if call.type != "code_interpreter":
        print(f"  {number}. called {call.function.name}")
        return
    if error:
        print(f"  {number}. wrote Python, which could not be run: {error.message}")
        return
    print(f"  {number}. ran Python")
    _show_lines(call.code_interpreter.input, SHOWN_LINES)
    outputs = call.code_interpreter.outputs
    logs = "".join(output.logs for output in outputs if output.type == "logs")
    pictures = sum(output.type == "image" for output in outputs)
    if logs.strip():
        print("     which printed")
        _show_lines(logs, PRINTED_LINES)
    if pictures:
        print(f"     and drew {'a picture' if pictures == 1 else f'{pictures} pictures'}")


def _show_lines(text: str, most: int) -> None:
    lines = text.strip().splitlines()
    for line in lines[:most]:
        print(f"     │ {line if len(line) <= WIDTH else line[: WIDTH - 1] + '…'}".rstrip())
    if len(lines) > most:
        print(f"     │ … and {len(lines) - most} lines more")


def _show_answer(client: OpenAI, run: Any) -> None:
    """The messages of the run, and what they show or link to, downloaded into a folder that stays."""
    _heading("The answer")
    files: dict[str, str] = {}
    for message in client.beta.threads.messages.list(run.thread_id, run_id=run.id, order="asc"):
        print("  assistant")
        for part in message.content:
            if part.type == "text":
                print(textwrap.indent(part.text.value.strip(), "    "))
                for note in (note for note in part.text.annotations if note.type == "file_path"):
                    files[Path(note.text).name] = note.file_path.file_id
            elif part.type == "image_file":
                name = "chart.png" if "chart.png" not in files else f"chart-{len(files) + 1}.png"
                files[name] = part.image_file.file_id
                print(f"    [{name}]")
    if run.usage:
        print(f"  tokens  {run.usage.prompt_tokens:,} in, {run.usage.completion_tokens:,} out")
    if files:
        _download(client, files)


def _download(client: OpenAI, files: dict[str, str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="afterglow-demo-files-"))
    _heading("What it made, downloaded; these files are yours to keep")
    for name, file_id in files.items():
        path = folder / name
        path.write_bytes(client.files.content(file_id).read())
        print(f"  {path}  ({_size(path.stat().st_size)})")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1000:.1f} KB"


# --- the stream ------------------------------------------------------------------------------------------------


def _follow_by_streaming(client: OpenAI, thread_id: str, assistant_id: str) -> None:
    runs = client.beta.threads.runs
    run = _tell(runs.create(thread_id=thread_id, assistant_id=assistant_id, stream=True))
    while run.status == "requires_action":
        outputs = _answer_calls(run.required_action.submit_tool_outputs.tool_calls)
        run = _tell(runs.submit_tool_outputs(run.id, thread_id=thread_id, tool_outputs=outputs, stream=True))
    if run.status != "completed":
        raise SystemExit(f"The streamed run ended as {run.status}: {_reason(run)}")


def _tell(events: Iterable[Any]) -> Any:
    """Print the events as they come, and the text of the deltas; return the run as the last of them shows it."""
    run, deltas = None, 0
    for event in events:
        if event.event == "thread.run.step.delta":
            deltas += 1
            continue
        if deltas:
            print(f"  thread.run.step.delta, {deltas} times: the call as it is written, and its outputs")
            deltas = 0
        if event.event == "thread.message.delta":
            print(_text(event.data.delta.content or []).replace("\n", "\n    "), end="", flush=True)
        elif event.event == "thread.message.in_progress":
            print(f"  {event.event}\n    ", end="")
        elif event.event == "thread.message.completed":
            print(f"\n  {event.event}")
        else:
            print(f"  {event.event}")
        if event.data.object == "thread.run":
            run = event.data
    if run is None:
        raise SystemExit("The stream broke off.")
    return run


def _text(content: Iterable[Any]) -> str:
    return "".join(part.text.value or "" for part in content if part.type == "text" and part.text)


# --- the document ----------------------------------------------------------------------------------------------


def _search_a_document(client: OpenAI, model: str) -> None:
    _heading("A document, an assistant that searches it, and a question")
    store = client.vector_stores.create(name="Our documentation")
    file = client.files.create(file=DOCUMENT, purpose="assistants")
    indexed = client.vector_stores.files.create_and_poll(
        file.id,
        vector_store_id=store.id,
        chunking_strategy={
            "type": "static",
            "static": {"max_chunk_size_tokens": PASSAGE_TOKENS, "chunk_overlap_tokens": PASSAGE_TOKENS // 3},
        },
        poll_interval_ms=20,
    )
    if indexed.status != "completed":
        raise SystemExit(f"{file.filename} could not be indexed: {indexed.last_error and indexed.last_error.message}")
    assistant = client.beta.assistants.create(
        model=model,
        name="Librarian",
        instructions="Answer from the files, and cite them.",
        tools=[{"type": "file_search"}],
        tool_resources={"file_search": {"vector_store_ids": [store.id]}},
    )
    print(f"  file       {file.id}: {file.filename}, {_size(file.bytes)}, a page of our documentation")
    print(f"  store      {store.id}: a vector store with that file, indexed on this machine")
    print(f"  assistant  {assistant.id}: may search the store")
    print(f"  you        {DOCUMENT_QUESTION}")
    run = client.beta.threads.create_and_run_poll(
        assistant_id=assistant.id,
        thread={"messages": [{"role": "user", "content": DOCUMENT_QUESTION}]},
        poll_interval_ms=20,
    )
    if run.status != "completed":
        raise SystemExit(f"The run ended as {run.status}: {_reason(run)}")
    _show_searches(client, run)
    _show_sources(client, run)


def _show_searches(client: OpenAI, run: Any) -> None:
    for step in client.beta.threads.runs.steps.list(run.id, thread_id=run.thread_id, order="asc"):
        calls = step.step_details.tool_calls if step.step_details.type == "tool_calls" else []
        for call in (call for call in calls if call.type == "file_search"):
            queries: Any = call.file_search.to_dict()["x-queries"]  # an extension of ours
            for number, query in enumerate(queries):
                print(f"  {'' if number else 'searches':<10} {query}")
            print(f"  finds      {len(call.file_search.results or [])} passages")


def _show_sources(client: OpenAI, run: Any) -> None:
    """The answer; then each passage that it cites, once, and whether the file says so."""
    _heading("The answer, and what it cites")
    sources: dict[str, Any] = {}
    for message in client.beta.threads.messages.list(run.thread_id, run_id=run.id, order="asc"):
        print("  assistant")
        for part in message.content:
            if part.type == "text":
                for line in part.text.value.strip().splitlines():
                    print(textwrap.indent(textwrap.fill(line, WIDTH), "    "))
        sources |= {source["text"]: source for source in _citations(client, message)}
    for source in sources.values():
        _show_source(source)
    if not sources:
        print("  It cites nothing.")


def _citations(client: OpenAI, message: Any) -> Any:
    """What the server knows of each citation: an extension of ours, which the client calls by its path."""
    path = f"/threads/{message.thread_id}/messages/{message.id}/citations"
    answer: Any = client.get(path, cast_to=object)
    return answer["data"]


def _show_source(source: Any) -> None:
    if source["quote"] is None:
        print(f"  {source['text']} is from {source['filename']}; the passage is gone")
        return
    place = f"characters {source['start_index']:,} to {source['end_index']:,}"
    found = "verified: it stands there" if source["verified"] else "not verified: it does not stand there any more"
    print(f"  {source['text']} is from {source['filename']}, {place}; {found}")
    paragraphs = source["quote"].split("\n\n")
    _show_lines("\n\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs), QUOTED_LINES)


# --- around it -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(folder: str, model_url: str | None, model_key: str | None) -> Generator[str, None, None]:
    """`afterglow serve` on a free port, as anyone would start it; yields its base URL."""
    command = [sys.executable, "-m", "afterglow.cli", "serve", "--port", "0", "--data", f"{folder}/data"]
    command += ["--log-level", "warning"]
    if model_url:
        command += ["--model-url", model_url]
    own = {
        name: value for name, value in os.environ.items() if name in KEPT_SETTINGS or not name.startswith("AFTERGLOW_")
    }
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
        print(f"    afterglow serve --model-url {OLLAMA}/v1 --default-model MODEL")
    else:
        print("  afterglow serve --model-url URL  uses any OpenAI-compatible model server: Ollama, vLLM, llama.cpp, …")


def _ollama_answers() -> bool:
    try:
        with build_opener(ProxyHandler({})).open(f"{OLLAMA}/api/version", timeout=0.3) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
