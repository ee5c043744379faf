"""The attacks are real: without a wall they get through."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator

import pytest

from afterglow.contracts import CellEnd, CellOutput, CodeSession, Logs
from afterglow.sandbox import attacks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="attacks on Linux")

# Those that harm nothing when they succeed.
HARMLESS = [
    "read a file of the server's",
    "see other processes",
    "connect to the machine",
    "make a network socket",
    "start too many processes",
    "fill the disk",
]


class NoWall:
    """A session that is none: it runs all cells so far in a plain Python program, and shows what the last one adds."""

    def __init__(self) -> None:
        self._begin = ""

    async def run(self, code: str, timeout_s: float) -> AsyncGenerator[CellOutput]:
        if not self._begin:
            self._begin = code
            yield Logs(attacks.STOPPED)
        else:
            program = f"{self._begin}\n{code}".replace(f'print("{attacks.STOPPED}")', "", 1)
            ran = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
            said, _ = await ran.communicate()
            yield Logs(said.decode())
        yield CellEnd("ok")


@pytest.mark.parametrize("name", [*HARMLESS, *(name for name in attacks.NATIVE if "first" not in name)])
async def test_an_attack_gets_through_where_there_is_no_wall(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What the probe takes for stopped is stopped by the wall, and not by a mistake in the attack."""
    monkeypatch.setattr(attacks, "ATTACKS", {name: {**attacks.ATTACKS, **attacks.NATIVE}[name]})
    session: CodeSession = NoWall()  # type: ignore[assignment]
    assert await attacks.probe(session, processes=16, disk_mb=1) == [name]


@pytest.mark.parametrize("said", ["", "got through", "stopped\nstopped", "Traceback"])
async def test_only_what_says_that_it_was_stopped_was(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """An attack that ends in any other way than `stopped` counts as one that succeeded."""
    monkeypatch.setattr(attacks, "ATTACKS", {"one": "return None"})

    class Says(NoWall):
        async def run(self, code: str, timeout_s: float) -> AsyncGenerator[CellOutput]:
            yield Logs(said if "def attack" in code else attacks.STOPPED)

    assert await attacks.probe(Says()) == ["one"]  # type: ignore[arg-type]


async def test_sessions_in_one_namespace_are_told() -> None:
    """Two that share theirs with each other and with us share all; one that does not tell is no better."""
    one: CodeSession = Prints()  # type: ignore[assignment]
    assert len(await attacks.shared_namespaces(one, one)) == len(attacks.NAMESPACES)
    silent: CodeSession = NoWall()  # type: ignore[assignment]
    assert await attacks.shared_namespaces(one, silent) == ["what its namespaces are is not told"]


class Prints(NoWall):
    """One that runs its first cell as well."""

    async def run(self, code: str, timeout_s: float) -> AsyncGenerator[CellOutput]:
        self._begin = "pass"
        async for part in super().run(code, timeout_s):
            yield part


EVERY = {**attacks.ATTACKS, **attacks.NATIVE}


@pytest.mark.parametrize("body", EVERY.values(), ids=EVERY)
def test_every_attack_is_python(body: str) -> None:
    """No attack is stopped by a mistake in its syntax."""
    compile(attacks.BEGIN + attacks._cell(body), "attack", "exec")
