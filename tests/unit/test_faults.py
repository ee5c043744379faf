"""Bad bodies get the API's words, and the walk that finds the fault agrees with msgspec on what is one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from afterglow import objects
from afterglow.api import bodies, faults
from afterglow.errors import ApiError, InvalidRequest
from afterglow.objects import (
    CreateAssistant,
    CreateMessage,
    CreateRun,
    CreateThread,
    CreateThreadAndRun,
    ModifyAssistant,
    ModifyMessage,
    ModifyRun,
    ModifyThread,
    SubmitToolOutputs,
)

NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON. If you have trouble "
    "figuring out how to fix this, please contact us through our help center at help.openai.com.)"
)
STORE = "tool_resources.file_search.vector_stores[0]"
NAME = "tools[0].function.name"


def assistant(**keys: Any) -> dict[str, Any]:
    return {"model": "m", **keys}


def run(**keys: Any) -> dict[str, Any]:
    return {"assistant_id": "asst_1", **keys}


def message(content: Any = "hi", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def function(name: Any = "f", **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **keys}}


def search(**options: Any) -> dict[str, Any]:
    return {"type": "file_search", "file_search": options}


def with_store(**keys: Any) -> dict[str, Any]:
    return assistant(tool_resources={"file_search": {"vector_stores": [keys]}})


def as_json(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def refusal(body: Any, kind: type[objects.Body]) -> ApiError:
    with pytest.raises(InvalidRequest) as caught:
        bodies.decode(as_json(body), kind)
    return caught.value


# --- the wording -----------------------------------------------------------------------------------------------

WORDED: list[tuple[type[objects.Body], Any, str, str | None, str | None]] = [
    # the body itself
    (CreateMessage, [], "Invalid type: expected an object, but got an array instead.", None, "invalid_type"),
    (CreateMessage, "x", "Invalid type: expected an object, but got a string instead.", None, "invalid_type"),
    (CreateMessage, None, "Invalid type: expected an object, but got null instead.", None, "invalid_type"),
    (CreateThread, True, "Invalid type: expected an object, but got a boolean instead.", None, "invalid_type"),
    # unknown
    (CreateMessage, message(x=1), "Unknown parameter: 'x'.", "x", "unknown_parameter"),
    (
        CreateRun,
        run(tools=[function(returns={})]),
        "Unknown parameter: 'tools[0].function.returns'.",
        "tools[0].function.returns",
        "unknown_parameter",
    ),
    (
        CreateRun,
        run(tools=[search(ranking_options={"score_threshold": 0, "hybrid_search": {"weight": 1}})]),
        "Unknown parameter: 'tools[0].file_search.ranking_options.hybrid_search.weight'.",
        "tools[0].file_search.ranking_options.hybrid_search.weight",
        "unknown_parameter",
    ),
    (
        CreateRun,
        run(tools=[search(ranking_options={"score_threshold": 0, "hybrid_search": {"text_weight": -1}})]),
        "Invalid 'tools[0].file_search.ranking_options.hybrid_search.text_weight': decimal below minimum value. "
        "Expected a value >= 0, but got -1 instead.",
        "tools[0].file_search.ranking_options.hybrid_search.text_weight",
        "decimal_below_min_value",
    ),
    (
        ModifyAssistant,
        {"tool_resources": {"file_search": {"vector_stores": []}}},
        "Unknown parameter: 'tool_resources.file_search.vector_stores'.",
        "tool_resources.file_search.vector_stores",
        "unknown_parameter",
    ),
    (CreateRun, run(**{"x-mine": 1}), "Unknown parameter: 'x-mine'.", "x-mine", "unknown_parameter"),
    (
        CreateMessage,
        message(attachments=[{"file_id": "f", "tools": [{"type": "file_search", "x-mine": 1}]}]),
        "Unknown parameter: 'attachments[0].tools[0].x-mine'.",
        "attachments[0].tools[0].x-mine",
        "unknown_parameter",
    ),
    (
        CreateMessage,
        message(**{"k" * 1000: 1}),
        f"Unknown parameter: '{'k' * 256}...'.",
        "k" * 256 + "...",
        "unknown_parameter",
    ),
    # missing
    (
        CreateMessage,
        {"role": "user"},
        "Missing required parameter: 'content'.",
        "content",
        "missing_required_parameter",
    ),
    (
        SubmitToolOutputs,
        {"tool_outputs": [{"output": "1"}]},
        "Missing required parameter: 'tool_outputs[0].tool_call_id'.",
        "tool_outputs[0].tool_call_id",
        "missing_required_parameter",
    ),
    (
        CreateRun,
        run(tools=[{}]),
        "Missing required parameter: 'tools[0].type'.",
        "tools[0].type",
        "missing_required_parameter",
    ),
    (
        CreateRun,
        run(tool_choice={"function": {"name": "f"}}),
        "Missing required parameter: 'tool_choice.type'.",
        "tool_choice.type",
        "missing_required_parameter",
    ),
    (
        CreateRun,
        run(response_format={"type": "json_schema", "json_schema": {}}),
        "Missing required parameter: 'response_format.json_schema.name'.",
        "response_format.json_schema.name",
        "missing_required_parameter",
    ),
    (
        CreateThread,
        {"messages": [message(), {"content": "x"}]},
        "Missing required parameter: 'messages[1].role'.",
        "messages[1].role",
        "missing_required_parameter",
    ),
    # types
    (
        CreateAssistant,
        {"model": 3},
        "Invalid type for 'model': expected a string, but got an integer instead.",
        "model",
        "invalid_type",
    ),
    (
        CreateAssistant,
        {"model": None},
        "Invalid type for 'model': expected a string, but got null instead.",
        "model",
        "invalid_type",
    ),
    (
        CreateAssistant,
        assistant(name=False),
        "Invalid type for 'name': expected a string, but got a boolean instead.",
        "name",
        "invalid_type",
    ),
    (
        CreateAssistant,
        assistant(tools={}),
        "Invalid type for 'tools': expected an array, but got an object instead.",
        "tools",
        "invalid_type",
    ),
    (
        CreateAssistant,
        assistant(tools=["code_interpreter"]),
        "Invalid type for 'tools[0]': expected an object, but got a string instead.",
        "tools[0]",
        "invalid_type",
    ),
    (
        CreateAssistant,
        assistant(tools=[function(parameters=[])]),
        "Invalid type for 'tools[0].function.parameters': expected an object, but got an array instead.",
        "tools[0].function.parameters",
        "invalid_type",
    ),
    (
        CreateRun,
        run(max_prompt_tokens=300.0),
        "Invalid type for 'max_prompt_tokens': expected an integer, but got a decimal number instead.",
        "max_prompt_tokens",
        "invalid_type",
    ),
    (
        CreateRun,
        run(max_prompt_tokens=True),
        "Invalid type for 'max_prompt_tokens': expected an integer, but got a boolean instead.",
        "max_prompt_tokens",
        "invalid_type",
    ),
    (
        CreateRun,
        run(temperature="1"),
        "Invalid type for 'temperature': expected a decimal number, but got a string instead.",
        "temperature",
        "invalid_type",
    ),
    (
        CreateRun,
        run(stream=1),
        "Invalid type for 'stream': expected a boolean, but got an integer instead.",
        "stream",
        "invalid_type",
    ),
    (
        CreateMessage,
        message(7),
        "Invalid type for 'content': expected one of a string or array of objects, but got an integer instead.",
        "content",
        "invalid_type",
    ),
    (
        CreateThread,
        {"messages": [message({})]},
        "Invalid type for 'messages[0].content': expected one of a string or array of objects, "
        "but got an object instead.",
        "messages[0].content",
        "invalid_type",
    ),
    (
        CreateMessage,
        message(role=1),
        "Invalid type for 'role': expected one of 'user' or 'assistant', but got an integer instead.",
        "role",
        "invalid_type",
    ),
    (
        CreateRun,
        run(tool_choice=7),
        "Invalid type for 'tool_choice': expected one of one of 'none', 'auto', or 'required' or object, "
        "but got an integer instead.",
        "tool_choice",
        "invalid_type",
    ),
    (
        CreateRun,
        run(response_format=[]),
        "Invalid type for 'response_format': expected one of 'auto' or object, but got an array instead.",
        "response_format",
        "invalid_type",
    ),
    (
        CreateAssistant,
        assistant(tools=[{"type": None}]),
        "Invalid type for 'tools[0].type': expected one of 'code_interpreter', 'file_search', or 'function', "
        "but got null instead.",
        "tools[0].type",
        "invalid_type",
    ),
    (
        SubmitToolOutputs,
        {"tool_outputs": [{"tool_call_id": "call_1", "output": 5}]},
        "Invalid type for 'tool_outputs[0].output': expected a string, but got an integer instead.",
        "tool_outputs[0].output",
        "invalid_type",
    ),
    # choices
    (
        CreateMessage,
        message(role="system"),
        "Invalid value: 'system'. Supported values are: 'user' and 'assistant'.",
        "role",
        "invalid_value",
    ),
    (
        CreateAssistant,
        assistant(tools=[{"type": "retrieval"}]),
        "Invalid value: 'retrieval'. Supported values are: 'code_interpreter', 'file_search', and 'function'.",
        "tools[0].type",
        "invalid_value",
    ),
    (
        CreateMessage,
        message([{"type": "refusal", "refusal": "no"}]),
        "Invalid value: 'refusal'. Supported values are: 'text', 'image_file', and 'image_url'.",
        "content[0].type",
        "invalid_value",
    ),
    (
        CreateRun,
        run(tool_choice="any"),
        "Invalid value: 'any'. Supported values are: 'none', 'auto', and 'required'.",
        "tool_choice",
        "invalid_value",
    ),
    (
        CreateRun,
        run(response_format="json"),
        "Invalid value: 'json'. Supported values are: 'auto'.",
        "response_format",
        "invalid_value",
    ),
    (
        CreateRun,
        run(reasoning_effort="huge"),
        "Invalid value: 'huge'. Supported values are: 'none', 'minimal', 'low', 'medium', 'high', 'xhigh', and 'max'.",
        "reasoning_effort",
        "invalid_value",
    ),
    (
        CreateMessage,
        message(role="r" * 1000),
        f"Invalid value: '{'r' * 256}...'. Supported values are: 'user' and 'assistant'.",
        "role",
        "invalid_value",
    ),
    # lengths
    (
        CreateAssistant,
        assistant(instructions="a" * 256_001),
        "Invalid 'instructions': string too long. Expected a string with maximum length 256000, "
        "but got a string with length 256001 instead.",
        "instructions",
        "string_above_max_length",
    ),
    (
        CreateAssistant,
        assistant(name="é" * 257),
        "Invalid 'name': string too long. Expected a string with maximum length 256, "
        "but got a string with length 257 instead.",
        "name",
        "string_above_max_length",
    ),
    (
        CreateAssistant,
        assistant(tools=[{"type": "code_interpreter"}] * 132),
        "Invalid 'tools': array too long. Expected an array with maximum length 128, "
        "but got an array with length 132 instead.",
        "tools",
        "array_above_max_length",
    ),
    (
        CreateMessage,
        message([]),
        "Invalid 'content': empty array. Expected an array with minimum length 1, but got an empty array instead.",
        "content",
        "empty_array",
    ),
    (
        CreateMessage,
        message(metadata={f"k{n}": "v" for n in range(17)}),
        "Invalid 'metadata': too many properties. Expected an object with at most 16 properties, "
        "but got an object with 17 properties instead.",
        "metadata",
        "object_above_max_properties",
    ),
    (
        CreateMessage,
        message(metadata={"topic": "v" * 513}),
        "Invalid 'metadata.topic': string too long. Expected a string with maximum length 512, "
        "but got a string with length 513 instead.",
        "metadata.topic",
        "string_above_max_length",
    ),
    (
        CreateMessage,
        message(metadata={"k" * 65: "v"}),
        "Invalid property name in 'metadata': 'kkk...kkk' is too long. Expected a string with maximum length 64, "
        "but got a string with length 65 instead.",
        "metadata." + "k" * 65,
        "property_name_above_max_length",
    ),
    (
        ModifyThread,
        {"metadata": {"n": 1}},
        "Invalid type for 'metadata.n': expected a string, but got an integer instead.",
        "metadata.n",
        "invalid_type",
    ),
    # function names
    (
        CreateRun,
        run(tools=[function("get weather")]),
        f"Invalid '{NAME}': string does not match pattern. "
        "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'.",
        NAME,
        "invalid_value",
    ),
    (
        CreateRun,
        run(tools=[function("get_weather\n")]),
        f"Invalid '{NAME}': string does not match pattern. "
        "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'.",
        NAME,
        "invalid_value",
    ),
    (
        CreateRun,
        run(tools=[function("f" * 65)]),
        f"Invalid '{NAME}': string too long. Expected a string with maximum length 64, "
        "but got a string with length 65 instead.",
        NAME,
        "string_above_max_length",
    ),
    (
        CreateRun,
        run(tools=[function("")]),
        f"Invalid '{NAME}': string too short. Expected a string with minimum length 1, "
        "but got an empty string instead.",
        NAME,
        "string_below_min_length",
    ),
    # numbers
    (
        CreateRun,
        run(max_prompt_tokens=255),
        "Invalid 'max_prompt_tokens': integer below minimum value. Expected a value >= 256, but got 255 instead.",
        "max_prompt_tokens",
        "integer_below_min_value",
    ),
    (
        CreateRun,
        run(tools=[search(max_num_results=51)]),
        "Invalid 'tools[0].file_search.max_num_results': integer above maximum value. "
        "Expected a value <= 50, but got 51 instead.",
        "tools[0].file_search.max_num_results",
        "integer_above_max_value",
    ),
    (
        CreateRun,
        run(max_completion_tokens=2**63),
        "Invalid 'max_completion_tokens': integer above maximum value. "
        "Expected a value <= 9223372036854775807, but got 9223372036854775808 instead.",
        "max_completion_tokens",
        "integer_above_max_value",
    ),
    (
        CreateRun,
        run(max_prompt_tokens=10**400),
        "Invalid 'max_prompt_tokens': integer above maximum value. "
        f"Expected a value <= 9223372036854775807, but got 1{'0' * 255}... instead.",
        "max_prompt_tokens",
        "integer_above_max_value",
    ),
    (
        CreateRun,
        run(truncation_strategy={"type": "last_messages", "last_messages": 0}),
        "Invalid 'truncation_strategy.last_messages': integer below minimum value. "
        "Expected a value >= 1, but got 0 instead.",
        "truncation_strategy.last_messages",
        "integer_below_min_value",
    ),
    (
        CreateRun,
        run(temperature=3),
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3 instead.",
        "temperature",
        "decimal_above_max_value",
    ),
    (
        CreateRun,
        run(top_p=-0.5),
        "Invalid 'top_p': decimal below minimum value. Expected a value >= 0, but got -0.5 instead.",
        "top_p",
        "decimal_below_min_value",
    ),
    (
        CreateRun,
        b'{"assistant_id": "asst_1", "temperature": 1e999}',
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got Infinity instead.",
        "temperature",
        "decimal_above_max_value",
    ),
    (
        CreateRun,
        json.dumps(run(tools=[function(parameters={"a": ["?"]})])).replace('"?"', "-1e999").encode(),
        "Invalid 'tools[0].function.parameters.a[0]': decimal below minimum value. "
        "Expected a value >= -1.7976931348623157e+308, but got -Infinity instead.",
        "tools[0].function.parameters.a[0]",
        "decimal_below_min_value",
    ),
    (
        CreateAssistant,
        with_store(
            chunking_strategy={
                "type": "static",
                "static": {"max_chunk_size_tokens": 800, "chunk_overlap_tokens": 401},
            }
        ),
        f"Invalid '{STORE}.chunking_strategy.static.chunk_overlap_tokens': integer above maximum value. "
        "Expected a value <= 400, but got 401 instead.",
        f"{STORE}.chunking_strategy.static.chunk_overlap_tokens",
        "integer_above_max_value",
    ),
    # text that cannot be stored
    (
        CreateMessage,
        message("a\x00b"),
        "Invalid 'content': string contains a NUL character.",
        "content",
        "invalid_value",
    ),
    (
        CreateMessage,
        message([{"type": "text", "text": "\ud83d"}]),
        "Invalid 'content[0].text': string contains a lone surrogate.",
        "content[0].text",
        "invalid_value",
    ),
    (
        CreateMessage,
        message(role="\x00"),
        "Invalid 'role': string contains a NUL character.",
        "role",
        "invalid_value",
    ),
    (
        CreateMessage,
        message(metadata={"a\x00": "v"}),
        "Invalid property name in 'metadata': string contains a NUL character.",
        "metadata.a\ufffd",
        "invalid_value",
    ),
    (
        CreateMessage,
        message(**{"\udc00": 1}),
        "Invalid property name: string contains a lone surrogate.",
        "\ufffd",
        "invalid_value",
    ),
    (
        CreateRun,
        run(tools=[function(parameters={"properties": {"a": {"enum": ["x", "\x00"]}}})]),
        "Invalid 'tools[0].function.parameters.properties.a.enum[1]': string contains a NUL character.",
        "tools[0].function.parameters.properties.a.enum[1]",
        "invalid_value",
    ),
    (
        CreateRun,
        run(tools=[{"type": "code_interpreter", "x-mine": {"k\x00": 1}}]),
        "Invalid property name in 'tools[0].x-mine': string contains a NUL character.",
        "tools[0].x-mine.k\ufffd",
        "invalid_value",
    ),
    # rules across keys
    (CreateMessage, message(""), "Message content must be non-empty.", "content", None),
    (CreateMessage, message(" \n\t\u2003"), "Message content must be non-empty.", "content", None),
    (
        CreateMessage,
        message([{"type": "text", "text": ""}, {"type": "text", "text": " "}]),
        "Message content must be non-empty.",
        "content",
        None,
    ),
    (
        CreateThread,
        {"messages": [message(), message("")]},
        "Message content must be non-empty.",
        "messages[1].content",
        None,
    ),
    (
        CreateRun,
        run(additional_messages=[message("")]),
        "Message content must be non-empty.",
        "additional_messages[0].content",
        None,
    ),
    (
        CreateThreadAndRun,
        run(thread={"messages": [message("")]}),
        "Message content must be non-empty.",
        "thread.messages[0].content",
        None,
    ),
    (
        CreateThreadAndRun,
        run(thread={"tool_resources": {"file_search": {"vector_store_ids": ["vs_1"], "vector_stores": [{}]}}}),
        "Mutually exclusive parameters: 'thread.tool_resources.file_search.vector_store_ids' and "
        "'thread.tool_resources.file_search.vector_stores'. Ensure you are only providing one of: "
        "'thread.tool_resources.file_search.vector_store_ids' or 'thread.tool_resources.file_search.vector_stores'.",
        "thread.tool_resources.file_search",
        "mutually_exclusive_parameters",
    ),
]


@pytest.mark.parametrize(("kind", "body", "text", "param", "code"), WORDED)
def test_each_fault_has_the_words_of_the_api(
    kind: type[objects.Body], body: Any, text: str, param: str | None, code: str | None
):
    """A body with one fault is answered with exactly the API's message, param and code, as a 400."""
    error = refusal(body, kind)
    assert (error.message, error.param, error.code) == (text, param, code)
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert json.loads(error.body())["error"]["message"] == text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"role": "user", "content": "x"} x',
        b'{"role": "user", "content": "x",}',
        b"{'role': 'user'}",
        b'{"role": "user", "content": NaN}',
        b'{"role": "user", "content": -Infinity}',
        b'{"role": "user", "content": "\xff"}',
        b'{"role": "user", "content": "\xed\xa0\x80"}',
        b'{"role": "user", "content": "\x00"}',
        b'\xef\xbb\xbf{"role": "user", "content": "x"}',
        '{"role": "user", "content": "x"}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"role": "user", "content": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_json_gets_the_json_error(body: bytes):
    """Broken JSON, broken UTF-8 and bottomless nesting are the API's JSON error, before any validation."""
    error = refusal(body, CreateMessage)
    assert (error.message, error.param, error.code) == (NOT_JSON, None, None)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CreateRun, {"tools": [{}], "stream": 1, "assistant_id": 2}),
        (CreateRun, {"tools": [{"typ": 1}], "stream": 1}),
    ],
)
def test_the_first_fault_in_document_order_is_told(kind: type[objects.Body], body: Any):
    """Of several faults the one that comes first in the body is told; what is missing comes last."""
    assert refusal(body, kind).param == "tools[0].type"
    assert refusal(dict(reversed(body.items())), kind).param != "tools[0].type"


