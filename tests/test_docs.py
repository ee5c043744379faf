"""The documentation is true of the code: routes, settings, commands, errors and moves are in it; its examples run."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from afterglow import cli, errors, settings
from afterglow.app import OPEN_ROUTES, ROUTES
from afterglow.objects import WEBHOOK_EVENT_TYPES, WebhookEvent
from afterglow.runs.states import RUN_MOVES, TERMINAL
from afterglow.settings import ModelSettings, Settings
from afterglow.signing import new_secret, signed_headers
from afterglow.webhooks import sample_data

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "bench" / "README.md"]
}
EXAMPLE_URL = "http://127.0.0.1:8000/v1"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in FENCED.findall(PAGES[page]) if found == language]


def prose(page: str) -> str:
    return COMMENT.sub("", FENCED.sub("", PAGES[page]))


# --- what is generated -----------------------------------------------------------------------------------------


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", generator().PAGES)
def test_generated_pages_are_up_to_date(name: str):
    """configuration.md and map.md on disk are what the code says; `make docs` writes them."""
    assert PAGES[f"docs/{name}"] == generator().PAGES[name](), "run `make docs`"


def test_every_setting_is_documented():
    """configuration.md has a row for each setting, and each key of the two tables."""
    page = PAGES["docs/configuration.md"]
    upstream = ["url", "key_env", "models", "max_concurrency", "inline_images"]
    for name in [*(row.name for row in fields(Settings)), *upstream, *(row.name for row in fields(ModelSettings))]:
        assert f"\n| `{name}` |" in page, name


# --- what must not be missing ----------------------------------------------------------------------------------


def test_every_route_is_documented():
    """api.md names every route of the route tables, with its method."""
    addresses = [(method, f"/v1{path}") for method, path, _ in ROUTES] + [(m, path) for m, path, _ in OPEN_ROUTES]
    for method, path in addresses:
        assert f"`{method} {path.replace(':path', '')}`" in PAGES["docs/api.md"]


def test_no_route_is_made_up():
    """Every route in api.md's tables exists."""
    have = {f"{method} /v1{path.replace(':path', '')}" for method, path, _ in ROUTES}
    have |= {f"{method} {path}" for method, path, _ in OPEN_ROUTES}
    assert set(re.findall(r"^\| `([A-Z]+ /[^`]+)` \|", PAGES["docs/api.md"], re.MULTILINE)) == have


def commands(parser: argparse.ArgumentParser, said: str = "afterglow") -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield f"{said} {name}"
                yield from commands(inner, f"{said} {name}")


def test_every_command_is_documented():
    """deployment.md's table has exactly the commands of the command line."""
    groups = {f"afterglow {name}" for name in ("keys", "projects", "sandbox", "tools", "webhooks")}
    found = set(commands(cli._parser())) - groups
    assert set(re.findall(r"^\| `(afterglow [a-z ]+)` \|", PAGES["docs/deployment.md"], re.MULTILINE)) == found


def test_every_flag_in_the_documentation_exists():
    """What is written as a flag of afterglow, in prose or in a command, is one."""
    known = {"--version"}
    waiting = [cli._parser()]
    while waiting:
        for action in waiting.pop()._actions:
            known.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    for page in PAGES:
        said = [line for block in blocks(page, "sh") for line in block.splitlines()]
        said = [line.partition("#")[0] for line in said if re.match(r"(\w+=\S+ )?(\S*/)?afterglow ", line)]
        said += re.findall(r"`(?:[^`]*\bafterglow [^`]*?)?(--[a-z][^`]*)`", prose(page))
        for flag in re.findall(r"(?<!\S)--[a-z-]+", " ".join(said)):
            assert flag in known or page.startswith("bench/"), f"{page}: {flag}"


def error_classes(root: type[BaseException]) -> Iterator[type[BaseException]]:
    if not root.__name__.startswith("_"):  # one that never leaves its file
        yield root
    for inner in root.__subclasses__():
        yield from error_classes(inner)


def test_every_error_is_documented():
    """errors.md has a row for each class of the tree, with the status or the code that it becomes."""
    page = PAGES["docs/errors.md"]
    for kind in error_classes(errors.AfterglowError):
        row = re.search(rf"^\| `{kind.__name__}` \| ([^|]+) \|", page, re.MULTILINE)
        assert row, kind.__name__
        if issubclass(kind, errors.ApiError):
            assert row[1] == f"HTTP {kind.status}"
        elif issubclass(kind, errors.ModelError) and kind is not errors.ModelError:
            assert row[1] == f"run: `{kind.code}`"


