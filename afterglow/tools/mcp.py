"""MCP servers among an assistant's or run's tools: whether they may be asked, and what they have to offer.

Speaking with them is in `afterglow/mcp_servers.py`; calling their tools in a run in `runs/calling.py`.
"""

from __future__ import annotations

import asyncio

import msgspec

from afterglow.contracts import House, McpServer, McpTool
from afterglow.errors import InvalidRequest, OutboundFailed
from afterglow.objects import Json
from afterglow.telemetry import log
from afterglow.tools.function import mcp_server_of

NO_MCP = (
    "No MCP server can be asked here: the operator has named none ([mcp.NAME] in the configuration, with"
    " `pip install 'afterglow[mcp]'`)."
)


def check_mcp_tools(house: House, tools: list[Json]) -> None:
    """Raise InvalidRequest for the first tool whose server may not be asked."""
    for index, tool in enumerate(tools):
        if tool["type"] == "mcp" and (reason := _why_refused(house, mcp_server_of(tool))):
            key = "server_url" if tool.get("server_url") else "server_label"
            raise InvalidRequest(reason, param=f"tools[{index}].{key}", code="invalid_value")


def _why_refused(house: House, server: McpServer) -> str | None:
    return NO_MCP if house.mcp is None else house.mcp.why_refused(server)


class ListedServers(msgspec.Struct):
    """What the MCP servers of a run have to offer. failures: why one could not be asked, by label."""

    tools: dict[McpServer, list[McpTool]] = {}
    failures: dict[str, str] = {}

    def paragraph(self) -> str:
        """What the model is told of those that could not be asked; empty when all could."""
        return "\n".join(f"The tools of {label} cannot be used now: {why}" for label, why in self.failures.items())


async def list_mcp_tools(house: House, project: str, tools: list[Json]) -> ListedServers:
    """Ask every MCP server among a run's tools, all at once."""
    servers = list(dict.fromkeys(mcp_server_of(tool) for tool in tools if tool["type"] == "mcp"))
    listed = ListedServers()

    async def ask(server: McpServer) -> None:
        try:
            listed.tools[server] = await _list_tools(house, project, server)
        except OutboundFailed as error:
            log.warning("The tools of the MCP server %s cannot be listed: %s", server.label, error)
            listed.failures[server.label] = str(error)

    await asyncio.gather(*map(ask, servers))
    listed.tools = {server: listed.tools[server] for server in servers if server in listed.tools}
    return listed


async def _list_tools(house: House, project: str, server: McpServer) -> list[McpTool]:
    if house.mcp is None:
        raise OutboundFailed(NO_MCP)
    return await house.mcp.list_tools(project, server)
