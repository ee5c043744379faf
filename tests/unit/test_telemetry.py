"""The log: one line per event, as text or JSON, that no caller can forge and no key gets into."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from afterglow import telemetry
from afterglow.errors import ModelRateLimited
from afterglow.testing import SetClock, calls, says
from tests.api import stores
from tests.api.streams import happened, idle
from tests.conftest import GET_WEATHER, Server, ServerFactory

SECRET = "sk-ag-a-key-that-must-not-be-logged"
PRIVATE = "the text of a message, which is nobody's business"
NAMES = ("afterglow", "uvicorn.error", "opentelemetry")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leave the loggers as they were."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def logged(capsys: pytest.CaptureFixture[str], log_format: str, act: Callable[[logging.Logger], None]) -> str:
    """What `act` puts on stderr, at level info."""
    telemetry.configure(log_format, "info")
    act(logging.getLogger("afterglow.part"))
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def about(subject: str, act: Callable[[], None]) -> None:
    """Do it for a request or a run."""
    context = contextvars.copy_context()
    context.run(telemetry.subject.set, subject)
    context.run(act)


def test_a_line_of_text(capsys: pytest.CaptureFixture[str]):
    """Time, level, message, and whom it is about."""
    line = logged(capsys, "text", lambda log: about("run_1", lambda: log.warning("%d of %s", 3, "a")))
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning 3 of a  \[run_1\]\n", line)
    line = logged(capsys, "text", lambda log: log.info("plain"))
    assert re.fullmatch(r"\d\d:\d\d:\d\d info    plain\n", line)


def test_a_line_of_json(capsys: pytest.CaptureFixture[str]):
    """One object with fixed names, whatever is in the message."""
    text = 'quotes " and\nlines and \u2028 and \x1b[31m and ünïcode'
    line = logged(capsys, "json", lambda log: about("req_1", lambda: log.error("%s", text)))
    assert line.count("\n") == 1
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", fields.pop("time"))
    assert fields == {"level": "error", "logger": "afterglow.part", "message": text, "subject": "req_1"}


def test_json_says_no_more_than_there_is(capsys: pytest.CaptureFixture[str]):
    """Without a subject or an exception there is no field for it."""
    fields = json.loads(logged(capsys, "json", lambda log: log.info("x")))
    assert set(fields) == {"time", "level", "logger", "message"}


def test_fields_are_keys_of_their_own(capsys: pytest.CaptureFixture[str]):
    """What a line says in numbers is beside its message in JSON, and in text only there."""

    def act(log: logging.Logger) -> None:
        log.info("Run %s ended.", "run_1", extra={"fields": {"run_id": "run_1", "duration_s": 1.5, "error": None}})

    assert (
        json.loads(logged(capsys, "json", act)).items() >= {"run_id": "run_1", "duration_s": 1.5, "error": None}.items()
    )
    assert logged(capsys, "text", act).endswith(" Run run_1 ended.\n")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_told(capsys: pytest.CaptureFixture[str], log_format: str):
    """With its traceback, in JSON inside the one line."""

    def fail(log: logging.Logger) -> None:
        try:
            raise ValueError("what went wrong")
        except ValueError:
            log.exception("It failed.")

    text = logged(capsys, log_format, fail)
    assert "It failed." in text
    assert "ValueError: what went wrong" in text
    assert "Traceback" in text
    if log_format == "json":
        assert text.count("\n") == 1
        assert "ValueError: what went wrong" in json.loads(text)["exception"]


def test_a_message_cannot_forge_a_line(capsys: pytest.CaptureFixture[str]):
    """What a caller put into a path or a name stays within its line, and moves no terminal's cursor."""
    forged = "x\n12:00:00 error   The server is on fire\r\x1b[2J"
    line = logged(capsys, "text", lambda log: log.info("GET %s is not served here", forged))
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert "\r" not in line
    assert "\x1b" not in line
    assert "on fire" in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_message_that_is_no_unicode_is_logged(capsys: pytest.CaptureFixture[str], log_format: str):
    """A lone surrogate does not cost the line."""
    line = logged(capsys, log_format, lambda log: log.info("a %s b", "\udcff"))
    assert line.count("\n") == 1
    assert " b" in line


def test_levels_and_loggers(capsys: pytest.CaptureFixture[str]):
    """What is below the level is not logged; of the HTTP server only warnings are; nothing is logged twice."""
    telemetry.configure("text", "debug")
    telemetry.configure("text", "info")
    logging.getLogger("afterglow.part").debug("too small")
    logging.getLogger("afterglow.part").info("ours")
    logging.getLogger("uvicorn.error").info("too small")
    logging.getLogger("uvicorn.error").warning("theirs")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in lines] == ["ours", "theirs"]


