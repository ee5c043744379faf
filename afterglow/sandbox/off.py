"""No engine: the operator has switched the code interpreter off."""

from __future__ import annotations

from typing import NoReturn

from afterglow.contracts import EngineStatus
from afterglow.errors import SandboxOff


class NoEngine:
    """A `contracts.CodeEngine` that opens nothing, and says why."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.status = EngineStatus("off", reason=reason, remedy=remedy)

    def start(self) -> None:
        """Nothing to start."""

    async def settled(self) -> EngineStatus:
        return self.status

    async def open(self) -> NoReturn:
        raise SandboxOff(f"{self.status.reason} {self.status.remedy}")

    async def close(self) -> None:
        """Nothing to end."""