# --- what passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (rb"\ud83d\ude00", "\N{GRINNING FACE}"),
        (rb"\\u0000", r"\u0000"),
        (rb"\\ud800", r"\ud800"),
        (b"\xf0\x9f\x98\x80", "\N{GRINNING FACE}"),
        (rb"\u0001", "\x01"),
    ],
)
def test_whole_characters_pass(text: bytes, read: str):
    """Surrogate pairs, escaped backslashes and control characters but NUL are read as they are meant."""
    body = bodies.decode(b'{"role": "user", "content": "' + text + b'"}', CreateMessage)
    assert body.content == read


def test_the_last_of_equal_keys_counts():
    """Of a key given twice the last value is read, even where the first would have been refused."""
    body = bodies.decode(b'{"role": "system", "content": "x", "content": "y", "role": "user"}', CreateMessage)
    assert (body.role, body.content) == ("user", "y")
    assert refusal(b'{"role": "user", "content": "y", "role": "system"}', CreateMessage).param == "role"


def test_whole_numbers_pass_for_decimals():
    """An integer, also minus zero, is a legal decimal number."""
    body = bodies.decode(b'{"assistant_id": "a", "temperature": 1, "top_p": -0}', CreateRun)
    assert (body.temperature, body.top_p) == (1.0, 0.0)