def test_every_error_code_is_documented():
    """errors.md has every `code` that the package writes."""
    source = "".join(path.read_text("utf-8") for path in (ROOT / "afterglow").rglob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', source))
    codes |= set(re.findall(r'invalid\(.*"(\w+)"\)', source))
    codes |= {f"{kind}_{end}" for kind in ("integer", "decimal") for end in ("above_max_value", "below_min_value")}
    assert not [code for code in codes if f"`{code}`" not in PAGES["docs/errors.md"]]


def test_the_diagram_is_the_table():
    """The diagram in runs.md has exactly the moves of RUN_MOVES, and each event is explained."""
    [diagram] = blocks("docs/runs.md", "mermaid")
    drawn = set(re.findall(r"^ +(\S+) --> (\S+?)(?:: (\w+))?$", diagram, re.MULTILINE))
    moves = {(old, new, event) for old, row in RUN_MOVES.items() for event, new in row.items()}
    assert drawn == moves | {("[*]", "queued", "")} | {(status, "[*]", "") for status in TERMINAL}
    for event in {event for row in RUN_MOVES.values() for event in row}:
        assert f"\n| `{event}` |" in PAGES["docs/runs.md"]


def test_make_targets_exist():
    """Every `make TARGET` in the documentation is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page, text in PAGES.items():
        code = [*re.findall(r"`make ([a-z-]+)`", text), *re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)]
        assert set(code) <= targets, page


# --- links -----------------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """The anchors that headings get on the usual forges."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", PAGES[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    """Links between pages name files that exist, and headings that these have."""
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("page", [page for page in PAGES if "](#" in PAGES[page]])
def test_contents_are_whole(page: str):
    """A page that begins with a list of contents lists all its chapters, in order."""
    listed = re.findall(r"^- \[([^\]]+)\]\(#[^)]+\)$", PAGES[page], re.MULTILINE)
    if listed:
        assert listed == re.findall(r"^## (.+)$", FENCED.sub("", PAGES[page]), re.MULTILINE)


# --- examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_examples_are_python(page: str):
    """Code blocks marked python compile."""
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize(
    ("page", "text"), [(page, text) for page in PAGES for text in blocks(page, "toml") if "[assistants." not in text]
)
def test_toml_examples_are_configurations(page: str, text: str, tmp_path: Path):
    """Code blocks marked toml load as configuration files; those that declare assistants are tested elsewhere."""
    file = tmp_path / "afterglow.toml"
    file.write_text(text, "utf-8")
    tables = [table for kind in ("upstreams", "mcp") for table in tomllib.loads(text).get(kind, {}).values()]
    named = [name for table in tables for name in [*table.get("env", []), table.get("key_env")] if name]
    assert settings.load(environ=dict.fromkeys(named, "a-key"), config=file)


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`afterglow serve` as anyone would start it, with the offline model."""
    command = [sys.executable, "-m", "afterglow.cli", "serve", "--port", "0"]
    command += ["--data", str(tmp_path_factory.mktemp("docs") / "data")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("AFTERGLOW_")}
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[-1] for line in process.stdout if line.startswith("Base URL"))
        finally:
            process.terminate()
            process.communicate(timeout=30)


def ran(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_example_runs(base_url: str):
    """The quickstart's Python, from top to bottom: a function is called and answered, and a stream is followed."""
    code = "\n".join(blocks("docs/quickstart.md", "python"))
    assert EXAMPLE_URL in code
    said = ran([sys.executable, "-W", "ignore", "-c", code.replace(EXAMPLE_URL, base_url)])
    assert 'the model calls get_weather {"city": "Oslo"}' in said
    assert "\ncompleted\n" in said
    assert "14 degrees and rain" in said
    assert "391" in said.splitlines()[-1]


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("sed")), reason="needs curl and sed")
def test_the_curl_example_runs(base_url: str):
    """The quickstart's shell commands make an assistant and stream a run to its end."""
    [script] = [block for block in blocks("docs/quickstart.md", "sh") if "curl" in block]
    assert EXAMPLE_URL in script
    said = ran(["sh", "-eu", "-c", script.replace(EXAMPLE_URL, base_url)])
    assert "event: thread.run.completed\n" in said
    assert said.endswith("event: done\ndata: [DONE]\n\n")


