"""Tools in chat-completions form: the caller's functions as they are, server-side tools as functions of ours.

A caller's function may bear the very name we would use for a built-in tool; ours then takes another, and `Offer.kinds`
tells afterwards whose call it was.
"""

from __future__ import annotations

from itertools import chain, count
from typing import Any, Literal, NamedTuple

import msgspec

from afterglow.objects import VENDOR_KEYS, Json, Tool

ToolKind = Literal["function", "code_interpreter", "file_search"]


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
    """tools: ready to send; kinds: which kind each name belongs to; names: the name under which a kind is offered."""

    tools: list[Json]
    kinds: dict[str, ToolKind]
    names: dict[str, str]


def stored_form(tool: Tool) -> Json:
    """A tool as it is stored and echoed: as sent, without nulls, with `strict` filled in, keys beginning `x-` kept."""
    fields: Json = msgspec.to_builtins(tool)
    vendor: Json = fields.pop(VENDOR_KEYS, {})
    kind = fields["type"]
    options: Json = {key: value for key, value in (fields.get(kind) or {}).items() if value is not None}
    if kind == "function":
        options["strict"] = options.get("strict", False)
    return {"type": kind, **({kind: options} if fields.get(kind) is not None else {}), **vendor}


def offer(tools: list[Json]) -> Offer:
    """What to show the model for an assistant's or run's stored tools, in their order."""
    functions = {tool["function"]["name"] for tool in tools if tool["type"] == "function"}
    offered = Offer([], {}, {})
    for tool in tools:
        kind: ToolKind = tool["type"]
        if kind == "function":
            definition = {key: value for key, value in tool["function"].items() if value is not None}
            if not definition.get("strict"):
                definition.pop("strict", None)
        else:
            if kind in offered.names:
                continue
            built_in = BUILT_IN[kind]
            names = chain(built_in.names, (f"{built_in.names[0]}_{number}" for number in count(2)))
            name = next(name for name in names if name not in functions)
            definition = {"name": name, "description": built_in.description, "parameters": built_in.parameters}
            offered.names[kind] = name
        offered.tools.append({"type": "function", "function": definition})
        offered.kinds[definition["name"]] = kind
    return offered


def chat_tool_choice(choice: Any, offered: Offer) -> Any:
    """A stored tool_choice in chat-completions form; None when unset or when there is nothing to choose from."""
    if choice is None or not offered.tools:
        return None
    if isinstance(choice, str):
        return choice
    name = choice["function"]["name"] if choice["type"] == "function" else offered.names.get(choice["type"])
    return {"type": "function", "function": {"name": name}} if name else None