def test_left_out_is_not_null():
    """A key that was left out stays UNSET, a null stays null."""
    body = bodies.decode(b'{"name": null}', ModifyAssistant)
    assert body.name is None
    assert body.description is msgspec.UNSET


def test_keys_of_other_vendors_are_kept_on_tools():
    """Keys beginning `x-` on tools are kept as sent, apart from the tool's own."""
    tools = [{"type": "code_interpreter", "x-gpu": {"count": [1, 2.5]}}, {**function(), "x-a": None, "x-b": "c"}]
    body = bodies.decode(as_json(assistant(tools=tools)), CreateAssistant)
    assert [tool.vendor for tool in body.tools] == [{"x-gpu": {"count": [1, 2.5]}}, {"x-a": None, "x-b": "c"}]
    assert body.tools[1].function.name == "f"


def test_our_name_for_vendor_keys_is_not_the_callers():
    """The key under which we keep vendor keys is refused from callers, however it is escaped."""
    key = "".join(f"\\u{ord(letter):04x}" for letter in objects.VENDOR_KEYS)
    body = b'{"assistant_id": "a", "tools": [{"type": "code_interpreter", "%b": {}}]}' % key.encode()
    assert refusal(body, CreateRun).param is not None


def test_text_beside_an_image_may_be_empty():
    """A message with an image says something, whatever its text."""
    parts = [{"type": "text", "text": " "}, {"type": "image_file", "image_file": {"file_id": "file-1"}}]
    assert len(bodies.decode(as_json(message(parts)), CreateMessage).content) == 2


