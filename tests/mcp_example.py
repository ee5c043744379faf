"""An MCP server for tests: `python -m tests.mcp_example` speaks on stdin and stdout, `application()` over HTTP."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from mcp.server.mcpserver import MCPServer


def server() -> Any:
    made = MCPServer("example")

    @made.tool(description="The weather in a city.")
    def weather(city: str) -> str:
        return f"rain in {city}"

    @made.tool(name="odd.name/tool", structured_output=False)
    def odd() -> str:
        return "odd"

    @made.tool()
    def fails() -> str:
        raise ValueError("no such thing")

    @made.tool()
    async def hangs() -> str:
        await asyncio.sleep(60)
        return "late"

    @made.tool()
    def environment() -> str:
        return " ".join(sorted(os.environ))

    @made.tool()
    def process() -> str:
        return str(os.getpid())

    @made.tool()
    def long() -> str:
        return "x" * 2_000_000

    return made


if __name__ == "__main__":
    server().run("stdio")
