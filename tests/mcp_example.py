"""An MCP server for tests: `python -m tests.mcp_example` speaks on stdin and stdout, `over_http` in this process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from mcp.server.mcpserver import Image, MCPServer


def server() -> Any:
    made = MCPServer("example")
    logging.getLogger("mcp").setLevel(logging.CRITICAL)

    @made.tool(description="The weather in a city.")
    def weather(city: str) -> str:
        return f"rain in {city}"

    @made.tool(name="odd.name", structured_output=False)
    def odd() -> list[Any]:
        return ["odd", Image(data=b"png", format="png")]

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


@asynccontextmanager
async def over_http(port: int = 0, **options: Any) -> AsyncGenerator[str, None]:
    """Its URL, while it is there."""
    listening = socket.create_server(("127.0.0.1", port))
    app = server().streamable_http_app(**options)
    config = uvicorn.Config(app, loop="none", ws="none", lifespan="on", log_config=None, timeout_graceful_shutdown=0)
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve([listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
    finally:
        running.should_exit = True
        await task


if __name__ == "__main__":
    server().run("stdio")