def test_schemas_may_be_nested_so_deep_and_no_deeper():
    """A JSON schema of 100 levels passes and one of 101 is refused, with or without a reason to look closer."""
    for extra in ({}, {"x-mine": 1}):
        bodies.decode(as_json(run(tools=[{**function(parameters=nested(100)), **extra}])), CreateRun)
        error = refusal(run(tools=[{**function(parameters=nested(101)), **extra}]), CreateRun)
        assert error.param == "tools[0].function.parameters"
        assert error.message == f"Invalid '{error.param}': nested too deeply. Expected at most 100 levels."
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": nested(101)}}
    assert refusal(run(response_format=schema), CreateRun).param == "response_format.json_schema.schema"


def nested(levels: int) -> dict[str, Any]:
    return {} if levels == 1 else {"a": nested(levels - 1)}


def test_numbers_that_nobody_can_read_are_refused():
    """An integer of more digits than Python converts is a 400, wherever it stands."""
    digits = b"9" * 5000
    assert refusal(b'{"assistant_id": "a", "max_prompt_tokens": %b}' % digits, CreateRun).param == "max_prompt_tokens"
    assert refusal(b'{"assistant_id": "a", "temperature": -%b}' % digits, CreateRun).param == "temperature"


def test_what_only_msgspec_refuses_is_a_400_too(monkeypatch: pytest.MonkeyPatch):
    """Where the walk finds no fault and msgspec does, the caller hears msgspec's reason as a 400."""
    monkeypatch.setattr(faults, "check_shape", lambda kind, plain: None)
    error = refusal(message(role=1), CreateMessage)
    assert error.message.startswith("Invalid request body: ")