@pytest.fixture(scope="module")
def story(base_url: str) -> Iterator[dict[str, Any]]:
    """What the other examples speak of, by the names they use: a run that waits for the outputs of a call; and `ended`,
    one that is over."""
    with openai.OpenAI(base_url=base_url, api_key="anything") as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tool = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
        assistant = client.beta.assistants.create(model="gpt-4o", tools=[tool])  # type: ignore[list-item]
        thread = client.beta.threads.create(messages=[{"role": "user", "content": "The weather in Oslo?"}])
        run = client.beta.threads.runs.create_and_poll(thread_id=thread.id, assistant_id=assistant.id)
        [call] = run.required_action.submit_tool_outputs.tool_calls  # type: ignore[union-attr]
        ended = client.beta.threads.create_and_run_poll(assistant_id=assistant.id, tools=[])
        yield {"client": client, "assistant": assistant, "thread": thread, "run": run, "call": call, "ended": ended}


def told(page: str, word: str, base_url: str, names: dict[str, Any]) -> dict[str, Any]:
    """`names`, and those that are there once the page's Python example with `word` in it has run."""
    [block] = [block for block in blocks(page, "python") if word in block]
    found = dict(names)
    exec(block.replace(EXAMPLE_URL, base_url).replace('"sk-…"', '"sk-any"'), found)
    return found


def test_python_examples_do_what_they_say(base_url: str, story: dict[str, Any]):
    """Outputs in parts, waiting, events, ledger, dry run, an idempotency key, the README's and administration."""
    run = told("docs/tools.md", "partial", base_url, story)["run"]
    run = told("docs/waiting.md", "wait_for", base_url, story)["wait_for"](run)
    assert run.status == "completed"
    events = [one.event for one in told("docs/waiting.md", "events_of", base_url, story)["events_of"](run)]
    assert (events[0], events[-1]) == ("thread.run.created", "thread.run.completed")
    ledger = told("docs/costs.md", "/ledger", base_url, story)["ledger"]
    assert ledger["total"]["usage"]["total_tokens"] == run.usage.total_tokens
    assert told("docs/costs.md", "dry_run", base_url, story)["tried"]["would"] == "run"
    made = [told("docs/retries.md", "Idempotency-Key", base_url, story)["message"].id for _ in range(2)]
    assert made[0] == made[1]
    found = told("README.md", "create_and_poll", base_url, story)
    assert f'"{found["run"].id}"' in found["events"]
    assert found["ledger"]["run_id"] == found["run"].id
    blue = told("docs/access.md", "admin_api_key", base_url, {})["blue"]
    assert blue.settings["limits"]["requests_per_minute"] == 600


def test_the_receiver_of_webhooks_takes_what_is_signed(monkeypatch: pytest.MonkeyPatch):
    """The example in webhooks.md answers 200 to each event and each test of one, and 400 to a forged one."""
    monkeypatch.setenv("WEBHOOK_SECRET", secret := new_secret())
    receive = told("docs/webhooks.md", "unwrap", "", {})["receive"]
    for event_type in WEBHOOK_EVENT_TYPES:
        event = WebhookEvent(id="evt_1", created_at=1, type=event_type, data=sample_data(event_type))
        body = msgspec.json.encode(event)
        headers = signed_headers(secret, event.id, int(time.time()), body)
        assert receive(body, headers) == 200
        assert receive(body + b" ", headers) == 400


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("page", ["api", "costs", "finding", "waiting", "webhooks"])
def test_curl_examples_are_answered(page: str, base_url: str, story: dict[str, Any]):
    """Each curl command of the pages about extensions gets what it asks for."""
    script = "\n".join(text for text in blocks(f"docs/{page}.md", "sh") if "curl" in text and "…" not in text)
    run = f'THREAD={story["ended"].thread_id} RUN={story["ended"].id}\ncurl() {{ command curl --fail -m 5 "$@"; }}\n'
    assert base_url not in script
    assert ran(["sh", "-eu", "-c", run + script.replace(EXAMPLE_URL, base_url)])


# --- what must not be said -------------------------------------------------------------------------------------

# A letter in brackets, so that this file does not say it either.
UNWANTED = {
    "a package registry": re.compile(r"pyp[i]\.org|pythonhoste[d]\.org|npmj[s]\.(?:com|org)"),
    "a folder of one machine": re.compile(r"/wor[k]/|/roo[t]/"),
    "a paper that is not part of the project": re.compile(r"\b(?:DESIG[N]|DECISION[S]|CONTRAC[T]|STYL[E])(?:\.md|:)"),
}
SUFFIXES = {".py", ".md", ".toml", ".sql", ".txt", ".sh", ".yml"}


def texts() -> list[Path]:
    folders = ["afterglow", "bench", "docs", "locks", "tests"]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return [ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("*.md"), *found]


@pytest.mark.parametrize("what", UNWANTED)
def test_nothing_unwanted_is_said(what: str):
    """No text of the project names a package registry, a path of one machine, or a paper that readers do not have."""
    places = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if UNWANTED[what].search(line)
    ]
    assert not places