# --- what is said of runs and files ----------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the log as it was written."""

    level: str
    message: str
    subject: str
    fields: dict[str, Any]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Line]:
    """All lines of this package from `info` on."""
    found: list[Line] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            fields = getattr(record, "fields", {})
            found.append(Line(record.levelname.lower(), record.getMessage(), telemetry.subject.get(), fields))

    logger = logging.getLogger("afterglow")
    monkeypatch.setattr(logger, "handlers", [Kept()])
    logger.setLevel(logging.INFO)
    return found


async def test_a_run_that_ended_leaves_one_line(server: Server, lines: list[Line]):
    """With its ids, how it ended, after how long, in which attempt, and its tokens."""
    server.model.will(calls(("get_weather", {"city": "Oslo"})), says(PRIVATE))
    run = await server.run(PRIVATE, tools=[GET_WEATHER])
    assert lines == []
    await server.submit(run, {"get_weather": PRIVATE})
    await idle(server)
    [line] = lines
    assert (line.level, line.subject) == ("info", run.id)
    assert run.id in line.message
    assert 0 <= line.fields.pop("duration_s") < 60
    assert line.fields == {
        "run_id": run.id,
        "thread_id": run.thread_id,
        "assistant_id": run.assistant_id,
        "project": "default",
        "model": "gpt-4o",
        "status": "completed",
        "error": None,
        "attempt": 2,
        "prompt_tokens": 20,
        "completion_tokens": 10,
    }


async def test_a_run_that_failed_is_a_warning(server: Server, lines: list[Line]):
    """With the code of its error, and without the model server's words."""
    server.model.will([ModelRateLimited(PRIVATE)])
    run = await server.run("Hi.")
    await idle(server)
    assert [line.level for line in lines] == ["warning", "warning"]
    assert lines[-1].fields["error"] == "rate_limit_exceeded"
    assert all(run.id in line.message and PRIVATE not in line.message for line in lines)


async def test_a_run_that_nobody_executes_is_told_of_by_its_id(
    tmp_path: Path, start_server: ServerFactory, lines: list[Line]
):
    """One that expires in a sweep, and one that is cancelled by a request: then the request is the subject."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will(*[calls(("get_weather", {"city": "Oslo"})) for _ in range(2)])
        overdue, given_up = [await server.run("Hi.", tools=[GET_WEATHER]) for _ in range(2)]
        await server.client.beta.threads.runs.cancel(given_up.id, thread_id=given_up.thread_id)
        clock.time += 601
        await server.application.worker._sweep()
    cancelled, expired = lines
    assert (cancelled.fields["run_id"], cancelled.fields["status"], cancelled.level) == (
        given_up.id,
        "cancelled",
        "info",
    )
    assert cancelled.subject.startswith("req_")
    assert (expired.fields["run_id"], expired.fields["status"], expired.level) == (overdue.id, "expired", "warning")


async def test_a_takeover_is_told_of_once(tmp_path: Path, start_server: ServerFactory, lines: list[Line]):
    """The run's line names it and its new attempt."""
    async with start_server(tmp_path) as server:
        server.model.will([asyncio.Event()])
        assistant, thread = await server.assistant(), await server.client.beta.threads.create()
        run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
        await happened(server, run.id, "thread.run.in_progress")
    async with start_server(tmp_path) as server:
        assert (await server.poll(run)).status == "completed"
    [taken_over] = [line for line in lines if "was left by a worker" in line.message]
    assert (taken_over.level, taken_over.subject) == ("warning", run.id)
    assert taken_over.fields == {"run_id": run.id, "attempt": 2}


async def test_lines_about_files_have_the_file(server: Server, lines: list[Line]):
    """Indexed or not, a file is named with its store, in the message and as the subject; its text is nowhere."""
    store_id, ids = await stores.make_store(server, PRIVATE.encode(), b"")
    await idle(server)
    assert {(line.level, line.subject) for line in lines} == {
        ("info", f"{store_id}/{ids[0]}"),
        ("info", f"{store_id}/{ids[1]}"),
    }
    assert all(line.subject in line.message and PRIVATE not in line.message for line in lines)


async def test_no_key_and_no_text_is_logged(
    tmp_path: Path, start_server: ServerFactory, caplog: pytest.LogCaptureFixture
):
    """At the finest level a run, a wrong key, a wrong path and a fault of a model leave neither keys nor texts."""
    caplog.set_level(logging.DEBUG, logger="afterglow")
    async with start_server(tmp_path / "data", api_keys=SECRET) as server:
        client = server.client.with_options(api_key=SECRET)
        server.client = client
        run = await server.run(PRIVATE, instructions=PRIVATE, metadata={"a": PRIVATE})
        assert run.status == "completed"
        for path, key in (("/nowhere", SECRET), ("/threads", SECRET + "x"), ("/threads/none", SECRET)):
            with pytest.raises(Exception, match=r"40[14]"):
                await client.with_options(api_key=key).get(path, cast_to=object)
    text = "\n".join(
        f"{record.getMessage()} {record.exc_text or ''}"
        for record in caplog.records
        if record.name.startswith("afterglow")
    )
    assert text
    assert SECRET not in text
    assert PRIVATE not in text