# --- requests --------------------------------------------------------------------------------------------------


def request(body: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}, receive)


async def test_parse_reads_the_body_of_a_request():
    """A good request is read as what the route asked for."""
    body = await bodies.parse(request(b'{"role": "user", "content": "hi"}'), CreateMessage)
    assert body == CreateMessage(role="user", content="hi")


async def test_an_empty_body_passes_where_it_may():
    """No body stands for `{}` where the route says so, and is no JSON elsewhere; `null` never stands for it."""
    assert await bodies.parse(request(b""), CreateThread, empty_ok=True) == CreateThread()
    assert await bodies.parse(request(b"{}"), CreateThread, empty_ok=True) == CreateThread()
    for body, empty_ok in ((b"", False), (b"null", True)):
        with pytest.raises(InvalidRequest):
            await bodies.parse(request(body), CreateThread, empty_ok=empty_ok)


# --- any body whatever -----------------------------------------------------------------------------------------

GOOD_TOOLS = [
    {"type": "code_interpreter"},
    search(max_num_results=5, ranking_options={"score_threshold": 0.5, "ranker": "auto", "hybrid_search": None}),
    search(ranking_options={"score_threshold": 1, "hybrid_search": {"text_weight": 1, "embedding_weight": 0.5}}),
    function("get_weather", description="d", parameters={"type": "object", "properties": {"a": {}}}, strict=True),
]
GOOD_MESSAGE = message(
    [
        {"type": "text", "text": "hi"},
        {"type": "image_file", "image_file": {"file_id": "file-1", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    ],
    attachments=[{"file_id": "file-1", "tools": [{"type": "file_search"}, {"type": "code_interpreter"}]}],
    metadata={"a": "b"},
)
GOOD_STORE = {
    "file_ids": ["file-1"],
    "chunking_strategy": {"type": "static", "static": {"max_chunk_size_tokens": 800, "chunk_overlap_tokens": 400}},
    "metadata": {},
}
GOOD_RESOURCES = {"code_interpreter": {"file_ids": ["file-1"]}, "file_search": {"vector_store_ids": ["vs_1"]}}
NEW_RESOURCES = {"code_interpreter": None, "file_search": {"vector_stores": [GOOD_STORE]}}
GOOD_THREAD = {"messages": [message("x"), GOOD_MESSAGE], "tool_resources": NEW_RESOURCES, "metadata": None}
GOOD_ASSISTANT = assistant(
    name="n",
    description=None,
    instructions="i",
    tools=GOOD_TOOLS,
    metadata={"k": "v"},
    temperature=1,
    top_p=0.5,
    response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {"a": [1]}, "strict": None}},
    reasoning_effort="low",
)
GOOD_RUN = run(
    model="m",
    instructions="i",
    tools=GOOD_TOOLS,
    stream=True,
    max_prompt_tokens=256,
    truncation_strategy={"type": "last_messages", "last_messages": 3},
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    parallel_tool_calls=False,
    response_format="auto",
)
GOOD: list[tuple[type[objects.Body], dict[str, Any]]] = [
    (CreateAssistant, {**GOOD_ASSISTANT, "tool_resources": NEW_RESOURCES}),
    (ModifyAssistant, {**GOOD_ASSISTANT, "tool_resources": GOOD_RESOURCES}),
    (CreateMessage, GOOD_MESSAGE),
    (ModifyMessage, {"metadata": {"a": "b"}}),
    (CreateThread, GOOD_THREAD),
    (ModifyThread, {"tool_resources": GOOD_RESOURCES, "metadata": {}}),
    (CreateRun, {**GOOD_RUN, "additional_messages": [GOOD_MESSAGE], "additional_instructions": "x"}),
    (CreateThreadAndRun, {**GOOD_RUN, "thread": GOOD_THREAD, "tool_resources": GOOD_RESOURCES}),
    (ModifyRun, {"metadata": {"a": "b"}}),
    (SubmitToolOutputs, {"tool_outputs": [{"tool_call_id": "call_1", "output": "1"}], "stream": False}),
]
KINDS = [kind for kind, _ in GOOD]
WORDS = st.sampled_from(
    [*CreateRun.__struct_fields__, *CreateMessage.__struct_fields__, "type", "text", "function", "name", "auto", "x-a"]
)
TEXT = WORDS | st.text(st.characters(), max_size=4) | st.sampled_from(["", " ", "\x00", "\ud800", "\udfff", "😀"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([10**400, -(10**30), 1e300])
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=5), max_leaves=20
)
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def answers_sensibly(body: bytes, kind: type[objects.Body]) -> bool:
    try:
        bodies.decode(body, kind)
    except ApiError as error:
        return error.status == 400 and json.loads(error.body())["error"]["message"] == error.message
    return True


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(body=ANYTHING | st.dictionaries(WORDS, ANYTHING, max_size=6))
def test_no_json_raises_anything_else(kind: type[objects.Body], body: Any):
    """Whatever JSON a caller sends, the answer is the decoded body or an error that can be sent."""
    assert answers_sensibly(as_json(body), kind)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(body=st.binary(max_size=40) | st.text(st.characters(codec="utf-8"), max_size=40).map(str.encode))
