"""What `auto` promises: the first engine that works, one at a time, and a refusal that names every reason."""

from __future__ import annotations

import asyncio

import pytest

from afterglow.contracts import CodeSession, EngineStatus
from afterglow.errors import SandboxOff
from afterglow.sandbox.choice import FirstOf

ON = EngineStatus("on", "docker")
NO_NATIVE = EngineStatus("off", "native", "This kernel refuses user namespaces.", "Run `afterglow sandbox apparmor`.")
NO_DOCKER = EngineStatus("off", "docker", "No Docker socket was found.", "Start Docker.")


class Engine:
    """A `contracts.CodeEngine` that settles when told to."""

    def __init__(self, outcome: EngineStatus) -> None:
        self.status = EngineStatus("starting", outcome.engine)
        self.outcome = outcome
        self.may_settle = asyncio.Event()
        self.may_settle.set()
        self.started = self.closed = False

    def start(self) -> None:
        self.started = True

    async def settled(self) -> EngineStatus:
        await self.may_settle.wait()
        self.status = self.outcome
        return self.status

    async def open(self) -> CodeSession:
        return self.outcome.engine  # type: ignore[return-value]

    async def close(self) -> None:
        self.closed = True


async def test_the_first_that_works_is_taken():
    """An engine that is on serves, and those after it are never started."""
    native, docker = Engine(EngineStatus("on", "native")), Engine(ON)
    choice = FirstOf([native, docker])
    assert choice.status.state == "starting"
    choice.start()
    assert await choice.settled() == native.outcome
    assert await choice.open() == "native"
    assert not docker.started


async def test_the_next_is_tried_when_one_is_off():
    """The second engine starts once the first has settled as off, and its status is shown from then on."""
    native, docker = Engine(NO_NATIVE), Engine(ON)
    native.may_settle.clear()
    choice = FirstOf([native, docker])
    choice.start()
    await asyncio.sleep(0)
    assert native.started
    assert not docker.started
    native.may_settle.set()
    assert await choice.open() == "docker"
    docker.status = NO_DOCKER
    assert choice.status == NO_DOCKER


async def test_none_works():
    """When every engine is off, the refusal gives each reason and each remedy, those of the first one first."""
    choice = FirstOf([Engine(NO_NATIVE), Engine(NO_DOCKER)])
    choice.start()
    status = await choice.settled()
    assert status == EngineStatus(
        "off",
        reason="This kernel refuses user namespaces. Nor does docker work: No Docker socket was found.",
        remedy="Run `afterglow sandbox apparmor`. Or, for docker: Start Docker.",
    )
    with pytest.raises(SandboxOff, match=r"^This kernel .* found\. Run .* Start Docker\.$"):
        await choice.open()


async def test_a_fault_while_it_chooses():
    """A fault of ours in an engine is raised to whoever waits, and not taken for "starting" without end."""
    native = Engine(NO_NATIVE)
    native.outcome = None  # type: ignore[assignment]
    choice = FirstOf([native])
    for wait in (choice.settled, choice.open):
        with pytest.raises(AttributeError):
            await wait()
    await choice.close()


async def test_closing_while_it_chooses():
    """Closing ends the choice, closes every engine, and lets go of whoever waits for a session."""
    native, docker = Engine(NO_NATIVE), Engine(ON)
    native.may_settle.clear()
    choice = FirstOf([native, docker])
    opening = asyncio.create_task(choice.open())
    await asyncio.sleep(0)
    await choice.close()
    await choice.close()
    with pytest.raises(SandboxOff, match=r"^The server is stopping\."):
        await opening
    assert native.closed
    assert docker.closed
    assert not docker.started
