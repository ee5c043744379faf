"""Every attack that we know of, against the real engine: none may succeed, and each must really have been tried."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from afterglow.contracts import CodeSession
from afterglow.sandbox.local import NativeEngine
from tests.sandbox import as_user
from tests.sandbox.attack_cells import (
    INVENTED,
    MATRIX,
    SLOW,
    Attack,
    carry_out,
    cell,
    program,
    read_outcome,
    why_not_stopped,
)
from tests.sandbox.bait import Bait, put_out
from tests.sandbox.conftest import run
from tests.sandbox.endings import WEDGES

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the native engine is for Linux"),
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bait() -> AsyncGenerator[Bait]:
    async with put_out() as bait:
        yield bait


class Attacker:
    """A session from which one attack after the other is tried; a new one when one of them ends it."""

    def __init__(self, engine: NativeEngine, bait: Bait) -> None:
        self._engine = engine
        self._bait = bait
        self.session: CodeSession | None = None

    async def why_not_stopped(self, attack: Attack) -> str:
        if self.session is None or not self.session.alive:
            self.session = await self._engine.open()
            begun = await run(self.session, program(self._bait.names()))
            assert begun.status == "ok", begun.text
        return why_not_stopped(attack, await carry_out(self.session, attack))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attacker(engine: NativeEngine, bait: Bait) -> AsyncGenerator[Attacker]:
    attacker = Attacker(engine, bait)
    yield attacker
    if attacker.session is not None:
        await attacker.session.close()


ATTACKS = {**MATRIX, **INVENTED}
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ATTACKS]


@pytest.mark.parametrize("name", EACH)
async def test_an_attack_is_refused(attacker: Attacker, bait: Bait, name: str) -> None:
    """What the attack tries is refused, each try with the error of the layer that is to refuse it."""
    assert await attacker.why_not_stopped(ATTACKS[name]) == ""
    assert bait.touched == []


@pytest.mark.parametrize("name", [name for name, attack in MATRIX.items() if attack.outside])
async def test_an_attack_is_one(name: str) -> None:
    """Without the wall the same code gets through."""
    async with put_out() as bait:
        code = program(bait.names()) + cell(MATRIX[name])
        outside = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
        said, _ = await outside.communicate()
        assert read_outcome(said.decode()).got


@pytest.mark.slow
async def test_an_ordinary_user_is_as_safe(packages_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All attacks and wedges fail, too, when the server is an ordinary user; what is not bounded then is said."""
    if why := as_user.can_start(packages_folder):
        pytest.skip(why)
    made = tmp_path_factory.mktemp("environment")
    child = await asyncio.to_thread(as_user.started, packages_folder, made, [*ATTACKS, *WEDGES], timeout=120)
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert told["failed"] == {}
    assert "Memory is watched, not bounded" in told["unenforced"][0]
    assert told["sessions"] <= 4