def test_no_bytes_raise_anything_else(kind: type[objects.Body], body: bytes):
    """Whatever bytes a caller sends, the answer is the decoded body or an error that can be sent."""
    assert answers_sensibly(body, kind)


@pytest.mark.parametrize(("kind", "body"), GOOD)
def test_the_good_bodies_are_good(kind: type[objects.Body], body: Any):
    """What the mutations below start from passes, quickly and carefully alike."""
    faults.check_shape(kind, body)
    assert bodies.decode(as_json(body), kind) == msgspec.convert(body, kind)


WRONG = [None, True, 0, -1, 3.5, 10**30, "", "auto", "a b", "x" * 65, "x" * 513, [], {}, [{}], {"type": "function"}]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "good"), GOOD)
@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_the_walk_and_msgspec_agree(kind: type[objects.Body], good: Any, data: st.DataObject):
    """Wherever a good body is changed, the walk finds a fault exactly when msgspec refuses the body."""
    body = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(1, 2))):
        if body:
            spoil(body, data)
    assert has_fault(body, kind) == is_refused(body, kind), body


def spoil(body: Any, data: st.DataObject) -> None:
    found = list(places(body))
    holder, key = found[data.draw(st.integers(0, len(found) - 1))]
    wrong = copy.deepcopy(data.draw(st.sampled_from(WRONG)))
    match data.draw(st.sampled_from(["drop", "replace", "add", "lengthen"])):
        case "drop":
            del holder[key]
        case "replace":
            holder[key] = wrong
        case "add" if isinstance(holder, dict):
            holder[data.draw(WORDS.filter(lambda word: not word.startswith("x-")))] = wrong
        case _ if isinstance(holder[key], str):
            holder[key] *= 600
        case _ if isinstance(holder[key], list):
            holder[key] *= 130
        case _ if isinstance(holder[key], dict):
            holder[key].update({f"k{number}": "v" for number in range(17)})


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield node, key
        yield from places(child)


def has_fault(body: Any, kind: type[objects.Body]) -> bool:
    try:
        faults.check_shape(kind, body)
    except InvalidRequest:
        return True
    return False


def is_refused(body: Any, kind: type[objects.Body]) -> bool:
    try:
        msgspec.json.decode(as_json(body), type=kind)
    except msgspec.ValidationError:
        return True
    return False
