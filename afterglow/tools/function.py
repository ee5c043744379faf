"""Tools in chat-completions form: the caller's functions as they are, server-side tools as functions of ours.

A caller's function may bear the very name we would use for a built-in tool, or for one of an MCP server; ours then
takes another, and `Offer.kinds` tells afterwards whose call it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import chain, count
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec

from afterglow.contracts import McpServer, McpTool
from afterglow.objects import EXTENSION, VENDOR_KEYS, FunctionCalling, Json, Tool

# endpoint: a function that this server calls over HTTP. mcp: one of an MCP server.
ToolKind = Literal["function", "code_interpreter", "file_search", "endpoint", "mcp"]
CALLED_OUT: frozenset[ToolKind] = frozenset({"endpoint", "mcp"})  # by this server; shown as functions
FUNCTIONS = CALLED_OUT | {"function"}
NO_TOOLS: Mapping[McpServer, list[McpTool]] = MappingProxyType({})
CALLED_BY = "x-called-by"  # the key of a stored call that says so, with the value `server`
MAX_NAME_CHARS = 64


class _BuiltIn(NamedTuple):
    """How a server-side tool is shown to the model. names: the first that no function of the caller's bears."""

    names: tuple[str, ...]
    description: str
    parameters: Json


BUILT_IN: dict[str, _BuiltIn] = {
    "code_interpreter": _BuiltIn(
        ("python", "code_interpreter", "run_python_code", "afterglow_python"),
        "Run Python code in a sandbox that keeps its variables between calls. Files are under /mnt/data.",
        {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "Python source to run."}},
            "required": ["code"],
        },
    ),
    "file_search": _BuiltIn(
        ("file_search", "search_files", "search_attached_files", "afterglow_file_search"),
        "Search the files attached to this assistant and conversation.",
        {
            "type": "object",
            "properties": {"queries": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
            "required": ["queries"],
        },
    ),
}


class Offer(NamedTuple):
    """tools: ready to send; kinds: which kind each name belongs to; names: the name under which a kind is offered.

    callings: what is said of the functions that have it, by name. mcp: server and own name of each MCP tool, by the
    name under which it is offered.
    """

    tools: list[Json]
    kinds: dict[str, ToolKind]
    names: dict[str, str]
    callings: dict[str, FunctionCalling]
    mcp: dict[str, tuple[McpServer, str]]


def stored_form(tool: Tool) -> Json:
    """A tool as it is stored and echoed: as sent, without nulls, with `strict` filled in, keys beginning `x-` kept."""
    fields: Json = msgspec.to_builtins(tool)
    vendor: Json = fields.pop(VENDOR_KEYS, {})
    kind = fields["type"]
    if kind == "mcp":
        return {key: value for key, value in fields.items() if value is not None} | vendor
    options: Json = {key: value for key, value in (fields.get(kind) or {}).items() if value is not None}
    if kind == "function":
        options["strict"] = options.get("strict", False)
    return {"type": kind, **({kind: options} if fields.get(kind) is not None else {}), **vendor}


def calling_of(tool: Json) -> FunctionCalling:
    """What `x-afterglow` says of a stored function tool."""
    try:
        return msgspec.convert(tool.get(EXTENSION, {}), FunctionCalling)
    except msgspec.ValidationError:  # it was imported, and means nothing here
        return FunctionCalling()


def mcp_server_of(tool: Json) -> McpServer:
    """The server of a stored MCP tool."""
    return McpServer(tool["server_label"], tool.get("server_url") or "")


def offer(tools: list[Json], listed: Mapping[McpServer, list[McpTool]] = NO_TOOLS) -> Offer:
    """What to show the model for an assistant's or run's stored tools, in their order. listed: what the MCP servers
    among them have; one that has nothing, or could not be asked, is left out."""
    functions = {tool["function"]["name"] for tool in tools if tool["type"] == "function"}
    offered = Offer([], {}, {}, {}, {})
    for tool in tools:
        if tool["type"] == "function":
            _offer_function(offered, tool)
        elif tool["type"] == "mcp":
            _offer_mcp(offered, tool, listed.get(mcp_server_of(tool), ()), functions)
        elif tool["type"] not in offered.names:
            _offer_built_in(offered, tool["type"], functions)
    return offered


def _offer_function(offered: Offer, tool: Json) -> None:
    definition = {key: value for key, value in tool["function"].items() if value is not None}
    if not definition.get("strict"):
        definition.pop("strict", None)
    calling = calling_of(tool)
    if calling != FunctionCalling():
        offered.callings[definition["name"]] = calling
    _add(offered, definition, "endpoint" if calling.url else "function")


def _offer_built_in(offered: Offer, kind: ToolKind, functions: Collection[str]) -> None:
    built_in = BUILT_IN[kind]
    names = chain(built_in.names, (f"{built_in.names[0]}_{number}" for number in count(2)))
    name = next(name for name in names if name not in functions and name not in offered.kinds)
    _add(offered, {"name": name, "description": built_in.description, "parameters": built_in.parameters}, kind)
    offered.names[kind] = name


def _offer_mcp(offered: Offer, tool: Json, listed: Collection[McpTool], functions: Collection[str]) -> None:
    server, allowed = mcp_server_of(tool), tool.get("allowed_tools")
    for one in listed:
        if allowed is not None and one.name not in allowed:
            continue
        whole = re.sub(r"[^a-zA-Z0-9_-]", "_", f"{server.label}__{one.name}")
        names = chain([whole[:MAX_NAME_CHARS]], (f"{whole[: MAX_NAME_CHARS - 6]}_{number}" for number in count(2)))
        name = next(name for name in names if name not in functions and name not in offered.kinds)
        _add(offered, {"name": name, "description": one.description, "parameters": one.parameters}, "mcp")
        offered.mcp[name] = (server, one.name)


def _add(offered: Offer, definition: Json, kind: ToolKind) -> None:
    offered.tools.append({"type": "function", "function": definition})
    offered.kinds[definition["name"]] = kind


def chat_tool_choice(choice: Any, offered: Offer) -> Any:
    """A stored tool_choice in chat-completions form; None when unset or when there is nothing to choose from."""
    if choice is None or not offered.tools:
        return None
    if isinstance(choice, str):
        return choice
    name = choice["function"]["name"] if choice["type"] == "function" else offered.names.get(choice["type"])
    return {"type": "function", "function": {"name": name}} if name else None
