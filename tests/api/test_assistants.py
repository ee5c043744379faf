"""Assistants: created, read, modified, deleted, with every default, limit and null."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from afterglow.testing import SetClock, says
from tests.api.wire import Fault, Json, Wire
from tests.conftest import GET_WEATHER, Server, ServerFactory

ASSISTANT_ID = re.compile(r"asst_[A-Za-z0-9]{24}")
NOW = 1_700_000_000
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
CODE = {"type": "code_interpreter"}
# What is not set, as it is shown.
UNSET: Json = {
    "name": None,
    "description": None,
    "instructions": None,
    "tools": [],
    "tool_resources": {},
    "metadata": {},
    "temperature": 1.0,
    "top_p": 1.0,
    "response_format": "auto",
    "reasoning_effort": None,
}
# For each key, two values that differ from its default and from each other.
VALUES: dict[str, tuple[Any, Any]] = {
    "name": ("Ada", "Bob"),
    "description": ("counts", "draws"),
    "instructions": ("Be brief.", "Be long."),
    "tools": ([CODE], [{"type": "file_search"}, CODE]),
    "tool_resources": ({"code_interpreter": {"file_ids": []}}, {"file_search": {"vector_store_ids": []}}),
    "metadata": ({"a": "1", "b": "2"}, {"c": "3"}),
    "temperature": (0.5, 2.0),
    "top_p": (0.25, 0.0),
    "response_format": ({"type": "json_object"}, SCHEMA_FORMAT),
    "reasoning_effort": ("none", "max"),
}


def function(name: str = "f", **more: Any) -> Json:
    return {"type": "function", "function": {"name": name, **more}}


def search(**options: Any) -> Json:
    return {"type": "file_search", "file_search": options}


def ranked(**options: Any) -> Json:
    return search(ranking_options=options)


def with_schema(name: str) -> Json:
    return {"type": "json_schema", "json_schema": {"name": name}}


def too_long(path: str, high: int) -> tuple[str, str]:
    flaw = f"string too long. Expected a string with maximum length {high}, but got a string with length {high + 1}"
    return f"Invalid '{path}': {flaw} instead.", "string_above_max_length"


def above(path: str, high: object, got: object, noun: str = "decimal") -> tuple[str, str]:
    message = f"Invalid '{path}': {noun} above maximum value. Expected a value <= {high}, but got {got} instead."
    return message, f"{noun}_above_max_value"


def below(path: str, low: object, got: object, noun: str = "decimal") -> tuple[str, str]:
    message = f"Invalid '{path}': {noun} below minimum value. Expected a value >= {low}, but got {got} instead."
    return message, f"{noun}_below_min_value"


def too_many(path: str, high: int) -> tuple[str, str]:
    flaw = f"array too long. Expected an array with maximum length {high}, but got an array with length {high + 1}"
    return f"Invalid '{path}': {flaw} instead.", "array_above_max_length"


# --- creating --------------------------------------------------------------------------------------------------


async def test_a_bare_assistant_shows_its_defaults(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """`model` is all that is needed; every other key is there with its default, also when it was sent as null."""
    async with start_server(tmp_path, clock=SetClock(NOW + 0.9)) as server:
        wire = connect(server)
        for body in ({"model": "gpt-4o"}, {"model": "gpt-4o", **dict.fromkeys(VALUES)}):
            made = await wire.made("/assistants", body)
            assert ASSISTANT_ID.fullmatch(made["id"])
            assert made == {"id": made["id"], "object": "assistant", "created_at": NOW, "model": "gpt-4o", **UNSET}
            assert await wire.read(f"/assistants/{made['id']}") == made


async def test_what_is_set_is_shown(wire: Wire):
    """Each key comes back as it was sent, at once and on every read."""
    for which in (0, 1):
        body = {"model": "m", **{name: values[which] for name, values in VALUES.items()}}
        made = await wire.made("/assistants", body)
        assert {name: made[name] for name in body} == body
        assert await wire.read(f"/assistants/{made['id']}") == made
        assert (await wire.read("/assistants"))["data"][0] == made


async def test_the_official_client_sees_the_same(server: Server, wire: Wire):
    """Create, retrieve, update and delete of the official client do what the routes do."""
    api = server.client.beta.assistants
    made = await api.create(model="gpt-4o", name="Ada", tools=[GET_WEATHER], temperature=0.5)
    assert (made.name, made.temperature, made.tools[0].type) == ("Ada", 0.5, "function")
    assert (await api.retrieve(made.id)) == made
    changed = await api.update(made.id, name="Bob")
    assert (changed.name, changed.temperature, changed.created_at) == ("Bob", 0.5, made.created_at)
    deleted = await api.delete(made.id)
    assert deleted.model_dump() == {"id": made.id, "object": "assistant.deleted", "deleted": True}


async def test_any_model_name_will_do(wire: Wire):
    """A model is never refused by its name, on create or modify."""
    made = await wire.made("/assistants", {"model": "ft:gpt-4o:acme::x/y z"})
    assert made["model"] == "ft:gpt-4o:acme::x/y z"
    assert (await wire.made(f"/assistants/{made['id']}", {"model": "qwen3:32b"}))["model"] == "qwen3:32b"


# Bodies at a limit, which pass, and one beyond, with the path, message and code of the refusal.
LIMITS: list[tuple[Json, Json, str, tuple[str, str]]] = [
    *(
        ({name: "é" * high}, {name: "\N{GRINNING FACE}" * (high + 1)}, name, too_long(name, high))
        for name, high in (("name", 256), ("description", 512), ("instructions", 256_000))
    ),
    ({"tools": [CODE] * 128}, {"tools": [CODE] * 129}, "tools", too_many("tools", 128)),
    (
        {"metadata": {f"k{n}": "" for n in range(16)}},
        {"metadata": {f"k{n}": "" for n in range(17)}},
        "metadata",
        (
            "Invalid 'metadata': too many properties. Expected an object with at most 16 properties, but got an object "
            "with 17 properties instead.",
            "object_above_max_properties",
        ),
    ),
    ({"metadata": {"k": "v" * 512}}, {"metadata": {"k": "v" * 513}}, "metadata.k", too_long("metadata.k", 512)),
    (
        {"metadata": {"k" * 64: "v"}},
        {"metadata": {"k" * 65: "v"}},
        "metadata." + "k" * 65,
        (
            "Invalid property name in 'metadata': 'kkk...kkk' is too long. Expected a string with maximum length 64, "
            "but got a string with length 65 instead.",
            "property_name_above_max_length",
        ),
    ),
    ({"temperature": 2}, {"temperature": 2.5}, "temperature", above("temperature", 2, 2.5)),
    ({"temperature": 0}, {"temperature": -1}, "temperature", below("temperature", 0, -1)),
    ({"top_p": 1}, {"top_p": 1.01}, "top_p", above("top_p", 1, 1.01)),
    ({"top_p": 0.0}, {"top_p": -0.01}, "top_p", below("top_p", 0, -0.01)),
    (
        {"tools": [function("f" * 64)]},
        {"tools": [function("f" * 65)]},
        "tools[0].function.name",
        too_long("tools[0].function.name", 64),
    ),
    (
        {"tools": [search(max_num_results=1), search(max_num_results=50)]},
        {"tools": [search(max_num_results=51)]},
        "tools[0].file_search.max_num_results",
        above("tools[0].file_search.max_num_results", 50, 51, "integer"),
    ),
    (
        {"tools": [search(max_num_results=1)]},
        {"tools": [search(max_num_results=0)]},
        "tools[0].file_search.max_num_results",
        below("tools[0].file_search.max_num_results", 1, 0, "integer"),
    ),
    (
        {"tools": [ranked(score_threshold=1)]},
        {"tools": [ranked(score_threshold=1.5)]},
        "tools[0].file_search.ranking_options.score_threshold",
        above("tools[0].file_search.ranking_options.score_threshold", 1, 1.5),
    ),
    (
        {"tools": [ranked(score_threshold=0.0, ranker="default_2024_08_21")]},
        {"tools": [ranked(score_threshold=-0.5)]},
        "tools[0].file_search.ranking_options.score_threshold",
        below("tools[0].file_search.ranking_options.score_threshold", 0, -0.5),
    ),
    (
        {"response_format": with_schema("n" * 64)},
        {"response_format": with_schema("n" * 65)},
        "response_format.json_schema.name",
        too_long("response_format.json_schema.name", 64),
    ),
    (
        {"tool_resources": {"code_interpreter": {"file_ids": []}}},
        {"tool_resources": {"code_interpreter": {"file_ids": ["file-1"] * 21}}},
        "tool_resources.code_interpreter.file_ids",
        too_many("tool_resources.code_interpreter.file_ids", 20),
    ),
    (
        {"tool_resources": {"file_search": {"vector_store_ids": []}}},
        {"tool_resources": {"file_search": {"vector_store_ids": ["vs_1", "vs_2"]}}},
        "tool_resources.file_search.vector_store_ids",
        too_many("tool_resources.file_search.vector_store_ids", 1),
    ),
]


async def test_limits_hold_to_the_one(wire: Wire):
    """What is just at a limit passes, and what is one beyond is refused, on create and on modify alike."""
    kept = await wire.made("/assistants", {"model": "m"})
    for fits, exceeds, param, (message, code) in LIMITS:
        for path, more in (("/assistants", {"model": "m"}), (f"/assistants/{kept['id']}", {})):
            assert (await wire.post(path, {**more, **fits})).status == 200, fits
            refusal = await wire.post(path, {**more, **exceeds})
            assert refusal.fault == Fault(400, message, param, code)


UNKNOWN: list[tuple[Json, str]] = [
    ({"file_ids": []}, "file_ids"),
    ({"x-mine": 1}, "x-mine"),
    ({"id": "asst_1"}, "id"),
    ({"tools": [{"type": "code_interpreter", "container": 1}]}, "tools[0].container"),
    ({"tools": [{"type": "function", "function": {"name": "f"}, "name": "f"}]}, "tools[0].name"),
    ({"tools": [function(x=1)]}, "tools[0].function.x"),
    ({"tools": [search(x=1)]}, "tools[0].file_search.x"),
    ({"tools": [ranked(score_threshold=0, x=1)]}, "tools[0].file_search.ranking_options.x"),
    ({"tool_resources": {"x": 1}}, "tool_resources.x"),
    ({"tool_resources": {"code_interpreter": {"x": 1}}}, "tool_resources.code_interpreter.x"),
    ({"tool_resources": {"file_search": {"x": 1}}}, "tool_resources.file_search.x"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "x": 1}}},
        "response_format.json_schema.x",
    ),
]


async def test_unknown_keys_are_refused_at_every_level(wire: Wire):
    """A key that the reference does not have is refused with its path, wherever it stands; nothing is created."""
    for body, path in UNKNOWN:
        refusal = await wire.post("/assistants", {"model": "m", **body})
        assert refusal.fault == Fault(400, f"Unknown parameter: '{path}'.", path, "unknown_parameter")
    assert (await wire.read("/assistants"))["data"] == []


async def test_what_is_required_is_asked_for(wire: Wire):
    """`model`, and what a tool or a format cannot do without, is missed by its path."""
    for body, path in (
        ({}, "model"),
        ({"model": "m", "tools": [{}]}, "tools[0].type"),
        ({"model": "m", "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"model": "m", "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"model": "m", "tools": [ranked()]}, "tools[0].file_search.ranking_options.score_threshold"),
        ({"model": "m", "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"model": "m", "response_format": {}}, "response_format.type"),
    ):
        refusal = await wire.post("/assistants", body)
        message = f"Missing required parameter: '{path}'."
        assert refusal.fault == Fault(400, message, path, "missing_required_parameter")


async def test_choices_are_those_of_the_reference(wire: Wire):
    """Each value of a choice passes; others, the tool type of v1 among them, are refused with the list of choices."""
    for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max", None):
        made = await wire.made("/assistants", {"model": "m", "reasoning_effort": effort})
        assert made["reasoning_effort"] == effort
    for given in ("auto", {"type": "text"}, {"type": "json_object"}, SCHEMA_FORMAT):
        assert (await wire.made("/assistants", {"model": "m", "response_format": given}))["response_format"] == given
    retrieval = await wire.post("/assistants", {"model": "m", "tools": [{"type": "retrieval"}]})
    supported = "Supported values are: 'code_interpreter', 'file_search', and 'function'."
    assert retrieval.fault == Fault(400, f"Invalid value: 'retrieval'. {supported}", "tools[0].type", "invalid_value")
    ranker = await wire.post("/assistants", {"model": "m", "tools": [ranked(score_threshold=0, ranker="best")]})
    assert ranker.fault.param == "tools[0].file_search.ranking_options.ranker"


async def test_tools_come_back_as_sent(wire: Wire):
    """Tools keep order and repetition, function names may have hyphens, `strict` is filled in, and keys beginning `x-`
    are kept."""
    schema = {"type": "object", "properties": {"x-any": {"type": "string"}}, "$defs": {}, "additionalProperties": False}
    tools = [
        function("Weather-get_weather", description="d", parameters=schema, strict=True),
        CODE,
        function("python"),
        {"type": "file_search"},
        search(max_num_results=7),
        ranked(ranker="auto", score_threshold=0.0),
        {**function("f"), "x-vendor": {"deep": [1, None]}, "x-": ""},
        {"type": "code_interpreter", "x-gpu": True},
    ]
    made = await wire.made("/assistants", {"model": "m", "tools": tools})
    for tool in tools:
        if tool["type"] == "function":
            tool["function"] = {"strict": False, **tool["function"]}
    assert made["tools"] == tools
    assert (await wire.read(f"/assistants/{made['id']}"))["tools"] == tools


async def test_nothing_dangling_is_stored(wire: Wire):
    """Ids of files and stores that are not here are a 404 with the API's words, also those of a store's files; a
    store cannot be made on the way of a modification."""
    no_file = Fault(404, "No such File object: file-x", "id")
    no_store = Fault(404, "Vector store with id 'vs_x' not found.")
    made = await wire.made("/assistants", {"model": "m"})
    for resources, fault in (
        ({"code_interpreter": {"file_ids": ["file-x"]}}, no_file),
        ({"code_interpreter": {"file_ids": ["file-x"] * 20}}, no_file),
        ({"file_search": {"vector_store_ids": ["vs_x"]}}, no_store),
    ):
        for path in ("/assistants", f"/assistants/{made['id']}"):
            body = {"model": "m", "tool_resources": resources}
            assert (await wire.post(path, body)).fault == fault
    making = {"file_search": {"vector_stores": [{"file_ids": ["file-x"]}]}}
    place = "tool_resources.file_search.vector_stores"
    refusal = (await wire.post("/assistants", {"model": "m", "tool_resources": making})).fault
    assert refusal == Fault(404, "Files [file-x] were not found")
    assert (await wire.get("/vector_stores")).ids == []
    unknown = (await wire.post(f"/assistants/{made['id']}", {"tool_resources": making})).fault
    assert unknown == Fault(400, f"Unknown parameter: '{place}'.", place, "unknown_parameter")
    assert (await wire.read("/assistants"))["data"] == [made]


async def test_a_store_is_named_or_made_but_not_both(wire: Wire):
    """`vector_store_ids` and `vector_stores` exclude each other; an empty `file_search` passes."""
    both = {"file_search": {"vector_store_ids": [], "vector_stores": []}}
    refusal = await wire.post("/assistants", {"model": "m", "tool_resources": both})
    assert (refusal.status, refusal.fault.param) == (400, "tool_resources.file_search")
    made = await wire.made("/assistants", {"model": "m", "tool_resources": {"file_search": {}}})
    assert made["tool_resources"] == {"file_search": {"vector_store_ids": []}}


# --- modifying -------------------------------------------------------------------------------------------------


async def test_left_out_keys_stay(wire: Wire):
    """An empty modify changes nothing, and a modify of one key changes that key alone."""
    made = await wire.made("/assistants", {"model": "m", **{name: first for name, (first, _) in VALUES.items()}})
    path = f"/assistants/{made['id']}"
    assert await wire.made(path, {}) == made
    for name, (_, second) in VALUES.items():
        made[name] = second
        assert await wire.made(path, {name: second}) == made
        assert await wire.read(path) == made
    made["model"] = "other"
    assert await wire.made(path, {"model": "other"}) == made


async def test_null_clears(wire: Wire):
    """An explicit null brings back the default of each key, and leaves the others alone."""
    made = await wire.made("/assistants", {"model": "m", **{name: first for name, (first, _) in VALUES.items()}})
    path = f"/assistants/{made['id']}"
    for name in VALUES:
        made[name] = UNSET[name]
        assert await wire.made(path, {name: None}) == made
    refusal = await wire.post(path, {"model": None})
    assert refusal.fault == Fault(
        400, "Invalid type for 'model': expected a string, but got null instead.", "model", "invalid_type"
    )
    assert await wire.read(path) == made


async def test_maps_and_lists_are_replaced(wire: Wire):
    """Metadata, tools and tool resources are what the last modify said, not a mixture."""
    made = await wire.made("/assistants", {"model": "m", "metadata": {"a": "1"}, "tools": [CODE, function()]})
    path = f"/assistants/{made['id']}"
    assert (await wire.made(path, {"metadata": {"b": "2"}}))["metadata"] == {"b": "2"}
    assert (await wire.made(path, {"metadata": {}}))["metadata"] == {}
    assert (await wire.made(path, {"tools": [function("g")]}))["tools"] == [function("g", strict=False)]
    assert (await wire.made(path, {"tools": []}))["tools"] == []


async def test_a_refused_modify_changes_nothing(wire: Wire):
    """When one key is refused, the others are not taken either."""
    made = await wire.made("/assistants", {"model": "m", "name": "Ada"})
    path = f"/assistants/{made['id']}"
    assert (await wire.post(path, {"name": "Bob", "temperature": 3})).status == 400
    assert (await wire.post(path, {"name": "Bob", "tool_resources": {"x": 1}})).status == 400
    gone = {"code_interpreter": {"file_ids": ["file-x"]}}
    assert (await wire.post(path, {"name": "Bob", "tool_resources": gone})).status == 404
    assert await wire.read(path) == made


async def test_shown_defaults_are_not_sent_to_the_model(server: Server, wire: Wire):
    """Sampling values that nobody set are shown as 1.0 and left to the model; a set value goes, until it is cleared."""
    assistant = await wire.made("/assistants", {"model": "m", "temperature": 0.5})
    server.model.will(says("a"), says("b"))
    await server.run("hi", assistant_id=assistant["id"])
    await wire.made(f"/assistants/{assistant['id']}", {"temperature": None})
    await server.run("hi", assistant_id=assistant["id"])
    first, second = server.model.requests
    assert (first.temperature, first.top_p) == (0.5, None)
    assert (second.temperature, second.top_p) == (None, None)


# --- deleting --------------------------------------------------------------------------------------------------


async def test_a_deleted_assistant_is_gone(wire: Wire):
    """Delete answers once, and afterwards every route says 404."""
    made = await wire.made("/assistants", {"model": "m"})
    path = f"/assistants/{made['id']}"
    deleted = await wire.delete(path)
    assert deleted.json == {"id": made["id"], "object": "assistant.deleted", "deleted": True}
    for method, body in (("GET", None), ("POST", {}), ("DELETE", None)):
        gone = await wire.ask(method, path, body)
        assert gone.fault == Fault(404, f"No assistant found with id '{made['id']}'.")
    assert (await wire.read("/assistants"))["data"] == []


async def test_the_body_of_a_delete_is_not_read(wire: Wire):
    """DELETE comes with a JSON content type and an empty body; whatever it carries is left alone."""
    for body in (None, b"", b"{}", b"{not json"):
        made = await wire.made("/assistants", {"model": "m"})
        headers = {"content-type": "application/json"}
        deleted = await wire.ask("DELETE", f"/assistants/{made['id']}", body, headers=headers)
        assert deleted.json["deleted"] is True


async def test_what_an_assistant_did_survives_it(server: Server, wire: Wire):
    """Threads, messages, runs and steps stay when the assistant goes; only new runs with it are refused."""
    server.model.will(says("Hello."))
    assistant = await wire.made("/assistants", {"model": "m"})
    run = await server.run("hi", assistant_id=assistant["id"])
    await wire.delete(f"/assistants/{assistant['id']}")
    thread = f"/threads/{run.thread_id}"
    assert (await wire.read(f"{thread}/runs/{run.id}"))["assistant_id"] == assistant["id"]
    assert (await wire.read(f"{thread}/messages"))["data"][0]["assistant_id"] == assistant["id"]
    assert len((await wire.read(f"{thread}/runs/{run.id}/steps"))["data"]) == 1
    refusal = await wire.post(f"{thread}/runs", {"assistant_id": assistant["id"]})
    assert refusal.fault == Fault(404, f"No assistant found with id '{assistant['id']}'.")
