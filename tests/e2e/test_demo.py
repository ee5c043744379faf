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


def in_order(text: str, *parts: str) -> None:
    """Fails unless the parts stand in the text one after the other."""
    place = 0
    for part in parts:
        place = text.index(part, place) + len(part)


async def test_the_story(tmp_path: Path):
    """With nothing configured and an empty home it tells the whole story, leaves nothing behind, and ends well."""
    ended = await afterglow("demo", env=environment(HOME=str(tmp_path), TMPDIR=str(tmp_path)))
    assert ended.code == 0, ended.err
    assert ended.err == ""
    in_order(
        ended.out,
        "A server is up",
        "queued",
        "requires_action",
        'the model calls get_file_facts({"path": "README.md"})',
        'we answer       {"bytes": ',
        "completed",
        "  assistant  get_file_facts(path=README.md) says: bytes ",
        "thread.run.created",
        "thread.message.in_progress",
        '  assistant  The text says: "Tool outputs',
        "thread.message.completed",
        "thread.run.completed",
        "The conversation, as any client reads it",
        "Your turn",
    )
    assert "\033" not in ended.out
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
    """With a model server of one's own, and its key, the same story is told by that model."""
    async with TalkingModel() as model:
        ended = await told_by(model, "--model-key", "sk-mine")
        assert ended.code == 0, ended.err
        assert ended.err == ""
        assert ended.out.count("One two three.") == 4
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
