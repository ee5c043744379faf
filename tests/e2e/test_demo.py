"""`afterglow demo`, as it is typed."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.e2e.processes import AFTERGLOW, PATIENCE_S, PIPE, Ended, afterglow, environment
from tests.e2e.talking_model import TalkingModel
from tests.scripted_server import ScriptedServer, refusal

pytestmark = pytest.mark.slow

TARGETS = '{"year": 2025, "targets": {"North": 73500, "South": 33075, "East": 33600, "West": 43050}}'
PAUSE = ("requires_action", 'the model calls get_sales_targets({"year": 2025})', f"we answer       {TARGETS}")

DOCUMENT = (
    "A document, an assistant that searches it",
    "runs.md, ",
    "searches   expire tool outputs",
    "finds      ",
    "The answer, and what it cites",
    "A run expires `run_expires_s` (600) seconds after it was **created**",
    "tool outputs do",
    "†runs.md】 is from runs.md, characters ",
    "verified: it stands there",
    "│ ## Expiry",
)


def in_order(text: str, *parts: str) -> None:
    """Fails unless the parts stand in the text one after the other."""
    place = 0
    for part in parts:
        place = text.index(part, place) + len(part)


async def test_the_story(tmp_path: Path):
    """With an engine it tells the whole story: the pause, the code, the answer, the files, the stream. The files stay,
    nothing else does."""
    own = environment(TMPDIR=str(tmp_path), AFTERGLOW_CODE_INTERPRETER="auto")
    ended = await afterglow("demo", env=own)
    assert ended.code == 0, ended.err
    if "code interpreter  off" in ended.out:
        pytest.skip(next(line.strip() for line in ended.out.splitlines() if "code interpreter  off" in line))
    assert ended.err == ""
    in_order(
        ended.out,
        "A server is up",
        "code interpreter  on",
        "sales.csv, 19.4 KB",
        "queued",
        *PAUSE,
        "completed",
        "1. called get_sales_targets",
        "2. ran Python",
        "which printed",
        '│ size: {"rows": 429, "columns": 6}',
        "3. ran Python",
        "and drew a picture",
        "4. wrote the answer",
        "[chart.png]",
        "sales.csv has 429 rows",
        "North 81,373.40 of 73,500 (111%)",
        "(sandbox:/mnt/data/summary.csv)",
        "these files are yours to keep",
        "A second question, streamed",
        "thread.run.created",
        "thread.run.step.delta, ",
        "thread.message.in_progress",
        "Beeswax candle is highest in units by product",
        "thread.message.completed",
        "thread.run.completed",
        *DOCUMENT,
        "Your turn",
    )
    assert "\033" not in ended.out
    [kept] = tmp_path.iterdir()
    assert {path.name for path in kept.iterdir()} == {"chart.png", "summary.csv"}
    assert f"  {kept / 'chart.png'}  (" in ended.out
    assert (kept / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert (kept / "summary.csv").read_text().startswith("region,revenue,targets\nNorth,81373.4,73500\n")


async def test_the_story_without_an_engine(tmp_path: Path):
    """Where no Python can be run it says why and what to do, tells the rest, leaves nothing behind, and ends well."""
    own = environment(HOME=str(tmp_path), TMPDIR=str(tmp_path), AFTERGLOW_CODE_INTERPRETER="off")
    ended = await afterglow("demo", env=own)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    in_order(
        ended.out,
        "code interpreter  off. ",
        "Set it to `auto`. The demo goes on without.",
        *PAUSE,
        "completed",
        "2. wrote Python, which could not be run: ",
        "3. wrote the answer",
        "Python could not be run: ",
        "get_sales_targets(year=2025) says: ",
        "A second question, streamed",
        "thread.run.requires_action",
        *PAUSE[1:],
        "thread.message.in_progress",
        "North 73500",
        "thread.run.completed",
        *DOCUMENT,
        "Your turn",
    )
    assert "yours to keep" not in ended.out
    assert list(tmp_path.iterdir()) == []


def test_a_reader_who_has_enough(tmp_path: Path):
    """When whoever reads its output goes away it ends without a word, takes its server along and cleans up."""
    environ = environment(TMPDIR=str(tmp_path))
    with subprocess.Popen([*AFTERGLOW, "demo"], env=environ, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not (found := re.search(rb"http://127\.0\.0\.1:(\d+)/v1", process.stdout.readline())):
            assert process.poll() is None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(found[1])))


async def told_by(model: ScriptedServer, *flags: str) -> Ended:
    return await afterglow("demo", "--model-url", model.url, "--model", "talker", *flags)


async def test_a_model_server_of_yours():
    """With a model server of one's own, and its key, the same story is told by that model; one that uses no tool and
    makes no file is no trouble."""
    async with TalkingModel() as model:
        ended = await told_by(model, "--model-key", "sk-mine")
        assert ended.code == 0, ended.err
        assert ended.err == ""
        assert ended.out.count("One two three.") == 3
        assert "It cites nothing." in ended.out
        assert "1. wrote the answer" in ended.out
        assert {request.headers["authorization"] for request in model.chats} == {"Bearer sk-mine"}


async def test_a_model_server_that_refuses():
    """When the model server refuses, its reason is told and the status is 1."""
    async with ScriptedServer() as model:
        model.on("POST /v1/chat/completions", refusal(401, "This key is worn out."))
        ended = await told_by(model)
        assert ended.code == 1
        assert "The run ended as failed: " in ended.err
        assert "This key is worn out." in ended.err
        assert "Traceback" not in ended.err


async def test_a_terminal_of_another_age():
    """An output that knows only ASCII is no reason to fail."""
    ended = await afterglow("demo", env=environment(PYTHONIOENCODING="ascii"))
    assert ended.code == 0, ended.err
